"""Composition: weights, gates, penalties, groups, and what breaks the contract."""

import re
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from rewards import (
    Component,
    Example,
    Problem,
    RewardError,
    RewardSuite,
    example_from_dict,
    example_to_dict,
    format_answer,
    group_reward,
    reward,
)

pytestmark = pytest.mark.usefixtures("own_registry")
Make = Callable[..., Example]


@pytest.fixture
def default_suite() -> RewardSuite:
    return RewardSuite([Component("output_format", 0.2), Component("moaks_accuracy"), Component("box_iou")])


def gold(example: Example, reasoning: str | None = "thin") -> str:
    return format_answer(example.question, example.truth.grades, example.truth.bbox, reasoning=reasoning)


def constant(name: str, value: Any, kind: Any = "reward") -> None:
    def function(completion: str) -> Any:
        return value(completion) if callable(value) else value

    function.__name__ = name
    reward(kind=kind)(function)


def test_the_true_answer_earns_one(default_suite: RewardSuite, make_example: Make) -> None:
    example = make_example()
    row = default_suite.score(example, gold(example))
    assert row.total == 1.0
    assert row.components == {"output_format": 1.0, "moaks_accuracy": 1.0, "box_iou": 1.0}
    assert row.answer.ok
    assert row.closed_gates == {}


def test_the_total_is_the_weighted_mean(make_example: Make) -> None:
    constant("half", 0.5)
    suite = RewardSuite([Component("half", 3.0), Component("output_format", 1.0)])
    assert suite.score(make_example(), "x").total == pytest.approx(3 * 0.5 / 4)


def test_weights_are_renormalised_over_what_applies(default_suite: RewardSuite, make_example: Make) -> None:
    example = make_example(bbox=None)
    box = make_example().truth.bbox
    row = default_suite.score(
        example, format_answer(example.question, example.truth.grades, box, reasoning="thin")
    )
    assert row.components["box_iou"] is None
    assert row.total == 1.0
    assert default_suite.score(example, "x").components == {
        "output_format": 0.0,
        "moaks_accuracy": 0.0,
        "box_iou": None,
    }


def test_the_total_is_the_sum_of_scores_by_the_weights_of_the_row(make_example: Make) -> None:
    suite = RewardSuite(
        [Component("output_format", 0.2), Component("box_iou"), Component("rule_violations", -0.3)],
    )
    row = suite.score(make_example(bbox=None), "x")
    assert row.weights == {"output_format": 1.0, "rule_violations": -0.3}
    assert row.total == -0.3


def test_when_no_reward_applies_the_total_is_zero(make_example: Make) -> None:
    suite = RewardSuite([Component("box_iou")])
    assert suite.score(make_example(bbox=None), "x").total == 0.0


def test_a_penalty_subtracts_outside_the_mean(make_example: Make) -> None:
    constant("fine", 1.0)
    constant("bad", 0.5, kind="penalty")
    suite = RewardSuite([Component("fine", 2.0), Component("bad", -0.4)])
    assert suite.score(make_example(), "x").total == pytest.approx(1.0 - 0.2)


def test_a_closed_gate_scores_zero_says_why_and_keeps_its_weight(make_example: Make) -> None:
    example = make_example()
    suite = RewardSuite(
        [Component("output_format", 0.2), Component("moaks_accuracy", gate="output_format")],
        reader="tolerant",
    )
    row = suite.score(example, gold(example) + " Done.")
    assert row.answer.grades == example.truth.grades
    assert row.components == {"output_format": 0.0, "moaks_accuracy": 0.0}
    assert row.total == 0.0
    assert row.closed_gates == {"moaks_accuracy": "output_format scored 0"}
    strict = RewardSuite([Component("output_format", 0.2), Component("moaks_accuracy", gate="output_format")])
    closed = strict.score(example, gold(example) + " Done.").closed_gates
    assert Problem.TEXT_OUTSIDE.value in closed["moaks_accuracy"]


def test_gates_chain_in_any_order_and_one_that_does_not_apply_is_open(make_example: Make) -> None:
    constant("first", lambda text: float(text == "x"))
    constant("second", 1.0)
    constant("third", 1.0)
    suite = RewardSuite(
        [Component("third", gate="second"), Component("second", gate="first"), Component("first")]
    )
    assert suite.score(make_example(), "x").total == 1.0
    row = suite.score(make_example(), "y")
    assert row.total == 0.0
    assert set(row.closed_gates) == {"second", "third"}
    by_box = RewardSuite([Component("box_iou"), Component("second", gate="box_iou")])
    assert by_box.score(make_example(bbox=None), "y").components["second"] == 1.0


def test_a_component_that_does_not_apply_stays_none_behind_a_closed_gate(make_example: Make) -> None:
    suite = RewardSuite([Component("output_format"), Component("box_iou", gate="output_format")])
    row = suite.score(make_example(bbox=None), "x")
    assert row.components["box_iou"] is None
    assert row.closed_gates == {}


