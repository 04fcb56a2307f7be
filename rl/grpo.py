"""GRPO (arXiv 2402.03300) over cached volumes. One step, top to bottom:

    draw volumes and questions (grades balanced)  ->  G completions each from the engine
    -> rewards per component -> advantages within the group -> packed forward and clipped loss
    -> adapter update -> the engine swaps to the new adapter

Departures from the textbook:
- A volume's tokens are computed once per micro-batch, a question's once per group (`rl.packed`).
- The batch is on-policy, so the old log-probabilities are the new ones, detached; they are kept only when
  `num_iterations` > 1.
- Groups whose rewards are all equal have advantage 0. Without a KL term their gradient is exactly 0, so they are
  counted but not computed (except under "bnpo", whose normaliser is the tokens that were computed).
- Ranks share no data-parallel wrapper: each adds up its own gradients, one reduction per optimizer step sums them
  (`rl.training.clip_gradients`).
- Every batch is an agreement probe: the trainer's log-probabilities of fresh rollouts are compared with the
  engine's before the weights move (`rl.probe`).
- With `overlap` the rollouts come from the weights of one update ago (`rl.generation`): each token's gradient is
  multiplied by its truncated importance ratio, and the probe puts those weights back to compare.
"""

from __future__ import annotations

import json
import math
import time
from dataclasses import dataclass, fields
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list, gather_object

from rl.completions import (
    ScoredGroup,
    completion_records,
    completion_table,
    microbatches,
    packed_advantages,
    reward_metrics,
    write_completions,
)
from rl.config import Config, ConfigError
from rl.errors import write_atomically
from rl.generation import Answered, Generation
from rl.loss import LossInputs, LossSettings, StepTotals, grpo_loss
from rl.model import disable_dropout, load_policy, reference_adapter, save_adapter, trainable, weights_of
from rl.packed import PackedBatch, pack
from rl.probe import Agreement, measure_agreement, require_agreement, sampler_logps
from rl.scoring import Scorer
from rl.task import Task
from rl.training import (
    OnMetrics,
    RunFolder,
    Stopwatch,
    clip_gradients,
    last_checkpoint,
    load_optimizer,
    make_optimizer,
    make_schedule,
    save_checkpoint,
)
from rl.validation import Best, Validation
from rollouts.types import Engine

PER_TOKEN = {
    "entropy": "entropy",
    "kl": "kl",
    "clip_ratio": "clipped",
    "importance_ratio": "importance",
    "importance_capped": "capped",
}
"""Metrics that are means over the tokens of the loss, and the sums they are made from."""


@dataclass
class MicroBatch:
    """Groups that are computed together, and what must be remembered of them between iterations."""

    batch: PackedBatch
    advantages_N_T: torch.Tensor
    mask_N_T: torch.Tensor
    sampler_logps_N_T: torch.Tensor
    old_logps_N_T: torch.Tensor | None = None
    ref_logps_N_T: torch.Tensor | None = None


def train_grpo(
    config: Config, engine: Engine, accelerator: Accelerator, on_metrics: OnMetrics = lambda record: None
) -> Path:
    """Run GRPO on every rank; continues from the last checkpoint.

    Each rank asks the engine about its share of the step's volumes. Rank 0 writes the run folder and publishes
    each new adapter to the engine.

    Returns:
        The folder of the trained adapter, `<run_dir>/grpo/adapter`.
    """
    trainer = GRPOTrainer(config, engine, accelerator)
    for step in range(trainer.first_step, config.grpo.max_steps):
        record = trainer.step(step)
        if accelerator.is_main_process:
            on_metrics({**record, "steps": config.grpo.max_steps})
    return trainer.finish()


