"""The decoder's gated MLP, with a tensor less that waits for the backward.

Left to autograd, `down(silu(gate) * up)` keeps gate, silu(gate), up and the product for each token and layer: of what a
LoRA training step keeps, two thirds. silu(gate) is made again from gate instead, as Liger Kernel does on GPUs (Hsu et
al., arXiv 2410.10989); the numbers are the same.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd.function import once_differentiable
from transformers.activations import SiLUActivation

_PARTS = ("gate_proj", "up_proj", "down_proj", "act_fn")


class GatedSiLU(torch.autograd.Function):
    """`silu(gate) * up`; keeps gate and up alone."""

    @staticmethod
    def forward(ctx: Any, gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(gate, up)
        return F.silu(gate).mul_(up)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        gate, up = ctx.saved_tensors
        of_silu = gradient * up
        of_gate = torch.ops.aten.silu_backward(of_silu, gate, grad_input=of_silu)  # in place
        return of_gate, F.silu(gate).mul_(gradient)


def save_gate_memory(mlp: Any) -> None:
    """Let a SiLU-gated MLP, as Qwen's and Llama's are, compute with `GatedSiLU`; any other is left as it is.

    By its class: a forward in the module itself would hold it in a circle, and its weights in memory after their use.
    """
    kind = type(mlp)
    gated = all(hasattr(mlp, part) for part in _PARTS) and isinstance(mlp.act_fn, nn.SiLU | SiLUActivation)
    if gated and kind.forward is not _gated_forward:
        mlp.__class__ = type(kind.__name__, (kind,), {"forward": _gated_forward})


def _gated_forward(self: Any, x: torch.Tensor) -> torch.Tensor:
    return self.down_proj(GatedSiLU.apply(self.gate_proj(x), self.up_proj(x)))
