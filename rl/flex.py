"""FlexAttention of the packed row: one call over all its tokens, which skips blocks that no token may see.

The other way to attend within a prefix tree, `model.attention=flex`. Where one SDPA call per run of siblings
(`rl.packed`) copies the path's keys before them and computes what one sibling would see of another, the flat row here
attends to itself and the tree is in the mask: on a GPU one kernel, which looks at blocks of 128 x 128 tokens with a
pair to compute and at no others (Dong et al., arXiv 2412.05496). On a CPU, torch has no backward of it and materialises
the scores.

Who sees whom: a depth-first walk enters node n at `enter[n]` and has seen its subtree at `leave[n]`, so the nodes on
n's path are those with enter[path] <= enter[n] < leave[path]. Parents come before children in the flat row, and a
node's tokens see those before them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import torch
from torch import nn
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention

from rl.decoder import refuse_attention_dropout


def walk(parents: Sequence[int]) -> tuple[list[int], list[int]]:
    """When a depth-first walk enters each node, and when it has left its subtree, in nodes entered.

    Args:
        parents: each node's parent, which comes before it; -1 for a root.
    """
    subtree = [1] * len(parents)
    for node in reversed(range(len(parents))):
        if parents[node] >= 0:
            subtree[parents[node]] += subtree[node]
    enter, following = [], {-1: 0}  # when the walk enters the next child of a node
    for node, parent in enumerate(parents):
        enter.append(following[parent])
        following[node] = enter[node] + 1
        following[parent] += subtree[node]
    return enter, [first + nodes for first, nodes in zip(enter, subtree, strict=True)]


def tree_mask(lengths: Sequence[int], parents: Sequence[int], device: torch.device) -> BlockMask:
    """Which of the L tokens of a flat row each of them sees, as a mask of blocks.

    Args:
        lengths: tokens of each node, in the order of the row.
        parents: each node's parent, which comes before it; -1 for a root.
    """
    nodes = torch.repeat_interleave(torch.tensor(lengths))
    enter_L, leave_L = (torch.tensor(t, dtype=torch.int32)[nodes].to(device) for t in walk(parents))

    def sees(batch: torch.Tensor, head: torch.Tensor, query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
        return (key <= query) & (enter_L[key] <= enter_L[query]) & (enter_L[query] < leave_L[key])

    length = len(nodes)
    return _on(device, create_block_mask)(sees, None, None, length, length, device=device)


def flex_tree_attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: None,
    *,
    tree: BlockMask,
    scaling: float | None = None,
    dropout: float = 0.0,
    **_: Any,
) -> tuple[torch.Tensor, None]:
    """Attention of the flat row within its tree.

    Args:
        query: [1, heads, L, d]; key, value: [1, kv_heads, L, d].
        tree: of `tree_mask`.
    Returns:
        [1, L, heads, d], as transformers' attention functions return it.
    Raises:
        ValueError: the model has attention dropout.
    """
    refuse_attention_dropout("flex", dropout)
    attend = _on(query.device, flex_attention)
    attended = attend(query, key, value, block_mask=tree, scale=scaling, enable_gqa=True)
    return attended.transpose(1, 2), None


def _on(device: torch.device, function: Callable[..., Any]) -> Callable[..., Any]:
    return _compiled(function) if device.type == "cuda" else function


@cache
def _compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """Compiled once for all lengths above that of a block. What cannot be compiled raises: it would fill the memory."""
    return torch.compile(function, dynamic=True, fullgraph=True)
