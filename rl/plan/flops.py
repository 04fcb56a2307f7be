"""Floating-point operations: 2 for each multiplication with a weight and the addition that follows.

Attention is counted for the pairs of tokens that may see each other. What the packed forward computes beyond that (with
SDPA per level, what siblings would see of each other) is kept apart: it costs time and is of no use.

    forward           2 W a token, W the weights it is multiplied with; attention 4 H a pair and layer, H the width
    backward          the same again for the gradient of the inputs; that of the frozen weights is not computed, so the
                      usual factor of 2 holds for the adapter alone; attention 2.5 times, as its kernels compute the
                      scores anew (FlashAttention-2, arXiv 2307.08691)
    checkpointing     another forward of the layers

In the last layer nothing is read from a volume's tokens: the trainer computes their keys and values alone
(`rl.packed`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import astuple, dataclass

from rl.config import LoraConfig
from rl.microbatch import attended_at_once, scored_at_once
from rl.plan.sizes import UNREAD, Language, Vision

ATTENTION_BACKWARD = 2.5


@dataclass(frozen=True, slots=True)
class Operations:
    """FLOPs by part."""

    linear: float = 0.0
    """Linear layers of the decoder (or tower), adapter included."""
    attention: float = 0.0
    masked: float = 0.0
    """Attention computed and then masked."""
    lm_head: float = 0.0

    @property
    def needed(self) -> float:
        return self.linear + self.attention + self.lm_head

    @property
    def executed(self) -> float:
        return self.needed + self.masked

    def __add__(self, other: Operations) -> Operations:
        return Operations(*(a + b for a, b in zip(astuple(self), astuple(other), strict=True)))

    def times(self, factor: float) -> Operations:
        """For `factor` times the work."""
        return Operations(*(factor * part for part in astuple(self)))


@dataclass(frozen=True, slots=True)
class Siblings:
    """Children of one node of the prefix tree that attend in one call (`rl.packed.Siblings`), in tokens."""

    path: int
    """The length of what they continue."""
    lengths: tuple[int, ...]

    @property
    def tokens(self) -> int:
        return sum(self.lengths)

    @property
    def pairs(self) -> float:
        """A token and one that it may see."""
        return sum(self.path * n + n * (n + 1) / 2 for n in self.lengths)

    @property
    def computed_pairs(self) -> float:
        """Of the call that `rl.packed` makes: each token with the path and all of them, a root's with its past."""
        return self.tokens * (self.path + self.tokens) if self.path else self.pairs


@dataclass(frozen=True, slots=True)
class Forest:
    """Prefix trees as the packed forward sees them."""

    siblings: tuple[Siblings, ...]
    scored: int
    """Tokens of completions: those that the output layer predicts."""
    unread: int
    """Tokens of volumes, which the last layer leaves out but for keys and values; 0 for an engine, which does not."""
    attention: str
    """How it attends: "subtree" (`rl.subtree`), or a call per run of siblings."""

    @property
    def tokens(self) -> int:
        return sum(s.tokens for s in self.siblings)

    @property
    def pairs(self) -> float:
        return sum(s.pairs for s in self.siblings)

    @property
    def masked_runs(self) -> list[Siblings]:
        """Those that attend with a mask."""
        return [] if self.attention == "subtree" else [s for s in self.siblings if s.path]

    @property
    def unread_pairs(self) -> float:
        return sum(s.pairs for s in self.siblings if not s.path) if self.unread else 0.0


@dataclass(frozen=True, slots=True)
class TreeShape:
    """Tokens of the parts of a prefix tree."""

    volume: int
    """Visual tokens and the text before them."""
    question: int
    completion: int
    generations: int
    """Completions of a question."""
    attention: str
    """How they attend, as in `Forest`."""

    def prompts(self, questions: Sequence[int]) -> Forest:
        """Volumes that are asked so many questions each."""
        volumes = _runs(0, self.volume, len(questions))
        asked = (run for count in questions for run in _runs(self.volume, self.question, count))
        return Forest((*volumes, *asked), scored=0, unread=0, attention=self.attention)

    def forest(self, questions: Sequence[int]) -> Forest:
        """The same with all completions."""
        group = _runs(self.volume + self.question, self.completion, self.generations)
        groups = sum(questions)
        return Forest(
            (*self.prompts(questions).siblings, *group * groups),
            scored=groups * self.generations * self.completion,
            unread=len(questions) * self.volume,
            attention=self.attention,
        )

    def padded_tokens(self, questions: int) -> int:
        """Of one row per completion, for a volume with so many questions."""
        return questions * self.generations * (self.volume + self.question + self.completion)


def _runs(path: int, length: int, count: int) -> list[Siblings]:
    """So many siblings of one length, as they attend."""
    return [Siblings(path, (length,) * len(run)) for run in attended_at_once(path, [length] * count)]


def forward(language: Language, lora: LoraConfig, forest: Forest) -> Operations:
    """One packed forward."""
    weights = language.layers * (language.layer_weights + language.lora_weights(lora))
    unread = language.unread_weights + language.lora_weights(lora, UNREAD)
    a_pair = 4 * language.hidden
    return Operations(
        linear=2 * (forest.tokens * weights - forest.unread * unread),
        attention=a_pair * (language.layers * forest.pairs - forest.unread_pairs),
        masked=a_pair * language.layers * sum(s.computed_pairs - s.pairs for s in forest.masked_runs),
        lm_head=2 * forest.scored * language.vocabulary * language.hidden,
    )


def backward(language: Language, lora: LoraConfig, forest: Forest, *, checkpointing: bool) -> Operations:
    """The backward after `forward`, with what checkpointing computes again."""
    there = forward(language, lora, forest)
    adapter = 2 * forest.tokens * language.layers * language.lora_weights(lora)
    adapter -= 2 * forest.unread * language.lora_weights(lora, UNREAD)
    in_parts = forest.scored > scored_at_once(language.vocabulary)  # then the logits are made again
    back = Operations(
        linear=there.linear + adapter,
        attention=ATTENTION_BACKWARD * there.attention,
        masked=ATTENTION_BACKWARD * there.masked,
        lm_head=there.lm_head * (2 if in_parts else 1),
    )
    if checkpointing:
        return back + Operations(there.linear, there.attention, there.masked)
    return back + Operations(linear=-2 * forest.tokens * _first_weights(language, lora))


def _first_weights(language: Language, lora: LoraConfig) -> int:
    """Weights through which no gradient flows: the visual features and the embeddings are given.

    (transformers makes them take one all the same when it checkpoints.)
    """
    shapes = {name: language.projections[name] for name in ("q_proj", "k_proj", "v_proj")}
    ranks = dict.fromkeys(language.adapted(lora), lora.r)
    return sum(rows * (columns + ranks.get(name, 0)) for name, (rows, columns) in shapes.items())


def vision(tower: Vision, grid: tuple[int, int, int]) -> Operations:
    """One volume through the tower; `grid`: its visual tokens along slices, rows, columns."""
    frames, rows, columns = grid
    patches = tower.geometry.merge_size**2
    tokens = frames * rows * columns
    whole = (rows * columns * patches) ** 2
    windows = patches**2 * _squares(rows, tower.window) * _squares(columns, tower.window)
    pairs = frames * (tower.full_blocks * whole + (tower.depth - tower.full_blocks) * windows)
    return Operations(
        linear=2 * tokens * (patches * tower.patch_weights + tower.merger_weights),
        attention=4 * tower.hidden * pairs,
    )


def _squares(length: int, window: int) -> int:
    """Sum of the squared lengths of the windows a line is cut into."""
    return length // window * window**2 + (length % window) ** 2