class GRPOTrainer:
    """State of a run: policy, optimizer, engine, task."""

    def __init__(self, config: Config, engine: Engine, accelerator: Accelerator) -> None:
        self.config, self.settings, self.engine, self.accelerator = config, config.grpo, engine, accelerator
        self.run = RunFolder(config, "grpo") if accelerator.is_main_process else None
        self.folder = Path(config.run_dir) / "grpo"
        self.task = Task(config, "train")
        self.scorer = Scorer(config, self.task)
        self.validation = Validation(config) if self.settings.eval_steps else None
        self.generation = Generation(config, self.task, engine, accelerator)
        self._behind: list[torch.Tensor] | None = None
        """Trainable weights that sampled the coming step's rollouts, where they are not the present ones."""
        checkpoint = last_checkpoint(self.folder / "checkpoints")
        sft_adapter = Path(self.settings.init_adapter or Path(config.run_dir) / "sft" / "adapter")
        if not sft_adapter.is_dir():
            raise ConfigError(f"grpo.init_adapter: {sft_adapter} does not exist; run `reasonknee sft` first")
        self.policy = load_policy(
            config,
            checkpoint / "adapter" if checkpoint else sft_adapter,
            reference=sft_adapter if self.settings.beta else None,
        )
        disable_dropout(self.policy)
        self.optimizer = make_optimizer(
            trainable(self.policy), self.settings.learning_rate, self.settings.weight_decay
        )
        self.schedule = make_schedule(
            self.optimizer,
            self.settings.lr_scheduler_type,
            self.settings.warmup_steps,
            self.settings.max_steps,
        )
        state = load_optimizer(checkpoint, self.optimizer, self.schedule) if checkpoint else {}
        self.first_step = int(state.get("step", 0))
        self.scorer.schedules.set(state.get("schedules", {}))
        self.best = Best(self.folder / "best", config.compare.primary_endpoint, goes_on=bool(checkpoint))
        if self.run:
            # without a checkpoint also the validation of the start is run again
            self.run.keep_metrics_until(self.first_step or -1)
        self._publish()
        if self.first_step == 0 and self.validation:
            start = self._validate(self.validation, 0)
            if self.run:
                self.run.log({"step": 0, **start})

    def step(self, step: int) -> dict[str, float]:
        """One optimizer step. Returns its record (on rank 0; empty elsewhere)."""
        watch = Stopwatch()
        done = step + 1
        last = done == self.settings.max_steps
        every = self.settings.eval_steps
        validation = self.validation if every and (last or done % every == 0) else None
        scored, counts = self._scored_groups(step, watch)
        behind, self._behind = self._behind, None
        if self.settings.overlap and not last:
            self._draw_ahead(done)
            watch.lap("seconds/sync")
        lr = float(self.schedule.get_last_lr()[0])
        sums, agreement = self._update(scored, behind)
        self.schedule.step()
        watch.lap("seconds/train")
        if not self.settings.overlap or validation or last:
            self._publish()
            watch.lap("seconds/sync")
        record = self._record(step, scored, {**sums, "lr": lr, **counts}, agreement, watch)
        self._move_schedules(record)
        if validation:
            record |= self._validate(validation, done)
        if self.run:
            self.run.log(record)
            if done % self.settings.save_steps == 0 or last:
                extra = {"schedules": self.scorer.schedules.values}
                checkpoints = self.folder / "checkpoints"
                save_checkpoint(checkpoints, done, self.policy, self.optimizer, self.schedule, extra)
        return record

    def finish(self) -> Path:
        """Close the logs and threads. Returns the adapter folder: the best adapter by validation, else the last."""
        if self.run:
            if self.best.state:
                self.best.restore(self.folder / "adapter")
                write_atomically(
                    self.folder / "summary.json", json.dumps({"best": self.best.state}, indent=2)
                )
            self.run.close()
        self.generation.finish()
        self.accelerator.wait_for_everyone()
        return self.folder / "adapter"

    def _scored_groups(self, step: int, watch: Stopwatch) -> tuple[list[ScoredGroup], dict[str, int]]:
        """This rank's groups of the step; how many it has drawn for it, and how many it has replaced.

        With `resample_rounds`, groups without signal make room for other questions (dynamic sampling: DAPO, arXiv
        2503.14476, section 3.2); those for which there was none in time stay.
        """
        settings = self.settings
        scored = self._score(self.generation.draw(step, settings.volumes_per_step), watch)
        drawn, replaced, resampled = len(scored), 0, False
        for again in range(1, settings.resample_rounds + 1):
            everywhere = gather_object([{s.example_index: s.has_signal for s in scored}])
            missing = [list(of_rank.values()).count(False) for of_rank in everywhere]
            if not any(missing):
                break
            volumes = [math.ceil(groups / settings.questions_per_volume) for groups in missing]
            more = self._score(self.generation.draw_again(step, volumes, again), watch)
            flat, seen = [s for s in scored if not s.has_signal], set().union(*everywhere)
            fresh = [s for s in more if s.has_signal and s.example_index not in seen][: len(flat)]
            drawn, replaced, resampled = drawn + len(more), replaced + len(fresh), True
            scored = [s for s in scored if s.has_signal] + fresh + flat[len(fresh) :]
            scored.sort(key=lambda s: self.task.volume_ids[s.example_index])
        if resampled and settings.scale_rewards == "batch":
            # on every rank: by the spread of what all have kept
            scored = self.scorer.score([(s.example_index, s.group) for s in scored])
            watch.lap("seconds/reward")
        return scored, {"drawn": drawn, "replaced": replaced}

    def _score(self, groups: Answered, watch: Stopwatch) -> list[ScoredGroup]:
        watch.lap("seconds/rollout")
        scored = self.scorer.score(groups)
        watch.lap("seconds/reward")
        return scored

    def _draw_ahead(self, step: int) -> None:
        """Let the engine answer a later step's questions with the present weights, which are remembered."""
        self._publish()
        self._behind = [p.detach().clone() for p in trainable(self.policy)]
        self.generation.draw_ahead(step)

    def _update(
        self, scored: list[ScoredGroup], behind: list[torch.Tensor] | None = None
    ) -> tuple[dict[str, float], Agreement]:
        """All optimizer passes over the step's rollouts. Returns metric sums over this rank's tokens.

        Args:
            behind: the trainable weights that sampled the rollouts; None: the present ones.
        """
        shared = {field.name: getattr(self.settings, field.name) for field in fields(LossSettings)}
        loss_settings = LossSettings(**shared)
        skips = not self.settings.beta and self.settings.loss_type != "bnpo"
        counted = [s for s in scored if s.has_signal or not skips]
        # without any signal one group is still computed: the engine is to be probed in every step
        parts = microbatches(counted or scored[:1], self.settings.max_tokens_per_microbatch)
        batches = [self._pack(part) for part in parts]
        totals = self._totals(scored, len(batches))
        agreement = Agreement.none()
        for iteration in range(self.settings.num_iterations):
            sums: dict[str, float] = {"loss": 0.0, "entropy": 0.0, "tokens": 0.0}
            self.optimizer.zero_grad()
            for batch in batches:
                loss, metrics, seen = self._forward(batch, loss_settings, totals)
                torch.autograd.backward(loss)
                for name, value in metrics.items():
                    sums[name] = sums.get(name, 0.0) + value
                if iteration == 0 and behind is None:
                    agreement = agreement.merge(seen)
            if iteration == 0:  # before the weights move
                with weights_of(self.policy, behind):
                    if behind is not None:
                        agreement = self._agreement(batches[:1])
                    agreement = agreement.over_ranks(self.accelerator)
                    require_agreement(agreement, self.settings, self.policy, self.task, scored)
            sums["grad_norm"] = clip_gradients(
                trainable(self.policy), self.settings.max_grad_norm, self.accelerator
            )
            self.optimizer.step()
        return sums, agreement

    def _forward(
        self, micro: MicroBatch, settings: LossSettings, totals: StepTotals
    ) -> tuple[torch.Tensor, dict[str, float], Agreement]:
        """Loss, metric sums over tokens, and agreement with the engine of one micro-batch."""
        if settings.beta and micro.ref_logps_N_T is None:
            with torch.no_grad(), reference_adapter(self.policy):
                micro.ref_logps_N_T, _ = self.policy(micro.batch, self.settings.temperature)
        logps_N_T, entropies_N_T = self.policy(micro.batch, self.settings.temperature)
        if self.settings.num_iterations > 1 and micro.old_logps_N_T is None:
            micro.old_logps_N_T = logps_N_T.detach()
        inputs = LossInputs(
            logps_N_T=logps_N_T,
            advantages_N_T=micro.advantages_N_T,
            mask_N_T=micro.mask_N_T,
            old_logps_N_T=micro.old_logps_N_T,
            ref_logps_N_T=micro.ref_logps_N_T,
            sampler_logps_N_T=micro.sampler_logps_N_T if self._corrects_importance else None,
        )
        loss, metrics = grpo_loss(inputs, settings, totals)
        metrics |= {
            "loss": float(loss.detach()),
            "entropy": float((entropies_N_T * micro.mask_N_T).sum()),
            "tokens": float(micro.mask_N_T.sum()),
        }
        seen = measure_agreement(logps_N_T.detach(), micro.sampler_logps_N_T, micro.batch.mask_N_T)
        return loss, metrics, seen

    @torch.no_grad()
    def _agreement(self, batches: list[MicroBatch]) -> Agreement:
        agreement = Agreement.none()
        for micro in batches:
            logps_N_T, _ = self.policy(micro.batch, self.settings.temperature)
            agreement = agreement.merge(
                measure_agreement(logps_N_T, micro.sampler_logps_N_T, micro.batch.mask_N_T)
            )
        return agreement

    @property
    def _corrects_importance(self) -> bool:
        choice = self.settings.importance_correction
        differs = self.settings.overlap or self.policy.language_model.dtype != torch.float32
        return choice == "token_truncate" or (choice == "auto" and differs)

    def _pack(self, scored: list[ScoredGroup]) -> MicroBatch:
        rollouts = [r for s in scored for r in s.group.rollouts]
        roots = self.task.tree(
            [s.group.prompt for s in scored], [[r.token_ids for r in s.group.rollouts] for s in scored]
        )
        device = self.accelerator.device
        batch = pack(roots, self.task.builder.video_pad).to(device)
        counts_N = torch.tensor([self._counts(r.finish_reason) for r in rollouts], device=device)
        return MicroBatch(
            batch=batch,
            advantages_N_T=packed_advantages(scored).to(device),
            mask_N_T=batch.mask_N_T & counts_N[:, None],
            sampler_logps_N_T=sampler_logps(rollouts, batch),
        )

    def _counts(self, finish_reason: str) -> bool:
        """Whether a completion is part of the loss."""
        return finish_reason == "stop" or not self.settings.mask_truncated_completions

    def _totals(self, scored: list[ScoredGroup], batches: int) -> StepTotals:
        rollouts = [r for s in scored for r in s.group.rollouts]
        tokens = sum(len(r.token_ids) for r in rollouts if self._counts(r.finish_reason))
        local = torch.tensor([len(rollouts), tokens, batches], device=self.accelerator.device)
        return StepTotals(*self.accelerator.reduce(local, reduction="sum").tolist())

    def _move_schedules(self, record: dict[str, float]) -> None:
        """Raise what the step's scores raise, on every rank."""
        if self.scorer.schedules.values:
            values = [self.scorer.schedules.after_step(record)]  # rank 0 alone has the record
            broadcast_object_list(values)
            self.scorer.schedules.set(values[0])

    def _validate(self, validation: Validation, step: int) -> dict[str, float]:
        """The benchmark's measures on the validation questions (rank 0); the adapter is kept if it is the best."""
        started = time.perf_counter()
        measures = validation.run(self.engine, self.accelerator)
        if not self.run:
            return {}
        self.best.offer(step, measures, self.folder / "adapter")
        return {**measures, "seconds/validation": time.perf_counter() - started}

    def _publish(self) -> None:
        """Give the engine the new adapter; no rank goes on before the engine answers with it."""
        self.generation.wait()
        self.accelerator.wait_for_everyone()
        if self.accelerator.is_main_process:
            save_adapter(self.policy, self.folder / "adapter")
            self.engine.load_adapter(self.folder / "adapter")
        self.accelerator.wait_for_everyone()

    def _record(
        self,
        step: int,
        scored: list[ScoredGroup],
        sums: dict[str, float],
        agreement: Agreement,
        watch: Stopwatch,
    ) -> dict[str, float]:
        """Means over all ranks; rank 0 also writes the completions."""
        records = gather_object(completion_records(step + 1, scored, self.task))
        hit_rates: list[float | None] = gather_object(
            [r.prefix_hit_rate for s in scored for r in s.group.rollouts]
        )
        all_sums: list[dict[str, float]] = gather_object([sums])
        if not self.accelerator.is_main_process:
            return {}
        table = completion_table(records, self.scorer.suite.names)
        write_completions(self.folder / "completions" / f"step-{step + 1:06d}.parquet", table)
        record: dict[str, float] = {"step": step + 1, "time": time.time(), **reward_metrics(table)}
        record |= {f"schedule/{name}": value for name, value in self.scorer.schedules.values.items()}
        record["loss"] = sum(s["loss"] for s in all_sums)
        record |= {"grad_norm": sums["grad_norm"], "lr": sums["lr"]}
        if self.settings.resample_rounds:
            record |= {f"groups_{name}": sum(s[name] for s in all_sums) for name in ("drawn", "replaced")}
        tokens = max(1.0, sum(s["tokens"] for s in all_sums))
        for name, key in PER_TOKEN.items():
            if any(key in s for s in all_sums):
                record[name] = sum(s.get(key, 0.0) for s in all_sums) / tokens
        known = [rate for rate in hit_rates if rate is not None]
        if known:
            record["prefix_hit_rate"] = sum(known) / len(known)
        record |= {"agreement/max": agreement.largest, "agreement/mean": agreement.mean, **watch.seconds}
        record["seconds"] = sum(watch.seconds.values())
        return record
