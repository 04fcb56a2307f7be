"""Fill the embedding cache: read volumes ahead in threads, encode them in batches, write each as it is done."""

from __future__ import annotations

import random
import shutil
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace

import torch

from rewards.errors import ReasonKneeError
from rewards.types import VolumeRef
from rollouts.cache import CacheError, EmbeddingCache, embedding_recipe, indexed_keys, volume_key
from rollouts.features import FeatureError, validate_features
from rollouts.index import IndexEntry
from rollouts.storage import as_read, bytes_per_token, dtype_in_memory, room_remedy
from rollouts.types import VolumeFeatures
from rollouts.vision import VisionTower
from rollouts.volumes import (
    FramesView,
    ViewError,
    ViewGeometry,
    VolumeError,
    VolumeView,
    read_volume,
    require_file,
    view_frames,
)

Progress = Callable[[int, int], None]
"""Called with (volumes done, volumes in all)."""

_SECONDS_BETWEEN_INDEX_WRITES = 10.0


class EmbedError(ReasonKneeError, RuntimeError):
    """Some volumes could not be embedded; all others are in the cache. The message lists them with the reason."""


@dataclass(frozen=True)
class _Loaded:
    volume: VolumeRef
    entry: IndexEntry
    view: FramesView | None
    """None when the cache has the features already."""


def embed_examples(
    volumes: Iterable[VolumeRef],
    tower: VisionTower,
    cache: EmbeddingCache,
    view: VolumeView,
    *,
    axes: tuple[int, int, int] = (2, 0, 1),
    storage_dtype: torch.dtype | None = None,
    progress: Progress | None = None,
    log: Callable[[str], None] = print,
) -> dict[str, str]:
    """Put the features of all volumes in the cache; those that are there already are checked and kept.

    A volume that cannot be read does not stop the others: it is named in the error at the end. Several processes may
    fill one cache: each reads the volumes in a random order, and does not encode what another has written meanwhile.

    Args:
        volumes: repeated ids are embedded once.
        axes: file axes of (slice, x, y).
        storage_dtype: of the features on disk, default the tower's.
    Returns:
        Volume id -> cache key.
    Raises:
        ViewError: the view does not fit a volume or the tower (before anything is computed).
        CacheError: the disk is too small (before anything is computed) or full.
        EmbedError: some volumes could not be read or encoded.
    """
    wanted = {volume.volume_id: volume for volume in volumes}
    storage = storage_dtype or tower.dtype
    recipe = embedding_recipe(tower.spec, view, axes, tower.dtype, storage)
    keys = {
        name: key
        for name, key in indexed_keys(wanted.values(), cache, recipe).items()
        if cache.get(key) is not None
    }
    remaining = [volume for name, volume in wanted.items() if name not in keys]
    random.shuffle(remaining)
    cache.remove_abandoned()
    volumes_at_once = _announce(wanted, remaining, tower, cache, view, storage, log)

    job = _Job(tower, cache, view, axes, storage, recipe, log)
    faults: list[str] = []
    started = indexed = time.monotonic()
    if progress is not None:
        progress(len(keys), len(wanted))
    try:
        for batch in _batches(job.load_ahead(remaining, faults), volumes_at_once):
            keys.update(job.encode(batch, faults))
            done = len(keys) + len(faults)
            if progress is not None:
                progress(done, len(wanted))
            now = time.monotonic()
            if now - indexed >= _SECONDS_BETWEEN_INDEX_WRITES:
                indexed = now
                job.write_index()
    finally:
        job.write_index()
    seconds = time.monotonic() - started
    if job.encoded:
        log(
            f"embedded {job.encoded} volumes ({job.tokens} visual tokens) in {seconds:.1f} s: "
            f"{job.encoded / seconds:.2f} volumes/s, {job.tokens / seconds:.0f} tokens/s"
        )
    if faults:
        shown = "\n  ".join(sorted(faults)[:10]) + ("\n  ..." if len(faults) > 10 else "")
        raise EmbedError(f"{len(faults)} of {len(wanted)} volumes could not be embedded:\n  {shown}")
    return keys


