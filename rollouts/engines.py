"""Engines by name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rollouts.types import Engine, EngineError

KINDS = ("vllm", "hf")


def make_engine(kind: str, model_path: str | Path, **options: Any) -> Engine:
    """An engine for a model.

    Args:
        kind: "vllm" or "hf".
        options: keyword arguments of `VllmEngine`; `HfEngine` takes those that mean something to it.
    Raises:
        EngineError: unknown kind, or the engine cannot serve this model.
    """
    if kind == "vllm":
        from rollouts.vllm_engine import VllmEngine

        return VllmEngine(model_path, **options)
    if kind == "hf":
        from rollouts.hf_engine import HfEngine

        shared = ("dtype", "device", "max_model_len", "max_lora_rank")
        return HfEngine(model_path, **{name: options[name] for name in shared if name in options})
    raise EngineError(f"engine.kind={kind!r} is unknown; choose one of {', '.join(KINDS)}")
