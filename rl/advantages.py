"""Group-relative advantages (GRPO, arXiv 2402.03300, section 4.1.2; unscaled: Dr. GRPO, arXiv 2503.20783)."""

from __future__ import annotations

import torch

SCALE_REWARDS = ("group", "batch", "none")
_EPSILON = 1e-4  # as TRL: keeps groups of almost equal rewards from exploding


def group_advantages(
    rewards_B_G: torch.Tensor, scale_rewards: str = "group", batch_rewards: torch.Tensor | None = None
) -> torch.Tensor:
    """Reward minus the group's mean, divided by a standard deviation.

    Args:
        rewards_B_G: total rewards of G completions for each of B prompts.
        scale_rewards: "group" divides by each group's standard deviation, "batch" by that of all rewards, "none"
            does not divide.
        batch_rewards: the rewards of all ranks, for "batch"; default `rewards_B_G`.
    Returns:
        advantages_B_G; a group of equal rewards has advantage exactly 0.
    """
    if scale_rewards not in SCALE_REWARDS:
        raise ValueError(f"scale_rewards {scale_rewards!r} is not one of {', '.join(SCALE_REWARDS)}")
    advantages = _centred(rewards_B_G)
    if scale_rewards == "group":
        return advantages / (rewards_B_G.std(dim=1, keepdim=True) + _EPSILON)
    if scale_rewards == "batch":
        return advantages / ((rewards_B_G if batch_rewards is None else batch_rewards).std() + _EPSILON)
    return advantages


def normalized_sum(scores_B_G_K: torch.Tensor, weights_B_K: torch.Tensor) -> torch.Tensor:
    """Components normalised within their group, then added up (GDPO, arXiv 2601.05242, eq. 4).

    A component that varies little then counts as much as one that varies a lot. `group_advantages` of the result,
    scaled by the "batch", are GDPO's advantages.

    Args:
        scores_B_G_K: scores of K components; NaN where one does not apply.
        weights_B_K: weight of each component for each prompt; of one that does not apply it does not matter.
    Returns:
        rewards_B_G
    """
    normalized = _centred(scores_B_G_K) / (scores_B_G_K.std(dim=1, keepdim=True) + _EPSILON)
    return (normalized.nan_to_num(0.0) * weights_B_K[:, None]).sum(dim=-1)


def _centred(x_B_G: torch.Tensor) -> torch.Tensor:
    """Minus the mean over a group (dimension 1); exactly 0 in a group of equals."""
    spread = x_B_G.amax(dim=1, keepdim=True) > x_B_G.amin(dim=1, keepdim=True)
    # the mean of equal floats may be off by one rounding
    return (x_B_G - x_B_G.mean(dim=1, keepdim=True)) * spread
