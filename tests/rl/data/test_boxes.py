"""The box convention: text to file grid and back, and the boxes of masks."""

import dataclasses

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import ndimage

from rewards.boxes import Box3D
from rl.config import BoxConvention, ConfigError
from rl.data.boxes import (
    Convention,
    box_from_text,
    box_to_text,
    extent_box,
    mask_box,
    parse_convention,
    region_extents,
)
from rl.data.ranking import ALL_CONVENTIONS, configured_values

PLAIN = Convention((2, 0, 1), (False, False, False), True)


@st.composite
def shapes_and_boxes(draw):
    limits, shape = [], []
    for _ in range(3):
        size = draw(st.integers(1, 40))
        low = draw(st.integers(0, size - 1))
        limits += [low, draw(st.integers(low + 1, size))]
        shape.append(size)
    return tuple(shape), Box3D(*limits)


@given(shapes_and_boxes(), st.sampled_from(ALL_CONVENTIONS))
def test_text_and_file_grid_are_inverse_under_every_convention(case, convention):
    shape, box = case
    assert box_from_text(box_to_text(box, shape, convention), shape, convention) == box


def test_the_default_text_is_inclusive_and_the_box_half_open():
    assert box_from_text([1, 2, 3, 3, 0, 9], (6, 12, 10), PLAIN) == Box3D(1, 3, 3, 4, 0, 10)


def test_an_exclusive_end_is_one_past_the_last_voxel():
    exclusive = dataclasses.replace(PLAIN, inclusive=False)
    assert box_from_text([1, 2, 3, 4, 0, 10], (6, 12, 10), exclusive) == Box3D(1, 2, 3, 4, 0, 10)


def test_a_flipped_axis_counts_from_the_far_end():
    flipped = dataclasses.replace(PLAIN, flip=(False, True, False))
    assert box_from_text([1, 2, 0, 2, 0, 9], (6, 12, 10), flipped) == Box3D(1, 3, 9, 12, 0, 10)


@pytest.mark.parametrize(
    ("numbers", "convention"),
    [
        ([0, 6, 0, 1, 0, 1], PLAIN),
        ([-1, 2, 0, 1, 0, 1], PLAIN),
        ([3, 2, 0, 1, 0, 1], PLAIN),
        ([2, 2, 0, 1, 0, 1], dataclasses.replace(PLAIN, inclusive=False)),
    ],
)
def test_a_box_that_leaves_the_grid_or_is_empty_is_refused_and_never_repaired(numbers, convention):
    with pytest.raises(ValueError, match=r"slice runs from .* the 6 voxels"):
        box_from_text(numbers, (6, 12, 10), convention)


def test_a_box_needs_six_numbers():
    with pytest.raises(ValueError, match="six numbers"):
        box_from_text([1, 2, 3, 4], (6, 12, 10), PLAIN)


@pytest.mark.parametrize("convention", ALL_CONVENTIONS)
def test_every_convention_survives_the_config(convention):
    axes, flip, end = configured_values(convention)
    assert parse_convention(BoxConvention(axes=axes, flip=flip, end=end)) == convention


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("axes", "slice=2,x=0"),
        ("axes", "slice=2,x=0,y=0"),
        ("axes", "slice=3,x=0,y=1"),
        ("flip", "z"),
        ("flip", "x,x"),
        ("end", "open"),
    ],
)
def test_a_bad_convention_is_named_by_field_and_value(field, value):
    with pytest.raises(ConfigError, match=rf"data\.box_convention\.{field} is '{value}'"):
        parse_convention(BoxConvention(**{field: value}))


def test_the_mask_box_is_that_of_the_largest_component_of_the_labels_union():
    mask = np.zeros((12, 10, 6), np.uint8)
    mask[0:2, 0:2, 0:2] = 3  # 8 voxels
    mask[5:8, 4:6, 2:4] = 3  # 12 voxels, and 6 more of the second label beside it
    mask[5:8, 6:7, 2:4] = 4
    mask[11, 9, 5] = 3
    assert mask_box(mask, [3, 4], PLAIN) == Box3D(2, 4, 5, 8, 4, 7)
    assert mask_box(mask, [3], PLAIN) == Box3D(2, 4, 5, 8, 4, 6)


def test_an_absent_region_has_no_box():
    assert mask_box(np.zeros((4, 4, 4), np.uint8), [3], PLAIN) is None
    assert mask_box(np.ones((4, 4, 4), np.uint8), [64], PLAIN) is None


def test_of_two_equal_components_the_first_in_file_order_counts():
    mask = np.zeros((6, 6, 6), np.uint8)
    mask[4, 4, 4] = mask[1, 1, 1] = 1
    assert mask_box(mask, [1], PLAIN) == Box3D(1, 2, 1, 2, 1, 2)


@given(st.integers(0, 10_000))
def test_the_mask_box_agrees_with_a_plain_labelling(seed):
    """Crops and the cc3d library must not change what a textbook labelling of the whole grid finds."""
    mask = (np.random.default_rng(seed).random((9, 8, 7)) < 0.12).astype(np.uint8) * 2
    labelled, count = ndimage.label(mask == 2, structure=np.ones((3, 3, 3)))
    box = mask_box(mask, [2], PLAIN)
    if count == 0:
        assert box is None
        return
    sizes = np.bincount(labelled.ravel())[1:]
    candidates = [
        extent_box(ndimage.find_objects(labelled)[i], PLAIN) for i in np.flatnonzero(sizes == sizes.max())
    ]
    assert box in candidates


def test_many_regions_are_found_in_one_pass():
    mask = np.zeros((5, 5, 5), np.uint8)
    mask[0, 0, 0], mask[2:4, 1, 1] = 1, 2
    extents = region_extents(mask, {10: [1], 20: [2], 30: [9]})
    assert extents == {10: (slice(0, 1),) * 3, 20: (slice(2, 4), slice(1, 2), slice(1, 2))}
