"""Patches are those of Qwen2.5-VL's own video processor, and embeddings those of the whole model."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import Qwen2_5_VLForConditionalGeneration, Qwen2VLVideoProcessor

from rewards.types import VolumeRef
from rl.config import VolumeViewConfig
from rollouts.vision import Normalisation, TowerError, TowerSpec, VisionTower, patchify, tower_fingerprint
from rollouts.volumes import FramesView, PatchSizes, read_volume, view_frames


@pytest.fixture(scope="module")
def model(base_folder: Path) -> Qwen2_5_VLForConditionalGeneration:
    return Qwen2_5_VLForConditionalGeneration.from_pretrained(base_folder, dtype=torch.float32)


@pytest.fixture(scope="module")
def tower(base_folder: Path) -> VisionTower:
    return VisionTower(base_folder)


@pytest.fixture
def frames(make_volume: Callable[..., VolumeRef], view: VolumeViewConfig, tower: VisionTower) -> FramesView:
    return view_frames(read_volume(make_volume("a").image_path), view, sizes=tower.spec.sizes)


@pytest.mark.parametrize(
    ("shape", "sizes"),
    [((4, 56, 84), PatchSizes()), ((6, 32, 48), PatchSizes(8, 2, 2)), ((2, 27, 18), PatchSizes(3, 3, 2))],
)
def test_patches_equal_those_of_the_video_processor_bit_for_bit(
    shape: tuple[int, int, int], sizes: PatchSizes
) -> None:
    frames = torch.from_numpy(np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8))
    processor = Qwen2VLVideoProcessor(
        patch_size=sizes.patch, merge_size=sizes.merge, temporal_patch_size=sizes.temporal
    )
    colour = frames[:, None].repeat(1, 3, 1, 1)
    expected = processor([colour], do_resize=False, do_sample_frames=False, return_tensors="pt")
    patches, grid = patchify(
        frames, sizes, Normalisation(tuple(processor.image_mean), tuple(processor.image_std))
    )
    assert torch.equal(patches, expected["pixel_values_videos"])
    assert [list(grid)] == expected["video_grid_thw"].tolist()


def test_frames_that_do_not_divide_into_patches_are_refused() -> None:
    with pytest.raises(ValueError, match=r"not multiples of \(2, 28, 28\)"):
        patchify(torch.zeros(3, 28, 28, dtype=torch.uint8), PatchSizes(), Normalisation())


def test_embeddings_are_those_of_the_whole_model(
    model: Qwen2_5_VLForConditionalGeneration, tower: VisionTower, frames: FramesView
) -> None:
    embeds, grid = tower.encode(frames)
    patches, _ = patchify(frames.frames_T_H_W, tower.spec.sizes, tower.spec.normalisation)
    with torch.no_grad():
        expected = model.model.get_video_features(patches, torch.tensor([grid])).pooler_output[0]
    assert embeds.shape == (frames.geometry.num_tokens, tower.spec.hidden_size)
    assert grid == frames.geometry.grid_thw
    torch.testing.assert_close(embeds, expected)


def test_encoding_in_pieces_or_in_batches_changes_nothing(base_folder: Path, frames: FramesView) -> None:
    """Memory is bounded by cutting along time, which is exact as frames do not attend to each other."""
    whole, _ = VisionTower(base_folder).encode(frames)
    pieces, _ = VisionTower(base_folder, max_patches=1).encode(frames)
    first, second = VisionTower(base_folder).encode_batch([frames, frames])
    for embeds in (pieces, first[0], second[0]):
        torch.testing.assert_close(embeds, whole, atol=1e-5, rtol=1e-5)


def test_token_order_follows_the_geometry(tower: VisionTower, frames: FramesView) -> None:
    """Changing the pixels of one time step changes the embeddings of that step's tokens and of no others."""
    t, h, w = frames.geometry.token_grid
    before, _ = tower.encode(frames)
    changed = frames.frames_T_H_W.clone()
    changed[2:4] = 255 - changed[2:4]
    after, _ = tower.encode(FramesView(changed, frames.second_per_grid_t, frames.geometry))
    moved = ((after - before).abs().amax(-1) > 1e-6).view(t, h * w)
    assert moved[1].all()
    assert not moved[0].any()
    assert not moved[2:].any()


