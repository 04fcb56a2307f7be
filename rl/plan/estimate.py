"""The plan of a recipe: tokens, operations, memory and time of its stages, and which limit binds."""

from __future__ import annotations

import math
import shutil
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from rl.config import Config, load_config
from rl.environment import AUTO_ATTENTION
from rl.microbatch import GroupTokens, within_budget
from rl.plan.engine import EngineMemory, Sampling, engine_memory, sampling
from rl.plan.flops import Forest, Operations, TreeShape, backward, forward, vision
from rl.plan.hardware import Hardware
from rl.plan.history import History, history
from rl.plan.memory import TrainerMemory, trainer_memory
from rl.plan.sizes import Language, ModelSizes, model_sizes
from rl.plan.workload import Workload, workload
from rollouts.storage import bytes_per_token

SHARE = 0.4
"""Of the peak rates, assumed where no run has shown another: of training, of prefill and decoding, of the tower."""


@dataclass(frozen=True)
class Training:
    """The training part of one GRPO step."""

    forward: Operations
    backward: Operations
    ideal_s: float
    """Of the rank with most to do, at the full rate of the hardware."""
    volumes: int
    """Of all forwards: one whose questions are in two micro-batches counts twice."""

    @property
    def whole(self) -> Operations:
        return self.forward + self.backward


@dataclass(frozen=True)
class Plan:
    """Everything that is printed."""

    config: Config
    hardware: Hardware
    sizes: ModelSizes
    work: Workload
    shape: TreeShape
    """With the completion length that is expected."""
    vision: Operations
    """One volume."""
    training: Training
    sampling: Sampling
    sft: Training
    """One step."""
    microbatch: list[int]
    """Questions about each volume of the largest micro-batch."""
    memory: dict[bool, TrainerMemory]
    """By `gradient_checkpointing`, with completions of the greatest length."""
    sft_memory: dict[bool, TrainerMemory]
    """The same of SFT, whose forward is a volume with all its questions."""
    engine: EngineMemory
    storage: torch.dtype
    """Of the cache."""
    cache_bytes: int
    """Of one volume."""
    disk_free: int | None
    """In `embed.cache_dir`, what the cache has already included; None where there is no such folder."""
    share: float
    """Of the peak rate that training reaches."""
    pace: float
    """Of sampling: its seconds over those that are assumed where no run has shown others."""
    computed: float
    """Share of the groups that have a signal and are computed in training."""
    assumed: list[str]

    @property
    def train_s(self) -> float:
        """Seconds of a GRPO step."""
        return self.computed * self.training.ideal_s / self.share

    @property
    def rollout_s(self) -> float:
        return self.pace * _assumed_s(self.sampling)

    @property
    def step_s(self) -> float:
        """A whole GRPO step: one after the other, or both at once on devices of their own (`grpo.overlap`)."""
        if self.config.grpo.overlap and self.hardware.is_gpu and self.config.ray.placement == "separate":
            return max(self.train_s, self.rollout_s)
        return self.train_s + self.rollout_s

    @property
    def embed_s(self) -> float:
        """Seconds for all volumes on one device, reading left out."""
        return self.work.all_volumes * self.vision.executed / self.hardware.flops / SHARE

    @property
    def sft_step_s(self) -> float:
        return self.sft.ideal_s / self.share

    @property
    def devices(self) -> int:
        """Devices that a GRPO step occupies."""
        ray = self.config.ray
        if ray.placement == "colocate" or not self.hardware.is_gpu:
            return ray.num_workers if self.hardware.is_gpu else 1
        return max(
            2, math.ceil(ray.num_workers * ray.gpus_per_worker + ray.num_engines * ray.gpus_per_engine)
        )


