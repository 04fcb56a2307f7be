"""Items turned into training completions, in the declared answer format and nowhere else."""

from __future__ import annotations

from rewards.reading import format_answer
from rewards.types import Example, Reasoning
from rl.data.layout import DataError, Fault


def completion_text(example: Example, reasoning: Reasoning) -> str:
    """The completion a model is trained to give: `<think>…</think><answer>{…}</answer>`, or without reasoning.

    The box is written as the rewards read it (`Box3D.to_text`: file grid, inclusive ends), whatever
    convention the dataset's own text follows; `data.box_convention` was undone when the example was read.

    Raises:
        DataError: reasoning is required and the item has none, or none that the format can hold.
    """
    if reasoning == "required" and not example.reasoning:
        raise DataError(
            Fault.ITEM,
            f"item {example.example_id} has no reasoning text but model.reasoning=required; train on a file with "
            "reasoning or set model.reasoning=none",
        )
    thought = example.reasoning if reasoning == "required" else None
    try:
        return format_answer(example.question, example.truth.grades, example.truth.bbox, reasoning=thought)
    except ValueError as error:
        raise DataError(Fault.ITEM, f"item {example.example_id}: {error}") from error
