"""The rollout engine of a configuration."""

from __future__ import annotations

from typing import Any

from rl.config import Config
from rl.model import resolve_model
from rollouts.engines import make_engine
from rollouts.types import Engine
from rollouts.vllm_engine import VllmEngine


def engine_options(config: Config) -> dict[str, Any]:
    """Keyword arguments of `rollouts.engines.make_engine` after kind and model path."""
    engine = config.engine
    return {
        "dtype": config.model.dtype,
        "device": config.model.device,
        "max_lora_rank": config.model.lora.r,
        "max_model_len": engine.max_model_len,
        "max_num_seqs": engine.max_num_seqs,
        "kv_cache_gib": engine.kv_cache_gib,
        "gpu_memory_utilization": engine.gpu_memory_utilization,
        "enforce_eager": engine.enforce_eager,
        "sleep": engine.sleep,
        "start_timeout_s": engine.start_timeout_s,
        "generate_timeout_s": engine.generate_timeout_s,
    }


def start_engine(config: Config) -> Engine:
    """Start the configured engine; close it when done."""
    return make_engine(config.engine.kind, resolve_model(config.model.path), **engine_options(config))


def start_ready_engine(config: Config) -> Engine:
    """Start the configured engine and wait until it has loaded.

    Raises:
        EngineError: it did not start within `engine.start_timeout_s`.
    """
    engine = start_engine(config)
    if isinstance(engine, VllmEngine):
        engine.wait_until_ready()
    return engine