@pytest.mark.parametrize(
    ("components", "complaint"),
    [
        ([Component("box_iuo")], "did you mean 'box_iou'"),
        ([Component("box_iou"), Component("box_iou")], "listed twice"),
        ([Component("box_iou", -1.0)], "weight must be at least 0, got -1.0"),
        ([Component("box_iou", float("nan"))], "weight must be at least 0, got nan"),
        ([Component("box_iou"), Component("soft_overlong", 0.5)], r"weight must be at most 0 \(a penalty\)"),
        ([Component("soft_overlong", -0.5)], "at least one reward"),
        ([], "at least one reward"),
        ([Component("box_iou", gate="output_format")], "gated by 'output_format', which is not in the suite"),
        ([Component("box_iou", gate="box_iou")], "gates run in a circle"),
        (
            [Component("box_iou", gate="output_format"), Component("output_format", gate="box_iou")],
            "gates run in a circle",
        ),
        (
            [Component("box_iou"), Component("soft_overlong", -1.0, gate="box_iou")],
            "penalty 'soft_overlong' must not have a gate",
        ),
        ([Component("box_iou", params={"threshold": 0.5})], r"no parameter \['threshold'\]; it has \[\]"),
    ],
)
def test_a_suite_that_cannot_work_is_refused_when_built(components: list[Component], complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint):
        RewardSuite(components)


def test_a_required_parameter_must_be_given(make_example: Make) -> None:
    @reward
    def shorter(completion: str, *, limit: int) -> float:
        return float(len(completion) < limit)

    with pytest.raises(ValueError, match=r"needs a value for \['limit'\] under params"):
        RewardSuite([Component("shorter")])
    suite = RewardSuite([Component("shorter", params={"limit": 3})])
    assert [row.total for row in suite.score_group(make_example(), ["ab", "abc"])] == [1.0, 0.0]


@pytest.mark.parametrize("reader", ["lenient", ""])
def test_unknown_modes_are_refused(reader: Any) -> None:
    with pytest.raises(ValueError, match="reader must be"):
        RewardSuite([Component("box_iou")], reader=reader)
    with pytest.raises(ValueError, match="reasoning must be"):
        RewardSuite([Component("box_iou")], reasoning=reader)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -0.1, 1.5, "1", [1.0], 10**400])
def test_a_score_outside_zero_to_one_names_function_example_and_value(value: Any, make_example: Make) -> None:
    constant("broken", value)
    suite = RewardSuite([Component("broken")])
    with pytest.raises(RewardError, match=r"'broken' returned .* for example 9000001_00M_s_s_1_1"):
        suite.score(make_example(), "x")


@pytest.mark.parametrize("error", [ZeroDivisionError("by zero"), SystemExit(3)])
def test_a_reward_that_raises_is_named_with_example_and_completion(
    error: BaseException, make_example: Make
) -> None:
    @reward
    def broken(answer: Any) -> float:
        raise error

    suite = RewardSuite([Component("broken")])
    with pytest.raises(RewardError, match=r"'broken' raised .*; example 9000001_00M_s_s_1_1, completion 'x'"):
        suite.score(make_example(), "x")


def test_numpy_scores_are_numbers(make_example: Make) -> None:
    constant("single", np.float32(0.5))
    assert RewardSuite([Component("single")]).score(make_example(), "x").total == 0.5


def test_none_must_not_depend_on_the_completion(make_example: Make) -> None:
    """Else text that cannot be parsed would be left out of the mean instead of scoring 0."""
    constant("shy", lambda text: None if text == "bad" else 1.0)
    suite = RewardSuite([Component("shy")])
    with pytest.raises(RewardError, match="'shy' returned None for 1 of 2 completions of example 9000001"):
        suite.score_group(make_example(), ["good", "bad"])


def test_a_group_reward_sees_all_samples_at_once(make_example: Make) -> None:
    @group_reward
    def shortest(completions: list[str]) -> list[float]:
        return [float(len(text) == min(map(len, completions))) for text in completions]

    @group_reward
    def never(answers: list[Any]) -> None:
        return None

    @group_reward
    def too_few(answers: list[Any]) -> list[float]:
        return [1.0]

    suite = RewardSuite([Component("shortest"), Component("never")])
    rows = suite.score_group(make_example(), ["abc", "a", "ab"])
    assert [row.total for row in rows] == [0.0, 1.0, 0.0]
    assert all(row.components["never"] is None for row in rows)
    with pytest.raises(RewardError, match="must return a list of 2 scores, or None"):
        RewardSuite([Component("too_few")]).score_group(make_example(), ["a", "b"])


def test_a_group_reward_may_return_an_array(make_example: Make) -> None:
    @group_reward
    def rank(answers: list[Any]) -> np.ndarray:
        return np.linspace(0, 1, len(answers)) if len(answers) < 4 else np.array(0.5)

    suite = RewardSuite([Component("rank")])
    assert [row.total for row in suite.score_group(make_example(), ["x"] * 3)] == [0.0, 0.5, 1.0]
    with pytest.raises(RewardError, match="a list of 4 scores"):
        suite.score_group(make_example(), ["x"] * 4)


