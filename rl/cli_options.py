"""Arguments that many commands share."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated

import typer

DEFAULT_CONFIG = Path("configs/demo.yaml")
Overrides = Annotated[
    list[str] | None,
    typer.Argument(metavar="key=value", help="Settings of the recipe to override, e.g. grpo.max_steps=100."),
]
OVERRIDE = re.compile(r"[\w.]+=")
"""What an override begins with, where other words may stand beside it: a folder with such a name is written ./a=b."""
