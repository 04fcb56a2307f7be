"""Rows kept as Arrow files under `run_dir/data-cache`, keyed by everything they were made from.

A second run or a second process with the same inputs maps the same file; processes that build it at once each
write a folder of their own, and the first rename wins.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from pathlib import Path

import pyarrow as pa
import xxhash
from datasets import Dataset

import rewards.boxes
import rewards.matching
import rewards.reading
from rl.data import boxes, items, layout, nifti, rows
from rl.data.layout import SplitRow
from rl.data.rows import SCHEMA, Row

ROWS_PER_BATCH = 1000
CODE = (boxes, items, layout, nifti, rows, rewards.boxes, rewards.matching, rewards.reading)
"""Modules whose change may change a row."""


def cache_key(
    settings: object, texts: Sequence[Path], root: Path, volumes: Sequence[SplitRow], masks: bool
) -> str:
    """Hash of all that rows are made from, so that a changed input never meets a stale table.

    Args:
        settings: whatever changes the rows, by its `repr`.
        texts: files hashed by content (missing ones count as such).
        root: folder that the volumes' paths are relative to.
        volumes: rows whose images (and masks, if `masks`) count by size and modification time.
    """
    key = xxhash.xxh128(repr(settings).encode())
    for path in [*texts, *(Path(str(module.__file__)) for module in CODE)]:
        key.update(_file_hash(path) if path.is_file() else b"missing")
    for row in volumes:
        for name in (row.image, row.mask if masks else None):
            volume = root / (name or "")
            stat = volume.stat() if name and volume.exists() else None
            key.update(repr((name, stat and (stat.st_size, stat.st_mtime_ns))).encode())
    return key.hexdigest()


def cached_table(folder: Path, make_rows: Callable[[], Iterator[Row]]) -> tuple[Dataset, str]:
    """The table in `folder`, built there first when it is missing or damaged, and its content fingerprint.

    Raises:
        OSError: the table cannot be written (disk full, say); nothing half-written stays behind.
    """
    cached = _open(folder)
    if cached is None:
        _build(folder, make_rows())
        cached = _open(folder)
        if cached is None:
            raise OSError(f"{folder} was written and cannot be read back; check the disk that holds run_dir")
    return cached


def _open(folder: Path) -> tuple[Dataset, str] | None:
    if not folder.is_dir():
        return None
    try:
        summary = json.loads((folder / "summary.json").read_text(encoding="utf-8"))
        dataset = Dataset.from_file(str(folder / "rows.arrow"))
    except (OSError, ValueError, pa.ArrowException):
        return None
    return (dataset, summary["fingerprint"]) if len(dataset) == summary["rows"] else None


def _build(folder: Path, made: Iterator[Row]) -> None:
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        summary = _write_rows(temporary / "rows.arrow", made)
        (temporary / "summary.json").write_text(json.dumps(summary), encoding="utf-8")
        _move_into_place(temporary, folder)
    except OSError as error:
        raise OSError(
            error.errno,
            f"cannot write the table of examples under {folder.parent}: {error}; free space or set run_dir",
        ) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _write_rows(path: Path, made: Iterator[Row]) -> dict[str, object]:
    fingerprint, count = xxhash.xxh128(), 0
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_stream(sink, SCHEMA) as writer:
        while batch := list(islice(made, ROWS_PER_BATCH)):
            for row in batch:
                fingerprint.update(json.dumps(row, sort_keys=True).encode())
            writer.write_batch(pa.RecordBatch.from_pylist(batch, schema=SCHEMA))
            count += len(batch)
    return {"rows": count, "fingerprint": fingerprint.hexdigest()}


def _move_into_place(temporary: Path, folder: Path) -> None:
    if folder.exists() and _open(folder) is None:
        shutil.rmtree(folder)  # damaged: it would block the rename
    try:
        temporary.rename(folder)
    except OSError:
        if _open(folder) is None:
            raise
        # Another process finished the same table first; its rows are the same as ours.


def _file_hash(path: Path) -> bytes:
    digest = xxhash.xxh128()
    with path.open("rb") as stream:
        while chunk := stream.read(1 << 22):
            digest.update(chunk)
    return digest.digest()
