"""Control arms: what else the time GRPO took could have been spent on.

- SFT-continued: the SFT adapter trained on, as SFT trains.
- SFT-best-of-G: G completions of the SFT policy for the prompts GRPO drew, the best of each kept, and the SFT adapter
  trained on those for the time that is left (rejection sampling fine-tuning, arXiv 2304.06767).

Both take the wall-clock of the GRPO run's steps, in one process each. It is counted in optimizer steps, at the seconds
a step took in SFT, so that the schedule of the learning rate comes to its end. It is GRPO's schedule, on SFT's rate: a
rate that falls to 0 is worth something by itself.
"""

from __future__ import annotations

import json
import math
import time
from copy import deepcopy
from pathlib import Path
from typing import Any

from rewards.boxes import Box3D
from rewards.reading import format_answer
from rewards.suite import RewardRow, RewardSuite
from rewards.types import Answer, Example
from rl.choices import reasoning_of
from rl.config import Config
from rl.data.boxes import Convention, box_to_text, parse_convention
from rl.engine import start_engine
from rl.errors import write_atomically
from rl.sft import train_sft
from rl.task import Task
from rl.training import OnMetrics
from rollouts.prompts import question_text
from rollouts.requests import group_seed
from rollouts.types import Engine, Sampling

VALIDATIONS = 10
"""How often a control arm looks at the validation loss; the best adapter is kept."""


def grpo_seconds(config: Config) -> float:
    """Wall-clock of the GRPO run's steps, validation left out."""
    return sum(record.get("seconds", 0.0) for record in metrics_of(config, "grpo"))


def continue_sft(config: Config, on_metrics: OnMetrics) -> Path:
    """Train the SFT adapter on. Returns the best adapter by validation loss."""
    return _train_on(config, grpo_seconds(config), "sft-continued", on_metrics)


def train_on_best_of_g(config: Config, on_metrics: OnMetrics) -> Path:
    """Sample, keep the best, train on it. Returns the best adapter by validation loss."""
    stage = "sft-best-of-g"
    items, seconds = _sampled(config, Path(config.run_dir).absolute() / stage, on_metrics)
    chosen = deepcopy(config)
    chosen.sft.train_file = str(items)
    chosen.data.box_source = "text"  # the sampled boxes, and the validation file's own
    return _train_on(chosen, grpo_seconds(config) - seconds, stage, on_metrics)


def _train_on(config: Config, seconds: float, stage: str, on_metrics: OnMetrics) -> Path:
    """As many steps from the SFT adapter as SFT made in `seconds`, at least one."""
    last = [record for record in metrics_of(config, "sft") if "seconds" in record][-1]
    steps = max(1, round(seconds * last["step"] / last["seconds"]))
    longer = deepcopy(config)
    sft = longer.sft
    sft.init_adapter = str(Path(config.run_dir) / "sft" / "adapter")
    sft.lr_scheduler_type = config.grpo.lr_scheduler_type
    sft.max_epochs = sft.patience = min(VALIDATIONS, steps)
    sft.steps_per_epoch = math.ceil(steps / sft.max_epochs)
    return train_sft(longer, on_metrics, stage)


def _sampled(config: Config, folder: Path, on_metrics: OnMetrics) -> tuple[Path, float]:
    """The file of `best_of_g` and the seconds it took, which are not spent again when a run goes on."""
    items, record = folder / "best_of_g.json", folder / "sampling.json"
    if not record.exists():
        folder.mkdir(parents=True, exist_ok=True)
        engine = start_engine(config)
        try:
            engine.load_adapter(Path(config.run_dir) / "sft" / "adapter")
            started = time.monotonic()
            write_atomically(items, json.dumps(best_of_g(config, engine, on_metrics)))
            seconds = time.monotonic() - started
        finally:
            engine.close()
        write_atomically(record, json.dumps({"seconds": seconds}))
    return items, json.loads(record.read_text(encoding="utf-8"))["seconds"]


def best_of_g(
    config: Config, engine: Engine, on_metrics: OnMetrics = lambda record: None
) -> list[dict[str, str]]:
    """The best of G completions of the engine's adapter for each prompt GRPO draws, as items of the dataset's own form.

    No candidates are completions that cannot be read whole, or whose box leaves the volume; a question without any is
    left out.
    """
    grpo = config.grpo
    task = Task(config, "train")
    suite = RewardSuite.from_config(config.rewards, reasoning=reasoning_of(config))
    sampler = task.sampler(config.seed, balance=grpo.balance)
    sampling = Sampling(temperature=grpo.temperature, max_tokens=grpo.max_completion_length)
    best: dict[int, RewardRow] = {}
    for step in range(grpo.max_steps):
        drawn = sampler.draw(step, grpo.volumes_per_step, grpo.questions_per_volume)
        indices = [i for questions in drawn for i in questions]
        prompts = [task.prompt(i, grpo.max_completion_length) for i in indices]
        seeds = [group_seed(config.seed, step, prompt.example_id) for prompt in prompts]
        groups = engine.generate(prompts, grpo.num_generations, sampling, seeds)
        for i, group in zip(indices, groups, strict=True):
            example = task.examples[i]
            for row in suite.score_group(example, [r.text for r in group.rollouts]):
                box = row.answer.bbox
                fits = row.answer.ok and (box is None or box.inside(example.volume.shape))
                if fits and (i not in best or row.total > best[i].total):
                    best[i] = row
        on_metrics({"step": step + 1, "steps": grpo.max_steps})
    convention = parse_convention(config.data.box_convention)
    return [as_item(task.examples[i], row.answer, task.examples.root, convention) for i, row in best.items()]


def as_item(example: Example, answer: Answer, root: Path, convention: Convention) -> dict[str, str]:
    """An answer as the dataset would write it as the truth: its box follows the dataset's convention."""
    box = answer.bbox
    if box is not None:
        box = Box3D.from_text(box_to_text(box, example.volume.shape, convention))
    return {
        "image": str(Path(example.volume.image_path).relative_to(root)),
        "prompt": question_text(example.question),
        "answer": answer.reasoning,
        "final_diagnosis": format_answer(example.question, answer.grades, box),
    }


def metrics_of(config: Config, stage: str) -> list[dict[str, Any]]:
    """The records of a stage's metrics.jsonl."""
    lines = (Path(config.run_dir) / stage / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]
