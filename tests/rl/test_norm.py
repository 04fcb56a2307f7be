"""The norm that keeps less must be the norm."""

from __future__ import annotations

from copy import deepcopy

import pytest
import torch
from torch import nn
from transformers.models.qwen2.modeling_qwen2 import Qwen2RMSNorm

from rl.norm import RMSNormed, save_norm_memory


def norms(dtype: torch.dtype, learns: bool = False) -> list[Qwen2RMSNorm]:
    """transformers' and ours, of the same weights."""
    torch.manual_seed(0)
    theirs = Qwen2RMSNorm(16).to(dtype)
    nn.init.normal_(theirs.weight)
    theirs.weight.requires_grad_(learns)
    ours = deepcopy(theirs)
    save_norm_memory(ours)
    return [theirs, ours]


def outcomes(models: list[Qwen2RMSNorm], dtype: torch.dtype) -> list[list[torch.Tensor | None]]:
    """Output, gradients of the input and of the weight, for each norm."""
    found = []
    for norm in models:
        torch.manual_seed(1)
        x = (3 * torch.randn(2, 5, 16)).to(dtype).requires_grad_()
        output = norm(x)
        output.square().sum().backward()
        found.append([output.detach(), x.grad, norm.weight.grad])
    return found


@pytest.mark.parametrize(("dtype", "off"), [(torch.float32, 1e-5), (torch.bfloat16, 0.02)])
@pytest.mark.parametrize("learns", [False, True])
def test_the_norm_and_its_gradients_are_those_of_transformers(
    dtype: torch.dtype, off: float, learns: bool
) -> None:
    theirs, ours = outcomes(norms(dtype, learns), dtype)
    torch.testing.assert_close(ours, theirs, rtol=off, atol=off)


def test_its_derivative_is_that_of_the_formula() -> None:
    torch.manual_seed(0)
    x, weight = torch.randn(3, 5, dtype=torch.float64, requires_grad=True), torch.rand(5, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda x: RMSNormed.apply(x, weight, 1e-3), x)


def test_the_input_is_kept_as_it_is() -> None:
    _, ours = norms(torch.bfloat16)
    x = torch.randn(7, 16).bfloat16().requires_grad_()
    kept: list[torch.Tensor] = []

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        ours(x)
    assert x.data_ptr() in {tensor.data_ptr() for tensor in kept}
    assert [tensor.numel() for tensor in kept if tensor.dtype == torch.float32] == [7]  # a number a token


def test_it_is_changed_once() -> None:
    _, ours = norms(torch.float32)
    kind = type(ours)
    save_norm_memory(ours)
    assert type(ours) is kind
