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

FULL = 6
"""How many questions of an exam are asked as full prompts."""


@dataclass(frozen=True)
class Quiz:
    """A volume's questions and answers as a packed tree."""

    root: Node
    asks: list[list[int]]
    """For each token of each completion, the question it answers; 0: the token is given."""
    tells: list[list[bool]]
    """Whether the token says how a finding is graded."""


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
        root = self._volume(index)
        root.children.append(Node(ids, torch.tensor(positions).expand(3, -1), scored=True))
        return Quiz(root, [asks], [[question_id > 0 for question_id in asks]])

    def exams(self, index: int, question_ids: Sequence[int]) -> Quiz:
        """Some questions in full, every second one answered in the declared format, the others in short; lookups.

        Without the lookups what was learned from them would be forgotten before the full prompts make use of it.
        """
        quiz = self.lookups(index, question_ids[FULL:])
        for number, question_id in enumerate(question_ids[:FULL]):
            example = knee_example(self.knees[index], index, question_id, self.phantom)
            truth = example.truth
            if number % 2:
                text = format_answer(example.question, truth.grades, truth.bbox, example.reasoning)
                telling = range(text.index("<think>") + len("<think>"), text.index("</think>"))
            else:
                text = short_answer(example)
                telling = range(text.index(". Box"))
            encoded = self.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
            answer = Node([*encoded["input_ids"], self.builder.im_end], scored=True)
            prompt = self.builder.build(example, self._features(index))
            quiz.root.children.append(Node(prompt.question_ids, children=[answer]))
            quiz.asks.append([question_id] * len(answer.token_ids))
            quiz.tells.append([*(start in telling for start, _ in encoded["offset_mapping"]), False])
        return quiz

    def _volume(self, index: int) -> Node:
        """The part of the prompt that all questions share."""
        features = self._features(index)
        example = knee_example(self.knees[index], index, min(QUESTIONS), self.phantom)
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
