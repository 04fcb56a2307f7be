"""`reasonknee launch` with the real loop and real engines: the same training on two ranks as on one."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from safetensors.torch import load_file

from rl.config import Config
from rl.grpo import train_grpo
from rollouts.types import Engine

SETTINGS = ("grpo.warmup_steps=0", "eval.max_completion_length=64")
EQUAL = ("reward", "loss", "grad_norm", "entropy", "completion_length", "groups_without_signal")


@pytest.fixture
def launch(typed: Callable[..., str], workshop: Path) -> Callable[..., str]:
    """Runs `reasonknee launch` into a folder: what it prints."""

    def run(run_dir: Path, *overrides: str) -> str:
        return typed("launch", workshop / "recipe.yaml", f"run_dir={run_dir}", *SETTINGS, *overrides)

    return run


def _records(run_dir: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (run_dir / "grpo" / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.slow
def test_two_ranks_on_ray_train_the_same_adapter_as_one_process_and_go_on(
    launch: Callable[..., str],
    make_config: Callable[..., Config],
    engine: Engine,
    accelerator: Accelerator,
    tmp_path: Path,
) -> None:
    """Each rank has one of the step's two volumes: sums over ranks, averaged gradients and normalisers must fit."""
    alone = make_config(*SETTINGS, run="alone")
    train_grpo(alone, engine, accelerator)
    two = tmp_path / "two"
    printed = launch(two, "ray.num_workers=2", "grpo.max_steps=1")
    assert "GRPO: 1/1  reward" in printed
    printed = launch(two, "ray.num_workers=2")  # two steps now: one more
    assert "GRPO: 2/2  reward" in printed
    assert "GRPO: 1/2" not in printed
    for one, other in zip(_records(Path(alone.run_dir)), _records(two), strict=True):
        assert {k: other[k] for k in EQUAL} == pytest.approx({k: one[k] for k in EQUAL}, rel=1e-4, abs=1e-6)
    reached = load_file(Path(alone.run_dir) / "grpo" / "adapter" / "adapter_model.safetensors")
    # Adam divides a gradient by its own size, so where one is near 0 the order of a sum shows: splitting the batch
    # moves a weight by 2e-5 in one process too, of a step of 3e-3
    for name, tensor in load_file(two / "grpo" / "adapter" / "adapter_model.safetensors").items():
        torch.testing.assert_close(tensor, reached[name], rtol=1e-3, atol=1e-4)
    assert "nothing has changed" in launch(two, "ray.num_workers=2")


@pytest.mark.slow
def test_the_loop_runs_against_vllm_in_an_actor(launch: Callable[..., str], tmp_path: Path) -> None:
    launch(tmp_path / "run", "engine.kind=vllm", "engine.kv_cache_gib=0.25", "grpo.max_steps=2")
    records = _records(tmp_path / "run")
    assert [r["step"] for r in records] == [1, 2]
    assert all(r["agreement/max"] < 1e-3 for r in records)
    assert all(r["prefix_hit_rate"] > 0 for r in records)
