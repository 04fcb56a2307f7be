"""Whether every node of a Ray cluster imports our packages from one install.

`rl`, `rollouts` and `rewards` are common names, and Ray puts the driver's working directory first on its workers'
path: a folder of that name there, or another version on another node, would be imported instead.
"""

from __future__ import annotations

import importlib.metadata
from typing import Any

import ray
from ray.exceptions import RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from rl.config import ConfigError
from rl.one_install import check_one_install

PACKAGES = ("rl", "rollouts", "rewards")
DISTRIBUTION = "reasonknee-rl"


def check_nodes(timeout_s: float = 120.0) -> None:
    """Ask every node of the connected cluster where it would import the packages from.

    Raises:
        ConfigError: a node has them elsewhere, in another version, or not at all; the message names node and path.
    """
    home, version = str(check_one_install()), importlib.metadata.version(DISTRIBUTION)
    nodes = [node for node in ray.nodes() if node["Alive"]]
    looks = [_look_on(node["NodeID"]) for node in nodes]
    for node, look in zip(nodes, looks, strict=True):
        name = node["NodeManagerHostname"]
        try:
            found = ray.get(look, timeout=timeout_s)
        except RayError as error:
            raise ConfigError(f"node {name} did not say what it has installed: {error}") from error
        problem = difference(found, home, version)
        if problem:
            raise ConfigError(f"node {name}: {problem}")


def difference(found: dict[str, str | None], home: str, version: str) -> str | None:
    """What a node has otherwise than the driver; None when nothing."""
    for package in PACKAGES:
        place = found[package]
        if place is None:
            return f"the package {package!r} cannot be imported; install {DISTRIBUTION} {version} there too"
        if place != home:
            return (
                f"the package {package!r} would be imported from {place}, on the driver it is {home}: rename the "
                "folder if it shadows the package, else install the package at the same path on every node"
            )
    if found[DISTRIBUTION] != version:
        return f"{DISTRIBUTION} is {found[DISTRIBUTION] or 'not installed'}, on the driver it is {version}"
    return None


def _look_on(node_id: str) -> Any:
    # Defined here, so that Ray sends it by value: were it imported, it would be found in what it is to check.
    def look(packages: tuple[str, ...], distribution: str) -> dict[str, str | None]:
        import importlib.metadata
        import importlib.util
        from pathlib import Path

        specs = {package: importlib.util.find_spec(package) for package in packages}
        found: dict[str, str | None] = {
            package: str(Path(spec.origin).resolve().parents[1]) if spec and spec.origin else None
            for package, spec in specs.items()
        }
        try:
            found[distribution] = importlib.metadata.version(distribution)
        except importlib.metadata.PackageNotFoundError:
            found[distribution] = None
        return found

    here = NodeAffinitySchedulingStrategy(node_id, soft=False)
    return ray.remote(look).options(num_cpus=0, scheduling_strategy=here).remote(PACKAGES, DISTRIBUTION)
