"""The files that `reasonknee rewards new` writes."""

from __future__ import annotations

import keyword
import sys
from importlib.machinery import PathFinder
from pathlib import Path

import rewards
from rl.config import ConfigError

_REWARD = '''"""A reward of my own: how near is the middle of the answered box to that of the true one?"""

from __future__ import annotations

from rewards import Answer, Example, Truth, center_distance_mm, reward


@reward
def {name}(answer: Answer, truth: Truth, example: Example, *, reach_mm: float = 20.0) -> float | None:
    """Falls linearly from 1 at the true middle to 0 at `reach_mm` from it.

    What the function needs it names as an argument: answer, truth, question, completion, example. What a recipe may
    set comes after the bare `*`.
    """
    if truth.bbox is None:
        return None  # does not apply: may depend on question and truth only
    if answer.bbox is None:
        return 0.0  # a bad answer is 0, never None, or answering badly would pay
    return max(0.0, 1 - center_distance_mm(answer.bbox, truth.bbox, example.volume.spacing_mm) / reach_mm)
'''

_TEST = '''"""Tests of {name}. The fixtures and assertions come with reasonknee-rl."""

from __future__ import annotations

import pytest
from {name} import {name}

from rewards import Answer, Box3D, Component, Example, RewardSuite, Truth
from rewards.testing import (
    assert_bounded,
    assert_deterministic,
    assert_gold_scores_full,
    assert_monotone,
    assert_never_raises,
    assert_not_exploitable,
)


def test_the_reward_falls_with_the_distance_of_the_middles(knee_example: Example) -> None:
    truth = Truth(grades={{}}, bbox=Box3D(4, 8, 10, 20, 10, 20))  # half-open: slices 4-7, x and y 10-19
    step_mm = knee_example.volume.spacing_mm[1]
    moved = Answer(bbox=Box3D(4, 8, 13, 23, 10, 20))
    assert {name}(Answer(bbox=truth.bbox), truth, knee_example) == 1
    assert {name}(moved, truth, knee_example) == pytest.approx(1 - 3 * step_mm / 20)
    assert {name}(moved, truth, knee_example, reach_mm=1) == 0


def test_a_box_that_was_not_read_scores_0_and_a_missing_truth_does_not_count(knee_example: Example) -> None:
    assert {name}(Answer(), Truth(grades={{}}, bbox=Box3D(0, 1, 0, 1, 0, 1)), knee_example) == 0
    assert {name}(Answer(), Truth(grades={{}}, bbox=None), knee_example) is None


def test_the_contract_is_kept() -> None:
    assert_gold_scores_full({name})
    assert_bounded({name})
    assert_never_raises({name})
    assert_deterministic({name})
    assert_monotone({name}, "iou")


def test_no_exploit_pays_beside_the_other_rewards() -> None:
    suite = RewardSuite(
        [Component("output_format", 0.2), Component("moaks_accuracy"), Component("box_iou"), Component("{name}", 0.5)]
    )
    assert_not_exploitable(suite)
'''


def write_reward(file: Path) -> tuple[Path, Path]:
    """Write a reward and its test. Returns both paths.

    Raises:
        ConfigError: a name that cannot be imported or is taken, or a file that is there.
    """
    name, test = file.stem, file.with_name(f"test_{file.name}")
    for path in (file, test):
        if path.exists():
            raise ConfigError(f"{path} is there already; nothing was written")
    if file.suffix != ".py" or not name.isidentifier() or keyword.iskeyword(name):
        raise ConfigError(f"{file}: the file is named like the reward, a Python name, as in my_reward.py")
    if name in rewards.__all__ or name in sys.stdlib_module_names or PathFinder.find_spec(name) is not None:
        raise ConfigError(
            f"{file}: {name!r} is taken by the rewards package or by a module that can be imported, which the file "
            "would hide; choose another name, as in my_reward.py"
        )
    if name.startswith("test_") or name == "conftest":
        raise ConfigError(
            f"{file}: pytest would take this for a test; choose another name, as in my_reward.py"
        )
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(_REWARD.format(name=name), encoding="utf-8")
    test.write_text(_TEST.format(name=name), encoding="utf-8")
    return file, test
