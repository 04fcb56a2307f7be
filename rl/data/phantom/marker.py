"""The file that tells a folder of phantoms from a folder of real data."""

from __future__ import annotations

from pathlib import Path

from rl.config import ConfigError

MARKER = "phantom.json"
"""Says that a data folder holds phantoms, and made from which settings."""


def refuse_other_data(root: Path) -> None:
    """Keep phantoms from being written over a dataset.

    Raises:
        ConfigError: the folder holds something that is no phantom, a part of a dataset say.
    """
    written = ("images", "masks", "split_files", "question_files", "generate_data")
    theirs = [name for name in written if (root / name).exists()]
    if theirs and not (root / MARKER).exists():
        raise ConfigError(
            f"phantom.out_dir is {root}, which holds {theirs[0]} that are no phantoms; choose another folder, phantoms "
            "could overwrite them"
        )
