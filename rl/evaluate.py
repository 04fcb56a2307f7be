"""ReasonKnee-Bench on a trained model: answers of an engine, recorded item by item."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from itertools import groupby
from pathlib import Path

from rl.answering import Exam, ask, run_meta
from rl.bench.answers import BenchRun, answer_row, write_run
from rl.bench.baselines import BASELINE_MODEL, PRIOR_MODEL, baseline_rows, fit_baselines, prior_rows
from rl.bench.journal import Entry, Journal
from rl.choices import reader_of, reasoning_of, split_of
from rl.config import Config
from rl.data.examples import Examples, load_examples
from rl.stage_inputs import Inputs
from rl.stages import eval_inputs, read_record, write_record
from rollouts.types import Engine

RECORD = "made-from.json"
"""Beside a run's answers: what they were made from."""

OnProgress = Callable[[int, int], None]
"""Called with (answers done, answers in all)."""


def evaluate(
    config: Config,
    engine: Engine,
    name: str,
    adapter: Path | None,
    folder: Path,
    on_progress: OnProgress = lambda done, total: None,
) -> BenchRun:
    """Ask every question of the split, in the setting that `config.eval` names; write `answers.parquet` and `run.json`.

    Answers go into `journal.jsonl` beside them as they come; those it has, from the same inputs, are not asked for.

    Args:
        name: how tables call this run.
        adapter: PEFT folder; None for the bare base model.

    Raises:
        EngineError: see `Engine`; the answers up to there are in the journal.
        rl.bench.journal.JournalError: a damaged line in the journal.
    """
    started = time.monotonic()
    exam = Exam(config)
    examples = limited(config, exam.examples)
    engine.load_adapter(adapter)
    made_from = _inputs(config, adapter)
    content = json.dumps(asdict(made_from), sort_keys=True)
    asked_of = hashlib.blake2b(content.encode(), digest_size=16).hexdigest()
    keys = [f"{asked_of}-{i}" for i in range(len(examples))]  # the position is part of an answer's seed
    journal = Journal(folder / "journal.jsonl")
    for part in whole_volumes(examples.column("volume_id"), exam.prompts_at_once):
        missing = [i for i in part if keys[i] not in journal]
        for i, row in zip(missing, ask(config, exam, engine, missing), strict=True):
            journal.append(Entry(keys[i], row.example_id, row.completion, row.finish_reason))
        on_progress(part.stop, len(examples))
    rows = [
        answer_row(example, journal[key].completion, journal[key].finish_reason, reader_of(config))
        for example, key in zip(examples, keys, strict=True)
    ]
    meta = run_meta(config, name, config.model.path, str(adapter) if adapter else None, examples)
    run = write_run(folder, rows, meta)
    write_record(folder / RECORD, made_from, done=True, seconds=time.monotonic() - started)
    return run


def whole_volumes(volume_ids: Sequence[str], at_once: int) -> list[range]:
    """The positions of items in parts of at most `at_once` (or one volume, if that is more).

    Items of a volume that follow each other stay in one part, which an engine pool gives to one engine: it takes the
    volume up once.
    """
    parts: list[range] = []
    stop = 0
    for _, items in groupby(volume_ids):
        start, stop = stop, stop + len(list(items))
        if parts and stop - parts[-1].start <= at_once:
            parts[-1] = range(parts[-1].start, stop)
        else:
            parts.append(range(start, stop))
    return parts


def is_current(config: Config, adapter: Path | None, folder: Path) -> bool:
    """Whether `folder` holds this model's answers, to these questions and with these settings."""
    return read_record(folder / RECORD) == (_inputs(config, adapter), True)


def _inputs(config: Config, adapter: Path | None) -> Inputs:
    return eval_inputs(config, {"this run": adapter} if adapter else {})


def evaluate_baselines(config: Config, folder: Path) -> dict[str, BenchRun]:
    """What never sees the image, graded like a model: the runs `baseline` and `prior` under `folder`."""
    examples = limited(config, load_examples(config, split_of(config)))
    fitted = fit_baselines(load_examples(config, "train"))
    how = reader_of(config), reasoning_of(config)
    made = {
        "baseline": (BASELINE_MODEL, baseline_rows(fitted, examples, *how)),
        "prior": (PRIOR_MODEL, prior_rows(fitted, examples, *how, config.seed)),
    }
    return {
        name: write_run(folder / name, rows, run_meta(config, name, model, None, examples).not_asked())
        for name, (model, rows) in made.items()
    }


def limited(config: Config, examples: Examples) -> Examples:
    """The first `eval.max_examples` examples; all when it is 0."""
    limit = config.eval.max_examples
    return examples[:limit] if limit else examples
