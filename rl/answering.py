"""Asking a model the benchmark's questions: its answers as the rows of a run, and what the run says of itself."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict

from rl.bench.answers import AnswerRow, RunMeta, answer_row
from rl.choices import reader_of, reasoning_of, split_of
from rl.config import Config
from rl.data.examples import Examples
from rl.data.layout import item_file_name
from rl.task import Task
from rollouts.types import Engine, Sampling


def ask(config: Config, task: Task, engine: Engine, indices: Sequence[int]) -> list[AnswerRow]:
    """One answer to each of the task's examples at `indices`, decoded as `config.eval` says."""
    sampling = Sampling(temperature=config.eval.temperature, max_tokens=config.eval.max_completion_length)
    prompts = [task.prompt(i, sampling.max_tokens) for i in indices]
    groups = engine.generate(prompts, 1, sampling, [config.seed + i for i in indices]) if prompts else []
    rows = []
    for i, group in zip(indices, groups, strict=True):
        (rollout,) = group.rollouts
        rows.append(answer_row(task.examples[i], rollout.text, rollout.finish_reason, reader_of(config)))
    return rows


def run_meta(config: Config, name: str, model: str, adapter: str | None, examples: Examples) -> RunMeta:
    """What a reader must know of a run; the comparison checks it."""
    content = json.dumps(asdict(config), sort_keys=True, default=str)
    return RunMeta(
        name=name,
        model=model,
        adapter=adapter,
        split_file=item_file_name(config, split_of(config)),
        question_ids=tuple(sorted(set(examples.column("question_id")))),
        reader=reader_of(config),
        reasoning=reasoning_of(config),
        decoding={"temperature": config.eval.temperature, "max_tokens": config.eval.max_completion_length},
        config_hash=hashlib.blake2b(content.encode(), digest_size=8).hexdigest(),
        dataset_fingerprint=examples.fingerprint,
        n=len(examples),
        max_examples=config.eval.max_examples,
    )
