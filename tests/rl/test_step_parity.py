"""A whole training step beside TRL's: pictures, vision tower, language model, adapter, loss and gradients."""

from __future__ import annotations

import importlib
from pathlib import Path

import pytest
import torch

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.mark.slow
@pytest.mark.parametrize("arm", ["packed", "padded"])
def test_a_step_on_pictures_has_the_loss_and_the_gradients_of_trls_trainer(
    arm: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The arms of the speed benchmark: what is timed there is the same work."""
    monkeypatch.syspath_prepend(BENCHMARKS)
    step_arms = importlib.import_module("step_arms")
    work = step_arms.Work(visual_tokens=32, generations=2, questions=1)
    batch = {"padded": (2,), "packed": ()}[arm]
    loss, gradients = step_arms.make_step(arm, 1, work, *batch)("gradients")
    expected, expected_gradients = step_arms.make_step("trl", 1, work, 1)("gradients")  # two micro-batches
    assert loss == pytest.approx(expected, abs=1e-6)
    assert len(gradients) == len(expected_gradients) > 100
    for name, gradient in expected_gradients.items():
        assert float((gradients[name] - gradient).norm()) <= 1e-4 * float(gradient.norm()), name
        assert torch.isfinite(gradient).all()
