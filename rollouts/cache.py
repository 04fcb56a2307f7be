"""The embedding cache: every volume goes through the frozen vision tower once.

An entry is one safetensors file named by its key, a hash of the volume's content, the tower's weights and the
preprocessing. Nothing else can be under that name, so entries never go stale: another model, view or file has
another key. A file is written under a temporary name and renamed, so several processes may fill one cache.
"""

from __future__ import annotations

import contextlib
import json
import logging
import time
import uuid
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

import numpy as np
import torch
import xxhash
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as save_tensors

from rewards.errors import ReasonKneeError
from rewards.types import VolumeRef
from rollouts.index import CacheIndex
from rollouts.storage import pack, unpack
from rollouts.types import VolumeFeatures
from rollouts.vision import TowerSpec
from rollouts.volumes import Volume, VolumeView

FORMAT = "reasonknee-embedding-1"
_VIEW_FIELDS = ("crop", "slice_stride", "height", "width", "window_low", "window_high", "seconds_per_mm")
_ABANDONED_SECONDS = 3600.0
"""Age of a temporary file whose process must have died: writing one takes seconds."""
_log = logging.getLogger(__name__)


class CacheError(ReasonKneeError, RuntimeError):
    """The cache cannot be written, or lacks what is asked of it; the message names the folder and the remedy."""


def embedding_recipe(
    spec: TowerSpec,
    view: VolumeView,
    axes: tuple[int, int, int],
    compute_dtype: torch.dtype,
    storage_dtype: torch.dtype,
) -> str:
    """Hash of all that turns a volume into features: tower, view, file axes (slice, x, y), number formats."""
    content = {
        "format": FORMAT,
        "tower": spec.fingerprint,
        "sizes": [spec.sizes.patch, spec.sizes.merge, spec.sizes.temporal],
        "mean": list(spec.normalisation.mean),
        "std": list(spec.normalisation.std),
        "view": {name: _plain(getattr(view, name)) for name in _VIEW_FIELDS},
        "axes": list(axes),
        "dtypes": [str(compute_dtype), str(storage_dtype)],
    }
    return xxhash.xxh3_128_hexdigest(json.dumps(content, sort_keys=True).encode())


def volume_key(volume: Volume, recipe: str) -> str:
    """Cache key: hash of the voxels, their spacing and the recipe. The file's name and place do not matter."""
    digest = xxhash.xxh3_128()
    digest.update(f"{recipe} {volume.array.shape} {volume.spacing_mm}".encode())
    digest.update(np.ascontiguousarray(volume.array).reshape(-1).view(np.uint8).data)
    return digest.hexdigest()


class EmbeddingCache:
    """A folder of embeddings.

    Raises:
        CacheError: the folder cannot be made.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise CacheError(
                f"cache folder {self.folder} cannot be made ({error}); set embed.cache_dir"
            ) from error
        self.index = CacheIndex(self.folder)
        self._verified: dict[str, int] = {}

    def path_of(self, key: str) -> Path:
        """File of an entry, whether it exists or not. Two levels, so that no folder holds too many files."""
        return self.folder / key[:2] / f"{key}.safetensors"

    def get(self, key: str) -> VolumeFeatures | None:
        """Features of a key. None when there is no entry, or only one that cannot be trusted.

        They are memory-mapped, so that they take no memory of this process, unless they are stored in float8: then each
        call makes them anew in bfloat16, which takes 0.1 s of a core and 34 MB for 8,192 tokens of 2,048 numbers.

        An entry is trusted when its format, key and type are right and its checksum is that of its content; the
        checksum is computed once per process and version of the file.
        """
        path = self.path_of(key)
        try:
            modified = path.stat().st_mtime_ns
            with safe_open(path, framework="pt") as handle:
                metadata = handle.metadata() or {}
                stored = {name: handle.get_tensor(name) for name in handle.keys()}  # noqa: SIM118
            features = VolumeFeatures(
                key=metadata["key"],
                embeds_V_H=unpack(stored),
                grid_thw=_grid(metadata["grid_thw"]),
                second_per_grid_t=float(metadata["second_per_grid_t"]),
            )
        except FileNotFoundError:
            return None
        except (SafetensorError, OSError, KeyError, ValueError) as error:
            _log.warning("cache entry %s is corrupted or foreign (%s); it has to be made again", path, error)
            return None
        problem = self._problem(key, features, stored, metadata, modified)
        if problem:
            _log.warning("cache entry %s %s; it has to be made again", path, problem)
            return None
        self._verified[key] = modified
        return features

    def _problem(
        self,
        key: str,
        features: VolumeFeatures,
        stored: Mapping[str, torch.Tensor],
        metadata: Mapping[str, str],
        modified: int,
    ) -> str:
        if metadata.get("format") != FORMAT:
            return f"has format {metadata.get('format')!r}, expected {FORMAT!r}"
        if features.key != key:
            return f"belongs to key {features.key}"
        if self._verified.get(key) != modified and metadata.get("checksum") != _checksum(features, stored):
            return "does not match its checksum"
        return ""

    def put(self, features: VolumeFeatures, storage: torch.dtype | None = None) -> None:
        """Write an entry, replacing one of the same key.

        Args:
            storage: number format on disk, default that of the features.
        Raises:
            CacheError: the disk is full or the folder not writable. What is there already stays as it is.
        """
        path = self.path_of(features.key)
        stored = pack(features.embeds_V_H, storage or features.embeds_V_H.dtype)
        metadata = {
            "format": FORMAT,
            "key": features.key,
            "grid_thw": json.dumps(list(features.grid_thw)),
            "second_per_grid_t": repr(features.second_per_grid_t),
            "checksum": _checksum(features, stored),
        }
        temporary = path.with_name(f".{features.key}.{uuid.uuid4().hex}.tmp")
        try:
            path.parent.mkdir(exist_ok=True)
            temporary.write_bytes(save_tensors(stored, metadata))
            temporary.replace(path)
        except OSError as error:
            raise CacheError(
                f"cannot write {path} ({error.strerror or error}); free space or set embed.cache_dir to another disk, "
                "then run again: finished volumes are kept"
            ) from error
        finally:
            temporary.unlink(missing_ok=True)

    def remove_abandoned(self) -> None:
        """Delete what processes that were killed while they wrote have left; the others' files are younger."""
        for temporary in (*self.folder.glob("*/.*.tmp"), *self.folder.glob(".index.*.tmp")):
            # it may have become an entry, or another process may be first
            with contextlib.suppress(FileNotFoundError):
                if time.time() - temporary.stat().st_mtime > _ABANDONED_SECONDS:
                    temporary.unlink()


