"""Boxes: the two conventions, the laws of IoU, and what is no box."""

import json
import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rewards import (
    Box3D,
    boxes_array,
    center_distance_mm,
    giou,
    giou_array,
    giou_matrix,
    iou,
    iou_array,
    iou_matrix,
)


@st.composite
def boxes(draw: st.DrawFn) -> Box3D:
    corners = []
    for _ in range(3):
        low = draw(st.integers(-50, 400))
        corners += [low, low + draw(st.integers(1, 300))]
    return Box3D(*corners)


def shifted(box: Box3D, by: int) -> Box3D:
    return Box3D.from_text([number + by for number in box.to_text()])


def voxels(box: Box3D) -> set[tuple[int, int, int]]:
    return {
        (s, x, y)
        for s in range(box.slice_min, box.slice_max)
        for x in range(box.x_min, box.x_max)
        for y in range(box.y_min, box.y_max)
    }


def test_text_is_inclusive_and_inside_is_half_open() -> None:
    box = Box3D.from_text([3, 3, 10, 19, 0, 4])
    assert box == Box3D(3, 4, 10, 20, 0, 5)
    assert box.volume == 1 * 10 * 5
    assert box.to_text() == [3, 3, 10, 19, 0, 4]


@pytest.mark.parametrize("numbers", [[5, 3, 0, 9, 0, 9], [0, 9, 5, 3, 0, 9], [0, 9, 0, 9, 5, 3]])
def test_an_inverted_box_is_refused_and_never_sorted(numbers: list[int]) -> None:
    with pytest.raises(ValueError, match="needs"):
        Box3D.from_text(numbers)


@pytest.mark.parametrize("bound", [math.nan, math.inf, 2.5, 2.0, True, "2", None])
def test_a_bound_that_is_no_integer_is_refused_and_shown(bound: Any) -> None:
    with pytest.raises(ValueError, match=f"integers, got {bound!r}"):
        Box3D(-9, bound, 0, 1, 0, 1)
    with pytest.raises(ValueError, match=f"integers, got {bound!r}"):
        Box3D.from_text([-9, bound, 0, 1, 0, 1])


@pytest.mark.parametrize("dtype", [np.uint8, np.int8, np.int16, np.int64])
def test_numpy_integers_of_any_width_do_not_wrap_around(dtype: type) -> None:
    """In 8 bits 127 + 1 and 4 - 6 wrap, and so do the voxels of a volume in 16."""
    widest = np.array([0, 127, 0, 127, 0, 127], dtype=dtype)
    assert Box3D.from_text(widest) == Box3D.from_text([0, 127, 0, 127, 0, 127])
    low = Box3D(*np.array([0, 4, 0, 10, 0, 10], dtype=dtype))
    high = Box3D(*np.array([6, 8, 0, 10, 0, 10], dtype=dtype))
    assert iou(low, high) == 0
    assert iou(low, Box3D(*np.array([0, 100, 0, 100, 0, 100], dtype=dtype))) == 400 / 100**3
    assert json.dumps(low.to_text()) == "[0, 3, 0, 9, 0, 9]"


def test_a_box_of_other_than_six_numbers_is_refused() -> None:
    with pytest.raises(ValueError, match=r"six numbers, got \[0, 1, 2\]"):
        Box3D.from_text([0, 1, 2])


def test_identical_one_voxel_boxes_overlap_fully() -> None:
    """Formulas in public use give 0 here, or divide by zero."""
    box = Box3D.from_text([7, 7, 7, 7, 7, 7])
    assert iou(box, box) == 1.0
    assert giou(box, box) == 1.0
    assert iou_array(boxes_array([box]), boxes_array([box])).tolist() == [1.0]


def test_the_end_convention_alone_moves_the_iou_of_a_thin_box() -> None:
    inclusive = iou(Box3D.from_text([4, 5, 0, 9, 0, 9]), Box3D.from_text([5, 6, 0, 9, 0, 9]))
    half_open = iou(Box3D(4, 5, 0, 9, 0, 9), Box3D(5, 6, 0, 9, 0, 9))
    assert inclusive == pytest.approx(1 / 3)
    assert half_open == 0.0


