"""The packed forward: every token of a prefix tree computed once.

One volume is asked several questions, and each question is answered G times. As one padded batch the volume's
tokens would run through the language model once per completion. Packed, the tree is one flat sequence:

    volume ── question 1 ── completion 1          flat:  V V V V V  Q1 Q1  Q2 Q2 Q2  C C C  C C  C C  C C C
           │             └─ completion 2
           └─ question 2 ── completion 1          token-wise layers (projections, MLP, norms) see the flat row;
                         └─ completion 2          attention runs once per set of siblings

Attention per set of siblings ("per level"): the queries of a node's children are one row of T tokens, and its keys the
node's path [A], once, followed by the same T tokens, each masked but for its own child's past. A token thus attends to
its own ancestors and its own past only, at the rotary position it would have if it stood alone, so log-probabilities
and gradients equal those of one padded row per completion. Children with too many tokens for that attend in several
runs (`rl.microbatch.attended_at_once`). This is the reference, on every device; `rl.subtree` (CPU) computes no pair to
mask it, `rl.flex` (GPU) attends in one call.

No completion is predicted from a volume's own tokens: of the last layer they need keys and values alone, so that their
queries attend to nothing there, and all but the projections to keys and values leaves them out.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from peft import PeftModel
from torch import nn
from torch.nn.attention.flex_attention import BlockMask
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from rl.decoder import leave_unread_out, own_config, require_plain_layers, unread_in_layer
from rl.flex import flex_tree_attention, tree_mask
from rl.gated import save_gate_memory
from rl.lora import fuse_adapters
from rl.microbatch import attended_at_once, scored_at_once
from rl.norm import save_norm_memory
from rl.subtree import Spans, subtree_attention, subtree_spans


@dataclass
class Node:
    """A stretch of tokens and what continues it. With `scored=True` it is a completion: text, and nothing follows."""

    token_ids: Sequence[int]
    positions_3_T: torch.Tensor | None = None
    """Rotary positions of a node that holds a volume; None: text that continues its parent."""
    features_V_H: torch.Tensor | None = None
    """Embeddings of the node's visual tokens, in order."""
    children: list[Node] = field(default_factory=list)
    scored: bool = False


@dataclass(frozen=True)
class Siblings:
    """Children of one node that attend in one call, as indices into the batch's nodes. A root is alone."""

    path: tuple[int, ...]
    """The nodes from the root to the parent."""
    children: tuple[int, ...]


@dataclass(frozen=True)
class Layout:
    """How the flat row is cut into nodes."""

    lengths: tuple[int, ...]
    siblings: tuple[Siblings, ...]
    """In the order of the row, each a stretch of it."""
    unread: int
    """Tokens at the beginning of the row, those of all roots, from which nothing is predicted; 0: some root is read."""

    @property
    def parents(self) -> list[int]:
        """Each node's parent, -1 for a root."""
        parents = [-1] * len(self.lengths)
        for s in self.siblings:
            for child in s.children:
                parents[child] = s.path[-1] if s.path else -1
        return parents


@dataclass(frozen=True)
class PackedBatch:
    """A forest of prefix trees as one flat sequence of L tokens with N scored completions of at most T tokens.

    The completions come in the order of the sequence: those that continue a node before those further down.
    """

    input_ids_L: torch.Tensor
    positions_3_L: torch.Tensor
    features_V_H: torch.Tensor | None
    visual_V: torch.Tensor
    """Flat positions that take `features_V_H` instead of a token embedding."""
    layout: Layout
    predictors_N_T: torch.Tensor
    """Flat position whose hidden state predicts completion token t."""
    targets_N_T: torch.Tensor
    mask_N_T: torch.Tensor
    """True where a completion has a token."""

    def to(self, device: torch.device | str) -> PackedBatch:
        """The batch on another device."""
        return PackedBatch(
            input_ids_L=self.input_ids_L.to(device),
            positions_3_L=self.positions_3_L.to(device),
            features_V_H=None if self.features_V_H is None else self.features_V_H.to(device),
            visual_V=self.visual_V.to(device),
            layout=self.layout,
            predictors_N_T=self.predictors_N_T.to(device),
            targets_N_T=self.targets_N_T.to(device),
            mask_N_T=self.mask_N_T.to(device),
        )


