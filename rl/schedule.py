"""Reward parameters that rise with performance, such as the IoU from which `box_iou_threshold` pays.

    components:
      - name: box_iou_threshold
        params: {threshold: 0.3}
        schedule: {parameter: threshold, to: 0.8, by: 0.05, above: 0.6}

After a step in which the component scored more than `above` on the average, `threshold` moves by 0.05 towards 0.8. It
never moves back: a bar that follows the policy down would pay for getting worse. The reward functions keep no state
(`rewards.suite.RewardSuite.set_parameter`); the values are part of every checkpoint.
"""

from __future__ import annotations

from collections.abc import Mapping

from rewards.suite import RewardSuite
from rl.config_rewards import ParameterSchedule, RewardsConfig


class RewardSchedules:
    """The scheduled parameters of a suite and their present values.

    Args:
        rewards: components with a `schedule`; the first value is the one under `params`.
        suite: made from the same configuration; its parameters are the ones that are set.
    """

    def __init__(self, rewards: RewardsConfig, suite: RewardSuite) -> None:
        self._suite = suite
        self._schedules: dict[str, ParameterSchedule] = {}
        self.values: dict[str, float] = {}
        """Column -> present value of its scheduled parameter."""
        # the suite's columns stand in the order of the components
        for column, component in zip(suite.names, rewards.components, strict=True):
            if component.schedule is not None:
                self._schedules[column] = component.schedule
                self.values[column] = float(component.params[component.schedule.parameter])

    def after_step(self, metrics: Mapping[str, float]) -> dict[str, float]:
        """The values for the next step, by this step's mean scores `reward/<column>`; nothing is set yet."""
        following = dict(self.values)
        for column, schedule in self._schedules.items():
            score = metrics.get(f"reward/{column}")  # absent: it applied to no question of the step
            if score is not None and score > schedule.above:
                following[column] = min(schedule.to, self.values[column] + schedule.by)
        return following

    def set(self, values: Mapping[str, float]) -> None:
        """Use these values from now on."""
        for column, value in values.items():
            self._suite.set_parameter(column, self._schedules[column].parameter, value)
            self.values[column] = value
