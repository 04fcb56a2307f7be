"""The data settle the box convention: whichever one wrote the text is ranked first."""

import numpy as np
import pytest

from rewards.boxes import Box3D
from rl.data.boxes import Convention, box_to_text
from rl.data.ranking import ALL_CONVENTIONS, BoxPair, judge, rank_conventions

SHAPE = (12, 10, 8)
PLAIN = Convention((2, 0, 1), (False, False, False), True)


def pairs_written_by(convention: Convention, n: int = 30) -> list[BoxPair]:
    """Random mask extents, each with the text that this convention makes of it."""
    rng = np.random.default_rng(0)
    pairs = []
    for _ in range(n):
        lows = [int(rng.integers(0, size - 3)) for size in SHAPE]
        extent = tuple(slice(low, low + int(rng.integers(1, 4))) for low in lows)
        s, x, y = (extent[axis] for axis in convention.axes)
        box = Box3D(s.start, s.stop, x.start, x.stop, y.start, y.stop)
        pairs.append(BoxPair(tuple(box_to_text(box, convention.grid(SHAPE), convention)), extent, SHAPE))
    return pairs


@pytest.mark.parametrize("convention", ALL_CONVENTIONS, ids=Convention.describe)
def test_each_of_the_96_conventions_is_found_when_it_wrote_the_boxes(convention):
    ranking = rank_conventions(pairs_written_by(convention))
    assert ranking[0].convention == convention
    assert ranking[0].mean_iou == 1.0
    assert ranking[1].mean_iou < 1.0
    assert judge(ranking, convention) is None


@pytest.mark.parametrize("convention", [c for c in ALL_CONVENTIONS if c != PLAIN], ids=Convention.describe)
def test_every_other_convention_is_refused_and_the_right_one_named(convention):
    verdict = judge(rank_conventions(pairs_written_by(PLAIN)), convention)
    assert verdict is not None
    assert 'data.box_convention.axes="slice=2,x=0,y=1" data.box_convention.flip="" ' in verdict
    assert convention.describe() in verdict


def test_conventions_that_no_box_tells_apart_are_both_accepted():
    """A box centred in its grid reads the same from both ends of each axis."""
    centred = BoxPair((2, 5, 4, 7, 3, 6), (slice(4, 8), slice(3, 7), slice(2, 6)), SHAPE)
    ranking = rank_conventions([centred])
    flipped = Convention((2, 0, 1), (True, True, False), True)
    assert [entry.same_as_best for entry in ranking if entry.convention == flipped] == [True]
    assert judge(ranking, flipped) is None
    assert judge(ranking, Convention((2, 0, 1), (False, False, False), False)) is not None


def test_equal_means_over_different_boxes_are_no_tie():
    first = BoxPair((0, 0, 0, 0, 0, 0), (slice(0, 1), slice(0, 1), slice(0, 1)), SHAPE)
    second = BoxPair((0, 0, 0, 0, 0, 0), (slice(0, 1), slice(0, 1), slice(7, 8)), SHAPE)
    ranking = rank_conventions([first, second])
    flipped = next(e for e in ranking if e.convention == Convention((2, 0, 1), (True, False, False), True))
    assert flipped.mean_iou == ranking[0].mean_iou
    assert not flipped.same_as_best


def test_boxes_that_fit_nothing_are_refused_whatever_is_configured():
    elsewhere = BoxPair((0, 0, 0, 0, 0, 0), (slice(5, 8), slice(4, 7), slice(3, 6)), SHAPE)
    verdict = judge(rank_conventions([elsewhere]), PLAIN)
    assert verdict is not None
    assert "no convention explains the boxes" in verdict
    assert "data.box_source=mask" in verdict
