"""Cross-field rules of a configuration, checked before anything is loaded: legal choices, sizes that fit.

`load_config` refuses unknown keys and wrong types; `validate` refuses what no single field can know. All
problems are reported at once, each with the field, its value and the remedy.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from rewards.suite import RewardSuite
from rl.bench.endpoints import MEASURES, parse_endpoint
from rl.choices import OWN_PROMPTS
from rl.config import Config, ConfigError, LoraConfig, load_config
from rl.geometry import vision_geometry, visual_grid

CHOICES: Mapping[str, tuple[str, ...]] = {
    "data.box_source": ("text", "mask"),
    "data.box_convention.end": ("inclusive", "exclusive"),
    "model.device": ("auto", "cpu", "cuda"),
    "model.dtype": ("auto", "float32", "bfloat16"),
    "model.reasoning": ("required", "none"),
    "model.attention": ("auto", "sdpa", "subtree", "flex"),
    "embed.dtype": ("auto", "float32", "bfloat16", "float8_e4m3fn"),
    "engine.kind": ("vllm", "hf", "openai"),
    "rewards.reader": ("strict", "tolerant"),
    "rewards.on_error": ("raise", "score_none"),
    "grpo.loss_type": ("grpo", "dr_grpo", "dapo", "bnpo", "cispo"),
    "grpo.importance_sampling_level": ("token", "sequence"),
    "sft.lr_scheduler_type": ("constant_with_warmup", "linear"),
    "grpo.lr_scheduler_type": ("constant_with_warmup", "linear"),
    "grpo.scale_rewards": ("group", "batch", "none"),
    "grpo.credit": ("completion", "part"),
    "grpo.multi_objective_aggregation": ("sum_then_normalize", "normalize_then_sum"),
    "grpo.importance_correction": ("auto", "none", "token_truncate"),
    "eval.split": ("test", "val"),
    "eval.image": ("volume", "none", "shuffled", "true_region"),
    "ray.placement": ("separate", "colocate"),
    "phantom.grades": ("natural", "balanced", "mixed"),
}
"""Fields that take one of a few words."""

PROJECTIONS = tuple(LoraConfig().target_modules)
"""Linear layers of the language model: by default all of them are adapted."""

MAY_BE_ZERO = frozenset(
    {
        *("seed", "phantom.seed", "base.seed", "view.window_low", "model.lora.dropout"),
        *("sft.steps_per_epoch", "sft.warmup_ratio", "sft.weight_decay"),
        *("grpo.beta", "grpo.epsilon", "grpo.epsilon_high", "grpo.delta", "grpo.resample_rounds"),
        *("grpo.warmup_steps", "grpo.weight_decay", "grpo.eval_steps"),
        *("eval.temperature", "eval.max_examples"),
        *("openai.requests_per_minute", "openai.retries"),
        *("phantom.reasoned_patients", "ray.gpus_per_worker", "ray.gpus_per_engine"),
    }
)
"""Numbers for which 0 has a meaning; every other number of the configuration is greater than 0."""

PROMPT_TEXT_TOKENS = 384
"""Allowance for the text of a prompt (system turn, question, answer template) under Qwen's tokenizer."""

QUESTION_IDS = range(1, 70)

TRAINED_RUNS = ("SFT", "GRPO", "SFT-continued", "SFT-best-of-G")
"""Names of the runs of a run's adapters; in lower case, of the folders they lie in."""

OWN_RUNS = ("baseline", "prior", "base", *TRAINED_RUNS)
"""Names of the runs `eval` makes of the baselines and of the models of a run, in the order of the tables."""


def validate(config: Config, *, needs_model: bool = True) -> None:
    """Check every cross-field rule.

    Args:
        needs_model: False for what needs no model (phantoms, the check of a dataset): it need not be there.

    Raises:
        ConfigError: names every field at fault, its value and what would be legal.
    """
    problems = [
        *_choices(config),
        *_signs(config),
        *_data(config),
        *_view(config),
        *_model(config),
        *_openai(config),
        *_eval(config),
        *_rewards(config),
        *_grpo(config),
        *_ray(config),
        *_compare_and_phantom(config),
    ]
    if needs_model and not problems:  # the grid is only meaningful once its parts are
        problems += [*_geometry(config)]
    if problems:
        raise ConfigError(
            "the configuration cannot be used:\n" + "\n".join(f"  - {problem}" for problem in problems)
        )


