"""The plain engine says what it sampled, and how probable it was."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from rollouts.adapters import AdapterError
from rollouts.engines import make_engine
from rollouts.hf_engine import _sample
from rollouts.types import Engine, EngineError, Prompt, Sampling

Score = Callable[..., list[float]]


@pytest.fixture(scope="module")
def engine(base_folder: Path) -> Iterator[Engine]:
    engine = make_engine("hf", base_folder, device="cpu", dtype="float32", max_model_len=128, max_num_seqs=4)
    yield engine
    engine.close()


@pytest.fixture(autouse=True)
def start_from_the_base(engine: Engine) -> None:
    engine.load_adapter(None)


@pytest.mark.parametrize("temperature", [1.0, 0.7, 0.0])
def test_log_probabilities_are_those_of_a_plain_forward(
    engine: Engine, make_prompt: Callable[..., Prompt], make_adapter: Callable[[int], Path], score: Score,
    temperature: float,
) -> None:  # fmt: skip
    prompts = [make_prompt(0, 0), make_prompt(0, 1)]
    for adapter in (None, make_adapter(1), make_adapter(2), None):
        version = engine.load_adapter(adapter)
        for group in engine.generate(prompts, 2 if temperature else 1, Sampling(temperature, 1.0, 8), [0, 1]):
            for rollout in group.rollouts:
                expected = score(group.prompt, rollout.token_ids, temperature, adapter)
                assert rollout.logps == pytest.approx(expected, abs=1e-4)
                assert rollout.adapter_version == version


def test_a_prompt_without_a_picture_is_answered_like_plain_text(
    engine: Engine, no_picture: Prompt, make_prompt: Callable[..., Prompt], score: Score
) -> None:
    blind, seeing = engine.generate([no_picture, make_prompt(0, 3)], 1, Sampling(0.0, 1.0, 8), [0, 1])
    for group in (blind, seeing):
        (rollout,) = group.rollouts
        assert rollout.logps == pytest.approx(score(group.prompt, rollout.token_ids, 0.0), abs=1e-4)
    assert blind.rollouts[0].logps != seeing.rollouts[0].logps


def test_seeds_reproduce_samples_and_samples_differ(
    engine: Engine, make_prompt: Callable[..., Prompt]
) -> None:
    prompt, sampling = make_prompt(0, 0), Sampling(max_tokens=8)
    first, neighbour = engine.generate([prompt, prompt], 4, sampling, [5, 6])
    (again,) = engine.generate([prompt], 4, sampling, [5])
    assert [r.token_ids for r in again.rollouts] == [r.token_ids for r in first.rollouts]
    assert len({r.token_ids for g in (first, neighbour) for r in g.rollouts}) == 8


def test_a_completion_ends_at_its_first_end_of_turn(
    engine: Engine, make_prompt: Callable[..., Prompt]
) -> None:
    """Completions of one group end at different steps; what a finished row goes on to say is not part of it."""
    (group,) = engine.generate([make_prompt(0, 0)], 64, Sampling(temperature=1.5, max_tokens=60), [0])
    stops = engine._stop_ids  # type: ignore[attr-defined]
    stopped = [r for r in group.rollouts if r.finish_reason == "stop"]
    assert 0 < len(stopped) < 64
    assert all(r.token_ids[-1] in stops and not stops & set(r.token_ids[:-1]) for r in stopped)
    assert all(len(r.token_ids) == 60 for r in group.rollouts if r.finish_reason == "length")
    assert all(len(r.token_ids) == len(r.logps) for r in group.rollouts)


def test_top_p_keeps_the_nucleus_and_renormalises() -> None:
    logits = torch.tensor([[0.5, 0.3, 0.15, 0.05]]).log().repeat(200, 1)
    generators = [torch.Generator().manual_seed(i) for i in range(200)]
    chosen, logps = _sample(logits, Sampling(top_p=0.7), generators)
    assert set(chosen.tolist()) == {0, 1}
    expected = torch.tensor([0.625, 0.375]).log()[chosen]
    assert torch.allclose(logps, expected, atol=1e-6)


def test_bad_input_is_refused_and_the_engine_goes_on(
    engine: Engine, make_prompt: Callable[..., Prompt], make_adapter: Callable[[int], Path], tmp_path: Path
) -> None:
    good, sampling = make_prompt(0, 0), Sampling(temperature=0.0, max_tokens=4)
    (before,) = engine.generate([good], 1, sampling, [0])
    bad = replace(good, features=replace(good.features, embeds_V_H=torch.full((16, 256), float("nan"))))
    with pytest.raises(EngineError, match="NaN"):
        engine.generate([bad], 1, sampling, [0])
    with pytest.raises(AdapterError, match="does not exist"):
        engine.load_adapter(tmp_path)
    (after,) = engine.generate([good], 1, sampling, [0])
    assert after == before


def test_an_unknown_kind_of_engine_is_named(base_folder: Path) -> None:
    with pytest.raises(EngineError, match=r"engine\.kind='sglang' is unknown; choose one of vllm, hf"):
        make_engine("sglang", base_folder)
