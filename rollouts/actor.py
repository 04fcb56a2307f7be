"""One engine in a Ray actor: what travels to it, and what it answers. `rollouts.pool` holds several."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import ray
import torch

from rollouts.board import Adapter
from rollouts.types import Engine, Prompt, Rollout, Sampling, VolumeFeatures


@dataclass(frozen=True)
class EngineLocation:
    """Where an engine runs; a training worker looks for the engine on its own GPU with it."""

    node_id: str
    gpu_ids: tuple[int, ...]


@dataclass(frozen=True)
class PackedFeatures:
    """Features as bytes in a numpy array: Ray shares these between processes without copying, bfloat16 too."""

    data: np.ndarray
    dtype: torch.dtype
    shape: tuple[int, ...]
    key: str
    grid_thw: tuple[int, int, int]
    second_per_grid_t: float


@dataclass(frozen=True)
class PromptOnWire:
    """A prompt without its features: `volume` is the position of its features among the request's."""

    example_id: str
    volume: int
    volume_ids: tuple[int, ...]
    question_ids: tuple[int, ...]


@dataclass(frozen=True)
class Request:
    """Prompts for one engine. `seeds[i]` is the seed of question i's group."""

    questions: tuple[PromptOnWire, ...]
    n: int
    sampling: Sampling
    seeds: tuple[int, ...]
    adapter: Adapter


class EngineActor:
    """One engine in a process of its own. The engine is built by `start`, so that its errors come back whole."""

    def __init__(self, factory: Callable[[], Engine]) -> None:
        self._factory = factory
        self._engine: Engine | None = None
        self._adapter = Adapter(version=0, folder=None)

    def start(self) -> EngineLocation:
        """Build the engine unless that is done. Returns where it runs."""
        if self._engine is None:
            self._engine = self._factory()
        context = ray.get_runtime_context()
        return EngineLocation(context.get_node_id(), tuple(int(gpu) for gpu in ray.get_gpu_ids()))

    def serve(self, adapter: Adapter) -> int:
        """Serve this adapter from now on. Returns the version, as the acknowledgement."""
        self.start()
        assert self._engine is not None
        if adapter.version != self._adapter.version:
            self._engine.load_adapter(Path(adapter.folder) if adapter.folder is not None else None)
            self._adapter = adapter
        return self._adapter.version

    def generate(self, request: Request, *packed: PackedFeatures) -> list[tuple[Rollout, ...]]:
        """The rollouts of each question. `packed` holds the features of each volume once."""
        version = self.serve(request.adapter)
        assert self._engine is not None
        features = [unpack(volume) for volume in packed]
        prompts = [
            Prompt(q.example_id, features[q.volume], q.volume_ids, q.question_ids) for q in request.questions
        ]
        groups = self._engine.generate(prompts, request.n, request.sampling, list(request.seeds))
        # The engine counts its own adapters; rollouts carry the version that the whole pool agrees on.
        return [tuple(replace(rollout, adapter_version=version) for rollout in g.rollouts) for g in groups]


def pack(features: VolumeFeatures) -> PackedFeatures:
    embeds = features.embeds_V_H.detach().cpu().contiguous()
    data = embeds.view(-1).view(torch.uint8).numpy()  # flat: `NO_PICTURE` has no rows to be seen as bytes
    return PackedFeatures(
        data, embeds.dtype, tuple(embeds.shape), features.key, features.grid_thw, features.second_per_grid_t
    )


def unpack(packed: PackedFeatures) -> VolumeFeatures:
    embeds = torch.empty(packed.shape, dtype=packed.dtype)
    if packed.data.size:
        with warnings.catch_warnings():  # the object store's memory is read-only; nothing writes to features
            warnings.filterwarnings("ignore", "The given buffer is not writable")
            embeds = torch.frombuffer(packed.data, dtype=packed.dtype).view(packed.shape)
    return VolumeFeatures(packed.key, embeds, packed.grid_thw, packed.second_per_grid_t)
