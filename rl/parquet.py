"""Tables as files."""

from __future__ import annotations

from pathlib import Path

import polars as pl

from rl.errors import staged, writing


def write_parquet(path: Path, table: pl.DataFrame) -> None:
    """Write `path`, complete or not at all.

    Raises:
        WriteError: the disk is full, say; what was there before still is.
    """
    with writing(path), staged(path) as staging:
        try:
            table.write_parquet(staging)
        except pl.exceptions.ComputeError as error:
            if "os error" not in str(error):
                raise
            raise OSError(str(error)) from error  # what polars calls a full disk
