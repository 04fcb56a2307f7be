"""The benchmark run on a tiny model, and what its engine is told."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from rl.bench.answers import read_run
from rl.choices import split_of
from rl.config import Config, ConfigError
from rl.engine import engine_options, start_engine
from rl.evaluate import evaluate, evaluate_baselines, is_current
from rl.task import Task
from rollouts.hf_engine import HfEngine
from rollouts.types import Engine, EngineError
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
