"""Rendered knees: what is drawn is what is written."""

from __future__ import annotations

from dataclasses import replace
from functools import lru_cache

import nibabel as nib
import numpy as np
import pytest

from rewards.ontology import QUESTIONS
from rl.data.phantom.anatomy import Knee, sample_knee
from rl.data.phantom.labels import LABELS, question_labels, region_box
from rl.data.phantom.measure import (
    measure_bml,
    measure_cartilage,
    measure_extrusion,
    measure_osteophyte,
    measure_other,
)
from rl.data.phantom.preview import save_preview
from rl.data.phantom.render import DEFAULT_FOV_MM, DEFAULT_SHAPE, render
from rl.data.phantom.template import EXTRUSION_MM, build_template, make_grid

KNEES = range(8)


@lru_cache
def rendered(seed: int) -> tuple[Knee, np.ndarray, np.ndarray]:
    """A balanced knee with its mask and noise-free lesion map."""
    knee = sample_knee(np.random.default_rng(seed), "left" if seed % 2 else "right", "24M", "balanced")
    _, labels, _, lesions = render(knee, return_lesions=True)
    return knee, labels, lesions


@pytest.mark.parametrize("seed", KNEES)
def test_bone_and_cartilage_grades_can_be_read_back(seed: int) -> None:
    knee, labels, lesions = rendered(seed)
    for i in range(1, 16):
        assert measure_bml(labels, lesions, i) == knee.grades[i], QUESTIONS[i].entity
    for i in range(16, 30):
        assert measure_cartilage(labels, lesions, i) == knee.grades[i], QUESTIONS[i].entity


@pytest.mark.parametrize("seed", KNEES)
def test_grades_of_spurs_soft_tissue_and_menisci_can_be_read_back(seed: int) -> None:
    knee, labels, lesions = rendered(seed)
    for i in range(30, 42):
        assert measure_osteophyte(labels, lesions, i, knee, DEFAULT_FOV_MM) == knee.grades[i], QUESTIONS[
            i
        ].entity
    for i in (42, 43, *range(48, 54), 58, 59, *range(62, 70)):
        assert measure_other(labels, lesions, i) == knee.grades[i], QUESTIONS[i].entity


def test_menisci_are_extruded_by_the_millimetres_of_their_grade() -> None:
    """Grades are those of MOAKS: under 2, 2 to 3, 3 to 5, over 5 mm.

    On slices fine enough to measure; at six millimetres a slice shows the share it covers instead.
    """
    assert EXTRUSION_MM[0] < 2 <= EXTRUSION_MM[1] < 3 <= EXTRUSION_MM[2] < 5 <= EXTRUSION_MM[3]
    knee = sample_knee(np.random.default_rng(5), "right", mode="balanced")
    knee = replace(knee, scale=1.0, translation_mm=(0.0, 0.0, 0.0))  # far from the edge of the field
    for grade, millimetres in enumerate(EXTRUSION_MM):
        grades = {**knee.grades, **{i: {"grade": grade} for i in (44, 45, 46, 47)}}
        extruded = replace(knee, grades=grades)
        labels = build_template(extruded, make_grid(extruded, (96, 96, 104), DEFAULT_FOV_MM)).labels
        for i in (44, 45, 46, 47):
            assert abs(measure_extrusion(labels, i, knee, DEFAULT_FOV_MM) - millimetres) < 0.9, (grade, i)


def test_every_region_has_a_box_inside_the_volume() -> None:
    for seed in KNEES:
        _, labels, _ = rendered(seed)
        for i in QUESTIONS:
            box = region_box(labels, i)
            assert box.inside((labels.shape[2], *labels.shape[:2]))
            assert box.volume >= 20, QUESTIONS[i].region


def test_bone_subregions_fill_a_visual_token_and_two_frames() -> None:
    """A token covers 16 x 16 pixels of two slices; a region much smaller than that cannot be graded."""
    _, labels, _ = rendered(0)
    for i in range(3, 16):
        box = region_box(labels, i)
        assert box.slice_max - box.slice_min >= 2, QUESTIONS[i].region
        assert min(box.x_max - box.x_min, box.y_max - box.y_min) >= 11, QUESTIONS[i].region


