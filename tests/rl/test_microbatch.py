"""Groups are cut into micro-batches by their tokens: nothing is lost, and the budget is kept where it can be."""

from __future__ import annotations

from itertools import groupby, zip_longest

from hypothesis import given
from hypothesis import strategies as st

from rl.microbatch import GroupTokens, attended_at_once, within_budget

SHARED = (30, 50, 0)
groups = st.lists(st.tuples(st.integers(0, 2), st.integers(1, 40))).map(
    lambda drawn: [GroupTokens(volume, SHARED[volume], own) for volume, own in drawn]
)


def tokens(part: list[GroupTokens]) -> int:
    """A volume's once for groups that follow each other."""
    before = [None, *(group.volume for group in part)]
    return sum(g.own + (g.shared if g.volume != last else 0) for g, last in zip(part, before, strict=False))


@given(groups, st.integers(1, 200))
def test_every_group_is_computed_once_within_the_budget_or_alone(
    groups: list[GroupTokens], budget: int
) -> None:
    """And a volume is cut only where it does not fit a part of its own."""
    parts = list(within_budget(groups, budget))
    assert [i for part in parts for i in part] == list(range(len(groups)))
    volumes = [list(of_volume) for _, of_volume in groupby(groups, lambda group: group.volume)]
    volume_of = [number for number, volume in enumerate(volumes) for _ in volume]
    for part, following in zip_longest(parts, parts[1:]):
        members = [groups[i] for i in part]
        assert len(part) == 1 or tokens(members) <= budget
        if not following:
            continue
        next_volume = volumes[volume_of[following[0]]]
        if volume_of[part[-1]] == volume_of[following[0]]:
            assert tokens(next_volume) > budget
            assert tokens([*members, groups[following[0]]]) > budget  # as many as fit
        else:
            assert tokens([*members, *next_volume]) > budget


@given(st.integers(0, 60), st.lists(st.integers(1, 40)))
def test_siblings_attend_together_up_to_half_the_length_of_their_path_or_alone(
    path: int, lengths: list[int]
) -> None:
    runs = list(attended_at_once(path, lengths))
    assert [i for run in runs for i in run] == list(range(len(lengths)))
    for run, following in zip_longest(runs, runs[1:]):
        together = sum(lengths[i] for i in run)
        assert len(run) == 1 or together <= path / 2
        if following:  # as many as may
            assert together + lengths[following[0]] > path / 2
