"""Attention of a tree by subtrees is that of a mask, and its gradients are those of the formula."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from rl.subtree import SubtreeAttention, subtree_spans

LENGTHS, PARENTS = [5, 3, 2, 4, 3, 1, 2], [-1, -1, 0, 0, 2, 2, 1]
"""Two volumes; two questions about the first, one of them answered twice, and one answer to the second."""
KV_HEADS, GROUP, D = 2, 3, 4


def tensors(dtype: torch.dtype = torch.float64) -> list[torch.Tensor]:
    """Queries [kv_heads, group, L, d], keys and values [kv_heads, L, d]."""
    torch.manual_seed(0)
    shape = (sum(LENGTHS), D)
    return [
        torch.randn(*heads, *shape).to(dtype).requires_grad_()
        for heads in ((KV_HEADS, GROUP), (KV_HEADS,), (KV_HEADS,))
    ]


def seen() -> torch.Tensor:
    """[L, L]: whether the key's node is the query's or before it on its path, and the key no later."""
    nodes = [node for node, length in enumerate(LENGTHS) for _ in range(length)]

    def path(node: int) -> set[int]:
        return {node, *(path(PARENTS[node]) if PARENTS[node] >= 0 else ())}

    return torch.tensor([[key in path(query) for key in nodes] for query in nodes]).tril()


def masked(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    return F.scaled_dot_product_attention(
        query, key[:, None].expand_as(query), value[:, None].expand_as(query), attn_mask=seen(), scale=0.7
    )


def by_subtrees(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, unread: int = 0) -> torch.Tensor:
    return SubtreeAttention.apply(query, key, value, subtree_spans(LENGTHS, PARENTS), unread, 0.7)


def test_the_spans_are_each_nodes_tokens_and_those_below_it() -> None:
    spans = subtree_spans(LENGTHS, PARENTS)
    assert [(own.start, own.stop) for own, _ in spans] == [
        (0, 5), (5, 8), (8, 10), (10, 14), (14, 17), (17, 18), (18, 20)
    ]  # fmt: skip
    below = {i: list(range(b.start, b.stop)) for i, (_, b) in enumerate(spans) if b.stop > b.start}
    assert below == {0: list(range(8, 18)), 1: [18, 19], 2: list(range(14, 18))}


@pytest.mark.parametrize(
    ("dtype", "off"), [(torch.float64, 1e-12), (torch.float32, 1e-5), (torch.bfloat16, 0.03)]
)
def test_it_is_attention_with_the_mask_of_the_tree(dtype: torch.dtype, off: float) -> None:
    found = []
    for attend in (masked, by_subtrees):
        inputs = tensors(dtype)
        out = attend(*inputs)
        assert out.dtype == dtype
        out.float().square().sum().backward()
        found.append([out.detach(), *(x.grad for x in inputs)])
    for ours, theirs in zip(found[1], found[0], strict=True):
        assert (ours - theirs).abs().max() <= off * theirs.abs().max()


def test_its_derivative_is_that_of_the_formula() -> None:
    assert torch.autograd.gradcheck(by_subtrees, tensors())


def test_roots_that_are_not_read_give_0_and_their_keys_and_values_still_learn() -> None:
    unread = LENGTHS[0] + LENGTHS[1]
    inputs, expected = tensors(), masked(*tensors())
    out = by_subtrees(*inputs, unread)
    assert not out[:, :, :unread].any()
    torch.testing.assert_close(out[:, :, unread:], expected[:, :, unread:])
    assert torch.autograd.gradcheck(lambda *x: by_subtrees(*x, unread), inputs)
    out.square().sum().backward()
    of_query, of_key, of_value = (x.grad for x in inputs)
    assert not of_query[:, :, :unread].any()
    assert of_key[:, :unread].any()
    assert of_value[:, :unread].any()
