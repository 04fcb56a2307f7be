"""The record of a benchmark run: every answer as it was given, and what it was given to.

A run is a folder with two files. `answers.parquet` has one row per item (a question about a volume) with the
truth it is graded against; `run.json` says which model, test file, reader and decoding made it. Nothing in it is
graded: `rl.bench.metrics` grades on reading, so a better reader never needs a new run.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import lru_cache
from itertools import islice
from pathlib import Path
from typing import Any

import polars as pl
from pydantic import TypeAdapter, ValidationError

from rewards.boxes import Box3D
from rewards.errors import ReasonKneeError
from rewards.ontology import QUESTIONS
from rewards.types import Example, ReaderMode, Truth, VolumeRef
from rl.bench.meta import RunMeta
from rl.errors import write_atomically
from rl.parquet import write_parquet

ANSWERS_FILE = "answers.parquet"
META_FILE = "run.json"

MISSING, ERROR = "missing", "error"
"""`finish_reason` of an item without an answer: nobody gave one, or something failed. The completion is empty."""

SCHEMA = pl.Schema(
    {
        "example_id": pl.String(),
        "volume_id": pl.String(),
        "image_path": pl.String(),
        "shape": pl.List(pl.Int64()),
        "spacing_mm": pl.List(pl.Float64()),
        "patient_id": pl.String(),
        "visit": pl.String(),
        "side": pl.String(),
        "question_id": pl.Int64(),
        "truth_grades": pl.String(),
        "truth_bbox": pl.List(pl.Int64()),
        "completion": pl.String(),
        "finish_reason": pl.String(),
        "reader": pl.String(),
        "item_hash": pl.String(),
    }
)
"""Columns of `answers.parquet`; `truth_bbox` alone may be null."""

BATCH = 2_000
"""Rows that are Python objects at once; a run as a whole stays in its columns."""


class RunError(ReasonKneeError, ValueError):
    """A run's files cannot be used; the message names the file, the row where there is one, and the remedy."""


@dataclass(frozen=True, slots=True)
class AnswerRow:
    """One item and the answer to it."""

    example_id: str
    volume_id: str
    image_path: str
    shape: tuple[int, int, int]
    """(slices, x, y) of the file's grid."""
    spacing_mm: tuple[float, float, float]
    """Voxel size along (slice, x, y)."""
    patient_id: str
    visit: str
    side: str
    question_id: int
    truth_grades: str
    """JSON object, attribute name -> grade; an attribute that was not graded is absent."""
    truth_bbox: tuple[int, int, int, int, int, int] | None
    """Six inclusive voxel indices in text order: slice, slice, x, x, y, y. None when there is no true box."""
    completion: str
    finish_reason: str
    """Why decoding ended (`stop`, `length`), what stands in for a model (`baseline`, `imported`), or why there is no
    answer (`missing`, `error`)."""
    reader: ReaderMode
    item_hash: str
    """`item_hash` of question, volume, truth and reader: answers may be compared only where it is equal."""


@dataclass(frozen=True)
class BenchRun:
    """A run as read: `answers` has the columns of `SCHEMA`, one row per item."""

    meta: RunMeta
    answers: pl.DataFrame


_json = json.JSONEncoder(ensure_ascii=False).encode
HASHED = ("question_id", "volume_id", "shape", "truth_grades", "truth_bbox", "reader")
"""Columns of `SCHEMA` that are the arguments of `item_hash`."""


def item_hash(
    question_id: int,
    volume_id: str,
    shape: Sequence[int],
    truth_grades: str,
    truth_bbox: Sequence[int] | None,
    reader: str,
) -> str:
    """128-bit hash of what an answer is graded on: question, volume, truth and reader."""
    bbox = "null" if truth_bbox is None else list(truth_bbox)
    # a list of integers reads the same in JSON and in Python
    content = (
        f"[{question_id}, {_json(volume_id)}, {list(shape)}, {_json(truth_grades)}, {bbox}, {_json(reader)}]"
    )
    return hashlib.blake2b(content.encode("utf-8", "surrogatepass"), digest_size=16).hexdigest()


