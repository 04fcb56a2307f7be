"""What the stand-in base is asked about phantoms: packed trees of questions and answers."""

from __future__ import annotations

from collections.abc import Sequence
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


class AnswerTrees:
    """Trees of one volume, several questions and their answers."""

    def __init__(
        self,
        knees: Sequence[KneeArrays],
        tokenizer: Any,
        phantom: PhantomConfig,
        tokens_per_second: float,
        merge: int,
    ) -> None:
        self.knees, self.phantom = knees, phantom
        self.tokenizer, self.tokens_per_second, self.merge = tokenizer, tokens_per_second, merge
        self.builder = PromptBuilder(tokenizer, "required")

    def lookups(self, index: int, embeds_V_H: torch.Tensor, question_ids: Sequence[int]) -> Node:
        """Names of findings, each answered by its grades and nothing else."""
        grades = self.knees[index].knee.grades
        root = self._volume(index, embeds_V_H, question_ids[0])
        for question_id in question_ids:
            question = QUESTIONS[question_id]
            text = ", ".join(str(grades[question_id][a.name]) for a in question.attributes)
            answer = Node(self._encode(text), scored=True)
            root.children.append(Node(self._encode(f'"{question.entity}": '), children=[answer]))
        return root

    def answers(self, index: int, embeds_V_H: torch.Tensor, question_ids: Sequence[int]) -> Node:
        """Full prompts; every second one is answered in the declared format, the others in short."""
        root = self._volume(index, embeds_V_H, question_ids[0])
        for number, question_id in enumerate(question_ids):
            example = knee_example(self.knees[index], index, question_id, self.phantom)
            text = short_answer(example)
            if number % 2:
                truth = example.truth
                text = format_answer(example.question, truth.grades, truth.bbox, example.reasoning)
            prompt = self.builder.build(example, self._features(index, embeds_V_H))
            answer = Node([*self._encode(text), self.builder.im_end], scored=True)
            root.children.append(Node(prompt.question_ids, children=[answer]))
        return root

    def _volume(self, index: int, embeds_V_H: torch.Tensor, question_id: int) -> Node:
        """The part of the prompt that all questions share."""
        features = self._features(index, embeds_V_H)
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
        return Node(ids, positions, embeds_V_H)

    def _features(self, index: int, embeds_V_H: torch.Tensor) -> VolumeFeatures:
        knee = self.knees[index]
        t, h, w = knee.shares_t_h_w_R.shape[:3]
        grid = (t, h * self.merge, w * self.merge)
        return VolumeFeatures(f"knee{index}", embeds_V_H, grid, knee.second_per_grid_t)

    def _encode(self, text: str) -> list[int]:
        ids: list[int] = self.tokenizer.encode(text, add_special_tokens=False, split_special_tokens=True)
        return ids
