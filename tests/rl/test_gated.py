"""The MLP that keeps less must be the MLP."""

from __future__ import annotations

from copy import deepcopy

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from transformers import Qwen2Config
from transformers.models.qwen2.modeling_qwen2 import Qwen2MLP

from rl.gated import GatedDown, GatedSiLU, save_gate_memory
from rl.lora import fuse_adapters


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


def adapted_mlp(dropout: float = 0.0) -> PeftModel:
    """An MLP with adapters on its three projections, their B not zero, in float64."""
    torch.manual_seed(0)
    mlp = Qwen2MLP(Qwen2Config(hidden_size=16, intermediate_size=40))
    names = ["gate_proj", "up_proj", "down_proj"]
    config = LoraConfig(r=3, target_modules=names, lora_dropout=dropout, init_lora_weights=False)
    return get_peft_model(mlp, config).double()


@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_with_adapters_it_is_still_the_mlp_of_transformers_and_peft(dropout: float) -> None:
    theirs = adapted_mlp(dropout)
    ours = deepcopy(theirs)
    save_gate_memory(ours.base_model.model)
    fuse_adapters(ours)
    found = []
    for model in (theirs, ours):
        torch.manual_seed(1)
        x = torch.randn(2, 7, 16, dtype=torch.float64, requires_grad=True)
        output = model(x)
        output.square().sum().backward()
        found.append([output.detach(), x.grad, *(p.grad for p in model.parameters() if p.requires_grad)])
    torch.testing.assert_close(found[1], found[0], rtol=1e-10, atol=1e-10)


def test_with_adapters_its_derivative_is_that_of_the_formula() -> None:
    torch.manual_seed(0)
    gate, up, a, b = (
        torch.randn(*shape, dtype=torch.float64, requires_grad=True)
        for shape in ((2, 4, 5), (2, 4, 5), (2, 5), (3, 2))
    )
    weight = torch.randn(3, 5, dtype=torch.float64)
    assert torch.autograd.gradcheck(GatedDown.apply, (gate, up, weight, None, a, b, 0.7))
    assert torch.autograd.gradcheck(
        lambda a, b: GatedDown.apply(gate.detach(), up.detach(), weight, None, a, b, 0.7), (a, b)
    )


def test_with_adapters_nothing_of_the_width_of_the_mlp_is_kept_but_gate_and_up() -> None:
    model = adapted_mlp()
    save_gate_memory(model.base_model.model)
    fuse_adapters(model)
    kept: set[int] = set()

    def note(x: torch.Tensor) -> torch.Tensor:
        if x.shape == (2, 7, 40):
            kept.add(x.data_ptr())
        return x

    with torch.autograd.graph.saved_tensors_hooks(note, lambda x: x):
        model(torch.randn(2, 7, 16, dtype=torch.float64))
    assert len(kept) == 2


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
