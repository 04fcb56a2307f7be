"""GRPO on several ranks, run by `test_ranks.py` under torchrun: a sampler on every rank, the same short runs in turn.

python -m torch.distributed.run --nproc-per-node 2 rank_job.py RECIPE FOLDER
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
from accelerate import Accelerator

from rl.config import load_config
from rl.grpo import train_grpo
from rollouts.hf_engine import HfEngine
from rollouts.types import Group, Prompt, Sampling


class PublishedEngine(HfEngine):
    """Serves what rank 0 published last, as an engine shared by all ranks would."""

    folder: Path

    def generate(self, prompts: list[Prompt], n: int, sampling: Sampling, seeds: list[int]) -> list[Group]:
        self.load_adapter(self.folder)
        return super().generate(prompts, n, sampling, seeds)


def main(recipe: Path, folder: Path) -> None:
    torch.set_num_threads(1)
    accelerator = Accelerator(cpu=True)
    engine = None
    for run, overrides in json.loads((folder / "runs.json").read_text()).items():
        config = load_config(recipe, [f"run_dir={folder / run}-{accelerator.num_processes}", *overrides])
        engine = engine or PublishedEngine(config.model.path, device="cpu", max_model_len=512)
        engine.folder = Path(config.run_dir) / "grpo" / "adapter"
        train_grpo(config, engine, accelerator)
    accelerator.end_training()


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
