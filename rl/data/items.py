"""The released item files: streamed JSON items, and what each one says.

Both the reader (`rl.data.rows`, stops at the first fault) and the checker (`rl.data.check`, goes on) use these
functions, so that what is checked is what is read.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import ijson

from rewards.boxes import Box3D
from rewards.matching import match_question
from rewards.ontology import Question
from rewards.reading import read_truth
from rewards.types import Truth
from rl.data.boxes import Convention, box_from_text
from rl.data.layout import DataError, Fault, SplitRow, relative_path
from rl.data.nifti import Header

ITEM_KEYS = ("image", "prompt", "answer", "final_diagnosis")

_DIAGNOSIS_START = re.compile(r"final\s+diagnosis\s*:|<answer>|```|\{", re.IGNORECASE)
_THINK_TAGS = re.compile(r"</?think>", re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class Item:
    """One entry of `generate_data/<file>`, as written."""

    file: Path
    index: int
    """Position in the list, from 0."""
    image: str
    prompt: str
    answer: str
    final_diagnosis: str
    """JSON text; an object in the file is written out again."""

    @property
    def place(self) -> str:
        """`file item n`, for messages."""
        return f"{self.file} item {self.index}"


def read_items(file: Path) -> Iterator[Item | DataError]:
    """Stream the items of a file; an item that is not of the released form comes as its error.

    Raises:
        DataError: missing file, or JSON that is damaged or not a list: nothing after it can be read.
    """
    if not file.is_file():
        raise DataError(Fault.MISSING_FILE, f"{file} is missing; is the file name in the data config right?")
    index = -1
    try:
        with file.open("rb") as stream:
            for index, value in enumerate(ijson.items(stream, "item", use_float=True)):
                yield _item(file, index, value)
    except ijson.JSONError as error:
        raise DataError(
            Fault.ITEM,
            f"{file}: damaged JSON after {index + 1} items ({error}); copy or generate the file again",
        ) from error
    if index < 0:
        raise DataError(
            Fault.ITEM, f"{file} holds no items; expected a JSON list of objects with {', '.join(ITEM_KEYS)}"
        )


def _item(file: Path, index: int, value: Any) -> Item | DataError:
    if not isinstance(value, dict):
        return DataError(Fault.ITEM, f"{file} item {index} is a {type(value).__name__}, not an object")
    fields = dict(value)
    if isinstance(fields.get("final_diagnosis"), dict):
        fields["final_diagnosis"] = json.dumps(fields["final_diagnosis"])
    for key in ITEM_KEYS:
        if not isinstance(fields.get(key), str):
            problem = f"is a {type(fields[key]).__name__}, not text" if key in fields else "is missing"
            return DataError(
                Fault.ITEM, f"{file} item {index}: {key!r} {problem}; an item has {', '.join(ITEM_KEYS)}"
            )
    return Item(file, index, *(fields[key] for key in ITEM_KEYS))


@lru_cache(maxsize=4096)
def recognise(prompt: str) -> Question:
    """`match_question`, cached: a file of half a million items holds a few dozen different prompts."""
    return match_question(prompt)


def find_row(item: Item, rows_by_image: Mapping[str, SplitRow], split: str) -> SplitRow:
    """The split row an item belongs to, by image path.

    Raises:
        DataError: the image is not in that split's CSV.
    """
    row = rows_by_image.get(relative_path(item.image, item.place))
    if row is None:
        raise DataError(
            Fault.UNKNOWN_IMAGE,
            f"{item.place}: image {item.image!r} is not in the {split} split; add its row to {split}_split.csv or "
            f"use the file with the split it was made for",
        )
    return row


def find_question(item: Item) -> Question:
    """The question an item asks.

    Raises:
        DataError: the prompt carries none of the 69 answer templates.
    """
    try:
        return recognise(item.prompt)
    except ValueError as error:
        raise DataError(
            Fault.QUESTION, f"{item.place}: {error} (prompt begins {item.prompt[:80]!r})"
        ) from error


def find_truth(item: Item, question: Question) -> Truth:
    """Grades and text box of an item. The box still carries the dataset's own six numbers (`Box3D.to_text`).

    Where `final_diagnosis` holds the grades only, the box is taken from `answer`.

    Raises:
        DataError: `final_diagnosis` cannot be read as this question's answer.
    """
    try:
        truth = read_truth(item.final_diagnosis, question)
        if truth.bbox is None and '"bbox"' in item.answer:
            truth = replace(truth, bbox=read_truth(item.answer, question).bbox)
    except ValueError as error:
        raise DataError(Fault.TRUTH, f"{item.place}: {error}; correct the item, it is not skipped") from error
    return truth


class TruthLedger:
    """Remembers the truths of a file. Balanced files repeat items, which is fine; two truths for one are not."""

    def __init__(self) -> None:
        self._seen: dict[tuple[str, int], int] = {}

    def enter(self, item: Item, volume_id: str, question: Question, truth: Truth) -> None:
        """Record a truth.

        Raises:
            DataError: this question of this volume was given another truth before.
        """
        value = hash((frozenset(truth.grades.items()), truth.bbox))
        if self._seen.setdefault((volume_id, question.question_id), value) != value:
            raise DataError(
                Fault.TRUTH,
                f"{item.place}: question {question.question_id} of {volume_id} was given another truth earlier in this "
                "file; keep one of the two items",
            )


def text_box(item: Item, truth: Truth, header: Header, convention: Convention) -> Box3D | None:
    """The item's text box on the file grid; None where the item has none.

    Raises:
        DataError: a box that does not fit the volume under the configured convention.
    """
    if truth.bbox is None:
        return None
    try:
        return box_from_text(truth.bbox.to_text(), convention.grid(header.shape), convention)
    except ValueError as error:
        raise DataError(
            Fault.TRUTH,
            f"{item.place}: {error}; grid of {item.image} is {header.shape}, convention {convention.describe()}: "
            "run `reasonknee data check` to see which data.box_convention fits",
        ) from error


def reasoning_text(answer: str) -> str:
    """The reasoning of a released answer: what stands before `Final diagnosis:` or before its JSON object."""
    return _THINK_TAGS.sub(" ", _DIAGNOSIS_START.split(answer, maxsplit=1)[0]).strip()
