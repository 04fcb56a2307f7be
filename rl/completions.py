"""Completions of a training step as a table: one row per completion, one column per reward component."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import polars as pl

from rl.task import Task

if TYPE_CHECKING:
    from rl.grpo import ScoredGroup


def write_completions(path: Path, step: int, scored: Sequence[ScoredGroup], task: Task) -> None:
    """Write `path` (parquet), complete or not at all."""
    records = []
    for s in scored:
        example = task.examples[s.example_index]
        for sample, (rollout, row) in enumerate(zip(s.group.rollouts, s.rows, strict=True)):
            records.append(
                {
                    "step": step,
                    "example_id": example.example_id,
                    "sample": sample,
                    "completion": rollout.text,
                    "finish_reason": rollout.finish_reason,
                    "tokens": len(rollout.token_ids),
                    "adapter_version": rollout.adapter_version,
                    "reward": row.total,
                    "advantage": float(s.advantages_G[sample]),
                    **{f"reward/{name}": score for name, score in row.components.items()},
                    "closed_gates": json.dumps(row.closed_gates),
                    "format_problem": row.answer.format_problem.value,
                    "grades_problem": row.answer.grades_problem.value,
                    "bbox_problem": row.answer.bbox_problem.value,
                }
            )
    path.parent.mkdir(parents=True, exist_ok=True)
    staging = path.with_name(f".{path.name}.tmp")
    pl.DataFrame(records, infer_schema_length=None).write_parquet(staging)
    staging.replace(path)
