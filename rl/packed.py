"""The packed forward: every token of a prefix tree computed once.

One volume is asked several questions, and each question is answered G times. As one padded batch the volume's
tokens would run through the language model once per completion. Packed, the tree is one flat sequence:

    volume ── question 1 ── completion 1          flat:  V V V V V  Q1 Q1  C C C  C C  Q2 Q2 Q2  C C  C C C
           │             └─ completion 2
           └─ question 2 ── completion 1          token-wise layers (projections, MLP, norms) see the flat row;
                         └─ completion 2          attention runs once per set of siblings

Attention per set of siblings ("per level"): the children of a node run as a padded batch [C, T] whose keys are
the node's path [A] followed by the child's own tokens [T]. A token thus attends to its own ancestors and its own
past only, at the rotary position it would have if it stood alone, so log-probabilities and gradients equal
those of one padded row per completion.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from peft import PeftModel
from torch import nn
from transformers import PreTrainedModel
from transformers.integrations.sdpa_attention import repeat_kv
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

ATTENTION_NAME = "packed_tree"


@dataclass
class Node:
    """A stretch of tokens and what continues it. Leaves with `scored=True` are completions."""

    token_ids: Sequence[int]
    positions_3_T: torch.Tensor | None = None
    """Rotary positions of a node that holds a volume; None: text that continues its parent."""
    features_V_H: torch.Tensor | None = None
    """Embeddings of the node's visual tokens, in order."""
    children: list[Node] = field(default_factory=list)
    scored: bool = False


@dataclass(frozen=True)
class Siblings:
    """Children of one node as a padded batch."""

    ancestors_A: torch.Tensor
    """Flat positions of the path's tokens."""
    tokens_C_T: torch.Tensor
    """Flat positions of each child's tokens, padded with its first token's."""
    valid_C_T: torch.Tensor
    mask_C_1_T_AT: torch.Tensor
    """Which keys (path, then own tokens) each query may see."""


@dataclass(frozen=True)
class PackedBatch:
    """A forest of prefix trees as one flat sequence of L tokens with N scored completions of at most T tokens."""

    input_ids_L: torch.Tensor
    positions_3_L: torch.Tensor
    features_V_H: torch.Tensor | None
    visual_V: torch.Tensor
    """Flat positions that take `features_V_H` instead of a token embedding."""
    siblings: list[Siblings]
    predictors_N_T: torch.Tensor
    """Flat position whose hidden state predicts completion token t."""
    targets_N_T: torch.Tensor
    mask_N_T: torch.Tensor
    """True where a completion has a token."""

    def to(self, device: torch.device | str) -> PackedBatch:
        """The batch on another device."""

        def move(value: Any) -> Any:
            if isinstance(value, torch.Tensor):
                return value.to(device)
            if isinstance(value, list):
                return [Siblings(**{k: move(v) for k, v in vars(s).items()}) for s in value]
            return value

        return PackedBatch(**{name: move(value) for name, value in vars(self).items()})


def pack(roots: Sequence[Node], visual_token_id: int) -> PackedBatch:
    """Flatten trees into one sequence, parents before children.

    Raises:
        ValueError: a scored root (nothing predicts its first token), an empty inner node, or a node whose
            features do not match its visual tokens.
    """
    builder = _Builder(visual_token_id)
    builder.add_siblings(list(roots), path=[], next_position=0)
    return builder.finish()


