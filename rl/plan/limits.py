"""Which limit a plan meets first, in words."""

from __future__ import annotations

from rl.plan.estimate import Plan

USABLE = 0.95
"""Share of a device's memory: the rest goes to libraries and fragments."""


def demands(plan: Plan) -> dict[str, float]:
    """Bytes of one device (of the machine, where the CPU computes) in each phase of a GRPO step."""
    trainer, engine = plan.memory[plan.config.model.gradient_checkpointing], plan.engine
    ray = plan.config.ray
    if not plan.hardware.is_gpu:
        engines = ray.num_engines * engine.share
        return {"training": ray.num_workers * trainer.peak + engines}
    if ray.placement == "separate":
        return {"training": trainer.peak, "sampling": engine.share}
    awake = 0.0 if plan.config.engine.sleep else engine.share
    return {"training": trainer.peak + awake, "sampling": trainer.resident + engine.share}


def limits(plan: Plan) -> list[str]:
    """The limits that bind: what does not fit, else what the time goes to."""
    return [*_memory(plan), *_disk(plan)] or [_time(plan)]


def _memory(plan: Plan) -> list[str]:
    room = USABLE * plan.hardware.memory
    found = []
    for phase, needed in demands(plan).items():
        if needed > room:
            remedy = _trainer_remedy(plan) if phase == "training" else "lower engine.gpu_memory_utilization"
            found.append(f"memory: {phase} needs {needed / 1e9:.1f} GB of {room / 1e9:.1f} GB; {remedy}")
    if plan.engine.sequences < plan.engine.wanted:
        holds = f"the KV cache holds {plan.engine.sequences} of {plan.engine.wanted} sequences"
        field = "gpu_memory_utilization" if plan.hardware.is_gpu else "kv_cache_gib"
        found.append(f"memory: {holds}; raise engine.{field} or lower engine.max_num_seqs")
    return found


def _trainer_remedy(plan: Plan) -> str:
    model, grpo = plan.config.model, plan.config.grpo
    memory = plan.memory[model.gradient_checkpointing]
    if plan.hardware.is_gpu and plan.config.ray.placement == "colocate" and not plan.config.engine.sleep:
        return "set engine.sleep=true, or ray.placement=separate"
    if not model.gradient_checkpointing and plan.memory[True].peak < 0.9 * memory.peak:
        return "set model.gradient_checkpointing=true"
    if sum(plan.microbatch) > 1:
        return f"lower grpo.max_tokens_per_microbatch ({grpo.max_tokens_per_microbatch})"
    return (
        "lower grpo.num_generations or grpo.max_completion_length, or show less of the volume (section view)"
    )


def _disk(plan: Plan) -> list[str]:
    needed = plan.cache_bytes * plan.work.all_volumes
    if plan.disk_free is None or needed <= plan.disk_free:
        return []
    return [
        f"disk: the cache needs {needed / 1e9:.0f} GB and {plan.config.embed.cache_dir} has room for "
        f"{plan.disk_free / 1e9:.0f} GB; set embed.cache_dir to a larger disk, embed.dtype=bfloat16 or float8_e4m3fn, "
        "or a coarser view"
    ]


def _time(plan: Plan) -> str:
    share = plan.rollout_s / (plan.rollout_s + plan.train_s)
    if share > 0.5:
        return f"rollouts: {share:.0%} of a step; more engines (ray.num_engines) or shorter completions help"
    volume = plan.config.grpo.volumes_per_step * plan.shape.volume
    of_tokens = (
        volume
        / plan.shape.forest(
            [plan.config.grpo.questions_per_volume] * plan.config.grpo.volumes_per_step
        ).tokens
    )
    return (
        f"compute: training is {1 - share:.0%} of a step, and volumes are {of_tokens:.0%} of its tokens; more workers "
        "(ray.num_workers) or a coarser view help"
    )
