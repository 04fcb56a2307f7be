"""Slices and boxes land where a radiologist expects them, whatever the file's orientation."""

from __future__ import annotations

import base64
import io

import nibabel
import numpy as np
import pytest
from matplotlib.image import imread

from rewards.boxes import Box3D
from rl.bench.planes import BoxVolume, draw_planes, load_volume
from rollouts.volumes import VolumeError

SPACING = (3.0, 1.0, 2.0)


def image_of(plane) -> np.ndarray:
    """Grey values of the plane's PNG, [rows, columns] in [0, 1]."""
    return imread(io.BytesIO(base64.b64decode(plane.png.split(",")[1])), format="png")[:, :, 0]


def bright_extent(image: np.ndarray) -> tuple[slice, slice]:
    rows, columns = np.nonzero(image > 0.5)
    return slice(rows.min(), rows.max() + 1), slice(columns.min(), columns.max() + 1)


@pytest.mark.parametrize("codes", [("R", "P", "I"), ("L", "A", "S"), ("S", "R", "A"), ("P", "I", "L")])
def test_the_outline_lies_on_the_voxels_of_its_box_on_every_plane(codes):
    """A bright block is drawn where its box is outlined, so image and outline are flipped and turned together."""
    box = Box3D(2, 5, 10, 14, 3, 12)
    array = np.zeros((8, 20, 16), dtype=np.float32)
    array[2:5, 10:14, 3:12] = 1
    planes = draw_planes(BoxVolume(array, SPACING, codes), {"truth": box})
    assert [plane.title.split()[0] for plane in planes] == ["Sagittal", "Coronal", "Axial"]
    for plane in planes:
        image = image_of(plane)
        rows, columns = bright_extent(image)
        (outline,) = plane.outlines
        per_row, per_column = plane.height_mm / image.shape[0], plane.width_mm / image.shape[1]
        assert outline.cut
        assert (outline.top, outline.height) == pytest.approx(
            (rows.start * per_row, (rows.stop - rows.start) * per_row)
        )
        assert (outline.left, outline.width) == pytest.approx(
            (columns.start * per_column, (columns.stop - columns.start) * per_column)
        )


def test_superior_is_up_and_anterior_left_on_a_sagittal_plane():
    """Index 0 of an axis that rises to S is at the bottom, of one that rises to A at the right."""
    array = np.zeros((4, 6, 5), dtype=np.float32)
    array[:, 0, 0] = 1
    sagittal = draw_planes(BoxVolume(array, (1, 1, 1), ("L", "A", "S")), {})[0]
    image = image_of(sagittal)
    assert image.shape == (5, 6)
    assert image[-1, -1] > 0.5
    assert image.sum() == pytest.approx(image[-1, -1])


def test_the_patients_right_is_on_the_left_of_a_coronal_plane():
    array = np.zeros((4, 6, 5), dtype=np.float32)
    array[0] = 1  # slices rise to the left, so slice 0 is the patient's right
    coronal = draw_planes(BoxVolume(array, (1, 1, 1), ("L", "A", "S")), {})[1]
    assert (image_of(coronal)[:, 0] > 0.5).all()


def test_planes_pass_through_the_true_box_and_a_box_elsewhere_is_marked():
    volume = BoxVolume(np.zeros((10, 20, 20), dtype=np.float32), (1, 1, 1), ("L", "A", "S"))
    boxes = {"truth": Box3D(6, 9, 2, 5, 2, 5), "a": None, "b": Box3D(0, 3, 2, 5, 2, 5)}
    sagittal = draw_planes(volume, boxes)[0]
    assert sagittal.title == "Sagittal slice = 7"
    assert [(o.who, o.cut) for o in sagittal.outlines] == [("truth", True), ("b", False)]


def test_a_box_outside_the_volume_is_shown_from_the_nearest_slice():
    volume = BoxVolume(np.zeros((10, 20, 20), dtype=np.float32), (1, 1, 1), ("L", "A", "S"))
    planes = draw_planes(volume, {"truth": None, "a": Box3D(30, 40, -9, -3, 2, 5)})
    assert [plane.title for plane in planes] == ["Sagittal slice = 9", "Coronal x = 0", "Axial y = 3"]


def test_a_file_is_read_into_the_order_of_its_boxes(tmp_path):
    """Sagittal file axes (anterior-posterior, superior-inferior, left-right), as in the phantom."""
    array = np.arange(4 * 5 * 3, dtype=np.float32).reshape(4, 5, 3)
    affine = np.array([[0, 0, 7, 0], [-2, 0, 0, 0], [0, -3, 0, 0], [0, 0, 0, 1.0]])
    nibabel.save(nibabel.Nifti1Image(array, affine), tmp_path / "v.nii.gz")
    volume = load_volume(str(tmp_path / "v.nii.gz"), (2, 0, 1))
    assert volume.array.shape == (3, 4, 5)
    assert volume.array[2, 1, 4] == array[1, 4, 2]
    assert volume.spacing_mm == pytest.approx((7, 2, 3))
    assert volume.codes == ("R", "P", "I")


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(VolumeError, match=r"gone\.nii\.gz"):
        load_volume(str(tmp_path / "gone.nii.gz"), (2, 0, 1))