class FeatureStore(Mapping[str, VolumeFeatures]):
    """Features by volume id, read from the cache when asked for (memory-mapped, so it holds none itself).

    Raises:
        CacheError: on access, when an entry is missing or corrupted.
    """

    def __init__(self, cache: EmbeddingCache, keys: Mapping[str, str]) -> None:
        self._cache, self._keys = cache, dict(keys)

    def __getitem__(self, volume_id: str) -> VolumeFeatures:
        features = self._cache.get(self._keys[volume_id])
        if features is None:
            raise CacheError(
                f"no usable features of volume {volume_id} in {self._cache.folder} (key {self._keys[volume_id]}); "
                "run `reasonknee embed` again"
            )
        return features

    def __iter__(self) -> Iterator[str]:
        return iter(self._keys)

    def __len__(self) -> int:
        return len(self._keys)


def indexed_keys(volumes: Iterable[VolumeRef], cache: EmbeddingCache, recipe: str) -> dict[str, str]:
    """Keys of those volumes that the index knows under this recipe and whose files have not changed since."""
    entries = cache.index.read(recipe)
    return {
        volume.volume_id: entries[volume.volume_id].key
        for volume in volumes
        if volume.volume_id in entries and entries[volume.volume_id].is_current(volume)
    }


def open_store(volumes: Iterable[VolumeRef], cache: EmbeddingCache, recipe: str) -> FeatureStore:
    """The features of volumes that were embedded before.

    Raises:
        CacheError: some were not, under this model and view.
    """
    wanted = {volume.volume_id: volume for volume in volumes}
    keys = indexed_keys(wanted.values(), cache, recipe)
    missing = [name for name in wanted if name not in keys or not cache.path_of(keys[name]).is_file()]
    if missing:
        raise CacheError(
            f"{len(missing)} of {len(wanted)} volumes are not in {cache.folder} for this model and view "
            f"(first: {missing[0]}); run `reasonknee embed` with the same config"
        )
    return FeatureStore(cache, keys)


def _checksum(features: VolumeFeatures, stored: Mapping[str, torch.Tensor]) -> str:
    digest = xxhash.xxh3_128()
    embeds = stored["embeds_V_H"]
    digest.update(
        f"{embeds.dtype} {tuple(embeds.shape)} {features.grid_thw} {features.second_per_grid_t!r}".encode()
    )
    for _, tensor in sorted(stored.items()):
        digest.update(_bytes_of(tensor))
    return digest.hexdigest()


def _bytes_of(tensor: torch.Tensor) -> memoryview:
    return tensor.contiguous().view(-1).view(torch.uint8).numpy().data


def _grid(text: str) -> tuple[int, int, int]:
    t, h, w = json.loads(text)
    return int(t), int(h), int(w)


def _plain(value: object) -> object:
    """A sequence (an OmegaConf list, a tuple) as a list, 96 and 96.0 alike."""
    if isinstance(value, (int, float)):
        return float(value)
    return [int(item) for item in value] if isinstance(value, Iterable) else value
