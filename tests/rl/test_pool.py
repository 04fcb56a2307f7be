"""`reasonknee eval` with several engines: refused in words where they do not fit, else the answers of one engine."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from rl.bench.answers import BenchRun, read_run

SHORT = ("eval.max_completion_length=6", "engine.kind=vllm", "engine.kv_cache_gib=0.25")


def test_engines_that_this_machine_cannot_hold_are_refused_before_anything_starts(
    workshop: Path, tmp_path: Path, refusal: Callable[..., str]
) -> None:
    recipe = ("--config", workshop / "recipe.yaml", f"run_dir={tmp_path}", *SHORT)
    said = refusal("eval", *recipe, "ray.num_engines=1000")
    assert "the cluster cannot hold this placement: requested 1000 engines x 1 CPU = 1000 CPUs" in said
    assert "lower ray.num_engines or their shares" in said
    assert not (tmp_path / "eval" / "base").exists()


def _evaluated(
    typed: Callable[..., str], workshop: Path, run_dir: Path, *overrides: str
) -> tuple[dict[str, BenchRun], str]:
    """The runs of base and SFT, and what was printed."""
    shutil.copytree(workshop / "sft", run_dir / "sft" / "adapter")
    printed = typed("eval", "--config", workshop / "recipe.yaml", f"run_dir={run_dir}", *SHORT, *overrides)
    return {name: read_run(run_dir / "eval" / name) for name in ("base", "SFT")}, printed


@pytest.mark.slow
def test_two_engines_under_ray_give_the_answers_of_one(
    typed: Callable[..., str], workshop: Path, tmp_path: Path
) -> None:
    one, _ = _evaluated(typed, workshop, tmp_path / "one")
    two, printed = _evaluated(
        typed, workshop, tmp_path / "two", "ray.num_engines=2", "ray.cpus_per_engine=0.5"
    )
    assert "starting 2 x vllm" in printed
    for name, run in one.items():
        assert two[name].answers.equals(run.answers)
        assert two[name].meta.dataset_fingerprint == run.meta.dataset_fingerprint
    assert not one["base"].answers.equals(one["SFT"].answers)
