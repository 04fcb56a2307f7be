"""Two ranks make the step of one: gradients, metrics and weights, whatever the share of each rank."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import polars as pl
import pytest
import torch
from safetensors.torch import load_file

RUNS = {
    # two volumes on rank 0, one on rank 1; every group a micro-batch of its own, or all of a rank together
    "split": ["grpo.volumes_per_step=3", "grpo.max_tokens_per_microbatch=1"],
    "whole": ["grpo.volumes_per_step=3", "grpo.loss_type=grpo", "grpo.scale_rewards=batch"],
    "bnpo": ["grpo.volumes_per_step=3", "grpo.loss_type=bnpo", "grpo.max_tokens_per_microbatch=1"],
    "kl": ["grpo.volumes_per_step=3", "grpo.loss_type=dr_grpo", "grpo.beta=0.1", "grpo.num_iterations=2"],
    # a reward's bar rises on both ranks, and both answer validation questions
    "watched": [
        *("grpo.volumes_per_step=3", "grpo.eval_steps=1", "grpo.eval_examples=3"),
        "rewards.components=[{name: 'WORKSHOP/variety.py:variety', params: {bar: 0}, "
        "schedule: {parameter: bar, to: 0.5, by: 0.5, above: 0.01}}]",
    ],
    "resampled": [
        *("grpo.volumes_per_step=3", "grpo.resample_rounds=2", "grpo.scale_rewards=batch"),
        "rewards.components=[{name: 'WORKSHOP/variety.py:picky'}]",
    ],
    # rollouts of one update ago, asked for on both ranks while they train
    "ahead": ["grpo.volumes_per_step=3", "grpo.overlap=true"],
    # rank 1 has no volume at all
    "idle": ["grpo.volumes_per_step=1", "grpo.mask_truncated_completions=true", "grpo.credit=part"],
}


def run_ranks(ranks: int, job: str, *arguments: Path) -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
    result = subprocess.run(
        [*command, str(Path(__file__).with_name(job)), *map(str, arguments)],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=500,
    )
    assert result.returncode == 0, result.stderr[-4000:]


def outcome(folder: Path) -> tuple[list[dict[str, Any]], dict[str, torch.Tensor]]:
    lines = (folder / "grpo" / "metrics.jsonl").read_text().splitlines()
    records = [json.loads(line) for line in lines]
    return records, load_file(folder / "grpo" / "adapter" / "adapter_model.safetensors")


@pytest.fixture(scope="module")
def folder(workshop: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("ranks")
    (folder / "runs.json").write_text(json.dumps(RUNS).replace("WORKSHOP", str(workshop)))
    for ranks in (1, 2):
        run_ranks(ranks, "rank_job.py", workshop / "recipe.yaml", folder)
    return folder


@pytest.mark.slow
def test_each_rank_replaces_its_own_groups_without_signal(folder: Path) -> None:
    """Which questions fill the room depends on the share of a rank, so two ranks are not one here."""
    for ranks in (1, 2):
        records, _ = outcome(folder / f"resampled-{ranks}")
        drawn = [record["groups_drawn"] for record in records]
        assert len(drawn) == 2
        assert min(drawn) >= 6
        assert max(drawn) > 6
        assert sum(record["groups_replaced"] for record in records) > 0
        for path in (folder / f"resampled-{ranks}" / "grpo" / "completions").iterdir():
            samples = pl.read_parquet(path)["example_id", "sample"]
            assert samples.is_unique().all()  # no question is trained on by both ranks


@pytest.mark.slow
@pytest.mark.parametrize("run", [run for run in RUNS if run != "resampled"])
def test_two_ranks_make_the_step_of_one(workshop: Path, folder: Path, run: str) -> None:
    (one, one_adapter), (two, two_adapter) = (outcome(folder / f"{run}-{ranks}") for ranks in (1, 2))
    assert len(one) == len(two) == (3 if run == "watched" else 2)  # step 0 is the validation of the start
    for expected, got in zip(one, two, strict=True):
        assert got.keys() == expected.keys()
        for name in got.keys() - {"time", "agreement/max"}:
            if not name.startswith("seconds"):
                assert got[name] == pytest.approx(expected[name], rel=1e-3, abs=1e-6), name
        assert expected["step"] == 0 or got["grad_norm"] > 0
    start = load_file(workshop / "sft" / "adapter_model.safetensors")
    for name, tensor in one_adapter.items():
        # not element by element: where a gradient is nearly 0, Adam moves by its sign, and so by the order of a sum
        assert (two_adapter[name] - tensor).norm() <= 5e-3 * (tensor - start[name]).norm(), name


@pytest.mark.slow
def test_the_wrapper_of_accelerate_gives_the_gradients_of_one_process(tmp_path: Path) -> None:
    """Also where ranks have different numbers of micro-batches, the last of which alone synchronises."""
    for ranks in (1, 2):
        run_ranks(ranks, "wrapped_job.py", tmp_path)
    one, two = (load_file(tmp_path / f"gradients-{ranks}.safetensors") for ranks in (1, 2))
    assert one.keys() == two.keys()
    for name, gradient in one.items():
        assert gradient.norm() > 0, name
        torch.testing.assert_close(two[name], gradient, rtol=1e-10, atol=1e-12)
