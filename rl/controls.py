"""Control arms: what else the time GRPO took could have been spent on.

- SFT continued: the SFT adapter trained on for GRPO's wall-clock.
- Best of G: G completions of the SFT policy for the prompts GRPO would have drawn, the best of each kept, and the SFT
  adapter trained on those for the time that is left (rejection sampling fine-tuning, arXiv 2304.06767).
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path

from rewards.reading import format_answer
from rewards.suite import RewardSuite
from rl.choices import reasoning_of
from rl.config import Config
from rl.sft import train_sft
from rl.task import Task
from rl.training import write_atomically
from rollouts.prompts import question_text
from rollouts.requests import group_seed
from rollouts.types import Engine, Sampling

SFT_CONTINUED, BEST_OF_G = "SFT continued", "SFT on best of G"


def grpo_seconds(config: Config) -> float:
    """Wall-clock of the GRPO run's steps, validation left out (as in `sft.max_seconds`)."""
    lines = (Path(config.run_dir) / "grpo" / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return sum(json.loads(line).get("seconds", 0.0) for line in lines)


def continue_sft(config: Config, seconds: float, stage: str = "sft-continued") -> Path:
    """Train the SFT adapter on for `seconds`, without early stopping. Returns the best adapter by validation loss."""
    longer = deepcopy(config)
    longer.sft.init_adapter = str(Path(config.run_dir) / "sft" / "adapter")
    longer.sft.max_seconds = seconds
    longer.sft.max_epochs = longer.sft.patience = 1_000_000
    longer.sft.warmup_ratio = 0.0
    return train_sft(longer, stage=stage)


def train_on_best_of_g(
    config: Config,
    engine: Engine,
    seconds: float,
    on_step: Callable[[int, int], None] = lambda done, total: None,
) -> Path:
    """Sample, keep the best, train on it; sampling and training together take `seconds`. Returns the adapter."""
    started = time.monotonic()
    name = f"best_of_{config.grpo.num_generations}_seed{config.seed}.json"
    items = best_of_g(config, engine, on_step)
    write_atomically(Path(config.data.root) / "generate_data" / name, json.dumps(items))
    chosen = deepcopy(config)
    chosen.data.train_file = name
    left = max(1.0, seconds - (time.monotonic() - started))  # 0 would mean no limit
    return continue_sft(chosen, left, stage="sft-best-of-g")


def best_of_g(
    config: Config, engine: Engine, on_step: Callable[[int, int], None] = lambda done, total: None
) -> list[dict[str, str]]:
    """The best of G completions for each prompt GRPO would draw, as items of the dataset's own form.

    Completions that cannot be read whole are no candidates; a question none of whose completions can be is left out.
    """
    grpo = config.grpo
    task = Task(config, "train")
    suite = RewardSuite.from_config(config.rewards, reasoning=reasoning_of(config))
    sampler = task.sampler(config.seed, balance=grpo.balance)
    sampling = Sampling(temperature=grpo.temperature, max_tokens=grpo.max_completion_length)
    engine.load_adapter(Path(config.run_dir) / "sft" / "adapter")
    best: dict[int, tuple[float, dict[str, str]]] = {}
    for step in range(grpo.max_steps):
        drawn = sampler.draw(step, grpo.volumes_per_step, grpo.questions_per_volume)
        indices = [i for questions in drawn for i in questions]
        prompts = [task.prompt(i, grpo.max_completion_length) for i in indices]
        seeds = [group_seed(config.seed, step, prompt.example_id) for prompt in prompts]
        groups = engine.generate(prompts, grpo.num_generations, sampling, seeds)
        for i, group in zip(indices, groups, strict=True):
            example = task.examples[i]
            for row in suite.score_group(example, [r.text for r in group.rollouts]):
                answer = row.answer
                if answer.ok and (i not in best or row.total > best[i][0]):
                    diagnosis = format_answer(example.question, answer.grades, answer.bbox)
                    item = {
                        "image": str(Path(example.volume.image_path).relative_to(task.examples.root)),
                        "prompt": question_text(example.question),
                        "answer": answer.reasoning,
                        "final_diagnosis": diagnosis,
                    }
                    best[i] = (row.total, item)
        on_step(step + 1, grpo.max_steps)
    return [item for _, item in best.values()]
