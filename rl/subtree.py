"""Attention of the packed row by subtrees: no token pair is computed to be masked.

What a node's tokens see is their own past and each of their ancestors whole. So each node attends

    own       to itself, causally
    below     and is attended to by all tokens below it, which are one stretch of the row, without a mask

and the parts of one query, softmax over keys A and softmax over keys B, are merged into the softmax over both by their
log-sum-exp:

    out = out_A exp(lse_A - lse) + out_B exp(lse_B - lse),   lse = log(exp(lse_A) + exp(lse_B))

as FlashAttention merges blocks of keys (Dao, arXiv 2307.08691) and Hydragen a shared prefix with what continues it
(Juravsky et al., arXiv 2402.05099). The backward of a part is that of its kernel given the merged result and
log-sum-exp: its probabilities are then those over all keys.

Beside one SDPA call per run of siblings (`rl.packed`), the reference, there are no masks, no copies of the path's keys
and no limit on how many siblings attend at once. The kernel is that which SDPA takes on a CPU, called by its own name
because SDPA does not give out the log-sum-exp; there is no other device that it runs on.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from typing import TYPE_CHECKING, Any

import torch
from torch.autograd.function import once_differentiable

from rl.decoder import refuse_attention_dropout, unread_in_layer

if TYPE_CHECKING:
    from rl.packed import Layout

_attend = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_attend_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward

Spans = Sequence[tuple[slice, slice]]
"""For each node, in the order of the row, where its own tokens are and where those below it."""


def subtree_spans(lengths: Sequence[int], parents: Sequence[int]) -> Spans:
    """The spans of a row in which the tokens below a node follow each other, as `rl.packed.pack` lays it.

    Args:
        lengths: tokens of each node, in the order of the row.
        parents: each node's parent, which comes before it; -1 for a root.
    """
    ends = list(accumulate(lengths))
    starts = [end - length for end, length in zip(ends, lengths, strict=True)]
    first, below = list(ends), [0] * len(lengths)
    for node in reversed(range(len(lengths))):
        parent = parents[node]
        if parent >= 0:
            first[parent] = starts[node]
            below[parent] += lengths[node] + below[node]
    return [
        (slice(start, end), slice(f, f + b))
        for start, end, f, b in zip(starts, ends, first, below, strict=True)
    ]


class SubtreeAttention(torch.autograd.Function):
    """The result [kv_heads, group, L, d] of queries of that shape on keys and values [kv_heads, L, d].

    Args:
        spans: of `subtree_spans`.
        unread: tokens at the beginning of the row, of whole roots, whose result is left 0 because nothing reads it.
        scale: what scores are multiplied with; None: 1 / sqrt(d).
    """

    @staticmethod
    def forward(
        ctx: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        spans: Spans,
        unread: int,
        scale: float | None,
    ) -> torch.Tensor:
        group, exact = query.shape[1], torch.promote_types(query.dtype, torch.float32)
        out, lse = _by_token(query, unread, exact), query.new_empty(query.shape[:3], dtype=exact)
        for own, below in reversed(spans):  # the tokens below come later in the row: they have their own part
            k, v = _shared(group, key, value, own)
            if own.stop > unread:
                out[:, :, own], lse[:, :, own] = _attend(query[:, :, own], k, v, is_causal=True, scale=scale)
            if below.stop > below.start:
                _merge(out[:, :, below], lse[:, :, below], *_attend(query[:, :, below], k, v, scale=scale))
        out = out.to(query.dtype)
        ctx.save_for_backward(query, key, value, out, lse)
        ctx.spans, ctx.unread, ctx.scale = spans, unread, scale
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        query, key, value, out, lse = ctx.saved_tensors
        of_query, of_key, of_value = (_by_token(x, ctx.unread, x.dtype) for x in (query, key, value))

        def of_part(queries: slice, keys: slice, *, causal: bool) -> tuple[torch.Tensor, ...]:
            of_q, of_k, of_v = _attend_backward(
                gradient[:, :, queries],
                query[:, :, queries],
                *_shared(query.shape[1], key, value, keys),
                out[:, :, queries],
                lse[:, :, queries],
                dropout_p=0.0,
                is_causal=causal,
                scale=ctx.scale,
            )
            return of_q, of_k.sum(1), of_v.sum(1)

        for own, below in reversed(ctx.spans):
            if own.stop > ctx.unread:
                of_query[:, :, own], of_key[:, own], of_value[:, own] = of_part(own, own, causal=True)
            if below.stop > below.start:
                of_q, of_k, of_v = of_part(below, own, causal=False)
                of_query[:, :, below] += of_q
                of_key[:, own] += of_k
                of_value[:, own] += of_v
        return of_query, of_key, of_value, None, None, None


def subtree_attention(
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: None,
    *,
    layout: Layout,
    tree: Spans,
    scaling: float | None = None,
    dropout: float = 0.0,
    **_: Any,
) -> tuple[torch.Tensor, None]:
    """Attention of the flat row within its tree.

    Args:
        module: the decoder layer's attention; it says which layer it is.
        query: [1, heads, L, d]; key, value: [1, kv_heads, L, d].
        tree: of `subtree_spans`.
    Returns:
        [1, L, heads, d], as transformers' attention functions return it.
    Raises:
        ValueError: the model has attention dropout.
    """
    refuse_attention_dropout("subtree", dropout)
    query, key = query.to(value.dtype), key.to(value.dtype)  # under autocast a norm of theirs gives float32
    heads, kv_heads = query.shape[1], key.shape[1]
    query = query.view(kv_heads, heads // kv_heads, *query.shape[2:])
    unread = unread_in_layer(module, layout.unread)
    attended = SubtreeAttention.apply(query, key[0], value[0], tree, unread, scaling)
    return attended.flatten(0, 1).transpose(0, 1)[None], None


def _shared(
    group: int, key: torch.Tensor, value: torch.Tensor, keys: slice
) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys and values of some tokens, [kv_heads, group, keys, d], which a group of queries shares without copies."""
    k, v = (x[:, None, keys].expand(-1, group, -1, -1) for x in (key, value))
    return k, v


def _by_token(like: torch.Tensor, unread: int, dtype: torch.dtype) -> torch.Tensor:
    """A tensor [..., L, d] to be filled, 0 for the tokens that are unread.

    It lies in memory as the projections do, token after token, so that what reads it copies nothing.
    """
    by_token = torch.empty_like(like.movedim(-2, 0), dtype=dtype, memory_format=torch.contiguous_format)
    by_token[:unread] = 0
    return by_token.movedim(0, -2)


def _merge(out: torch.Tensor, lse: torch.Tensor, more: torch.Tensor, more_lse: torch.Tensor) -> None:
    """Let the result over some keys be that over these and more, in place."""
    both = torch.logaddexp(lse, more_lse)
    out.lerp_(more.to(out.dtype), (more_lse - both).exp_()[..., None])
    lse.copy_(both)
