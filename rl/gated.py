"""The decoder's gated MLP, with two tensors less that wait for the backward.

Left to autograd, `down(silu(gate) * up)` keeps gate, silu(gate), up and the product for each token and layer: of what a
LoRA training step keeps, two thirds. silu(gate) and the product are made again from gate and up instead, the first as
Liger Kernel does on GPUs (Hsu et al., arXiv 2410.10989); the numbers are the same.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd.function import once_differentiable
from transformers.activations import SiLUActivation

from rl.decoder import change_forward
from rl.lora import LoraLinear, adapter_gradients, add_product, lora_product

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


class GatedDown(torch.autograd.Function):
    """`silu(gate) * up` through `down` and its adapter (`rl.lora.Factors`); keeps gate and up, not their product."""

    @staticmethod
    def forward(ctx: Any, gate: torch.Tensor, up: torch.Tensor, *factors: Any) -> torch.Tensor:
        weight, _, a, b, ctx.scaling = factors
        product = F.silu(gate).mul_(up)
        output, inner_n_R = lora_product(product, product, *factors)
        ctx.save_for_backward(gate, up, inner_n_R, weight, a, b)
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        gate, up, inner_n_R, weight, a, b = ctx.saved_tensors
        gradient_n, silu = gradient.flatten(0, -2), F.silu(gate)
        of_inner_n_R, of_a, of_b = adapter_gradients(
            gradient_n, (silu * up).flatten(0, -2), inner_n_R, b, ctx.scaling
        )
        of_gate = of_up = None
        if any(ctx.needs_input_grad[:2]):
            of_product = gradient_n @ weight
            add_product(of_product, of_inner_n_R, a)
            of_product = of_product.view(gate.shape)
            of_up = silu.mul_(of_product)
            of_silu = of_product.mul_(up)
            of_gate = torch.ops.aten.silu_backward(of_silu, gate, grad_input=of_silu)
        return of_gate, of_up, None, None, of_a, of_b, None


def save_gate_memory(mlp: Any) -> None:
    """Let a SiLU-gated MLP, as Qwen's and Llama's are, compute with these; any other is left as it is."""
    gated = all(hasattr(mlp, part) for part in _PARTS) and isinstance(mlp.act_fn, nn.SiLU | SiLUActivation)
    if gated:
        change_forward(mlp, _gated_forward)


def _gated_forward(self: Any, x: torch.Tensor) -> torch.Tensor:
    gate, up, down = self.gate_proj(x), self.up_proj(x), self.down_proj
    name = down.plain_adapter(gate) if isinstance(down, LoraLinear) else None
    if name is None or down.drops(name):
        return down(GatedSiLU.apply(gate, up))
    return GatedDown.apply(gate, up, *down.factors(name, gate.dtype))
