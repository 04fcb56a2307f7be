"""A small job under `rl.launch`, run as a program of its own by `test_launch.py`: real Ray, stand-in model.

python ray_job.py MODE RUN_DIR [key=value ...]
"""

from __future__ import annotations

import sys
import time
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object

from rl.config import Config, load_config
from rl.ranks import Job
from rl.stage_inputs import Inputs
from rl.stages import Stage
from rl.training import OnMetrics
from rollouts.types import Engine, Group, Prompt, Rollout, Sampling, VolumeFeatures

MODE = sys.argv[1]


class StandIn:
    """Answers with the last token of the question."""

    def generate(self, prompts: list[Prompt], n: int, sampling: Sampling, seeds: list[int]) -> list[Group]:
        return [Group(p, (Rollout((p.question_ids[-1],), (0.0,), "", "stop", 0),) * n) for p in prompts]

    def load_adapter(self, folder: Path | None) -> int:
        return 1

    def close(self) -> None:
        pass


def start_engine(config: Config) -> Engine:
    if MODE == "slow_engine":
        print("loading", flush=True)
        time.sleep(1000)
    if MODE == "broken_engine":
        raise RuntimeError("no weights in this folder")
    return StandIn()


def train(config: Config, engine: Engine, accelerator: Accelerator, on_metrics: OnMetrics) -> None:
    """The shape of `train_grpo`: every rank generates, gradients are averaged, rank 0 publishes."""
    rank = accelerator.process_index
    model, weights = torch.nn.Linear(1, 1, bias=False), Path(config.run_dir) / "grpo" / "weight"
    model = accelerator.prepare(model)
    first = int(weights.read_text()) if weights.exists() else 0
    print(
        f"starting at step {first} with {accelerator.num_processes} ranks, {torch.get_num_threads()} threads"
    )
    for step in range(first, config.grpo.max_steps):
        features = VolumeFeatures(f"v{rank}", torch.ones(2, 2), (1, 2, 2), 1.0)
        prompts = [Prompt(f"v{rank}_{q}", features, (1, 1), (q,)) for q in range(2)]
        groups = engine.generate(prompts, 2, Sampling(), [0, 1])
        versions = {r.adapter_version for g in groups for r in g.rollouts}
        model.zero_grad()
        accelerator.backward(model(torch.full((1, 1), float(rank))).sum())
        gradient = float(next(model.parameters()).grad)
        everyone = gather_object([(rank, sorted(versions), gradient)])
        if MODE == "fail" and rank == 1:
            raise ValueError("rank one does not like its rewards")
        if MODE == "hang":
            time.sleep(1000)
        if accelerator.is_main_process:
            print(f"ranks {everyone}")
            engine.load_adapter(Path(config.run_dir))
            weights.parent.mkdir(parents=True, exist_ok=True)
            weights.write_text(str(step + 1))
            on_metrics(
                {
                    "step": step + 1,
                    "steps": config.grpo.max_steps,
                    "reward": 0.5,
                    "reward_above_prior": 0.2,
                    "reward/box_iou": 0.25,
                }
            )
        accelerator.wait_for_everyone()
        if MODE == "slow_step":
            time.sleep(1000)


if __name__ == "__main__":
    from rl.launch import (
        launch,  # not needed, and slow to import, in the processes that unpickle what is above
    )

    run_dir = Path(sys.argv[2])
    settings = [f"run_dir={run_dir}", f"data.root={run_dir}", "model.device=cpu", "grpo.max_steps=2"]
    settings += ["ray.num_workers=2", "ray.cpus_per_worker=0.5", "ray.cpus_per_engine=1", *sys.argv[3:]]
    job = Job(start_engine=start_engine, train=train)
    stage = Stage("grpo", "GRPO", inputs=lambda config: Inputs({}, {}), results=lambda config: [])
    sys.exit(launch(load_config(None, settings), job=job, stage=stage, check=lambda config: None))
