"""The policy loss: hand-computed cases, sums over micro-batches, and TRL's own code as the measure."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rl.loss import LOSS_TYPES, LossInputs, LossSettings, StepTotals, grpo_loss

MASK = torch.tensor([[True, True, True], [True, False, False], [True, True, False], [False, False, False]])
"""Four completions of 3, 1, 2 tokens, and one that is left out of the loss."""
TOTALS = StepTotals(completions=4, tokens=6, microbatches=1)


def example(seed: int = 0, *, on_policy: bool = False) -> LossInputs:
    """Random log-probabilities of four completions; all policies differ by a few tenths."""
    generator = torch.Generator().manual_seed(seed)

    def near(scale: float) -> torch.Tensor:
        noise = torch.randn(4, 3, generator=generator, dtype=torch.float64)
        return (base + scale * noise) * MASK.any(1, keepdim=True)

    base = -torch.rand(4, 3, generator=generator, dtype=torch.float64) * 3
    return LossInputs(
        logps_N_T=near(0.0).requires_grad_(),
        advantages_N_T=torch.tensor([[1.5], [-0.5], [-2.0], [0.7]], dtype=torch.float64),
        mask_N_T=MASK,
        old_logps_N_T=None if on_policy else near(0.4),
        ref_logps_N_T=near(0.4),
        sampler_logps_N_T=near(0.8),
    )


def rows(inputs: LossInputs, part: slice) -> LossInputs:
    """Some of the completions."""
    fields = {name: value[part] for name, value in vars(inputs).items() if value is not None}
    return replace(inputs, **fields)


def one_token(ratio: float, advantage: float, **settings: Any) -> tuple[float, float, dict[str, float]]:
    """Loss, its derivative by the log-probability, and metrics of a single token."""
    logps = torch.tensor([[0.0]], dtype=torch.float64, requires_grad=True)
    inputs = LossInputs(
        logps,
        torch.tensor([[advantage]], dtype=torch.float64),
        torch.tensor([[True]]),
        old_logps_N_T=torch.tensor([[-math.log(ratio)]], dtype=torch.float64),
    )
    loss, metrics = grpo_loss(inputs, LossSettings(**settings), StepTotals(1, 1, 1))
    (gradient,) = torch.autograd.grad(loss, logps)
    return loss.item(), gradient.item(), metrics


@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_on_policy_each_type_is_its_own_mean_of_minus_the_advantage(loss_type: str) -> None:
    """On-policy the ratio is 1, so a token's loss is -A: 3 tokens of -1.5, 1 of 0.5, 2 of 2."""
    inputs = replace(example(on_policy=True), ref_logps_N_T=None, sampler_logps_N_T=None)
    if loss_type == "cispo":
        inputs = replace(inputs, logps_N_T=torch.ones_like(inputs.logps_N_T), old_logps_N_T=None)
    expected = {
        "cispo": (3 * -1.5 + 0.5 + 2 * 2.0) / 6,  # times log p, which is set to 1 here
        "grpo": (-1.5 + 0.5 + 2.0) / 4,
        "dr_grpo": (3 * -1.5 + 0.5 + 2 * 2.0) / (4 * 5),
        "dapo": (3 * -1.5 + 0.5 + 2 * 2.0) / 6,
        "bnpo": (3 * -1.5 + 0.5 + 2 * 2.0) / 6,
    }
    loss, _ = grpo_loss(
        inputs, LossSettings(loss_type=loss_type, epsilon_high=5, max_completion_length=5), TOTALS
    )
    assert loss.item() == pytest.approx(expected[loss_type], abs=1e-12)


@pytest.mark.parametrize("loss_type", LOSS_TYPES)
@pytest.mark.parametrize("beta", [0.0, 0.1])
def test_shares_of_microbatches_add_up_to_the_whole(loss_type: str, beta: float) -> None:
    """For every type but bnpo, which is by definition a mean over micro-batches of their means over tokens."""
    inputs, settings = example(), LossSettings(loss_type=loss_type, beta=beta, max_completion_length=5)
    parts = [rows(inputs, slice(0, 1)), rows(inputs, slice(1, 4))]
    totals = replace(TOTALS, microbatches=len(parts))
    if loss_type == "bnpo":
        alone = [grpo_loss(part, settings, replace(TOTALS, microbatches=1))[0] for part in parts]
        whole = torch.stack(alone).mean()
    else:
        whole, _ = grpo_loss(inputs, settings, totals)
    shares = torch.stack([grpo_loss(part, settings, totals)[0] for part in parts])
    torch.testing.assert_close(shares.sum(), whole, rtol=0, atol=1e-14)
    (expected,) = torch.autograd.grad(whole, inputs.logps_N_T)
    (gradient,) = torch.autograd.grad(shares.sum(), inputs.logps_N_T)
    torch.testing.assert_close(gradient, expected, rtol=0, atol=1e-14)


