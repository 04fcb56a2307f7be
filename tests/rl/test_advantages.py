"""Laws of group-relative advantages."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays

from rl.advantages import SCALE_REWARDS, group_advantages, normalized_sum

rewards = arrays(
    "float32",
    array_shapes(min_dims=2, max_dims=2, min_side=2, max_side=6),
    elements=st.floats(-2, 2, width=16, allow_subnormal=False),
).map(torch.from_numpy)
modes = st.sampled_from(SCALE_REWARDS)


@given(rewards, modes)
def test_advantages_of_a_group_add_up_to_zero(rewards_B_G: torch.Tensor, mode: str) -> None:
    advantages = group_advantages(rewards_B_G, mode)
    scale = advantages.abs().max().clamp(min=1.0)
    assert float((advantages.sum(dim=1) / scale).abs().max()) < 1e-3


@given(rewards, modes, st.integers(-64, 64))
def test_a_bonus_for_everyone_changes_nothing(rewards_B_G: torch.Tensor, mode: str, bonus: int) -> None:
    exact = rewards_B_G.double()
    torch.testing.assert_close(
        group_advantages(exact + bonus, mode), group_advantages(exact, mode), rtol=1e-6, atol=1e-8
    )


@given(st.floats(-3, 3, width=32), st.integers(2, 9), modes)
def test_a_group_of_equal_rewards_has_advantage_exactly_zero(value: float, size: int, mode: str) -> None:
    """Exactly, so that such groups can be left out of the computation."""
    rewards_B_G = torch.tensor([[value] * size, [float(i) for i in range(size)]])
    advantages = group_advantages(rewards_B_G, mode)
    assert not advantages[0].any()
    assert advantages[1].any()


@given(rewards, modes)
def test_the_better_completion_never_has_the_smaller_advantage(rewards_B_G: torch.Tensor, mode: str) -> None:
    advantages = group_advantages(rewards_B_G, mode)
    order = rewards_B_G.argsort(dim=1)
    assert (advantages.gather(1, order).diff(dim=1) >= -1e-6).all()


def test_the_modes_divide_by_what_they_say() -> None:
    rewards_B_G = torch.tensor([[0.0, 1.0], [0.0, 4.0]])
    centred = torch.tensor([[-0.5, 0.5], [-2.0, 2.0]])
    group = torch.tensor([[0.5**0.5], [8.0**0.5]])  # standard deviations with n - 1
    batch = rewards_B_G.std()
    torch.testing.assert_close(group_advantages(rewards_B_G, "none"), centred)
    torch.testing.assert_close(group_advantages(rewards_B_G, "group"), centred / (group + 1e-4))
    torch.testing.assert_close(group_advantages(rewards_B_G, "batch"), centred / (batch + 1e-4))


@given(rewards)
def test_ranks_with_a_part_each_have_the_advantages_of_the_whole(rewards_B_G: torch.Tensor) -> None:
    for mode in SCALE_REWARDS:
        parts = [group_advantages(part, mode, rewards_B_G) for part in rewards_B_G.split(1)]
        torch.testing.assert_close(torch.cat(parts), group_advantages(rewards_B_G, mode))


def test_an_unknown_mode_is_refused() -> None:
    with pytest.raises(ValueError, match="'std' is not one of group, batch, none"):
        group_advantages(torch.zeros(1, 2), "std")


def _as_trl(scores_B_G_K: torch.Tensor, weights_K: torch.Tensor) -> torch.Tensor:
    """`normalize_then_sum` as TRL 1.16 writes it (`GRPOTrainer._generate_and_score_completions`)."""
    mean, std = scores_B_G_K.nanmean(dim=1, keepdim=True), scores_B_G_K.std(dim=1, keepdim=True)
    summed = ((scores_B_G_K - mean) / (std + 1e-4) * weights_K).nansum(dim=-1)
    return (summed - summed.mean()) / (summed.std() + 1e-4)


def test_components_are_normalised_before_they_are_added_as_in_trl() -> None:
    torch.manual_seed(0)
    scores = torch.rand(5, 8, 3)
    scores[1, :, 2] = torch.nan  # does not apply
    scores[2, :, 1] = 1 / 3  # no spread
    weights = torch.tensor([0.2, 0.5, 0.3])
    ours = group_advantages(normalized_sum(scores, weights.expand(5, 3)), "batch")
    torch.testing.assert_close(ours, _as_trl(scores, weights))


def test_a_component_of_small_spread_counts_as_much_as_one_of_large_spread() -> None:
    wide, narrow = torch.tensor([0.0, 1.0, 0.0, 1.0]), torch.tensor([0.5, 0.5, 0.52, 0.52])
    scores_B_G_K = torch.stack([wide, narrow], dim=-1)[None]
    summed = normalized_sum(scores_B_G_K, torch.ones(1, 2))[0]
    assert float(summed[1]) == pytest.approx(float(summed[2]), abs=0.02)
    assert not normalized_sum(torch.full((1, 4, 2), 1 / 3), torch.ones(1, 2)).any()
