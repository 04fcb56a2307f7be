"""Eight bits a number: what is lost is bounded for every token, whatever the other tokens are."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rollouts.storage import FLOAT8, as_read, bytes_per_token, pack, unpack

numbers = st.floats(-(2.0**126), 2.0**126, width=32)
tokens = st.integers(1, 5).flatmap(
    lambda width: st.lists(st.lists(numbers, min_size=width, max_size=width), min_size=1, max_size=6)
)


@given(tokens)
def test_a_number_is_off_by_a_sixteenth_of_itself_or_a_sliver_of_its_tokens_largest(
    rows: list[list[float]],
) -> None:
    exact = torch.tensor(rows).to(torch.bfloat16).double()
    read = as_read(exact, FLOAT8).double()
    largest = exact.abs().amax(dim=1, keepdim=True)
    tiny = 2.0**-126 * 2.0**-10  # where bfloat16 itself has no more digits
    assert ((read - exact).abs() <= torch.maximum(exact.abs() * 2**-4, largest * 2**-17) + tiny).all()


@given(tokens)
def test_what_was_read_is_stored_without_further_loss(rows: list[list[float]]) -> None:
    once = as_read(torch.tensor(rows), FLOAT8)
    assert torch.equal(as_read(once, FLOAT8), once)


@given(tokens, st.integers(-20, 20))
def test_a_tokens_scale_does_not_matter_and_powers_of_two_are_kept(
    rows: list[list[float]], exponent: int
) -> None:
    """Scaling and unscaling round nothing."""
    ordinary = torch.tensor(rows).clamp(-1e3, 1e3)
    ordinary = torch.where(ordinary.abs() < 1e-3, 0, ordinary)
    assert torch.equal(as_read(ordinary * 2.0**exponent, FLOAT8), as_read(ordinary, FLOAT8) * 2.0**exponent)


def test_one_loud_token_takes_nothing_from_the_others() -> None:
    quiet = torch.randn(7, 64, generator=torch.Generator().manual_seed(0))
    loud = torch.full((1, 64), 1e6)
    assert torch.equal(as_read(torch.cat([loud, quiet]), FLOAT8)[1:], as_read(quiet, FLOAT8))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, FLOAT8])
def test_the_size_of_a_token_is_that_of_its_tensors(dtype: torch.dtype) -> None:
    stored = pack(torch.randn(3, 10), dtype)
    assert sum(tensor.nbytes for tensor in stored.values()) == 3 * bytes_per_token(10, dtype)


def test_zeros_stay_zeros() -> None:
    assert torch.equal(as_read(torch.zeros(2, 3), FLOAT8), torch.zeros(2, 3, dtype=torch.bfloat16))


@pytest.mark.parametrize(
    "stored",
    [
        {"scale_V": torch.ones(2)},
        {"embeds_V_H": torch.zeros(2, 3).to(FLOAT8)},
        {"embeds_V_H": torch.zeros(2, 3).to(FLOAT8), "scale_V": torch.ones(3)},
        {"embeds_V_H": torch.zeros(2, 3).to(FLOAT8), "scale_V": torch.ones(2).double()},
        {"embeds_V_H": torch.zeros(2, 3, dtype=torch.int8)},
        {"embeds_V_H": torch.zeros(6)},
    ],
)
def test_other_tensors_are_refused(stored: dict[str, torch.Tensor]) -> None:
    with pytest.raises((KeyError, ValueError)):
        unpack(stored)
