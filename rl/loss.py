"""The clipped policy loss: a pure function from log-probabilities to a loss and its metrics.

Definitions follow TRL's `GRPOTrainer` for each `loss_type`, so that settings carry over.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

LOSS_TYPES = ("grpo", "dr_grpo", "dapo", "bnpo", "cispo")


@dataclass(frozen=True)
class LossInputs:
    """One micro-batch of N completions of at most T tokens."""

    logps_N_T: torch.Tensor
    """Under the policy being trained, with gradient."""
    advantages_N_T: torch.Tensor
    """[N, 1] where all tokens of a completion have the same."""
    mask_N_T: torch.Tensor
    """True for tokens that count; completions left out of the loss are all False."""
    old_logps_N_T: torch.Tensor | None = None
    """Under the policy at the start of the step; None when the batch is on-policy (equal to `logps_N_T`)."""
    ref_logps_N_T: torch.Tensor | None = None
    """Under the SFT policy; needed when beta > 0."""
    sampler_logps_N_T: torch.Tensor | None = None
    """As the engine reported them; None: no importance correction."""


@dataclass(frozen=True)
class LossSettings:
    """Names and meanings as in TRL's GRPOConfig."""

    loss_type: str = "dapo"
    importance_sampling_level: str = "token"
    epsilon: float = 0.2
    epsilon_high: float = 0.28
    delta: float = 0.0
    beta: float = 0.0
    importance_cap: float = 3.0
    max_completion_length: int = 128


@dataclass(frozen=True)
class StepTotals:
    """What the whole optimizer step holds over all ranks: the normalisers of the loss."""

    completions: int
    tokens: int
    """Tokens with mask True."""
    microbatches: int
    """Those with at least one group."""


def grpo_loss(
    inputs: LossInputs, settings: LossSettings, totals: StepTotals
) -> tuple[torch.Tensor, dict[str, float]]:
    """This micro-batch's share of the step's loss: the shares of all micro-batches and ranks add up to it.

    per token:  -min(min(r, delta) A, clip(r, 1 - epsilon, 1 + epsilon_high) A) w + beta r KL
    "cispo":    -min(r, epsilon_high) A log p w + beta r KL, no gradient through min (MiniMax-M1, arXiv 2506.13585)
    with r the ratio of new to old policy, w = min(old policy / engine, importance_cap) and the estimator
    KL = exp(ref - new) - (ref - new) - 1 (Schulman 2020, "Approximating KL divergence", k3). The ratio before it, which
    is 1 on-policy but has a gradient, makes its gradient that of the reverse KL (DeepSeek-V3.2, arXiv 2512.02556).
    At importance level "sequence" r is the geometric mean over a completion's tokens (GSPO, arXiv 2507.18071). `delta`
    bounds r where the advantage is negative (INTELLECT-2, arXiv 2505.07291); 0 is no bound.

    Returns:
        The loss and sums over tokens (`kl`, `clipped`, `importance`, `capped`) for the step's metrics.
    """
    mask = inputs.mask_N_T
    logps = inputs.logps_N_T
    old_logps = logps.detach() if inputs.old_logps_N_T is None else inputs.old_logps_N_T
    advantages = inputs.advantages_N_T

    log_ratio = logps - old_logps
    if settings.importance_sampling_level == "sequence":
        log_ratio = (log_ratio * mask).sum(1, keepdim=True) / mask.sum(1, keepdim=True).clamp(min=1)
    ratio = torch.exp(log_ratio)
    if settings.loss_type == "cispo":
        loss_N_T = -ratio.clamp(max=settings.epsilon_high).detach() * advantages * logps
        outside = (ratio > settings.epsilon_high) & (advantages > 0)
    else:
        clipped = ratio.clamp(1 - settings.epsilon, 1 + settings.epsilon_high)
        bounded = ratio.clamp(max=settings.delta) if settings.delta else ratio
        loss_N_T = -torch.min(bounded * advantages, clipped * advantages)
        outside = ((ratio < 1 - settings.epsilon) & (advantages < 0)) | (
            (ratio > 1 + settings.epsilon_high) & (advantages > 0)
        )
    metrics = {}
    if inputs.sampler_logps_N_T is not None:
        uncapped = torch.exp((old_logps - inputs.sampler_logps_N_T) * mask)
        weight = uncapped.clamp(max=settings.importance_cap)
        loss_N_T = loss_N_T * weight
        metrics["importance"] = float((weight * mask).sum())
        metrics["capped"] = float(((uncapped > settings.importance_cap) & mask).sum())
    if settings.beta:
        if inputs.ref_logps_N_T is None:
            raise ValueError("beta > 0 needs the log-probabilities of the reference policy")
        from_reference = inputs.ref_logps_N_T - logps
        kl = ratio * (torch.expm1(from_reference) - from_reference)  # expm1: never below 0 by rounding
        loss_N_T = loss_N_T + settings.beta * kl
        metrics["kl"] = float((kl.detach() * mask).sum())
    metrics["clipped"] = float((outside & mask).sum())
    return _normalise(loss_N_T * mask, mask, settings, totals), metrics


def _normalise(
    loss_N_T: torch.Tensor, mask_N_T: torch.Tensor, settings: LossSettings, totals: StepTotals
) -> torch.Tensor:
    if settings.loss_type == "grpo":  # mean over completions of the mean over their tokens
        return (loss_N_T.sum(1) / mask_N_T.sum(1).clamp(min=1)).sum() / totals.completions
    if settings.loss_type == "dr_grpo":  # a constant: no bias towards short or long completions
        return loss_N_T.sum() / (totals.completions * settings.max_completion_length)
    if settings.loss_type in ("dapo", "cispo"):  # mean over all tokens of the step
        return loss_N_T.sum() / max(totals.tokens, 1)
    if settings.loss_type == "bnpo":  # mean over the tokens of the micro-batch, then over micro-batches
        return loss_N_T.sum() / mask_N_T.sum().clamp(min=1) / totals.microbatches
    raise ValueError(f"loss_type {settings.loss_type!r} is not one of {', '.join(LOSS_TYPES)}")