@pytest.mark.parametrize(
    ("ratio", "advantage", "loss", "gradient", "clipped"),
    [
        (1.0, 2.0, -2.0, -2.0, 0),
        (1.5, 2.0, -2.6, 0.0, 1),  # already likelier by more than epsilon_high: no further push
        (1.5, -2.0, 3.0, 3.0, 0),  # likelier although worse: pushed back without limit
        (0.5, -2.0, 1.6, 0.0, 1),  # already unlikelier by more than epsilon: no further push
        (0.5, 2.0, -1.0, -1.0, 0),
        (1.25, 2.0, -2.5, -2.5, 0),  # between epsilon and epsilon_high: the upper range is the wider one
    ],
)
def test_the_ratio_is_clipped_only_in_the_direction_it_has_gone(
    ratio: float, advantage: float, loss: float, gradient: float, clipped: int
) -> None:
    got = one_token(ratio, advantage, epsilon=0.2, epsilon_high=0.3)
    assert got[:2] == pytest.approx((loss, gradient))
    assert got[2]["clipped"] == clipped


@given(st.floats(-3, 3), st.floats(0.01, 1))
def test_the_kl_term_is_the_k3_estimator_with_the_gradient_of_the_reverse_kl(
    difference: float, beta: float
) -> None:
    """exp(d) - d - 1 with d = ref - new; on-policy its gradient by the new log-probability is new - ref."""
    logps = torch.zeros(1, 1, dtype=torch.float64, requires_grad=True)
    inputs = LossInputs(
        logps,
        torch.zeros(1, dtype=torch.float64),
        torch.ones(1, 1, dtype=torch.bool),
        ref_logps_N_T=torch.full((1, 1), difference, dtype=torch.float64),
    )
    loss, metrics = grpo_loss(inputs, LossSettings(beta=beta), StepTotals(1, 1, 1))
    (gradient,) = torch.autograd.grad(loss, logps)
    assert metrics["kl"] == pytest.approx(math.exp(difference) - difference - 1, abs=1e-12)
    assert metrics["kl"] >= 0
    assert loss.item() == pytest.approx(beta * metrics["kl"], abs=1e-12)
    assert gradient.item() == pytest.approx(-beta * difference, abs=1e-9)


def test_beta_without_a_reference_is_refused() -> None:
    with pytest.raises(ValueError, match="reference"):
        grpo_loss(replace(example(), ref_logps_N_T=None), LossSettings(beta=0.1), TOTALS)


@pytest.mark.parametrize(
    ("old", "sampler", "weight"), [(-1.0, -2.0, math.e), (-1.0, -9.0, 3.0), (-2.0, -1.0, 1 / math.e)]
)
def test_the_importance_weight_is_capped_above_only(old: float, sampler: float, weight: float) -> None:
    """And it is a weight: no gradient flows through it."""
    logps = torch.tensor([[old]], dtype=torch.float64, requires_grad=True)
    inputs = LossInputs(
        logps,
        torch.tensor([2.0], dtype=torch.float64),
        torch.tensor([[True]]),
        sampler_logps_N_T=torch.tensor([[sampler]], dtype=torch.float64),
    )
    loss, metrics = grpo_loss(inputs, LossSettings(importance_cap=3.0), StepTotals(1, 1, 1))
    (gradient,) = torch.autograd.grad(loss, logps)
    assert loss.item() == gradient.item() == pytest.approx(-2 * weight)
    assert metrics["importance"] == pytest.approx(weight)
    assert metrics["capped"] == (weight == 3)


@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_what_is_masked_has_no_influence(loss_type: str) -> None:
    inputs = example()
    settings = LossSettings(loss_type=loss_type, beta=0.1, epsilon_high=2)
    loss, metrics = grpo_loss(inputs, settings, TOTALS)
    (gradient,) = torch.autograd.grad(loss, inputs.logps_N_T)
    assert not gradient[~MASK].any()
    assert gradient[MASK].all()
    other = {n: torch.where(MASK, v, v - 0.3) for n, v in vars(inputs).items() if n.endswith("logps_N_T")}
    again, metrics_again = grpo_loss(replace(inputs, **other), settings, TOTALS)
    assert again.item() == pytest.approx(loss.item(), abs=1e-14)
    assert metrics_again == pytest.approx(metrics)