def load_valid(path: Path | None, overrides: Sequence[str] = (), *, needs_model: bool = True) -> Config:
    """`load_config`, then `validate`.

    Raises:
        ConfigError: see both.
    """
    config = load_config(path, list(overrides))
    validate(config, needs_model=needs_model)
    return config


def _choices(config: Config) -> Iterator[str]:
    for field, allowed in CHOICES.items():
        value = _value(config, field)
        if value not in allowed:
            yield f"{field} is {value!r}: use {', '.join(allowed[:-1])} or {allowed[-1]}"


def _signs(config: Config) -> Iterator[str]:
    for name, value in _numbers(config, ""):
        if not math.isfinite(value):
            yield f"{name} is {value}: it must be a finite number"
        elif name in MAY_BE_ZERO and not value >= 0:
            yield f"{name} is {value}: it must not be negative"
        elif name not in MAY_BE_ZERO and not value > 0:
            yield f"{name} is {value}: it must be greater than 0"


def _data(config: Config) -> Iterator[str]:
    for field in ("run_dir", "data.root", "embed.cache_dir"):
        if not _value(config, field).strip():
            yield f"{field} is empty: name a folder"
    ids = config.data.question_ids
    unknown = [i for i in ids if i not in QUESTION_IDS]
    if unknown:
        yield f"data.question_ids has {unknown}: questions are numbered 1 to 69"
    if len(set(ids)) != len(ids):
        yield f"data.question_ids names a question twice: {sorted({i for i in ids if ids.count(i) > 1})}"
    for field in ("data.train_file", "data.val_file", "data.test_file", "sft.train_file"):
        name = Path(_value(config, field))
        if name.is_absolute() or ".." in name.parts:
            yield f"{field} is {str(name)!r}: it must be a file under data.root's generate_data/"
    axes = [part.partition("=") for part in config.data.box_convention.axes.split(",")]
    if [name for name, _, _ in axes] != ["slice", "x", "y"] or sorted(axis for _, _, axis in axes) != [
        "0",
        "1",
        "2",
    ]:
        yield (
            f"data.box_convention.axes is {config.data.box_convention.axes!r}: "
            "give each of slice, x and y one file axis, as in 'slice=2,x=0,y=1'"
        )
    flips = [part for part in config.data.box_convention.flip.split(",") if part]
    if not set(flips) <= {"slice", "x", "y"}:
        yield f"data.box_convention.flip is {config.data.box_convention.flip!r}: name axes of slice, x, y"


def _view(config: Config) -> Iterator[str]:
    view = config.view
    if view.crop:
        if len(view.crop) != 6:
            yield f"view.crop has {len(view.crop)} numbers: give six, or none for the whole volume"
        else:
            for axis, low, high in zip(("slice", "x", "y"), view.crop[::2], view.crop[1::2], strict=True):
                if not 0 <= low < high:
                    yield f"view.crop is empty or negative along {axis}: [{low}, {high}) (half-open voxels)"
    if not 0 <= view.window_low < view.window_high <= 100:
        yield (
            f"view.window_low and view.window_high are {view.window_low} and {view.window_high}: "
            "give percentiles with 0 <= low < high <= 100"
        )


def _model(config: Config) -> Iterator[str]:
    if not 0 <= config.model.lora.dropout < 1:
        yield f"model.lora.dropout is {config.model.lora.dropout}: it must be in [0, 1)"
    if not config.model.lora.target_modules:
        yield "model.lora.target_modules is empty: nothing would be trained"
    if unknown := sorted(set(config.model.lora.target_modules) - {*PROJECTIONS}):
        yield f"model.lora.target_modules has {unknown}: the language model's layers have {', '.join(PROJECTIONS)}"
    if config.model.attention == "flex" and config.model.device == "cpu":
        yield "model.attention is 'flex' with model.device 'cpu', where torch cannot train with it: use 'auto'"
    if config.model.attention == "subtree" and config.model.device == "cuda":
        yield "model.attention is 'subtree', whose kernel is one for CPUs, with model.device 'cuda': use 'auto'"
    if not 0 < config.engine.gpu_memory_utilization <= 1:
        yield f"engine.gpu_memory_utilization is {config.engine.gpu_memory_utilization}: it must be in (0, 1]"


