"""A whole training step beside TRL's trainer: model, adapter, loss and gradients."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import Qwen3ForCausalLM

from rl.config import Config
from rl.grpo import GRPOTrainer
from rl.loss import LOSS_TYPES, LossInputs, LossSettings, StepTotals, grpo_loss
from rl.model import reference_adapter, trainable
from rl.packed import Node, PackedPolicy, pack
from rollouts.types import Engine

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
PROMPTS = ([5, 6, 7, 8, 9], [10, 11])
COMPLETIONS = ([[20, 21, 22], [23], [24, 25, 26, 27]], [[28, 29], [], [30, 31, 32, 33, 34]])
"""Of different lengths, one empty."""
CUT_OFF = 2
"""The completion that hit the length limit and is left out of the loss."""
ADVANTAGES_N = torch.tensor([1.5, -0.5, -2.0, 0.7, 0.4, -1.1])


@pytest.fixture(scope="module")
def step_on_pictures() -> Callable[..., tuple[float, dict[str, torch.Tensor]]]:
    """Loss and gradients of an arm of the speed benchmark."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(BENCHMARKS)
        step_arms = importlib.import_module("step_arms")
    work = step_arms.Work(visual_tokens=32, generations=2, questions=1)
    return lambda arm, *batch: step_arms.make_step(arm, 1, work, *batch)("gradients")


@pytest.fixture(scope="module")
def trls_step_on_pictures(step_on_pictures: Any) -> tuple[float, dict[str, torch.Tensor]]:
    return step_on_pictures("trl", 1)  # two micro-batches


@pytest.mark.slow
@pytest.mark.parametrize("arm", [("packed",), ("subtree",), ("padded", 2)], ids=lambda arm: arm[0])
def test_a_step_on_pictures_has_the_loss_and_the_gradients_of_trls_trainer(
    arm: tuple[Any, ...], step_on_pictures: Any, trls_step_on_pictures: Any
) -> None:
    """The arms of the speed benchmark: what is timed there is the same work."""
    loss, gradients = step_on_pictures(*arm)
    expected, expected_gradients = trls_step_on_pictures
    assert loss == pytest.approx(expected, abs=1e-6)
    assert len(gradients) == len(expected_gradients) > 100
    for name, gradient in expected_gradients.items():
        assert float((gradients[name] - gradient).norm()) <= 1e-4 * float(gradient.norm()), name
        assert torch.isfinite(gradient).all()


@pytest.fixture(scope="module")
def text_model(qwen3: Qwen3ForCausalLM) -> Any:
    """A language model without pictures, its adapter's B not zero."""
    lora = LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj", "gate_proj", "down_proj"])
    base = deepcopy(qwen3)
    base.model.config._attn_implementation = "sdpa"  # other tests have packed it
    model = get_peft_model(base, lora)
    torch.manual_seed(1)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.2)
    return model


@pytest.fixture(scope="module")
def text_trainer(text_model: Any, make_trl_trainer: Callable[..., Any]) -> Any:
    return make_trl_trainer(deepcopy(text_model), 1)


def padded_rows() -> dict[str, torch.Tensor]:
    """The rollouts as TRL holds them: prompts padded on their left, completions on their right."""
    rows = [(prompt, ids) for prompt, group in zip(PROMPTS, COMPLETIONS, strict=True) for ids in group]
    before, after = (max(len(row[part]) for row in rows) for part in (0, 1))
    prompts = torch.tensor([[0] * (before - len(p)) + p for p, _ in rows])
    completions = torch.tensor([ids + [0] * (after - len(ids)) for _, ids in rows])
    prompt_mask = torch.tensor([[0] * (before - len(p)) + [1] * len(p) for p, _ in rows])
    mask = torch.tensor([[1] * len(ids) + [0] * (after - len(ids)) for _, ids in rows])
    mask[CUT_OFF] = 0
    return {
        "prompt_ids": prompts,
        "prompt_mask": prompt_mask,
        "completion_ids": completions,
        "completion_mask": mask,
        "advantages": ADVANTAGES_N,
        "num_items_in_batch": mask.sum(),
    }