def pack(roots: Sequence[Node], visual_token_id: int) -> PackedBatch:
    """Flatten trees into one sequence, parents before children.

    Raises:
        ValueError: a scored root (nothing predicts its first token), a scored node with children or features, an empty
            inner node, or a node whose features do not match its visual tokens.
    """
    builder = _Builder(visual_token_id)
    builder.add_siblings(list(roots), path=[], next_position=0)
    read = any(child.scored for root in roots for child in root.children)
    return builder.finish(unread=0 if read else sum(len(root.token_ids) for root in roots))


@dataclass(frozen=True)
class _Placed:
    """A node that has been given its place in the flat row."""

    index: int
    """Among the nodes that have tokens."""
    span: range
    next_position: int


class _Builder:
    def __init__(self, visual_token_id: int) -> None:
        self.visual_token_id = visual_token_id
        self.ids: list[int] = []
        self.lengths: list[int] = []
        self.positions: list[torch.Tensor] = []
        self.visual: list[int] = []
        self.features: list[torch.Tensor] = []
        self.siblings: list[Siblings] = []
        self.completions: list[tuple[int, range]] = []  # (flat position of the parent's last token, own span)

    def add_siblings(self, nodes: list[Node], path: list[_Placed], next_position: int) -> None:
        placed = [self._place(node, path, next_position) for node in nodes]
        filled = [p for p in placed if p.span]
        for run in attended_at_once(sum(len(p.span) for p in path), [len(p.span) for p in filled]):
            children = filled[run.start : run.stop]
            self.siblings.append(Siblings(tuple(p.index for p in path), tuple(p.index for p in children)))
        for node, place in zip(nodes, placed, strict=True):
            if node.children:
                if not place.span:
                    raise ValueError("a node without tokens cannot have children")
                self.add_siblings(node.children, [*path, place], place.next_position)

    def _place(self, node: Node, path: list[_Placed], next_position: int) -> _Placed:
        start = len(self.ids)
        span = range(start, start + len(node.token_ids))
        if node.scored:  # a visual token in a completion is one the model said: text
            if not path:
                raise ValueError("a completion needs a prompt before it")
            if node.children or node.positions_3_T is not None or node.features_V_H is not None:
                raise ValueError("a completion is text and nothing continues it")
            self.completions.append((path[-1].span[-1], span))
        else:
            visual = [i for i, t in zip(span, node.token_ids, strict=True) if t == self.visual_token_id]
            rows = 0 if node.features_V_H is None else len(node.features_V_H)
            if len(visual) != rows:
                raise ValueError(f"a node has {len(visual)} visual tokens and {rows} feature rows")
            self.visual += visual
        if not span:
            return _Placed(-1, span, next_position)
        self.ids.extend(node.token_ids)
        self.lengths.append(len(span))
        if node.features_V_H is not None:
            self.features.append(node.features_V_H)
        positions = node.positions_3_T
        if positions is None:
            positions = torch.arange(len(span)).expand(3, -1)
        positions = positions + next_position
        self.positions.append(positions)
        return _Placed(len(self.lengths) - 1, span, int(positions.max()) + 1)

    def finish(self, unread: int) -> PackedBatch:
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
            visual_V=torch.tensor(self.visual, dtype=torch.long),
            layout=Layout(tuple(self.lengths), tuple(self.siblings), unread),
            predictors_N_T=predictors,
            targets_N_T=targets,
            mask_N_T=mask,
        )


