"""What runs in the processes that `rl.launch` starts: the engine of an actor, the loop of a rank.

Apart from `rl.launch`, so that these processes import no more than they need.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from rl.config import Config, ConfigError
from rl.environment import pick_device
from rl.one_install import check_one_install
from rl.quiet import quiet_bars
from rl.terminal import connected_to
from rollouts.actor import EngineLocation
from rollouts.pool import EnginePool
from rollouts.types import Engine


@dataclass(frozen=True)
class Job:
    """What runs on the cluster. Functions are sent by name, so they must be importable on every node."""

    start_engine: Callable[[Config], Engine]
    """Returns an engine that is ready; called in each engine's actor."""
    train: Callable[..., Any]
    """`train(config, engine, accelerator, on_metrics)`, called on every rank."""


@dataclass(frozen=True)
class Home:
    """The driver's working directory and install, which every process must share."""

    folder: Path
    packages: Path

    @classmethod
    def here(cls) -> Home:
        return cls(Path.cwd(), check_one_install())

    def enter(self) -> None:
        """Check the install; go to the folder where this node has it, so that relative paths mean the same."""
        found = check_one_install()
        if found != self.packages:
            raise ConfigError(
                f"the packages are imported from {found} here and from {self.packages} on the driver"
            )
        if self.folder.is_dir():
            os.chdir(self.folder)


def engine_in_actor(start_engine: Callable[[Config], Engine], config: Config, home: Home) -> Engine:
    """The engine of one actor."""
    home.enter()
    return start_engine(on_device(config, config.ray.gpus_per_engine))


@dataclass(frozen=True)
class RankSettings:
    """What `rank_loop` is given under the key "settings"."""

    job: Job
    config: Config
    pool: EnginePool
    terminal: Any
    home: Home


def rank_loop(train_loop_config: dict[str, RankSettings]) -> None:
    """The loop of one training worker, as Ray Train calls it."""
    import ray.train  # seconds of imports that the process of an engine does without
    from accelerate import Accelerator

    given = train_loop_config["settings"]
    context = ray.train.get_context()
    with connected_to(given.terminal, context.get_world_rank()) as show:
        given.home.enter()
        quiet_bars()
        config, pool = on_device(given.config, given.config.ray.gpus_per_worker), given.pool
        if config.ray.placement == "colocate":
            gpus = tuple(int(gpu) for gpu in ray.get_gpu_ids())
            pool = pool.beside(
                EngineLocation(ray.get_runtime_context().get_node_id(), gpus), context.get_local_rank()
            )
        accelerator = Accelerator(cpu=pick_device(config.model.device).type == "cpu")
        given.job.train(config, pool, accelerator, show)


def on_device(config: Config, gpus: float) -> Config:
    """The config for a process with this share of GPUs: without one, `auto` must not find another's."""
    return config if gpus else replace(config, model=replace(config.model, device="cpu"))
