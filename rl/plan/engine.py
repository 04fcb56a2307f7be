"""Sampling: what an engine holds, and how long its completions take.

A token is decoded by reading the weights, once for all sequences of a batch, and the keys and values of every sequence:
memory bandwidth bounds it long before arithmetic does (Pope et al. 2022, arXiv 2211.05102, section 3). On a CPU every
layer costs some time besides, however few tokens there are.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from rl.config import Config
from rl.plan.flops import Operations, TreeShape, forward
from rl.plan.hardware import Hardware
from rl.plan.memory import kv_bytes
from rl.plan.sizes import Language

CALL_S = 2.3e-3
"""Seconds that a CPU takes in a decoding step to call a layer's kernels, each too small for its cores. Found on two
cores from steps of 8 and of 32 sequences (`benchmarks/whole_steps.py`), the rest at `rl.plan.estimate.SHARE`."""
BATCHED_TOKENS = 8192
"""Prompt tokens vLLM prefills at once, at least (`rollouts.vllm_engine`)."""


@dataclass(frozen=True, slots=True)
class EngineMemory:
    """Of one engine, in bytes."""

    share: float
    """What it takes of the device in all."""
    weights: float
    work: float
    """Activations of a prefill, and the logits of a batch."""
    kv_token: int
    sequences: int
    """Decoded at once, as far as the KV cache holds them."""
    wanted: int
    """Sequences it would decode at once if it could."""

    @property
    def kv_room(self) -> float:
        """Tokens the KV cache has room for."""
        return max(0.0, self.share - self.weights - self.work) / self.kv_token


def engine_memory(
    config: Config, language: Language, hardware: Hardware, shape: TreeShape, questions: int
) -> EngineMemory:
    """One engine that is asked `questions` questions a volume."""
    engine, b = config.engine, hardware.number_bytes
    weights = language.parameters * b
    batched = max(engine.max_model_len, BATCHED_TOKENS)
    work = batched * 3 * language.intermediate * b + engine.max_num_seqs * language.vocabulary * 2 * 4
    on_cpu = engine.kv_cache_gib * 2**30 + weights + work
    share = engine.gpu_memory_utilization * hardware.memory if hardware.is_gpu else on_cpu
    kv_token = kv_bytes(language, b)
    per_engine = (
        math.ceil(config.grpo.volumes_per_step / config.ray.num_engines) * questions * shape.generations
    )
    wanted = min(engine.max_num_seqs, per_engine)
    room = (share - weights - work) / kv_token
    fitting = max((n for n in range(1, wanted + 1) if _kv_tokens(shape, n, questions) <= room), default=0)
    return EngineMemory(share, weights, work, kv_token, fitting, wanted)


def _kv_tokens(shape: TreeShape, sequences: int, questions: int) -> int:
    """KV entries of sequences that are decoded at once; those of a question share its prefix."""
    groups = math.ceil(sequences / shape.generations)
    volumes = math.ceil(groups / questions)
    return volumes * shape.volume + groups * shape.question + sequences * shape.completion


@dataclass(frozen=True, slots=True)
class Sampling:
    """A step's completions: operations of all, and seconds at the full rates of the hardware."""

    prefill: Operations
    decoding: Operations
    ideal_s: float
    calls_s: float
    """Besides, on a CPU."""


def sampling(
    config: Config, language: Language, hardware: Hardware, shape: TreeShape, memory: EngineMemory
) -> Sampling:
    """The step's volumes shared among the engines. Every adapter begins with an empty prefix cache."""
    grpo, lora = config.grpo, config.model.lora
    volumes = [grpo.questions_per_volume] * grpo.volumes_per_step
    prompts = forward(language, lora, shape.prompts(volumes))
    whole = forward(language, lora, replace(shape.forest(volumes), unread=0))  # an engine leaves nothing out
    prefill = Operations(prompts.linear, prompts.attention)
    decoding = Operations(
        whole.linear - prompts.linear, whole.attention - prompts.attention, 0.0, whole.lm_head
    )
    busiest = math.ceil(grpo.volumes_per_step / config.ray.num_engines) / grpo.volumes_per_step
    tokens = busiest * sum(volumes) * shape.generations * shape.completion
    weights = language.layers * language.layer_weights + language.vocabulary * language.hidden
    context = shape.volume + shape.question + shape.completion / 2
    steps = tokens / max(1, memory.sequences)
    read = steps * weights * hardware.number_bytes + tokens * context * memory.kv_token
    decoding_s = max(read / hardware.bandwidth, busiest * decoding.needed / hardware.flops)
    calls_s = 0.0 if hardware.is_gpu else steps * language.layers * CALL_S
    return Sampling(prefill, decoding, busiest * prefill.needed / hardware.flops + decoding_s, calls_s)
