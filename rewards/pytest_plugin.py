"""pytest fixtures for the tests of a reward, there wherever reasonknee-rl is installed.

| fixture | is |
|---|---|
| `knee_question` | one question of each kind, one after the other: the test runs ten times |
| `knee_example` | that question about a knee, with its truth |
| `gold_answer` | the true answer, as read (`rewards.Answer`) |
| `perturbed_answers` | the same with falling quality: a list of (accuracy, IoU, completion) |
| `reward_case` | the example with the declared format around it (`rewards.redteam.Case`) |
"""

from __future__ import annotations

from typing import Any

import pytest

KINDS = (1, 16, 31, 42, 43, 44, 48, 54, 60, 62)
"""A question of each kind of answer."""


@pytest.fixture(params=KINDS, ids=lambda question_id: f"question-{question_id}")
def reward_case(request: pytest.FixtureRequest) -> Any:
    """A question about a knee, with its truth and the declared format."""
    from rewards.redteam import cases  # numpy is imported by tests that ask for it, not by every pytest run

    return next(c for c in cases("balanced", knees=1) if c.example.question.question_id == request.param)


@pytest.fixture
def knee_example(reward_case: Any) -> Any:
    """The question about a knee, with its truth (`rewards.Example`)."""
    return reward_case.example


@pytest.fixture
def knee_question(knee_example: Any) -> Any:
    """The question (`rewards.Question`)."""
    return knee_example.question


@pytest.fixture
def gold_answer(reward_case: Any) -> Any:
    """The true answer, read from the declared format (`rewards.Answer`)."""
    from rewards import read_answer
    from rewards.testing import perturbed_answers as perturb

    example = reward_case.example
    return read_answer(perturb(reward_case)[0][2], example.question, shape=example.volume.shape)


@pytest.fixture
def perturbed_answers(reward_case: Any) -> list[tuple[float, float, str]]:
    """Honest answers of falling quality, the true one first: (accuracy, IoU, completion)."""
    from rewards.testing import perturbed_answers as perturb

    return perturb(reward_case)
