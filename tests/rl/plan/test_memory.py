"""Memory as it is predicted is what autograd keeps and what the allocator hands out."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from itertools import accumulate

import pytest
import torch
from torch.profiler import profile

from rl.config import LoraConfig
from rl.packed import Node, PackedPolicy, pack
from rl.plan.flops import TreeShape
from rl.plan.memory import LOGIT_COPIES, TrainerMemory, trainer_memory
from rl.plan.sizes import ModelSizes

SHAPE = TreeShape(volume=150, question=12, completion=20, generations=4, attention="sdpa")
QUESTIONS = [3, 3]
ADAPTED = [
    LoraConfig().target_modules,
    ["q_proj", "v_proj"],
    ["k_proj", "gate_proj", "up_proj"],
]
"""Each has an adapter before the attention: without, the first layer keeps less of it than is counted."""


def prepared(policy: PackedPolicy, dtype: torch.dtype, checkpointing: bool) -> PackedPolicy:
    """As `load_policy` leaves it: the base in `dtype`, the adapter in float32."""
    for parameter in policy.parameters():
        if not parameter.requires_grad:
            parameter.data = parameter.data.to(dtype)
    if checkpointing:
        policy.language_model.gradient_checkpointing_enable({"use_reentrant": False})
    return policy.train()


def predicted(
    sizes: ModelSizes, lora: LoraConfig, attention: str, dtype: torch.dtype, checkpointing: bool
) -> TrainerMemory:
    return trainer_memory(
        sizes.language,
        lora,
        replace(SHAPE, attention=attention).forest(QUESTIONS),
        number_bytes=dtype.itemsize,
        checkpointing=checkpointing,
        reference=False,
    )


def run(policy: PackedPolicy) -> torch.Tensor:
    roots = []
    for count in QUESTIONS:
        root = Node([1] * SHAPE.volume)
        for _ in range(count):
            leaves = [Node([1] * SHAPE.completion, scored=True) for _ in range(SHAPE.generations)]
            root.children.append(Node([1] * SHAPE.question, children=leaves))
        roots.append(root)
    logps_N_T, _ = policy(pack(roots, 500))
    return logps_N_T.sum()


def most_allocated(work: Callable[[], object]) -> int:
    """Bytes at the peak, beyond what was there before.

    Without oneDNN, whose products in bfloat16 take up to a megabyte while they are computed, however small they are.
    """
    with torch.backends.mkldnn.flags(enabled=False), profile(profile_memory=True) as profiled:
        work()
    assert profiled.profiler is not None
    events = [e for e in profiled.profiler.kineto_results.events() if e.name() == "[memory]"]
    return max(accumulate(e.nbytes() for e in sorted(events, key=lambda e: e.start_ns())))


@pytest.mark.parametrize("lora", ADAPTED, indirect=True, ids="+".join)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_autograd_keeps_of_a_layer_is_counted_to_a_hundredth(
    policy: PackedPolicy, sizes: ModelSizes, lora: LoraConfig, dtype: torch.dtype
) -> None:
    prepared(policy, dtype, checkpointing=False)
    own = {p.untyped_storage().data_ptr() for p in policy.parameters()}
    kept: dict[int, torch.Tensor] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        address = tensor.untyped_storage().data_ptr()
        if address not in own:
            kept.setdefault(address, tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        run(policy)
    found = sum(tensor.untyped_storage().nbytes() for tensor in kept.values())
    memory = predicted(sizes, lora, policy.attention, dtype, checkpointing=False)
    assert found == pytest.approx(memory.kept + memory.logits / LOGIT_COPIES, rel=0.01)


@pytest.mark.parametrize("lora", ADAPTED, indirect=True, ids="+".join)
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_peak_of_a_training_step_is_predicted_within_a_twentieth(
    policy: PackedPolicy, sizes: ModelSizes, lora: LoraConfig, dtype: torch.dtype, checkpointing: bool
) -> None:
    prepared(policy, dtype, checkpointing)
    run(policy).backward()  # the gradients of the adapter are there from now on
    memory = predicted(sizes, lora, policy.attention, dtype, checkpointing)
    found = most_allocated(lambda: run(policy).backward())
    assert found == pytest.approx(memory.peak - memory.resident, rel=0.05)


def test_checkpointing_saves_memory_and_a_reference_costs_some(sizes: ModelSizes, lora: LoraConfig) -> None:
    without, with_it = (
        predicted(sizes, lora, "sdpa", torch.bfloat16, checkpointing=c) for c in (False, True)
    )
    assert with_it.peak < without.peak
    assert with_it.resident == without.resident
    referring = trainer_memory(
        sizes.language,
        lora,
        SHAPE.forest(QUESTIONS),
        number_bytes=2,
        checkpointing=True,
        reference=True,
    )
    assert referring.peak - with_it.peak == 4 * sizes.language.layers * sizes.language.lora_weights(lora)
