"""Supervised fine-tuning: the packed forward with one completion per question.

Departures from the public baseline, on purpose: loss on the whole completion and never on the prompt, each volume
encoded once and asked several questions per step, prompts drawn by the sampler that GRPO uses, validation after
each epoch with the best adapter kept.
"""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from rl.config import Config, ConfigError
from rl.errors import write_atomically
from rl.model import load_policy, save_adapter, trainable
from rl.packed import PackedPolicy, pack
from rl.task import Task
from rl.training import (
    OnMetrics,
    RunFolder,
    clip_gradients,
    last_checkpoint,
    load_optimizer,
    make_optimizer,
    make_schedule,
    save_checkpoint,
)
from rollouts.requests import group_seed

VALIDATION_STEP = 1_000_000_000
"""Sampler step the validation prompts are drawn at: the same ones after every epoch."""


@dataclass
class Progress:
    """How far training is; saved with every checkpoint."""

    epoch: int = 0
    best_epoch: int = 0
    best_loss: float = float("inf")
    seconds: float = 0.0
    """Spent in optimizer steps, validation left out."""


def train_sft(config: Config, on_metrics: OnMetrics = lambda record: None, stage: str = "sft") -> Path:
    """Train until validation stops improving; continues from the last checkpoint.

    Returns:
        The folder of the best adapter, `<run_dir>/<stage>/adapter`.
    """
    trainer = SFTTrainer(config, stage, on_metrics)
    while not trainer.finished():
        trainer.epoch()
    return trainer.finish()


class SFTTrainer:
    """State of a run: policy, optimizer, tasks, progress."""

    def __init__(self, config: Config, stage: str, on_metrics: OnMetrics) -> None:
        self.settings, self.seed, self.on_metrics = config.sft, config.seed, on_metrics
        self.run = RunFolder(config, stage)
        self.train, self.val = Task(config, "train", config.sft.train_file or None), Task(config, "val")
        self.sampler = self.train.sampler(config.seed, balance=self.settings.balance)
        self.validation = self.val.sampler(config.seed, balance=self.settings.balance).draw(
            VALIDATION_STEP, self.settings.validation_volumes, self.settings.questions_per_volume
        )
        checkpoint = last_checkpoint(self.run.path / "checkpoints")
        init = Path(self.settings.init_adapter) if self.settings.init_adapter else None
        torch.manual_seed(config.seed)
        self.policy = load_policy(config, checkpoint / "adapter" if checkpoint else init)
        self.optimizer = make_optimizer(
            trainable(self.policy), self.settings.learning_rate, self.settings.weight_decay
        )
        per_step = self.settings.volumes_per_step * self.settings.questions_per_volume
        self.epoch_steps = self.settings.steps_per_epoch or max(1, len(self.train.examples) // per_step)
        steps = self.epoch_steps * self.settings.max_epochs
        warmup = round(self.settings.warmup_ratio * steps)
        self.schedule = make_schedule(self.optimizer, self.settings.lr_scheduler_type, warmup, steps)
        self.progress = Progress()
        if checkpoint:
            state = load_optimizer(checkpoint, self.optimizer, self.schedule)
            self.progress = Progress(**{name: state[name] for name in asdict(self.progress)})
        self.run.keep_metrics_until(self.progress.epoch * self.epoch_steps)

    def finished(self) -> bool:
        """Out of epochs or patience."""
        epoch, settings = self.progress.epoch, self.settings
        return epoch >= settings.max_epochs or epoch - self.progress.best_epoch >= settings.patience

    def epoch(self) -> None:
        """Train for an epoch, validate, keep the adapter if it is the best, checkpoint."""
        progress = self.progress
        first = progress.epoch * self.epoch_steps
        for step in range(first, first + self.epoch_steps):
            started = time.perf_counter()
            volumes = self.sampler.draw(
                step, self.settings.volumes_per_step, self.settings.questions_per_volume
            )
            torch.manual_seed(group_seed(self.seed, "dropout", step))  # a step run again is the same step
            lr = float(self.schedule.get_last_lr()[0])
            loss = self._step(volumes)
            progress.seconds += time.perf_counter() - started
            self._log({"step": step + 1, "loss": loss, "lr": lr, "seconds": progress.seconds})
        progress.epoch += 1
        val_loss = mean_loss(self.policy, self.val, self.validation)
        self._log({"step": step + 1, "epoch": progress.epoch, "val_loss": val_loss})
        if val_loss < progress.best_loss:
            progress.best_loss, progress.best_epoch = val_loss, progress.epoch
            save_adapter(self.policy, self.run.path / "adapter")
        save_checkpoint(
            self.run.path / "checkpoints",
            step + 1,
            self.policy,
            self.optimizer,
            self.schedule,
            asdict(progress),
        )

    def finish(self) -> Path:
        """Write the summary; the checkpoints are no longer needed."""
        self.run.close()
        write_atomically(self.run.path / "summary.json", json.dumps(asdict(self.progress), indent=2))
        shutil.rmtree(self.run.path / "checkpoints", ignore_errors=True)
        return self.run.path / "adapter"

    def _step(self, volumes: list[list[int]]) -> float:
        """One optimizer step, one volume per forward to bound memory. Returns the mean loss per token."""
        tokens = sum(len(self.train.target_ids(i)) for questions in volumes for i in questions)
        self.optimizer.zero_grad()
        total = 0.0
        for questions in volumes:
            nll, _ = completion_nll(self.policy, self.train, questions)
            torch.autograd.backward(nll / tokens)
            total += nll.item()
        clip_gradients(trainable(self.policy), self.settings.max_grad_norm)
        self.optimizer.step()
        self.schedule.step()
        return total / tokens

    def _log(self, record: dict[str, float]) -> None:
        self.run.log(record)
        self.on_metrics({**record, "steps": self.epoch_steps * self.settings.max_epochs})


def completion_nll(policy: PackedPolicy, task: Task, indices: Sequence[int]) -> tuple[torch.Tensor, int]:
    """Summed negative log-likelihood of the training completions, and their number of tokens."""
    targets = [task.target_ids(i) for i in indices]
    prompts = [task.prompt(i, len(ids)) for i, ids in zip(indices, targets, strict=True)]
    roots = task.tree(prompts, [[ids] for ids in targets])
    batch = pack(roots, task.builder.video_pad).to(policy.device)
    logps_N_T, _ = policy(batch)
    return -logps_N_T.sum(), int(batch.mask_N_T.sum())


@torch.no_grad()
def mean_loss(policy: PackedPolicy, task: Task, volumes: list[list[int]]) -> float:
    """Mean loss per completion token over fixed prompts, without dropout."""
    policy.eval()
    total, tokens = 0.0, 0
    for questions in volumes:
        nll, count = completion_nll(policy, task, questions)
        total, tokens = total + nll.item(), tokens + count
    policy.train()
    if not tokens:
        raise ConfigError("the validation file has no question to validate on; check data.val_file")
    return total / tokens
