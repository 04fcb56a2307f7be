"""What the packed forward asks of a decoder, and changes in it."""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from typing import Any

import torch.nn.functional as F
from torch import nn


def require_plain_layers(config: Any, text_config: Any) -> None:
    """Refuse a model that a prefix tree (`rl.packed`) would get wrong.

    Raises:
        ValueError: layers that see a window of tokens, or visual features that are added after the first layer.
    """
    kinds = getattr(text_config, "layer_types", None)
    windowed = (
        any(kind != "full_attention" for kind in kinds)
        if kinds
        else getattr(text_config, "sliding_window", None)
    )
    if windowed:
        raise ValueError(
            f"{config.model_type} has layers that see a window of tokens only, which cannot be packed; set model.path "
            "to a model whose layers see all"
        )
    if getattr(getattr(config, "vision_config", None), "deepstack_visual_indexes", None):
        raise ValueError(
            f"{config.model_type} adds visual features in further layers, which cannot be packed; set model.path to a "
            "Qwen2.5-VL"
        )


def refuse_attention_dropout(attention: str, dropout: float) -> None:
    """For a `model.attention` whose kernel cannot drop.

    Raises:
        ValueError: the model has attention dropout.
    """
    if dropout:
        raise ValueError(
            f"the model drops {dropout:g} of its attention, which model.attention {attention!r} cannot: use 'sdpa'"
        )


def own_config(decoder: nn.Module) -> Any:
    """The decoder's config, which from now on no other model shares: those that are built from one config all do."""
    shared = decoder.config
    own = deepcopy(shared)
    for module in decoder.modules():
        if getattr(module, "config", None) is shared:
            module.config = own
    return own


def change_forward(module: nn.Module, forward: Callable[..., Any]) -> None:
    """Let a module compute with another forward; the one it had is `theirs`. Once for a module.

    By its class: a forward in the module itself would hold it in a circle, and its weights in memory after their use.
    """
    kind = type(module)
    if kind.forward is not forward:
        module.__class__ = type(kind.__name__, (kind,), {"forward": forward, "theirs": kind.forward})


def unread_in_layer(attention: Any, unread: int) -> int:
    """How many of a row's unread tokens need no result of this attention: all in the last layer, none in others."""
    return unread if attention.layer_idx == attention.config.num_hidden_layers - 1 else 0


def leave_unread_out(layer: Any) -> None:
    """Let the last decoder layer compute but the keys and values of what nothing is predicted from; once for a model.

    By hooks, which keep the names of the weights. The layer itself is told the layout each time it is computed, also by
    the second forward of gradient checkpointing.
    """
    if hasattr(layer, "unread"):
        return
    layer.unread = 0

    def note(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        layer.unread = kwargs["layout"].unread if "layout" in kwargs else 0

    layer.register_forward_pre_hook(note, with_kwargs=True)
    for part in (layer.self_attn.q_proj, layer.self_attn.o_proj, layer.mlp):
        part.register_forward_pre_hook(lambda _, args: (args[0][:, layer.unread :],))
        part.register_forward_hook(
            lambda _, args, out: F.pad(out, (0, 0, layer.unread, 0)) if layer.unread else out
        )