def answer_row(example: Example, completion: str, finish_reason: str, reader: ReaderMode) -> AnswerRow:
    """The record of one completion."""
    question, volume, truth = example.question, example.volume, example.truth
    grades = json.dumps({a.name: truth.grades[a.name] for a in question.attributes if a.name in truth.grades})
    s0, s1, x0, x1, y0, y1 = truth.bbox.to_text() if truth.bbox else [0] * 6
    bbox = (s0, s1, x0, x1, y0, y1) if truth.bbox else None
    return AnswerRow(
        example_id=example.example_id,
        volume_id=volume.volume_id,
        image_path=volume.image_path,
        shape=volume.shape,
        spacing_mm=volume.spacing_mm,
        patient_id=example.patient_id,
        visit=example.visit,
        side=example.side,
        question_id=question.question_id,
        truth_grades=grades,
        truth_bbox=bbox,
        completion=completion.encode("utf-8", "replace").decode("utf-8"),  # parquet takes no lone surrogates
        finish_reason=finish_reason,
        reader=reader,
        item_hash=item_hash(question.question_id, volume.volume_id, volume.shape, grades, bbox, reader),
    )


def row_truth(row: Mapping[str, Any]) -> Truth:
    """The truth of one row of `answers.parquet`."""
    box = row["truth_bbox"]
    return Truth(grades=json.loads(row["truth_grades"]), bbox=None if box is None else Box3D.from_text(box))


def examples_of(answers: pl.DataFrame) -> Iterator[Example]:
    """The question of each row of `answers.parquet`, about its volume, with its truth."""
    for batch in answers.select(_ASKED).iter_slices(BATCH):
        for row in zip(*(batch[name].to_list() for name in _ASKED), strict=True):
            example_id, volume_id, path, shape, spacing, patient, visit, side, question_id, grades, box = row
            yield Example(
                example_id=example_id,
                volume=VolumeRef(volume_id, path, None, tuple(shape), tuple(spacing)),
                question=QUESTIONS[question_id],
                truth=Truth(_grades(grades), None if box is None else Box3D.from_text(box)),
                patient_id=patient,
                visit=visit,
                side=side,
            )


_ASKED = tuple(SCHEMA)[: list(SCHEMA).index("completion")]
_grades = lru_cache(maxsize=4096)(json.loads)
"""A question has few truths: their texts repeat all through a run."""


def make_run(rows: Iterable[AnswerRow], meta: RunMeta) -> BenchRun:
    """A checked run in memory; `meta.n` is set to the number of rows.

    Raises:
        RunError: duplicate items, questions outside the set, truths outside the grade space (see `read_run`).
    """
    rows, frames = iter(rows), [SCHEMA.to_frame()]
    while batch := list(islice(rows, BATCH)):
        frames.append(pl.DataFrame({name: _values(batch, name) for name in SCHEMA}, schema=SCHEMA))
    answers = pl.concat(frames, rechunk=True)
    run = BenchRun(replace(meta, n=answers.height), answers)
    _check(run, f"run {meta.name!r}")
    return run


def _values(rows: Sequence[AnswerRow], name: str) -> list[Any]:
    values = [getattr(row, name) for row in rows]
    return [list(value) if isinstance(value, tuple) else value for value in values]


def reread(run: BenchRun, reader: ReaderMode) -> BenchRun:
    """The same answers, to be read by this reader: rows, hashes and `meta` say so."""
    answers = run.answers.with_columns(reader=pl.lit(reader))
    hashed = answers.with_columns(item_hash=pl.Series(_hashes(answers), dtype=pl.String))
    return BenchRun(replace(run.meta, reader=reader), hashed)


def _hashes(answers: pl.DataFrame) -> Iterator[str]:
    """`item_hash` of each row, from its content."""
    for batch in answers.select(HASHED).iter_slices(BATCH):
        yield from map(item_hash, *(batch[name].to_list() for name in HASHED))


def write_run(folder: Path, rows: Iterable[AnswerRow], meta: RunMeta) -> BenchRun:
    """Check and write a run. `run.json` comes last, so a folder that has one holds every answer.

    Raises:
        RunError: as `make_run`.
    """
    run = make_run(rows, meta)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / META_FILE).unlink(missing_ok=True)
    write_parquet(folder / ANSWERS_FILE, run.answers)
    write_atomically(folder / META_FILE, json.dumps(asdict(run.meta), indent=2) + "\n")
    return run


