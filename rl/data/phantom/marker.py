"""The file that tells a folder of phantoms from a folder of real data."""

from __future__ import annotations

from pathlib import Path

from rl.config import ConfigError

MARKER = "phantom.json"
"""Says that a data folder holds phantoms, and made from which settings."""


def refuse_other_data(root: Path) -> None:
    """Keep phantoms from being written over a dataset.

    Raises:
        ConfigError: the folder holds one that is not a phantom.
    """
    if (root / "split_files").exists() and not (root / MARKER).exists():
        raise ConfigError(
            f"phantom.out_dir is {root}, which holds a dataset that is not a phantom; choose another folder, "
            "phantoms would overwrite it"
        )
