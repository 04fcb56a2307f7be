"""The suite in the forms other trainers call it in."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence

import pytest

from rewards import Answer, Component, Example, RewardSuite, example_to_dict, format_answer, group_reward
from rewards.adapters import easyr1_compute_score, openrlhf_reward_func, verl_compute_score

Make = Callable[..., Example]


@pytest.fixture
def suite() -> RewardSuite:
    return RewardSuite([Component("output_format", 0.2), Component("moaks_accuracy"), Component("box_iou")])


@pytest.fixture
def examples(make_example: Make) -> list[Example]:
    return [make_example(1, example_id="a"), make_example(44, bbox=None, example_id="b")]


def gold(example: Example) -> str:
    return format_answer(example.question, example.truth.grades, example.truth.bbox, reasoning="thin")


def test_verl_gets_a_score_and_the_same_keys_every_time(suite: RewardSuite, examples: list[Example]) -> None:
    compute_score = verl_compute_score(suite)
    record = json.dumps(example_to_dict(examples[0]))
    scored = compute_score(
        data_source="knee", solution_str=gold(examples[0]), ground_truth=record, extra_info={}
    )
    assert scored == {"score": 1.0, "output_format": 1.0, "moaks_accuracy": 1.0, "box_iou": 1.0}
    without_box = compute_score("knee", "x", example_to_dict(examples[1]))
    assert math.isnan(without_box.pop("box_iou"))
    assert without_box == {"score": 0.0, "output_format": 0.0, "moaks_accuracy": 0.0}


@pytest.mark.usefixtures("own_registry")
def test_trainers_that_score_one_completion_at_a_time_refuse_a_group_reward() -> None:
    @group_reward
    def rank(answers: Sequence[Answer]) -> list[float]:
        return [0.0] * len(answers)

    for adapt in (verl_compute_score, openrlhf_reward_func):
        with pytest.raises(ValueError, match="one completion at a time; group rewards: rank"):
            adapt(RewardSuite([Component("rank")]))


def test_openrlhf_gets_tensors_of_completions_without_their_prompts(
    suite: RewardSuite, examples: list[Example]
) -> None:
    reward_func = openrlhf_reward_func(suite)
    labels = [json.dumps(example_to_dict(example)) for example in examples]
    prompts = ["first? ", "second? "]
    result = reward_func([prompts[0] + gold(examples[0]), prompts[1] + "x"], prompts, labels)
    assert result["rewards"].tolist() == result["scores"].tolist() == [1.0, 0.0]
    assert result["extra_logs"]["box_iou"][0] == 1.0
    assert result["extra_logs"]["box_iou"][1].isnan()
    # its queries keep the special tokens, and what is cut off has none
    ended = reward_func([prompts[0] + gold(examples[0]) + "<|im_end|>"], prompts[:1], labels[:1])
    assert ended["rewards"].tolist() == [1.0]
    ended = openrlhf_reward_func(suite, "</s>")(
        [prompts[0] + gold(examples[0]) + "</s>"], prompts[:1], labels[:1]
    )
    assert ended["rewards"].tolist() == [1.0]
    with pytest.raises(ValueError, match="does not begin with its prompt"):
        reward_func(["x"], ["y"], labels[:1])


def test_easyr1_gets_a_batch_in_its_order(suite: RewardSuite, examples: list[Example]) -> None:
    compute_score = easyr1_compute_score(suite)
    inputs = [
        {"response": response, "response_length": 1, "ground_truth": json.dumps(example_to_dict(example))}
        for example, response in ((examples[1], "x"), (examples[0], gold(examples[0])), (examples[1], "y"))
    ]
    assert [row["overall"] for row in compute_score(inputs)] == [0.0, 1.0, 0.0]


def test_a_column_that_holds_no_example_is_shown(suite: RewardSuite, examples: list[Example]) -> None:
    record = example_to_dict(examples[0])
    for column in (examples[0], record, json.dumps(record)):
        assert suite.trl_reward(["?"], [gold(examples[0])], example=[column]) == [1.0]
    for bad in (5, "knee", "{}", {**record, "question_id": 70}, {**record, "truth": None}):
        with pytest.raises(ValueError, match=r"in the form of rewards\.example_to_dict"):
            suite.trl_reward(["?"], ["x"], example=[bad])
