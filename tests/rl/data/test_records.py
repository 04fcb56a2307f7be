"""Training completions: what the strict reader reads back is the truth."""

from dataclasses import replace

import pytest

from rewards.reading import read_answer
from rl.data.boxes import Convention
from rl.data.examples import load_examples
from rl.data.layout import DataError
from rl.data.records import completion_text


@pytest.mark.parametrize("reasoning", ["required", "none"])
def test_the_strict_reader_reads_the_truth_back(dataset, reasoning):
    for example in load_examples(dataset.config(), "train"):
        answer = read_answer(completion_text(example, reasoning), example.question, reasoning=reasoning)
        assert answer.ok
        assert answer.strict
        assert answer.grades == example.truth.grades
        assert answer.bbox == example.truth.bbox
        assert answer.reasoning == (example.reasoning if reasoning == "required" else "")


def test_the_completion_writes_file_grid_boxes_whatever_the_datasets_convention(write_dataset, tmp_path):
    """The rewards read boxes in one convention only; a flipped dataset must not teach another."""
    data = write_dataset(tmp_path / "data", Convention((2, 0, 1), (True, True, True), False)).write()
    config = data.config()
    config.data.box_convention.flip, config.data.box_convention.end = "slice,x,y", "exclusive"
    example = load_examples(config, "train")[0]
    answer = read_answer(completion_text(example, "none"), example.question, reasoning="none")
    assert answer.bbox == data.boxes(0)[1]


def test_required_reasoning_that_an_item_lacks_is_refused_by_name(dataset):
    example = replace(load_examples(dataset.config(), "train")[0], reasoning="")
    with pytest.raises(
        DataError, match=r"item 9000001_00M_20040915_10240_1_1 has no reasoning text.*reasoning=none"
    ):
        completion_text(example, "required")
    assert completion_text(example, "none").startswith("<answer>")


def test_reasoning_that_the_format_cannot_hold_is_refused_by_name(dataset):
    example = replace(load_examples(dataset.config(), "train")[0], reasoning="see <answer>")
    with pytest.raises(DataError, match=r"item 9000001_00M_20040915_10240_1_1: reasoning must"):
        completion_text(example, "required")
