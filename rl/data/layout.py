"""The released folder layout: split CSVs, question files, and where a path written in them points.

Everything here reads small text files only; volumes are opened in `rl.data.nifti`, the large item files in
`rl.data.items`.
"""

from __future__ import annotations

import csv
import json
import posixpath
from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Any, Literal, get_args

from rewards.errors import ReasonKneeError
from rewards.matching import match_question
from rewards.ontology import BENCHMARK_QUESTION_IDS, QUESTIONS
from rewards.types import Side
from rl.config import Config, ConfigError

Split = Literal["train", "val", "test"]
SPLITS: tuple[Split, ...] = get_args(Split)

HEADER = (
    "patient_id",
    "time",
    "study_folder",
    "series_folder",
    "knee_side",
    "path",
    "image_filepath",
    "label_filepath",
)
SIDES: Mapping[str, Side] = {"1": "right", "2": "left"}


class Fault(Enum):
    """What kind of thing is wrong with the dataset; the value is the heading in the report of `data check`."""

    HEADER = "wrong CSV headers"
    ROW = "unreadable CSV rows"
    PATH = "paths outside the data folder"
    MISSING_FILE = "missing dataset files"
    MISSING_VOLUME = "missing volumes"
    MISSING_MASK = "missing masks"
    UNREADABLE_VOLUME = "unreadable volumes"
    UNREADABLE_MASK = "unreadable masks"
    MASK_MISMATCH = "masks unlike their image"
    SHARED_PATIENT = "patients in two splits"
    ITEM = "unreadable items"
    UNKNOWN_IMAGE = "items whose image is not in the split"
    QUESTION = "questions not recognised"
    TRUTH = "unparsable truths"
    MAPPING = "question and label files"
    CONVENTION = "box convention"


class DataError(ReasonKneeError, ValueError):
    """The dataset on disk is not as released; the message names file, row or item, value and remedy."""

    def __init__(self, fault: Fault, message: str) -> None:
        super().__init__(message)
        self.fault = fault


@dataclass(frozen=True, slots=True)
class SplitRow:
    """One row of a split CSV: a knee at one visit. Image and mask paths are relative to `data.root`."""

    file: Path
    line: int
    """Line number in the CSV as an editor counts it; the header is line 1."""
    patient_id: str
    visit: str
    study: str
    series: str
    knee_side: str
    """"1" right, "2" left, as written."""
    image: str
    mask: str | None

    @property
    def side(self) -> Side:
        return SIDES[self.knee_side]

    @property
    def volume_id(self) -> str:
        """`{patient}_{time}_{study}_{series}_{side}`, the key of the public result files."""
        return f"{self.patient_id}_{self.visit}_{self.study}_{self.series}_{self.knee_side}"

    @property
    def place(self) -> str:
        """`file:line`, for messages."""
        return f"{self.file}:{self.line}"


def data_root(config: Config) -> Path:
    """The configured dataset folder.

    Raises:
        ConfigError: it does not exist.
    """
    root = Path(config.data.root).expanduser()
    if not root.is_dir():
        raise ConfigError(
            f"data.root is {root}, which is not a folder: point it at the released `data` folder"
        )
    return root


def relative_path(written: str, place: str) -> str:
    """A path as the dataset writes it (`../data/images/a.nii.gz`), made relative to `data.root`.

    The released paths are relative to the authors' code folder, so leading `../` and one `data/` are dropped.
    Links inside the folder may point anywhere (volumes often live on another disk); the text may not.

    Raises:
        DataError: an absolute path, or one that climbs out of the root after that.
    """
    path = written.strip()
    while path.startswith(("../", "./")):
        path = path.split("/", 1)[1]
    path = posixpath.normpath(path.removeprefix("data/"))
    if path in ("", ".", "..") or path.startswith(("/", "../")):
        raise DataError(
            Fault.PATH,
            f"{place}: path {written!r} does not stay inside data.root; "
            "write it as ../data/<folder>/<file> or relative to data.root",
        )
    return path


def item_file_name(config: Config, split: Split) -> str:
    """Name of the split's configured item file under `generate_data`."""
    data = config.data
    return {"train": data.train_file, "val": data.val_file, "test": data.test_file}[split]


