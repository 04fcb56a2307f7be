"""What SFT and GRPO share: optimizer and schedule, step records, checkpoints."""

from __future__ import annotations

import json
import math
import shutil
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch.optim import AdamW, Optimizer
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.tensorboard import SummaryWriter

from rewards.errors import ReasonKneeError
from rl.config import Config, save_config
from rl.environment import write_environment
from rl.errors import write_atomically, writing
from rl.model import save_adapter
from rl.packed import PackedPolicy

OPTIMIZER = "optimizer.safetensors"

OnMetrics = Callable[[dict[str, float]], None]
"""Called with each step's record."""


class DivergedError(ReasonKneeError, FloatingPointError):
    """A loss, gradient or weight is no longer a finite number."""


class CheckpointError(ReasonKneeError, ValueError):
    """A checkpoint cannot be gone on from; the message names it and the remedy."""


def make_optimizer(
    parameters: Iterable[torch.nn.Parameter], learning_rate: float, weight_decay: float
) -> Optimizer:
    """AdamW as the paper's baseline uses it; one pass over each parameter and its moments instead of a dozen."""
    return AdamW(list(parameters), lr=learning_rate, weight_decay=weight_decay, fused=True)


def make_schedule(optimizer: Optimizer, kind: str, warmup_steps: int, steps: int) -> LambdaLR:
    """Linear warm-up to the optimizer's rate; then it stays ("constant_with_warmup") or falls to 0 at `steps`
    ("linear").

    As in transformers' `get_scheduler`, but the first step has a rate above 0 already: a run of GRPO has few.
    """

    def factor(step: int) -> float:
        if step < warmup_steps:
            return (step + 1) / warmup_steps
        falling = max(0, steps - step) / max(1, steps - warmup_steps)  # all of it may be warm-up
        return 1.0 if kind == "constant_with_warmup" else falling

    return LambdaLR(optimizer, factor)


def clip_gradients(
    parameters: Sequence[torch.nn.Parameter], max_norm: float, accelerator: Accelerator | None = None
) -> float:
    """Add up the gradients of all ranks, then scale them to at most `max_norm`. Returns their norm before.

    The sum is one explicit reduction per optimizer step. A data-parallel wrapper counts on every rank running the
    same forwards: here ranks differ in their number of micro-batches, one may have none, and the wrapper would
    wait for ever. A parameter without a gradient counts as zero.

    Raises:
        DivergedError: the norm is NaN or infinite; no weight has moved yet.
    """
    for parameter in parameters:
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
    if accelerator is not None and accelerator.num_processes > 1:
        grads = [p.grad for p in parameters if p.grad is not None]
        flat = accelerator.reduce(torch.cat([g.flatten() for g in grads]), reduction="sum")
        for grad, total in zip(grads, flat.split([g.numel() for g in grads]), strict=True):
            grad.copy_(total.view_as(grad))
    norm = float(torch.nn.utils.clip_grad_norm_(parameters, max_norm))
    if not math.isfinite(norm):
        raise DivergedError(f"the gradient's norm is {norm}; lower the learning rate or check the rewards")
    return norm


class RunFolder:
    """One stage's outputs: resolved config, environment, metrics.jsonl, TensorBoard, checkpoints."""

    def __init__(self, config: Config, stage: str) -> None:
        self.path = Path(config.run_dir) / stage
        self.path.mkdir(parents=True, exist_ok=True)
        save_config(config, self.path / "config.yaml")
        write_environment(self.path, config.seed)
        self._board = SummaryWriter(str(self.path / "tensorboard"))

    def log(self, record: dict[str, float]) -> None:
        """Append a step's record to metrics.jsonl and TensorBoard. Non-finite values are refused.

        Raises:
            DivergedError: a value is NaN or infinite; the message names it.
        """
        bad = {k: v for k, v in record.items() if not math.isfinite(v)}
        if bad:
            raise DivergedError(
                f"step {record.get('step')}: {bad}; lower the learning rate or check the rewards"
            )
        with (self.path / "metrics.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")
        for name, value in record.items():
            if name != "step":
                self._board.add_scalar(name, value, int(record["step"]))

    def keep_metrics_until(self, step: int) -> None:
        """Drop the records of steps after `step`: they are run again."""
        path = self.path / "metrics.jsonl"
        if path.exists():
            lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
            kept = [line for line in lines if _step_of(line) <= step]
            if len(kept) < len(lines):
                write_atomically(path, "".join(kept))

    def close(self) -> None:
        """Flush TensorBoard."""
        self._board.close()


def _step_of(line: str) -> float:
    try:
        return float(json.loads(line)["step"])
    except json.JSONDecodeError:  # cut off when the run was killed
        return math.inf


def save_checkpoint(
    folder: Path,
    step: int,
    policy: PackedPolicy,
    optimizer: Optimizer,
    schedule: LambdaLR,
    extra: dict[str, Any],
) -> Path:
    """`folder/step-N` with adapter, optimizer and schedule; older checkpoints are removed once it is complete.

    Tensors as safetensors, everything else in `state.json`.

    Raises:
        WriteError: the disk is full, say; the former checkpoint stays.
    """
    folder.mkdir(parents=True, exist_ok=True)
    target, staging = folder / f"step-{step:06d}", folder / ".staging"
    shutil.rmtree(staging, ignore_errors=True)
    staging.mkdir()
    save_adapter(policy, staging / "adapter")
    saved = optimizer.state_dict()
    moments = {f"{i}.{name}": x for i, state in saved["state"].items() for name, x in state.items()}
    numbers = {"param_groups": saved["param_groups"], "schedule": schedule.state_dict()}
    with writing(target):
        save_file(moments, staging / OPTIMIZER)
        (staging / "state.json").write_text(json.dumps({"step": step, **extra, **numbers}), encoding="utf-8")
        shutil.rmtree(target, ignore_errors=True)
        staging.rename(target)
    for other in folder.glob("step-*"):
        if other != target:
            shutil.rmtree(other)
    return target


def last_checkpoint(folder: Path) -> Path | None:
    """The newest complete checkpoint, if any."""
    return max(folder.glob("step-*"), default=None)


def load_optimizer(checkpoint: Path, optimizer: Optimizer, schedule: LambdaLR) -> dict[str, Any]:
    """Restore optimizer and schedule; returns the checkpoint's state (`step` and extras).

    Raises:
        CheckpointError: files that are missing or damaged.
    """
    moments: dict[int, dict[str, torch.Tensor]] = {}
    try:
        saved: dict[str, Any] = json.loads((checkpoint / "state.json").read_text(encoding="utf-8"))
        for key, x in load_file(checkpoint / OPTIMIZER).items():
            parameter, name = key.split(".")
            moments.setdefault(int(parameter), {})[name] = x
        optimizer.load_state_dict({"state": moments, "param_groups": saved["param_groups"]})
        schedule.load_state_dict(saved["schedule"])
    except (FileNotFoundError, ValueError, TypeError, KeyError, SafetensorError) as error:
        raise CheckpointError(
            f"checkpoint {checkpoint} cannot be used ({error}); delete it, and this stage starts from its beginning"
        ) from error
    return saved


class Stopwatch:
    """Seconds spent in named parts of a step."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._since = time.perf_counter()

    def lap(self, name: str) -> None:
        """Book the time since the last lap (or the start) under `name`."""
        now = time.perf_counter()
        self.seconds[name] = self.seconds.get(name, 0.0) + now - self._since
        self._since = now