@given(boxes(), boxes())
def test_iou_is_symmetric_bounded_and_unmoved_by_translation(a: Box3D, b: Box3D) -> None:
    assert 0.0 <= iou(a, b) <= 1.0
    assert iou(a, b) == iou(b, a) == iou(shifted(a, 17), shifted(b, 17))
    assert -1.0 < giou(a, b) <= iou(a, b)
    assert giou(a, b) == giou(b, a)


@given(boxes())
def test_iou_is_one_for_the_same_box_only(box: Box3D) -> None:
    assert iou(box, box) == giou(box, box) == 1.0
    longer = Box3D(box.slice_min, box.slice_max + 1, box.x_min, box.x_max, box.y_min, box.y_max)
    assert iou(box, longer) == box.volume / longer.volume < 1.0


@given(boxes(), st.integers(1, 60))
def test_iou_falls_as_the_overlap_shrinks(box: Box3D, by: int) -> None:
    def along_x(step: int) -> Box3D:
        return Box3D(box.slice_min, box.slice_max, box.x_min + step, box.x_max + step, box.y_min, box.y_max)

    assert iou(box, along_x(by)) <= iou(box, along_x(by - 1))


@given(st.lists(st.tuples(boxes(), boxes()), min_size=1, max_size=5))
def test_the_vectorised_forms_agree_with_the_single_one(pairs: list[tuple[Box3D, Box3D]]) -> None:
    left, right = boxes_array([a for a, _ in pairs]), boxes_array([b for _, b in pairs])
    assert iou_array(left, right) == pytest.approx([iou(a, b) for a, b in pairs])
    assert giou_array(left, right) == pytest.approx([giou(a, b) for a, b in pairs])
    for matrix, array in ((iou_matrix, iou_array), (giou_matrix, giou_array)):
        assert matrix(left, right).shape == (len(pairs), len(pairs))
        assert np.diagonal(matrix(left, right)) == pytest.approx(array(left, right))


@given(
    st.tuples(*[st.tuples(st.integers(0, 4), st.integers(1, 3)) for _ in range(6)]),
)
def test_iou_counts_voxels(extents: tuple[tuple[int, int], ...]) -> None:
    a = Box3D(*[n for low, size in extents[:3] for n in (low, low + size)])
    b = Box3D(*[n for low, size in extents[3:] for n in (low, low + size)])
    assert iou(a, b) == len(voxels(a) & voxels(b)) / len(voxels(a) | voxels(b))


def test_boxes_that_touch_do_not_overlap() -> None:
    assert iou(Box3D(0, 2, 0, 2, 0, 2), Box3D(2, 4, 0, 2, 0, 2)) == 0.0


def test_giou_of_boxes_apart_tells_near_from_far() -> None:
    box, near, far = Box3D(0, 2, 0, 2, 0, 2), Box3D(3, 5, 0, 2, 0, 2), Box3D(90, 92, 0, 2, 0, 2)
    assert giou(box, near) == pytest.approx(-(20 - 16) / 20)
    assert giou(box, far) < giou(box, near) < 0


def test_arrays_refuse_what_is_no_box_and_name_the_row() -> None:
    good = boxes_array([Box3D(0, 2, 0, 2, 0, 2)])
    with pytest.raises(ValueError, match=r"box 1 .*min >= max"):
        iou_matrix(np.array([[0, 2, 0, 2, 0, 2], [0, 2, 5, 3, 0, 2]]), good)
    with pytest.raises(ValueError, match="integers of shape"):
        iou_array(good.astype(float), good)
    with pytest.raises(ValueError, match="integers of shape"):
        iou_array(good[0], good)
    with pytest.raises(ValueError, match="as many boxes"):
        iou_array(np.repeat(good, 2, axis=0), good)


def test_huge_extents_do_not_overflow() -> None:
    """999,999 cubed fits 63 bits, larger extents do not; float64 carries both."""
    box = Box3D(0, 10**7, 0, 10**7, 0, 10**7)
    assert iou_array(boxes_array([box]), boxes_array([box])).tolist() == [1.0]


def test_no_boxes_give_an_empty_array() -> None:
    assert boxes_array([]).shape == (0, 6)
    assert iou_matrix(boxes_array([]), boxes_array([])).shape == (0, 0)


def test_inside_means_every_voxel() -> None:
    assert Box3D(0, 16, 0, 96, 0, 90).inside((16, 96, 90))
    assert not Box3D(0, 17, 0, 96, 0, 90).inside((16, 96, 90))
    assert not Box3D(-1, 3, 0, 96, 0, 90).inside((16, 96, 90))
    # the y extent is checked against y, not x
    assert not Box3D(0, 16, 0, 90, 0, 96).inside((16, 96, 90))


