"""Scored completions of a training step, and their table: one row per completion, one column per component."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import polars as pl
import torch
from torch.nn.utils.rnn import pad_sequence

from rewards.suite import RewardRow
from rl.microbatch import GroupTokens, within_budget
from rl.parquet import write_parquet
from rl.task import Task
from rollouts.types import Group


@dataclass(frozen=True)
class ScoredGroup:
    """The G rollouts of one question with what they earned."""

    example_index: int
    group: Group
    rows: list[RewardRow]
    prior: float
    """Total reward of the baseline's answer to the question, which does not look at the volume."""
    advantages_G: torch.Tensor
    """Of whole completions."""
    token_advantages: Sequence[torch.Tensor] = ()
    """For each completion, [T], where tokens answer for different rewards (`rl.credit`); else empty."""

    @property
    def has_signal(self) -> bool:
        """Whether any completion did better than another."""
        return any(bool(a.any()) for a in self.token_advantages or [self.advantages_G])


Record = dict[str, Any]
"""One row of the table, plain values only: ranks send them to each other."""


def completion_records(step: int, scored: Sequence[ScoredGroup], task: Task) -> list[Record]:
    """One record per completion."""
    records = []
    for s in scored:
        example_id = task.examples[s.example_index].example_id
        for sample, (rollout, row) in enumerate(zip(s.group.rollouts, s.rows, strict=True)):
            records.append(
                {
                    "step": step,
                    "example_id": example_id,
                    "sample": sample,
                    "completion": rollout.text,
                    "finish_reason": rollout.finish_reason,
                    "tokens": len(rollout.token_ids),
                    "adapter_version": rollout.adapter_version,
                    "reward": row.total,
                    "reward_above_prior": row.total - s.prior,
                    "advantage": float(s.advantages_G[sample]),
                    **{f"reward/{name}": score for name, score in row.components.items()},
                    "closed_gates": json.dumps(row.closed_gates),
                    "errors": json.dumps(row.errors),
                    "format_problem": row.answer.format_problem.value,
                    "grades_problem": row.answer.grades_problem.value,
                    "bbox_problem": row.answer.bbox_problem.value,
                }
            )
    return records


def completion_table(records: Sequence[Record], components: Iterable[str]) -> pl.DataFrame:
    """The records as a table; a component that applies to none of them is a column of nulls."""
    scores = {f"reward/{name}": pl.Float64 for name in components}
    return pl.DataFrame(records, schema_overrides=scores, infer_schema_length=None)


def write_completions(path: Path, table: pl.DataFrame) -> None:
    """Write `path` (parquet), complete or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_parquet(path, table)


def reward_metrics(table: pl.DataFrame) -> dict[str, float]:
    """Means over a step: reward, by how much it exceeds the prior's, each component where it applies, groups without
    signal, length, share cut off.

    `reward_errors` is there only when there were any: the share of completions some component could not score.
    """
    names = [name for name in table.columns if name.startswith("reward")]
    metrics = {name: _mean(table[name]) for name in names if table[name].count()}
    signal = table.group_by("example_id").agg((pl.col("advantage") != 0).any())["advantage"]
    metrics["groups_without_signal"] = 1 - _mean(signal)
    metrics["completion_length"] = _mean(table["tokens"])
    failed = _mean(table["errors"] != "{}")
    if failed:
        metrics["reward_errors"] = failed
    metrics["truncated"] = _mean(table["finish_reason"] == "length")
    return metrics


def _mean(column: pl.Series) -> float:
    return float(column.cast(pl.Float64).drop_nulls().to_numpy().mean())


def packed_advantages(scored: list[ScoredGroup]) -> torch.Tensor:
    """advantages_N_T of the groups' completions, or [N, 1] where all tokens of a completion have the same."""
    if not any(s.token_advantages for s in scored):
        return torch.cat([s.advantages_G for s in scored])[:, None]
    return pad_sequence([a for s in scored for a in s.token_advantages], batch_first=True)


def microbatches(scored: list[ScoredGroup], budget: int) -> Iterator[list[ScoredGroup]]:
    """Split groups into parts of at most `budget` tokens, never a group; a volume's tokens count once per part."""
    prompts = [s.group.prompt for s in scored]
    sizes = [
        GroupTokens(
            volume=prompt.features.key,
            shared=len(prompt.volume_ids),
            own=len(prompt.question_ids) + sum(len(r.token_ids) for r in s.group.rollouts),
        )
        for prompt, s in zip(prompts, scored, strict=True)
    ]
    for part in within_budget(sizes, budget):
        yield [scored[i] for i in part]