class _Job:
    """One run of `embed_examples`: what is read, encoded and written, and how much of it."""

    def __init__(
        self,
        tower: VisionTower,
        cache: EmbeddingCache,
        view: VolumeView,
        axes: tuple[int, int, int],
        storage: torch.dtype,
        recipe: str,
        log: Callable[[str], None],
    ) -> None:
        self.tower, self.cache, self.view, self.axes = tower, cache, view, axes
        self.storage, self.recipe, self.log = storage, recipe, log
        self.encoded = self.tokens = 0
        self._unsaved: dict[str, IndexEntry] = {}

    def load_ahead(self, volumes: list[VolumeRef], faults: list[str], workers: int = 2) -> Iterator[_Loaded]:
        """Volumes in order, the next ones being read meanwhile; at most `workers` + 1 are in memory."""
        with ThreadPoolExecutor(workers) as pool:
            pending: deque[tuple[VolumeRef, Future[_Loaded]]] = deque()
            queue = iter(volumes)
            while True:
                for volume in queue:
                    pending.append((volume, pool.submit(self._load, volume)))
                    if len(pending) > workers:
                        break
                if not pending:
                    return
                volume, future = pending.popleft()
                try:
                    yield future.result()
                except (VolumeError, ViewError) as error:
                    faults.append(f"{volume.volume_id}: {error}")

    def _load(self, ref: VolumeRef) -> _Loaded:
        require_file(ref.image_path)
        stamp = IndexEntry.of(ref, "")  # before reading: a file changed meanwhile must not look current
        volume = read_volume(ref.image_path)
        entry = replace(stamp, key=volume_key(volume, self.recipe))
        if self.cache.get(entry.key) is not None:
            return _Loaded(ref, entry, None)
        return _Loaded(ref, entry, view_frames(volume, self.view, *self.axes, sizes=self.tower.spec.sizes))

    def encode(self, batch: list[_Loaded], faults: list[str]) -> dict[str, str]:
        """Encode what the cache lacks and write it. Returns volume id -> key of what is now in the cache."""
        missing = [(item, item.view) for item in batch if item.view is not None]
        results = self.tower.encode_batch([view for _, view in missing]) if missing else []
        if results and not self.encoded and self.storage != self.tower.dtype:
            self._tell_rounding([embeds for embeds, _ in results])
        keys = {item.volume.volume_id: item.entry.key for item in batch}
        for (item, view), (embeds, grid) in zip(missing, results, strict=True):
            features = VolumeFeatures(
                item.entry.key, embeds.to(dtype_in_memory(self.storage)), grid, view.second_per_grid_t
            )
            name = item.volume.volume_id
            try:
                validate_features(features, self.tower.spec.hidden_size, self.tower.spec.sizes.merge, name)
            except FeatureError as error:  # an overflow in half precision, say
                faults.append(f"{name}: {error}")
                del keys[name]
                continue
            self.cache.put(features, self.storage)
            self.encoded += 1
            self.tokens += len(embeds)
        self._unsaved.update(
            {item.volume.volume_id: item.entry for item in batch if item.volume.volume_id in keys}
        )
        return keys

    def _tell_rounding(self, batch: list[torch.Tensor]) -> None:
        """Say what storing in another number format costs, measured on what was computed first."""
        exact = torch.cat(batch).double()
        error = as_read(exact, self.storage).double() - exact
        relative = error.norm(dim=1) / exact.norm(dim=1)
        self.log(
            f"computed in {self.tower.dtype}, stored in {self.storage}: relative error of a visual token "
            f"{relative.mean():.1e} on the average, {relative.max():.1e} at most ({len(batch)} volumes)"
        )

    def write_index(self) -> None:
        """Record the keys found since the last call.

        Raises:
            CacheError: the folder is read-only or the disk full.
        """
        if self._unsaved:
            try:
                self.cache.index.update(self.recipe, self._unsaved)
            except OSError as error:
                raise CacheError(
                    f"cannot write the index of {self.cache.folder} ({error.strerror or error}), by which later stages "
                    "find volumes; make the folder writable or free space, then run again: finished volumes are kept"
                ) from error
            self._unsaved.clear()


def _announce(
    wanted: dict[str, VolumeRef],
    remaining: list[VolumeRef],
    tower: VisionTower,
    cache: EmbeddingCache,
    view: VolumeView,
    storage: torch.dtype,
    log: Callable[[str], None],
) -> int:
    """Say how large the cache becomes and check the disk. Returns how many volumes make one forward."""
    spec = tower.spec
    tokens = {name: ViewGeometry.of(v.shape, view, spec.sizes).num_tokens for name, v in wanted.items()}
    if not tokens:
        return 1
    row = bytes_per_token(spec.hidden_size, storage)
    largest = max(tokens.values())
    needed = sum(tokens[volume.volume_id] for volume in remaining) * row
    free = shutil.disk_usage(cache.folder).free
    log(
        f"{len(wanted)} volumes, {largest} visual tokens and {_size(largest * row)} each ({storage}), "
        f"{_size(sum(tokens.values()) * row)} in all; {len(wanted) - len(remaining)} are in {cache.folder}, "
        f"{_size(needed)} to write, {_size(free)} free"
    )
    if needed > free:
        raise CacheError(
            f"the cache needs {_size(needed)} more but {cache.folder} has {_size(free)} free; {room_remedy(storage)}"
        )
    return max(1, tower.max_patches // (largest * spec.sizes.merge**2))


def _batches(items: Iterator[_Loaded], size: int) -> Iterator[list[_Loaded]]:
    batch: list[_Loaded] = []
    for item in items:
        batch.append(item)
        if len(batch) == size:
            yield batch
            batch = []
    if batch:
        yield batch


def _size(count: float) -> str:
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} TB"
