"""Which questions a step trains on: volume by volume, grades balanced.

Inverse-frequency weights on the reward cancel in GRPO, because all completions of a prompt share one truth and
the group's standard deviation divides them away. So the prompts are balanced instead: an example is drawn with
weight sum over its attributes of 1 / (number of examples with that grade of that attribute), which makes the
grades of each attribute equally frequent.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence

import numpy as np


class PromptSampler:
    """Draws volumes and questions for a step; a pure function of (seed, step).

    Args:
        question_ids: question of each example.
        grades: attribute -> grade of each example.
        volume_ids: volume of each example.
    """

    def __init__(
        self,
        question_ids: Sequence[int],
        grades: Sequence[Mapping[str, int]],
        volume_ids: Sequence[str],
        *,
        balance: bool,
        seed: int,
    ) -> None:
        self.seed = seed
        self.weights = _balanced_weights(question_ids, grades) if balance else np.ones(len(question_ids))
        by_volume: dict[str, list[int]] = {}
        for index, volume in enumerate(volume_ids):
            by_volume.setdefault(volume, []).append(index)
        self.members = [np.array(indices) for indices in by_volume.values()]
        self.volume_shares = np.array([self.weights[m].sum() for m in self.members])
        if not self.volume_shares.sum() > 0:
            raise ValueError("no example to draw from: the training file is empty or has no graded attribute")
        self.volume_shares /= self.volume_shares.sum()

    def draw(self, step: int, volumes: int, questions_per_volume: int, again: int = 0) -> list[list[int]]:
        """Example indices for one step, one list per volume. `again` counts further draws in the same step.

        Nothing is drawn twice: there are fewer lists when there are fewer volumes, and a list is shorter when its
        volume has fewer questions. (A question drawn twice in a step would be answered with the same seed.)
        """
        rng = np.random.default_rng([self.seed, step, again] if again else [self.seed, step])
        count = min(volumes, int((self.volume_shares > 0).sum()))
        chosen = rng.choice(len(self.members), size=count, replace=False, p=self.volume_shares)
        return [self._questions(rng, self.members[v], questions_per_volume) for v in chosen]

    def _questions(self, rng: np.random.Generator, members: np.ndarray, count: int) -> list[int]:
        weights = self.weights[members]
        count = min(count, int((weights > 0).sum()))
        picked = rng.choice(members, size=count, replace=False, p=weights / weights.sum())
        return [int(i) for i in picked]


def _balanced_weights(question_ids: Sequence[int], grades: Sequence[Mapping[str, int]]) -> np.ndarray:
    counts = Counter(
        (q, name, g) for q, gs in zip(question_ids, grades, strict=True) for name, g in gs.items()
    )
    levels = Counter((q, name) for q, name, _ in counts)
    # 1 / count balances the grades of one attribute, 1 / levels and 1 / attributes keep questions equally frequent
    return np.array(
        [
            sum(1 / (counts[q, name, g] * levels[q, name] * len(gs)) for name, g in gs.items())
            for q, gs in zip(question_ids, grades, strict=True)
        ]
    )