def test_the_tower_is_frozen_and_its_embeddings_may_enter_autograd(
    tower: VisionTower, frames: FramesView
) -> None:
    assert not any(parameter.requires_grad for parameter in tower.visual.parameters())
    embeds, _ = tower.encode(frames)
    weight = torch.ones(embeds.shape[1], requires_grad=True)
    (embeds @ weight).sum().backward()
    assert weight.grad is not None


def test_frames_cut_for_another_tower_are_refused(
    tower: VisionTower, make_volume: Callable[..., VolumeRef], view: VolumeViewConfig
) -> None:
    other = view_frames(read_volume(make_volume("a").image_path), view, sizes=PatchSizes(4, 2, 2))
    with pytest.raises(ValueError, match="frames were cut for"):
        tower.encode(other)


def test_a_fingerprint_depends_on_the_vision_weights_only(
    base_folder: Path, model: Qwen2_5_VLForConditionalGeneration, tmp_path: Path
) -> None:
    fingerprint = tower_fingerprint(base_folder)
    assert VisionTower(base_folder).spec == TowerSpec.of_folder(base_folder)
    assert VisionTower(model).spec.fingerprint == TowerSpec.of_folder(base_folder).fingerprint == fingerprint
    for prefix, changes in (("visual", True), ("model", False)):
        folder = shutil.copytree(base_folder, tmp_path / prefix)
        tensors = load_file(folder / "model.safetensors")
        name = next(name for name in tensors if name.startswith(prefix))
        tensors[name] = tensors[name] + 1
        save_file(tensors, folder / "model.safetensors")
        assert (tower_fingerprint(folder) != fingerprint) == changes


def test_tensors_saved_under_the_other_prefix_or_in_shards_give_the_same_tower(
    base_folder: Path, tmp_path: Path
) -> None:
    folder = shutil.copytree(base_folder, tmp_path / "sharded")
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names = sorted(tensors)
    for part in (0, 1):
        shard = {name.replace("visual.", "model.visual."): tensors[name] for name in names[part::2]}
        save_file(shard, folder / f"model-0000{part}-of-00002.safetensors")
    assert tower_fingerprint(folder) == tower_fingerprint(base_folder)
    assert VisionTower(folder).spec == VisionTower(base_folder).spec


@pytest.mark.parametrize("fault", ["missing", "unexpected", "shape"])
def test_vision_tensors_that_do_not_fit_the_config_are_named(
    base_folder: Path, tmp_path: Path, fault: str
) -> None:
    folder = shutil.copytree(base_folder, tmp_path / "faulty")
    tensors = load_file(folder / "model.safetensors")
    name = "visual.blocks.0.attn.proj.bias"
    if fault == "missing":
        del tensors[name]
    elif fault == "unexpected":
        tensors["visual.blocks.9.attn.proj.bias"] = tensors[name].clone()
    else:
        tensors[name] = tensors[name][:-1].clone()
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(TowerError, match=r"faulty.*attn\.proj\.bias"):
        VisionTower(folder)


def test_a_folder_without_a_tower_is_named(base_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(TowerError, match=r"no config\.json"):
        tower_fingerprint(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama"}))
    with pytest.raises(TowerError, match="model_type 'llama'"):
        tower_fingerprint(tmp_path)
    shutil.copy(base_folder / "config.json", tmp_path)
    with pytest.raises(TowerError, match="no safetensors file"):
        tower_fingerprint(tmp_path)


def test_normalisation_comes_from_the_checkpoint(base_folder: Path, tmp_path: Path) -> None:
    assert Normalisation.of_folder(base_folder) == Normalisation()
    assert Normalisation.of_folder(tmp_path) == Normalisation()
    mean = {"image_mean": [0.5, 0.5, 0.5], "image_std": [1.0, 1.0, 1.0]}
    (tmp_path / "processor_config.json").write_text(json.dumps({"video_processor": mean}))
    assert Normalisation.of_folder(tmp_path) == Normalisation((0.5, 0.5, 0.5), (1.0, 1.0, 1.0))
