"""Whether `rl`, `rollouts` and `rewards` are one install; asked before anything else of them is imported."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

HOME = Path(__file__).resolve().parents[1]


def shadowing() -> str | None:
    """Says which folder stands before one of the packages, None when none does.

    Their names are common: a `rewards/` in the working directory of a user, or of Ray, can come first on the path.
    """
    for package in ("rollouts", "rewards"):
        spec = find_spec(package)
        places = (
            [Path(place).resolve().parent for place in (spec.submodule_search_locations or ())]
            if spec
            else []
        )
        if places[:1] != [HOME]:
            return (
                f"the package {package!r} was imported from {places[0] if places else 'nowhere'}, but 'rl' from "
                f"{HOME}: a folder of that name shadows it; rename it, or run from another directory"
            )
    return None


def check_one_install() -> Path:
    """The folder that `rl`, `rollouts` and `rewards` are imported from, checked to be one and the same.

    Raises:
        ConfigError: a package comes from somewhere else; the message names the path.
    """
    problem = shadowing()
    if problem:
        from rl.config import ConfigError  # needs the packages that may be shadowed

        raise ConfigError(problem)
    return HOME
