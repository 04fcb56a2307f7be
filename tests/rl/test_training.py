"""Checkpoints, logs and gradients: what SFT and GRPO share."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.optim.lr_scheduler import LambdaLR

from rl.config import Config
from rl.errors import write_atomically
from rl.model import load_policy
from rl.training import (
    RunFolder,
    clip_gradients,
    last_checkpoint,
    load_optimizer,
    make_optimizer,
    make_schedule,
    save_checkpoint,
)


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("constant_with_warmup", [0.25, 0.5, 0.75, 1.0, 1.0, 1.0, 1.0, 1.0]),
        ("linear", [0.25, 0.5, 0.75, 1.0, 1.0, 0.75, 0.5, 0.25]),
    ],
)
def test_the_rate_rises_and_then_stays_or_falls_to_nothing_after_the_last_step(
    kind: str, expected: list[float]
) -> None:
    optimizer = make_optimizer([nn.Parameter(torch.zeros(1))], 1.0, 0.0)
    schedule = make_schedule(optimizer, kind, 4, 8)
    rates = []
    for _ in range(8):
        rates.append(schedule.get_last_lr()[0])
        optimizer.step()
        schedule.step()
    assert rates == expected
    assert schedule.get_last_lr()[0] == (0.0 if kind == "linear" else 1.0)


def test_a_run_may_be_all_warm_up() -> None:
    optimizer = make_optimizer([nn.Parameter(torch.zeros(1))], 1.0, 0.0)
    schedule = make_schedule(optimizer, "linear", 2, 2)
    for rate in (0.5, 1.0, 0.0):
        assert schedule.get_last_lr()[0] == rate
        optimizer.step()
        schedule.step()


def test_gradients_are_clipped_and_their_norm_returned() -> None:
    a, b = nn.Parameter(torch.zeros(1)), nn.Parameter(torch.zeros(1))
    a.grad = torch.tensor([3.0])
    b.grad = torch.tensor([4.0])
    assert clip_gradients([a, b], 1.0) == pytest.approx(5.0)
    assert (a.grad.item(), b.grad.item()) == pytest.approx((0.6, 0.8))


def test_a_parameter_without_a_gradient_counts_as_zero() -> None:
    parameter = nn.Parameter(torch.zeros(2))
    assert clip_gradients([parameter], 1.0) == 0.0
    assert torch.equal(parameter.grad, torch.zeros(2))  # type: ignore[arg-type]


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_gradient_that_is_not_finite_stops_the_run_before_a_weight_moves(value: float) -> None:
    parameter = nn.Parameter(torch.zeros(2))
    parameter.grad = torch.tensor([1.0, value])
    with pytest.raises(FloatingPointError, match="lower the learning rate"):
        clip_gradients([parameter], 1.0)


def _trained_twice(config: Config) -> tuple[nn.Module, torch.optim.Optimizer, LambdaLR]:
    policy = load_policy(config)
    trained = [p for p in policy.parameters() if p.requires_grad]
    optimizer = make_optimizer(trained, 1e-2, 0.1)
    schedule = make_schedule(optimizer, "linear", 3, 9)
    generator = torch.Generator().manual_seed(0)
    for _ in range(2):
        for p in trained:
            p.grad = torch.randn(p.shape, generator=generator)
        optimizer.step()
        schedule.step()
    return policy, optimizer, schedule


def test_a_checkpoint_brings_back_optimizer_and_schedule_exactly(config: Config, tmp_path: Path) -> None:
    policy, optimizer, schedule = _trained_twice(config)
    folder = save_checkpoint(tmp_path, 2, policy, optimizer, schedule, {"best": 0.5})  # type: ignore[arg-type]
    assert not [p for p in folder.rglob("*") if p.suffix in (".pt", ".bin", ".pkl")]

    again = load_policy(config, folder / "adapter")
    restored = make_optimizer([p for p in again.parameters() if p.requires_grad], 1.0, 0.0)
    restored_schedule = make_schedule(restored, "linear", 3, 9)
    state = load_optimizer(folder, restored, restored_schedule)
    assert (state["step"], state["best"]) == (2, 0.5)
    assert restored_schedule.state_dict() == schedule.state_dict()
    before, after = optimizer.state_dict(), restored.state_dict()
    assert [dict(g, betas=tuple(g["betas"])) for g in after["param_groups"]] == before["param_groups"]
    for index, moments in before["state"].items():
        for name, value in moments.items():
            assert torch.equal(after["state"][index][name], value)
    for a, b in zip(policy.parameters(), again.parameters(), strict=True):
        assert torch.equal(a, b)


def test_only_the_newest_checkpoint_is_kept_and_an_unfinished_one_is_no_checkpoint(
    config: Config, tmp_path: Path
) -> None:
    assert last_checkpoint(tmp_path / "none") is None
    policy, optimizer, schedule = _trained_twice(config)
    for step in (9, 10):
        save_checkpoint(tmp_path, step, policy, optimizer, schedule, {})  # type: ignore[arg-type]
    (tmp_path / ".staging").mkdir()  # left by a kill
    assert [p.name for p in tmp_path.glob("step-*")] == ["step-000010"]
    assert last_checkpoint(tmp_path) == tmp_path / "step-000010"
    save_checkpoint(tmp_path, 11, policy, optimizer, schedule, {})  # type: ignore[arg-type]
    assert last_checkpoint(tmp_path) == tmp_path / "step-000011"


def test_records_after_the_checkpoint_and_a_torn_line_are_dropped(make_config: Callable[..., Config]) -> None:
    run = RunFolder(make_config(), "sft")
    for step in (1, 2, 3):
        run.log({"step": step, "loss": 0.5})
    metrics = run.path / "metrics.jsonl"
    metrics.write_text(metrics.read_text() + '{"step": 4, "lo')
    run.keep_metrics_until(2)
    run.log({"step": 3, "loss": 0.25})
    run.close()
    records = [json.loads(line) for line in metrics.read_text().splitlines()]
    assert records == [{"step": 1, "loss": 0.5}, {"step": 2, "loss": 0.5}, {"step": 3, "loss": 0.25}]
    assert (run.path / "config.yaml").exists()
    assert list((run.path / "tensorboard").iterdir())


def test_a_record_that_is_not_finite_is_named(config: Config) -> None:
    run = RunFolder(config, "sft")
    with pytest.raises(FloatingPointError, match=r"step 7: \{'loss': nan\}"):
        run.log({"step": 7, "loss": math.nan, "lr": 1.0})
    run.close()
    assert not (run.path / "metrics.jsonl").exists()


def test_a_failed_write_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "file"
    write_atomically(path, "old")
    monkeypatch.setattr(Path, "replace", lambda *_: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        write_atomically(path, "new")
    assert path.read_text() == "old"