def _openai(config: Config) -> Iterator[str]:
    if config.engine.kind != "openai":
        return
    endpoint = config.openai
    if not endpoint.model:
        yield "openai.model is empty: name a model that the endpoint serves"
    elif endpoint.model in OWN_RUNS:
        yield f"openai.model is {endpoint.model!r}, which tables call a run of this project: serve it by another name"
    # what may be a secret in the wrong place is not repeated
    url = urlsplit(endpoint.base_url)
    if url.scheme not in ("http", "https") or not url.hostname or "@" in url.netloc or url.query:
        yield "openai.base_url must be like https://HOST/v1, without user, password or query"
    if not re.fullmatch("[A-Z_][A-Z0-9_]*", endpoint.api_key_env):
        yield (
            "openai.api_key_env must be the name of an environment variable, in capitals, as OPENAI_API_KEY is; "
            "the key itself goes into that variable"
        )


def _eval(config: Config) -> Iterator[str]:
    prompts = config.eval.prompts
    if prompts != OWN_PROMPTS and not Path(prompts).is_file():
        yield (
            f"eval.prompts is {prompts!r}, which is no file: write {OWN_PROMPTS!r} for our wording, or the path of a "
            "question file such as DIR/question_files/questions_nobbox_zeroshot.json"
        )


def _rewards(config: Config) -> Iterator[str]:
    if not any(component.weight > 0 for component in config.rewards.components):
        yield "rewards.components has no positive weight: there is nothing to learn"
    elif config.rewards.reader in CHOICES["rewards.reader"]:
        try:  # the suite has its own rules (known functions, parameters, gates, signs); files are loaded here
            RewardSuite.from_config(config.rewards)
        except (ValueError, FileNotFoundError) as error:
            yield f"rewards.components: {error}"
    for component in config.rewards.components:
        schedule = component.schedule
        if schedule is None:
            continue
        place = f"rewards.components: the schedule of {component.name!r}"
        first = component.params.get(schedule.parameter)
        if not isinstance(first, (int, float)) or isinstance(first, bool):
            yield f"{place} raises {schedule.parameter!r}: give its first value, a number, under params"
        elif not (schedule.by > 0 and schedule.to > first):
            yield f"{place} goes from {first} to {schedule.to} by {schedule.by}: it must rise"
        if not 0 <= schedule.above < 1:
            yield f"{place} has above = {schedule.above}: it is compared with a score, so it must be in [0, 1)"


def _grpo(config: Config) -> Iterator[str]:
    grpo = config.grpo
    if grpo.num_generations < 2:
        yield f"grpo.num_generations is {grpo.num_generations}: a group needs at least 2 to compare"
    if grpo.epsilon >= 1:
        yield f"grpo.epsilon is {grpo.epsilon}: it must be below 1"
    if grpo.epsilon_high < grpo.epsilon:
        yield f"grpo.epsilon_high is {grpo.epsilon_high}: it must not be below grpo.epsilon ({grpo.epsilon})"
    if grpo.loss_type == "cispo" and grpo.epsilon_high < 1:
        yield (
            f"grpo.epsilon_high is {grpo.epsilon_high} with loss_type cispo, where it is the cap of the ratio itself: "
            "set it above 1, 5 say"
        )
    if 0 < grpo.delta <= 1 + grpo.epsilon_high:
        yield f"grpo.delta is {grpo.delta}: it must be above 1 + grpo.epsilon_high ({1 + grpo.epsilon_high:g})"
    if grpo.importance_sampling_level == "sequence" and grpo.loss_type != "grpo":
        yield (
            f"grpo.loss_type is {grpo.loss_type!r} with importance_sampling_level 'sequence', where it would weight "
            "each completion by its length: set grpo.loss_type to 'grpo'"
        )
    if grpo.multi_objective_aggregation == "normalize_then_sum" and grpo.scale_rewards != "batch":
        yield (
            f"grpo.scale_rewards is {grpo.scale_rewards!r} with normalize_then_sum, which divides by the standard "
            "deviation of the batch: set grpo.scale_rewards to 'batch'"
        )
    if grpo.overlap and grpo.importance_correction == "none":
        yield (
            "grpo.importance_correction is 'none' with grpo.overlap, whose rollouts are one update old: set 'auto'"
        )
    if grpo.overlap and grpo.resample_rounds:
        yield (
            f"grpo.resample_rounds is {grpo.resample_rounds} with grpo.overlap: further draws would wait for the "
            "engine, which is busy with the next step; set the one to 0 or the other to false"
        )
    if grpo.overlap and config.engine.sleep:
        yield "engine.sleep is true with grpo.overlap, where the engine works while the trainer does: set one to false"
    if grpo.warmup_steps >= grpo.max_steps:
        yield f"grpo.warmup_steps is {grpo.warmup_steps}: it must be below grpo.max_steps ({grpo.max_steps})"


