"""The cache gives back what was put in, or says so: nothing corrupted, foreign or stale gets out of it."""

from __future__ import annotations

import errno
import json
import logging
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from rewards.types import VolumeRef
from rl.config import VolumeViewConfig
from rollouts.cache import CacheError, EmbeddingCache, FeatureStore, embedding_recipe, open_store, volume_key
from rollouts.index import CacheIndex, IndexEntry
from rollouts.storage import FLOAT8, as_read, pack
from rollouts.types import VolumeFeatures
from rollouts.vision import Normalisation, TowerSpec
from rollouts.volumes import PatchSizes, read_volume

SPEC = TowerSpec("tower", PatchSizes(8, 2, 2), Normalisation(), 256)


@pytest.fixture
def cache(tmp_path: Path) -> EmbeddingCache:
    return EmbeddingCache(tmp_path / "cache")


def recipe_of(spec: TowerSpec = SPEC, view: VolumeViewConfig | None = None, **changes: object) -> str:
    settings = {"axes": (2, 0, 1), "compute_dtype": torch.float32, "storage_dtype": torch.float32} | changes
    return embedding_recipe(spec, view or VolumeViewConfig(), **settings)  # type: ignore[arg-type]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_entry_comes_back_as_it_was(
    cache: EmbeddingCache, features: VolumeFeatures, dtype: torch.dtype
) -> None:
    stored = replace(features, embeds_V_H=features.embeds_V_H.to(dtype), second_per_grid_t=1 / 3)
    cache.put(stored)
    for reader in (cache, EmbeddingCache(cache.folder)):
        loaded = reader.get(features.key)
        assert loaded is not None
        assert torch.equal(loaded.embeds_V_H, stored.embeds_V_H)
        assert replace(loaded, embeds_V_H=stored.embeds_V_H) == stored


def test_an_entry_in_eight_bits_takes_half_and_comes_back_in_bfloat16(
    cache: EmbeddingCache, features: VolumeFeatures
) -> None:
    half = replace(features, embeds_V_H=features.embeds_V_H.to(torch.bfloat16))
    cache.put(half)
    size = cache.path_of(features.key).stat().st_size
    cache.put(half, FLOAT8)
    assert cache.path_of(features.key).stat().st_size < 0.6 * size
    for reader in (cache, EmbeddingCache(cache.folder)):
        loaded = reader.get(features.key)
        assert loaded is not None
        assert loaded.embeds_V_H.dtype == torch.bfloat16
        assert torch.equal(loaded.embeds_V_H, as_read(features.embeds_V_H, FLOAT8))
        assert replace(loaded, embeds_V_H=half.embeds_V_H) == half


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="needs /proc")
def test_features_are_read_in_place_and_not_copied(cache: EmbeddingCache, features: VolumeFeatures) -> None:
    """What `get` returns lies in the memory-mapped file: a volume takes no memory however often it is asked."""
    cache.put(features)
    taken = [cache.get(features.key) for _ in range(3)]
    maps = Path("/proc/self/maps").read_text().splitlines()
    mapped = [
        range(*(int(end, 16) for end in line.split()[0].split("-")))
        for line in maps
        if line.endswith(f"{features.key}.safetensors")
    ]
    assert mapped
    for loaded in taken:
        assert loaded is not None
        assert any(loaded.embeds_V_H.data_ptr() in span for span in mapped)


def test_a_key_without_an_entry_gives_none_quietly(
    cache: EmbeddingCache, caplog: pytest.LogCaptureFixture
) -> None:
    assert cache.get("0" * 32) is None
    assert not caplog.records


