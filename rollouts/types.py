"""Prompts, rollouts and the engine protocol.

Shape suffixes used in names everywhere in this package and in `rl`:
  B batch, V volume tokens, Q question tokens, T completion tokens, G completions of one question,
  H hidden size, N items of any other kind. `logps_G_T` is [G, T].
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol

import torch

from rewards.errors import ReasonKneeError


@dataclass(frozen=True)
class VolumeFeatures:
    """A volume as the language model sees it: the vision tower's output, one row per visual token."""

    key: str
    """Cache key: content of volume, model and preprocessing."""
    embeds_V_H: torch.Tensor
    grid_thw: tuple[int, int, int]
    """Patch grid (time, height, width) before spatial merging, as Qwen2.5-VL's `video_grid_thw`."""
    second_per_grid_t: float
    """Temporal step between two grid frames, from the slice spacing (`VolumeView`)."""

    @property
    def absent(self) -> bool:
        """Whether there is no picture (`NO_PICTURE`)."""
        return self.grid_thw == (0, 0, 0)


NO_PICTURE = VolumeFeatures("no picture", torch.empty(0, 0), (0, 0, 0), 0.0)
"""Features of a prompt that shows no volume and has no visual token."""


@dataclass(frozen=True)
class Prompt:
    """A question about a volume as token ids, split where the prefix tree branches.

    `volume_ids` (system turn, start of the user turn, one video pad per visual token) is shared by all
    questions about a volume; `question_ids` runs to the start of the assistant's turn. A prompt without a picture
    has `NO_PICTURE` for features and nothing of a video in its ids.
    """

    example_id: str
    features: VolumeFeatures
    volume_ids: tuple[int, ...]
    question_ids: tuple[int, ...]

    @property
    def token_ids(self) -> list[int]:
        return [*self.volume_ids, *self.question_ids]


@dataclass(frozen=True)
class Sampling:
    """Sampling parameters. Temperature 0 is greedy decoding."""

    temperature: float = 1.0
    top_p: float = 1.0
    max_tokens: int = 256
    """Longest completion in tokens, end-of-turn token included."""


@dataclass(frozen=True)
class Rollout:
    """One completion as sampled: token ids (end-of-turn token included) with the log-probability of each."""

    token_ids: tuple[int, ...]
    logps: tuple[float, ...]
    """Log-probabilities of the tokens under the distribution sampled from (after temperature)."""
    text: str
    """Decoded without special tokens."""
    finish_reason: Literal["stop", "length"]
    adapter_version: int
    """Version returned by `load_adapter`; 0 is the base model without an adapter."""
    prefix_hit_rate: float | None = None
    """Share of prompt tokens that the engine had in its prefix cache, over the call that made this; None: no cache."""


@dataclass(frozen=True)
class Group:
    """The G rollouts of one prompt."""

    prompt: Prompt
    rollouts: tuple[Rollout, ...]


class Engine(Protocol):
    """Anything that completes prompts: vLLM, transformers, a Ray pool of them."""

    def generate(self, prompts: list[Prompt], n: int, sampling: Sampling, seeds: list[int]) -> list[Group]:
        """`n` completions of each prompt, in the prompts' order. `seeds[i]` is the seed of prompt i's group."""
        ...

    def load_adapter(self, folder: Path | None) -> int:
        """Serve this PEFT adapter from now on (None: the bare base model). Returns its version, never reused."""
        ...

    def close(self) -> None:
        """Free the engine's memory and processes."""
        ...


class EngineError(ReasonKneeError, RuntimeError):
    """The engine died, hung past its watchdog, or was given something it must not see."""
