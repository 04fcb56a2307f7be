"""Volumes are read or named as faulty, and every visual token covers exactly the voxels it says."""

from __future__ import annotations

import gzip
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import nibabel
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rewards.types import VolumeRef
from rl.config import VolumeViewConfig
from rollouts.volumes import (
    PatchSizes,
    ViewError,
    ViewGeometry,
    Volume,
    VolumeError,
    read_volume,
    view_frames,
)

SMALL = PatchSizes(patch=8, merge=2, temporal=2)


def save(path: Path, array: np.ndarray) -> Path:
    nibabel.save(nibabel.Nifti1Image(array.astype(np.float32), np.eye(4)), path)
    return path


def volume_of(array: np.ndarray, spacing: tuple[float, float, float] = (0.5, 0.5, 2.0)) -> Volume:
    return Volume(Path("memory.nii.gz"), array.astype(np.float32), np.eye(4), spacing)


def test_a_volume_is_read_with_its_voxel_sizes(make_volume: Callable[..., VolumeRef]) -> None:
    volume = read_volume(make_volume("a").image_path)
    assert volume.array.shape == (40, 48, 7)
    assert volume.array.dtype == np.float32
    assert volume.spacing_mm == pytest.approx((0.5, 0.5, 2.0))


def test_a_missing_file_is_named() -> None:
    with pytest.raises(VolumeError, match=r"nowhere\.nii\.gz does not exist.*data\.root"):
        read_volume("nowhere.nii.gz")


@pytest.mark.parametrize("shape", [(4, 4, 4, 2), (4, 4)])
def test_a_file_that_is_not_three_dimensional_is_named_with_its_shape(
    tmp_path: Path, shape: tuple[int, ...]
) -> None:
    path = save(tmp_path / "series.nii.gz", np.ones(shape))
    with pytest.raises(VolumeError, match=rf"series\.nii\.gz has {len(shape)} axes .*expected 3"):
        read_volume(path)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_a_voxel_that_is_not_finite_is_named_and_counted(tmp_path: Path, value: float) -> None:
    array = np.ones((4, 4, 4))
    array[1, 2, 3] = value
    with pytest.raises(VolumeError, match=r"bad\.nii\.gz has 1 NaN or infinite voxels of 64"):
        read_volume(save(tmp_path / "bad.nii.gz", array))


def test_a_file_without_voxels_is_named(tmp_path: Path) -> None:
    with pytest.raises(VolumeError, match=r"empty\.nii"):
        read_volume(save(tmp_path / "empty.nii", np.ones((4, 0, 4))))


def test_a_file_without_voxel_size_is_named(tmp_path: Path) -> None:
    path = save(tmp_path / "flat.nii", np.ones((4, 4, 4)))
    content = bytearray(path.read_bytes())
    content[280:328] = bytes(48)  # the three rows of the affine (NIfTI-1 header, srow_x to srow_z)
    path.write_bytes(content)
    with pytest.raises(VolumeError, match=r"flat\.nii has voxel size"):
        read_volume(path)


@pytest.mark.parametrize("share", [0.0, 0.001, 0.5, 0.99])
def test_a_truncated_file_is_named_wherever_it_was_cut(tmp_path: Path, share: float) -> None:
    whole = save(tmp_path / "whole.nii.gz", np.random.default_rng(0).random((16, 16, 16))).read_bytes()
    path = tmp_path / "cut.nii.gz"
    path.write_bytes(whole[: int(len(whole) * share)])
    with pytest.raises(VolumeError, match=r"cut\.nii\.gz cannot be read"):
        read_volume(path)


def test_a_plain_file_cut_in_the_voxels_is_named(tmp_path: Path) -> None:
    path = save(tmp_path / "cut.nii", np.ones((16, 16, 16)))
    path.write_bytes(path.read_bytes()[:2000])
    with pytest.raises(VolumeError, match=r"cut\.nii cannot be read"):
        read_volume(path)


@settings(max_examples=60, deadline=None)
@given(position=st.integers(0, 351), value=st.integers(0, 255))
def test_a_damaged_header_gives_a_volume_or_a_named_error(
    tmp_path_factory: pytest.TempPathFactory, position: int, value: int
) -> None:
    """No other exception escapes, so one damaged file cannot end a run of thousands without being named."""
    folder = tmp_path_factory.mktemp("damaged")
    content = bytearray(save(folder / "a.nii", np.ones((4, 4, 4))).read_bytes())
    content[position] = value
    path = folder / "b.nii.gz"
    path.write_bytes(gzip.compress(bytes(content)))
    with suppress(VolumeError):
        read_volume(path)


def test_a_blank_volume_is_named(view: VolumeViewConfig) -> None:
    with pytest.raises(VolumeError, match="blank: every voxel is 7"):
        view_frames(volume_of(np.full((64, 64, 4), 7)), view, sizes=SMALL)


