"""The benchmark run on a tiny model, and what its engine is told."""

from __future__ import annotations

import inspect
import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from itertools import zip_longest
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rewards.ontology import QUESTIONS
from rl.answering import Exam
from rl.bench.answers import read_run
from rl.choices import split_of
from rl.config import Config, ConfigError
from rl.engine import engine_options, start_engine
from rl.evaluate import evaluate, evaluate_baselines, is_current, whole_volumes
from rl.task import Task
from rl.validation import Validation
from rollouts.hf_engine import HfEngine
from rollouts.pool import shard_by_volume
from rollouts.types import Engine, EngineError, Group, Prompt, Sampling
from rollouts.vllm_engine import VllmEngine

SHORT = ("eval.max_completion_length=6", "eval.max_examples=5")


def test_every_question_is_answered_once_and_the_run_says_what_it_is(
    make_config: Callable[..., Config], engine: Engine, workshop: Path, tmp_path: Path
) -> None:
    config = make_config(*SHORT)
    progress: list[tuple[int, int]] = []
    evaluate(
        config, engine, "SFT", workshop / "sft", tmp_path / "run", lambda *counts: progress.append(counts)
    )
    run = read_run(tmp_path / "run")
    asked = [example.example_id for example in Task(config, "test").examples[:5]]
    assert sorted(run.answers["example_id"]) == sorted(asked)
    assert (run.meta.name, run.meta.n, run.meta.max_examples) == ("SFT", 5, 5)
    assert progress[-1] == (5, 5)


class SharedOut:
    """Prompts shared out as a pool does, to shards that one engine answers one after another."""

    def __init__(self, engine: Engine, shards: int) -> None:
        self.engine, self.shards = engine, shards
        self.calls: list[list[set[str]]] = []
        """Of each call, the volumes of each shard."""

    def generate(self, prompts: list[Prompt], n: int, sampling: Sampling, seeds: list[int]) -> list[Group]:
        groups: dict[int, Group] = {}
        parts = shard_by_volume(prompts, self.shards, n * sampling.max_tokens)
        self.calls.append([{prompts[i].features.key for i in part} for part in parts])
        for part in parts:
            answers = self.engine.generate([prompts[i] for i in part], n, sampling, [seeds[i] for i in part])
            groups |= dict(zip(part, answers, strict=True))
        return [groups[i] for i in range(len(prompts))]

    def load_adapter(self, folder: Path | None) -> int:
        return self.engine.load_adapter(folder)

    def close(self) -> None:
        pass