class _Builder:
    def __init__(self, visual_token_id: int) -> None:
        self.visual_token_id = visual_token_id
        self.ids: list[int] = []
        self.positions: list[torch.Tensor] = []
        self.features: list[torch.Tensor] = []
        self.siblings: list[Siblings] = []
        self.completions: list[tuple[int, range]] = []  # (flat position of the parent's last token, own span)

    def add_siblings(self, nodes: list[Node], path: list[int], next_position: int) -> None:
        spans, follow = [], []
        for node in nodes:
            span, after = self._add(node, path, next_position)
            spans.append(span)
            follow.append(after)
        if any(spans):
            self.siblings.append(_sibling_batch([s for s in spans if s], path))
        for node, span, after in zip(nodes, spans, follow, strict=True):
            if node.children:
                if not span:
                    raise ValueError("a node without tokens cannot have children")
                self.add_siblings(node.children, [*path, *span], after)

    def _add(self, node: Node, path: list[int], next_position: int) -> tuple[range, int]:
        start = len(self.ids)
        span = range(start, start + len(node.token_ids))
        visual = sum(1 for t in node.token_ids if t == self.visual_token_id)
        rows = 0 if node.features_V_H is None else len(node.features_V_H)
        if visual != rows:
            raise ValueError(f"a node has {visual} visual tokens and {rows} feature rows")
        self.ids += node.token_ids
        if node.features_V_H is not None:
            self.features.append(node.features_V_H)
        positions = node.positions_3_T
        if positions is None:
            positions = torch.arange(next_position, next_position + len(span)).expand(3, -1)
        else:
            positions = positions + next_position
        self.positions.append(positions)
        if node.scored:
            if not path:
                raise ValueError("a completion needs a prompt before it")
            self.completions.append((path[-1], span))
        after = int(positions.max()) + 1 if len(span) else next_position
        return span, after

    def finish(self) -> PackedBatch:
        ids = torch.tensor(self.ids, dtype=torch.long)
        longest = max((len(span) for _, span in self.completions), default=0)
        shape = (len(self.completions), longest)
        predictors = torch.zeros(shape, dtype=torch.long)
        targets = torch.zeros(shape, dtype=torch.long)
        mask = torch.zeros(shape, dtype=torch.bool)
        for row, (parent, span) in enumerate(self.completions):
            if span:
                n = len(span)
                predictors[row, :n] = torch.tensor([parent, *span[:-1]])
                targets[row, :n] = ids[span.start : span.stop]
                mask[row, :n] = True
        return PackedBatch(
            input_ids_L=ids,
            positions_3_L=torch.cat(self.positions, dim=1),
            features_V_H=torch.cat(self.features) if self.features else None,
            visual_V=(ids == self.visual_token_id).nonzero().flatten(),
            siblings=self.siblings,
            predictors_N_T=predictors,
            targets_N_T=targets,
            mask_N_T=mask,
        )


def _sibling_batch(spans: list[range], path: list[int]) -> Siblings:
    longest = max(len(span) for span in spans)
    starts = torch.tensor([span.start for span in spans])
    lengths = torch.tensor([len(span) for span in spans])
    offsets = torch.arange(longest)
    valid = offsets < lengths[:, None]
    tokens = starts[:, None] + torch.where(valid, offsets, 0)
    # padded queries see their own (padded) past too: their output is thrown away, but must not be NaN
    own = (offsets[None, :] <= offsets[:, None]).expand(len(spans), 1, longest, longest)
    ancestors = torch.ones(len(spans), 1, longest, len(path), dtype=torch.bool)
    return Siblings(
        ancestors_A=torch.tensor(path, dtype=torch.long),
        tokens_C_T=tokens,
        valid_C_T=valid,
        mask_C_1_T_AT=torch.cat([ancestors, own], dim=-1),
    )


