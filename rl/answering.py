"""Asking a model the benchmark's questions: its answers as the rows of a run, and what the run says of itself."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict
from functools import lru_cache
from pathlib import Path

from rewards.types import Example
from rl.bench.answers import AnswerRow, answer_row
from rl.bench.meta import RunMeta
from rl.choices import image_of, reader_of, reasoning_of, split_of
from rl.config import Config
from rl.data.examples import Examples, load_examples
from rl.data.layout import item_file_name
from rl.environment import pick_device
from rl.model import load_tokenizer, resolve_model
from rl.showing import Pictures, Showing, prompts_source
from rl.task import Task, feature_dtypes, open_features
from rollouts.prompts import PromptBuilder, check_length
from rollouts.storage import as_read
from rollouts.types import NO_PICTURE, Engine, Prompt, Sampling, VolumeFeatures
from rollouts.vision import TowerSpec, VisionTower


class Exam:
    """The questions of the split that is evaluated, as prompts in the setting of `eval.image` and `eval.prompts`.

    Raises:
        rl.data.layout.DataError: the data or the question file cannot be read.
        ConfigError: the setting does not fit the items (`rl.showing`).
        rollouts.cache.CacheError: a volume that is shown whole was not embedded yet.
    """

    def __init__(self, config: Config) -> None:
        self._config = config
        self.examples: Examples = load_examples(config, split_of(config))
        self._showing = Showing(config, self.examples)
        model_path = resolve_model(config.model.path)
        self._builder = PromptBuilder(load_tokenizer(model_path), reasoning_of(config), self._showing.texts)
        self._features = self._source(model_path)
        self.prompts_at_once = config.ray.num_engines * (64 if self._showing.image == "true_region" else 512)
        """Prompts for one call: enough to fill the engines, few enough to show progress, and to hold in memory where
        each has features of its own."""

    def prompt(self, index: int, max_new: int) -> Prompt:
        """Prompt of one example; refused when it and `max_new` tokens do not fit into the context."""
        example = self.examples[index]
        prompt = self._builder.build(example, self._features(example), self._showing.region(example))
        check_length(prompt, self._config.engine.max_model_len, max_new)
        return prompt

    def _source(self, model_path: Path) -> Callable[[Example], VolumeFeatures]:
        """Where the features of an example come from: nowhere, the tower, or the cache."""
        if self._showing.image == "none":
            return lambda example: NO_PICTURE
        if self._showing.image == "true_region":
            return RegionEncoder(self._config, model_path)
        store = open_features(self._config, self.examples, TowerSpec.of_folder(model_path))
        # questions about a volume come one after another: it is read once, and they share it in memory
        read = lru_cache(maxsize=1)(store.__getitem__)
        return lambda example: read(self._showing.volume(example).volume_id)


class RegionEncoder:
    """Features of true regions. Each question has its own, so they are made when asked for and not cached."""

    def __init__(self, config: Config, model_path: Path) -> None:
        compute, self._storage = feature_dtypes(config)
        self._tower = VisionTower(model_path, pick_device(config.model.device), compute)
        self._pictures = Pictures(config, self._tower.spec.sizes)

    def __call__(self, example: Example) -> VolumeFeatures:
        """The true region of an example through the tower."""
        volume, region = example.volume, example.truth.bbox
        frames = self._pictures.frames(volume.image_path, region)
        embeds, grid = self._tower.encode(frames)
        # a hash of the content, as in the cache, would take longer than the tower
        key = f"{volume.volume_id} {region}"
        return VolumeFeatures(key, as_read(embeds, self._storage), grid, frames.second_per_grid_t)


def ask(config: Config, task: Task | Exam, engine: Engine, indices: Sequence[int]) -> list[AnswerRow]:
    """One answer to each of the task's examples at `indices`, decoded as `config.eval` says."""
    sampling = Sampling(temperature=config.eval.temperature, max_tokens=config.eval.max_completion_length)
    prompts = [task.prompt(i, sampling.max_tokens) for i in indices]
    groups = engine.generate(prompts, 1, sampling, [config.seed + i for i in indices]) if prompts else []
    rows = []
    for i, group in zip(indices, groups, strict=True):
        (rollout,) = group.rollouts
        rows.append(answer_row(task.examples[i], rollout.text, rollout.finish_reason, reader_of(config)))
    return rows


def run_meta(config: Config, name: str, model: str, adapter: str | None, examples: Examples) -> RunMeta:
    """What a reader must know of a run; the comparison checks it."""
    content = json.dumps(asdict(config), sort_keys=True, default=str)
    prompts, prompts_hash = prompts_source(config)
    return RunMeta(
        name=name,
        model=model,
        adapter=adapter,
        split_file=item_file_name(config, split_of(config)),
        question_ids=tuple(sorted(set(examples.column("question_id")))),
        reader=reader_of(config),
        reasoning=reasoning_of(config),
        decoding={"temperature": config.eval.temperature, "max_tokens": config.eval.max_completion_length},
        config_hash=hashlib.blake2b(content.encode(), digest_size=8).hexdigest(),
        dataset_fingerprint=examples.fingerprint,
        n=len(examples),
        max_examples=config.eval.max_examples,
        image=image_of(config),
        prompts=prompts,
        prompts_hash=prompts_hash,
        primary_endpoint=config.compare.primary_endpoint,
    )