def make_plan(config: Config, hardware: Hardware) -> Plan:
    """Plan a recipe for a device.

    Raises:
        ConfigError: the model's sizes are not known, or `run_dir` holds records that cannot be read.
        rl.data.layout.DataError: there is a dataset and it cannot be read.
    """
    sizes, work, past = model_sizes(config.model.path), workload(config), history(config)
    language, grpo = sizes.language, config.grpo
    longest = _shape(config, work, grpo.max_completion_length, hardware.is_gpu)
    shape = _shape(config, work, past.completion, hardware.is_gpu) if past else longest
    parts = microbatches(config, longest, math.ceil(grpo.volumes_per_step / config.ray.num_workers))
    largest = max(parts, key=lambda part: longest.forest(part).tokens)
    answered_once = replace(longest, generations=1).forest([config.sft.questions_per_volume])
    engine = engine_memory(config, language, hardware, longest, grpo.questions_per_volume)
    share, pace, said = _speed(past, hardware)
    storage = getattr(torch, hardware.dtype if config.embed.dtype == "auto" else config.embed.dtype)
    cache_bytes = work.visual * bytes_per_token(sizes.vision.geometry.hidden_size, storage)
    return Plan(
        config=config,
        hardware=hardware,
        sizes=sizes,
        work=work,
        shape=shape,
        vision=vision(sizes.vision, work.grid),
        training=training(config, sizes, shape, hardware),
        sampling=sampling(config, language, hardware, shape, engine),
        sft=_sft(config, sizes, shape, hardware),
        microbatch=largest,
        memory=_memory(config, language, hardware, longest.forest(largest), reference=grpo.beta > 0),
        sft_memory=_memory(config, language, hardware, answered_once, reference=False),
        engine=engine,
        storage=storage,
        cache_bytes=cache_bytes,
        disk_free=_free(Path(config.embed.cache_dir).expanduser(), cache_bytes),
        share=share,
        pace=pace,
        computed=_computed_share(config, past),
        assumed=[*work.assumed, *said, *_left_out(config, hardware)],
    )


def _memory(
    config: Config, language: Language, hardware: Hardware, forest: Forest, *, reference: bool
) -> dict[bool, TrainerMemory]:
    """Of a training process whose largest micro-batch is `forest`, by `gradient_checkpointing`."""
    return {
        checkpointing: trainer_memory(
            language,
            config.model.lora,
            forest,
            number_bytes=hardware.number_bytes,
            checkpointing=checkpointing,
            reference=reference,
        )
        for checkpointing in (False, True)
    }


def _shape(config: Config, work: Workload, completion: float, is_gpu: bool) -> TreeShape:
    requested = config.model.attention
    return TreeShape(
        work.visual + work.header,
        work.question,
        round(completion),
        config.grpo.num_generations,
        attention=AUTO_ATTENTION["cuda" if is_gpu else "cpu"] if requested == "auto" else requested,
    )


def microbatches(config: Config, shape: TreeShape, volumes: int) -> list[list[int]]:
    """How GRPO cuts so many volumes into micro-batches: for each, its questions about each of its volumes."""
    own = shape.question + shape.generations * shape.completion
    owner = [v for v in range(volumes) for _ in range(config.grpo.questions_per_volume)]
    groups = [GroupTokens(v, shape.volume, own) for v in owner]
    parts = []
    for part in within_budget(groups, config.grpo.max_tokens_per_microbatch):
        in_part = [owner[i] for i in part]
        parts.append([in_part.count(v) for v in dict.fromkeys(in_part)])
    return parts


def training(config: Config, sizes: ModelSizes, shape: TreeShape, hardware: Hardware) -> Training:
    """Every group computed: forward and backward of all iterations, one forward of the reference where there is one."""
    grpo, workers = config.grpo, config.ray.num_workers
    parts = [
        microbatches(config, shape, len(range(rank, grpo.volumes_per_step, workers)))
        for rank in range(workers)
    ]
    ranks = [_computed(config, sizes, shape, of_rank) for of_rank in parts]
    passes = [
        (there.times(grpo.num_iterations + (grpo.beta > 0)), back.times(grpo.num_iterations))
        for there, back in ranks
    ]
    return Training(
        sum((there for there, _ in passes), Operations()),
        sum((back for _, back in passes), Operations()),
        max((there + back).executed for there, back in passes) / hardware.flops,
        sum(len(part) for of_rank in parts for part in of_rank),
    )


def _sft(config: Config, sizes: ModelSizes, shape: TreeShape, hardware: Hardware) -> Training:
    """One volume a forward, one completion a question, on one device."""
    sft = config.sft
    answered = replace(shape, generations=1)
    there, back = _computed(config, sizes, answered, [[sft.questions_per_volume]] * sft.volumes_per_step)
    return Training(there, back, (there + back).executed / hardware.flops, sft.volumes_per_step)