def packed_tree_attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    siblings: list[Siblings],
    scaling: float | None = None,
    dropout: float = 0.0,
    **_: Any,
) -> tuple[torch.Tensor, None]:
    """Attention of the flat row, one SDPA call per set of siblings.

    Args:
        query: [1, heads, L, d]; key, value: [1, kv_heads, L, d].
    Returns:
        [1, L, heads, d], as transformers' attention functions return it.
    """
    repeats = query.shape[1] // key.shape[1]
    q, k, v = query[0], key[0], value[0]
    output = torch.empty_like(q)
    for s in siblings:
        children = s.tokens_C_T.shape[0]

        def keys_of(x: torch.Tensor, s: Siblings = s, children: int = children) -> torch.Tensor:
            path = x[:, s.ancestors_A].expand(children, -1, -1, -1)
            own = x[:, s.tokens_C_T].transpose(0, 1)
            return repeat_kv(torch.cat([path, own], dim=2), repeats)

        attended = F.scaled_dot_product_attention(
            q[:, s.tokens_C_T].transpose(0, 1),
            keys_of(k),
            keys_of(v),
            attn_mask=s.mask_C_1_T_AT,
            dropout_p=dropout,
            scale=scaling,
        )  # [C, heads, T, d]
        output[:, s.tokens_C_T[s.valid_C_T]] = attended.transpose(0, 1)[:, s.valid_C_T]
    return output.transpose(0, 1)[None], None


ALL_ATTENTION_FUNCTIONS.register(ATTENTION_NAME, packed_tree_attention)


class PackedPolicy(nn.Module):
    """A causal language model (with or without vision, with or without LoRA) that scores packed batches.

    This module, not a part of it, is what `accelerator.prepare` must wrap: calling a submodule of a
    data-parallel module skips gradient synchronisation without an error.
    """

    def __init__(self, model: PreTrainedModel | PeftModel) -> None:
        super().__init__()
        self.model: Any = model
        self.language_model.config._attn_implementation = ATTENTION_NAME

    @property
    def causal_lm(self) -> Any:
        """The model without its PEFT wrapper."""
        return self.model.get_base_model() if hasattr(self.model, "get_base_model") else self.model

    @property
    def language_model(self) -> Any:
        """The decoder stack."""
        body = self.causal_lm.model
        return body.language_model if hasattr(body, "language_model") else body

    @property
    def device(self) -> torch.device:
        """Where the decoder's weights are."""
        return next(self.language_model.parameters()).device

    def forward(self, batch: PackedBatch, temperature: float = 1.0) -> tuple[torch.Tensor, torch.Tensor]:
        """Log-probability of each completion token, and the entropy of the distribution it was drawn from.

        Args:
            temperature: the sampling temperature; logits are divided by it, as the engine does.
        Returns:
            logps_N_T (0 where there is no token), entropies_N_T (without gradient), both float32.
        """
        logits = self.logits(batch)
        logps = F.log_softmax(logits / temperature, dim=-1)
        token_logps = logps.gather(-1, batch.targets_N_T[batch.mask_N_T][:, None]).squeeze(-1)
        with torch.no_grad():
            entropy = -(logps.exp() * logps).sum(-1)
        out = torch.zeros(2, *batch.mask_N_T.shape, dtype=logps.dtype, device=logps.device)
        logps_N_T = out[0].masked_scatter(batch.mask_N_T, token_logps)
        return logps_N_T, out[1].masked_scatter(batch.mask_N_T, entropy)

    def logits(self, batch: PackedBatch) -> torch.Tensor:
        """Float32 logits [tokens, vocabulary] that predict the completion tokens, in row order."""
        embeds = self.language_model.embed_tokens(batch.input_ids_L)
        if batch.features_V_H is not None:
            embeds = embeds.index_copy(0, batch.visual_V, batch.features_V_H.to(embeds.dtype))
        hidden = self.language_model(
            inputs_embeds=embeds[None],
            position_ids=self._positions(batch.positions_3_L),
            attention_mask={"full_attention": None},  # a ready mask mapping: none is built
            use_cache=False,
            siblings=batch.siblings,
        ).last_hidden_state[0]
        predictors = hidden[batch.predictors_N_T[batch.mask_N_T]]
        logits = self.causal_lm.lm_head(predictors)
        return logits if logits.dtype == torch.float64 else logits.float()

    def _positions(self, positions_3_L: torch.Tensor) -> torch.Tensor:
        multimodal = "mrope_section" in (getattr(self.language_model.config, "rope_parameters", None) or {})
        return positions_3_L[:, None] if multimodal else positions_3_L[:1]