def test_centre_distance_is_in_millimetres() -> None:
    a, b = Box3D(0, 2, 0, 2, 0, 2), Box3D(3, 5, 4, 6, 0, 2)
    assert center_distance_mm(a, b, (1.0, 1.0, 1.0)) == 5.0
    assert center_distance_mm(a, b, (2.0, 0.0, 9.0)) == 6.0
    assert center_distance_mm(a, a, (0.7, 0.365, 0.365)) == 0.0


@given(boxes(), st.integers(1, 999))
def test_corner_form_and_mirroring_are_undone_by_themselves(box: Box3D, slices: int) -> None:
    assert Box3D.from_corners(*box.to_corners()) == box
    assert box.mirrored(slices).mirrored(slices) == box
    assert box.mirrored(slices).extents == box.extents


@given(boxes(), boxes(), st.tuples(*[st.floats(0.1, 9) for _ in range(3)]))
def test_overlap_in_millimetres_is_that_in_voxels(
    a: Box3D, b: Box3D, spacing: tuple[float, float, float]
) -> None:
    (low_a, high_a), (low_b, high_b) = a.to_mm(spacing), b.to_mm(spacing)
    sides = [
        max(0.0, min(h, k) - max(lo, m)) for h, k, lo, m in zip(high_a, high_b, low_a, low_b, strict=True)
    ]
    volumes = [
        math.prod(h - lo for h, lo in zip(high, low, strict=True))
        for low, high in ((low_a, high_a), (low_b, high_b))
    ]
    overlap = math.prod(sides)
    assert overlap / (sum(volumes) - overlap) == pytest.approx(iou(a, b), abs=1e-9)


@given(boxes(), st.tuples(*[st.floats(0.1, 9) for _ in range(3)]))
def test_millimetres_become_the_same_voxels_again(box: Box3D, spacing: tuple[float, float, float]) -> None:
    assert Box3D.from_mm(*box.to_mm(spacing), spacing) == box


def test_millimetres_go_to_the_nearest_border_and_must_leave_a_voxel() -> None:
    assert Box3D.from_mm((0.1, 0.0, 0.0), (1.3, 2.0, 2.9), (0.7, 1.0, 1.0)) == Box3D(0, 2, 0, 2, 0, 3)
    with pytest.raises(ValueError, match="slice_min < slice_max, got 1 and 1"):
        Box3D.from_mm((0.6, 0.0, 0.0), (0.8, 2.0, 2.0), (0.7, 1.0, 1.0))
    with pytest.raises(ValueError, match="finite"):
        Box3D.from_mm((0.0, 0.0, 0.0), (math.inf, 2.0, 2.0), (0.7, 1.0, 1.0))


def test_a_left_knee_is_mirrored_into_the_orientation_of_a_right_one() -> None:
    box = Box3D(2, 5, 10, 20, 30, 40)
    assert box.canonical("right", 16) == box
    assert box.canonical("left", 16) == Box3D(11, 14, 10, 20, 30, 40)
    with pytest.raises(ValueError, match="'Left'"):
        box.canonical("Left", 16)  # type: ignore[arg-type]


@pytest.mark.slow
def test_a_million_pairs_agree_with_monai() -> None:
    """`monai.data.box_utils` works in float32 corners: small integers are exact there."""
    box_utils = pytest.importorskip("monai.data.box_utils")
    rng = np.random.default_rng(0)

    def random_boxes(n: int) -> np.ndarray:
        low = rng.integers(0, 100, (n, 3))
        high = low + rng.integers(1, 40, (n, 3))
        return np.stack([low, high], axis=-1).reshape(n, 6)

    a, b = random_boxes(1000), random_boxes(1000)
    corners_a, corners_b = (
        np.concatenate([x[:, 0::2], x[:, 1::2]], axis=1).astype(np.float64) for x in (a, b)
    )
    assert iou_matrix(a, b).size == 1_000_000
    assert np.abs(iou_matrix(a, b) - box_utils.box_iou(corners_a, corners_b)).max() < 1e-6
    assert np.abs(giou_matrix(a, b) - box_utils.box_giou(corners_a, corners_b)).max() < 1e-6
