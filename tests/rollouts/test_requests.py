"""Nothing that a model must not see gets past the check, and the message says what and where."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
import torch

from rollouts.requests import ModelFacts, check_request, group_seed
from rollouts.types import NO_PICTURE, EngineError, Prompt, Sampling
from rollouts.vllm_engine import VllmEngine, _environment, _volume_major
from rollouts.watchdog import Header, WorkerFailure

Check = Callable[..., None]


@pytest.fixture(scope="module")
def check(base_folder: Path) -> Check:
    facts = ModelFacts.of(str(base_folder))

    def check(
        prompt: Prompt, sampling: Sampling | None = None, n: int = 2, seeds: list[int] | None = None
    ) -> None:
        check_request(
            [prompt], n, sampling or Sampling(max_tokens=8), [0] if seeds is None else seeds, facts, 64
        )

    return check


def test_an_engine_that_is_closed_while_it_generates_is_not_started_again(
    base_folder: Path, make_prompt: Callable[..., Prompt], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As by a trainer that fails while the next step's answers are on their way."""
    started = []

    class Worker:
        alive = True

        def __init__(self, *_: object) -> None:
            started.append(self)

        def send(self, *_: object) -> None:
            pass

        def receive(self, _: float) -> None:
            pass

        def request(self, header: Header, *_: object, timeout_s: float) -> None:
            if header["op"] == "generate":
                engine.close()
                raise WorkerFailure("killed")

        def kill(self) -> None:
            self.alive = False

    monkeypatch.setattr("rollouts.vllm_engine.WorkerProcess", Worker)
    engine = VllmEngine(base_folder, device="cpu")
    with pytest.raises(EngineError, match="the engine was closed"):
        engine.generate([make_prompt(0, 0)], 1, Sampling(max_tokens=2), [0])
    assert [worker.alive for worker in started] == [False]


def with_embeds(prompt: Prompt, embeds: torch.Tensor) -> Prompt:
    return replace(prompt, features=replace(prompt.features, embeds_V_H=embeds))


def test_a_good_request_passes(check: Check, make_prompt: Callable[..., Prompt]) -> None:
    check(make_prompt(0, 0))


def test_a_prompt_without_a_picture_passes_unless_it_has_video_tokens(
    check: Check, make_prompt: Callable[..., Prompt], no_picture: Prompt
) -> None:
    check(no_picture)
    with pytest.raises(EngineError, match=r"16 video tokens, but its volume's grid .* makes 0"):
        check(replace(make_prompt(0, 0), features=NO_PICTURE))
    with pytest.raises(EngineError, match="grid_thw"):  # features that lost their grid are not taken for none
        check(replace(no_picture, features=replace(NO_PICTURE, embeds_V_H=torch.zeros(4, 8))))


def test_bad_features_are_refused_by_volume(check: Check, make_prompt: Callable[..., Prompt]) -> None:
    prompt = make_prompt(3, 0)
    embeds = prompt.features.embeds_V_H
    for bad in (
        embeds[:, :-1],
        embeds[:-1],
        torch.cat([embeds, embeds]),
        embeds * float("nan"),
        embeds.long(),
    ):
        with pytest.raises(EngineError, match="volume-3"):
            check(with_embeds(prompt, bad))


def test_too_few_video_tokens_are_refused_by_example(
    check: Check, make_prompt: Callable[..., Prompt]
) -> None:
    prompt = make_prompt(3, 7)
    with pytest.raises(EngineError, match="prompt 3_7: 15 video tokens"):
        check(replace(prompt, volume_ids=prompt.volume_ids[:2] + prompt.volume_ids[3:]))


def test_a_prompt_longer_than_the_context_is_refused(
    check: Check, make_prompt: Callable[..., Prompt]
) -> None:
    with pytest.raises(EngineError, match=r"prompt 1_2: 59 tokens and up to 8 .* max_model_len=64"):
        check(make_prompt(1, 2, words=40))


def test_tokens_of_another_vocabulary_are_refused(check: Check, make_prompt: Callable[..., Prompt]) -> None:
    with pytest.raises(EngineError, match="another tokenizer"):
        check(replace(make_prompt(0, 0), question_ids=(151_645,)))


@pytest.mark.parametrize("bad", [Sampling(temperature=-1), Sampling(top_p=0), Sampling(max_tokens=0)])
def test_impossible_sampling_is_refused(
    check: Check, make_prompt: Callable[..., Prompt], bad: Sampling
) -> None:
    with pytest.raises(EngineError, match="needs temperature"):
        check(make_prompt(0, 0), bad)


def test_several_greedy_samples_are_refused(check: Check, make_prompt: Callable[..., Prompt]) -> None:
    with pytest.raises(EngineError, match="greedy decoding gives one answer, but n=2"):
        check(make_prompt(0, 0), Sampling(temperature=0.0, max_tokens=8))


def test_each_prompt_needs_a_seed_and_a_sample(check: Check, make_prompt: Callable[..., Prompt]) -> None:
    with pytest.raises(EngineError, match="as many seeds"):
        check(make_prompt(0, 0), seeds=[])
    with pytest.raises(EngineError, match="n=0"):
        check(make_prompt(0, 0), n=0)


def test_group_seeds_are_fixed_and_far_apart() -> None:
    """Seeds i and i + 1 share samples when sample j of a group is drawn with seed + j."""
    assert group_seed(0, 1, "a") == group_seed(0, 1, "a") != group_seed(0, 11, "a")
    low = sorted(group_seed(seed) % 2**32 for seed in range(2000))  # a CPU generator uses 32 bits of its seed
    assert sum(b - a < 8 for a, b in pairwise(low)) <= 1


def test_questions_about_a_volume_are_asked_one_after_the_other(make_prompt: Callable[..., Prompt]) -> None:
    """Volumes in the order they come in first, and the questions about each in theirs."""
    asked = [(1, 0), (0, 0), (1, 1), (2, 0), (0, 1), (1, 2)]
    order = _volume_major([make_prompt(volume, question) for volume, question in asked])
    assert [asked[i] for i in order] == [(1, 0), (1, 1), (1, 2), (0, 0), (0, 1), (2, 0)]


@pytest.mark.parametrize(("name", "value"), [("OMP_WAIT_POLICY", "ACTIVE"), ("GOMP_SPINCOUNT", "7")])
def test_an_engines_threads_wait_awake_for_a_while_unless_the_user_says_otherwise(
    name: str, value: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    ours = {"OMP_WAIT_POLICY", "GOMP_SPINCOUNT"}
    for variable in ours:
        monkeypatch.delenv(variable, raising=False)
    assert ours <= _environment(threads=1).keys()
    monkeypatch.setenv(name, value)  # the engine's process inherits it
    assert not ours & _environment(threads=1).keys()
