"""The frozen vision tower: frames to patches, as Qwen2.5-VL's video processor cuts them, and patches to embeddings.

Frames attend only within their temporal patch (Qwen2.5-VL, arXiv 2502.13923, section 2.1.1), so a volume, or
several of them, can be run in pieces along time without changing a single embedding.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import xxhash
from safetensors import safe_open
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VisionTransformerPretrainedModel

from rewards.errors import ReasonKneeError
from rollouts.volumes import FramesView, PatchSizes

# Of OpenAI's CLIP, which Qwen2.5-VL keeps; used where a checkpoint has no preprocessor file.
CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)

_PREPROCESSOR_FILES = ("video_preprocessor_config.json", "processor_config.json", "preprocessor_config.json")
_VISION_FIELDS = (
    "depth",
    "hidden_size",
    "hidden_act",
    "intermediate_size",
    "num_heads",
    "in_channels",
    "patch_size",
    "spatial_merge_size",
    "temporal_patch_size",
    "window_size",
    "out_hidden_size",
    "fullatt_block_indexes",
    "rope_parameters",
)
"""What of a vision config changes the embeddings; the rest (versions, storage type) must not change the key."""


class TowerError(ReasonKneeError, ValueError):
    """A model folder without a usable vision tower; the message names the folder and the remedy."""


@dataclass(frozen=True)
class Normalisation:
    """Per-channel mean and standard deviation of pixel values in [0, 1]."""

    mean: tuple[float, ...] = CLIP_MEAN
    std: tuple[float, ...] = CLIP_STD

    @classmethod
    def of_folder(cls, folder: Path) -> Normalisation:
        """From the model's preprocessor file, CLIP's where there is none."""
        for name in _PREPROCESSOR_FILES:
            if (folder / name).is_file():
                settings = json.loads((folder / name).read_text(encoding="utf-8"))
                settings = settings.get("video_processor", settings)  # nested in processor_config.json
                return cls(
                    tuple(settings.get("image_mean", CLIP_MEAN)), tuple(settings.get("image_std", CLIP_STD))
                )
        return cls()


def patchify(
    frames_T_H_W: torch.Tensor, sizes: PatchSizes, normalisation: Normalisation
) -> tuple[torch.Tensor, tuple[int, int, int]]:
    """Normalised patches in the order Qwen2.5-VL's tower reads them.

    Args:
        frames_T_H_W: uint8 grey frames, T a multiple of the temporal patch, H and W of a token's side. The grey value
            is repeated on three channels.
    Returns:
        `pixel_values_videos` float32 [t*h*w, 3 * temporal * patch * patch] and `grid_thw` (t, h, w). The patches
        of one merged token follow each other.
    """
    frames, height, width = frames_T_H_W.shape
    p, m, tp = sizes.patch, sizes.merge, sizes.temporal
    if frames % tp or height % (p * m) or width % (p * m):
        raise ValueError(f"frames {tuple(frames_T_H_W.shape)} are not multiples of ({tp}, {p * m}, {p * m})")
    # x/255 and normalisation as one step, in the processor's order of operations, hence bit-equal to it
    scale = 1.0 / (1 / 255)
    shape = (-1, 1, 1)
    mean = (torch.tensor(normalisation.mean) * scale).view(shape).to(frames_T_H_W.device)
    std = (torch.tensor(normalisation.std) * scale).view(shape).to(frames_T_H_W.device)
    pixels_T_C_H_W = (frames_T_H_W.to(torch.float32)[:, None] - mean) / std
    t, h, w = frames // tp, height // p, width // p
    cells = pixels_T_C_H_W.view(t, tp, 3, h // m, m, p, w // m, m, p)
    patches = cells.permute(0, 3, 6, 4, 7, 2, 1, 5, 8).reshape(t * h * w, 3 * tp * p * p)
    return patches, (t, h, w)


@dataclass(frozen=True)
class TowerSpec:
    """What must be known of a tower to find its embeddings in a cache, without loading it."""

    fingerprint: str
    """See `tower_fingerprint`."""
    sizes: PatchSizes
    normalisation: Normalisation
    hidden_size: int
    """Width of the embeddings: the language model's hidden size."""

    @classmethod
    def of_folder(cls, path: str | Path) -> TowerSpec:
        """Of a checkpoint folder; reads the tower's weights once, for the fingerprint.

        Raises:
            TowerError: the folder has no Qwen2.5-VL tower in safetensors.
        """
        folder = Path(path)
        return cls._of(_vision_config(folder), tower_fingerprint(folder), Normalisation.of_folder(folder))

    @classmethod
    def _of(cls, config: Any, fingerprint: str, normalisation: Normalisation) -> TowerSpec:
        sizes = PatchSizes(config.patch_size, config.spatial_merge_size, config.temporal_patch_size)
        return cls(fingerprint, sizes, normalisation, config.out_hidden_size)


