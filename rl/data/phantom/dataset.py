"""Phantoms in the released dataset's on-disk layout: split CSVs, volumes, masks, question files, item files."""

from __future__ import annotations

import csv
import dataclasses
import io
import json
import os
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np

from rewards.ontology import BENCHMARK_QUESTION_IDS, QUESTIONS
from rl.config import Config, ConfigError, PhantomConfig
from rl.data.layout import HEADER, SIDES, SPLITS
from rl.data.phantom.labels import LABELS, question_labels
from rl.data.phantom.marker import MARKER, refuse_other_data
from rl.data.phantom.patients import Finding, Patient, Scan, plan_patients, write_patient
from rl.data.phantom.reasoning import reasoning_sentence
from rl.errors import write_atomically
from rollouts.prompts import question_text

REASONED_FILE = "train_reasoned.json"
Item = dict[str, str]
Progress = Callable[[int, int], None]
"""Called with (patients done, patients in all)."""


def planned_patients(phantom: PhantomConfig) -> dict[str, list[Patient]]:
    """The patients of every split of the dataset that these settings describe.

    Raises:
        ConfigError: settings that cannot be used.
    """
    counts: dict[str, int] = {
        "train": phantom.train_patients,
        "val": phantom.val_patients,
        "test": phantom.test_patients,
    }
    return plan_patients(counts, phantom.max_visits, phantom.grades, phantom.seed)


def write_phantom(config: Config, progress: Progress | None = None) -> Path:
    """Write the phantom dataset described by `config.phantom` and return its root folder.

    The files depend on the settings only, not on the number of processes (two at most). Items are asked for
    `config.data.question_ids`, or questions 1-62 when that is empty.

    Raises:
        ConfigError: settings that cannot be used, or a root that holds folders of another dataset.
    """
    phantom = config.phantom
    root = Path(phantom.out_dir).expanduser()
    refuse_other_data(root)
    x, y, slices = (int(n) for n in _three(phantom.shape, "shape"))
    fov_mm = _three(phantom.fov_mm, "fov_mm")
    plans = planned_patients(phantom)
    questions = config.data.question_ids or list(BENCHMARK_QUESTION_IDS)
    _write_json(root / MARKER, {**dataclasses.asdict(phantom), "out_dir": ".", "question_ids": questions})
    work = partial(write_patient, root=root, shape=(x, y, slices), fov_mm=fov_mm)
    findings = _in_processes(work, plans, progress)
    _write_question_files(root / "question_files", questions)
    for split in SPLITS:
        _write_split(root / "split_files" / f"{split}_split.csv", [f.scan for f in findings[split]])
        items, keys = _items(findings[split], questions)
        _write_items(root / "generate_data", split, items)
        if split != "val":
            chosen = balanced_selection(keys, phantom.seed)
            _write_items(root / "generate_data", f"{split}_balanced", [items[i] for i in chosen])
    (root / "generate_data" / REASONED_FILE).unlink(missing_ok=True)  # of former settings
    if phantom.reasoned_patients:
        first = list(dict.fromkeys(f.scan.patient_id for f in findings["train"]))[: phantom.reasoned_patients]
        items, _ = _items([f for f in findings["train"] if f.scan.patient_id in first], questions)
        _write_lines(root / "generate_data" / REASONED_FILE, items)
    return root


def _three(numbers: Sequence[float], name: str) -> tuple[float, float, float]:
    if len(numbers) != 3 or min(numbers) <= 0:
        raise ConfigError(f"phantom.{name} is {list(numbers)}; give three positive numbers")
    return numbers[0], numbers[1], numbers[2]


