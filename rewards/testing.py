"""Assertions for the unit tests of a reward, as used by the shipped rewards' own tests.

Each takes what is under test as a reward function, its name (`box_iou`, `my_reward.py:box_found`) or a whole
`RewardSuite`, and keyword parameters of the function; it says what broke, on which completion.

    from rewards.testing import assert_gold_scores_full, assert_not_exploitable

    def test_my_reward():
        assert_gold_scores_full(my_reward, threshold=0.5)
        assert_not_exploitable(my_reward, threshold=0.5)

Questions and knees are those of the red team (`rewards.redteam.cases`): no files are needed. The fixtures are in
`rewards.pytest_plugin`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise
from statistics import fmean
from typing import Any, Literal

import numpy as np

from rewards.redteam import EXPLOITS, Case, cases, honest_answer, red_team
from rewards.registry import find_reward, spec_of
from rewards.suite import Component, RewardError, RewardSuite

UnderTest = Callable[..., Any] | str | RewardSuite
_LEVELS = (0.0, 0.25, 0.5, 0.75, 1.0)
_PER_LEVEL = 3
_DAMAGED = 200


def assert_gold_scores_full(reward: UnderTest, **params: Any) -> None:
    """The true answer to each of the 62 questions scores 1 (a penalty: 0)."""
    suite, full = _suite(reward, params)
    for case in cases("balanced", suite.reasoning, knees=1):
        gold = _gold(case)
        total = suite.score(case.example, gold).total
        assert abs(total - full) < 1e-9, (
            f"the true answer scores {total:g}, not {full:g}: {_shown(case, gold)}"
        )


def assert_deterministic(reward: UnderTest, **params: Any) -> None:
    """The same completions score the same again, and in another order."""
    suite, _ = _suite(reward, params)
    scored = [(case, text, _total(suite, case, text)) for case, text in _completions(suite)]
    for case, text, total in reversed(scored):
        again = _total(suite, case, text)
        assert again == total or again != again, f"scores {total:g} and then {again:g}: {_shown(case, text)}"


def assert_bounded(reward: UnderTest, **params: Any) -> None:
    """Whatever the completion, a score is a number in [0, 1], or None for all completions of a question."""
    suite, _ = _suite(reward, params)
    for error in _errors(suite):
        assert error.__cause__ is not None, str(error)  # else it broke the contract


def assert_never_raises(reward: UnderTest, **params: Any) -> None:
    """No completion makes it raise: every exploit, honest answers, and damaged ones."""
    suite, _ = _suite(reward, params)
    for error in _errors(suite):
        assert error.__cause__ is None, str(error)  # the exception of the function


def assert_monotone(reward: UnderTest, quality: Literal["accuracy", "iou"], **params: Any) -> None:
    """On the average over questions, better answers never score less, and the best more than the worst.

    Args:
        quality: what gets better, with the other held at its best: the share of right grades, or the box's IoU.
    """
    suite, _ = _suite(reward, params)
    rng = np.random.default_rng(0)
    balanced = cases("balanced", suite.reasoning, knees=4)
    means = []
    for level in _LEVELS:
        accuracy, overlap = (level, 1.0) if quality == "accuracy" else (1.0, level)
        texts = [honest_answer(case, accuracy, overlap, rng) for case in balanced]
        means.append(
            fmean(suite.score(case.example, text).total for case, text in zip(balanced, texts, strict=True))
        )
    shown = ", ".join(f"{level:g}: {mean:.3f}" for level, mean in zip(_LEVELS, means, strict=True))
    rising = all(a <= b + 1e-9 for a, b in pairwise(means))
    assert rising, f"a higher {quality} scores less: {shown}"
    assert means[-1] > means[0], f"{quality} makes no difference: {shown}"


def assert_not_exploitable(reward: UnderTest, **params: Any) -> None:
    """No exploit of the red team earns more than honest answers of accuracy .60 and IoU .30."""
    suite, _ = _suite(reward, params)
    problems = red_team(suite).problems
    assert not problems, f"{len(problems)} problems:\n" + "\n".join(problems[:10])


def perturbed_answers(case: Case, seed: int = 0) -> list[tuple[float, float, str]]:
    """Honest answers of falling quality: (accuracy, IoU, completion), the true answer first."""
    rng = np.random.default_rng(seed)
    levels = [(level, level) for level in reversed(_LEVELS)]
    return [(accuracy, iou, honest_answer(case, accuracy, iou, rng)) for accuracy, iou in levels]


def _suite(reward: UnderTest, params: dict[str, Any]) -> tuple[RewardSuite, float]:
    """A suite of what is under test, and what a perfect answer earns."""
    if isinstance(reward, RewardSuite):
        if params:
            raise TypeError(f"parameters {sorted(params)} are for a function; a suite has its own")
        return reward, 1.0
    spec = find_reward(reward) if isinstance(reward, str) else spec_of(reward)
    name = reward if isinstance(reward, str) else spec.name
    if spec.kind == "penalty":
        return RewardSuite([Component("output_format", 0.0), Component(name, -1.0, params=params)]), 0.0
    return RewardSuite([Component(name, params=params)]), 1.0


def _completions(suite: RewardSuite) -> Iterator[tuple[Case, str]]:
    """A few questions of every kind, each answered honestly, by every exploit, and by damaged answers."""
    rng = np.random.default_rng(0)
    some = cases("balanced", suite.reasoning, knees=1)
    for number, exploit in enumerate(EXPLOITS):
        case = some[number % len(some)]
        yield case, exploit.attack(case)
    for level in _LEVELS:
        for case in some[:: len(some) // _PER_LEVEL]:
            yield case, honest_answer(case, level, level, rng)
    for number in range(_DAMAGED):
        yield some[number % len(some)], _damaged(some[number % len(some)], rng)


def _gold(case: Case) -> str:
    """The true answer."""
    return honest_answer(case, 1.0, 1.0, np.random.default_rng(0))


def _errors(suite: RewardSuite) -> Iterator[RewardError]:
    """What goes wrong when each completion is scored in a group with the true answer."""
    for case, text in _completions(suite):
        try:
            suite.score_group(case.example, [text, _gold(case)])
        except RewardError as error:
            yield error


def _damaged(case: Case, rng: np.random.Generator) -> str:
    """A true answer with a few characters overwritten, which looks into more corners than noise does."""
    text = list(_gold(case))
    alphabet: Sequence[str] = '<>/{}[]",:0123456789 \\\n-.eEtrufalsn\u0660\U0001f9b4'
    for place in rng.integers(0, len(text), int(rng.integers(1, 12))):
        text[place] = alphabet[int(rng.integers(len(alphabet)))]
    return "".join(text)


def _total(suite: RewardSuite, case: Case, text: str) -> float:
    try:
        return suite.score(case.example, text).total
    except RewardError as error:
        raise AssertionError(str(error)) from error


def _shown(case: Case, text: str) -> str:
    return f"question {case.example.question.question_id}, {text[:300]!r}"
