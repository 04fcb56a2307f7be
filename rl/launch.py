"""GRPO under Ray: `reasonknee launch`.

    connect (or start a local cluster)  ->  every node has the same install?  ->  placement, with a timeout
    -> reserve, start the engines (actors of `rollouts.pool`)  ->  Ray Train runs `train_grpo` on every rank
    -> whatever happens: end the engines, give the reservation back, end the local cluster

Learned by running Ray 2.60: Ray Train waits for ever for workers that do not fit, unless its retries of the start
are turned off; it reports a failure without the traceback and among messages of its own, so that ranks send theirs
themselves (`rl.terminal`); it changes the working directory; Ctrl-C during `fit` ends in SystemExit.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import ray
from ray.train import (
    ControllerError,
    FailureConfig,
    LoggingConfig,
    RunConfig,
    ScalingConfig,
    TrainingFailedError,
    WorkerGroupError,
)
from ray.train.torch import TorchConfig, TorchTrainer
from rich.console import Console

from rl.cluster import bundle, cluster, cluster_nodes, ignore_signals, interruptible, take_signals
from rl.config import Config, RayConfig
from rl.data.check import require_best_convention
from rl.engine import start_ready_engine
from rl.errors import expected_errors, in_words
from rl.grpo import train_grpo
from rl.pipeline import require_sft, show_grpo
from rl.placement import PlacementError, check_shares, placement_table, plan, refusal, requested, this_machine
from rl.pool import engine_pool, refuse_what_never_fits
from rl.progress import StageProgress
from rl.ranks import Home, Job, RankSettings, rank_loop
from rl.stages import STAGES, Stage, run_stage
from rl.terminal import Failure, Viewer, open_terminal
from rollouts.pool import EnginePool
from rollouts.types import EngineError

OK, FAILED, REFUSED, INTERRUPTED = 0, 1, 2, 130
"""Exit codes: done; the job failed; bad config or placement; Ctrl-C or SIGTERM."""


GRPO = Job(start_engine=start_ready_engine, train=train_grpo)


def check_inputs(config: Config) -> None:
    """What can be refused before a cluster is started: no SFT adapter, boxes read in the wrong convention."""
    require_sft(config)
    require_best_convention(config)


class JobError(RuntimeError):
    """The job itself failed; the message begins with its own error."""


def launch(
    config: Config,
    dry_run: bool = False,
    *,
    again: bool = False,
    job: Job = GRPO,
    stage: Stage = STAGES["grpo"],
    check: Callable[[Config], None] = check_inputs,
) -> int:
    """Run GRPO on Ray; continues from the last checkpoint, whoever made it.

    Args:
        config: validated; its `ray` section says who gets what.
        dry_run: print the placement and whether the cluster can hold it, start nothing.
        again: begin anew; former results are moved to `<run_dir>/old/`.
        job: what runs on the cluster.
        stage: what is recorded as done; the same as of `reasonknee grpo`, so that either goes on with the other's run.
        check: called before anything is started.

    Returns:
        0 done (dry run: it fits); 1 the job failed (dry run: it does not fit); 2 the configuration or the placement
        cannot be had; 130 interrupted. Errors are printed.
    """
    console = Console(highlight=False)
    try:
        with interruptible():
            check_shares(config.ray)
            if dry_run:
                return _dry_run(config, console)
            refuse_what_never_fits(config.ray)
            check(config)
            if run_stage(config, replace(stage, run=partial(_run, job)), again=again) is None:
                console.print(f"{stage.title}: nothing has changed since it finished; skipped")
            return OK
    except KeyboardInterrupt:
        console.print("interrupted; everything this run started was ended")
        return INTERRUPTED
    except JobError as error:
        console.print(str(error), style="red", markup=False, soft_wrap=True)
        return FAILED
    except EngineError as error:
        console.print(f"EngineError: {error}", style="red", markup=False, soft_wrap=True)
        return FAILED
    except expected_errors() as error:
        words = in_words(error)
        if words is None:
            raise
        console.print(f"error: {words}", style="red", markup=False, soft_wrap=True)
        return REFUSED


def _dry_run(config: Config, console: Console) -> int:
    if config.ray.address:
        with cluster(config.ray):
            nodes = cluster_nodes()
            free = ray.available_resources()
    else:
        nodes, free = this_machine(), None
    seats = plan(config.ray, nodes)
    console.print(placement_table(config.ray, nodes, seats))
    if free is not None:
        console.print(f"free at the moment: {free.get('CPU', 0):g} CPUs, {free.get('GPU', 0):g} GPUs")
    problem = refusal(config.ray, nodes, seats)
    console.print(
        problem or "the cluster can hold this placement", soft_wrap=True, style="red" if problem else None
    )
    return FAILED if problem else OK


def _run(job: Job, config: Config, progress: StageProgress) -> str:
    """The job from cluster to result; everything it starts is ended on the way out."""
    with engine_pool(config, job.start_engine, progress) as (pool, temporary):
        _fit(job, config, pool, progress, temporary or (Path(config.run_dir) / "ray").resolve())
    return f"outputs in {Path(config.run_dir) / 'grpo'}"


def _fit(job: Job, config: Config, pool: EnginePool, progress: StageProgress, storage: Path) -> None:
    """Ray Train over all ranks.

    Raises:
        JobError: a rank failed.
        PlacementError: someone else took the workers' place.
        KeyboardInterrupt: Ctrl-C.
    """
    settings = config.ray
    threads = str(max(1, int(settings.cpus_per_worker)))
    terminal = open_terminal()
    trainer = TorchTrainer(
        rank_loop,
        train_loop_config={"settings": RankSettings(job, config, pool, terminal, Home.here())},
        torch_config=TorchConfig(backend="nccl" if settings.gpus_per_worker else "gloo"),
        scaling_config=ScalingConfig(
            num_workers=settings.num_workers,
            use_gpu=settings.gpus_per_worker > 0,
            resources_per_worker=bundle(settings.cpus_per_worker, settings.gpus_per_worker),
        ),
        run_config=RunConfig(
            name="grpo",
            storage_path=str(storage),
            failure_config=FailureConfig(max_failures=0, controller_failure_limit=0),
            logging_config=LoggingConfig(log_level="CRITICAL"),
            worker_runtime_env={"env_vars": {"OMP_NUM_THREADS": threads}},
        ),
    )
    viewer = Viewer(terminal, progress.log, partial(show_grpo, progress=progress))
    viewer.start()
    try:
        trainer.fit()
    except SystemExit:  # what Ray Train makes of SIGINT
        ignore_signals()
        viewer.stop()
        raise KeyboardInterrupt from None
    except TrainingFailedError as error:
        take_signals()
        raise _explained(error, viewer.stop(), settings) from error
    take_signals()
    viewer.stop()


def _explained(error: TrainingFailedError, failures: list[Failure], settings: RayConfig) -> Exception:
    """The job's own error: of the rank that failed first, else what Ray knows of a process that died."""
    if failures:
        first = failures[0]
        return JobError(
            f"{first.kind}: {first.message}\n\non rank {first.rank}:\n{first.own_traceback.rstrip()}"
        )
    if isinstance(error, WorkerGroupError):
        rank, reason = next(iter(error.worker_failures.items()))
        return JobError(f"the process of rank {rank} died: {reason}")
    if isinstance(error, ControllerError) and "startup timed out" in str(error):
        return PlacementError(
            f"the workers' place was taken while the engines loaded, and was not free again within "
            f"{settings.placement_timeout_s:g} s (ray.placement_timeout_s): requested {requested(settings)}"
        )
    return JobError(str(error))
