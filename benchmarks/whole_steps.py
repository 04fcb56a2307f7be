"""Whole steps of `reasonknee grpo` by the clock.

    OMP_WAIT_POLICY=PASSIVE python benchmarks/whole_steps.py [--visual-tokens 2000] [--generations 8]
        [--questions 1 4] [--steps 6] [--out docs/performance]

The model of `train_step.py` and `rollout_speed.py` (35 million parameters, random weights, LoRA r = 16) is asked about
one phantom a step and answers with 96 tokens; rewards are read from the completions, advantages formed, the adapter
trained, saved and handed to the engine, completions and metrics written. Seconds are those between the records of two
steps. Questions are the benchmark's own prompts and about twice as long as those of the other two, which time the parts
beside stock TRL and vLLM.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

from middle_model import PIXELS_PER_TOKEN, SLICES_AND_SIDE, build_model
from performance_page import update_page
from transformers import AutoTokenizer

from rl.base.model import save_base
from rl.config_check import load_valid
from rl.model import resolve_model
from rl.stages import STAGES, run_stage

COMPLETION_TOKENS = 96
PARTS = {"sampling": "rollout", "rewards": "reward", "training": "train", "new adapter": "sync"}
"""Of a step -> of which time its metrics tell."""


def settings(folder: Path, visual_tokens: int, generations: int, steps: int) -> list[str]:
    """What a recipe of such a run would say."""
    slices, side = SLICES_AND_SIDE[visual_tokens]
    letters = Path(__file__).resolve().with_name("letters_reward.py")
    names = ("output_format", "moaks_accuracy", "box_iou", f"{letters}:letters")
    components = ", ".join(f"{{name: '{name}'}}" for name in names)
    return [
        f"data.root={folder}/data",
        *(f"phantom.{split}_patients=2" for split in ("train", "val", "test")),
        f"phantom.shape=[96,96,{2 * slices}]",
        f"view.height={side * PIXELS_PER_TOKEN}",
        f"view.width={side * PIXELS_PER_TOKEN}",
        f"embed.cache_dir={folder}/cache",
        f"model.path={folder}/base",
        "engine.max_model_len=10000",
        "engine.kv_cache_gib=2.0",
        f"rewards.components=[{components}]",
        f"grpo.init_adapter={folder}/adapter",
        f"grpo.num_generations={generations}",
        "grpo.volumes_per_step=1",
        f"grpo.max_completion_length={COMPLETION_TOKENS}",
        "grpo.mask_truncated_completions=false",  # random weights end no answer
        f"grpo.max_steps={steps}",
        f"grpo.save_steps={steps}",
    ]


def measure(folder: Path, shared: Sequence[str], questions: int) -> dict[str, Any]:
    """Seconds of every step but the first, in which kernels are loaded, and of its parts."""
    run_dir = folder / f"questions-{questions}"
    asked = [*shared, f"run_dir={run_dir}", f"grpo.questions_per_volume={questions}"]
    run_stage(load_valid(None, asked), STAGES["grpo"])
    records = [json.loads(line) for line in (run_dir / "grpo" / "metrics.jsonl").read_text().splitlines()]
    times = [record["time"] for record in records]
    return {
        "seconds": [after - before for before, after in zip(times, times[1:], strict=False)],
        "parts": {
            part: [record[f"seconds/{key}"] for record in records[1:]] for part, key in PARTS.items()
        },
    }


def section(cells: Sequence[dict[str, Any]]) -> str:
    """The cells as a table."""
    lines = [
        f"| visual tokens | G | questions | seconds | an hour | {' | '.join(PARTS)} | rest |",
        f"|---|---|---|---|---|{'---|' * len(PARTS)}---|",
    ]
    for cell in cells:
        seconds = cell["seconds"]
        shares = [sum(cell["parts"][part]) / sum(seconds) for part in PARTS]
        lines.append(
            f"| {cell['visual_tokens']:,} | {cell['generations']} | {cell['questions']} | "
            f"{median(seconds):.2f} ({min(seconds):.2f} to {max(seconds):.2f}) | {3600 / median(seconds):.0f} | "
            f"{' | '.join(f'{share:.1%}' for share in (*shares, 1 - sum(shares)))} |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--visual-tokens", type=int, default=2000, choices=sorted(SLICES_AND_SIDE))
    parser.add_argument("--generations", type=int, default=8)
    parser.add_argument("--questions", type=int, nargs="+", default=[1, 4])
    parser.add_argument("--steps", type=int, default=6, help="timed steps; one more is run before them")
    parser.add_argument("--out", type=Path, help="page to bring up to date, without its ending")
    options = parser.parse_args()
    with TemporaryDirectory() as name:
        folder = Path(name)
        model = build_model()
        model.save_pretrained(folder / "adapter")
        save_base(folder / "base", model.unload(), AutoTokenizer.from_pretrained(resolve_model("builtin:base")))
        shared = settings(folder, options.visual_tokens, options.generations, options.steps + 1)
        for stage in ("phantom", "embed"):
            run_stage(load_valid(None, [*shared, f"run_dir={folder}"]), STAGES[stage])
        for questions in options.questions:
            sizes = {"visual_tokens": options.visual_tokens, "generations": options.generations}
            cell = {**sizes, "questions": questions, **measure(folder, shared, questions)}
            print(section([cell]), flush=True)
            if options.out:
                key = f"{options.visual_tokens}-{options.generations}-{questions}"
                update_page(options.out, "whole_steps", key, cell, section)


if __name__ == "__main__":
    main()