@pytest.fixture
def small_calls(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """From when it is called, an engine gets six prompts at once."""
    usual = Exam.__init__

    def small(self: Exam, config: Config) -> None:
        usual(self, config)
        self.prompts_at_once = 6

    return lambda: monkeypatch.setattr(Exam, "__init__", small)


def test_however_many_engines_share_the_questions_the_answers_are_those_of_one(
    make_config: Callable[..., Config],
    engine: Engine,
    workshop: Path,
    tmp_path: Path,
    small_calls: Callable[[], None],
) -> None:
    """And no volume is taken up by two engines, nor in two calls: here a call has room for one and a half volumes."""
    config, adapter = make_config(SHORT[0]), workshop / "sft"
    alone = evaluate(config, engine, "SFT", adapter, tmp_path / "alone")
    small_calls()
    shared = SharedOut(engine, 2)
    run = evaluate(config, shared, "SFT", adapter, tmp_path / "shared")
    assert run.answers.equals(alone.answers)
    taken_up = [volume for call in shared.calls for shard in call for volume in shard]
    assert len(shared.calls) > 1
    assert len(taken_up) == len(set(taken_up))


def test_a_run_that_was_stopped_goes_on_with_the_questions_that_are_left(
    make_config: Callable[..., Config],
    engine: Engine,
    workshop: Path,
    tmp_path: Path,
    small_calls: Callable[[], None],
) -> None:
    """Answers of another adapter, or to the same adapter in another setting, are not taken for them."""
    config, adapter = make_config(SHORT[0]), workshop / "sft"
    alone = evaluate(config, engine, "SFT", adapter, tmp_path / "alone")
    small_calls()
    asked: list[str] = []

    class Mortal(SharedOut):
        calls_left = 1

        def generate(self, prompts: list[Prompt], *rest: Any) -> list[Group]:
            if not self.calls_left:
                raise EngineError("engine 1 died")
            self.calls_left -= 1
            asked.extend(prompt.example_id for prompt in prompts)
            return super().generate(prompts, *rest)

    for stopped in (
        (config, None),
        (make_config(SHORT[0], "eval.temperature=1"), adapter),
        (config, adapter),
    ):
        asked.clear()
        with pytest.raises(EngineError, match="engine 1 died"):
            evaluate(stopped[0], Mortal(engine, 2), "SFT", stopped[1], tmp_path / "run")
        assert asked
        assert not (tmp_path / "run" / "run.json").exists()
    immortal = Mortal(engine, 2)
    immortal.calls_left = 10
    run = evaluate(config, immortal, "SFT", adapter, tmp_path / "run")
    assert sorted(asked) == sorted(alone.answers["example_id"])  # each once
    assert run.answers.equals(alone.answers)


@given(st.lists(st.integers(1, 5), max_size=12), st.integers(1, 8))
def test_parts_hold_whole_volumes_and_every_item_once(sizes: list[int], at_once: int) -> None:
    volume_ids = [f"v{i}" for i, size in enumerate(sizes) for _ in range(size)]
    parts = whole_volumes(volume_ids, at_once)
    assert [i for part in parts for i in part] == list(range(len(volume_ids)))
    held = [{volume_ids[i] for i in part} for part in parts]
    assert sum(map(len, held)) == len(sizes)
    for part, volumes, following in zip_longest(parts, held, parts[1:]):
        assert len(part) <= at_once or len(volumes) == 1
        if following:  # no part could have held the next volume too
            assert len(part) + volume_ids.count(volume_ids[following.start]) > at_once


def test_a_run_is_current_until_its_adapter_or_settings_change(
    make_config: Callable[..., Config], engine: Engine, workshop: Path, tmp_path: Path
) -> None:
    config, folder = make_config(*SHORT), tmp_path / "run"
    adapter = workshop / "sft"
    evaluate(config, engine, "SFT", adapter, folder)
    assert is_current(config, adapter, folder)
    assert not is_current(config, None, folder)
    assert not is_current(replace(config, eval=replace(config.eval, temperature=0.5)), adapter, folder)
    assert not is_current(config, adapter, tmp_path / "nothing")


@pytest.mark.parametrize("image", ["none", "shuffled", "true_region"])
def test_a_run_says_what_was_shown_and_answers_the_items_of_the_usual_one(
    make_config: Callable[..., Config], engine: Engine, tmp_path: Path, image: str
) -> None:
    config = make_config(*SHORT, f"eval.image={image}")
    evaluate(config, engine, "x", None, tmp_path / "x")
    run, usual = read_run(tmp_path / "x"), evaluate_baselines(make_config(*SHORT), tmp_path)["baseline"]
    assert (run.meta.image, run.meta.prompts, usual.meta.image) == (image, "own", None)
    assert run.answers["item_hash"].to_list() == usual.answers["item_hash"].to_list()
    assert run.meta.dataset_fingerprint == usual.meta.dataset_fingerprint
    assert is_current(config, None, tmp_path / "x")
    assert not is_current(make_config(*SHORT), None, tmp_path / "x")


def test_a_run_on_the_users_questions_is_current_until_the_file_says_something_else(
    make_config: Callable[..., Config], engine: Engine, tmp_path: Path
) -> None:
    texts = {str(i): f'Grade {{"{QUESTIONS[i].entity}": 0}}' for i in (1, 16, 42, 60)}
    (tmp_path / "mine.json").write_text(json.dumps(texts))
    config = make_config(*SHORT, f"eval.prompts={tmp_path / 'mine.json'}")
    evaluate(config, engine, "x", None, tmp_path / "x")
    assert read_run(tmp_path / "x").meta.prompts == "mine.json"
    (tmp_path / "elsewhere").mkdir()
    shutil.copy(tmp_path / "mine.json", tmp_path / "elsewhere")
    moved = make_config(*SHORT, f"eval.prompts={tmp_path / 'elsewhere' / 'mine.json'}")
    assert is_current(moved, None, tmp_path / "x")
    (tmp_path / "mine.json").write_text(json.dumps(texts | {"1": texts["1"] + " now"}))
    assert not is_current(config, None, tmp_path / "x")


def test_validation_while_training_shows_and_asks_what_is_trained_on(
    make_config: Callable[..., Config],
) -> None:
    validation = Validation(make_config("eval.image=none", "eval.prompts=mine.json"))
    assert (validation.config.eval.image, validation.config.eval.prompts) == ("volume", "own")


def test_the_baselines_answer_the_same_questions(
    make_config: Callable[..., Config], engine: Engine, tmp_path: Path
) -> None:
    config = make_config(*SHORT)
    evaluate(config, engine, "base", None, tmp_path / "base")
    made = evaluate_baselines(config, tmp_path)
    base = read_run(tmp_path / "base")
    assert list(made) == ["baseline", "prior"]
    for name, run in made.items():
        assert read_run(tmp_path / name).answers.equals(run.answers)
        assert set(base.answers["example_id"]) == set(run.answers["example_id"])
        assert base.meta.dataset_fingerprint == run.meta.dataset_fingerprint


def test_an_unknown_split_is_refused(config: Config) -> None:
    config.eval.split = "train"
    with pytest.raises(ConfigError, match=r"eval\.split is 'train'"):
        split_of(config)


def test_the_engine_takes_every_option_it_is_given(config: Config) -> None:
    assert set(engine_options(config)) <= set(inspect.signature(VllmEngine).parameters)
    engine = start_engine(config)
    assert isinstance(engine, HfEngine)
    engine.close()
    config.engine.kind = "sglang"
    with pytest.raises(EngineError, match="sglang"):
        start_engine(config)
