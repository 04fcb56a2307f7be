"""`reasonknee data check`: everything that can be wrong with a folder in the released layout, found in one run.

The checker goes through the same functions as the reader and does not stop at the first fault. It also settles
the box convention by the data (`rl.data.ranking`).
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence

from rl.config import Config
from rl.data.boxes import Extent, parse_convention, region_extents
from rl.data.check_items import ItemChecker, box_pairs
from rl.data.check_volumes import CheckedVolume, check_volumes
from rl.data.items import find_question, find_row, find_truth, read_items
from rl.data.layout import (
    SPLITS,
    DataError,
    Fault,
    Split,
    SplitRow,
    data_root,
    item_file_name,
    read_question_file,
    read_question_labels,
    read_split,
    scan_split,
)
from rl.data.nifti import Header, read_header, read_mask
from rl.data.ranking import BoxPair, judge, rank_conventions
from rl.data.report import CheckReport, SplitCounts, print_report

PROBE_VOLUMES, PROBE_BOXES = 24, 500
"""How much `require_best_convention` looks at: enough to tell 96 conventions apart, seconds of work."""


def run_check(config: Config, max_volumes: int = 0) -> int:
    """Check the dataset and print the report; returns the exit code, 0 when nothing is wrong, else 1."""
    report = check_dataset(config, max_volumes)
    print_report(report)
    return 0 if report.ok else 1


def check_dataset(config: Config, max_volumes: int = 0) -> CheckReport:
    """Look for every fault of a dataset, and rank the box conventions.

    Args:
        config: `data` says where the dataset is and which convention is configured.
        max_volumes: how many volumes to read whole, spread evenly over the splits; 0 for all. A full-size volume takes
            about half a second of one core.

    Raises:
        ConfigError: `data.root` or `data.box_convention` cannot be used. Faults of the data are reported instead.
    """
    root = data_root(config)
    report = CheckReport(root, parse_convention(config.data.box_convention))
    rows = {split: _scan(report, split) for split in SPLITS}
    report.faults += _shared_patients(rows)
    _check_question_files(report)
    every_row = [row for split in SPLITS for row in rows[split]]
    volumes = check_volumes(root, every_row, _regions(report), max_volumes)
    report.faults += [fault for volume in volumes.values() for fault in volume.faults]
    report.volumes, report.volumes_opened = len(volumes), sum(volume.opened for volume in volumes.values())
    report.splits = {split: _count(rows[split], volumes) for split in SPLITS}
    checker = ItemChecker(root, volumes, report.convention)
    for name, split in _item_files(config, report).items():
        report.files[name] = checker.check_file(name, split, rows[split])
    report.faults += checker.faults
    _settle_convention(report, checker, needed=config.data.box_source == "text")
    return report


def require_best_convention(config: Config) -> None:
    """Refuse to train with a box convention that is not the one the data speak.

    Looks at the first volumes of the training file. With `data.box_source=mask` there is no text to misread.
    Where no text box has a mask to be compared with, it warns that the convention is unverified.

    Raises:
        DataError: another convention fits better, or none fits; or the regions of questions cannot be read.
    """
    if config.data.box_source == "mask":
        return
    pairs = _probe(config)
    if not pairs:
        warnings.warn(
            "no text box could be compared with a mask: data.box_convention is unverified", stacklevel=2
        )
        return
    verdict = judge(rank_conventions(pairs), parse_convention(config.data.box_convention))
    if verdict is not None:
        raise DataError(
            Fault.CONVENTION, f"training refused: {verdict}. `reasonknee data check` prints the ranking"
        )


def _probe(config: Config) -> list[BoxPair]:
    root = data_root(config)
    try:
        regions = read_question_labels(root)
    except DataError as error:
        if error.fault is not Fault.MISSING_FILE:
            raise
        warnings.warn(f"boxes of the text cannot be compared with masks: {error}", stacklevel=3)
        return []
    rows = {row.image: row for row in read_split(root, "train")}
    looked_at: dict[str, tuple[Header, Mapping[int, Extent]]] = {}
    pairs: list[BoxPair] = []
    for item in read_items(root / "generate_data" / config.data.train_file):
        if isinstance(item, DataError):
            raise item
        row = find_row(item, rows, "train")
        if row.image not in looked_at:
            if len(looked_at) == PROBE_VOLUMES or row.mask is None or not (root / row.mask).is_file():
                continue
            header = read_header(root / row.image, row.place)
            mask = read_mask(root / row.mask, root / row.image, row.place)
            looked_at[row.image] = header, region_extents(mask, regions)
        question = find_question(item)
        pairs += box_pairs(find_truth(item, question), question.question_id, *looked_at[row.image])
        if len(pairs) >= PROBE_BOXES:
            break
    return pairs


def _scan(report: CheckReport, split: Split) -> list[SplitRow]:
    try:
        rows, errors = scan_split(report.root, split)
    except DataError as error:
        rows, errors = [], [error]
    report.faults += errors
    return rows


def _shared_patients(rows: Mapping[Split, Sequence[SplitRow]]) -> list[DataError]:
    first: dict[str, dict[Split, SplitRow]] = {}
    for split, split_rows in rows.items():
        for row in split_rows:
            first.setdefault(row.patient_id, {}).setdefault(split, row)
    return [
        DataError(
            Fault.SHARED_PATIENT,
            f"patient {patient} is in {' and '.join(places)} ({', '.join(row.place for row in places.values())}); "
            "keep all visits of a patient in one split",
        )
        for patient, places in first.items()
        if len(places) > 1
    ]


def _check_question_files(report: CheckReport) -> None:
    for path in sorted((report.root / "question_files").glob("questions*.json")):
        try:
            read_question_file(path)
        except DataError as error:
            report.faults.append(error)


def _regions(report: CheckReport) -> dict[int, tuple[int, ...]]:
    try:
        return read_question_labels(report.root)
    except DataError as error:
        report.faults.append(error)
        return {}


def _count(rows: Sequence[SplitRow], volumes: Mapping[str, CheckedVolume]) -> SplitCounts:
    return SplitCounts(
        rows=len(rows),
        patients=len({row.patient_id for row in rows}),
        visits=len({(row.patient_id, row.visit) for row in rows}),
        volumes=sum(volumes[row.image].header is not None for row in rows),
    )


def _item_files(config: Config, report: CheckReport) -> dict[str, Split]:
    """The configured item files, and every other one whose name tells its split."""
    files: dict[str, Split] = {item_file_name(config, split): split for split in SPLITS}
    for path in sorted((report.root / "generate_data").glob("*.json")):
        if path.name in files:
            continue
        named = [split for split in SPLITS if path.name.startswith(split)]
        if named:
            files[path.name] = named[0]
        else:
            report.notes.append(f"{path} was not checked: its name does not begin with train, val or test")
    return files


def _settle_convention(report: CheckReport, checker: ItemChecker, needed: bool) -> None:
    """Rank the conventions; a wrong one explains the boxes that do not fit, which are then only counted."""
    report.box_pairs = len(checker.pairs)
    verdict: str | None = None
    if checker.pairs:
        report.ranking = rank_conventions(checker.pairs)
        verdict = judge(report.ranking, report.convention)
    elif needed and any(counts.with_box for counts in report.files.values()):
        verdict = (
            "no text box could be compared with a mask, so data.box_convention is unverified; it needs sound masks and "
            "question_files/question_subregion_mapping.json"
        )
    if not needed:
        report.notes.append(
            "data.box_source=mask: boxes come from the masks, those of the text are only ranked"
        )
        return
    if verdict is None:
        report.faults += checker.misfits
        return
    report.faults.append(DataError(Fault.CONVENTION, verdict))
    if checker.misfits:
        report.notes.append(
            f"{len(checker.misfits)} boxes leave their volume as configured, e.g. {checker.misfits[0]}"
        )
