"""Tests of the quizzes that teach the stand-in base."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from rewards.ontology import QUESTIONS
from rl.base.answers import FULL, AnswerTrees, Quiz, Said
from rl.base.corpus import knee_example, tokenizer_corpus
from rl.base.knees import make_knees
from rl.base.language import LanguageTrainer
from rl.base.model import build_model, build_tokenizer
from rl.base.vision import embed_knees
from rl.config import PhantomConfig, VolumeViewConfig
from rl.packed import pack
from rollouts.volumes import PatchSizes

_ASKED = [1, 20, 31, 44, 50, 60, 16, 62, 42]


@pytest.fixture(scope="module")
def trainer() -> LanguageTrainer:
    sizes, phantom = PatchSizes(8, 2, 2), PhantomConfig()
    knees = list(make_knees(1, 0, phantom, VolumeViewConfig(), sizes))
    tokenizer = build_tokenizer(tokenizer_corpus([knee_example(knees[0], 0, 1, phantom)]))
    model = build_model(tokenizer, seed=0)
    data = AnswerTrees(
        knees, embed_knees(model.model.visual, knees, sizes), tokenizer, phantom, 2.0, sizes.merge
    )
    return LanguageTrainer(model, data, _ASKED, learning_rate=1e-3, seed=0)


def _completions(quiz: Quiz) -> Iterator[tuple[list[int], list[Said], int]]:
    """Tokens of the text after the volume, what the completion's are for, and where the completion starts."""
    nodes = [((), quiz.root.children[0]), *((q.token_ids, q.children[0]) for q in quiz.root.children[1:])]
    for (prompt, completion), said, length in zip(nodes, quiz.said, quiz.prompt_lengths, strict=True):
        assert length == len(prompt)
        assert len(said) == len(completion.token_ids)
        yield [*prompt, *completion.token_ids], said, length


@pytest.mark.slow
def test_every_answered_token_knows_where_its_finding_is_named(trainer: LanguageTrainer) -> None:
    quiz = trainer.data.exams(0, _ASKED)
    answered = set()
    for text, said, start in _completions(quiz):
        for place, token in enumerate(said):
            if token.question_id:
                answered.add(token.question_id)
                assert token.name.stop <= place
                name = text[start + token.name.start : start + token.name.stop]
                assert trainer.data.tokenizer.decode(name) == QUESTIONS[token.question_id].entity
    assert answered == set(_ASKED)
    assert len(quiz.said) == 1 + FULL


@pytest.mark.slow
def test_a_token_tells_a_grade_in_lookups_in_reasoning_and_in_the_digits_of_short_answers(
    trainer: LanguageTrainer,
) -> None:
    tokenizer = trainer.data.tokenizer
    lookups, short, declared = [
        tokenizer.decode([t for t, token in zip(text[start:], said, strict=True) if token.tells])
        for text, said, start in _completions(trainer.data.exams(0, [1, 20, 31, 44, 50, 60, 16]))
    ][:3]
    grades = trainer.data.knees[0].knee.grades
    assert lookups == "".join(map(str, grades[16].values()))
    assert short == "".join(map(str, grades[1].values()))
    assert declared.startswith("The cartilage of the femur ")


def test_recall_is_free_when_all_attention_is_on_the_name_and_costs_its_share_when_it_is_even(
    trainer: LanguageTrainer,
) -> None:
    quiz = trainer.data.lookups(0, [31])  # one attribute, its name is two tokens
    quizzes, knees = [quiz], trainer.data.knees
    losses = trainer._losses(knees, quizzes)
    layer = trainer.look_layer - 1
    query, key = (torch.zeros_like(x) for x in trainer._seen[layer])
    trainer._seen[layer] = query, key
    batch = pack([quiz.root], trainer.data.builder.video_pad)
    told = next(t for t, token in enumerate(quiz.said[0]) if token.tells)
    name = quiz.said[0][told].name
    seen = len(batch.visual_V) + told
    even = trainer._recall_loss(batch, quizzes)
    assert losses["recall"] > 0
    assert even.item() == pytest.approx(-torch.tensor(len(name) / seen).log().item(), rel=1e-5)
    own = int(batch.predictors_N_T[0, 1])
    query[:, batch.predictors_N_T[0, told]] = 100.0
    key[:, own + name.start : own + name.stop] = 100.0
    assert trainer._recall_loss(batch, quizzes).item() == pytest.approx(0, abs=1e-5)
