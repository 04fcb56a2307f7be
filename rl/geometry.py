"""How many visual tokens a volume becomes, from the model's configuration alone: no weights are loaded."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
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


_TOWER = {
    "depth": 32,
    "hidden_size": 1280,
    "intermediate_size": 3420,
    "num_heads": 16,
    "patch_size": 14,
    "spatial_merge_size": 2,
    "temporal_patch_size": 2,
    "window_size": 112,
    "fullatt_block_indexes": [7, 15, 23, 31],
    "tokens_per_second": 2,
}
PUBLISHED: Mapping[str, dict[str, Any]] = {
    "Qwen/Qwen2.5-VL-3B-Instruct": {
        "hidden_size": 2048,
        "intermediate_size": 11008,
        "num_hidden_layers": 36,
        "num_attention_heads": 16,
        "num_key_value_heads": 2,
        "vocab_size": 151936,
        "tie_word_embeddings": True,
        "vision_config": {**_TOWER, "out_hidden_size": 2048},
    },
    "Qwen/Qwen2.5-VL-7B-Instruct": {
        "hidden_size": 3584,
        "intermediate_size": 18944,
        "num_hidden_layers": 28,
        "num_attention_heads": 28,
        "num_key_value_heads": 4,
        "vocab_size": 152064,
        "tie_word_embeddings": False,
        "vision_config": {**_TOWER, "out_hidden_size": 3584},
    },
}
"""The sizes in the published `config.json` of two models, so that a recipe can be checked and planned before its
weights are downloaded."""


def model_config(model_path: str) -> tuple[dict[str, Any], str] | None:
    """The `config.json` of the model a config names, and where it is from; None for an id that is not known here.

    Raises:
        ConfigError: `builtin:base` without its files, or a `config.json` that cannot be read.
    """
    if model_path in PUBLISHED:
        return PUBLISHED[model_path], model_path
    folder = files("rl") / "assets" / "base" if model_path == "builtin:base" else Path(model_path)
    config_file = folder / "config.json"
    if config_file.is_file():
        try:
            content = json.loads(config_file.read_text(encoding="utf-8"))
        except ValueError as error:
            raise ConfigError(f"model.path: {config_file} is not JSON ({error})") from error
        if not isinstance(content, dict):
            raise ConfigError(f"model.path: {config_file} holds a {type(content).__name__}, not named values")
        return content, str(config_file)
    if model_path == "builtin:base":
        raise ConfigError(
            f"model.path is 'builtin:base' but {config_file} is missing: install the package again"
        )
    return None


def vision_geometry(model_path: str) -> VisionGeometry | None:
    """Geometry of the model a config names; None for a Hugging Face id that is not known here.

    Raises:
        ConfigError: a folder whose `config.json` is no Qwen2.5-VL configuration, or `builtin:base` without its files.
    """
    found = model_config(model_path)
    return None if found is None else _geometry_of(*found)


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


def size_of(content: Mapping[str, Any], name: str, origin: str) -> int:
    """A size from a model's `config.json`.

    Raises:
        KeyError: it is not there.
        ConfigError: it is no size.
    """
    value = content[name]
    if type(value) is not int or value < 1:
        raise ConfigError(f"model.path: {origin}: {name} is {value!r}; a whole number above 0 is needed")
    return value


def _geometry_of(model_config: dict[str, Any], origin: str) -> VisionGeometry:
    vision = model_config.get("vision_config") or {}
    missing = {"patch_size", "spatial_merge_size", "temporal_patch_size", "out_hidden_size"} - set(vision)
    if missing:
        raise ConfigError(
            f"model.path: {origin} is no Qwen2.5-VL configuration: "
            f"vision_config lacks {', '.join(sorted(missing))}"
        )
    if vision.get("deepstack_visual_indexes"):
        raise ConfigError(
            f"model.path: {origin} is of a model that adds visual features in further layers (Qwen3-VL does), which "
            "cannot be trained here; set model.path to a Qwen2.5-VL"
        )
    return VisionGeometry(
        patch_size=size_of(vision, "patch_size", origin),
        merge_size=size_of(vision, "spatial_merge_size", origin),
        temporal_patch_size=size_of(vision, "temporal_patch_size", origin),
        hidden_size=size_of(vision, "out_hidden_size", origin),
        tokens_per_second=vision.get("tokens_per_second", 2.0),
    )
