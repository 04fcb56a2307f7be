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
    advantages = rewards_B_G - rewards_B_G.mean(dim=1, keepdim=True)
    spread = rewards_B_G.max(dim=1, keepdim=True).values > rewards_B_G.min(dim=1, keepdim=True).values
    advantages = advantages * spread  # the mean of equal floats may be off by one rounding
    if scale_rewards == "group":
        return advantages / (rewards_B_G.std(dim=1, keepdim=True) + _EPSILON)
    if scale_rewards == "batch":
        return advantages / ((rewards_B_G if batch_rewards is None else batch_rewards).std() + _EPSILON)
    return advantages
