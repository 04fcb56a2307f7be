"""Saved completions of a run under another reward suite: what would GRPO have learned?"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean
from typing import Any

import polars as pl

from rewards.suite import RewardSuite
from rl.choices import reasoning_of
from rl.config import Config, ConfigError, load_config
from rl.data.examples import load_examples
from rl.schedule import RewardSchedules


@dataclass(frozen=True)
class Replay:
    """A run's completions, scored twice."""

    table: pl.DataFrame
    """One row per completion: step, example_id, sample, reward (as trained), replayed, and its components."""

    def by_step(self) -> pl.DataFrame:
        """Mean rewards of each step."""
        return self.table.group_by("step", maintain_order=True).agg(pl.col("reward", "replayed").mean())

    def groups(self) -> pl.DataFrame:
        """For each group: does either reward tell its completions apart, and do the two rank them alike?

        `agreement` is Spearman's rank correlation of the two rewards, null unless both tell completions apart.
        """
        told = [(pl.col(c).max() > pl.col(c).min()).alias(f"told_by_{c}") for c in ("reward", "replayed")]
        best = [
            pl.col("sample").filter(pl.col(c) == pl.col(c).max()).alias(f"best_by_{c}")
            for c in ("reward", "replayed")
        ]
        rank = pl.corr("reward", "replayed", method="spearman").fill_nan(None).alias("agreement")
        return self.table.group_by("step", "example_id", maintain_order=True).agg(*told, *best, rank)


def replay(run: Path, config: Config) -> Replay:
    """Score the completions of `run` under the suite of `config`, whose scheduled parameters move as they would have.

    Raises:
        ConfigError: no completions there, or one whose question the run's data no longer hold.
    """
    files = sorted((run / "grpo" / "completions").glob("*.parquet"))
    if not files:
        raise ConfigError(f"{run}/grpo/completions has no completions: is {run} the folder of a GRPO run?")
    saved = pl.concat([pl.read_parquet(file) for file in files], how="diagonal_relaxed")
    trained = load_config(run / "config.yaml")
    examples = load_examples(trained, "train")
    position = {example_id: i for i, example_id in enumerate(examples.column("example_id"))}
    suite = RewardSuite.from_config(config.rewards, reasoning=reasoning_of(trained))
    schedules = RewardSchedules(config.rewards, suite)
    rows: list[dict[str, Any]] = []
    for (step,), of_step in saved.group_by("step", maintain_order=True):
        first = len(rows)
        for (example_id,), group in of_step.group_by("example_id", maintain_order=True):
            if example_id not in position:
                raise ConfigError(
                    f"{run}: example {example_id} is not in {trained.data.root}; was the dataset changed?"
                )
            scored = suite.score_group(examples[position[example_id]], group["completion"].to_list())
            for saved_row, row in zip(group.iter_rows(named=True), scored, strict=True):
                rows.append(
                    {
                        "step": step,
                        "example_id": example_id,
                        "sample": saved_row["sample"],
                        "reward": saved_row["reward"],
                        "replayed": row.total,
                        **{f"replayed/{name}": score for name, score in row.components.items()},
                    }
                )
        schedules.set(schedules.after_step(_means(rows[first:], suite.names)))
    return Replay(pl.DataFrame(rows, infer_schema_length=None))


def _means(rows: Sequence[Mapping[str, Any]], components: Sequence[str]) -> dict[str, float]:
    """`reward/<name>` of each component that applied, as a step's metrics have it."""
    scores = {
        f"reward/{name}": [row[f"replayed/{name}"] for row in rows if row[f"replayed/{name}"] is not None]
        for name in components
    }
    return {name: mean(found) for name, found in scores.items() if found}
