"""Which limit a plan meets first, in words."""

from __future__ import annotations

from rl.plan.estimate import Plan
from rl.plan.memory import TrainerMemory
from rollouts.storage import room_remedy

USABLE = 0.95
"""Share of a device's memory: the rest goes to libraries and fragments."""
_CHECKPOINTING = "set model.gradient_checkpointing=true"
_LESS = "show less of the volume (section view)"


def demands(plan: Plan) -> dict[str, float]:
    """Bytes of one device (of the machine, where the CPU computes) in SFT and in each phase of a GRPO step."""
    checkpointing, engine = plan.config.model.gradient_checkpointing, plan.engine
    trainer, ray = plan.memory[checkpointing], plan.config.ray
    sft = {"SFT": plan.sft_memory[checkpointing].peak}
    if not plan.hardware.is_gpu:
        engines = ray.num_engines * engine.share
        return sft | {"training": ray.num_workers * trainer.peak + engines}
    if ray.placement == "separate":
        return sft | {"training": trainer.peak, "sampling": engine.share}
    awake = 0.0 if plan.config.engine.sleep else engine.share
    return sft | {"training": trainer.peak + awake, "sampling": trainer.resident + engine.share}


def limits(plan: Plan) -> list[str]:
    """The limits that bind: what does not fit, else what the time goes to."""
    return [*_memory(plan), *_disk(plan)] or [_time(plan)]


def _memory(plan: Plan) -> list[str]:
    room = USABLE * plan.hardware.memory
    found = []
    remedies = {
        "SFT": _sft_remedy(plan),
        "training": _trainer_remedy(plan),
        "sampling": "lower engine.gpu_memory_utilization",
    }
    for phase, needed in demands(plan).items():
        if needed > room:
            of = f"{needed / 1e9:.1f} GB of {room / 1e9:.1f} GB"
            found.append(f"memory: {phase} needs {of}; {remedies[phase]}")
    engine = plan.engine
    field = "gpu_memory_utilization" if plan.hardware.is_gpu else "kv_cache_gib"
    if not engine.sequences:
        needed = engine.weights + engine.work
        found.append(
            f"memory: no sequence fits into the engine's {engine.share / 1e9:.1f} GB, of which weights and activations "
            f"need {needed / 1e9:.1f} GB; raise engine.{field}"
        )
    elif engine.sequences < engine.wanted:
        holds = f"the KV cache holds {engine.sequences} of {engine.wanted} sequences"
        found.append(f"memory: {holds}; raise engine.{field} or lower engine.max_num_seqs")
    return found


def _sft_remedy(plan: Plan) -> str:
    questions = plan.config.sft.questions_per_volume
    if _checkpointing_helps(plan, plan.sft_memory):
        return _CHECKPOINTING
    return f"lower sft.questions_per_volume ({questions})" if questions > 1 else _LESS


def _trainer_remedy(plan: Plan) -> str:
    if plan.hardware.is_gpu and plan.config.ray.placement == "colocate" and not plan.config.engine.sleep:
        return "set engine.sleep=true, or ray.placement=separate"
    if _checkpointing_helps(plan, plan.memory):
        return _CHECKPOINTING
    if sum(plan.microbatch) > 1:
        return f"lower grpo.max_tokens_per_microbatch ({plan.config.grpo.max_tokens_per_microbatch})"
    return f"lower grpo.num_generations or grpo.max_completion_length, or {_LESS}"


def _checkpointing_helps(plan: Plan, memory: dict[bool, TrainerMemory]) -> bool:
    return not plan.config.model.gradient_checkpointing and memory[True].peak < 0.9 * memory[False].peak


def _disk(plan: Plan) -> list[str]:
    needed = plan.cache_bytes * plan.work.all_volumes
    if plan.disk_free is None or needed <= plan.disk_free:
        return []
    return [
        f"disk: the cache needs {needed / 1e9:.0f} GB and {plan.config.embed.cache_dir} has room for "
        f"{plan.disk_free / 1e9:.0f} GB; {room_remedy(plan.storage)}"
    ]


def _time(plan: Plan) -> str:
    """What takes longest. Parts that run at once (`grpo.overlap`) each have their share of the step."""
    grpo = plan.config.grpo
    engines, workers = "more engines (ray.num_engines)", "more workers (ray.num_workers)"
    if not plan.hardware.is_gpu:
        engines = workers = "more cores"
    elif plan.config.ray.placement == "colocate":
        engines = workers = "more GPUs (ray.num_workers and ray.num_engines)"
    if plan.rollout_s > plan.train_s:
        return (
            f"rollouts: {plan.rollout_s / plan.step_s:.0%} of a step; {engines} or shorter completions help"
        )
    volume = grpo.volumes_per_step * plan.shape.volume
    tokens = plan.shape.forest([grpo.questions_per_volume] * grpo.volumes_per_step).tokens
    return (
        f"compute: training is {plan.train_s / plan.step_s:.0%} of a step, and volumes are {volume / tokens:.0%} of "
        f"its tokens; {workers} or a coarser view help"
    )