def _computed(
    config: Config, sizes: ModelSizes, shape: TreeShape, parts: list[list[int]]
) -> tuple[Operations, Operations]:
    """Forward and backward of some micro-batches."""
    language, model = sizes.language, config.model
    forests = [shape.forest(part) for part in parts]
    there = (forward(language, model.lora, forest) for forest in forests)
    back = (
        backward(language, model.lora, forest, checkpointing=model.gradient_checkpointing)
        for forest in forests
    )
    return sum(there, Operations()), sum(back, Operations())


def _computed_share(config: Config, past: History | None) -> float:
    """Groups without signal are not computed, but one where there is no other, and under a KL term and "bnpo"
    (`rl.grpo`)."""
    grpo = config.grpo
    if past is None or grpo.beta or grpo.loss_type == "bnpo":
        return 1.0
    one_a_rank = config.ray.num_workers / (grpo.volumes_per_step * grpo.questions_per_volume)
    return min(1.0, max(1 - past.without_signal, one_a_rank))


def _assumed_s(sampling: Sampling) -> float:
    """Seconds of a step's sampling where no run has shown others."""
    return sampling.ideal_s / SHARE + sampling.calls_s


def _speed(past: History | None, hardware: Hardware) -> tuple[float, float, list[str]]:
    """Share of the peak in training, pace of sampling, and where they and the completion length are from."""
    assumed = f"{SHARE:.0%} of the peak rates are reached"
    if past is None:
        said = "every completion takes grpo.max_completion_length tokens and every group has a signal"
        return SHARE, 1.0, [said, assumed]
    said = f"{past.completion:.0f} tokens a completion, as in {past.steps} steps of {past.folder}"
    if not hardware.measured or past.device != hardware.name:
        return SHARE, 1.0, [said, f"{assumed} (that run was on {past.device})"]
    ran = load_config(past.folder / "config.yaml")
    if ran.grpo.overlap:
        return SHARE, 1.0, [said, f"{assumed} (that run's rollouts and training overlapped)"]
    sizes, work = model_sizes(ran.model.path), workload(ran)
    shape = _shape(ran, work, past.completion, hardware.is_gpu)
    engine = engine_memory(ran, sizes.language, hardware, shape, ran.grpo.questions_per_volume)
    train_s = _computed_share(ran, past) * training(ran, sizes, shape, hardware).ideal_s
    sampling_s = _assumed_s(sampling(ran, sizes.language, hardware, shape, engine))
    share, pace = train_s / past.train_s, past.rollout_s / sampling_s
    reached = f"{share:.0%} of the peak rate is reached in training and sampling takes {pace:.2g} times what is assumed"
    return share, pace, [said, f"{reached}, as there" + ("; this machine is busy now" if share > 1 else "")]


def _left_out(config: Config, hardware: Hardware) -> list[str]:
    """What of this recipe is not in the plan."""
    found = []
    if config.engine.kind != "vllm":
        found.append(f"rollouts take as long as vLLM's (engine.kind is {config.engine.kind})")
    elif hardware.is_gpu:
        found.append(
            "launching kernels takes no time (engine.enforce_eager=true launches each by itself)"
            if config.engine.enforce_eager
            else "the engine's CUDA graphs take no memory (1 to 3 GiB as a rule, also asleep)"
        )
    if config.model.attention == "flex":
        found.append("attention costs what SDPA per level does (model.attention=flex masks and keeps less)")
    if config.grpo.resample_rounds:
        found.append("no question is drawn again (grpo.resample_rounds)")
    if config.grpo.eval_steps:
        found.append("validation takes no time (grpo.eval_steps)")
    return found


_HEADER = 2**12
"""More bytes than an entry of the cache has besides its features."""


def _free(folder: Path, entry: int) -> int | None:
    """Bytes that a cache in this folder may have; None where neither it nor the folder above exists.

    Those of entries that are there count, by their size: of another model or view it is another, as a rule.
    """
    place = next((p for p in (folder, folder.parent) if p.is_dir()), None)
    if place is None:
        return None
    sizes = (file.stat().st_size for file in folder.glob("*/*.safetensors"))
    return shutil.disk_usage(place).free + sum(size for size in sizes if entry <= size <= entry + _HEADER)
