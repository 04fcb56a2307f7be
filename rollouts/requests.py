"""What every engine does with a batch before a model sees it: check it and seed it."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

from rollouts.features import FeatureError, validate_features
from rollouts.types import EngineError, Prompt, Sampling


@dataclass(frozen=True, slots=True)
class ModelFacts:
    """What an engine needs to know of a Qwen2.5-VL to check a prompt and place it."""

    hidden_size: int
    merge_size: int
    video_token_id: int
    vocab_size: int
    tokens_per_second: float

    @classmethod
    def of(cls, model_path: str) -> ModelFacts:
        """From the model's configuration. Raises EngineError when it is not a Qwen2.5-VL."""
        from transformers import AutoConfig

        config = AutoConfig.from_pretrained(model_path)
        if config.model_type != "qwen2_5_vl":
            raise EngineError(f"model {model_path} is a {config.model_type}; the engines serve qwen2_5_vl")
        vision, text = config.vision_config, config.text_config
        return cls(
            hidden_size=text.hidden_size,
            merge_size=vision.spatial_merge_size,
            video_token_id=config.video_token_id,
            vocab_size=text.vocab_size,
            tokens_per_second=vision.tokens_per_second,
        )


def group_seed(*parts: int | str) -> int:
    """A seed for the n samples of one prompt, hashed from e.g. (run seed, step, example id); 48 bits.

    Engines give sample i the seed `group_seed(seed) + i`. With plain neighbouring seeds, sample i + 1 of one
    group would be sample i of the next.
    """
    text = "\x1f".join(str(part) for part in parts)
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=6).digest())


def check_request(
    prompts: list[Prompt], n: int, sampling: Sampling, seeds: list[int], facts: ModelFacts, max_model_len: int
) -> None:
    """Refuse what a model must not see; the engine goes on working.

    Raises:
        EngineError: naming the volume or the example, the field and the remedy.
    """
    if len(seeds) != len(prompts) or n < 1:
        raise EngineError(
            f"{len(prompts)} prompts need as many seeds and n >= 1; got {len(seeds)} seeds, n={n}"
        )
    if sampling.temperature < 0 or not 0 < sampling.top_p <= 1 or sampling.max_tokens < 1:
        raise EngineError(f"{sampling}: needs temperature >= 0, 0 < top_p <= 1 and max_tokens >= 1")
    if sampling.temperature == 0 and n > 1:
        raise EngineError(f"greedy decoding gives one answer, but n={n}; set temperature > 0 or n=1")
    for features in {id(prompt.features): prompt.features for prompt in prompts}.values():
        if features.absent and not len(features.embeds_V_H):
            continue
        try:
            validate_features(features, facts.hidden_size, facts.merge_size)
        except FeatureError as error:
            raise EngineError(str(error)) from error
    for prompt in prompts:
        _check_tokens(prompt, sampling, facts, max_model_len)


def _check_tokens(prompt: Prompt, sampling: Sampling, facts: ModelFacts, max_model_len: int) -> None:
    ids = prompt.token_ids
    frames, rows, columns = prompt.features.grid_thw
    expected = frames * rows * columns // facts.merge_size**2
    pads = ids.count(facts.video_token_id)
    if pads != expected:
        raise EngineError(
            f"prompt {prompt.example_id}: {pads} video tokens, but its volume's grid {prompt.features.grid_thw} "
            f"makes {expected}; lay the prompt out with these features"
        )
    if min(ids) < 0 or max(ids) >= facts.vocab_size:
        raise EngineError(
            f"prompt {prompt.example_id}: token ids outside 0..{facts.vocab_size - 1}; another tokenizer?"
        )
    if len(ids) + sampling.max_tokens > max_model_len:
        raise EngineError(
            f"prompt {prompt.example_id}: {len(ids)} tokens and up to {sampling.max_tokens} completion tokens exceed "
            f"max_model_len={max_model_len}; raise engine.max_model_len or show the volume more coarsely"
        )
