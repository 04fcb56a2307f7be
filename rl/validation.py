"""The benchmark on a fixed part of the validation split while GRPO trains, and the best adapter by it.

Greedy answers to the same questions every time, graded by the evaluator of the final benchmark: the training reward
says whether GRPO optimises, this says whether the model gets better on patients it does not train on.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

from accelerate import Accelerator
from accelerate.utils import gather_object

from rl.answering import ask, run_meta
from rl.bench.answers import make_run
from rl.bench.endpoints import parse_endpoint
from rl.bench.metrics import grade_run, tables
from rl.choices import OWN_PROMPTS
from rl.config import Config, ConfigError
from rl.errors import staged_folder
from rl.task import Task
from rollouts.types import Engine

MEASURES = ("balanced_accuracy", "accuracy", "iou", "strict")
"""Logged as `validation/<measure>`, beside the primary endpoint where it is another."""
_STATE = "best.json"


class Validation:
    """`grpo.eval_examples` questions, spread evenly over the validation split.

    Raises:
        ConfigError: the validation file holds no questions.
    """

    def __init__(self, config: Config) -> None:
        as_trained = replace(config.eval, split="val", image="volume", prompts=OWN_PROMPTS, temperature=0.0)
        self.config = replace(config, eval=as_trained)
        self.task = Task(config, "val")
        count = len(self.task.examples)
        if not count:
            raise ConfigError("the validation file has no question to validate on; check data.val_file")
        asked = min(count, config.grpo.eval_examples)
        self.chosen = [i * count // asked for i in range(asked)]
        self.endpoints = tuple(dict.fromkeys([*MEASURES, config.compare.primary_endpoint]))

    def run(self, engine: Engine, accelerator: Accelerator) -> dict[str, float]:
        """`validation/<measure>` over all questions, each rank asking its share; empty on ranks other than 0."""
        indices = self.chosen[accelerator.process_index :: accelerator.num_processes]
        rows = ask(self.config, self.task, engine, indices)
        everywhere = gather_object(rows)
        if not accelerator.is_main_process:
            return {}
        meta = run_meta(self.config, "validation", self.config.model.path, None, self.task.examples)
        values = tables(grade_run(make_run(everywhere, meta))).values
        found = {}
        for endpoint in self.endpoints:
            measure, column = parse_endpoint(endpoint)
            value = values[measure][column].value
            if value is not None:
                found[f"validation/{endpoint}"] = value
        return found


class Best:
    """The best adapter so far by the primary endpoint, a copy of it in `folder` with its step and value.

    Args:
        goes_on: whether the run is continued; what a former one has left in `folder` counts then. It may be of a later
            step than the checkpoint, which is made again.
    """

    def __init__(self, folder: Path, endpoint: str, *, goes_on: bool) -> None:
        self.folder, self.metric = folder, f"validation/{endpoint}"
        found = goes_on and (folder / _STATE).is_file()
        self.state: dict[str, float] = json.loads((folder / _STATE).read_text()) if found else {}
        """`step` and `value` of the best; empty before the first validation."""

    def offer(self, step: int, validation: dict[str, float], adapter: Path) -> None:
        """Keep a copy of `adapter` if it is the first or better than all before; the earlier of equals stays.

        Raises:
            ConfigError: the endpoint has no value on these questions.
        """
        if self.metric not in validation:
            raise ConfigError(
                f"compare.primary_endpoint: {self.metric} has no value on the questions of the validation split; "
                "choose another endpoint, raise grpo.eval_examples or set grpo.eval_steps to 0"
            )
        value = validation[self.metric]
        if not self.state or value > self.state["value"]:
            self.state = {"step": step, "value": value}
            with staged_folder(self.folder) as staging:
                shutil.copytree(adapter, staging)
                (staging / _STATE).write_text(json.dumps(self.state))

    def restore(self, adapter: Path) -> None:
        """Make the best adapter the one in `adapter`."""
        with staged_folder(adapter) as staging:
            shutil.copytree(self.folder, staging, ignore=shutil.ignore_patterns(_STATE))
