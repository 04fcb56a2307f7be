"""The data side of a run: examples of a split, their prompts over cached features, and their packed trees."""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import cached_property, lru_cache

import torch

from rl.choices import reasoning_of
from rl.config import Config
from rl.data.boxes import parse_convention
from rl.data.examples import Examples, load_examples
from rl.data.layout import Split
from rl.data.records import completion_text
from rl.data.sampling import PromptSampler
from rl.environment import pick_device, pick_dtype
from rl.model import load_tokenizer, resolve_model
from rl.packed import Node
from rollouts.cache import EmbeddingCache, FeatureStore, embedding_recipe, open_store
from rollouts.positions import mrope_positions
from rollouts.prompts import PromptBuilder, check_length
from rollouts.requests import ModelFacts
from rollouts.types import Prompt
from rollouts.vision import TowerSpec


class Task:
    """Examples of one split and everything needed to ask about them.

    Raises:
        rl.data.layout.DataError: the data cannot be read.
        rollouts.cache.CacheError: a volume was not embedded yet.
    """

    def __init__(self, config: Config, split: Split, file: str | None = None) -> None:
        self.config = config
        self.examples: Examples = load_examples(config, split, file)
        self.model_path = resolve_model(config.model.path)
        self.spec = TowerSpec.of_folder(self.model_path)
        self.tokenizer = load_tokenizer(self.model_path)
        self.store = open_features(config, self.examples, self.spec)
        self.builder = PromptBuilder(self.tokenizer, reasoning_of(config))
        self._tokens_per_second = ModelFacts.of(str(self.model_path)).tokens_per_second
        # questions about a volume come one after another: it is read once, and they share it in memory
        self._features = lru_cache(maxsize=1)(self.store.__getitem__)

    @cached_property
    def volume_ids(self) -> list[str]:
        """Volume of each example."""
        return self.examples.column("volume_id")

    def sampler(self, seed: int, *, balance: bool) -> PromptSampler:
        """The sampler SFT and GRPO draw from."""
        grades = [json.loads(g) for g in self.examples.column("grades")]
        return PromptSampler(
            self.examples.column("question_id"), grades, self.volume_ids, balance=balance, seed=seed
        )

    def prompt(self, index: int, max_new: int) -> Prompt:
        """Prompt of one example; refused when it and `max_new` tokens do not fit into the context."""
        example = self.examples[index]
        prompt = self.builder.build(example, self._features(example.volume.volume_id))
        check_length(prompt, self.config.engine.max_model_len, max_new)
        return prompt

    def target_ids(self, index: int) -> list[int]:
        """The training completion of one example as token ids, end of turn included."""
        text = completion_text(self.examples[index], reasoning_of(self.config))
        ids = self.tokenizer.encode(text, add_special_tokens=False, split_special_tokens=True)
        return [*ids, self.builder.im_end]

    def tree(
        self,
        prompts: Sequence[Prompt],
        completions: Sequence[Sequence[Sequence[int]]],
        *,
        flat_positions: bool = False,
    ) -> list[Node]:
        """One tree per volume: volume -> questions -> completions, in the order given.

        Args:
            prompts: those of one volume must follow each other.
            completions: token ids, `completions[i][g]` is sample g of prompt i.
            flat_positions: place visual tokens like text (wrong; the agreement probe tries it as an explanation).
        """
        roots: list[Node] = []
        previous: tuple[tuple[int, ...], str] | None = None
        for prompt, samples in zip(prompts, completions, strict=True):
            features = prompt.features
            volume = (prompt.volume_ids, features.key)
            if volume != previous:
                positions = None if flat_positions else self._volume_positions(prompt)
                roots.append(Node(prompt.volume_ids, positions, features.embeds_V_H))
                previous = volume
            leaves = [Node(ids, scored=True) for ids in samples]
            roots[-1].children.append(Node(prompt.question_ids, children=leaves))
        return roots

    def _volume_positions(self, prompt: Prompt) -> torch.Tensor:
        return mrope_positions(
            prompt.volume_ids,
            prompt.features.grid_thw,
            prompt.features.second_per_grid_t,
            video_token_id=self.builder.video_pad,
            merge_size=self.spec.sizes.merge,
            tokens_per_second=self._tokens_per_second,
        )


def open_features(config: Config, examples: Examples, spec: TowerSpec) -> FeatureStore:
    """The cached features of the volumes of these examples.

    Raises:
        rollouts.cache.CacheError: a volume was not embedded yet.
    """
    return open_store(
        examples.volumes().values(), EmbeddingCache(config.embed.cache_dir), feature_recipe(config, spec)
    )


def feature_recipe(config: Config, spec: TowerSpec) -> str:
    """Everything that turns a volume into features, as one hash."""
    compute, storage = feature_dtypes(config)
    return embedding_recipe(
        spec, config.view, parse_convention(config.data.box_convention).axes, compute, storage
    )


def feature_dtypes(config: Config) -> tuple[torch.dtype, torch.dtype]:
    """Number formats the tower computes in and the cache stores."""
    compute = pick_dtype(config.model.dtype, pick_device(config.model.device))
    return compute, compute if config.embed.dtype == "auto" else getattr(torch, config.embed.dtype)
