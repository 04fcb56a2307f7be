"""The machine that is planned for: the one at hand, its peak measured in about a second, or one that is described."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from rl.config import Config, ConfigError

BYTES_PER_TFLOP = 4.0
"""Memory bandwidth assumed in GB/s per TFLOP/s of dense bfloat16: H200 4.9, H100 3.4, A100 6.5."""
_SECONDS = 0.8


@dataclass(frozen=True, slots=True)
class Hardware:
    """One device. Rates in FLOP/s and bytes/s, memory in bytes."""

    name: str
    flops: float
    bandwidth: float
    memory: float
    is_gpu: bool
    measured: bool
    dtype: str
    """Number format of the computation: float32 or bfloat16."""

    @property
    def number_bytes(self) -> int:
        return {"float32": 4, "bfloat16": 2}[self.dtype]

    def __str__(self) -> str:
        said = "measured" if self.measured else "as given"
        rates = f"{self.flops / 1e12:.4g} TFLOP/s in {self.dtype}, {self.bandwidth / 1e9:,.4g} GB/s"
        return f"{self.name}: {rates}, {self.memory / 1e9:,.0f} GB ({said})"


def described(config: Config, tflops: float, memory_gb: float, bandwidth_gbs: float | None) -> Hardware:
    """A GPU that one does not have yet.

    Raises:
        ConfigError: a number that is not above 0.
    """
    for name, value in (("peak-tflops", tflops), ("memory-gb", memory_gb), ("bandwidth-gbs", bandwidth_gbs)):
        if value is not None and not value > 0:
            raise ConfigError(f"--{name} is {value}: it must be greater than 0")
    return Hardware(
        name="a GPU",
        flops=tflops * 1e12,
        bandwidth=1e9 * (bandwidth_gbs or BYTES_PER_TFLOP * tflops),
        memory=memory_gb * 1e9,
        is_gpu=True,
        measured=False,
        dtype="float32" if config.model.dtype == "float32" else "bfloat16",
    )


def measured(config: Config) -> Hardware:
    """The device that `model.device` stands for on this machine.

    Raises:
        ConfigError: it is a GPU and torch sees none.
    """
    import psutil
    import torch

    from rl.environment import describe_environment, pick_device, pick_dtype

    if config.model.device == "cuda" and not torch.cuda.is_available():
        raise ConfigError(
            "model.device is 'cuda' and torch sees no GPU here; say what the machine of the run has: --peak-tflops "
            "and --memory-gb (an H200: 989 and 141)"
        )
    device = pick_device(config.model.device)
    dtype = pick_dtype(config.model.dtype, device)
    is_gpu = device.type == "cuda"
    n = 8192 if is_gpu else 512
    a, b = (torch.randn(n, n, device=device, dtype=dtype) for _ in range(2))
    source = torch.zeros(
        2**30 if is_gpu else 2**26, dtype=torch.uint8, device=device
    )  # more than caches hold
    copy = torch.zeros_like(source)
    return Hardware(
        name=device_name(describe_environment(), is_gpu),
        flops=2 * n**3 / _fastest(lambda: torch.mm(a, b), is_gpu),
        bandwidth=2 * source.numel() / _fastest(lambda: copy.copy_(source), is_gpu),
        memory=torch.cuda.get_device_properties(device).total_memory
        if is_gpu
        else psutil.virtual_memory().total,
        is_gpu=is_gpu,
        measured=True,
        dtype=str(dtype).removeprefix("torch."),
    )


def device_name(environment: dict[str, Any], is_gpu: bool) -> str:
    """The device in `rl.environment.describe_environment` that a run uses."""
    return environment["gpus"][0]["name"] if is_gpu else f"CPU {environment['cpu']['model']}"


def _fastest(run: Callable[[], object], is_gpu: bool) -> float:
    """Seconds of the fastest of the runs that fit into a moment: others may be using the machine."""
    import torch

    best, until = float("inf"), time.perf_counter() + _SECONDS
    while time.perf_counter() < until:
        started = time.perf_counter()
        run()
        if is_gpu:
            torch.cuda.synchronize()
        best = min(best, time.perf_counter() - started)
    return best
