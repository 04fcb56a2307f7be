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
    theirs = [path for path in root.iterdir() if not path.name.startswith("phantom")] if root.is_dir() else []
    if theirs and not (root / MARKER).exists():  # a stage's own lock and record may be there
        raise ConfigError(
            f"phantom.out_dir is {root}, which holds files that are no phantoms; choose another folder, phantoms "
            "could overwrite them"
        )
