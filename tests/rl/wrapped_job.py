"""Gradients of a packed policy inside accelerate's data-parallel wrapper, run by `test_ranks.py` under torchrun.

python -m torch.distributed.run --nproc-per-node 2 wrapped_job.py FOLDER
"""

from __future__ import annotations

import sys
from contextlib import nullcontext
from pathlib import Path

import torch

import rl  # noqa: F401  isort: skip  (before peft imports torchvision)
from accelerate import Accelerator
from safetensors.torch import save_file
from test_packed import random_forest, small_model

from rl.packed import PackedPolicy, pack

FOREST = [[[3, 2], [4]], [[5]], [[1, 2, 3]]]
"""Completion lengths by volume and question; a volume is a micro-batch, so that two ranks have two and one."""


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    accelerator = Accelerator(cpu=True)
    policy = PackedPolicy(small_model())
    wrapped = accelerator.prepare(policy)
    ranks, rank = accelerator.num_processes, accelerator.process_index
    roots = random_forest(policy, FOREST)[rank::ranks]
    for root in roots:
        with nullcontext() if root is roots[-1] else accelerator.no_sync(wrapped):
            logps_N_T, _ = wrapped(pack([root], policy.causal_lm.config.video_token_id))
            accelerator.backward(logps_N_T.sum())
    if accelerator.is_main_process:  # the wrapper averages over ranks
        gradients = {n: p.grad * ranks for n, p in policy.named_parameters() if p.grad is not None}
        save_file(gradients, folder / f"gradients-{ranks}.safetensors")
    # The wrapper must not outlive the process group, which its destructor would then end without releasing the GIL
    # that the thread of gloo may wait for.
    del wrapped, logps_N_T
    accelerator.free_memory()
    accelerator.end_training()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