def test_a_volume_that_is_nearly_all_background_still_shows_its_content(view: VolumeViewConfig) -> None:
    array = np.zeros((64, 64, 4))
    array[20, 20, 1] = 5
    assert view_frames(volume_of(array), view, sizes=SMALL).frames_T_H_W.max() > 0


def test_frames_run_along_slices_with_rows_along_y_and_columns_along_x(view: VolumeViewConfig) -> None:
    """A bright block at known voxels lights exactly the pixels its place predicts, without any resizing."""
    array = np.zeros((64, 32, 6))
    array[40:48, 8:12, 3] = 100
    frames = view_frames(volume_of(array), replace(view, window_low=0.0, window_high=100.0), sizes=SMALL)
    lit = frames.frames_T_H_W.nonzero()
    assert frames.frames_T_H_W.shape == (6, 32, 64)
    assert lit.min(0).values.tolist() == [3, 8, 40]
    assert lit.max(0).values.tolist() == [3, 11, 47]


@pytest.mark.parametrize("axes", [(0, 1, 2), (1, 2, 0), (2, 1, 0)])
def test_any_order_of_file_axes_shows_the_same_frames(
    view: VolumeViewConfig, axes: tuple[int, int, int]
) -> None:
    array_slice_x_y = np.random.default_rng(0).random((6, 40, 48))
    usual = view_frames(volume_of(array_slice_x_y.transpose(1, 2, 0)), view, sizes=SMALL)
    other = view_frames(
        volume_of(array_slice_x_y.transpose(np.argsort(axes)), (2.0, 2.0, 2.0)), view, *axes, sizes=SMALL
    )
    assert torch.equal(usual.frames_T_H_W, other.frames_T_H_W)
    assert usual.second_per_grid_t == other.second_per_grid_t


def test_axes_that_are_no_permutation_are_refused(view: VolumeViewConfig) -> None:
    with pytest.raises(ViewError, match="slice=2, x=2, y=1"):
        view_frames(volume_of(np.random.rand(64, 64, 4)), view, 2, 2, 1)


def test_the_temporal_step_follows_spacing_stride_and_frame_pairs(view: VolumeViewConfig) -> None:
    frames = view_frames(volume_of(np.random.rand(64, 32, 12)), replace(view, slice_stride=3), sizes=SMALL)
    assert frames.second_per_grid_t == pytest.approx(0.25 * 2.0 * 3 * 2)


def test_an_odd_number_of_frames_is_filled_by_repeating_the_last_slice(view: VolumeViewConfig) -> None:
    frames = view_frames(volume_of(np.random.rand(64, 32, 5)), view, sizes=SMALL).frames_T_H_W
    assert frames.shape[0] == 6
    assert torch.equal(frames[4], frames[5])


def test_shrinking_averages_instead_of_skipping_thin_structures(view: VolumeViewConfig) -> None:
    """Lines of one voxel, every fourth: without antialiasing most of them would vanish or dominate."""
    array = np.zeros((256, 128, 2))
    array[::4] = 100.0
    frames = view_frames(volume_of(array), replace(view, window_low=0.0, window_high=100.0), sizes=SMALL)
    inner = frames.frames_T_H_W[:, 4:-4, 4:-4].float()
    assert inner.std() < 8
    assert inner.mean() == pytest.approx(255 / 4, abs=4)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"height": 40}, r"view\.height is 40, must be a multiple of 16.*nearest: 32"),
        ({"width": 0}, r"view\.width is 0, must be a multiple of 16.*nearest: 16"),
        ({"height": 16 * 65}, r"view\.height 1040 makes 65 tokens of 64 voxels; use at most 1024"),
        ({"slice_stride": 0}, r"view\.slice_stride is 0"),
        ({"crop": [0, 4, 0, 64]}, r"view\.crop has 4 numbers, needs 6"),
        (
            {"crop": [0, 5, 0, 64, 0, 64]},
            r"view\.crop .* leaves the volume of \(slices, x, y\) = \(4, 64, 64\)",
        ),
        ({"crop": [-1, 4, 0, 64, 0, 64]}, r"view\.crop .* leaves the volume"),
        ({"crop": [2, 2, 0, 64, 0, 64]}, r"view\.crop .* is empty"),
        ({"window_low": 99.9, "window_high": 99.5}, r"view\.window_low 99\.9"),
    ],
)
def test_a_view_that_does_not_fit_names_the_setting_and_the_remedy(
    view: VolumeViewConfig, change: dict[str, object], message: str
) -> None:
    with pytest.raises(ViewError, match=message):
        view_frames(volume_of(np.random.rand(64, 64, 4)), replace(view, **change), sizes=SMALL)  # type: ignore[arg-type]


