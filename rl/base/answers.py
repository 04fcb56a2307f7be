"""What the stand-in base is asked about phantoms: packed trees of questions and answers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from rewards.ontology import QUESTIONS
from rewards.reading import format_answer
from rl.base.corpus import knee_example, short_answer
from rl.base.knees import KneeArrays
from rl.config import PhantomConfig
from rl.packed import Node
from rollouts.positions import mrope_positions
from rollouts.prompts import PromptBuilder
from rollouts.types import VolumeFeatures


@dataclass(frozen=True)
class Quiz:
    """A volume's questions and answers as a packed tree."""

    root: Node
    asks: list[list[int]]
    """For each token of each completion, the question it answers; 0: the token is given."""


class AnswerTrees:
    """Trees of one volume, several questions and their answers."""

    def __init__(
        self,
        knees: Sequence[KneeArrays],
        embeds_K_V_H: torch.Tensor,
        tokenizer: Any,
        phantom: PhantomConfig,
        tokens_per_second: float,
        merge: int,
    ) -> None:
        self.knees, self.embeds_K_V_H, self.phantom = knees, embeds_K_V_H, phantom
        self.tokenizer, self.tokens_per_second, self.merge = tokenizer, tokens_per_second, merge
        self.builder = PromptBuilder(tokenizer, "required")

    def lookups(self, index: int, question_ids: Sequence[int]) -> Quiz:
        """Names of attributes and findings, each followed by its grade.

        Each stands right behind the volume, as a question of its own would.
        """
        grades = self.knees[index].knee.grades
        ids: list[int] = []
        asks: list[int] = []
        positions: list[int] = []
        for question_id in question_ids:
            question = QUESTIONS[question_id]
            for attribute in question.attributes:
                given = self._encode(f"\n{attribute.name}, {question.entity}")
                answer = self._encode(str(grades[question_id][attribute.name]))
                ids += given + answer
                asks += [0] * len(given) + [question_id] * len(answer)
                positions += range(len(given) + len(answer))
        root = self._volume(index, question_ids[0])
        root.children.append(Node(ids, torch.tensor(positions).expand(3, -1), scored=True))
        return Quiz(root, [asks])

    def answers(self, index: int, question_ids: Sequence[int]) -> Quiz:
        """Full prompts; every second one is answered in the declared format, the others in short."""
        root = self._volume(index, question_ids[0])
        asks = []
        for number, question_id in enumerate(question_ids):
            example = knee_example(self.knees[index], index, question_id, self.phantom)
            text = short_answer(example)
            if number % 2:
                truth = example.truth
                text = format_answer(example.question, truth.grades, truth.bbox, example.reasoning)
            prompt = self.builder.build(example, self._features(index))
            answer = Node([*self._encode(text), self.builder.im_end], scored=True)
            root.children.append(Node(prompt.question_ids, children=[answer]))
            asks.append([question_id] * len(answer.token_ids))
        return Quiz(root, asks)

    def _volume(self, index: int, question_id: int) -> Node:
        """The part of the prompt that all questions share."""
        features = self._features(index)
        example = knee_example(self.knees[index], index, question_id, self.phantom)
        ids = self.builder.build(example, features).volume_ids
        positions = mrope_positions(
            ids,
            features.grid_thw,
            features.second_per_grid_t,
            video_token_id=self.builder.video_pad,
            merge_size=self.merge,
            tokens_per_second=self.tokens_per_second,
        )
        return Node(ids, positions, features.embeds_V_H)

    def _features(self, index: int) -> VolumeFeatures:
        knee = self.knees[index]
        t, h, w = knee.shares_t_h_w_R.shape[:3]
        grid = (t, h * self.merge, w * self.merge)
        return VolumeFeatures(f"knee{index}", self.embeds_K_V_H[index], grid, knee.second_per_grid_t)

    def _encode(self, text: str) -> list[int]:
        ids: list[int] = self.tokenizer.encode(text, add_special_tokens=False, split_special_tokens=True)
        return ids