def split_file(root: Path, split: Split) -> Path:
    """Path of a split's CSV."""
    return root / "split_files" / f"{split}_split.csv"


def read_split(root: Path, split: Split) -> list[SplitRow]:
    """Every row of a split's CSV, in order.

    Raises:
        DataError: missing file, wrong header (missing and extra columns named), or the first bad row.
    """
    rows, errors = scan_split(root, split)
    if errors:
        raise errors[0]
    return rows


def scan_split(root: Path, split: Split) -> tuple[list[SplitRow], list[DataError]]:
    """Like `read_split`, but a bad row is returned as an error beside the good ones.

    Raises:
        DataError: missing file or wrong header, without which no row has a meaning.
    """
    file = split_file(root, split)
    if not file.is_file():
        raise DataError(
            Fault.MISSING_FILE, f"split file {file} is missing; is data.root={root} the right folder?"
        )
    rows: list[SplitRow] = []
    errors: list[DataError] = []
    lines_of: dict[str, int] = {}
    with file.open(newline="", encoding="utf-8-sig") as stream:
        reader = csv.reader(stream)
        lines = filter(None, reader)  # a blank line is no row
        try:
            _check_header(file, tuple(next(lines, ())))
            for cells in lines:
                try:
                    row = _parse_row(file, reader.line_num, cells)
                    for key in (row.volume_id, row.image):
                        if key in lines_of:
                            raise DataError(
                                Fault.ROW,
                                f"{row.place}: {key} is already on line {lines_of[key]}; remove one of the rows",
                            )
                except DataError as error:
                    errors.append(error)
                    continue
                lines_of |= {row.volume_id: row.line, row.image: row.line}
                rows.append(row)
        except (UnicodeDecodeError, csv.Error) as error:
            problem = (
                f"{file}: cannot be read after line {reader.line_num} ({error}); save it as CSV in UTF-8"
            )
            errors.append(DataError(Fault.ROW, problem))
    return rows, errors


def _check_header(file: Path, header: tuple[str, ...]) -> None:
    if header == HEADER:
        return
    missing = [name for name in HEADER if name not in header]
    extra = [name for name in header if name not in HEADER]
    problem = "; ".join(
        text
        for text in (
            f"missing columns: {', '.join(missing)}" if missing else "",
            f"extra columns: {', '.join(map(repr, extra))}" if extra else "",
            "" if missing or extra else f"columns in another order: {','.join(header)}",
        )
        if text
    )
    raise DataError(
        Fault.HEADER, f"{file}: wrong header ({problem}). The first line must be {','.join(HEADER)}"
    )


def _parse_row(file: Path, line: int, cells: list[str]) -> SplitRow:
    place = f"{file}:{line}"
    if len(cells) != len(HEADER):
        raise DataError(
            Fault.ROW, f"{place}: {len(cells)} values for {len(HEADER)} columns: {','.join(cells)[:120]!r}"
        )
    values = {name: cell.strip() for name, cell in zip(HEADER, cells, strict=True)}
    for name in ("patient_id", "time", "study_folder", "series_folder", "image_filepath"):
        if not values[name]:
            raise DataError(Fault.ROW, f"{place}: {name} is empty")
    if values["knee_side"] not in SIDES:
        raise DataError(
            Fault.ROW, f"{place}: knee_side is {values['knee_side']!r}; it must be 1 (right) or 2 (left)"
        )
    label = values["label_filepath"]
    return SplitRow(
        file=file,
        line=line,
        patient_id=values["patient_id"],
        visit=values["time"],
        study=values["study_folder"],
        series=values["series_folder"],
        knee_side=values["knee_side"],
        image=relative_path(values["image_filepath"], f"{place} (image_filepath)"),
        mask=relative_path(label, f"{place} (label_filepath)") if label else None,
    )