@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_a_step_in_which_nothing_counts_has_loss_zero(loss_type: str) -> None:
    inputs = replace(example(), mask_N_T=torch.zeros_like(MASK))
    loss, _ = grpo_loss(inputs, LossSettings(loss_type=loss_type, beta=0.1), StepTotals(4, 0, 1))
    (gradient,) = torch.autograd.grad(loss, inputs.logps_N_T)
    assert loss.item() == 0
    assert not gradient.any()


def test_an_unknown_type_is_refused() -> None:
    with pytest.raises(ValueError, match="'ppo' is not one of grpo"):
        grpo_loss(example(), LossSettings(loss_type="ppo"), TOTALS)


@pytest.fixture(scope="module")
def trl_trainer(make_trl_trainer: Callable[..., Any]) -> Any:
    """A real `trl.GRPOTrainer` on a tiny model; only its loss is used."""
    from transformers import Qwen2Config, Qwen2ForCausalLM

    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
    return make_trl_trainer(Qwen2ForCausalLM(Qwen2Config(vocab_size=1600, num_key_value_heads=1, **sizes)))


KINDS = [
    *({"loss_type": loss_type} for loss_type in LOSS_TYPES),
    {"loss_type": "cispo", "epsilon_high": 1.1},
    {"loss_type": "dapo", "delta": 1.35},
    {"loss_type": "grpo", "importance_sampling_level": "sequence"},
    {"loss_type": "grpo", "importance_sampling_level": "sequence", "epsilon": 0.05, "delta": 1.31},
]


@pytest.mark.parametrize("kind", KINDS, ids=str)
@pytest.mark.parametrize("beta", [0.0, 0.04])
@pytest.mark.parametrize("on_policy", [True, False])
@pytest.mark.parametrize("corrected", [True, False])
def test_loss_and_gradient_are_those_of_trl(
    trl_trainer: Any,
    monkeypatch: pytest.MonkeyPatch,
    kind: dict[str, Any],
    beta: float,
    on_policy: bool,
    corrected: bool,
) -> None:
    """Two micro-batches of two completions each, as TRL accumulates them."""
    inputs = example(on_policy=on_policy)
    ours = LossSettings(**kind, beta=beta, max_completion_length=5)
    used = inputs if corrected else replace(inputs, sampler_logps_N_T=None)
    parts = [slice(0, 2), slice(2, 4)]
    total = torch.stack(
        [grpo_loss(rows(used, part), ours, replace(TOTALS, microbatches=2))[0] for part in parts]
    ).sum()
    (gradient,) = torch.autograd.grad(total, inputs.logps_N_T)

    settings = {
        "loss_type": ours.loss_type,
        "importance_sampling_level": ours.importance_sampling_level,
        "epsilon_low": ours.epsilon,
        "epsilon_high": ours.epsilon_high,
        "beta": beta,
        "use_vllm": corrected,
        "current_gradient_accumulation_steps": 2,
    }
    monkeypatch.setattr(trl_trainer.args, "delta", ours.delta or None)
    for name, value in settings.items():
        monkeypatch.setattr(trl_trainer, name, value, raising=False)
    losses = torch.stack([_trl_loss(trl_trainer, monkeypatch, rows(inputs, part)) for part in parts]).sum()
    (expected,) = torch.autograd.grad(losses, inputs.logps_N_T)
    torch.testing.assert_close(total, losses, rtol=0, atol=1e-12)
    torch.testing.assert_close(gradient, expected, rtol=0, atol=1e-12)


def _trl_loss(trainer: Any, monkeypatch: pytest.MonkeyPatch, inputs: LossInputs) -> torch.Tensor:
    logps = inputs.logps_N_T
    old = logps.detach() if inputs.old_logps_N_T is None else inputs.old_logps_N_T
    assert inputs.sampler_logps_N_T is not None
    ratio = torch.exp((old - inputs.sampler_logps_N_T) * inputs.mask_N_T).clamp(
        max=3.0
    )  # token_truncate, C = 3
    monkeypatch.setattr(
        trainer,
        "_get_per_token_logps_and_entropies",
        lambda *args, **kwargs: (logps, torch.zeros_like(logps), None),
    )
    ids = torch.zeros(logps.shape, dtype=torch.long)
    return trainer._compute_loss(
        trainer.model,
        {
            "prompt_ids": ids[:, :1],
            "prompt_mask": torch.ones_like(ids[:, :1]),
            "completion_ids": ids,
            "completion_mask": inputs.mask_N_T.long(),
            "advantages": inputs.advantages_N_T.squeeze(1),
            "old_per_token_logps": inputs.old_logps_N_T,
            "ref_per_token_logps": inputs.ref_logps_N_T,
            "importance_sampling_ratio": ratio,
            "num_items_in_batch": torch.tensor(TOTALS.tokens),
        },
    )
