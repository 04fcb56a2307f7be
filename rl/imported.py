"""Answers of others as a run of the benchmark: result files of the public baseline, matched to our items.

Every item of the configured split gets one row, in order. One that the files do not answer is there with an empty
answer, counts as wrong, and says why in `finish_reason`: `missing`, or `error` when the files hold an error for it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from rl.answering import run_meta
from rl.bench.answers import ERROR, MISSING, BenchRun, answer_row, write_run
from rl.choices import reader_of, split_of
from rl.config import Config, ConfigError
from rl.data.examples import Examples, load_examples
from rl.data.results import Entry, Results, ResultsError, read_results
from rl.errors import write_atomically
from rl.evaluate import limited
from rl.stages import move_aside

IMPORT_FILE = "import.json"
"""Beside a run's answers: every name under each heading of `Imported.notes`."""
ANSWERED = "imported"
"""`finish_reason` of an answer: the files do not say how decoding ended."""
SHOWN = 5
"""Names printed under a heading."""

REPEATED = "given more than once, the last counts"
OTHER_QUESTION = "not used: the question is not in the question set"
OTHER_KNEE = "not used: the knee is not among the items"
NO_ITEM = "not used: knee and question are known, together they are no item"


@dataclass(frozen=True)
class Imported:
    """A run made from result files."""

    run: BenchRun
    folder: Path
    notes: Mapping[str, Sequence[str]]
    """Heading -> names of the items (`missing`) or entries it applies to; what is not named here was graded."""

    def summary(self) -> str:
        """What became of the entries: counts, and the first names of each."""
        meta, reasons = self.run.meta, self.run.answers["finish_reason"]
        lines = [
            f"{meta.name}: {(reasons == ANSWERED).sum():,} of {meta.n:,} items of {meta.split_file} answered, "
            f"{meta.reader} reader; the others count as wrong. Run in {self.folder}"
        ]
        for heading, names in self.notes.items():
            if names:
                more = f", … (all in {IMPORT_FILE})" if len(names) > SHOWN else ""
                lines.append(f"  {len(names):,} {heading}: {', '.join(names[:SHOWN])}{more}")
        return "\n".join(lines)


def imported_folder(config: Config, name: str) -> Path:
    """Where the imported run of this name lies."""
    return Path(config.run_dir) / "imported" / name


def import_results(config: Config, name: str, paths: Sequence[Path]) -> Imported:
    """Make a benchmark run of the public baseline's result files, with our items and hashes.

    A former run of this name is moved to `<run_dir>/old/`.

    Args:
        config: `data` and `eval` say which items, `rewards.reader` how answers will be read.
        name: how tables call the run, and its folder under `<run_dir>/imported`.
        paths: see `rl.data.results.read_results`.

    Raises:
        ConfigError: a name that is no folder name, or has a comma.
        ResultsError: the files cannot be read, or answer none of the items.
        DataError: the split cannot be read.
    """
    if name.strip() in ("", ".", "..") or Path(name).name != name or "," in name:
        raise ConfigError(
            f"run name {name!r} is no name of a folder, or has a comma, which `compare` puts between runs; write one "
            "such as o1-zero-shot"
        )
    results = read_results(paths)
    examples = limited(config, load_examples(config, split_of(config)))
    answers, notes = match(results, examples)
    files = ", ".join(map(str, paths))
    if not answers:
        raise ResultsError(
            f"{files}: none of {len(results.entries):,} entries answers an item, e.g. {results.entries[0].name}; the "
            f"items are like {examples[0].example_id}. Do data.root and eval.split name the data they were made for?"
        )
    reader = reader_of(config)
    rows = []
    for example in examples:
        entry = answers.get(example.example_id)
        reason = MISSING if entry is None else ERROR if entry.error is not None else ANSWERED
        rows.append(answer_row(example, entry.completion if entry else "", reason, reader))
    meta = run_meta(config, name, f"{results.model} ({files})", None, examples).not_asked()
    meta = replace(meta, decoding={})
    folder = imported_folder(config, name)
    if folder.exists():
        move_aside(Path(config.run_dir), "imported", [folder])
    folder.mkdir(parents=True)
    write_atomically(folder / IMPORT_FILE, json.dumps(notes, indent=1) + "\n")
    return Imported(write_run(folder, rows, meta), folder, notes)


def match(results: Results, examples: Examples) -> tuple[dict[str, Entry], dict[str, list[str]]]:
    """Which entry answers which item, by knee (volume id or image path) and question.

    Returns:
        (example id -> its entry, the last of several; heading -> names, as `Imported.notes`).
    """
    items: dict[tuple[str, int | None], str] = {}
    columns = ("example_id", "volume_id", "image", "question_id")
    for example_id, volume_id, image, question_id in zip(*map(examples.column, columns), strict=True):
        items[volume_id, question_id] = items[image, question_id] = example_id
    knees, questions = {knee for knee, _ in items}, {question_id for _, question_id in items}
    answers: dict[str, Entry] = {}
    unused: dict[str, list[str]] = {OTHER_QUESTION: [], OTHER_KNEE: [], NO_ITEM: []}
    repeated = list(results.repeated_keys)
    for entry in results.entries:
        example_id = items.get((entry.knee, entry.question_id))
        if example_id is not None:
            if example_id in answers:
                repeated.append(entry.name)
            answers[example_id] = entry
        elif entry.question_id not in questions:
            unused[OTHER_QUESTION].append(entry.name)
        else:
            unused[NO_ITEM if entry.knee in knees else OTHER_KNEE].append(entry.name)
    missing = [example_id for example_id in examples.column("example_id") if example_id not in answers]
    errors = [f"{entry.name} ({entry.error})" for entry in answers.values() if entry.error is not None]
    return answers, {MISSING: missing, ERROR: errors, REPEATED: repeated, **unused}
