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
from rl.data.phantom.reasoning import reasoning_sentence
from rl.packed import Node
from rollouts.positions import mrope_positions
from rollouts.prompts import PromptBuilder
from rollouts.types import VolumeFeatures

FULL = 6
"""How many questions of an exam are asked as full prompts."""


@dataclass(frozen=True)
class Said:
    """What a token of a completion is for."""

    question_id: int
    """The question it answers; 0: the token is given."""
    tells: bool = False
    """It says how a finding is graded."""
    name: range = range(0)
    """Where the finding was named: tokens from the completion's first, negative ones lie in the prompt."""


@dataclass(frozen=True)
class Quiz:
    """A volume's questions and answers as a packed tree."""

    root: Node
    said: list[list[Said]]
    """For each completion, each of its tokens."""
    prompt_lengths: list[int]
    """For each completion, how many tokens of a question stand between the volume and it."""


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
        """Findings by name, each graded: every second one in words, the others attribute by attribute in digits."""
        ids: list[int] = []
        said: list[Said] = []

        def ask(question_id: int, before: str, after: str, answer: str) -> None:
            lead, name = self._encode(before), self._encode(QUESTIONS[question_id].entity)
            start = len(ids) + len(lead)
            given, told = lead + name + self._encode(after), self._encode(answer)
            ids.extend(given + told)
            asked = Said(question_id, True, range(start, start + len(name)))
            said.extend([Said(0)] * len(given) + [asked] * len(told))

        for number, question_id in enumerate(question_ids):
            question, grades = QUESTIONS[question_id], self.knees[index].knee.grades[question_id]
            if number % 2:
                ask(question_id, "\n", ": ", reasoning_sentence(question, grades))
                continue
            for attribute in question.attributes:
                ask(question_id, f"\n{attribute.name}, ", "", str(grades[attribute.name]))
        root = self._volume(index)
        root.children.append(Node(ids, scored=True))
        return Quiz(root, [said], [0])

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
                telling = set(range(text.index("<think>") + len("<think>"), text.index("</think>")))
            else:
                text = short_answer(example)
                telling = {i for i in range(text.index(". Box")) if text[i].isdigit()}
            encoded = self.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
            answer = Node([*encoded["input_ids"], self.builder.im_end], scored=True)
            prompt = self.builder.build(example, self._features(index)).question_ids
            name = self._name(prompt, example.question.entity)
            quiz.root.children.append(Node(prompt, children=[answer]))
            quiz.said.append(
                [
                    *(Said(question_id, start in telling, name) for start, _ in encoded["offset_mapping"]),
                    Said(question_id, False, name),
                ]
            )
            quiz.prompt_lengths.append(len(prompt))
        return quiz

    def _name(self, prompt: Sequence[int], entity: str) -> range:
        """Where the answer template of a prompt names the finding, counted from the prompt's end."""
        name = self._encode(entity)
        starts = range(len(prompt) - len(name), -1, -1)
        start = next(i for i in starts if list(prompt[i : i + len(name)]) == name) - len(prompt)
        return range(start, start + len(name))

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
