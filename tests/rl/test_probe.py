"""Each way in which trainer and engine can silently differ is planted, and the probe names it."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator

from rl.config import Config
from rl.grpo import GRPOTrainer
from rl.probe import Agreement, AgreementError, diagnose, measure_agreement
from rollouts import hf_engine
from rollouts.types import Engine, Group, Prompt, Sampling


class Faulty:
    """An engine that does one thing wrong."""

    def __init__(self, engine: Engine, fault: str) -> None:
        self.engine, self.fault = engine, fault

    def load_adapter(self, folder: Path | None) -> int:
        return self.engine.load_adapter(None if self.fault == "adapter" else folder)

    def generate(self, prompts: list[Prompt], n: int, sampling: Sampling, seeds: list[int]) -> list[Group]:
        asked = prompts
        if self.fault == "temperature":
            sampling = replace(sampling, temperature=1.0)
        if self.fault == "embeddings":  # those of a view that shows the volume upside down
            asked = [
                replace(p, features=replace(p.features, embeds_V_H=p.features.embeds_V_H.flip(0)))
                for p in prompts
            ]
        groups = self.engine.generate(asked, n, sampling, seeds)
        return [replace(group, prompt=prompt) for group, prompt in zip(groups, prompts, strict=True)]

    def close(self) -> None:
        pass


def text_positions(token_ids: tuple[int, ...], *_: object, **__: object) -> torch.Tensor:
    """The mistake of a model without multimodal positions."""
    return torch.arange(len(token_ids)).expand(3, -1)


@pytest.mark.slow
@pytest.mark.parametrize("fault", ["adapter", "temperature", "positions", "embeddings"])
def test_a_planted_fault_stops_the_run_before_the_first_update_and_is_named(
    make_config: Callable[..., Config],
    engine: Engine,
    accelerator: Accelerator,
    monkeypatch: pytest.MonkeyPatch,
    fault: str,
) -> None:
    config = make_config("grpo.temperature=0.7", "grpo.probe_tolerance=1e-4")
    trainer = GRPOTrainer(config, Faulty(engine, fault), accelerator)
    before = [p.clone() for p in trainer.policy.parameters()]
    if fault == "positions":
        monkeypatch.setattr(hf_engine, "mrope_positions", text_positions)
    with pytest.raises(AgreementError, match=rf"(?i)look at the {fault}") as caught:
        trainer.step(0)
    assert "accepted: largest 0.0001" in str(caught.value)
    assert all(torch.equal(a, b) for a, b in zip(before, trainer.policy.parameters(), strict=True))
    assert not (Path(config.run_dir) / "grpo" / "metrics.jsonl").exists()


def test_a_sound_engine_passes_and_another_rank_is_blamed(
    config: Config, engine: Engine, accelerator: Accelerator
) -> None:
    trainer = GRPOTrainer(config, Faulty(engine, "none"), accelerator)
    scored = trainer.scorer.score(trainer.generation.draw(0, 2))
    _, agreement = trainer._update(scored)
    assert agreement.largest < 1e-4
    restarted = GRPOTrainer(config, engine, accelerator)  # weights have moved; the engine has the same ones
    fresh = restarted.scorer.score(restarted.generation.draw(0, 2))
    assert "another rank" in diagnose(restarted.policy, restarted.task, fresh, 1.0)
    assert "another rank" in diagnose(restarted.policy, restarted.task, [], 1.0)


def test_figures_that_are_not_numbers_are_no_agreement(
    config: Config, engine: Engine, accelerator: Accelerator
) -> None:
    trainer = GRPOTrainer(config, engine, accelerator)
    scored = trainer.scorer.score(trainer.generation.draw(0, 2))
    first = scored[0].group.rollouts[0]
    broken = (replace(first, logps=(math.nan, *first.logps[1:])), *scored[0].group.rollouts[1:])
    scored[0] = replace(scored[0], group=Group(scored[0].group.prompt, broken))
    trainer.settings.max_tokens_per_microbatch = 1  # the other groups are fine
    scored[0] = replace(scored[0], advantages_G=torch.tensor([1.0, -1.0, 0.0]))
    with pytest.raises(AgreementError, match="nan"):
        trainer._update(scored)


def test_only_tokens_are_compared() -> None:
    ours = torch.tensor([[-1.0, -2.0, 5.0], [-3.0, 5.0, 5.0]])
    engine = torch.tensor([[-1.5, -2.0, 0.0], [-3.25, 0.0, 0.0]])
    mask = torch.tensor([[True, True, False], [True, False, False]])
    agreement = measure_agreement(ours, engine, mask)
    assert agreement == Agreement(0.75, 0.5, 3)
    assert agreement.mean == 0.25
    assert measure_agreement(ours, engine, torch.zeros_like(mask)) == Agreement.none()


def test_agreements_add_up_and_nan_stays(accelerator: Accelerator) -> None:
    a, b, nan = Agreement(1.0, 0.5, 4), Agreement(2.0, 0.75, 6), Agreement(math.nan, math.nan, 1)
    assert a.merge(b) == b.merge(a) == Agreement(3.0, 0.75, 10)
    assert Agreement.none().merge(a) == a
    for merged in (a.merge(nan), nan.merge(a)):
        assert math.isnan(merged.largest)
        assert math.isnan(merged.mean)
    assert a.over_ranks(accelerator) == a