def test_a_left_knee_is_the_mirror_image_of_a_right_one() -> None:
    right = sample_knee(np.random.default_rng(3), "right", mode="balanced")
    left = replace(right, side="left")
    image_r, labels_r, affine_r = render(right)
    image_l, labels_l, affine_l = render(left)
    np.testing.assert_array_equal(labels_l, labels_r[:, :, ::-1])
    np.testing.assert_array_equal(image_l, image_r[:, :, ::-1])
    np.testing.assert_array_equal(affine_l, affine_r)


def test_medial_and_lateral_lie_where_the_affine_says() -> None:
    """World x grows towards the patient's right: a right knee's lateral side has the larger x."""
    for side, sign in (("right", 1), ("left", -1)):
        knee = sample_knee(np.random.default_rng(1), side)  # type: ignore[arg-type]
        _, labels, affine = render(knee)
        medial, lateral = (
            nib.affines.apply_affine(affine, np.argwhere(labels == LABELS[name]).mean(0))[0]
            for name in ("femur medial central", "femur lateral central")
        )
        assert (lateral - medial) * sign > 20


def test_the_affine_is_that_of_a_sagittal_series() -> None:
    _, _, affine = render(sample_knee(np.random.default_rng(0), "right"), (96, 80, 16), (140.0, 120.0, 104.0))
    assert nib.aff2axcodes(affine) == ("P", "I", "R")
    np.testing.assert_allclose(nib.affines.voxel_sizes(affine), (140 / 96, 1.5, 6.5))
    np.testing.assert_allclose(nib.affines.apply_affine(affine, (47.5, 39.5, 7.5)), 0, atol=1e-9)


def test_the_same_seed_gives_the_same_voxels() -> None:
    images = []
    for _ in range(2):
        rng = np.random.default_rng(11)
        image, labels, _ = render(sample_knee(rng, "left"), rng=rng)
        images.append((image, labels))
    np.testing.assert_array_equal(images[0][0], images[1][0])
    np.testing.assert_array_equal(images[0][1], images[1][1])
    assert images[0][0].dtype == np.int16
    assert images[0][1].dtype == np.uint8
    assert images[0][0].shape == images[0][1].shape == DEFAULT_SHAPE


def test_grades_show_in_the_image_beyond_the_noise() -> None:
    """A full-thickness, a fluid or a marrow lesion changes its region's brightness by many standard errors."""
    healthy = sample_knee(np.random.default_rng(2), "right")
    zero = {
        i: {a.name: 3 if a.name == "tear_location" else 0 for a in q.attributes} for i, q in QUESTIONS.items()
    }
    healthy = replace(healthy, grades=zero)
    base, labels, _ = render(healthy)
    for i in (4, 9, 15, 19, 25, 42, 43, 48, 53, 58, 60, 61, 62):
        worst = {a.name: a.grades[-1] for a in QUESTIONS[i].attributes}
        image, _, _ = render(replace(healthy, grades={**zero, i: worst}))
        region = np.isin(labels, question_labels(i))
        assert np.abs(image[region].astype(float) - base[region]).mean() > 40, QUESTIONS[i].entity


@pytest.mark.parametrize("shape", [(128, 128, 32), (64, 64, 16)])
def test_other_grids_show_every_region(shape: tuple[int, int, int]) -> None:
    _, labels, _ = render(sample_knee(np.random.default_rng(4), "right", mode="balanced"), shape)
    assert labels.shape == shape
    for i in QUESTIONS:
        region_box(labels, i)


def test_an_empty_region_is_named() -> None:
    with pytest.raises(ValueError, match="question 4 is empty"):
        region_box(np.zeros((4, 4, 4), np.uint8), 4)


def test_a_preview_is_written(tmp_path) -> None:
    image, _, _ = render(sample_knee(np.random.default_rng(0), "right"))
    save_preview(tmp_path / "knee.png", image, (0.5, 0.5, 1.0))
    assert (tmp_path / "knee.png").read_bytes().startswith(b"\x89PNG")
