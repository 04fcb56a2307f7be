"""RMSNorm with a frozen weight in fewer passes over memory, and without a copy of its input.

transformers' takes six passes forward and more than twice as many backward, and keeps its input in float32 whatever
format that has. Here the input is kept as it is and the root mean square beside it, one number a token; with
x_hat = x / rms the gradient is

    dx = (g w - x_hat mean(g w x_hat)) / rms

(Zhang & Sennrich, arXiv 1910.07467; written out as in Liger Kernel, Hsu et al., arXiv 2410.10989).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.autograd.function import once_differentiable

from rl.decoder import change_forward


class RMSNormed(torch.autograd.Function):
    """`weight * x / rms(x)` of x [..., H], computed in float32 at least."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
        exact = x.to(torch.promote_types(x.dtype, torch.float32))
        length = torch.linalg.vector_norm(exact, dim=-1, keepdim=True)
        inverse_rms = (length.square_().div_(x.shape[-1]) + eps).rsqrt_()
        ctx.save_for_backward(x, weight, inverse_rms)
        return (exact * inverse_rms).to(x.dtype).mul_(weight)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        x, weight, inverse_rms = ctx.saved_tensors
        exact = x.to(inverse_rms.dtype)
        of_normed = (gradient * weight).to(inverse_rms.dtype)
        along_x = torch.linalg.vecdot(of_normed, exact)[..., None]
        of_x = of_normed.mul_(inverse_rms)
        of_x.addcmul_(exact, along_x * inverse_rms**3, value=-1 / x.shape[-1])
        return of_x.to(x.dtype), None, None


def save_norm_memory(model: nn.Module) -> None:
    """Let the RMSNorms of transformers' models compute with it, where their weights do not learn."""
    for module in model.modules():
        if type(module).__name__.endswith("RMSNorm") and hasattr(module, "variance_epsilon"):
            change_forward(module, _normed)


def _normed(self: Any, x: torch.Tensor) -> torch.Tensor:
    if self.weight.requires_grad or self.weight.dtype != x.dtype:
        return self.theirs(x)
    return RMSNormed.apply(x, self.weight, self.variance_epsilon)
