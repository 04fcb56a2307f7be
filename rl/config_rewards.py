"""Settings of the reward suite (`rewards:` in a configuration)."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from omegaconf import MISSING


@dataclass
class ParameterSchedule:
    """A parameter of a reward that rises with performance (`rl.schedule`)."""

    parameter: str = MISSING
    """One of the component's `params`, which gives its first value."""
    to: float = MISSING
    """Its last value."""
    by: float = MISSING
    """How far it rises after a step in which the component's mean score was above `above`."""
    above: float = MISSING


@dataclass
class RewardComponent:
    """One reward function in the suite."""

    name: str = MISSING
    """Registered name, or `path/to/file.py:function`."""
    weight: float = 1.0
    gate: str = ""
    """Component that must score 1 for this one to count, e.g. `output_format`; empty for none."""
    params: dict[str, Any] = field(default_factory=dict)
    """Keyword-only parameters of the function."""
    schedule: ParameterSchedule | None = None
    """Raise one of the parameters as the policy gets better."""


@dataclass
class RewardsConfig:
    """The reward suite."""

    reader: str = "strict"
    """How answers are read, in training and benchmark alike: strict | tolerant."""
    on_error: str = "raise"
    """What happens when a reward function fails on a sample: raise (the run ends, naming it) | score_none (left out
    for that question, counted in the metrics, named in the saved completions)."""
    components: list[RewardComponent] = field(
        default_factory=lambda: [
            RewardComponent(name="output_format", weight=0.2),
            RewardComponent(name="moaks_accuracy", weight=1.0),
            RewardComponent(name="box_iou", weight=1.0),
        ]
    )