@pytest.mark.slow
@pytest.mark.parametrize("loss_type", LOSS_TYPES)
@pytest.mark.parametrize("beta", [0.0, 0.1])
def test_a_step_on_text_of_any_length_has_the_loss_and_the_gradients_of_trls_trainer(
    text_model: Any, text_trainer: Any, monkeypatch: pytest.MonkeyPatch, loss_type: str, beta: float
) -> None:
    """TRL's own forward of padded rows, with its own normaliser, beside the tree; the reference is the base."""
    cap = {"epsilon_high": 1.2} if loss_type == "cispo" else {}
    settings = LossSettings(loss_type=loss_type, beta=beta, max_completion_length=5, **cap)

    policy = PackedPolicy(deepcopy(text_model))
    groups = zip(PROMPTS, COMPLETIONS, strict=True)
    batch = pack([Node(p, children=[Node(ids, scored=True) for ids in group]) for p, group in groups], -1)
    counted_N = torch.arange(len(ADVANTAGES_N)) != CUT_OFF
    mask_N_T = batch.mask_N_T & counted_N[:, None]
    with torch.no_grad(), policy.model.disable_adapter():
        ref_logps_N_T, _ = policy(batch)
    logps_N_T, _ = policy(batch)
    inputs = LossInputs(logps_N_T, ADVANTAGES_N[:, None], mask_N_T, ref_logps_N_T=ref_logps_N_T)
    totals = StepTotals(len(ADVANTAGES_N), int(mask_N_T.sum()), 1)
    loss, _ = grpo_loss(inputs, settings, totals)
    loss.backward()

    for name in ("loss_type", "beta", "epsilon_high"):
        monkeypatch.setattr(text_trainer, name, getattr(settings, name))
    rows = padded_rows()
    if beta:
        with torch.no_grad(), text_trainer.model.disable_adapter():
            whole = [
                torch.cat([rows[f"prompt_{part}"], rows[f"completion_{part}"]], dim=1)
                for part in ("ids", "mask")
            ]
            kept = rows["completion_ids"].shape[1]
            found = text_trainer._get_per_token_logps_and_entropies(text_trainer.model, *whole, kept)
            rows["ref_per_token_logps"] = found[0]
    text_trainer.model.zero_grad()
    expected = text_trainer._compute_loss(text_trainer.model, rows)
    expected.backward()

    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-6)
    theirs = {name: p.grad for name, p in text_trainer.model.named_parameters() if p.requires_grad}
    ours = {name: p.grad for name, p in policy.model.named_parameters() if p.requires_grad}
    assert ours.keys() == theirs.keys()
    for name, gradient in theirs.items():
        assert float((ours[name] - gradient).norm()) <= 1e-4 * float(gradient.norm()), name
        assert gradient.any()


def plain_rows(policy: PackedPolicy, tree: list[Node]) -> torch.Tensor:
    """logps_N_T of a forest's completions, each a plain row through transformers' own attention."""
    model, found = policy.language_model, []
    for root in tree:
        assert root.positions_3_T is not None
        assert root.features_V_H is not None
        for question in root.children:
            for leaf in question.children:
                ids = torch.tensor([*root.token_ids, *question.token_ids, *leaf.token_ids])
                after = torch.arange(len(ids) - len(root.token_ids)) + int(root.positions_3_T.max()) + 1
                positions = torch.cat([root.positions_3_T, after.expand(3, -1)], dim=1)
                visual = (ids == policy.causal_lm.config.video_token_id).nonzero().flatten()
                embeds = model.embed_tokens(ids).index_copy(0, visual, root.features_V_H)
                hidden = model(inputs_embeds=embeds[None], position_ids=positions[:, None], use_cache=False)
                n = len(leaf.token_ids)
                scores = policy.causal_lm.lm_head(hidden.last_hidden_state[0, -n - 1 : -1])
                logps = F.log_softmax(scores, dim=-1).gather(-1, ids[-n:, None])
                found.append(logps.squeeze(-1))
    return nn.utils.rnn.pad_sequence(found, batch_first=True)


