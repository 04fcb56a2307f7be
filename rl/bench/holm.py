"""Holm's correction for testing several columns, pairs of runs or arms at once."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from rl.bench.endpoints import OVERALL, SAME_COLUMNS


def holm(p_values: Sequence[float]) -> list[float]:
    """Adjusted p-values of a family of tests (Holm 1979), in the order given."""
    adjusted, highest = [0.0] * len(p_values), 0.0
    for rank, index in enumerate(sorted(range(len(p_values)), key=p_values.__getitem__)):
        highest = max(highest, min(1.0, (len(p_values) - rank) * p_values[index]))
        adjusted[index] = highest
    return adjusted


def holm_by_measure(
    comparisons: Sequence[Mapping[tuple[str, str], float]],
) -> list[dict[tuple[str, str], float]]:
    """Holm's correction over all that is tested at once.

    A family is one measure: its columns, in every comparison given. Overall stands apart, in a family of its own: the
    Overall of that measure in every comparison, so that with a single comparison it is not corrected. A category
    that is a column of Table 2 by another name is the same test and is not counted twice.

    Args:
        comparisons: for each, (measure, column) -> p-value.

    Returns:
        The same with corrected p-values.
    """
    families: dict[tuple[str, bool], list[tuple[int, tuple[str, str]]]] = {}
    for index, p_values in enumerate(comparisons):
        for measure, column in p_values:
            if column not in SAME_COLUMNS:
                family = families.setdefault((measure, column == OVERALL), [])
                family.append((index, (measure, column)))
    corrected: list[dict[tuple[str, str], float]] = [{} for _ in comparisons]
    for family in families.values():
        adjusted = holm([comparisons[index][key] for index, key in family])
        for (index, key), p in zip(family, adjusted, strict=True):
            corrected[index][key] = p
    return [
        {(measure, column): found[measure, SAME_COLUMNS.get(column, column)] for measure, column in p_values}
        for p_values, found in zip(comparisons, corrected, strict=True)
    ]
