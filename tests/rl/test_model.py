"""The policy as `load_policy` makes it: the same numbers with checkpointing, nearly the same in bfloat16."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch

from rl.config import Config, ConfigError
from rl.model import disable_dropout, load_policy, trainable
from rl.packed import PackedBatch, PackedPolicy, pack
from rl.task import Task

MakeConfig = Callable[..., Config]


@pytest.fixture
def batch(config: Config) -> PackedBatch:
    """One volume, two questions, two completions of each."""
    task = Task(config, "train")
    indices = next(iter(task.examples.by_volume().values()))[:2]
    targets = [task.target_ids(i) for i in indices]
    prompts = [task.prompt(i, len(ids)) for i, ids in zip(indices, targets, strict=True)]
    return pack(task.tree(prompts, [[ids, ids[::-1]] for ids in targets]), task.builder.video_pad)


def outcome(policy: PackedPolicy, batch: PackedBatch) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probabilities, and the adapter's gradient in one piece."""
    disable_dropout(policy)
    logps_N_T, _ = policy(batch)
    gradients = torch.autograd.grad(logps_N_T.sum() / batch.mask_N_T.sum(), trainable(policy))
    return logps_N_T.detach(), torch.cat([g.flatten() for g in gradients])


def test_gradient_checkpointing_changes_neither_log_probabilities_nor_gradients(
    make_config: MakeConfig, workshop: Path, batch: PackedBatch
) -> None:
    saving = load_policy(make_config("model.gradient_checkpointing=true"), workshop / "sft")
    forwards: list[int] = []
    saving.language_model.layers[0].mlp.register_forward_pre_hook(lambda *_: forwards.append(1))
    logps, gradient = outcome(saving, batch)
    assert len(forwards) == 2  # once more in the backward pass
    expected_logps, expected_gradient = outcome(load_policy(make_config(), workshop / "sft"), batch)
    torch.testing.assert_close(logps, expected_logps, rtol=0, atol=1e-6)
    assert expected_gradient.norm() > 0
    assert (gradient - expected_gradient).norm() <= 1e-5 * expected_gradient.norm()


@pytest.mark.parametrize("base", ["bfloat16", "autocast"])
def test_in_bfloat16_the_adapter_stays_float32_and_the_numbers_are_close(
    make_config: MakeConfig, workshop: Path, batch: PackedBatch, base: str
) -> None:
    """A base with weights in bfloat16 and checkpointing, as in the GPU recipes; and one in float32 under autocast."""
    if base == "bfloat16":
        config = make_config("model.dtype=bfloat16", "model.gradient_checkpointing=true")
        precision = nullcontext()
    else:
        config, precision = make_config(), torch.autocast("cpu", torch.bfloat16)
    policy = load_policy(config, workshop / "sft")
    with precision:
        logps, gradient = outcome(policy, batch)
    assert policy.language_model.dtype == (torch.bfloat16 if base == "bfloat16" else torch.float32)
    assert {p.dtype for p in trainable(policy)} == {torch.float32}
    assert logps.dtype == gradient.dtype == torch.float32

    expected_logps, expected_gradient = outcome(load_policy(make_config(), workshop / "sft"), batch)
    off = (logps - expected_logps)[batch.mask_N_T].abs()
    assert 0 < off.mean() < 0.005  # numbers around 7, of 8 significant bits before the logits
    assert off.max() < 0.02
    assert (gradient - expected_gradient).norm() < 0.02 * expected_gradient.norm()


def test_flex_attention_is_refused_where_torch_cannot_train_with_it(make_config: MakeConfig) -> None:
    config = make_config("model.attention=flex", "model.path=nowhere")
    with pytest.raises(
        ConfigError, match=r"model\.attention is 'flex', which needs a GPU.* on cpu .*: use sdpa"
    ):
        load_policy(config)
