"""Which questions a step trains on: volume by volume, grades balanced.

Inverse-frequency weights on the reward cancel in GRPO, because all completions of a prompt share one truth and
the group's standard deviation divides them away. So the prompts are balanced instead, which makes the expected reward
of grading the balanced accuracy: weights are fitted under which every grade of an attribute is drawn equally often,
for all attributes of a question at once, and what is drawn without repetition keeps to them.
"""

from __future__ import annotations

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
        chosen = draw_distinct(rng, self.volume_shares, volumes)
        return [self._questions(rng, self.members[v], questions_per_volume) for v in chosen]

    def _questions(self, rng: np.random.Generator, members: np.ndarray, count: int) -> list[int]:
        return [int(i) for i in members[draw_distinct(rng, self.weights[members], count)]]


def draw_distinct(rng: np.random.Generator, weights: np.ndarray, count: int) -> np.ndarray:
    """Positions of `count` distinct items, or of all whose weight is above 0 when they are fewer, in random order.

    An item is among them with a probability proportional to its weight, as far as that leaves none above 1: systematic
    sampling in random order (Madow 1949). Drawing one after another would favour the small weights.
    """
    order = rng.permutation(np.flatnonzero(weights > 0))
    if count >= len(order):
        return order
    shares = weights[order]
    sure = np.zeros(len(order), bool)
    inclusion = count * shares / shares.sum()
    while (inclusion > 1).any():
        sure |= inclusion >= 1
        inclusion = np.where(sure, 1.0, (count - sure.sum()) * shares / shares[~sure].sum())
    edges = np.cumsum(inclusion)
    edges[-1] = count  # no rounding may cost an item
    marks = np.floor(np.concatenate([[0.0], edges]) + rng.random())
    return rng.permutation(order[np.diff(marks) > 0])


ROUNDS = 200
TOLERANCE = 1e-3
"""Fitting ends when no grade's frequency is further than this, relatively, from that of the others."""


def _balanced_weights(question_ids: Sequence[int], grades: Sequence[Mapping[str, int]]) -> np.ndarray:
    """Weights of the examples, of each question adding up to 1; 0 for an example without a grade.

    Iterative proportional fitting (Deming and Stephan 1940): each attribute in turn scales the weights of the examples
    that have one of its grades to the mean over its grades. Where attributes contradict each other (a lesion of size 0
    has no depth) the fit ends at a compromise.
    """
    attributes: dict[tuple[int, str], list[tuple[int, int]]] = {}
    for i, (question_id, graded) in enumerate(zip(question_ids, grades, strict=True)):
        for name, grade in graded.items():
            attributes.setdefault((question_id, name), []).append((i, grade))
    columns = []
    for pairs in attributes.values():
        members, graded_as = np.array(pairs).T
        columns.append((members, np.unique(graded_as, return_inverse=True)[1]))
    weights = np.array([float(bool(graded)) for graded in grades])
    for _ in range(ROUNDS):
        worst = 0.0
        for members, levels in columns:
            sums = np.bincount(levels, weights[members])
            factors = sums.mean() / sums
            worst = max(worst, float(np.abs(factors - 1).max()))
            weights[members] *= factors[levels]
        if worst < TOLERANCE:
            break
    question = np.unique(np.asarray(question_ids), return_inverse=True)[1]
    totals = np.bincount(question, weights)
    return weights / np.where(totals > 0, totals, 1)[question]
