"""What a run in `run_dir` has shown: how long completions are, and what share of the machine's peak was reached."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from rl.config import Config, ConfigError
from rl.plan.hardware import device_name


@dataclass(frozen=True, slots=True)
class History:
    """Medians over the later half of a GRPO run's steps, after which lengths have settled."""

    folder: Path
    steps: int
    completion: float
    """Tokens of a completion."""
    without_signal: float
    """Share of the groups that were not computed in training."""
    train_s: float
    rollout_s: float
    device: str
    """Where it ran."""


def history(config: Config) -> History | None:
    """Of `run_dir/grpo`; None when nothing has run there.

    Raises:
        ConfigError: there is a metrics.jsonl that is none of GRPO.
    """
    folder = Path(config.run_dir) / "grpo"
    metrics, environment = folder / "metrics.jsonl", folder / "environment.json"
    if not metrics.is_file() or not environment.is_file():
        return None
    try:
        lines = metrics.read_text(encoding="utf-8").splitlines()
        records = [r for r in map(json.loads, lines) if "completion_length" in r]
        machine: dict[str, Any] = json.loads(environment.read_text(encoding="utf-8"))
        later = records[len(records) // 2 :]
        if not later:
            return None
        return History(
            folder,
            steps=len(records),
            completion=median(r["completion_length"] for r in later),
            without_signal=median(r["groups_without_signal"] for r in later),
            train_s=median(r["seconds/train"] for r in later),
            rollout_s=median(r["seconds/rollout"] for r in later),
            device=device_name(machine, bool(machine["gpus"]) and config.model.device != "cpu"),
        )
    except (ValueError, KeyError, TypeError) as error:
        raise ConfigError(
            f"{metrics}: not the records of a GRPO run ({error!r}); set another run_dir to plan without them"
        ) from error
