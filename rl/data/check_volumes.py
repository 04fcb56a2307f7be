"""The part of `data check` that opens volumes and masks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from os import cpu_count
from pathlib import Path

import numpy as np
from rich.progress import track

from rl.data.boxes import Extent, region_extents
from rl.data.layout import DataError, Fault, SplitRow
from rl.data.nifti import Header, inspect_volume


@dataclass
class CheckedVolume:
    """What was learned of one row's files."""

    row: SplitRow
    faults: list[DataError]
    header: Header | None
    """None when the volume cannot be used."""
    opened: bool
    """Whether every voxel was read, rather than the header only."""
    extents: Mapping[int, Extent] = field(default_factory=dict)
    """Question id -> largest component of its region; empty when the mask was not read."""


def check_volumes(
    root: Path, rows: Sequence[SplitRow], regions: Mapping[int, Sequence[int]], max_volumes: int
) -> dict[str, CheckedVolume]:
    """Look at the files of every row, at an even sample of `max_volumes` of them (0: all) whole; by image path."""
    wanted = len(rows) if max_volumes <= 0 else min(max_volumes, len(rows))
    sample = set(np.linspace(0, len(rows) - 1, wanted).round().astype(int).tolist())

    def look(position: int) -> CheckedVolume:
        return _look(root, rows[position], regions, whole=position in sample)

    with ThreadPoolExecutor(cpu_count()) as pool:  # gzip and numpy release the interpreter lock
        results = pool.map(look, range(len(rows)))
        checked = list(track(results, "volumes", total=len(rows), transient=True))
    return {volume.row.image: volume for volume in checked}


def _look(root: Path, row: SplitRow, regions: Mapping[int, Sequence[int]], *, whole: bool) -> CheckedVolume:
    found = inspect_volume(root / row.image, root / row.mask if row.mask else None, row.place, whole=whole)
    faults = found.faults if row.mask else [*found.faults, _unnamed_mask(row)]
    extents = {} if found.mask is None else region_extents(found.mask, regions)
    return CheckedVolume(row, faults, found.header, opened=whole, extents=extents)


def _unnamed_mask(row: SplitRow) -> DataError:
    return DataError(
        Fault.MISSING_MASK, f"{row.place}: label_filepath is empty; name the mask of {row.image}"
    )
