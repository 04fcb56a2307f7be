"""Whole steps of `reasonknee grpo` by the clock.

    python benchmarks/whole_steps.py [--visual-tokens 2000] [--generations 8]
        [--questions 1 4] [--steps 6] [--out docs/performance]

The model of `train_step.py` and `rollout_speed.py` (35 million parameters, random weights, LoRA r = 16) is asked about
one phantom a step and answers with 96 tokens; rewards are read from the completions, advantages formed, the adapter
trained, saved and handed to the engine, completions and metrics written. Seconds are those between the records of two
steps. Questions are the benchmark's own prompts and about twice as long as those of the other two, which time the parts
beside stock TRL and vLLM. Last, `reasonknee plan` is asked about each run in the light of each other, as a user asks it
who has run one recipe and thinks of the next.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

from evidence import PARTS
from middle_model import PIXELS_PER_TOKEN, SLICES_AND_SIDE, build_model
from performance_page import at_least, page_with, spread, update_page
from transformers import AutoTokenizer

from rl.base.model import save_base
from rl.config import Config
from rl.config_check import load_valid
from rl.controls import metrics_of
from rl.model import resolve_model
from rl.plan.estimate import make_plan
from rl.plan.hardware import Hardware, measured
from rl.stages import STAGES, run_stage

COMPLETION_TOKENS = 96


def settings(folder: Path, visual_tokens: int, generations: int, steps: int) -> list[str]:
    """What a recipe of such a run would say."""
    slices, side = SLICES_AND_SIDE[visual_tokens]
    stride = max(1, 8 // slices)  # with fewer slices in the file, a phantom would lack regions
    letters = Path(__file__).resolve().with_name("letters_reward.py")
    names = ("output_format", "moaks_accuracy", "box_iou", f"{letters}:letters")
    components = ", ".join(f"{{name: '{name}'}}" for name in names)
    return [
        f"data.root={folder}/data",
        *(f"phantom.{split}_patients={n}" for split, n in (("train", 2), ("val", 1), ("test", 1))),
        "phantom.max_visits=1",
        f"phantom.shape=[96,96,{2 * slices * stride}]",
        f"view.slice_stride={stride}",
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


def measure(config: Config) -> dict[str, Any]:
    """Seconds of every step but the first, in which kernels are loaded, and of its parts."""
    run_stage(config, STAGES["grpo"])
    records = metrics_of(config, "grpo")
    times = [record["time"] for record in records]
    return {
        "seconds": [after - before for before, after in pairwise(times)],
        "parts": {part: [record[f"seconds/{key}"] for record in records[1:]] for part, key in PARTS.items()},
    }


def planned(config: Config, known: Config, hardware: Hardware) -> dict[str, float]:
    """Seconds of a step's parts that the plan foretells, when a run of another recipe is known."""
    plan = make_plan(replace(config, run_dir=known.run_dir), hardware)
    return {"sampling": plan.rollout_s, "training": plan.train_s}


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
            f"{spread(seconds, 2)} | {3600 / median(seconds):.0f} | "
            f"{' | '.join(f'{share:.1%}' for share in (*shares, 1 - sum(shares)))} |"
        )
    plans = []
    for cell in cells:
        for questions, plan in cell["planned"].items():
            seconds = ((plan[part], median(cell["parts"][part])) for part in plan)
            told = " | ".join(f"{expected:.2f} s | {found:.2f} s" for expected, found in seconds)
            plans.append(f"| {cell['questions']} a volume | {questions} | {told} |")
    if plans:
        head = "| planned for | from the run with | sampling, planned | found | training, planned | found |"
        lines += ["", head, "|---|---|---|---|---|---|", *plans]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--visual-tokens", type=int, default=2000, choices=sorted(SLICES_AND_SIDE))
    parser.add_argument("--generations", type=at_least(2), default=8)
    parser.add_argument("--questions", type=at_least(1), nargs="+", default=[1, 4])
    parser.add_argument(
        "--steps", type=at_least(1), default=6, help="timed steps; one more is run before them"
    )
    parser.add_argument(
        "--out", type=page_with("whole_steps"), help="page to bring up to date, without its ending"
    )
    options = parser.parse_args()
    with TemporaryDirectory() as name:
        folder = Path(name)
        model = build_model()
        model.save_pretrained(folder / "adapter")
        save_base(
            folder / "base", model.unload(), AutoTokenizer.from_pretrained(resolve_model("builtin:base"))
        )
        shared = settings(folder, options.visual_tokens, options.generations, options.steps + 1)
        for stage in ("phantom", "embed"):
            run_stage(load_valid(None, [*shared, f"run_dir={folder}"]), STAGES[stage])
        configs = {
            questions: load_valid(
                None,
                [*shared, f"run_dir={folder}/{questions}", f"grpo.questions_per_volume={questions}"],
            )
            for questions in options.questions
        }
        sizes = {"visual_tokens": options.visual_tokens, "generations": options.generations}
        cells = [{**sizes, "questions": n, **measure(config)} for n, config in configs.items()]
        hardware = measured(next(iter(configs.values())))
        for cell in cells:
            asked = configs[cell["questions"]]
            others = {n: known for n, known in configs.items() if known is not asked}
            cell["planned"] = {n: planned(asked, known, hardware) for n, known in others.items()}
    print(section(cells))
    for cell in cells if options.out else ():
        key = f"{options.visual_tokens}-{options.generations}-{cell['questions']}"
        update_page(options.out, "whole_steps", key, cell, section)


if __name__ == "__main__":
    main()
