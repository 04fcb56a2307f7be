"""Operations as they are predicted are those that torch counts in the real forward and backward."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

from rl.config import LoraConfig
from rl.packed import Node, PackedBatch, PackedPolicy, pack
from rl.plan.flops import Forest, Siblings, TreeShape, backward, forward, vision
from rl.plan.sizes import ModelSizes

aten = torch.ops.aten
Shape = tuple[int, ...]
SHAPE = TreeShape(volume=150, question=12, completion=20, generations=4, attention="sdpa")
RAGGED = [[7, 20, 0], [3]], [[11, 2]]
"""Completion lengths of the questions of two volumes."""


def trees(completions: tuple[list[list[int]], ...], volume: int, question: int) -> list[Node]:
    def node(tokens: int, children: list[Node], scored: bool = False) -> Node:
        return Node([1] * tokens, children=children, scored=scored)

    return [
        node(volume, [node(question, [node(n, [], True) for n in lengths]) for lengths in questions])
        for questions in completions
    ]


def forest_of(batch: PackedBatch, attention: str = "sdpa") -> Forest:
    """What the packed forward was given, as the plan describes it."""
    lengths = batch.layout.lengths
    siblings = tuple(
        Siblings(sum(lengths[i] for i in s.path), tuple(lengths[i] for i in s.children))
        for s in batch.layout.siblings
    )
    return Forest(siblings, int(batch.mask_N_T.sum()), batch.layout.unread, attention)


def counting() -> FlopCounterMode:
    """Torch's own counter, told that the CPU's attention kernel is attention too, and what it leaves out if causal."""

    def computed(whole: int, causal: bool, q: Shape) -> int:
        return whole * (q[2] + 1) // (2 * q[2]) if causal else whole

    def there(q: Shape, k: Shape, v: Shape, dropout: float = 0.0, causal: bool = False, **_: object) -> int:
        return computed(sdpa_flop_count(q, k, v), causal, q)

    def back(
        grad: Shape,
        q: Shape,
        k: Shape,
        v: Shape,
        out: Shape,
        logsumexp: Shape,
        dropout: float,
        causal: bool,
        **_: object,
    ) -> int:
        return computed(sdpa_backward_flop_count(grad, q, k, v), causal, q)

    kernels = {
        aten._scaled_dot_product_flash_attention_for_cpu: there,
        aten._scaled_dot_product_flash_attention_for_cpu_backward: back,
    }
    return FlopCounterMode(display=False, custom_mapping=kernels)


@pytest.fixture(params=["even", "ragged"])
def batch(request: pytest.FixtureRequest) -> PackedBatch:
    even = ([[SHAPE.completion] * SHAPE.generations] * 3,) * 2
    return pack(trees(even if request.param == "even" else RAGGED, SHAPE.volume, SHAPE.question), 500)


def test_the_plans_tree_is_the_packed_one() -> None:
    even = ([[SHAPE.completion] * SHAPE.generations] * 3, [[SHAPE.completion] * SHAPE.generations] * 2)
    batch = pack(trees(even, SHAPE.volume, SHAPE.question), 500)
    forest = SHAPE.forest([3, 2])
    assert Counter(forest.siblings) == Counter(forest_of(batch).siblings)
    assert (forest.tokens, forest.scored) == (len(batch.input_ids_L), int(batch.mask_N_T.sum()))
    assert forest.unread == batch.layout.unread == 2 * 150
    assert SHAPE.padded_tokens(3) + SHAPE.padded_tokens(2) == 20 * (150 + 12 + 20)


def test_the_forward_is_counted_exactly(
    policy: PackedPolicy, sizes: ModelSizes, lora: LoraConfig, batch: PackedBatch
) -> None:
    """Masked attention included: without it, what is needed is less, but with attention by subtrees."""
    with counting() as counter, torch.no_grad():
        policy(batch)
    expected = forward(sizes.language, lora, forest_of(batch, policy.attention))
    assert counter.get_total_flops() == expected.executed
    assert (expected.needed < expected.executed) == (policy.attention == "sdpa")


@pytest.mark.parametrize("logits_in_parts", [False, True])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_the_backward_is_counted_exactly(
    policy: PackedPolicy,
    sizes: ModelSizes,
    lora: LoraConfig,
    batch: PackedBatch,
    checkpointing: bool,
    logits_in_parts: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if logits_in_parts:
        monkeypatch.setattr("rl.microbatch.LOGITS_AT_ONCE", 10 * sizes.language.vocabulary)
    if checkpointing:
        policy.language_model.gradient_checkpointing_enable({"use_reentrant": False})
    logps_N_T, _ = policy.train()(batch)
    with counting() as counter:
        logps_N_T.sum().backward()
    forest = forest_of(batch, policy.attention)
    expected = backward(sizes.language, lora, forest, checkpointing=checkpointing)
    assert counter.get_total_flops() == expected.executed


@pytest.mark.parametrize("grid", [(3, 2, 2), (2, 5, 3), (1, 4, 6)])
def test_the_vision_tower_is_counted_exactly(
    policy: PackedPolicy, sizes: ModelSizes, grid: tuple[int, int, int]
) -> None:
    """Windows are two tokens wide here: some are cut off at the edge."""
    t, h, w = grid[0], 2 * grid[1], 2 * grid[2]
    patches = torch.randn(t * h * w, 3 * 2 * 8 * 8)
    with counting() as counter, torch.no_grad():
        policy.causal_lm.model.visual(patches, grid_thw=torch.tensor([[t, h, w]]))
    assert counter.get_total_flops() == vision(sizes.vision, grid).executed
