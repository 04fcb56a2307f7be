"""How many visual tokens a volume becomes, from the model's configuration alone: no weights are loaded."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

from rl.config import Config, ConfigError


@dataclass(frozen=True, slots=True)
class VisionGeometry:
    """What the vision tower makes of pixels."""

    patch_size: int
    merge_size: int
    temporal_patch_size: int
    hidden_size: int
    """Width of a visual token as the language model receives it."""
    tokens_per_second: float

    @property
    def pixels_per_token(self) -> int:
        """Edge of the square of pixels behind one visual token."""
        return self.patch_size * self.merge_size


QWEN2_5_VL = {
    "Qwen/Qwen2.5-VL-3B-Instruct": VisionGeometry(14, 2, 2, 2048, 2.0),
    "Qwen/Qwen2.5-VL-7B-Instruct": VisionGeometry(14, 2, 2, 3584, 2.0),
}
"""Known here so that a recipe can be checked before its weights are downloaded."""


def vision_geometry(model_path: str) -> VisionGeometry | None:
    """Geometry of the model a config names; None for a Hugging Face id that is not known here.

    Raises:
        ConfigError: a folder whose `config.json` is no Qwen2.5-VL configuration, or `builtin:base` without its files.
    """
    if model_path in QWEN2_5_VL:
        return QWEN2_5_VL[model_path]
    if model_path == "builtin:base":
        packaged = files("rl") / "assets" / "base" / "config.json"
        if not packaged.is_file():
            raise ConfigError(
                f"model.path is 'builtin:base' but {packaged} is missing: install the package again"
            )
        return _geometry_of(json.loads(packaged.read_text(encoding="utf-8")), model_path)
    config_file = Path(model_path) / "config.json"
    if config_file.is_file():
        return _geometry_of(json.loads(config_file.read_text(encoding="utf-8")), str(config_file))
    return None


def visual_grid(config: Config, geometry: VisionGeometry, slices: int | None = None) -> tuple[int, int, int]:
    """Visual tokens along (slices, rows, columns) that one volume becomes.

    Args:
        slices: slices of the volume's file; by default those of `view.crop`, else of `phantom.shape`.
    """
    view = config.view
    if view.crop:
        slices = view.crop[1] - view.crop[0]
    elif slices is None:
        slices = config.phantom.shape[2]
    frames = math.ceil(math.ceil(slices / view.slice_stride) / geometry.temporal_patch_size)
    return frames, view.height // geometry.pixels_per_token, view.width // geometry.pixels_per_token


def cache_bytes(config: Config, geometry: VisionGeometry, volumes: int, bytes_per_number: int = 2) -> int:
    """Size of the embedding cache: tokens x hidden size x bytes x volumes."""
    return math.prod(visual_grid(config, geometry)) * geometry.hidden_size * bytes_per_number * volumes


def _geometry_of(model_config: dict[str, Any], origin: str) -> VisionGeometry:
    vision = model_config.get("vision_config", {})
    missing = {"patch_size", "spatial_merge_size", "temporal_patch_size", "out_hidden_size"} - set(vision)
    if missing:
        raise ConfigError(
            f"model.path: {origin} is no Qwen2.5-VL configuration: "
            f"vision_config lacks {', '.join(sorted(missing))}"
        )
    return VisionGeometry(
        patch_size=vision["patch_size"],
        merge_size=vision["spatial_merge_size"],
        temporal_patch_size=vision["temporal_patch_size"],
        hidden_size=vision["out_hidden_size"],
        tokens_per_second=vision.get("tokens_per_second", 2.0),
    )
