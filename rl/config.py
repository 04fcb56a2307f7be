"""The typed configuration: one dataclass per stage, read from YAML plus `key=value` overrides.

GRPO fields carry TRL's names. Every field says its unit; defaults follow the paper's baseline
(arXiv 2510.20967) where it states one.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import yaml
from omegaconf import MISSING, OmegaConf
from omegaconf.errors import MissingMandatoryValue, OmegaConfBaseException

from rl.config_keys import misshapen_values, unknown_keys
from rl.config_layers import ConfigError, in_one_line, read_file, read_override
from rl.config_openai import OpenAIConfig
from rl.config_rewards import RewardsConfig
from rl.errors import write_atomically


@dataclass
class BoxConvention:
    """How the six numbers of a box in text relate to the axes of the volume file."""

    axes: str = "slice=2,x=0,y=1"
    """Which file axis (0, 1, 2) is slice, x and y."""
    flip: str = ""
    """Box axes that run against the file's axis, e.g. "x,y"; empty for none."""
    end: str = "inclusive"
    """Whether the last number of each pair is the last voxel ("inclusive") or one past it ("exclusive")."""


@dataclass
class DataConfig:
    """Where the dataset is and how it is read."""

    root: str = MISSING
    """Folder that holds `split_files/`, `question_files/`, `generate_data/` and that volume paths resolve against."""
    question_ids: list[int] = field(default_factory=list)
    """Questions to use; empty: the ids of `question_files/questions.json` where there is one, else 1-62."""
    train_file: str = "train.json"
    """File under `generate_data/` that SFT and GRPO train on."""
    val_file: str = "val.json"
    """File under `generate_data/` for validation."""
    test_file: str = "test.json"
    """File under `generate_data/` the benchmark runs on; printed on every table."""
    box_source: str = "text"
    """Where the true box comes from: "text" (the released answer) or "mask" (largest component of the region)."""
    box_convention: BoxConvention = field(default_factory=BoxConvention)


@dataclass
class VolumeViewConfig:
    """Which part of a volume the model is shown, and how finely: a true T x H x W grid."""

    crop: list[int] = field(default_factory=list)
    """[start_slice, end_slice, x_min, x_max, y_min, y_max], half-open voxels of the file; empty: whole volume."""
    slice_stride: int = 1
    """Take every n-th slice."""
    height: int = 96
    """In-plane rows shown, in pixels (a multiple of patch size x merge size)."""
    width: int = 96
    """In-plane columns shown, in pixels (a multiple of patch size x merge size)."""
    window_low: float = 1.0
    """Percentile of the volume's intensity that becomes black."""
    window_high: float = 99.5
    """Percentile of the volume's intensity that becomes white."""
    seconds_per_mm: float = 0.25
    """`second_per_grid_ts` is this times the distance between two grid frames in mm."""


@dataclass
class LoraConfig:
    """LoRA on the language model, the paper's settings."""

    r: int = 16
    alpha: int = 32
    dropout: float = 0.05
    target_modules: list[str] = field(
        default_factory=lambda: ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    )


