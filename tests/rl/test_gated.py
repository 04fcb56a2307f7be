"""The MLP that keeps less must be the MLP."""

from __future__ import annotations

from copy import deepcopy

import pytest
import torch
from torch import nn
from transformers import Qwen2Config
from transformers.models.qwen2.modeling_qwen2 import Qwen2MLP

from rl.gated import GatedSiLU, save_gate_memory


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_the_mlp_and_its_gradients_are_those_of_transformers(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    theirs = Qwen2MLP(Qwen2Config(hidden_size=16, intermediate_size=40)).to(dtype)
    ours = deepcopy(theirs)
    save_gate_memory(ours)
    x = torch.randn(2, 7, 16, dtype=dtype)
    inputs = [x.clone().requires_grad_() for _ in range(2)]
    outputs = [mlp(x) for mlp, x in zip((theirs, ours), inputs, strict=True)]
    torch.testing.assert_close(outputs[1], outputs[0], rtol=0, atol=0)
    for output in outputs:
        output.square().sum().backward()
    found = [
        [x.grad, *(p.grad for p in mlp.parameters())] for x, mlp in zip(inputs, (theirs, ours), strict=True)
    ]
    torch.testing.assert_close(found[1], found[0])


def test_its_derivative_is_that_of_the_formula() -> None:
    torch.manual_seed(0)
    gate, up = torch.randn(2, 5, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(GatedSiLU.apply, (gate, up))


def test_of_a_gate_its_input_alone_is_kept() -> None:
    kept: list[int] = []
    gate, up = (torch.randn(5, 3, requires_grad=True) for _ in range(2))

    def note(x: torch.Tensor) -> torch.Tensor:
        kept.append(x.data_ptr())
        return x

    with torch.autograd.graph.saved_tensors_hooks(note, lambda x: x):
        GatedSiLU.apply(gate, up)
    assert kept == [gate.data_ptr(), up.data_ptr()]


def test_an_mlp_with_another_activation_is_left_as_it_is() -> None:
    mlp = Qwen2MLP(Qwen2Config(hidden_size=4, intermediate_size=8, hidden_act="gelu"))
    save_gate_memory(mlp)
    save_gate_memory(nn.Linear(2, 2))
    assert type(mlp) is Qwen2MLP
