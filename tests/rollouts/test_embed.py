"""Filling the cache: every volume once, resumable, and one bad volume names itself without stopping the others."""

from __future__ import annotations

import errno
import multiprocessing
import re
import time
from collections import namedtuple
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from unittest.mock import Mock

import pytest
import torch

from rewards.types import VolumeRef
from rl.config import VolumeViewConfig
from rollouts import embed
from rollouts.cache import CacheError, EmbeddingCache, embedding_recipe, open_store
from rollouts.embed import EmbedError, embed_examples
from rollouts.index import CacheIndex
from rollouts.storage import FLOAT8, as_read
from rollouts.vision import TowerSpec, VisionTower
from rollouts.volumes import ViewError, read_volume, view_frames


@pytest.fixture
def tower(base_folder: Path) -> VisionTower:
    return VisionTower(base_folder)


@pytest.fixture
def cache(tmp_path: Path) -> EmbeddingCache:
    return EmbeddingCache(tmp_path / "cache")


@pytest.fixture
def volumes(make_volume: Callable[..., VolumeRef]) -> list[VolumeRef]:
    return [make_volume(f"knee{seed}", seed=seed) for seed in range(5)]


@pytest.fixture
def encoded(tower: VisionTower, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Sizes of the batches that went through the tower."""
    sizes: list[int] = []
    encode = tower.encode_batch

    def counting(views):  # type: ignore[no-untyped-def]
        sizes.append(len(views))
        return encode(views)

    monkeypatch.setattr(tower, "encode_batch", counting)
    return sizes


def quiet(_: str) -> None:
    pass


def test_the_cache_holds_what_the_tower_says(
    tower: VisionTower, cache: EmbeddingCache, view: VolumeViewConfig, volumes: list[VolumeRef]
) -> None:
    keys = embed_examples(volumes, tower, cache, view, log=quiet)
    assert keys.keys() == {volume.volume_id for volume in volumes}
    recipe = embedding_recipe(tower.spec, view, (2, 0, 1), torch.float32, torch.float32)
    store = open_store(volumes, cache, recipe)
    for volume in volumes:
        frames = view_frames(read_volume(volume.image_path), view, sizes=tower.spec.sizes)
        expected, grid = tower.encode(frames)
        features = store[volume.volume_id]
        torch.testing.assert_close(features.embeds_V_H, expected, atol=1e-5, rtol=1e-5)
        assert features.grid_thw == grid
        assert features.second_per_grid_t == frames.second_per_grid_t == pytest.approx(0.25 * 2.0 * 2)


def test_later_stages_find_the_features_without_loading_the_tower(
    base_folder: Path,
    tower: VisionTower,
    cache: EmbeddingCache,
    view: VolumeViewConfig,
    volumes: list[VolumeRef],
) -> None:
    embed_examples(volumes, tower, cache, view, storage_dtype=torch.bfloat16, log=quiet)
    recipe = embedding_recipe(
        TowerSpec.of_folder(base_folder), view, (2, 0, 1), torch.float32, torch.bfloat16
    )
    assert open_store(volumes, cache, recipe)["knee0"].embeds_V_H.dtype == torch.bfloat16


def test_volumes_share_a_forward_up_to_the_patch_budget(
    tower: VisionTower,
    cache: EmbeddingCache,
    view: VolumeViewConfig,
    volumes: list[VolumeRef],
    encoded: list[int],
) -> None:
    tower.max_patches = 2 * 4 * 4 * 8  # two volumes of 4 x 4 x 8 patches
    embed_examples([*volumes, volumes[0]], tower, cache, view, log=quiet)
    assert encoded == [2, 2, 1]


def test_a_second_run_reads_no_volume(
    tower: VisionTower,
    cache: EmbeddingCache,
    view: VolumeViewConfig,
    volumes: list[VolumeRef],
    encoded: list[int],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    keys = embed_examples(volumes, tower, cache, view, log=quiet)
    monkeypatch.setattr(embed, "read_volume", None)
    encoded.clear()
    assert embed_examples(volumes, tower, EmbeddingCache(cache.folder), view, log=quiet) == keys
    assert encoded == []


def test_without_the_index_volumes_are_hashed_and_not_encoded_again(
    tower: VisionTower,
    cache: EmbeddingCache,
    view: VolumeViewConfig,
    volumes: list[VolumeRef],
    encoded: list[int],
) -> None:
    keys = embed_examples(volumes, tower, cache, view, log=quiet)
    (cache.folder / "index.json").unlink()
    encoded.clear()
    assert embed_examples(volumes, tower, cache, view, log=quiet) == keys
    assert encoded == []
    assert (cache.folder / "index.json").is_file()


def test_only_corrupted_missing_and_changed_volumes_are_made_again(
    tower: VisionTower,
    cache: EmbeddingCache,
    view: VolumeViewConfig,
    volumes: list[VolumeRef],
    make_volume: Callable[..., VolumeRef],
    encoded: list[int],
) -> None:
    keys = embed_examples(volumes, tower, cache, view, log=quiet)
    path = cache.path_of(keys["knee0"])
    path.write_bytes(path.read_bytes()[:-8])
    cache.path_of(keys["knee1"]).unlink()
    make_volume("knee2", seed=99)
    encoded.clear()
    again = embed_examples(volumes, tower, cache, view, log=quiet)
    assert sum(encoded) == 3
    assert {name for name in keys if keys[name] != again[name]} == {"knee2"}
    assert all(cache.get(key) is not None for key in again.values())


def test_an_interrupted_run_continues_where_it_stopped(
    tower: VisionTower,
    cache: EmbeddingCache,
    view: VolumeViewConfig,
    volumes: list[VolumeRef],
    encoded: list[int],
) -> None:
    tower.max_patches = 1

    def interrupt(done: int, total: int) -> None:
        if done == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        embed_examples(volumes, tower, cache, view, progress=interrupt, log=quiet)
    encoded.clear()
    seen: list[tuple[int, int]] = []
    embed_examples(volumes, tower, cache, view, progress=lambda *step: seen.append(step), log=quiet)
    assert sum(encoded) == 2
    assert seen == [(3, 5), (4, 5), (5, 5)]


def test_faulty_volumes_are_all_named_and_the_others_kept(
    tower: VisionTower, cache: EmbeddingCache, view: VolumeViewConfig, volumes: list[VolumeRef]
) -> None:
    Path(volumes[1].image_path).unlink()
    content = Path(volumes[3].image_path).read_bytes()
    Path(volumes[3].image_path).write_bytes(content[: len(content) // 2])
    with pytest.raises(EmbedError, match="2 of 5 volumes could not be embedded") as caught:
        embed_examples(volumes, tower, cache, view, log=quiet)
    assert "knee1: volume" in str(caught.value)
    assert "does not exist" in str(caught.value)
    assert "knee3: volume" in str(caught.value)
    assert "cannot be read" in str(caught.value)
    good = [volumes[0], volumes[2], volumes[4]]
    recipe = embedding_recipe(tower.spec, view, (2, 0, 1), torch.float32, torch.float32)
    assert len(open_store(good, cache, recipe)) == 3


def test_embeddings_that_overflow_in_half_precision_are_named(
    tower: VisionTower, cache: EmbeddingCache, view: VolumeViewConfig, volumes: list[VolumeRef]
) -> None:
    tower.visual.merger.mlp[2].weight.data.mul_(1e7)
    with pytest.raises(EmbedError, match=r"knee0: features of volume knee0.*NaN or infinite"):
        embed_examples(volumes[:1], tower, cache, view, storage_dtype=torch.float16, log=quiet)


def test_size_and_speed_are_told(
    tower: VisionTower, cache: EmbeddingCache, view: VolumeViewConfig, volumes: list[VolumeRef]
) -> None:
    lines: list[str] = []
    embed_examples(volumes, tower, cache, view, log=lines.append)
    assert lines[0].startswith(
        "5 volumes, 32 visual tokens and 32.8 kB each (torch.float32), 164 kB in all; 0 are in"
    )
    assert "embedded 5 volumes (160 visual tokens)" in lines[-1]
    assert "volumes/s" in lines[-1]


def relative_error(lines: list[str], stored: str) -> list[float]:
    """The mean and the largest error of the only line that speaks of it."""
    (said,) = [line for line in lines if "relative error" in line]
    assert said.startswith(
        f"computed in torch.float32, stored in torch.{stored}: relative error of a visual token"
    )
    return [float(number) for number in re.findall(r"\d\.\de-\d+", said)]


def test_the_error_of_storing_in_another_number_format_is_told_once(
    tower: VisionTower, cache: EmbeddingCache, view: VolumeViewConfig, volumes: list[VolumeRef]
) -> None:
    """bfloat16 has 8 significant bits: a number is off by 2^-9 of itself at most, a vector of them by less."""
    tower.max_patches = 1
    lines: list[str] = []
    embed_examples(volumes, tower, cache, view, storage_dtype=torch.bfloat16, log=lines.append)
    mean, largest = relative_error(lines, "bfloat16")
    assert 2**-11 < mean <= largest < 2**-9
    lines.clear()
    # all are there
    embed_examples(volumes, tower, cache, view, storage_dtype=torch.bfloat16, log=lines.append)
    embed_examples(volumes, tower, cache, view, log=lines.append)  # stored as computed
    assert not [line for line in lines if "relative error" in line]


def test_one_cache_holds_volumes_in_eight_bits_beside_those_in_full(
    tower: VisionTower,
    cache: EmbeddingCache,
    view: VolumeViewConfig,
    volumes: list[VolumeRef],
    encoded: list[int],
) -> None:
    """A run in eight bits that was interrupted goes on, and neither format is taken for the other."""
    lines: list[str] = []
    full = embed_examples(volumes, tower, cache, view, log=quiet)
    encoded.clear()
    embed_examples(volumes[:2], tower, cache, view, storage_dtype=FLOAT8, log=lines.append)
    small = embed_examples(volumes, tower, cache, view, storage_dtype=FLOAT8, log=quiet)
    assert sum(encoded) == 5
    assert lines[0].startswith("2 volumes, 32 visual tokens and 8.32 kB each (torch.float8_e4m3fn), 16.6 kB")
    mean, largest = relative_error(lines, "float8_e4m3fn")
    assert 2**-6 < mean <= largest < 2**-4
    for name in full:
        exact, read = cache.get(full[name]), cache.get(small[name])
        assert exact is not None
        assert read is not None
        assert torch.equal(read.embeds_V_H, as_read(exact.embeds_V_H, FLOAT8))


@pytest.mark.slow
def test_processes_that_fill_one_cache_at_once_and_one_that_is_killed_leave_whole_entries(
    base_folder: Path, cache: EmbeddingCache, view: VolumeViewConfig, make_volume: Callable[..., VolumeRef]
) -> None:
    """Two encode the same volumes, in opposite order; a third is killed in the middle of its work."""
    volumes = [make_volume(f"knee{seed}", seed=seed) for seed in range(12)]
    context = multiprocessing.get_context("spawn")

    def start(order: list[VolumeRef]) -> multiprocessing.process.BaseProcess:
        process = context.Process(target=fill, args=(str(base_folder), str(cache.folder), view, order))
        process.start()
        return process

    killed = start(volumes)
    while not list(cache.folder.glob("*/*.safetensors")):
        assert killed.is_alive()
        time.sleep(0.01)
    killed.kill()
    killed.join()
    fillers = [start(volumes), start(volumes[::-1])]
    for process in fillers:
        process.join()
        assert process.exitcode == 0
    recipe = embedding_recipe(TowerSpec.of_folder(base_folder), view, (2, 0, 1), torch.float32, torch.float32)
    store = open_store(volumes, EmbeddingCache(cache.folder), recipe)
    assert {volume.volume_id for volume in volumes} == set(store)
    for name in store:
        assert torch.isfinite(
            store[name].embeds_V_H
        ).all()  # and its checksum is right, or it would not come out
    assert len(list(cache.folder.glob("*/*.safetensors"))) == len(volumes)


def fill(base: str, folder: str, view: VolumeViewConfig, volumes: list[VolumeRef]) -> None:
    """In a process of its own: one volume at a time."""
    embed_examples(volumes, VisionTower(base, max_patches=1), EmbeddingCache(folder), view, log=quiet)


def test_an_index_that_cannot_be_written_is_an_error_that_names_the_folder(
    tower: VisionTower,
    cache: EmbeddingCache,
    view: VolumeViewConfig,
    volumes: list[VolumeRef],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A read-only copy of a cache, whose volumes have other times than the index knows."""
    embed_examples(volumes[:1], tower, cache, view, log=quiet)
    (cache.folder / "index.json").unlink()
    read_only = OSError(errno.EROFS, "Read-only file system")
    monkeypatch.setattr(CacheIndex, "update", Mock(side_effect=read_only))
    with pytest.raises(
        CacheError, match=rf"index of {cache.folder} \(Read-only file system\), by which later"
    ):
        embed_examples(volumes[:1], tower, cache, view, log=quiet)


def test_a_disk_that_is_too_small_is_refused_before_anything_is_computed(
    tower: VisionTower,
    cache: EmbeddingCache,
    view: VolumeViewConfig,
    volumes: list[VolumeRef],
    encoded: list[int],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(embed.shutil, "disk_usage", lambda _: usage(100_000, 0, 100_000))
    with pytest.raises(CacheError, match=r"needs 164 kB more but .* has 100 kB free; set embed\.cache_dir"):
        embed_examples(volumes, tower, cache, view, log=quiet)
    assert encoded == []
    assert embed_examples(volumes[:2], tower, cache, view, log=quiet).keys() == {"knee0", "knee1"}
    assert len(embed_examples(volumes[:4], tower, cache, view, log=quiet)) == 4  # the first two need no space


def test_a_view_that_does_not_fit_is_refused_before_anything_is_computed(
    tower: VisionTower,
    cache: EmbeddingCache,
    view: VolumeViewConfig,
    volumes: list[VolumeRef],
    encoded: list[int],
) -> None:
    with pytest.raises(ViewError, match=r"view\.height is 33"):
        embed_examples(volumes, tower, cache, replace(view, height=33), log=quiet)
    assert encoded == []


def test_no_volumes_need_no_work(tower: VisionTower, cache: EmbeddingCache, view: VolumeViewConfig) -> None:
    assert embed_examples([], tower, cache, view, log=quiet) == {}
