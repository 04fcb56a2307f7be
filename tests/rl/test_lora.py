"""The layer with its adapter in one piece must be PEFT's."""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import Linear as PeftLinear
from torch import nn

from rl.lora import LoraLinear, LoraProduct, fuse_adapters


class Pair(nn.Module):
    """Two projections of one tensor, the first with a bias."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(12, 20), nn.Linear(12, 7, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.cat([self.first(x), self.second(x)], dim=-1)


def adapted(**settings: object) -> PeftModel:
    """By PEFT, with an adapter whose B is not zero."""
    torch.manual_seed(0)
    names = ["first", "second"]
    config = LoraConfig(r=3, lora_alpha=6, target_modules=names, init_lora_weights=False, **settings)
    return get_peft_model(Pair(), config)


def both(model: PeftModel) -> list[PeftModel]:
    """PEFT's and ours, of the same weights."""
    ours = deepcopy(model)
    fuse_adapters(ours)
    assert type(ours.base_model.model.first) is type(ours.base_model.model.second) is LoraLinear
    return [model, ours]


def outcomes(
    models: list[PeftModel], dtype: torch.dtype = torch.float64, x_learns: bool = True
) -> list[list[torch.Tensor | None]]:
    """Output, gradient of the input and of what is trained, for each model; dropout draws the same."""
    found = []
    for model in models:
        torch.manual_seed(1)
        x = torch.randn(2, 5, 12).to(dtype).requires_grad_(x_learns)
        output = model(x)
        output.square().sum().backward()
        found.append([output.detach(), x.grad, *(p.grad for p in model.parameters() if p.requires_grad)])
    return found


@pytest.mark.parametrize("x_learns", [True, False])
@pytest.mark.parametrize("dropout", [0.0, 0.5])
@pytest.mark.parametrize("training", [True, False])
def test_output_and_gradients_are_those_of_peft(x_learns: bool, dropout: float, training: bool) -> None:
    models = both(adapted(lora_dropout=dropout).double().train(training))
    theirs, ours = outcomes(models, x_learns=x_learns)
    assert len(theirs) == 6
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


def second_adapter(model: PeftModel) -> None:
    model.add_adapter("other", LoraConfig(r=2, target_modules=["first"], init_lora_weights=False))
    model.double()


def one_and_another(model: PeftModel) -> None:
    second_adapter(model)
    model.base_model.set_adapter(["default", "other"])


def another(model: PeftModel) -> None:
    second_adapter(model)
    model.set_adapter("other")


@pytest.mark.parametrize(
    "change",
    [another, one_and_another, lambda m: m.base_model.disable_adapter_layers(), lambda m: m.merge_adapter()],
    ids=["another adapter", "two at once", "disabled", "merged"],
)
def test_it_stays_peft_when_adapters_are_changed(change: Callable[[PeftModel], object]) -> None:
    models = both(adapted().double())
    for model in models:
        torch.manual_seed(2)
        change(model)
    theirs, ours = outcomes(models)
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


def test_under_autocast_it_is_peft() -> None:
    models = both(adapted())
    with torch.autocast("cpu", torch.bfloat16):
        theirs, ours = outcomes(models, torch.float32)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=0)


def test_on_a_bfloat16_base_the_input_is_kept_once_and_the_adapter_learns_in_float32() -> None:
    model = adapted()
    for parameter in model.parameters():
        if not parameter.requires_grad:
            parameter.data = parameter.data.bfloat16()
    models = both(model)
    kept: list[list[torch.Tensor]] = []
    for each in models:
        kept.append([])

        def keep(tensor: torch.Tensor, to: list[torch.Tensor] = kept[-1]) -> torch.Tensor:
            to.append(tensor)
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            each(torch.randn(2, 5, 12, dtype=torch.bfloat16, requires_grad=True))
    theirs, ours = ({t.data_ptr(): t for t in tensors if t.numel() == 120} for tensors in kept)
    assert [t.dtype for t in theirs.values()] == [torch.float32] * 2
    assert [t.dtype for t in ours.values()] == [torch.bfloat16]

    (_, _, *expected), (_, _, *gradients) = outcomes(models, torch.bfloat16)
    for gradient, other in zip(gradients, expected, strict=True):
        assert gradient is not None
        assert other is not None
        assert gradient.dtype == torch.float32
        assert (gradient - other).norm() < 0.02 * other.norm()


@pytest.mark.parametrize("has_dropout", [True, False])
def test_its_derivative_is_that_of_the_formula(has_dropout: bool) -> None:
    torch.manual_seed(0)
    x, dropped, a, b = (
        torch.randn(*shape, dtype=torch.float64, requires_grad=True)
        for shape in ((2, 4, 5), (2, 4, 5), (2, 5), (3, 2))
    )
    weight, bias = torch.randn(3, 5, dtype=torch.float64), torch.randn(3, dtype=torch.float64)
    inputs = (x, dropped if has_dropout else None, weight, bias, a, b, 0.7)
    assert torch.autograd.gradcheck(LoraProduct.apply, inputs)


@pytest.mark.parametrize("settings", [{"use_dora": True}, {"lora_bias": True}, {}], ids=str)
def test_other_kinds_of_adapters_and_learning_bases_are_left_to_peft(settings: dict[str, bool]) -> None:
    models = both(adapted(**settings).double())
    if not settings:
        for model in models:
            model.base_model.model.first.base_layer.requires_grad_(True)
    theirs, ours = outcomes(models)
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


def test_layers_that_are_not_plainly_linear_are_left_to_peft() -> None:
    class Quantized(nn.Linear):
        """As those of bitsandbytes, for one."""

    model = adapted()
    model.base_model.model.first.base_layer.__class__ = Quantized
    fuse_adapters(model)
    assert type(model.base_model.model.first) is PeftLinear


def test_it_can_be_merged_and_takes_rows_that_do_not_lie_together_or_none() -> None:
    theirs, ours = both(adapted().double())
    assert ours(torch.randn(0, 3, 12, dtype=torch.float64)).shape == (0, 3, 27)
    x = torch.randn(12, 4, dtype=torch.float64).t()
    expected = theirs(x)
    torch.testing.assert_close(ours(x), expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(ours.merge_and_unload()(x), expected, rtol=1e-12, atol=1e-12)