@dataclass
class ModelConfig:
    """The base model and how it runs."""

    path: str = "builtin:base"
    """Hugging Face id or local folder; "builtin:base" is the small stand-in that ships with the package."""
    device: str = "auto"
    """auto | cpu | cuda."""
    dtype: str = "auto"
    """auto (bfloat16 on GPU, float32 on CPU) | float32 | bfloat16."""
    reasoning: str = "required"
    """Declared answer format: "required" (<think> before <answer>) or "none"."""
    lora: LoraConfig = field(default_factory=LoraConfig)
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass to save memory."""
    attention: str = "auto"
    """How training attends within the tree: auto (subtree on CPU, sdpa on GPU) | sdpa (a call per run of siblings) |
    subtree (a call per node; CPU) | flex (one FlexAttention call; GPU)."""


@dataclass
class EmbedConfig:
    """The embedding cache."""

    cache_dir: str = "${run_dir}/cache"
    """Folder of the embedding cache; may be shared by runs."""
    dtype: str = "auto"
    """Storage type of features: auto (the model's) | float32 | bfloat16 | float8_e4m3fn (half the size of bfloat16, in
    which it is read; off by about 3 % of a visual token's length)."""


@dataclass
class EngineConfig:
    """The rollout engine."""

    kind: str = "vllm"
    """vllm | hf | openai (for `eval` alone: the model that the section `openai` names)."""
    max_model_len: int = 1024
    """Longest prompt plus completion in tokens, visual tokens included."""
    max_num_seqs: int = 256
    """Sequences decoded at once."""
    kv_cache_gib: float = 1.0
    """KV cache of the CPU engine in GiB."""
    gpu_memory_utilization: float = 0.5
    """Share of the GPU's memory the engine may take, features and KV cache included."""
    enforce_eager: bool = True
    """Skip compilation and CUDA graphs: faster start, slower decoding."""
    sleep: bool = False
    """Free the engine's GPU memory while the trainer works (vLLM sleep mode; one GPU for both)."""
    start_timeout_s: float = 600.0
    """Seconds an engine may take to load."""
    generate_timeout_s: float = 600.0
    """Seconds one `generate` may take before the watchdog rebuilds the engine."""


@dataclass
class SFTConfig:
    """Supervised fine-tuning: LoRA, loss on the whole completion."""

    init_adapter: str = ""
    """Adapter folder to start from; empty: a fresh adapter."""
    train_file: str = ""
    """File under `generate_data/` that SFT trains on, those items that have reasoning text, say; empty: that of `data`,
    which GRPO trains on."""
    learning_rate: float = 2e-4
    lr_scheduler_type: str = "constant_with_warmup"
    """Rate after the warm-up: constant_with_warmup | linear (falls to 0 at the end of `max_epochs`)."""
    max_epochs: int = 20
    """Upper bound; training stops earlier by `patience`."""
    patience: int = 3
    """Stop after this many epochs without a better validation loss."""
    volumes_per_step: int = 8
    """Volumes per optimizer step."""
    questions_per_volume: int = 8
    """Questions drawn per volume and step by the balanced sampler."""
    steps_per_epoch: int = 0
    """Optimizer steps between validations; 0: as many as it takes to draw every example once on average."""
    validation_volumes: int = 24
    """Volumes whose questions make up the validation loss."""
    warmup_ratio: float = 0.05
    """Share of `max_epochs` over which the learning rate rises."""
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0
    balance: bool = True
    """Draw prompts so that the grades of an attribute are equally frequent (the same sampler as GRPO's)."""


@dataclass
class GRPOConfig:
    """GRPO (Shao et al. 2024, arXiv 2402.03300); names and meanings as in TRL's GRPOConfig."""

    init_adapter: str = ""
    """SFT adapter folder to warm-start from; empty: `${run_dir}/sft/adapter`."""
    max_steps: int = 60
    """Optimizer steps."""
    num_generations: int = 8
    """G, completions per question."""
    volumes_per_step: int = 8
    """Volumes per optimizer step."""
    questions_per_volume: int = 4
    """Questions per volume and step."""
    learning_rate: float = 1e-4
    lr_scheduler_type: str = "constant_with_warmup"
    """Rate after the warm-up: constant_with_warmup | linear (falls to 0 at the last step)."""
    warmup_steps: int = 2
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0
    beta: float = 0.0
    """Weight of the KL penalty to the SFT policy; 0 keeps no reference."""
    epsilon: float = 0.2
    """Lower clip range of the importance ratio."""
    epsilon_high: float = 0.28
    """Upper clip range (DAPO, arXiv 2503.14476)."""
    delta: float = 0.0
    """Upper bound of the ratio where the advantage is negative (INTELLECT-2, arXiv 2505.07291); 0 for none."""
    loss_type: str = "dapo"
    """grpo | dr_grpo | dapo | bnpo | cispo (there `epsilon_high` is the cap of the ratio itself, 5 say)."""
    importance_sampling_level: str = "token"
    """token | sequence (GSPO, arXiv 2507.18071; with loss_type grpo and ranges of about 3e-4)."""
    scale_rewards: str = "group"
    """Divide advantages by the standard deviation of the "group", the "batch", or not at all ("none")."""
    multi_objective_aggregation: str = "sum_then_normalize"
    """How components become advantages: sum_then_normalize | normalize_then_sum (each within its group first, so that
    the one that varies most does not drown the others: GDPO, arXiv 2601.05242; wants scale_rewards: batch)."""
    credit: str = "completion"
    """Which tokens answer for a reward: completion (all of them) | part (each number of the box for its own place, the
    text of each grade for that grade: `rl.credit`)."""
    resample_rounds: int = 0
    """Draw other questions for groups without signal, at most this many times a step (dynamic sampling: DAPO, arXiv
    2503.14476). The metrics are of the groups that are kept, but for `groups_drawn` and `groups_replaced`."""
    num_iterations: int = 1
    """Optimizer passes over one batch of rollouts."""
    overlap: bool = False
    """Let the engine answer the next step's questions while this step's are trained on: faster where they share no
    device, and one update off-policy, which the importance correction makes up for. The first step of a run that goes
    on from a checkpoint is on-policy."""
    temperature: float = 1.0
    max_completion_length: int = 128
    """Tokens per completion, end-of-turn token included."""
    mask_truncated_completions: bool = True
    """Leave completions that hit the length limit out of the loss."""
    importance_correction: str = "auto"
    """Engine-against-trainer correction: none | token_truncate | auto (token_truncate in bf16 and with `overlap`, else
    none)."""
    importance_cap: float = 3.0
    """Upper bound of the engine-against-trainer ratio."""
    balance: bool = True
    """Draw prompts so that the grades of an attribute are equally frequent."""
    save_steps: int = 20
    """Checkpoint every n steps."""
    probe_tolerance: float = 1e-3
    """Largest |difference| of a token's log-probability the probe accepts in fp32 (bf16: `probe_tolerance_bf16`)."""
    probe_tolerance_bf16: float = 0.1
    """Largest mean |difference| the probe accepts in bf16."""
    max_tokens_per_microbatch: int = 16384
    """Token budget of one forward; a group is never split."""
    eval_steps: int = 0
    """Run the benchmark on `eval_examples` questions of the validation split before the first and after every n-th
    step, and keep the best adapter by `compare.primary_endpoint`; 0: never, and the last adapter is kept."""
    eval_examples: int = 128


@dataclass
class EvalConfig:
    """The benchmark run."""

    split: str = "test"
    """test | val."""
    image: str = "volume"
    """What the model is shown: "volume", "none" (no picture), "shuffled" (a volume of another patient) or "true_region"
    (the true box of the question alone; there IoU means nothing)."""
    prompts: str = "own"
    """How it is asked: "own", our wording, or the path of a question file ({"1": text, ...}), asked as it stands."""
    temperature: float = 0.0
    max_completion_length: int = 128
    max_examples: int = 0
    """Upper bound for quick looks; 0 for all. Printed on every table."""


@dataclass
class CompareConfig:
    """The comparison of two runs."""

    bootstrap_draws: int = 10_000
    confidence: float = 0.95
    primary_endpoint: str = "balanced_accuracy"
    """Column the verdict is about, declared before the run and hashed with it."""


@dataclass
class RayConfig:
    """Placement of `reasonknee launch`, and of the engines of `reasonknee eval`."""

    address: str = ""
    """Ray cluster address; empty starts a local one."""
    placement: str = "separate"
    """separate (engines on their own resources) | colocate (engine shares the trainer's GPU)."""
    num_workers: int = 1
    """Training workers (data parallel)."""
    cpus_per_worker: float = 0.5
    gpus_per_worker: float = 0.0
    num_engines: int = 1
    """Rollout engines; with more than one, the benchmark's questions are shared among so many under Ray as well."""
    cpus_per_engine: float = 1.0
    gpus_per_engine: float = 0.0
    placement_timeout_s: float = 120.0
    """Seconds to wait for the placement before giving up with an error."""


@dataclass
class PhantomConfig:
    """The phantom dataset."""

    out_dir: str = "${data.root}"
    train_patients: int = 96
    val_patients: int = 16
    test_patients: int = 40
    max_visits: int = 3
    """Visits per patient are drawn from 1 to this number."""
    reasoned_patients: int = 0
    """So many of the training patients also make up `train_reasoned.json`; 0: there is no such file."""
    shape: list[int] = field(default_factory=lambda: [96, 96, 16])
    """File grid: two in-plane axes, then slices."""
    fov_mm: list[float] = field(default_factory=lambda: [140.0, 140.0, 104.0])
    """Extent of the file grid along its three axes in mm."""
    grades: str = "mixed"
    """How often grades occur: "natural" (heavy on 0 as in the real data), "balanced" (about uniform), or "mixed" (every
    second patient balanced), which gives the natural splits enough of each grade for the `*_balanced` files."""
    seed: int = 0


@dataclass
class BaseConfig:
    """Training of the built-in stand-in base model."""

    out_dir: str = "${run_dir}/base"
    knees: int = 2000
    """Phantom knees with balanced grades, drawn with seeds that no dataset split uses."""
    seed: int = 20_000
    vocab_size: int = 1600
    vision_steps: int = 2000
    vision_learning_rate: float = 2e-3
    lookup_steps: int = 700
    answer_steps: int = 500
    language_learning_rate: float = 1.5e-3


@dataclass
class Config:
    """Everything a run needs."""

    run_dir: str = "runs/demo"
    """Folder of all outputs of this run."""
    seed: int = 0
    data: DataConfig = field(default_factory=DataConfig)
    view: VolumeViewConfig = field(default_factory=VolumeViewConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    embed: EmbedConfig = field(default_factory=EmbedConfig)
    engine: EngineConfig = field(default_factory=EngineConfig)
    openai: OpenAIConfig = field(default_factory=OpenAIConfig)
    rewards: RewardsConfig = field(default_factory=RewardsConfig)
    sft: SFTConfig = field(default_factory=SFTConfig)
    grpo: GRPOConfig = field(default_factory=GRPOConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
    compare: CompareConfig = field(default_factory=CompareConfig)
    ray: RayConfig = field(default_factory=RayConfig)
    phantom: PhantomConfig = field(default_factory=PhantomConfig)
    base: BaseConfig = field(default_factory=BaseConfig)


def load_config(path: Path | None = None, overrides: list[str] | None = None) -> Config:
    """Defaults, then the YAML file, then `key=value` overrides, interpolations resolved.

    Raises:
        ConfigError: unreadable file, unknown key (the nearest known key is named), or a value of the wrong type.
    """
    merged: Any = OmegaConf.structured(Config)
    layers = [] if path is None else [(str(path), read_file(path))]
    layers += [(f"override {item!r}", read_override(item)) for item in overrides or []]
    for origin, layer in layers:
        _refuse_misfits(layer, origin)
        try:
            merged = OmegaConf.merge(merged, layer)
        except OmegaConfBaseException as error:
            raise ConfigError(f"{origin}: {in_one_line(error)}") from error
    try:
        config = OmegaConf.to_object(merged)
    except MissingMandatoryValue as error:
        raise ConfigError(
            f"{error.full_key} is not set; write it into the recipe, or add {error.full_key}=VALUE to the command"
        ) from error
    except OmegaConfBaseException as error:  # a reference that fails
        raise ConfigError(f"{path or 'configuration'}: {in_one_line(error)}") from error
    assert isinstance(config, Config)
    return config


def save_config(config: Config, path: Path) -> None:
    """Write the resolved config as YAML, under a temporary name first."""
    write_atomically(path, yaml.safe_dump(asdict(config), sort_keys=False))


def _refuse_misfits(layer: Any, origin: str) -> None:
    content = OmegaConf.to_container(layer, resolve=False)
    for key, nearest in unknown_keys(content, Config):
        hint = f"; did you mean {nearest!r}?" if nearest else ""
        raise ConfigError(f"{origin}: unknown config key {key!r}{hint}")
    for problem in misshapen_values(content, Config):
        raise ConfigError(f"{origin}: {problem}")