def test_a_batch_whose_examples_do_not_fit_is_refused(default_suite: RewardSuite, make_example: Make) -> None:
    one = make_example()
    with pytest.raises(ValueError, match="2 and 1"):
        default_suite.score_batch([one], ["x", "y"])
    with pytest.raises(ValueError, match="two different examples have the example_id"):
        default_suite.score_batch([one, make_example(bbox=None)], ["x", "y"])


def test_an_empty_group_has_no_rows(default_suite: RewardSuite, make_example: Make) -> None:
    assert default_suite.score_group(make_example(), []) == []


def test_the_format_reward_follows_the_declared_reasoning_in_both_readers(make_example: Make) -> None:
    example = make_example()
    for reader in ("strict", "tolerant"):
        for reasoning, thought in (("required", "thin"), ("none", None)):
            suite = RewardSuite([Component("output_format")], reader=reader, reasoning=reasoning)  # type: ignore[arg-type]
            other = None if thought else "thin"
            assert suite.score(example, gold(example, thought)).total == 1.0
            assert suite.score(example, gold(example, other)).total == 0.0


def test_a_config_of_mappings_or_objects_builds_the_same_suite(make_example: Make) -> None:
    entries = [
        {"name": "output_format", "weight": 0.2},
        {"name": "box_iou", "weight": 1, "gate": "output_format", "params": {}},
    ]
    mapping = {"reader": "tolerant", "components": entries}
    objects = SimpleNamespace(
        reader="tolerant",
        components=[SimpleNamespace(**{"gate": "", "params": {}, **entry}) for entry in entries],
    )
    example = make_example()
    for config in (mapping, objects):
        suite = RewardSuite.from_config(config, reasoning="none")
        assert (suite.names, suite.reader, suite.reasoning) == (
            ("output_format", "box_iou"),
            "tolerant",
            "none",
        )
        assert suite.score(example, gold(example, None)).total == 1.0
    with pytest.raises(ValueError, match="lacks 'components'"):
        RewardSuite.from_config({})
    with pytest.raises(ValueError, match=r"params, schedule, weight, not \['wieght'\]"):
        RewardSuite.from_config({"components": [{"name": "box_iou", "wieght": 2.0}]})


def test_the_readers_shape_flags_boxes_outside_the_volume(
    default_suite: RewardSuite, make_example: Make
) -> None:
    example = make_example()
    row = default_suite.score(example, gold(example).replace("[2, 5", "[2, 16"))
    assert row.answer.bbox_problem is Problem.BOX_OUTSIDE_VOLUME
    assert row.components["box_iou"] == pytest.approx(4 / 15)


def test_trl_gets_one_total_per_completion_whatever_the_order(
    default_suite: RewardSuite, make_example: Make
) -> None:
    a, b = make_example(1), make_example(16, example_id="other")
    texts = [gold(a), "x", gold(b), [{"role": "assistant", "content": gold(a)}]]
    examples = [a, b, example_to_dict(b), example_to_dict(a)]
    totals = default_suite.trl_reward(["p"] * 4, texts, example=examples, trainer_state=None)
    assert totals == [1.0, 0.0, 1.0, 1.0]
    with pytest.raises(ValueError, match="needs a column 'example'"):
        default_suite.trl_reward(["p"], ["x"], answer=["y"])


def test_an_example_survives_a_dataset_column(make_example: Make) -> None:
    for example in (make_example(60), make_example(1, bbox=None)):
        assert example_from_dict(example_to_dict(example)) == example
    record = example_to_dict(make_example(16))
    record["truth"]["grades"]["grade"] = None
    assert example_from_dict(record) == make_example(16)


@pytest.mark.parametrize(
    ("truth", "message"),
    [
        ({"grades": {"size": 1}, "bbox": None}, "question 16 has no attribute 'size'"),
        (
            {"grades": {"Size of lesion": 9}, "bbox": None},
            "grade of 'Size of lesion' must be in [0, 1, 2, 3]",
        ),
        ({"grades": {"Size of lesion": 1}, "bbox": [1, 2]}, "bbox must be six integers or null"),
        (None, "truth must be"),
    ],
)
def test_a_dataset_columns_truth_that_the_question_cannot_have_is_refused(
    make_example: Make, truth: object, message: str
) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        example_from_dict({**example_to_dict(make_example(16)), "truth": truth})


def test_a_schedule_may_change_a_parameter_between_batches(make_example: Make) -> None:
    suite = RewardSuite([Component("box_iou_threshold", params={"threshold": 0.3})])
    example = make_example()
    text = gold(example).replace("[2, 5, 10, 29, 20, 49]", "[2, 3, 10, 29, 20, 49]")
    assert suite.score(example, text).total == 1.0
    suite.set_parameter("box_iou_threshold", "threshold", 0.6)
    assert suite.score(example, text).total == 0.0
    with pytest.raises(ValueError, match=r"has no parameter \['bar'\]"):
        suite.set_parameter("box_iou_threshold", "bar", 1)
    with pytest.raises(ValueError, match="no reward 'box_iou'"):
        suite.set_parameter("box_iou", "threshold", 1)
