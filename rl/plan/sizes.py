"""The sizes of a Qwen2.5-VL that decide what it costs, from its `config.json`."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

from rl.config import ConfigError, LoraConfig
from rl.geometry import PUBLISHED, VisionGeometry, model_config, size_of, vision_geometry

UNREAD = ("q_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
"""The linear layers that the last decoder layer computes for tokens only from which something is predicted."""


@dataclass(frozen=True, slots=True)
class Language:
    """The decoder."""

    layers: int
    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    vocabulary: int
    tied: bool
    """Whether the output layer is the embedding table."""

    @property
    def head_size(self) -> int:
        return self.hidden // self.heads

    @property
    def projections(self) -> dict[str, tuple[int, int]]:
        """Input and output width of each linear layer of a decoder layer, by the names LoRA goes by."""
        h, i, kv = self.hidden, self.intermediate, self.kv_heads * self.head_size
        return {
            "q_proj": (h, h),
            "k_proj": (h, kv),
            "v_proj": (h, kv),
            "o_proj": (h, h),
            "gate_proj": (h, i),
            "up_proj": (h, i),
            "down_proj": (i, h),
        }

    @property
    def layer_weights(self) -> int:
        """Weights of a decoder layer that a token is multiplied with."""
        return sum(rows * columns for rows, columns in self.projections.values())

    @property
    def unread_weights(self) -> int:
        """Those among them that the last layer has no use for where nothing is predicted."""
        return sum(rows * columns for name, (rows, columns) in self.projections.items() if name in UNREAD)

    @property
    def parameters(self) -> int:
        """All of them: embeddings, biases and norms too."""
        biases = self.hidden + 2 * self.kv_heads * self.head_size
        tables = (1 if self.tied else 2) * self.vocabulary * self.hidden
        return self.layers * (self.layer_weights + biases + 2 * self.hidden) + self.hidden + tables

    def adapted(self, lora: LoraConfig) -> dict[str, tuple[int, int]]:
        """The projections that have an adapter."""
        return {name: shape for name, shape in self.projections.items() if name in lora.target_modules}

    def lora_weights(self, lora: LoraConfig, projections: Collection[str] | None = None) -> int:
        """Weights of the adapter of one decoder layer; of some of its projections."""
        return sum(
            lora.r * (rows + columns)
            for name, (rows, columns) in self.adapted(lora).items()
            if projections is None or name in projections
        )


@dataclass(frozen=True, slots=True)
class Vision:
    """The vision tower."""

    depth: int
    hidden: int
    intermediate: int
    window: int
    """Edge of an attention window in visual tokens."""
    full_blocks: int
    """Blocks whose attention spans the whole frame."""
    geometry: VisionGeometry

    @property
    def patch_weights(self) -> int:
        """Weights a patch is multiplied with, the merger left out."""
        pixels = 3 * self.geometry.temporal_patch_size * self.geometry.patch_size**2
        return self.hidden * pixels + self.depth * (4 * self.hidden**2 + 3 * self.hidden * self.intermediate)

    @property
    def merger_weights(self) -> int:
        """Weights a visual token is multiplied with at the end."""
        merged = self.hidden * self.geometry.merge_size**2
        return merged**2 + merged * self.geometry.hidden_size

    @property
    def parameters(self) -> int:
        """All of them."""
        merged = self.hidden * self.geometry.merge_size**2
        biases_and_norms = (
            3 * self.hidden + self.hidden + 2 * self.intermediate + self.hidden + 2 * self.hidden
        )
        rest = self.hidden + merged + self.geometry.hidden_size
        return self.patch_weights + self.merger_weights + self.depth * biases_and_norms + rest


@dataclass(frozen=True, slots=True)
class ModelSizes:
    """Both parts."""

    language: Language
    vision: Vision


def model_sizes(model_path: str) -> ModelSizes:
    """Sizes of the model a config names.

    Raises:
        ConfigError: an id that is neither a folder nor published here, or a `config.json` that lacks a size or
            cannot be read.
    """
    found, geometry = model_config(model_path), vision_geometry(model_path)
    if found is None or geometry is None:
        raise ConfigError(
            f"model.path is {model_path!r}: its sizes are not known here; download it and name its folder, or use one "
            f"of {', '.join(PUBLISHED)}"
        )
    content, origin = found
    text: dict[str, Any] = content.get("text_config", content)  # the published files keep these at the top
    tower = content["vision_config"]
    try:
        language = Language(
            layers=size_of(text, "num_hidden_layers", origin),
            hidden=size_of(text, "hidden_size", origin),
            intermediate=size_of(text, "intermediate_size", origin),
            heads=size_of(text, "num_attention_heads", origin),
            kv_heads=size_of(text, "num_key_value_heads", origin),
            vocabulary=size_of(text, "vocab_size", origin),
            tied=content.get("tie_word_embeddings", text.get("tie_word_embeddings", False)),
        )
        vision = Vision(
            depth=size_of(tower, "depth", origin),
            hidden=size_of(tower, "hidden_size", origin),
            intermediate=size_of(tower, "intermediate_size", origin),
            window=size_of(tower, "window_size", origin) // geometry.pixels_per_token,
            full_blocks=len(tower["fullatt_block_indexes"]),
            geometry=geometry,
        )
    except KeyError as error:
        raise ConfigError(
            f"model.path: {origin} lacks {error.args[0]}, without which nothing can be planned"
        ) from None
    return ModelSizes(language, vision)