def _ray(config: Config) -> Iterator[str]:
    ray = config.ray
    if config.engine.sleep and ray.placement != "colocate":
        yield "engine.sleep is true with ray.placement 'separate': it needs 'colocate' (one GPU for both)"
    if config.engine.sleep and config.model.device == "cpu":
        yield "engine.sleep is true with model.device 'cpu': sleep frees GPU memory only"
    if ray.placement == "colocate" and ray.num_engines != ray.num_workers:
        yield (
            f"ray.num_engines is {ray.num_engines} and ray.num_workers {ray.num_workers}: "
            "with placement 'colocate' each worker shares its GPU with one engine"
        )
    if ray.num_workers > config.grpo.volumes_per_step:
        yield (
            f"ray.num_workers is {ray.num_workers}: with grpo.volumes_per_step {config.grpo.volumes_per_step} "
            "some workers would have no volume; lower the one or raise the other"
        )
    if config.model.device == "cpu" and (ray.gpus_per_worker or ray.gpus_per_engine):
        yield "model.device is 'cpu' but ray.gpus_per_worker or ray.gpus_per_engine is not 0"


def _compare_and_phantom(config: Config) -> Iterator[str]:
    measure, _ = parse_endpoint(config.compare.primary_endpoint)
    if measure not in MEASURES:
        yield (
            f"compare.primary_endpoint is {config.compare.primary_endpoint!r}: use one of {', '.join(MEASURES)}, "
            "or one of them and a column, as in 'iou/Femur'"
        )
    if not 0 < config.compare.confidence < 1:
        yield f"compare.confidence is {config.compare.confidence}: it must be between 0 and 1"
    draws, confidence = config.compare.bootstrap_draws, config.compare.confidence
    if draws * (1 - confidence) / 2 < 1:
        yield f"compare.bootstrap_draws is {draws}: too few for an interval of {confidence:.0%}"
    if config.phantom.reasoned_patients > config.phantom.train_patients:
        yield (
            f"phantom.reasoned_patients is {config.phantom.reasoned_patients}: there are "
            f"{config.phantom.train_patients} training patients (phantom.train_patients)"
        )
    for field, numbers in (("shape", config.phantom.shape), ("fov_mm", config.phantom.fov_mm)):
        if len(numbers) != 3 or not all(number > 0 for number in numbers):
            yield f"phantom.{field} is {numbers}: give three positive numbers (in-plane, in-plane, slices)"


def _geometry(config: Config) -> Iterator[str]:
    geometry = vision_geometry(config.model.path)
    if geometry is None:
        return
    edge = geometry.pixels_per_token
    for field, pixels in (("height", config.view.height), ("width", config.view.width)):
        if pixels <= 0 or pixels % edge:
            near = max(edge, round(pixels / edge) * edge)
            yield (
                f"view.{field} is {pixels}: {config.model.path} needs a multiple of {edge} "
                f"(patch {geometry.patch_size} x merge {geometry.merge_size}), for example {near}"
            )
    if config.engine.kind == "openai":  # served with a context of its own
        return
    grid = visual_grid(config, geometry)
    visual = math.prod(grid)
    completion = max(config.grpo.max_completion_length, config.eval.max_completion_length)
    needed = visual + PROMPT_TEXT_TOKENS + completion
    if config.engine.max_model_len < needed:
        yield (
            f"engine.max_model_len is {config.engine.max_model_len}: it must be at least {needed} = "
            f"{visual} visual tokens ({' x '.join(map(str, grid))}) + {PROMPT_TEXT_TOKENS} for the prompt's text "
            f"+ {completion} for the completion; raise it, or show less of the volume (view.slice_stride, "
            "view.height, view.width)"
        )


def _numbers(section: Any, prefix: str) -> Iterator[tuple[str, float]]:
    """Every number of a tree of dataclasses, by its dotted name."""
    for field in dataclasses.fields(section):
        value = getattr(section, field.name)
        if dataclasses.is_dataclass(value):
            yield from _numbers(value, f"{prefix}{field.name}.")
        elif isinstance(value, int | float) and not isinstance(value, bool):
            yield f"{prefix}{field.name}", value


def _value(config: Config, dotted: str) -> Any:
    node: Any = config
    for name in dotted.split("."):
        node = getattr(node, name)
    return node
