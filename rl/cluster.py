"""The Ray side of `rl.launch` and `rl.pool`: a cluster to run on, room on it, and signals that reach the driver."""

from __future__ import annotations

import contextlib
import logging
import os
import shutil
import signal
import socket
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import Any

import psutil
import ray
from ray.util.placement_group import PlacementGroup, placement_group, remove_placement_group

from rl.config import RayConfig
from rl.placement import Node, PlacementError, requested, this_machine

CONNECTION_TIMEOUT_S = 10.0
_NOBODY = "ray.address is {!r}: no cluster answers there ({})"
DRIVER_ENV = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_TRAIN_ENABLE_PRINT_PATCH": "0",  # prints are forwarded by rl.terminal
    "RAY_CHDIR_TO_TRIAL_DIR": "0",
    "RAY_worker_niceness": "0",  # Ray's 15 starves engines and trainers on a machine that does anything else
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "1",
    "TORCH_PROCESS_GROUP_SHUTDOWN_TIMEOUT_S": "5",  # of a rank that waits for one that failed
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "1",  # a process that asked for no GPU sees none
}


@contextlib.contextmanager
def cluster(settings: RayConfig) -> Iterator[Path | None]:
    """A connection to the cluster; for a local one that it starts, the folder of its temporary files."""
    for name, value in DRIVER_ENV.items():
        os.environ.setdefault(name, value)
    os.environ["RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S"] = str(settings.placement_timeout_s)
    if ray.is_initialized():  # a notebook's own cluster: used, and left as it is
        yield None
        return
    options: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR}
    # Sockets lie in this folder, and their names may have 107 characters in all: not under a long TMPDIR.
    temporary = None if settings.address else Path(tempfile.mkdtemp(prefix="rk", dir="/tmp"))
    if temporary:
        os.environ.setdefault("RAY_TRAIN_ENABLE_PREEMPTION_WATCHER", "0")  # nobody takes this machine away
        cores = this_machine()[0].cpus
        options |= {"num_cpus": int(cores), "include_dashboard": False, "_temp_dir": str(temporary)}
    else:
        options["address"] = settings.address
    logging.getLogger("ray").setLevel(logging.ERROR)
    before = set(_descendants())
    try:
        if settings.address not in ("", "auto", "local"):
            _require_answer(settings.address)
        try:
            ray.init(**options)
        except ConnectionError as error:
            raise PlacementError(_NOBODY.format(settings.address, error)) from error
        take_signals()  # Ray has put its own handler for SIGTERM
        yield temporary
    finally:
        started = set(_descendants()) - before
        ray.shutdown()
        if temporary:
            _end(started)
            shutil.rmtree(temporary, ignore_errors=True)


def _require_answer(address: str) -> None:
    """A connection to the cluster's head, for Ray itself looks for one for a quarter of an hour.

    Raises:
        PlacementError: not HOST:PORT, or nothing answers within `CONNECTION_TIMEOUT_S`.
    """
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if not host or not port.isdecimal():
        raise PlacementError(f"ray.address is {address!r}: write it as HOST:PORT, or auto")
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=CONNECTION_TIMEOUT_S).close()
    except (OSError, UnicodeError, OverflowError) as error:  # no such host name, no such port
        raise PlacementError(_NOBODY.format(address, error)) from error


def _descendants() -> list[psutil.Process]:
    return psutil.Process().children(recursive=True)


def _end(processes: set[psutil.Process]) -> None:
    """Ray Train's clean-up actor, for one, outlives its cluster by half a minute."""
    _, alive = psutil.wait_procs(processes, timeout=2)
    for process in alive:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()
    psutil.wait_procs(alive, timeout=5)


def cluster_nodes() -> list[Node]:
    """The machines of the connected cluster."""
    return [
        Node(
            f"{node['NodeManagerHostname']} ({node['NodeID'][:6]})",
            node["Resources"].get("CPU", 0.0),
            int(node["Resources"].get("GPU", 0)),
        )
        for node in ray.nodes()
        if node["Alive"]
    ]


@contextlib.contextmanager
def reserved(settings: RayConfig, nodes: list[Node]) -> Iterator[tuple[PlacementGroup, Callable[[], None]]]:
    """Room for engines and workers, held while the engines load. Ray Train makes its own reservation for the
    workers, so theirs is given back (the second value) just before it does.

    Raises:
        PlacementError: not free within `placement_timeout_s`.
    """
    deadline = time.monotonic() + settings.placement_timeout_s
    groups: list[PlacementGroup] = []

    def release_workers() -> None:
        for group in groups[1:]:
            remove_placement_group(group)
        del groups[1:]

    try:
        for count, request in (
            (settings.num_engines, bundle(settings.cpus_per_engine, settings.gpus_per_engine)),
            (settings.num_workers, bundle(settings.cpus_per_worker, settings.gpus_per_worker)),
        ):
            if not count:  # the benchmark has no workers
                continue
            groups.append(placement_group([request] * count, strategy="PACK"))
            if not groups[-1].wait(max(0.0, deadline - time.monotonic())):
                free = ray.available_resources()
                raise PlacementError(
                    f"no placement within {settings.placement_timeout_s:g} s (ray.placement_timeout_s): requested "
                    f"{requested(settings)}; {len(nodes)} nodes have {sum(n.cpus for n in nodes):g} CPUs and "
                    f"{sum(n.gpus for n in nodes)} GPUs, of which others use all but {free.get('CPU', 0):g} CPUs and "
                    f"{free.get('GPU', 0):g} GPUs"
                )
        yield groups[0], release_workers
    finally:
        for group in groups:
            remove_placement_group(group)


def bundle(cpus: float, gpus: float) -> dict[str, float]:
    """A request for one process in Ray's words."""
    return {"CPU": cpus} | ({"GPU": gpus} if gpus else {})


@contextlib.contextmanager
def interruptible() -> Iterator[None]:
    """SIGINT and SIGTERM raise KeyboardInterrupt here, whatever Ray does to their handlers in between."""
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    take_signals()
    try:
        yield
    finally:
        for number, handler in before.items():
            _handle(number, handler)


def take_signals() -> None:
    """Handle signals ourselves again, after a call into Ray that has put handlers of its own."""
    _handle(signal.SIGINT, _interrupt)
    # As SIGINT, because that is the signal which ends Ray Train's `fit`.
    _handle(signal.SIGTERM, lambda number, frame: signal.raise_signal(signal.SIGINT))


def ignore_signals() -> None:
    """While things are being ended, a second Ctrl-C must not leave half of them."""
    _handle(signal.SIGINT, signal.SIG_IGN)
    _handle(signal.SIGTERM, signal.SIG_IGN)


def _interrupt(number: int, frame: FrameType | None) -> None:
    ignore_signals()
    raise KeyboardInterrupt


def _handle(number: int, handler: Any) -> None:
    if threading.current_thread() is threading.main_thread():  # Python allows it nowhere else
        signal.signal(number, handler)