def flip_last_byte(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


def replace_text(path: Path, old: bytes, new: bytes) -> None:
    content = path.read_bytes()
    assert content.count(old) == 1
    path.write_bytes(content.replace(old, new))


def without_scale(path: Path) -> None:
    embeds = pack(torch.zeros(12, 256), FLOAT8)["embeds_V_H"]
    save_file({"embeds_V_H": embeds}, path, {"key": path.stem})


@pytest.mark.parametrize("storage", [torch.float32, FLOAT8])
@pytest.mark.parametrize(
    "damage",
    [
        lambda path: path.write_bytes(b""),
        lambda path: path.write_bytes(path.read_bytes()[:-100]),
        lambda path: path.write_bytes(path.read_bytes()[:20]),
        lambda path: path.write_bytes(b"\xff" * 100),
        flip_last_byte,
        lambda path: replace_text(path, b"[3, 4, 4]", b"[3, 4, 8]"),
        lambda path: replace_text(path, b"[3, 4, 4]", b"[3, 4, x]"),
        lambda path: replace_text(path, b'second_per_grid_t":"1', b'second_per_grid_t":"2'),
        lambda path: save_file({"embeds_V_H": torch.zeros(12, 256)}, path),
        lambda path: save_file({"other": torch.zeros(2)}, path, {"key": path.stem}),
        without_scale,
    ],
)
def test_a_damaged_or_foreign_entry_is_reported_and_remade(
    cache: EmbeddingCache,
    features: VolumeFeatures,
    damage: Callable[[Path], None],
    storage: torch.dtype,
    caplog: pytest.LogCaptureFixture,
) -> None:
    cache.put(features, storage)
    damage(cache.path_of(features.key))
    with caplog.at_level(logging.WARNING):
        assert cache.get(features.key) is None
    assert f"{features.key}.safetensors" in caplog.text
    assert "has to be made again" in caplog.text
    cache.put(features)
    assert cache.get(features.key) is not None


def test_an_entry_under_another_name_is_foreign(
    cache: EmbeddingCache, features: VolumeFeatures, caplog: pytest.LogCaptureFixture
) -> None:
    cache.put(features)
    other = cache.path_of("e" * 32)
    other.parent.mkdir()
    other.write_bytes(cache.path_of(features.key).read_bytes())
    assert cache.get("e" * 32) is None
    assert f"belongs to key {features.key}" in caplog.text


def test_an_entry_damaged_after_it_was_read_is_noticed_at_the_next_read(
    cache: EmbeddingCache, features: VolumeFeatures
) -> None:
    """The checksum is not computed at every read, but again whenever the file has changed."""
    cache.put(features)
    assert cache.get(features.key) is not None
    path = cache.path_of(features.key)
    flip_last_byte(path)
    os.utime(path, ns=(1, 1))
    assert cache.get(features.key) is None


def test_a_full_disk_is_named_and_leaves_no_half_written_file(
    cache: EmbeddingCache, features: VolumeFeatures, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache.put(features)
    write = Path.write_bytes

    def write_half(self: Path, data: bytes) -> int:
        write(self, data[: len(data) // 2])
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", write_half)
    with pytest.raises(CacheError, match=r"No space left on device.*embed\.cache_dir"):
        cache.put(replace(features, key="d" * 32))
    monkeypatch.undo()
    assert [path.name for path in cache.folder.rglob("*") if path.is_file()] == [
        f"{features.key}.safetensors"
    ]
    assert cache.get(features.key) is not None


def test_several_writers_of_one_entry_do_not_disturb_each_other(
    cache: EmbeddingCache, features: VolumeFeatures
) -> None:
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda _: EmbeddingCache(cache.folder).put(features), range(16)))
    assert cache.get(features.key) is not None
    assert len([path for path in cache.folder.rglob("*") if path.is_file()]) == 1


def test_what_a_killed_process_was_writing_is_removed_and_what_is_being_written_is_not(
    cache: EmbeddingCache, features: VolumeFeatures
) -> None:
    cache.put(features)
    entry = cache.path_of(features.key)
    abandoned, written = (entry.with_name(f".{features.key}.{name}.tmp") for name in ("old", "new"))
    for path in (abandoned, written):
        path.write_bytes(b"half")
    for path in (abandoned, entry):
        os.utime(path, (0, 0))
    cache.remove_abandoned()
    assert {path.name for path in entry.parent.iterdir()} == {entry.name, written.name}


def test_a_folder_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(CacheError, match=r"file/cache cannot be made.*embed\.cache_dir"):
        EmbeddingCache(tmp_path / "file" / "cache")


def test_anything_that_changes_the_features_changes_the_recipe() -> None:
    view = VolumeViewConfig()
    recipes = [
        recipe_of(),
        recipe_of(replace(SPEC, fingerprint="other")),
        recipe_of(replace(SPEC, normalisation=Normalisation((0.5, 0.5, 0.5)))),
        recipe_of(replace(SPEC, sizes=PatchSizes(14, 2, 2))),
        recipe_of(axes=(2, 1, 0)),
        recipe_of(compute_dtype=torch.bfloat16),
        recipe_of(storage_dtype=torch.bfloat16),
        recipe_of(storage_dtype=FLOAT8),
        recipe_of(view=replace(view, crop=[0, 4, 0, 64, 0, 64])),
        recipe_of(view=replace(view, slice_stride=2)),
        recipe_of(view=replace(view, height=48)),
        recipe_of(view=replace(view, width=48)),
        recipe_of(view=replace(view, window_low=2.0)),
        recipe_of(view=replace(view, window_high=99.0)),
        recipe_of(view=replace(view, seconds_per_mm=0.5)),
    ]
    assert len(set(recipes)) == len(recipes)
    assert recipe_of(view=replace(view, window_low=1)) == recipe_of()  # 1 and 1.0 are one setting


def test_the_key_follows_content_and_spacing_not_the_files_name(
    make_volume: Callable[..., VolumeRef],
) -> None:
    one = read_volume(make_volume("one").image_path)
    same = read_volume(make_volume("same").image_path)
    other = read_volume(make_volume("other", seed=1).image_path)
    assert volume_key(one, "r") == volume_key(same, "r")
    assert volume_key(one, "r") != volume_key(other, "r")
    assert volume_key(one, "r") != volume_key(one, "s")
    assert volume_key(one, "r") != volume_key(replace(one, spacing_mm=(0.5, 0.5, 1.0)), "r")


def test_the_store_names_a_volume_whose_features_are_gone(
    cache: EmbeddingCache, features: VolumeFeatures
) -> None:
    cache.put(features)
    store = FeatureStore(cache, {"knee": features.key, "gone": "c" * 32})
    assert torch.equal(store["knee"].embeds_V_H, features.embeds_V_H)
    assert list(store) == ["knee", "gone"]
    with pytest.raises(CacheError, match=r"volume gone .*reasonknee embed"):
        store["gone"]


def test_the_index_opens_a_store_until_a_volume_changes(
    cache: EmbeddingCache, features: VolumeFeatures, make_volume: Callable[..., VolumeRef]
) -> None:
    volume = make_volume("knee")
    cache.put(features)
    cache.index.update("r", {"knee": IndexEntry.of(volume, features.key)})
    assert open_store([volume, volume], cache, "r")["knee"].key == features.key
    with pytest.raises(CacheError, match=r"1 of 1 volumes are not in .*first: knee.*reasonknee embed"):
        open_store([volume], cache, "another recipe")
    make_volume("knee", seed=1)
    with pytest.raises(CacheError, match="1 of 1 volumes"):
        open_store([volume], cache, "r")
    Path(volume.image_path).unlink()
    with pytest.raises(CacheError, match="1 of 1 volumes"):
        open_store([volume], cache, "r")


def test_processes_that_update_the_index_at_once_lose_nothing(tmp_path: Path) -> None:
    def update(number: int) -> None:
        CacheIndex(tmp_path).update("r", {f"knee{number}": IndexEntry("path", 1, 2, f"key{number}")})

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(update, range(32)))
    assert len(CacheIndex(tmp_path).read("r")) == 32


@pytest.mark.parametrize("content", ["", "{", "[]", '{"r": 3}', json.dumps({"r": {"knee": {"path": "p"}}})])
def test_an_unreadable_index_costs_hashing_and_no_run(
    tmp_path: Path, content: str, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "index.json").write_text(content)
    index = CacheIndex(tmp_path)
    assert index.read("r") == {}
    assert "hashed again" in caplog.text
    index.update("r", {"knee": IndexEntry("path", 1, 2, "key")})
    assert index.read("r") == {"knee": IndexEntry("path", 1, 2, "key")}
