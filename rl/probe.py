"""Agreement of trainer and engine: silent mismatch is the commonest way an RL run goes wrong."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from accelerate import Accelerator

from rewards.errors import ReasonKneeError
from rl.completions import ScoredGroup
from rl.config import GRPOConfig
from rl.packed import PackedBatch, PackedPolicy, pack
from rl.task import Task
from rollouts.types import Group, Rollout

SAME = 1e-6
"""Mean difference of log-probabilities that is rounding."""


class AgreementError(ReasonKneeError, RuntimeError):
    """The trainer scores tokens otherwise than the engine sampled them."""


@dataclass(frozen=True)
class Agreement:
    """|trainer - engine| over the log-probabilities of sampled tokens."""

    total: float
    largest: float
    tokens: int

    @classmethod
    def none(cls) -> Agreement:
        """Nothing compared yet."""
        return cls(0.0, 0.0, 0)

    @property
    def mean(self) -> float:
        """Over the tokens compared."""
        return self.total / max(self.tokens, 1)

    def merge(self, other: Agreement) -> Agreement:
        """Of both sets of tokens; NaN stays NaN."""
        largest = float(np.maximum(self.largest, other.largest))
        return Agreement(self.total + other.total, largest, self.tokens + other.tokens)

    def over_ranks(self, accelerator: Accelerator) -> Agreement:
        """Of all ranks' tokens, so that all ranks stop together."""
        rows = accelerator.gather(
            torch.tensor([[self.total, self.largest, float(self.tokens)]], device=accelerator.device)
        )
        return Agreement(float(rows[:, 0].sum()), float(rows[:, 1].max()), int(rows[:, 2].sum()))


def measure_agreement(
    logps_N_T: torch.Tensor, sampler_logps_N_T: torch.Tensor, mask_N_T: torch.Tensor
) -> Agreement:
    """Compare two sets of log-probabilities where there is a token."""
    difference = (logps_N_T - sampler_logps_N_T).abs()[mask_N_T]
    if not len(difference):
        return Agreement.none()
    return Agreement(float(difference.sum()), float(difference.max()), len(difference))


def require_agreement(
    agreement: Agreement,
    settings: GRPOConfig,
    policy: PackedPolicy,
    task: Task,
    scored: Sequence[ScoredGroup],
) -> None:
    """Stop the run when the difference passes the tolerance.

    Float32 is held to its largest difference, bfloat16 to its mean, because its tail is heavy.

    Raises:
        AgreementError: with the likeliest cause.
    """
    exact = policy.language_model.dtype == torch.float32
    worst, limit = (
        (agreement.largest, settings.probe_tolerance)
        if exact
        else (agreement.mean, settings.probe_tolerance_bf16)
    )
    if worst <= limit:  # false for NaN
        return
    cause = diagnose(policy, task, scored, settings.temperature)
    raise AgreementError(
        f"trainer and engine disagree on {agreement.tokens} sampled tokens: mean |difference| {agreement.mean:.2e}, "
        f"largest {agreement.largest:.2e} (accepted: {'largest' if exact else 'mean'} {limit:g}). {cause}"
    )


@torch.no_grad()
def diagnose(policy: PackedPolicy, task: Task, scored: Sequence[ScoredGroup], temperature: float) -> str:
    """Try one change at a time on the group that differs most, and name the one that explains the engine's figures."""
    differences = [_difference(policy, task, s.group, temperature) for s in scored]
    here = max(differences, default=0.0)
    if here < SAME:
        return "This rank's groups agree: see the error of another rank."
    group = scored[differences.index(here)].group
    with policy.model.disable_adapter():
        without_adapter = _difference(policy, task, group, temperature)
    explanations = {
        "adapter: the engine's figures are those of the base model without it": without_adapter,
        "temperature: the engine's figures are those of temperature 1": _difference(policy, task, group, 1.0),
        "positions: the engine's figures are those of visual tokens placed like text": _difference(
            policy, task, group, temperature, flat_positions=True
        ),
    }
    best = min(explanations, key=explanations.__getitem__)
    if explanations[best] < here / 10:
        return f"Look at the {best}."
    return (
        "Adapter, temperature and positions do not explain it: look at the embeddings "
        "(was the cache made with this model and view?)."
    )


def _difference(
    policy: PackedPolicy, task: Task, group: Group, temperature: float, *, flat_positions: bool = False
) -> float:
    """Mean |trainer - engine| over one group's tokens."""
    roots = task.tree([group.prompt], [[r.token_ids for r in group.rollouts]], flat_positions=flat_positions)
    batch = pack(roots, task.builder.video_pad).to(policy.device)
    logps_N_T, _ = policy(batch, temperature)
    return measure_agreement(logps_N_T, sampler_logps(group.rollouts, batch), batch.mask_N_T).mean


def sampler_logps(rollouts: Sequence[Rollout], batch: PackedBatch) -> torch.Tensor:
    """The engine's log-probabilities in the shape of the batch's completions, [N, T]; 0 where there is no token."""
    logps_N_T = torch.zeros(batch.mask_N_T.shape)
    for row, rollout in enumerate(rollouts):
        logps_N_T[row, : len(rollout.logps)] = torch.tensor(rollout.logps)
    return logps_N_T.to(batch.mask_N_T.device)
