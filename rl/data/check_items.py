"""The part of `data check` that reads the item files."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path

from rewards.types import Truth
from rl.data.boxes import Convention, Extent
from rl.data.check_volumes import CheckedVolume
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
from rl.data.layout import DataError, Split, SplitRow
from rl.data.nifti import Header
from rl.data.ranking import BoxPair
from rl.data.report import FileCounts


class ItemChecker:
    """Reads item files to their ends, collecting faults and the boxes that the conventions are ranked by."""

    def __init__(self, root: Path, volumes: Mapping[str, CheckedVolume], convention: Convention) -> None:
        self.faults: list[DataError] = []
        self.misfits: list[DataError] = []
        """Boxes outside their volume under the configured convention, which may itself be to blame."""
        self.pairs: list[BoxPair] = []
        self._root, self._volumes, self._convention = root, volumes, convention

    def check_file(self, name: str, split: Split, rows: Iterable[SplitRow]) -> FileCounts:
        """Read every item of `generate_data/<name>`, whose images should be among the split's rows."""
        counts, ledger = FileCounts(split), TruthLedger()
        by_image = {row.image: row for row in rows}
        try:
            for item in read_items(self._root / "generate_data" / name):
                counts.items += 1
                try:
                    if isinstance(item, DataError):
                        raise item
                    self._check_item(item, by_image, counts, ledger)
                except DataError as error:
                    self.faults.append(error)
        except DataError as error:  # the file itself ends here
            self.faults.append(error)
        return counts

    def _check_item(
        self, item: Item, by_image: Mapping[str, SplitRow], counts: FileCounts, ledger: TruthLedger
    ) -> None:
        row = find_row(item, by_image, counts.split)
        question = find_question(item)
        truth = find_truth(item, question)
        ledger.enter(item, row.volume_id, question, truth)
        volume = self._volumes[row.image]
        counts.sound += 1
        counts.questions.add(question.question_id)
        counts.volumes.add(row.volume_id)
        counts.with_box += truth.bbox is not None
        counts.with_reasoning += bool(reasoning_text(item.answer))
        if volume.header is not None:
            self.pairs += box_pairs(truth, question.question_id, volume.header, volume.extents)
            try:
                text_box(item, truth, volume.header, self._convention)
            except DataError as error:
                self.misfits.append(error)


def box_pairs(truth: Truth, question_id: int, header: Header, extents: Mapping[int, Extent]) -> list[BoxPair]:
    """The text box beside the mask's, where there are both: a list of one, or of none."""
    if truth.bbox is None or question_id not in extents:
        return []
    return [BoxPair(tuple(truth.bbox.to_text()), extents[question_id], header.shape)]
