"""LoRA for the CPU build of vLLM when one adapter serves the whole batch.

vLLM's CPU path copies the adapter's matrices once for every token of the batch, which costs more than the model
itself (measured: two thirds of a decoding step on a 3.5M-parameter model). Here one adapter is served at a time,
so a layer needs two ordinary matrix products.
"""

from __future__ import annotations

from typing import Any

import torch
from vllm.lora.punica_wrapper.punica_cpu import PunicaWrapperCPU
from vllm.platforms import current_platform


class OneAdapterPunica(PunicaWrapperCPU):
    """vLLM's LoRA kernels for `max_loras=1` and batches in which all requests use the adapter, or none does."""

    def add_lora_linear(
        self,
        y: torch.Tensor,
        x: torch.Tensor,
        lora_a_stacked: tuple[torch.Tensor, ...],
        lora_b_stacked: tuple[torch.Tensor, ...],
        scale: float,
        output_slices: tuple[int, ...],
        **_: Any,
    ) -> None:
        """y [N, out] += scale * x [N, in] A^T B^T, for each of the layer's fused slices (q, k, v or gate, up)."""
        if self.no_lora:
            return
        y, x = y.view(-1, y.shape[-1]), x.view(-1, x.shape[-1])
        left = 0
        for a, b, width in zip(lora_a_stacked, lora_b_stacked, output_slices, strict=True):
            y[:, left : left + width].addmm_(x @ a[0, 0].T, b[0, 0].T, alpha=scale)
            left += width


def install() -> None:
    """Make vLLM's CPU platform choose these kernels; without effect on other platforms."""
    if current_platform.is_cpu():
        name = f"{OneAdapterPunica.__module__}.{OneAdapterPunica.__qualname__}"
        type(current_platform).get_punica_wrapper = classmethod(lambda cls: name)
