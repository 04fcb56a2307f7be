"""The plan on a terminal."""

from __future__ import annotations

from rich.console import Console
from rich.table import Table
from rich.text import Text

from rl.plan.estimate import Plan
from rl.plan.flops import Operations
from rl.plan.limits import demands, limits
from rl.plan.memory import TrainerMemory

Rows = list[tuple[str, ...]]


def print_plan(plan: Plan, console: Console) -> None:
    """Every table, then what binds and what was assumed."""
    console.print(Text(f"{plan.config.model.path} on {plan.hardware}"))
    for title, columns, rows in (
        ("cache on disk", ("", "GB", ""), _cache(plan)),
        ("a GRPO step", ("tokens", "packed", "padded rows"), _tokens(plan)),
        ("", ("TFLOP", "linear", "attention", "lm_head", "all", "masked besides"), _operations(plan)),
        ("memory of a device", ("GB", "checkpointing", "without"), _memory(plan)),
        ("time", ("", "a step", "steps", "device-hours"), _time(plan)),
    ):
        table = Table(title=title or None, title_justify="left", title_style="bold", box=None, pad_edge=False)
        for number, name in enumerate(columns):
            table.add_column(name, justify="left" if number == 0 else "right")
        for row in rows:
            table.add_row(*map(Text, row))
        console.print(table)
        console.print()
    for text in limits(plan):
        console.print(Text(f"binds: {text}", style="bold"))
    for text in plan.assumed:
        console.print(Text(f"assumed: {text}"))


def _cache(plan: Plan) -> Rows:
    work = plan.work
    each = f"{' x '.join(map(str, work.grid))} = {work.visual:,} visual tokens"
    free = (
        ""
        if plan.disk_free is None
        else f"{plan.config.embed.cache_dir} has room for {_gb(plan.disk_free)} GB"
    )
    return [
        ("a volume", _gb(plan.cache_bytes), each),
        (f"{work.all_volumes:,} volumes", _gb(plan.cache_bytes * work.all_volumes), free),
    ]


def _tokens(plan: Plan) -> Rows:
    grpo, shape, work = plan.config.grpo, plan.shape, plan.work
    volumes = grpo.volumes_per_step
    groups = volumes * grpo.questions_per_volume
    samples = groups * shape.generations
    parts = (
        (f"{volumes} volumes x {shape.volume:,} ({work.visual:,} visual)", volumes, shape.volume),
        (f"{groups} questions x {shape.question}", groups, shape.question),
        (f"{samples} completions x {shape.completion}", samples, shape.completion),
    )
    rows = [(name, f"{count * tokens:,}", f"{samples * tokens:,}") for name, count, tokens in parts]
    packed = sum(count * tokens for _, count, tokens in parts)
    again = plan.training.volumes - volumes
    if again:
        rows.append(
            (f"{again} volumes again, cut by max_tokens_per_microbatch", f"{again * shape.volume:,}", "")
        )
        packed += again * shape.volume
    padded = samples * (shape.volume + shape.question + shape.completion)
    return [*rows, ("all", f"{packed:,}", f"{padded:,} ({padded / packed:.1f} x)")]


def _operations(plan: Plan) -> Rows:
    grpo = plan.config.grpo
    parts = {
        "rollout, prefill": plan.sampling.prefill,
        "rollout, decoding": plan.sampling.decoding,
        "training, forward": plan.training.forward,
        "training, backward": plan.training.backward,
        "vision tower, once": plan.vision.times(grpo.volumes_per_step),
    }
    return [(name, *map(_tera, _columns(part))) for name, part in parts.items()]


def _columns(part: Operations) -> tuple[float, ...]:
    return part.linear, part.attention, part.lm_head, part.needed, part.masked


def _memory(plan: Plan) -> Rows:
    both = (plan.memory[True], plan.memory[False])

    def row(name: str, value: str) -> tuple[str, ...]:
        return name, *(_gb(getattr(memory, value)) for memory in both)

    def chosen(memory: TrainerMemory) -> bool:
        return memory is plan.memory[plan.config.model.gradient_checkpointing]

    def alone(name: str, count: float) -> tuple[str, ...]:
        return name, _gb(count), ""

    engine = plan.engine
    return [
        row("weights, vision tower left out", "weights"),
        row("adapter, gradients, AdamW", "adapter"),
        row("activations that wait for the backward", "kept"),
        row("backward of one layer", "layer"),
        row("logits, float32, as many as are made at once", "logits"),
        ("trainer, peak", *(f"{_gb(m.peak)}{'  <' if chosen(m) else ''}" for m in both)),
        alone("engine", engine.share),
        alone("  its weights", engine.weights),
        alone("  its activations and logits", engine.work),
        alone(f"  its KV cache, {engine.kv_room:,.0f} tokens", engine.kv_room * engine.kv_token),
        *(alone(f"in use during {phase}", needed) for phase, needed in demands(plan).items()),
    ]


def _time(plan: Plan) -> Rows:
    config, work = plan.config, plan.work
    per_step = config.grpo.volumes_per_step * config.grpo.questions_per_volume
    per_sft = config.sft.volumes_per_step * config.sft.questions_per_volume
    train, everything = (
        volumes * work.questions for volumes in (work.volumes.get("train", 0), work.all_volumes)
    )

    def row(name: str, seconds: float, steps: float, devices: int) -> tuple[str, ...]:
        return name, f"{seconds:.3g} s", f"{steps:,.0f}", f"{steps * seconds * devices / 3600:,.1f}"

    return [
        row("embed, a volume (tower alone)", plan.embed_s / work.all_volumes, work.all_volumes, 1),
        row(f"SFT, an epoch of {train:,} questions", plan.sft_step_s, train / per_sft, 1),
        row("GRPO, rollouts", plan.rollout_s, config.grpo.max_steps, plan.devices),
        row("GRPO, training", plan.train_s, config.grpo.max_steps, plan.devices),
        row("GRPO, max_steps", plan.step_s, config.grpo.max_steps, plan.devices),
        row(f"GRPO, an epoch of {train:,} questions", plan.step_s, train / per_step, plan.devices),
        row(f"GRPO, all {everything:,} questions", plan.step_s, everything / per_step, plan.devices),
    ]


def _gb(count: float) -> str:
    return f"{count / 1e9:,.1f}" if count >= 1e9 else f"{count / 1e9:.2g}"


def _tera(count: float) -> str:
    return f"{count / 1e12:,.3g}" if count < 1e14 else f"{count / 1e12:,.0f}"