@st.composite
def geometries(draw: st.DrawFn) -> ViewGeometry:
    shape = (draw(st.integers(1, 12)), draw(st.integers(4, 40)), draw(st.integers(4, 40)))
    lows = [draw(st.integers(0, size - 1 if axis == 0 else size - 4)) for axis, size in enumerate(shape)]
    highs = [
        draw(st.integers(low + (1 if axis == 0 else 4), size))
        for axis, (low, size) in enumerate(zip(lows, shape, strict=True))
    ]
    crop = [number for pair in zip(lows, highs, strict=True) for number in pair]
    sizes = PatchSizes(draw(st.sampled_from([2, 3])), draw(st.integers(1, 2)), draw(st.integers(1, 3)))
    side = sizes.pixels_per_token
    return ViewGeometry.of(
        shape,
        VolumeViewConfig(
            crop=crop,
            slice_stride=draw(st.integers(1, 3)),
            height=side * draw(st.integers(1, min(4, highs[2] - lows[2]))),
            width=side * draw(st.integers(1, min(4, highs[1] - lows[1]))),
        ),
        sizes,
    )


@settings(max_examples=60, deadline=None)
@given(geometry=geometries())
def test_tokens_partition_the_crop(geometry: ViewGeometry) -> None:
    """Every voxel of the crop is in exactly one token's box, and that token is the one `token_of_voxel` says."""
    crop = geometry.crop
    owner = np.full((crop.slice_max, crop.x_max, crop.y_max), -1)
    for index in range(geometry.num_tokens):
        box = geometry.voxels_of_token(index)
        region = owner[box.slice_min : box.slice_max, box.x_min : box.x_max, box.y_min : box.y_max]
        assert region.size == box.volume
        assert (region == -1).all()
        region[:] = index
        assert geometry.token_of_voxel(box.slice_min, box.x_min, box.y_min) == index
        assert geometry.token_of_voxel(box.slice_max - 1, box.x_max - 1, box.y_max - 1) == index
    assert (owner[crop.slice_min :, crop.x_min :, crop.y_min :] >= 0).all()
    assert (owner >= 0).sum() == crop.volume


def test_the_full_size_volume_maps_to_15680_tokens() -> None:
    """384 x 384 x 160 voxels at 392 x 392 pixels, Qwen2.5-VL's own patches: 80 x 14 x 14 tokens."""
    geometry = ViewGeometry.of((160, 384, 384), VolumeViewConfig(height=392, width=392), PatchSizes())
    assert geometry.grid_thw == (80, 28, 28)
    assert geometry.token_grid == (80, 14, 14)
    assert geometry.num_tokens == 15_680
    volume = 0
    for index in range(geometry.num_tokens):
        box = geometry.voxels_of_token(index)
        volume += box.volume
        middle = (
            (box.slice_min + box.slice_max) // 2,
            (box.x_min + box.x_max) // 2,
            (box.y_min + box.y_max) // 2,
        )
        assert geometry.token_of_voxel(*middle) == index
    assert volume == 160 * 384 * 384
    assert geometry.voxels_of_token(0).to_text() == [0, 1, 0, 26, 0, 26]
    assert geometry.voxels_of_token(1).to_text() == [0, 1, 27, 54, 0, 26]
    assert geometry.voxels_of_token(14).to_text() == [0, 1, 0, 26, 27, 54]
    assert geometry.voxels_of_token(196).to_text() == [2, 3, 0, 26, 0, 26]
    assert geometry.voxels_of_token(15_679).to_text() == [158, 159, 357, 383, 357, 383]


def test_a_bright_voxel_lights_the_token_that_covers_it(view: VolumeViewConfig) -> None:
    """The mapping and the frames agree: the brightest token-sized cell is the one the mapping names."""
    array = np.zeros((40, 48, 7))
    array[33, 5, 4] = 1000.0
    frames = view_frames(volume_of(array), replace(view, window_low=0.0, window_high=100.0), sizes=SMALL)
    t, h, w = frames.geometry.token_grid
    cells = frames.frames_T_H_W.view(t, 2, h, 16, w, 16).float().sum((1, 3, 5))
    assert int(cells.argmax()) == frames.geometry.token_of_voxel(4, 33, 5)


def test_voxels_outside_the_crop_and_unknown_tokens_are_refused(view: VolumeViewConfig) -> None:
    geometry = ViewGeometry.of((6, 64, 64), replace(view, crop=[1, 5, 0, 64, 0, 64]), SMALL)
    with pytest.raises(ValueError, match=r"slice 0, x 3, y 3"):
        geometry.token_of_voxel(0, 3, 3)
    for index in (-1, geometry.num_tokens):
        with pytest.raises(ValueError, match=f"token {index} is outside"):
            geometry.voxels_of_token(index)


@pytest.mark.parametrize("kind", [np.complex64, np.dtype([("R", "u1"), ("G", "u1"), ("B", "u1")])])
def test_voxels_that_are_no_plain_numbers_are_refused(tmp_path: Path, kind: np.dtype) -> None:
    nibabel.save(nibabel.Nifti1Image(np.zeros((4, 4, 4), kind), np.eye(4)), tmp_path / "odd.nii.gz")
    with pytest.raises(VolumeError, match=r"odd\.nii\.gz holds .* values; save it as plain"):
        read_volume(tmp_path / "odd.nii.gz")