def _in_processes(
    work: Callable[[Patient], list[Finding]], plans: dict[str, list[Patient]], progress: Progress | None
) -> dict[str, list[Finding]]:
    """Findings of every split, patients in order."""
    patients = [(split, patient) for split in SPLITS for patient in plans[split]]
    findings: dict[str, list[Finding]] = {split: [] for split in SPLITS}

    def collect(results: Iterable[list[Finding]]) -> None:
        for done, ((split, _), found) in enumerate(zip(patients, results, strict=True), start=1):
            findings[split] += found
            if progress is not None:
                progress(done, len(patients))

    processes = min(2, os.cpu_count() or 1)
    if processes == 1 or len(patients) < 16:  # a pool takes seconds to start
        collect(map(work, (patient for _, patient in patients)))
    else:
        with ProcessPoolExecutor(processes, mp_context=get_context("spawn")) as pool:
            collect(pool.map(work, (patient for _, patient in patients), chunksize=4))
    return findings


def _items(findings: Sequence[Finding], questions: Sequence[int]) -> tuple[list[Item], list[tuple[int, int]]]:
    """Items of a split, scan by scan, and of each its (question, grade of the question's first attribute)."""
    items, keys = [], []
    for finding in findings:
        for i in questions:
            question, grades = QUESTIONS[i], finding.grades[i]
            diagnosis = {"bbox": finding.boxes[i].to_text(), "MOAKS_scores": {question.entity: dict(grades)}}
            items.append(
                {
                    "image": f"../data/{finding.scan.image_path}",
                    "prompt": question_text(question),
                    "answer": reasoning_sentence(question, grades),
                    "final_diagnosis": json.dumps(diagnosis),
                }
            )
            keys.append((i, grades[question.attributes[0].name]))
    return items, keys


def balanced_selection(keys: Sequence[tuple[int, int]], seed: int) -> list[int]:
    """Positions of a selection without repeats in which no grade of a question outnumbers the others.

    Args:
        keys: (question id, grade) of each item. Of each question, a grade is kept at most as often as the median grade
            that occurs; which items stay is drawn at random.
    """
    rng = np.random.default_rng((seed, 99))
    positions: dict[int, dict[int, list[int]]] = defaultdict(lambda: defaultdict(list))
    for position, (question_id, grade) in enumerate(keys):
        positions[question_id][grade].append(position)
    chosen: list[int] = []
    for by_grade in positions.values():
        quota = max(1, int(np.median([len(p) for p in by_grade.values()])))
        for members in by_grade.values():
            chosen += [int(i) for i in rng.permutation(members)[:quota]]
    return sorted(chosen)


def _write_split(path: Path, scans: Sequence[Scan]) -> None:
    codes = {side: code for code, side in SIDES.items()}
    text = io.StringIO(newline="")
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(HEADER)
    for scan in scans:
        source = f"../data/OAI/{scan.visit}/{scan.patient_id}/{scan.study}/{scan.series}"
        files = (f"../data/{scan.image_path}", f"../data/{scan.mask_path}")
        writer.writerow(
            (scan.patient_id, scan.visit, scan.study, scan.series, codes[scan.side], source, *files)
        )
    _write_text(path, text.getvalue())


def _write_question_files(folder: Path, questions: Sequence[int]) -> None:
    grades = {str(i): {a.name: list(a.grades) for a in QUESTIONS[i].attributes} for i in questions}
    _write_json(folder / "questions.json", {str(i): question_text(QUESTIONS[i]) for i in questions})
    _write_json(
        folder / "question_subregion_mapping.json", {str(i): list(question_labels(i)) for i in questions}
    )
    _write_json(folder / "labels.json", LABELS)
    _write_json(folder / "grade_dict.json", grades)


def _write_items(folder: Path, name: str, items: Sequence[Item]) -> None:
    """Write `<name>.json` and `<name>_no_reasoning.json`, one item a line."""
    for suffix, extra in (("", {}), ("_no_reasoning", {"answer": ""})):
        _write_lines(folder / f"{name}{suffix}.json", [item | extra for item in items])


def _write_lines(path: Path, items: Sequence[Item]) -> None:
    lines = ",\n".join(map(json.dumps, items))
    _write_text(path, f"[\n{lines}\n]\n")


def _write_json(path: Path, value: Any) -> None:
    _write_text(path, json.dumps(value, indent=1) + "\n")


def _write_text(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, text)
