"""Items turned into flat, typed rows: joined to their split row, question, truth and volume header."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TypedDict

import pyarrow as pa

from rewards.boxes import Box3D
from rewards.ontology import Question
from rewards.types import Truth
from rl.config import Config
from rl.data.boxes import AXIS_NAMES, Convention, extent_box, parse_convention, region_extents
from rl.data.items import (
    Item,
    TruthLedger,
    find_question,
    find_row,
    find_truth,
    read_items,
    reasoning_text,
    text_box,
)
from rl.data.layout import DataError, Fault, Split, SplitRow, question_ids, read_question_labels
from rl.data.nifti import Header, read_header, read_mask


class Row(TypedDict):
    """One example as stored: flat and typed, paths relative to the data root."""

    example_id: str
    question_id: int
    patient_id: str
    visit: str
    side: str
    volume_id: str
    image: str
    mask: str | None
    shape: list[int]
    """(slices, x, y)."""
    spacing_mm: list[float]
    """Along (slice, x, y)."""
    grades: str
    """JSON object, attribute -> grade, keys sorted."""
    bbox: list[int] | None
    """Half-open file-grid box: slice_min, slice_max, x_min, x_max, y_min, y_max."""
    reasoning: str


SCHEMA = pa.schema(
    [
        ("example_id", pa.string()),
        ("question_id", pa.int32()),
        ("patient_id", pa.string()),
        ("visit", pa.string()),
        ("side", pa.string()),
        ("volume_id", pa.string()),
        ("image", pa.string()),
        ("mask", pa.string()),
        ("shape", pa.list_(pa.int32(), 3)),
        ("spacing_mm", pa.list_(pa.float64(), 3)),
        ("grades", pa.string()),
        ("bbox", pa.list_(pa.int32(), 6)),
        ("reasoning", pa.string()),
    ]
)


class RowBuilder:
    """Turns the items of a file into rows; headers and mask boxes are read once per volume."""

    def __init__(self, config: Config, root: Path, split: Split, rows: Sequence[SplitRow]) -> None:
        self.root, self.split = root, split
        self.convention: Convention = parse_convention(config.data.box_convention)
        self.question_ids = question_ids(config)
        self._rows_by_image = {row.image: row for row in rows}
        self._headers: dict[str, Header] = {}
        self._regions = read_question_labels(root) if config.data.box_source == "mask" else None
        self._mask_boxes: dict[str, dict[int, Box3D]] = {}

    def rows(self, file: Path) -> Iterator[Row]:
        """Rows of a file's items for the chosen questions, in order."""
        ledger = TruthLedger()
        for item in read_items(file):
            if isinstance(item, DataError):
                raise item
            row = self.row(item, ledger)
            if row is not None:
                yield row

    def row(self, item: Item, ledger: TruthLedger) -> Row | None:
        """The row of an item; None when its question is not among the chosen ones."""
        question = find_question(item)
        if question.question_id not in self.question_ids:
            return None
        source = find_row(item, self._rows_by_image, self.split)
        header = self.header(source)
        truth = find_truth(item, question)
        ledger.enter(item, source.volume_id, question, truth)
        if self._regions is None:
            bbox = text_box(item, truth, header, self.convention)
        else:
            bbox = self._boxes_of_mask(source).get(question.question_id)
        return build_row(item, source, question, truth, header, bbox, self.convention)

    def header(self, source: SplitRow) -> Header:
        """Shape and spacing of a row's volume, read once."""
        if source.image not in self._headers:
            self._headers[source.image] = read_header(self.root / source.image, source.place)
        return self._headers[source.image]

    def _boxes_of_mask(self, source: SplitRow) -> dict[int, Box3D]:
        assert self._regions is not None
        if source.image not in self._mask_boxes:
            if source.mask is None:
                raise DataError(
                    Fault.MISSING_MASK,
                    f"{source.place}: label_filepath is empty; data.box_source=mask needs it",
                )
            mask = read_mask(self.root / source.mask, self.root / source.image, source.place)
            extents = region_extents(mask, self._regions)
            self._mask_boxes[source.image] = {i: extent_box(e, self.convention) for i, e in extents.items()}
        return self._mask_boxes[source.image]


def build_row(
    item: Item,
    source: SplitRow,
    question: Question,
    truth: Truth,
    header: Header,
    bbox: Box3D | None,
    grid: Convention,
) -> Row:
    """Everything known about one example, flat."""
    spacing = header.spacing_mm
    return Row(
        example_id=f"{source.volume_id}_{question.question_id}",
        question_id=question.question_id,
        patient_id=source.patient_id,
        visit=source.visit,
        side=source.side,
        volume_id=source.volume_id,
        image=source.image,
        mask=source.mask,
        shape=list(grid.grid(header.shape)),
        spacing_mm=[spacing[axis] for axis in grid.axes],
        grades=json.dumps(dict(truth.grades), sort_keys=True),
        bbox=None if bbox is None else corners(bbox),
        reasoning=reasoning_text(item.answer),
    )


def corners(box: Box3D) -> list[int]:
    """Half-open limits in the order of `Box3D`'s fields."""
    return [getattr(box, f"{name}_{end}") for name in AXIS_NAMES for end in ("min", "max")]