class VisionTower:
    """A Qwen2.5-VL vision tower, frozen.

    Args:
        model_or_path: a loaded model (its tower is used as it is), or a checkpoint folder, of which only the
            tower's weights are read.
        max_patches: patches in one forward; bounds memory, does not change the embeddings.
    Raises:
        TowerError: the folder has no Qwen2.5-VL tower in safetensors, or its tensors do not fit its config.
    """

    def __init__(
        self,
        model_or_path: Qwen2_5_VLForConditionalGeneration | str | Path,
        device: str | torch.device = "cpu",
        dtype: torch.dtype = torch.float32,
        *,
        max_patches: int = 16384,
    ) -> None:
        if isinstance(model_or_path, (str, Path)):
            folder = Path(model_or_path)
            config = _vision_config(folder)
            tensors = dict(_visual_tensors(folder))
            self.visual = _build(folder, config, tensors, dtype)
            normalisation = Normalisation.of_folder(folder)
        else:
            self.visual = model_or_path.model.visual
            config = model_or_path.config.vision_config
            tensors = self.visual.state_dict()
            normalisation = Normalisation()
        self.spec = TowerSpec._of(config, _fingerprint(tensors.items(), config), normalisation)
        self.visual.to(device=device, dtype=dtype).eval().requires_grad_(False)
        self.device, self.dtype, self.max_patches = torch.device(device), dtype, max_patches

    def encode(self, view: FramesView) -> tuple[torch.Tensor, tuple[int, int, int]]:
        """Embeddings of one volume, [V, hidden] on the CPU, and its `grid_thw`."""
        return self.encode_batch([view])[0]

    def encode_batch(self, views: Sequence[FramesView]) -> list[tuple[torch.Tensor, tuple[int, int, int]]]:
        """Embeddings of several volumes that share height and width, [V, hidden] on the CPU and `grid_thw` each."""
        grids = [view.geometry.grid_thw for view in views]
        for view in views:
            if view.geometry.sizes != self.spec.sizes:
                raise ValueError(
                    f"frames were cut for {view.geometry.sizes}, the tower reads {self.spec.sizes}"
                )
            if view.geometry.grid_thw[1:] != grids[0][1:]:
                raise ValueError(f"views of one batch differ in height or width: {grids}")
        frames_T_H_W = torch.cat([view.frames_T_H_W for view in views])
        patches_per_step = grids[0][1] * grids[0][2]
        frames_at_once = max(1, self.max_patches // patches_per_step) * self.spec.sizes.temporal
        pieces = [self._forward(chunk) for chunk in frames_T_H_W.split(frames_at_once)]
        tokens = [t * h * w // self.spec.sizes.merge**2 for t, h, w in grids]
        # clones, so that keeping one volume does not keep the batch, and that autograd may save them (tensors made in
        # inference mode it may not)
        embeds = [part.clone() for part in torch.cat(pieces).split(tokens)]
        return list(zip(embeds, grids, strict=True))

    @torch.inference_mode()
    def _forward(self, frames_T_H_W: torch.Tensor) -> torch.Tensor:
        patches, grid = patchify(frames_T_H_W.to(self.device), self.spec.sizes, self.spec.normalisation)
        grid_thw = torch.tensor([grid], device=self.device)
        return self.visual(patches.to(self.dtype), grid_thw=grid_thw).pooler_output.cpu()


def tower_fingerprint(path: str | Path) -> str:
    """Hash of the vision tensors (name, type, shape, bytes) and of the vision config of a checkpoint folder.

    Raises:
        TowerError: the folder has no Qwen2.5-VL tower in safetensors.
    """
    folder = Path(path)
    return _fingerprint(_visual_tensors(folder), _vision_config(folder))


def _fingerprint(tensors: Iterable[tuple[str, torch.Tensor]], config: Any) -> str:
    digest = xxhash.xxh3_128()
    digest.update(
        json.dumps({name: getattr(config, name) for name in _VISION_FIELDS}, sort_keys=True).encode()
    )
    # hashed one by one and sorted by name, because shards come in any order
    parts = sorted(f"{name} {t.dtype} {tuple(t.shape)} {_tensor_hash(t)}" for name, t in tensors)
    digest.update("\n".join(parts).encode())
    return digest.hexdigest()


def _tensor_hash(tensor: torch.Tensor) -> str:
    flat = tensor.detach().cpu().contiguous().view(-1).view(torch.uint8)
    return xxhash.xxh3_128_hexdigest(flat.numpy().data)


def _vision_config(folder: Path) -> Any:
    path = folder / "config.json"
    if not path.is_file():
        raise TowerError(f"{folder} has no config.json; model.path must be a Qwen2.5-VL checkpoint folder")
    model_type = json.loads(path.read_text(encoding="utf-8")).get("model_type")
    if model_type != "qwen2_5_vl":
        raise TowerError(f"{path} says model_type {model_type!r}, expected 'qwen2_5_vl'")
    return Qwen2_5_VLConfig.from_pretrained(folder).vision_config


def _visual_tensors(folder: Path) -> Iterable[tuple[str, torch.Tensor]]:
    """Tensors of the tower under their names inside it, read lazily from the shards that hold them."""
    found = False
    for shard in sorted(folder.glob("*.safetensors")):
        with safe_open(shard, framework="pt") as handle:
            for name in handle.keys():  # noqa: SIM118 (a handle is not iterable)
                # "visual." in published checkpoints, "model.visual." in some that were saved again
                if name.startswith(("visual.", "model.visual.")):
                    found = True
                    yield name.split("visual.", 1)[1], handle.get_tensor(name)
    if not found:
        raise TowerError(
            f"{folder} has no safetensors file with tensors named visual.*; download the checkpoint again"
        )


def _build(
    folder: Path, config: Any, tensors: Mapping[str, torch.Tensor], dtype: torch.dtype
) -> Qwen2_5_VisionTransformerPretrainedModel:
    # wrong shapes are reported like missing and unexpected tensors, so that all of them are refused by name below
    visual, loading = Qwen2_5_VisionTransformerPretrainedModel.from_pretrained(
        None,
        config=config,
        state_dict=dict(tensors),
        dtype=dtype,
        output_loading_info=True,
        ignore_mismatched_sizes=True,
    )
    faults = {name: sorted(map(str, keys)) for name, keys in loading.items() if keys}
    if faults:
        raise TowerError(f"the vision tensors of {folder} do not fit its config: {faults}")
    return visual
