"""Who gets which CPUs and GPUs under Ray: the requests of a config, and where they fit.

The plan follows Ray's rules: roles are packed onto as few nodes as possible, a fraction of a GPU comes from one
GPU, the fullest one that still has it, and a number above one means whole GPUs.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from rich.table import Table

from rl.config import ConfigError, RayConfig

_EPSILON = 1e-6


class PlacementError(ConfigError):
    """The cluster cannot hold the placement, or did not have it free in time."""


@dataclass
class Node:
    """A machine of the cluster and what is left of it while a plan is made."""

    name: str
    cpus: float
    gpus: int
    cpus_left: float = field(init=False)
    gpus_left: list[float] = field(init=False)

    def __post_init__(self) -> None:
        self.cpus_left = self.cpus
        self.gpus_left = [1.0] * self.gpus


@dataclass(frozen=True)
class Seat:
    """One process of the job with its share of a node; `node` is None when there is no room."""

    role: str
    cpus: float
    gpus: float
    node: str | None
    gpu_ids: tuple[int, ...] = ()


def real_cores() -> int:
    """CPUs this process may use: its affinity mask, and the quota of its control group (containers, SLURM)."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quota = Path("/sys/fs/cgroup/cpu.max")
    if quota.is_file():
        limit, _, period = quota.read_text(encoding="ascii").partition(" ")
        if limit != "max":
            cores = min(cores, max(1, int(limit) // int(period)))
    return cores


def this_machine() -> list[Node]:
    """What a local cluster would have."""
    return [Node("this machine", real_cores(), torch.cuda.device_count())]


def check_shares(ray: RayConfig) -> None:
    """Shares of GPUs that Ray can give and that mean what the placement says.

    Raises:
        ConfigError: names the field, its value and the remedy.
    """
    for name, gpus in (("gpus_per_worker", ray.gpus_per_worker), ("gpus_per_engine", ray.gpus_per_engine)):
        if gpus > 1 and gpus != int(gpus):
            raise ConfigError(f"ray.{name} is {gpus}: above 1 Ray gives whole GPUs only")
    if ray.placement != "colocate":
        return
    together = ray.gpus_per_worker + ray.gpus_per_engine
    if (ray.gpus_per_worker > 0) != (ray.gpus_per_engine > 0) or together > 1 + _EPSILON:
        raise ConfigError(
            f"ray.gpus_per_worker is {ray.gpus_per_worker} and ray.gpus_per_engine {ray.gpus_per_engine}: with "
            "placement 'colocate' a worker and an engine share one GPU, as 0.4 and 0.6 do"
        )
    if together and ray.num_engines > 1 and (ray.gpus_per_engine <= 0.5 or together < 1 - _EPSILON):
        raise ConfigError(
            f"ray.gpus_per_engine is {ray.gpus_per_engine} and ray.gpus_per_worker {ray.gpus_per_worker}: with "
            f"{ray.num_engines} engines Ray would put two on one GPU; give an engine more than half of a GPU and "
            "the worker the rest, as 0.6 and 0.4"
        )


def plan(ray: RayConfig, nodes: Sequence[Node]) -> list[Seat]:
    """A seat for every engine, then for every worker, in the order Ray places them. Does not change `nodes`."""
    free = [Node(node.name, node.cpus, node.gpus) for node in nodes]
    roles = [(f"engine {i}", ray.cpus_per_engine, ray.gpus_per_engine) for i in range(ray.num_engines)]
    roles += [(f"worker {i}", ray.cpus_per_worker, ray.gpus_per_worker) for i in range(ray.num_workers)]
    return [_seat(role, cpus, gpus, free) for role, cpus, gpus in roles]


def refusal(ray: RayConfig, nodes: Sequence[Node], seats: Sequence[Seat]) -> str | None:
    """Why the seats do not fit, requested against available; None when each has a node."""
    homeless = [seat for seat in seats if seat.node is None]
    if not homeless:
        return None
    return (
        f"the cluster cannot hold this placement: requested {requested(ray)}; available "
        f"{_amount(sum(n.cpus for n in nodes), sum(n.gpus for n in nodes))} on {len(nodes)} "
        f"node{'s' * (len(nodes) != 1)}; no room for {', '.join(seat.role for seat in homeless)} "
        f"(each needs {_amount(homeless[0].cpus, homeless[0].gpus)} on one node); lower "
        f"{'ray.num_workers, ' if ray.num_workers else ''}ray.num_engines or their shares, or add nodes"
    )


def requested(ray: RayConfig) -> str:
    """The whole request in words."""
    parts = [
        f"{count} {role}{'s' * (count != 1)} x {_amount(cpus, gpus)}"
        for role, count, cpus, gpus in (
            ("engine", ray.num_engines, ray.cpus_per_engine, ray.gpus_per_engine),
            ("worker", ray.num_workers, ray.cpus_per_worker, ray.gpus_per_worker),
        )
        if count
    ]
    cpus = ray.num_engines * ray.cpus_per_engine + ray.num_workers * ray.cpus_per_worker
    gpus = ray.num_engines * ray.gpus_per_engine + ray.num_workers * ray.gpus_per_worker
    return f"{' + '.join(parts)} = {_amount(cpus, gpus)}"


def placement_table(ray: RayConfig, nodes: Sequence[Node], seats: Sequence[Seat]) -> Table:
    """Who gets what, one row per process; then what each node has left."""
    table = Table(title=f"placement: {ray.placement}", title_justify="left")
    for column, justify in (("process", "left"), ("CPUs", "right"), ("GPUs", "right"), ("where", "left")):
        table.add_column(column, justify=justify)  # type: ignore[arg-type]
    for seat in seats:
        where = f"{seat.node or 'NO ROOM'}" + "".join(f", GPU {gpu}" for gpu in seat.gpu_ids)
        table.add_row(
            seat.role, f"{seat.cpus:g}", f"{seat.gpus:g}", where, style=None if seat.node else "red"
        )
    for node in nodes:
        here = [seat for seat in seats if seat.node == node.name]
        cpus, gpus = (node.cpus - sum(s.cpus for s in here), node.gpus - sum(s.gpus for s in here))
        table.add_row("left over", f"{cpus:g}", f"{gpus:g}", node.name, style="dim")
    return table


def _seat(role: str, cpus: float, gpus: float, nodes: list[Node]) -> Seat:
    for node in nodes:
        chosen = _gpus(gpus, node.gpus_left)
        if node.cpus_left + _EPSILON >= cpus and chosen is not None:
            node.cpus_left -= cpus
            for gpu in chosen:
                node.gpus_left[gpu] -= min(gpus, 1.0)
            return Seat(role, cpus, gpus, node.name, chosen)
    return Seat(role, cpus, gpus, None)


def _gpus(wanted: float, left: list[float]) -> tuple[int, ...] | None:
    """Indices of the GPUs Ray would give: whole ones, or the fullest that has the fraction. None: there are none."""
    if wanted == 0:
        return ()
    if wanted >= 1:
        whole = [i for i, share in enumerate(left) if share > 1 - _EPSILON]
        return tuple(whole[: int(wanted)]) if len(whole) >= wanted else None
    fitting = [i for i, share in enumerate(left) if share + _EPSILON >= wanted]
    return (min(fitting, key=lambda i: left[i]),) if fitting else None


def _amount(cpus: float, gpus: float) -> str:
    return f"{cpus:g} CPU{'s' * (cpus != 1)}" + (f" and {gpus:g} GPU{'s' * (gpus != 1)}" if gpus else "")