def read_run(folder: Path) -> BenchRun:
    """Read a run and check every row.

    Raises:
        RunError: a file is missing, truncated or of another layout; the number of rows is not what `run.json` says;
            an item occurs twice; a question is unknown or outside the run's set; a truth is outside its grade space;
            the reader differs from the run's; or a row's hash does not match its content.
    """
    meta_path, answers_path = folder / META_FILE, folder / ANSWERS_FILE
    for path in (meta_path, answers_path):
        if not path.is_file():
            raise RunError(
                f"{path} does not exist; run `reasonknee eval` (it writes run.json last, once complete)"
            )
    try:
        meta = TypeAdapter(RunMeta).validate_json(meta_path.read_bytes())
    except ValidationError as error:
        problems = "; ".join(f"{'.'.join(map(str, e['loc'])) or 'file'}: {e['msg']}" for e in error.errors())
        raise RunError(f"{meta_path} cannot be read ({problems}); run `reasonknee eval` again") from error
    try:
        answers = pl.read_parquet(answers_path)
    except (pl.exceptions.PolarsError, OSError) as error:
        raise RunError(
            f"{answers_path} is truncated or damaged ({error}); run `reasonknee eval` again"
        ) from error
    if answers.schema != SCHEMA:
        differing = sorted({*dict(answers.schema).items()} ^ {*dict(SCHEMA).items()}, key=str)
        raise RunError(f"{answers_path} has another layout; columns that differ: {differing}")
    run = BenchRun(meta, answers)
    _check(run, str(answers_path))
    return run


def _check(run: BenchRun, place: str) -> None:
    """Raise RunError at the first row that cannot be graded or compared; rows are counted from 0."""
    meta, answers = run.meta, run.answers
    if answers.height != meta.n:
        raise RunError(
            f"{place} has {answers.height} rows but run.json says n = {meta.n}: it is truncated or from another run"
        )
    if answers.height == 0:
        raise RunError(f"{place} holds no answers: the test file or the question set is empty")
    _check_questions(run, place)
    duplicated = answers.with_row_index("row").filter(pl.col("example_id").is_duplicated())
    if duplicated.height:
        item = duplicated["example_id"][0]
        rows = duplicated.filter(pl.col("example_id") == item)["row"].to_list()
        raise RunError(
            f"{place}: item {item} occurs {len(rows)} times (rows {rows[:5]}); each may be answered once"
        )
    others = answers.with_row_index("row").filter(pl.col("reader") != meta.reader)
    if others.height:
        raise RunError(
            f"{place} row {others['row'][0]}: reader is {others['reader'][0]!r}, run.json says {meta.reader!r}"
        )
    _check_truths(answers, place)
    computed = pl.Series(_hashes(answers), dtype=pl.String)
    for row in answers["item_hash"].ne_missing(computed).arg_true().head(1):
        raise RunError(
            f"{place} row {row}: item_hash {answers['item_hash'][row]} does not match the row's content; it was altered"
        )


def _check_questions(run: BenchRun, place: str) -> None:
    for known, remedy in (
        (list(QUESTIONS), "known ids are 1 to 69"),
        (list(run.meta.question_ids), f"the run's question set is {run.meta.question_set}"),
    ):
        strangers = run.answers.with_row_index("row").filter(~pl.col("question_id").is_in(known))
        if strangers.height:
            row, question_id = strangers["row"][0], strangers["question_id"][0]
            kind = "unknown question id" if question_id not in QUESTIONS else "question outside the set:"
            raise RunError(f"{place} row {row}: {kind} {question_id}; {remedy}")


def _check_truths(answers: pl.DataFrame, place: str) -> None:
    texts = answers.with_row_index("row").unique(
        ["question_id", "truth_grades"], keep="first", maintain_order=True
    )
    for row, question_id, text in texts.select("row", "question_id", "truth_grades").iter_rows():
        _check_grades(question_id, text, f"{place} row {row}")
    box = pl.col("truth_bbox").list
    pairs = [box.get(i, null_on_oob=True) <= box.get(i + 1, null_on_oob=True) for i in (0, 2, 4)]
    sound = (box.len() == 6) & pl.all_horizontal(pairs).fill_null(False)
    boxes = answers.with_row_index("row").filter(pl.col("truth_bbox").is_not_null() & ~sound)
    for row, numbers in boxes.select("row", "truth_bbox").head(1).iter_rows():
        raise RunError(f"{place} row {row}: truth_bbox {numbers} is not three ordered pairs")


def _check_grades(question_id: int, truth_grades: str, place: str) -> None:
    question = QUESTIONS[question_id]
    spaces = {attribute.name: attribute.grades for attribute in question.attributes}
    try:
        grades = json.loads(truth_grades)
    except ValueError as error:
        raise RunError(f"{place}: truth_grades is not JSON ({error})") from error
    for name, grade in grades.items():
        if name not in spaces:
            raise RunError(
                f"{place}: question {question_id} has no attribute {name!r}; it has {sorted(spaces)}"
            )
        if type(grade) is not int or grade not in spaces[name]:
            space = f"{spaces[name].start}-{spaces[name].stop - 1}"
            raise RunError(f"{place}: true grade {grade!r} of {name!r} is outside {space}")
