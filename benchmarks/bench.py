"""Is the benchmark fast enough for the released dataset? Two runs of 494,140 answers each, on one core.

    python benchmarks/bench.py [--volumes 7970] [--draws 10000] [--out DIR]

Two runs are made up, 62 questions about each of 7,970 volumes of 2,660 patients, with completions of about 400
characters, right, wrong and unreadable ones mixed, and written as run folders, each by a process of its own. Then a
fresh process reads both runs, grades both, makes the tables of both and compares them. Printed are the seconds of each
phase, on the clock and on the processor, answers a second, and the peak of the process's memory by the end of the
phase. The whole is held against the targets, 90 s and 2 GB.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from rewards.boxes import Box3D
from rewards.ontology import QUESTIONS
from rewards.reading import format_answer
from rewards.types import Example, Truth, VolumeRef
from rl.bench.answers import AnswerRow, answer_row, read_run, write_run
from rl.bench.compare import check_same_items, compare_graded
from rl.bench.meta import RunMeta
from rl.bench.metrics import grade_run, tables
from rl.config import CompareConfig

SECONDS, GB = 90.0, 2.0
ONE_THREAD = dict.fromkeys(
    ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "POLARS_MAX_THREADS"), "1"
)
MEASURE = "measure"
VOLUMES, PATIENTS, QUESTION_IDS = 7970, 2660, tuple(range(1, 63))
SHAPE, SPACING = (160, 384, 384), (0.7, 0.365, 0.365)
VISITS = ("00M", "12M", "24M", "36M")
SKILLS = {"SFT": 0.55, "GRPO": 0.6}
"""Run -> share of its grades that look at the image; the others are 0."""
REASONING = (
    "The {region} was followed from slice to slice and compared with the tissue around it. Signal and outline were "
    "looked at in all three planes before the finding was graded, and its largest extent was marked in voxels."
)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--volumes", type=int, default=VOLUMES)
    parser.add_argument("--draws", type=int, default=10_000)
    parser.add_argument("--out", type=Path, help="keep the runs here, and use those that are here already")
    parser.add_argument("--step", choices=[*SKILLS, MEASURE], help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.step in SKILLS:
        write(options.out / options.step, options.step, options.volumes)
    elif options.step:
        print(json.dumps(measure(options.out, options.draws)))
    else:
        with tempfile.TemporaryDirectory() as folder:
            report(options.out or Path(folder), options.volumes, options.draws)


def report(out: Path, volumes: int, draws: int) -> None:
    """Make the runs, do the phases, print."""
    for name in SKILLS:
        if not (out / name / "run.json").exists():
            fresh_process(name, out, volumes, draws)
    answers = sum(json.loads((out / name / "run.json").read_text())["n"] for name in SKILLS)
    print(
        f"{answers:,} answers of {len(SKILLS)} runs, {draws:,} draws; one thread of {platform.machine()}, load average "
        f"{os.getloadavg()[0]:.1f} on {os.cpu_count()} cores"
    )
    print(f"{'phase':12}{'seconds':>9}{'CPU s':>9}{'answers/s':>12}{'peak GB':>9}")
    laps = json.loads(fresh_process(MEASURE, out, volumes, draws))
    for lap in laps:
        print_lap(answers, *lap)
    seconds, cpu = (sum(lap[i] for lap in laps) for i in (1, 2))
    peak = laps[-1][3]
    print_lap(answers, "everything", seconds, cpu, peak)
    for value, target, unit in ((seconds, SECONDS, "s"), (peak, GB, "GB")):
        print(f"target {target:g} {unit}: {'holds' if value <= target else 'MISSED'} ({value:.2f} {unit})")


def print_lap(answers: int, phase: str, seconds: float, cpu: float, peak: float) -> None:
    print(f"{phase:12}{seconds:9.1f}{cpu:9.1f}{answers / seconds:12,.0f}{peak:9.2f}", flush=True)


def fresh_process(step: str, out: Path, volumes: int, draws: int) -> str:
    """One step in a process of its own; what it printed."""
    words = ["--step", step, "--out", str(out), "--volumes", str(volumes), "--draws", str(draws)]
    done = subprocess.run(
        [sys.executable, __file__, *words],
        env={**os.environ, **ONE_THREAD},  # read when numpy and polars are imported
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    return done.stdout


def measure(out: Path, draws: int) -> list[tuple[str, float, float, float]]:
    """(phase, seconds, seconds on the processor, peak of memory in GB) of each phase."""
    laps = []
    before = time.perf_counter(), time.process_time()
    for phase in phases(out, draws):
        now = time.perf_counter(), time.process_time()
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9
        laps.append((phase, now[0] - before[0], now[1] - before[1], peak))
        before = now
    return laps


def phases(out: Path, draws: int) -> Iterator[str]:
    """What `reasonknee compare` does with two runs; the name of each phase when it is done."""
    runs = [read_run(out / name) for name in SKILLS]
    yield "reading"
    graded = [grade_run(run) for run in runs]
    yield "grading"
    for run in graded:
        tables(run)
    yield "tables"
    check_same_items(*runs)
    compare_graded(*graded, CompareConfig(bootstrap_draws=draws))
    yield "comparison"


def write(folder: Path, name: str, volumes: int) -> None:
    """A made-up run about this many volumes."""
    meta = RunMeta(
        name=name,
        model="made up",
        adapter=None,
        split_file="test.json",
        question_ids=QUESTION_IDS,
        reader="strict",
        reasoning="required",
        decoding={"temperature": 0.0, "max_tokens": 256},
        config_hash="none",
        dataset_fingerprint="made up",
        n=0,
    )
    write_run(folder, rows(name, volumes), meta)


def rows(name: str, volumes: int) -> Iterator[AnswerRow]:
    """The truths are the same in every run of as many volumes, the answers are its own."""
    rng, answering = np.random.default_rng(0), np.random.default_rng(list(name.encode()))
    patients = max(1, volumes * PATIENTS // VOLUMES)
    for number in range(volumes):
        visit, patient = divmod(number, patients)
        volume_id = f"{9_000_000 + patient}_{VISITS[visit]}_20040915_{10_000_000 + number}_{1 + patient % 2}"
        volume = VolumeRef(volume_id, f"/data/images/{volume_id}.nii.gz", None, SHAPE, SPACING)
        for question_id in QUESTION_IDS:
            question = QUESTIONS[question_id]
            low, size = rng.integers(20, 60, 3), rng.integers(10, 60, 3)
            # heavy on 0, as the released grades are
            grades = {a.name: int(len(a.grades) * rng.random() ** 3) for a in question.attributes}
            example = Example(
                example_id=f"{volume_id}_{question_id}",
                volume=volume,
                question=question,
                truth=Truth(grades, box(low, size) if rng.random() < 0.98 else None),
                patient_id=str(9_000_000 + patient),
                visit=VISITS[visit],
                side="left" if patient % 2 else "right",
            )
            found = box(low + answering.integers(0, 12, 3), size)
            yield answer_row(example, *answer(example, found, SKILLS[name], answering), "strict")


def answer(example: Example, found: Box3D, skill: float, rng: np.random.Generator) -> tuple[str, str]:
    """A completion and why it ended; one in twenty cannot be read, in one way or another."""
    grades = {name: grade if rng.random() < skill else 0 for name, grade in example.truth.grades.items()}
    text = format_answer(example.question, grades, found, REASONING.format(region=example.question.region))
    fate = rng.random()
    if fate < 0.02:
        return text[: int(len(text) * rng.random())], "length"
    if fate < 0.03:
        return f"I cannot grade this. {text}", "stop"
    if fate < 0.04:
        return text.replace("MOAKS_scores", "scores"), "stop"
    if fate < 0.05:
        return text.replace('"bbox": [', '"bbox": [999, '), "stop"
    return text, "stop"


def box(low: np.ndarray, size: np.ndarray) -> Box3D:
    return Box3D.from_corners(low.tolist(), (low + size).tolist())


if __name__ == "__main__":
    main()