def sibling_masks(layout: Layout, device: torch.device, dtype: torch.dtype) -> list[torch.Tensor | None]:
    """For each run of siblings, what is added to the scores [T, A + T] of its queries: 0 for the path and the past of a
    query's own node, minus infinity for the rest.

    None for a root, which is plainly causal. Numbers of the queries' dtype, because of others every layer would make
    and keep a copy.
    """
    masks: list[torch.Tensor | None] = []
    for s in layout.siblings:
        if not s.path:
            masks.append(None)
            continue
        lengths = torch.tensor([layout.lengths[child] for child in s.children], device=device)
        child_T = torch.repeat_interleave(lengths)
        own = (child_T[:, None] == child_T).tril()
        seen = F.pad(own, (sum(layout.lengths[node] for node in s.path), 0), value=True)
        masks.append(torch.zeros(seen.shape, dtype=dtype, device=device).masked_fill(~seen, float("-inf")))
    return masks


def packed_tree_attention(
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: None,
    *,
    layout: Layout,
    tree: Sequence[torch.Tensor | None],
    scaling: float | None = None,
    dropout: float = 0.0,
    **_: Any,
) -> tuple[torch.Tensor, None]:
    """Attention of the flat row, one SDPA call per run of siblings.

    Args:
        module: the decoder layer's attention; it says which layer it is.
        query: [1, heads, L, d]; key, value: [1, kv_heads, L, d].
        tree: of `sibling_masks`.
    Returns:
        [1, L, heads, d], as transformers' attention functions return it.
    """
    heads, kv_heads = query.shape[1], key.shape[1]
    unread = unread_in_layer(module, layout.unread)
    # one split, because its backward is one concatenation; slicing would write a row of zeros per slice
    q_runs = query.split([sum(layout.lengths[child] for child in s.children) for s in layout.siblings], dim=2)
    k_nodes, v_nodes = (x.split(layout.lengths, dim=2) for x in (key, value))
    outputs = []
    for s, mask_T_AT, q in zip(layout.siblings, tree, q_runs, strict=True):
        if unread and not s.path:
            outputs.append(torch.zeros_like(q))
            continue
        # grouped queries: [kv_heads, heads of a group, T, d] beside keys that a group shares without copies
        q = q.view(kv_heads, heads // kv_heads, *q.shape[2:])
        k, v = (
            torch.cat([nodes[i] for i in (*s.path, *s.children)], dim=2)
            .transpose(0, 1)
            .expand(-1, q.shape[1], -1, -1)
            for nodes in (k_nodes, v_nodes)
        )
        attended = F.scaled_dot_product_attention(
            q, k, v, attn_mask=mask_T_AT, dropout_p=dropout, is_causal=mask_T_AT is None, scale=scaling
        )
        outputs.append(attended.reshape(1, heads, *q.shape[2:]))
    return torch.cat(outputs, dim=2).transpose(1, 2), None


ATTENTIONS = {"sdpa": packed_tree_attention, "subtree": subtree_attention, "flex": flex_tree_attention}
"""`model.attention` -> its function, which transformers knows as "packed_tree_" and the name."""
for name, function in ATTENTIONS.items():
    ALL_ATTENTION_FUNCTIONS.register(f"packed_tree_{name}", function)


class PackedPolicy(nn.Module):
    """A causal language model (with or without vision, with or without LoRA) that scores packed batches.

    GRPO adds up the ranks' gradients itself (`rl.training.clip_gradients`). A data-parallel wrapper, such as that of
    `accelerator.prepare`, must be given this module and be called: calling a part of it skips synchronisation without
    an error.

    The model is changed for good: the name of its attention, the forward of its MLPs (`rl.gated`), norms (`rl.norm`)
    and adapters (`rl.lora`), hooks on the last layer. It computes the same as before, but for rounding.

    Args:
        attention: "sdpa", one call per run of siblings, the reference; "subtree", one per node and what is below it
            (`rl.subtree`; CPU); or "flex", one call (`rl.flex`; GPU).
    Raises:
        ValueError: a model whose layers look at a window of tokens, or take visual features after the first.
    """

    def __init__(self, model: PreTrainedModel | PeftModel, attention: str = "sdpa") -> None:
        super().__init__()
        self.model: Any = model
        self.attention = attention
        require_plain_layers(self.causal_lm.config, self.language_model.config)
        own_config(self.language_model)._attn_implementation = f"packed_tree_{attention}"
        leave_unread_out(self.language_model.layers[-1])
        for layer in self.language_model.layers:
            save_gate_memory(layer.mlp)
        save_norm_memory(self.language_model)
        fuse_adapters(self.language_model)

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
        hidden_n_H, targets_n = self._predictors(batch), batch.targets_N_T[batch.mask_N_T]
        rows = scored_at_once(self.language_model.config.vocab_size)
        parts = zip(hidden_n_H.split(rows), targets_n.split(rows), strict=True)
        if len(targets_n) <= rows:
            scored = [self._score(hidden, targets, temperature) for hidden, targets in parts]
        else:
            scored = [checkpoint(self._score, *part, temperature, use_reentrant=False) for part in parts]
        logps_n, entropies_n = (torch.cat(x) for x in zip(*scored, strict=True))
        nothing_N_T = logps_n.new_zeros(batch.mask_N_T.shape)
        logps_N_T, entropies_N_T = (
            nothing_N_T.masked_scatter(batch.mask_N_T, x) for x in (logps_n, entropies_n)
        )
        return logps_N_T, entropies_N_T

    def _predictors(self, batch: PackedBatch) -> torch.Tensor:
        """Hidden states [tokens, H] that predict the completion tokens, in row order."""
        embeds = self.language_model.embed_tokens(batch.input_ids_L)
        if batch.features_V_H is not None:
            embeds = embeds.index_copy(0, batch.visual_V, batch.features_V_H.to(embeds.dtype))
        hidden = self.language_model(
            inputs_embeds=embeds[None],
            position_ids=self._positions(batch.positions_3_L),
            use_cache=False,
            layout=batch.layout,
            tree=self._tree(batch.layout),  # transformers makes no mask for an attention of ours
        ).last_hidden_state[0]
        return hidden[batch.predictors_N_T[batch.mask_N_T]]

    def _tree(self, layout: Layout) -> list[torch.Tensor | None] | Spans | BlockMask:
        """Who sees whom, in the form that the attention function wants, the same in every layer."""
        if self.attention == "subtree":
            return subtree_spans(layout.lengths, layout.parents)
        if self.attention == "flex":
            return tree_mask(layout.lengths, layout.parents, self.device)
        device = self.device
        autocast = torch.is_autocast_enabled(device.type)
        dtype = torch.get_autocast_dtype(device.type) if autocast else self.language_model.dtype
        return sibling_masks(layout, device, dtype)

    def _score(
        self, hidden_n_H: torch.Tensor, targets_n: torch.Tensor, temperature: float
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Log-probabilities of the targets, and entropies without gradient. Logits are float32 at least."""
        logits = self.causal_lm.lm_head(hidden_n_H)
        logits = logits if logits.dtype == torch.float64 else logits.float()
        logits = logits if temperature == 1 else logits.div_(temperature)
        logps = F.log_softmax(logits, dim=-1)
        del logits  # the largest tensors there are: no more than needed of them at once
        with torch.no_grad():
            entropies = -logps.exp().mul_(logps).sum(-1)
        return logps.gather(-1, targets_n[:, None]).squeeze(-1), entropies

    def _positions(self, positions_3_L: torch.Tensor) -> torch.Tensor:
        multimodal = "mrope_section" in (getattr(self.language_model.config, "rope_parameters", None) or {})
        return positions_3_L[:, None] if multimodal else positions_3_L[:1]
