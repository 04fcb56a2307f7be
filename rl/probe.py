"""Agreement of trainer and engine: silent mismatch is the commonest way an RL run goes wrong."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from accelerate import Accelerator

from rl.config import GRPOConfig
from rl.packed import PackedPolicy, pack
from rl.task import Task

if TYPE_CHECKING:
    from rl.grpo import ScoredGroup


class AgreementError(RuntimeError):
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
        return self.total / max(self.tokens, 1)

    def merge(self, other: Agreement) -> Agreement:
        """Of both sets of tokens."""
        return Agreement(
            self.total + other.total, max(self.largest, other.largest), self.tokens + other.tokens
        )

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
    if exact and agreement.largest <= settings.probe_tolerance:
        return
    if not exact and agreement.mean <= settings.probe_tolerance_bf16:
        return
    cause = diagnose(policy, task, scored[0], settings.temperature) if scored else "see the other ranks"
    raise AgreementError(
        f"trainer and engine disagree on {agreement.tokens} sampled tokens: mean |difference| {agreement.mean:.2e}, "
        f"largest {agreement.largest:.2e} (accepted: "
        f"{f'largest {settings.probe_tolerance:g}' if exact else f'mean {settings.probe_tolerance_bf16:g}'}). {cause}"
    )


@torch.no_grad()
def diagnose(policy: PackedPolicy, task: Task, scored: ScoredGroup, temperature: float) -> str:
    """Try one change at a time and name the one that explains the engine's figures."""
    group = scored.group
    completions = [[r.token_ids for r in group.rollouts]]
    batch = pack(task.tree([group.prompt], completions), task.builder.video_pad).to(policy.device)
    engine = torch.zeros(batch.mask_N_T.shape)
    for row, rollout in enumerate(group.rollouts):
        engine[row, : len(rollout.logps)] = torch.tensor(rollout.logps)

    def difference(temperature: float = temperature, flat_positions: bool = False) -> float:
        tried = batch
        if flat_positions:
            flat = pack(task.tree([group.prompt], completions, flat_positions=True), task.builder.video_pad)
            tried = flat.to(policy.device)
        logps, _ = policy(tried, temperature)
        return measure_agreement(logps.cpu(), engine, batch.mask_N_T.cpu()).mean

    here = difference()
    with policy.model.disable_adapter():
        without_adapter = difference()
    explanations = {
        "adapter: the engine's figures are those of the base model without it": without_adapter,
        "temperature: the engine's figures are those of temperature 1": difference(1.0),
        "positions: the engine's figures are those of visual tokens placed like text": difference(
            flat_positions=True
        ),
    }
    best = min(explanations, key=explanations.__getitem__)
    if explanations[best] < here / 10:
        return f"Look at the {best}."
    return (
        "Adapter, temperature and positions do not explain it: look at the embeddings "
        "(was the cache made with this model and view?)."
    )
