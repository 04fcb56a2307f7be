"""The engines of a configuration as a pool under Ray: for the ranks of `rl.launch`, and for the benchmark."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path

import ray
from ray.util.placement_group import PlacementGroup

from rl.cluster import cluster, cluster_nodes, interruptible, reserved
from rl.config import Config, RayConfig
from rl.engine import start_ready_engine
from rl.install_check import check_nodes
from rl.placement import PlacementError, check_shares, placement_table, plan, refusal, this_machine
from rl.progress import StageProgress
from rl.ranks import Home, engine_in_actor
from rollouts.pool import EnginePool, PoolLimits
from rollouts.types import Engine


@contextlib.contextmanager
def engine_pool(
    config: Config, start_engine: Callable[[Config], Engine], progress: StageProgress
) -> Iterator[tuple[EnginePool, Path | None]]:
    """The engines, started, on a cluster that has had room for the training workers too while they loaded.

    Yields the pool and, for a local cluster that was started, the folder of its temporary files. Whatever happens,
    engines and cluster are ended.

    Args:
        start_engine: returns an engine that is ready; called in each engine's actor, so it must be importable there.
    Raises:
        PlacementError: no room within `ray.placement_timeout_s`.
        ConfigError: a node has another install.
        EngineError: an engine did not start.
    """
    with cluster(config.ray) as temporary:
        check_nodes()
        nodes = cluster_nodes()
        progress.console.print(placement_table(config.ray, nodes, plan(config.ray, nodes)))
        with reserved(config.ray, nodes) as (engines_group, release_workers):
            progress.log(f"starting {config.ray.num_engines} x {config.engine.kind}")
            pool = _start(start_engine, config, engines_group, temporary)
            try:
                release_workers()
                yield pool, temporary
            finally:
                pool.close()


@contextlib.contextmanager
def engines_alone(config: Config, progress: StageProgress) -> Iterator[EnginePool]:
    """As `engine_pool`, where nothing is trained: the benchmark has the engines to itself.

    Raises:
        PlacementError: also when this machine, for a local cluster, could never hold them.
    """
    alone = replace(config, ray=replace(config.ray, num_workers=0, gpus_per_worker=0.0, placement="separate"))
    with interruptible():
        check_shares(alone.ray)
        refuse_what_never_fits(alone.ray)
        with engine_pool(alone, start_ready_engine, progress) as (pool, _):
            yield pool


def refuse_what_never_fits(settings: RayConfig) -> None:
    """Before a local cluster is started.

    Raises:
        PlacementError: this machine could not hold the placement.
    """
    if settings.address or ray.is_initialized():
        return
    nodes = this_machine()
    problem = refusal(settings, nodes, plan(settings, nodes))
    if problem:
        raise PlacementError(problem)


def _start(
    start_engine: Callable[[Config], Engine], config: Config, group: PlacementGroup, temporary: Path | None
) -> EnginePool:
    engine, settings = config.engine, config.ray
    # An engine's own watchdog may start it again and repeat the request; other ranks' requests may be before ours.
    one_request = 2 * engine.generate_timeout_s + engine.start_timeout_s
    return EnginePool.start(
        partial(engine_in_actor, start_engine, config, Home.here()),
        settings.num_engines,
        PoolLimits(start_s=engine.start_timeout_s, generate_s=max(1, settings.num_workers) * one_request),
        cpus=settings.cpus_per_engine,
        gpus=settings.gpus_per_engine,
        placement_group=group,
        env={"TMPDIR": str(temporary)} if temporary else None,
    )