@pytest.mark.slow
@pytest.mark.parametrize("loss_type", LOSS_TYPES)
@pytest.mark.parametrize("beta", [0.0, 0.1])
def test_the_update_of_real_rollouts_is_trls(
    make_config: Callable[..., Config],
    engine: Engine,
    accelerator: Accelerator,
    text_trainer: Any,
    monkeypatch: pytest.MonkeyPatch,
    loss_type: str,
    beta: float,
) -> None:
    """The trainer's own packing and totals of groups it sampled and scored, against TRL's loss on plain rows."""
    cap = ["grpo.epsilon_high=1.2"] if loss_type == "cispo" else []
    still = ["grpo.learning_rate=0", "grpo.max_grad_norm=1e9", "grpo.probe_tolerance=10"]
    masked = "grpo.mask_truncated_completions=true"
    config = make_config(f"grpo.loss_type={loss_type}", f"grpo.beta={beta}", masked, *still, *cap)
    trainer = GRPOTrainer(config, engine, accelerator)
    scored = trainer.scorer.score(trainer.generation.draw(0, 2))
    torch.manual_seed(2)
    with torch.no_grad():  # away from the reference
        for parameter in trainable(trainer.policy):
            parameter.add_(0.02 * torch.randn_like(parameter))
    sums, _ = trainer._update(scored)
    ours = [p.grad.clone() for p in trainable(trainer.policy) if p.grad is not None]

    rollouts = [r for s in scored for r in s.group.rollouts]
    tree = trainer.task.tree(
        [s.group.prompt for s in scored], [[r.token_ids for r in s.group.rollouts] for s in scored]
    )
    assert len({len(r.token_ids) for r in rollouts}) > 1
    assert {r.finish_reason for r in rollouts} == {"stop", "length"}
    policy = trainer.policy
    policy.language_model.config._attn_implementation = "sdpa"
    logps_N_T = plain_rows(policy, tree)
    ref_logps_N_T = None
    if beta:
        with torch.no_grad(), reference_adapter(policy):
            ref_logps_N_T = plain_rows(policy, tree)
    mask = torch.zeros(logps_N_T.shape, dtype=torch.long)
    for row, rollout in enumerate(rollouts):
        mask[row, : len(rollout.token_ids)] = rollout.finish_reason == "stop"
    for name, value in (
        ("loss_type", loss_type),
        ("beta", beta),
        ("epsilon_low", config.grpo.epsilon),
        ("epsilon_high", config.grpo.epsilon_high),
        ("max_completion_length", config.grpo.max_completion_length),
        ("_get_per_token_logps_and_entropies", lambda *_, **__: (logps_N_T, torch.zeros_like(mask), None)),
    ):
        monkeypatch.setattr(text_trainer, name, value)
    rows = {
        "prompt_ids": mask[:, :1],
        "prompt_mask": torch.ones_like(mask[:, :1]),
        "completion_ids": mask,
        "completion_mask": mask,
        "advantages": torch.cat([s.advantages_G for s in scored]),
        "ref_per_token_logps": ref_logps_N_T,
        "num_items_in_batch": mask.sum(),
    }
    expected = text_trainer._compute_loss(text_trainer.model, rows)
    theirs = torch.autograd.grad(expected, trainable(policy))
    assert sums["loss"] == pytest.approx(float(expected.detach()), rel=1e-4, abs=1e-6)
    assert len(ours) == len(theirs)
    for a, b in zip(ours, theirs, strict=True):
        assert float((a - b).norm()) <= 1e-4 * float(b.norm())