def read_question_file(path: Path) -> dict[int, str]:
    """A question file, `{"1": text, …}`: question id -> text, each matched to the built-in ontology.

    Raises:
        DataError: missing or not such a file, or a text whose answer template belongs to another question.
    """
    texts: dict[int, str] = {}
    for key, text in _read_json_object(path).items():
        number = _question_number(path, key)
        if not isinstance(text, str):
            raise DataError(Fault.MAPPING, f"{path}: question {key} is a {type(text).__name__}, not text")
        try:
            matched = match_question(text)
        except ValueError as error:
            raise DataError(Fault.QUESTION, f"{path}: question {key} is not recognised: {error}") from error
        if matched.question_id != number:
            raise DataError(
                Fault.QUESTION,
                f"{path}: key {key!r} holds the template of question {matched.question_id} ({matched.entity!r}), "
                f"but question {key} asks for {QUESTIONS[number].entity!r}; correct the key or the text",
            )
        texts[number] = text
    if not texts:
        raise DataError(Fault.MAPPING, f"{path}: no question in it")
    return texts


def question_ids(config: Config) -> tuple[int, ...]:
    """The questions to use: `data.question_ids`, else those of `question_files/questions.json`, else 1-62.

    Raises:
        ConfigError: an id outside the ontology.
        DataError: `questions.json` exists and cannot be read.
    """
    if config.data.question_ids:
        unknown = [i for i in config.data.question_ids if i not in QUESTIONS]
        if unknown:
            raise ConfigError(
                f"data.question_ids names {unknown}; questions are numbered 1 to {len(QUESTIONS)}"
            )
        return tuple(sorted(set(config.data.question_ids)))
    file = data_root(config) / "question_files" / "questions.json"
    return tuple(sorted(read_question_file(file))) if file.is_file() else BENCHMARK_QUESTION_IDS


def question_label_files(root: Path) -> tuple[Path, Path]:
    """The two files that say which mask labels a question's region has."""
    return (
        root / "question_files" / "question_subregion_mapping.json",
        root / "question_files" / "labels.json",
    )


def read_question_labels(root: Path) -> dict[int, tuple[int, ...]]:
    """Mask labels of each question's region, from `question_files/question_subregion_mapping.json`.

    A value is a label number, a region name of `question_files/labels.json` (name -> number, or number ->
    name), or a list of either. A question with an empty value has no region in the masks and is left out.

    Raises:
        DataError: missing file, or an entry that is none of these.
    """
    path, names_path = question_label_files(root)
    names = _label_numbers(names_path) if names_path.is_file() else {}
    labels: dict[int, tuple[int, ...]] = {}
    for key, value in _read_json_object(path).items():
        number = _question_number(path, key)
        entries = value if isinstance(value, list) else [] if value is None else [value]
        numbers = [_label_number(entry, names) for entry in entries]
        if None in numbers:
            raise DataError(
                Fault.MAPPING,
                f"{path}: question {key} maps to {value!r}; expected a label number from 1, a region name listed in "
                f"{names_path}, or a list of those",
            )
        if numbers:
            labels[number] = tuple(sorted({n for n in numbers if n is not None}))
    return labels


def _question_number(path: Path, key: str) -> int:
    if not (key.isdecimal() and int(key) in QUESTIONS):
        raise DataError(Fault.MAPPING, f"{path}: key {key!r} is not a question id from 1 to {len(QUESTIONS)}")
    return int(key)


def _label_number(entry: Any, names: Mapping[str, int]) -> int | None:
    if isinstance(entry, str):
        entry = names.get(entry, int(entry) if entry.isdecimal() else None)
    return entry if isinstance(entry, int) and not isinstance(entry, bool) and entry > 0 else None


def _label_numbers(path: Path) -> dict[str, int]:
    """`labels.json`, which may map names to numbers or numbers to names."""
    numbers: dict[str, int] = {}
    for key, value in _read_json_object(path).items():
        if isinstance(value, int):
            numbers[key] = value
        elif isinstance(value, str) and key.isdecimal():
            numbers[value] = int(key)
        else:
            raise DataError(
                Fault.MAPPING,
                f"{path}: entry {key!r}: {value!r} is neither name -> number nor number -> name",
            )
    return numbers


def _read_json_object(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise DataError(Fault.MISSING_FILE, f"{path} is missing; the release keeps it under question_files/")
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise DataError(Fault.MAPPING, f"{path}: not valid JSON ({error})") from error
    if not isinstance(value, dict):
        raise DataError(Fault.MAPPING, f"{path}: expected a JSON object, found a {type(value).__name__}")
    return value
