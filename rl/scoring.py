"""From rollouts to advantages: rewards per component, what they are compared with, what each token answers for.

Beside the group's mean, the usual yardstick, stands the *prior*: what the same questions pay for the commonest
training grade and the mean training box, an answer that never looks at the volume. A reward that rises to the prior
has learned the prior.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import cache

import numpy as np
import torch
from accelerate.utils import gather_object

from rewards.registry import About
from rewards.suite import RewardRow, RewardSuite
from rewards.types import Example
from rl.advantages import group_advantages, normalized_sum
from rl.bench.baselines import baseline_completion, fit_baselines
from rl.choices import reasoning_of
from rl.completions import ScoredGroup
from rl.config import Config
from rl.credit import COORDINATES, MAX_ATTRIBUTES, graded_alone, placed_alone, token_parts
from rl.schedule import RewardSchedules
from rl.task import Task
from rollouts.types import Group


class Scorer:
    """The reward suite of a run at work on its training questions."""

    def __init__(self, config: Config, task: Task) -> None:
        self.settings, self.task = config.grpo, task
        self.reasoning = reasoning_of(config)
        self.suite = RewardSuite.from_config(config.rewards, reasoning=self.reasoning)
        self.schedules = RewardSchedules(config.rewards, self.suite)
        self.baselines = fit_baselines(task.examples)

    def score(self, groups: Sequence[tuple[int, Group]]) -> list[ScoredGroup]:
        """Score this rank's groups, each with the index of its example. Every rank takes part, also one without."""
        rows = [self._rows(self.task.examples[i], group) for i, group in groups]
        advantages_B_G = self._advantages(rows, self.suite.names)
        scored = [
            ScoredGroup(i, group, group_rows, self.prior(i), advantages_G)
            for (i, group), group_rows, advantages_G in zip(groups, rows, advantages_B_G, strict=True)
        ]
        return self._by_token(scored, advantages_B_G) if self.settings.credit == "part" else scored

    def _by_token(self, scored: Sequence[ScoredGroup], advantages_B_G: torch.Tensor) -> list[ScoredGroup]:
        """Advantages of tokens that answer for their own part of the answer (`rl.credit`)."""
        examples = [self.task.examples[s.example_index] for s in scored]
        by_part = [advantages_B_G]
        for coordinate in range(COORDINATES):
            rows = [self._placed(e, s, coordinate) for e, s in zip(examples, scored, strict=True)]
            by_part.append(self._advantages(rows, self._all_but("grades")))
        for attribute in range(MAX_ATTRIBUTES):
            rows = []
            for example, s in zip(examples, scored, strict=True):
                alone = graded_alone(example, attribute)
                rows.append(s.rows if alone is example else self._rows(alone, s.group))
            by_part.append(self._advantages(rows, self._all_but("bbox")))
        decode = cache(self.task.tokenizer.decode)
        credited = []
        for s, example, advantages_G_P in zip(scored, examples, torch.stack(by_part, dim=-1), strict=True):
            names = [attribute.name for attribute in example.question.attributes]
            parts = [
                token_parts([decode(token) for token in rollout.token_ids], names)
                for rollout in s.group.rollouts
            ]
            token_advantages = [a_P[p] for a_P, p in zip(advantages_G_P, parts, strict=True)]
            credited.append(replace(s, token_advantages=token_advantages))
        return credited

    def _placed(self, example: Example, scored: ScoredGroup, coordinate: int) -> list[RewardRow]:
        """The group's rows as if that number alone had been said of each box."""
        box = example.truth.bbox
        if box is None:
            return scored.rows
        texts = [placed_alone(rollout.text, box, coordinate) for rollout in scored.group.rollouts]
        return self.suite.score_group(example, texts)

    def _rows(self, example: Example, group: Group) -> list[RewardRow]:
        return self.suite.score_group(example, [rollout.text for rollout in group.rollouts])

    def _all_but(self, about: About) -> list[str]:
        return [name for name in self.suite.names if self.suite.about(name) != about]

    def prior(self, index: int) -> float:
        """Total reward of the baseline's answer to a training question."""
        example = self.task.examples[index]
        return self.suite.score(example, baseline_completion(self.baselines, example, self.reasoning)).total

    def _advantages(self, rows: Sequence[list[RewardRow]], names: Sequence[str]) -> torch.Tensor:
        """advantages_B_G by the components `names`."""
        rewards_B_G = self._rewards(rows, names)
        scale = self.settings.scale_rewards
        everywhere = torch.tensor(gather_object(rewards_B_G.tolist())) if scale == "batch" else None
        return group_advantages(rewards_B_G, scale, everywhere) if rows else rewards_B_G

    def _rewards(self, rows: Sequence[list[RewardRow]], names: Sequence[str]) -> torch.Tensor:
        """rewards_B_G: what advantages are made from."""
        if not rows:
            return torch.empty(0)
        scores = [[[row.components[name] for name in names] for row in group] for group in rows]
        weights = [[group[0].weights.get(name, 0.0) for name in names] for group in rows]
        scores_B_G_K = torch.from_numpy(np.array(scores, np.float32))  # None becomes NaN
        if self.settings.multi_objective_aggregation == "normalize_then_sum":
            return normalized_sum(scores_B_G_K, torch.tensor(weights))
        return (scores_B_G_K.nan_to_num(0.0) * torch.tensor(weights)[:, None]).sum(dim=-1)
