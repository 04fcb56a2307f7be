"""Settings that take one of a few words, as the types that name those words."""

from __future__ import annotations

from typing import Literal, TypeVar, get_args

from rewards.types import ReaderMode, Reasoning
from rl.config import Config, ConfigError
from rl.data.layout import Split

Word = TypeVar("Word", bound=str)
ImageSetting = Literal["volume", "none", "shuffled", "true_region"]
"""What the benchmark shows a model (`rl.showing`)."""
OWN_PROMPTS = "own"
"""`eval.prompts` for our wording of the questions."""


def reasoning_of(config: Config) -> Reasoning:
    """The declared answer format."""
    words: tuple[Reasoning, ...] = get_args(Reasoning)
    return _one_of("model.reasoning", config.model.reasoning, words)


def reader_of(config: Config) -> ReaderMode:
    """How answers are read, in training and benchmark alike."""
    words: tuple[ReaderMode, ...] = get_args(ReaderMode)
    return _one_of("rewards.reader", config.rewards.reader, words)


def split_of(config: Config) -> Split:
    """The split the benchmark runs on."""
    words: tuple[Split, ...] = ("test", "val")
    return _one_of("eval.split", config.eval.split, words)


def image_of(config: Config) -> ImageSetting:
    """What the benchmark shows the model."""
    words: tuple[ImageSetting, ...] = get_args(ImageSetting)
    return _one_of("eval.image", config.eval.image, words)


def _one_of(field: str, value: str, words: tuple[Word, ...]) -> Word:
    for word in words:
        if value == word:
            return word
    raise ConfigError(f"{field} is {value!r}; write " + " or ".join(f'"{word}"' for word in words))
