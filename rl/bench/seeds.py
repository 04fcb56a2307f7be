"""What several training seeds say about a method.

An interval over patients speaks of one pair of checkpoints. Here the unit is the seed: two arms trained from the same
seed are a pair, its difference is one observation, and the mean of the differences has Student's t interval with
seeds - 1 degrees of freedom (the paired t-test, Student 1908). It says how the methods would differ if both were
trained again, on these patients.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, replace

from scipy.stats import t as student_t

from rl.bench.compare import CompareError, Comparison, Difference
from rl.bench.holm import holm_by_measure
from rl.bench.intervals import Interval

MIN_SEEDS = 3
"""Below this nothing is claimed about a method."""


@dataclass(frozen=True, slots=True)
class SeedSummary:
    """An endpoint's difference over training seeds.

    With fewer than `MIN_SEEDS` there is no claim: interval and p-values are None.
    """

    measure: str
    column: str
    differences: tuple[float, ...]
    """B minus A for each seed, in the order given."""
    mean: float
    sd: float | None
    """Standard deviation between seeds (n - 1); None for a single one."""
    interval: Interval | None
    """Student's t over seeds, df = seeds - 1."""
    p_value: float | None
    """Paired t-test, two-sided, not corrected."""
    p_holm: float | None
    """The same corrected by Holm's method, in the families of `rl.bench.holm.holm_by_measure`."""


def seed_summary(comparisons: Sequence[Comparison]) -> list[SeedSummary]:
    """Differences over several seeds of the same two arms: the unit for a claim about the method.

    Endpoints that are empty in any comparison are left out.

    Raises:
        CompareError: no comparisons, or comparisons of different test files, readers, confidences or settings.
    """
    return seed_summaries([comparisons])[0]


def seed_summaries(arms: Sequence[Sequence[Comparison]]) -> list[list[SeedSummary]]:
    """`seed_summary` of several arms, each with the same reference; Holm's correction covers all of them."""
    summaries = [_over_seeds(comparisons) for comparisons in arms]
    corrected = holm_by_measure(
        [{(s.measure, s.column): s.p_value for s in arm if s.p_value is not None} for arm in summaries]
    )
    return [
        [replace(s, p_holm=p_holm.get((s.measure, s.column))) for s in arm]
        for arm, p_holm in zip(summaries, corrected, strict=True)
    ]


def _over_seeds(comparisons: Sequence[Comparison]) -> list[SeedSummary]:
    if not comparisons:
        raise CompareError("seed_summary needs at least one comparison")
    settings = {
        (c.b.split_file, c.b.reader, c.b.question_ids, c.confidence, c.a.setting_words, c.b.setting_words)
        for c in comparisons
    }
    if len(settings) > 1:
        raise CompareError(
            f"comparisons differ in test file, reader, question set, confidence or setting: {str(settings)[:200]}"
        )
    summaries = []
    for first in comparisons[0].differences:
        found = [c.get(first.measure, first.column) for c in comparisons]
        values = tuple(d.difference for d in found if d is not None)
        if len(values) == len(comparisons):
            summaries.append(_summarise(first, values, comparisons[0].confidence))
    return summaries


def _summarise(endpoint: Difference, values: tuple[float, ...], confidence: float) -> SeedSummary:
    seeds, mean = len(values), statistics.fmean(values)
    sd = statistics.stdev(values) if seeds > 1 else None
    interval, p_value = None, None
    if sd is not None and seeds >= MIN_SEEDS:
        se = sd / math.sqrt(seeds)
        half = float(student_t.ppf((1 + confidence) / 2, seeds - 1)) * se
        interval = Interval(mean - half, mean + half)
        t = abs(mean) / se if se else (math.inf if mean else 0.0)
        p_value = 2 * float(student_t.sf(t, seeds - 1))
    return SeedSummary(endpoint.measure, endpoint.column, values, mean, sd, interval, p_value, None)
