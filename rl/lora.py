"""LoRA on a frozen linear layer in one piece: `x W' + b + scaling x A' B'`.

PEFT adds the adapter as layers of its own: a product as wide as the output, its scaling and the sum are each written to
memory, and where the base is bfloat16 all of it is float32, as is a copy of the input that waits for the backward.
Here the adapter's product is added onto the base's as it is computed (`addmm`), forward and backward, in the base's
number format; the weights that are trained stay float32.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from peft.tuners.lora import Linear as PeftLinear
from torch import nn
from torch.autograd.function import once_differentiable

Factors = tuple[torch.Tensor, torch.Tensor | None, torch.Tensor, torch.Tensor, float]
"""weight [out, in] and bias [out] of the base, which get no gradient; a [r, in] and b [out, r]; scaling."""


def lora_product(
    x: torch.Tensor,
    seen: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    a: torch.Tensor,
    b: torch.Tensor,
    scaling: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The layer's output [..., out], and `scaling x A'` [n, r], which its backward wants.

    Args:
        x: [..., in].
        seen: what the adapter sees of it: x itself, or x after dropout.
    """
    inner_n_R = F.linear(seen.flatten(0, -2), a * scaling)
    output = F.linear(x, weight, bias)
    add_product(output.view(-1, len(weight)), inner_n_R, b.t())
    return output, inner_n_R


def add_product(to: torch.Tensor, left: torch.Tensor, right: torch.Tensor) -> None:
    """`to += left @ right`, in a form that torch's counter of operations knows, unlike `addmm_`."""
    torch.addmm(to, left, right, out=to)


def adapter_gradients(
    gradient_n: torch.Tensor, seen_n: torch.Tensor, inner_n_R: torch.Tensor, b: torch.Tensor, scaling: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of `seen A'` [n, r], of a and of b, from the output's [n, out]."""
    of_inner_n_R = gradient_n @ (b * scaling)
    return of_inner_n_R, of_inner_n_R.t() @ seen_n, gradient_n.t() @ inner_n_R


class LoraProduct(torch.autograd.Function):
    """The layer's output; keeps what the adapter sees, and `scaling x A'`.

    Args:
        x: [..., in].
        dropped: x after dropout, which only the adapter sees; None: there is none.
        factors: in the number format of x.
    Returns:
        [..., out].
    """

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, dropped: torch.Tensor | None, *factors: Any) -> torch.Tensor:
        weight, _, a, b, ctx.scaling = factors
        seen = x if dropped is None else dropped
        output, inner_n_R = lora_product(x, seen, *factors)
        ctx.save_for_backward(seen, inner_n_R, weight, a, b)
        ctx.has_dropout = dropped is not None
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        seen, inner_n_R, weight, a, b = ctx.saved_tensors
        gradient_n = gradient.flatten(0, -2)
        seen_n = seen.flatten(0, -2)
        of_inner_n_R, of_a, of_b = adapter_gradients(gradient_n, seen_n, inner_n_R, b, ctx.scaling)
        of_x = of_dropped = None
        if ctx.needs_input_grad[0]:
            of_x = gradient_n @ weight
            if not ctx.has_dropout:
                add_product(of_x, of_inner_n_R, a)
            of_x = of_x.view(seen.shape)
        if ctx.needs_input_grad[1]:
            of_dropped = (of_inner_n_R @ a).view(seen.shape)
        return of_x, of_dropped, None, None, of_a, of_b, None


class LoraLinear(PeftLinear):
    """PEFT's layer, computed by `LoraProduct` where one plain adapter is at work on frozen weights, else by PEFT."""

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        name = self.plain_adapter(x)
        if name is None or args or kwargs:
            return super().forward(x, *args, **kwargs)
        dropped = self.lora_dropout[name](x) if self.drops(name) else None
        return LoraProduct.apply(x, dropped, *self.factors(name, x.dtype))

    def plain_adapter(self, x: torch.Tensor) -> str | None:
        """Name of the adapter, if it is the only one at work, of the plain kind, its base frozen, and nothing cast."""
        active = [name for name in self.active_adapters if name in self.lora_A]
        if (
            len(active) != 1
            or self.disable_adapters
            or self.merged
            or torch.is_autocast_enabled(x.device.type)
        ):
            return None
        (name,) = active
        is_other_kind = name in self.lora_variant or self.lora_B[name].bias is not None
        base_learns = any(p.requires_grad for p in self.base_layer.parameters())
        return None if is_other_kind or base_learns else name

    def drops(self, name: str) -> bool:
        """Whether the adapter sees its input after dropout."""
        dropout = self.lora_dropout[name]
        return self.training and isinstance(dropout, nn.Dropout) and dropout.p > 0

    def factors(self, name: str, dtype: torch.dtype) -> Factors:
        """What the layer's output is made of besides its input."""
        a, b = (layer[name].weight.to(dtype) for layer in (self.lora_A, self.lora_B))
        return self.base_layer.weight, self.base_layer.bias, a, b, self.scaling[name]


def fuse_adapters(model: nn.Module) -> None:
    """Let every LoRA layer of the model on a plain linear layer be a `LoraLinear`."""
    for module in model.modules():
        if type(module) is PeftLinear and type(module.base_layer) is nn.Linear:
            module.__class__ = LoraLinear
