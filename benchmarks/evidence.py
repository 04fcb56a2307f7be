"""Does GRPO beat SFT on held-out phantom patients? Three seeds, two control arms, every figure as it came out.

    python benchmarks/evidence.py [--config configs/evidence.yaml] [--seeds 0,1,2] [--jobs 2] [--overlapped]
        [--out runs/evidence] [key=value ...]

`--jobs` seeds are trained at once, each on its share of the cores: small models gain more from that than from threads.
What they print goes to OUT/seed-N.log. One dataset and one embedding cache serve all seeds. For each seed: SFT until
validation stops improving, GRPO, and two control arms that take GRPO's wall-clock, SFT continued and SFT on the best of
G samples (`reasonknee controls`); with `--overlapped` also GRPO on rollouts one update old (`grpo.overlap`). Then the
benchmark for all arms and the baselines, and paired comparisons with SFT and with the baselines.
Finished parts are skipped when it is run again. Writes docs/evidence.md and docs/evidence.json.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from copy import deepcopy
from pathlib import Path

from rl.bench.answers import BenchRun, read_run
from rl.bench.compare import Comparison, Difference, compare, outcome, signed
from rl.bench.metrics import grade_run, tables
from rl.bench.seeds import seed_summary
from rl.config import Config, load_config
from rl.config_check import validate
from rl.controls import grpo_seconds, metrics_of
from rl.engine import start_engine
from rl.evaluate import evaluate
from rl.pipeline import BASELINE, BEST_OF_G, GRPO, SFT, SFT_CONTINUED, read_runs
from rl.progress import StageProgress
from rl.stages import CONTROLS, STAGES, run_stage

OVERLAPPED = "GRPO-overlapped"
PAIRS = (
    *((SFT, GRPO), (SFT, SFT_CONTINUED), (SFT, BEST_OF_G), (SFT_CONTINUED, GRPO), (BEST_OF_G, GRPO)),
    *((SFT, OVERLAPPED), (GRPO, OVERLAPPED), (BASELINE, SFT), (BASELINE, GRPO)),
)
ENDPOINTS = (("balanced_accuracy", "balanced accuracy"), ("iou", "mean IoU"))
PARTS = {"sampling": "rollout", "rewards": "reward", "training": "train", "handing over the adapter": "sync"}
"""Of a GRPO step -> of which time its metrics tell."""
DOCS = Path(__file__).parents[1] / "docs"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config", type=Path, default=Path("configs/evidence.yaml"))
    parser.add_argument("--seeds", default="0,1,2", metavar="0,1,2")
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--overlapped", action="store_true", help="an arm more: GRPO with grpo.overlap")
    parser.add_argument("--arms-only", action="store_true", help="train and evaluate, write no tables")
    parser.add_argument("--out", type=Path, default=Path("runs/evidence"))
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    options = parser.parse_args()
    shared = [f"data.root={options.out}/data", f"embed.cache_dir={options.out}/cache", *options.overrides]
    configs = {
        seed: load_config(options.config, [*shared, f"seed={seed}", f"run_dir={options.out}/seed-{seed}"])
        for seed in map(int, options.seeds.split(","))
    }
    first = next(iter(configs.values()))
    validate(first)
    if options.jobs > 1:
        for name in ("phantom", "embed"):  # once for all
            run_stage(first, STAGES[name])
        words = [f"--config={options.config}", f"--out={options.out}", "--arms-only", *options.overrides]
        words += ["--overlapped"] if options.overlapped else []
        with ThreadPoolExecutor(options.jobs) as pool:
            list(pool.map(lambda seed: train_apart(seed, words, options.jobs, options.out), configs))
    runs = {seed: arms_of_seed(config, options.overlapped) for seed, config in configs.items()}
    if not options.arms_only:
        write_evidence(configs, runs)


def train_apart(seed: int, words: list[str], jobs: int, out: Path) -> None:
    """All arms of a seed in a process of its own."""
    log = out / f"seed-{seed}.log"
    threads = max(1, (os.cpu_count() or 1) // jobs)
    with log.open("w", encoding="utf-8") as stream:
        done = subprocess.run(
            [sys.executable, __file__, "--seeds", str(seed), *words],
            env={**os.environ, "OMP_NUM_THREADS": str(threads), "OMP_WAIT_POLICY": "PASSIVE"},
            stdout=stream,
            stderr=subprocess.STDOUT,
            check=False,
        )
    if done.returncode:
        raise SystemExit(f"seed {seed} failed; its output is in {log}")


def arms_of_seed(config: Config, overlapped: bool) -> dict[str, BenchRun]:
    """Train and evaluate every arm of one seed; what is there already is kept."""
    stages = [STAGES[name] for name in ("phantom", "embed", "sft", "grpo")]
    for stage in (*stages, *CONTROLS, STAGES["eval"]):
        run_stage(config, stage)
    runs = read_runs(config)
    if overlapped:
        folder = Path(config.run_dir) / "eval" / OVERLAPPED
        if not (folder / "run.json").exists():
            behind = _overlapped(config)
            run_stage(behind, STAGES["grpo"])
            _evaluate(config, OVERLAPPED, Path(behind.run_dir) / "grpo" / "adapter", folder)
        runs[OVERLAPPED] = read_run(folder)
    return runs


def _overlapped(config: Config) -> Config:
    """The same GRPO run from the same SFT adapter, in a folder of its own."""
    behind = deepcopy(config)
    behind.grpo.overlap = True
    behind.grpo.init_adapter = f"{config.run_dir}/sft/adapter"
    behind.run_dir = f"{config.run_dir}/overlapped"
    return behind


def _evaluate(config: Config, name: str, adapter: Path, folder: Path) -> None:
    engine = start_engine(deepcopy(config))
    try:
        with StageProgress(name) as progress:
            evaluate(config, engine, name, adapter, folder, progress.update)
    finally:
        engine.close()


def write_evidence(configs: Mapping[int, Config], runs: Mapping[int, Mapping[str, BenchRun]]) -> None:
    """The tables and their numbers."""
    comparisons = {
        (seed, a, b): compare(arms[a], arms[b], configs[seed].compare, seed=0)
        for seed, arms in runs.items()
        for a, b in PAIRS
        if a in arms and b in arms
    }
    first = next(iter(comparisons.values()))
    lines = [
        "# Evidence: GRPO against SFT on held-out phantom patients",
        "",
        "Written by `make evidence`; nothing here is edited by hand.",
        "",
        f"Command: `{' '.join(['python', *sys.argv])}` on {platform.processor() or platform.machine()}, "
        f"{first.n_items:,} items of {first.n_patients} held-out patients ({first.b.split_file}, "
        f"{first.b.question_set}, {first.b.reader} reader, {first.b.decoding_words}).",
        "",
        *_training(configs),
        *_levels(runs),
        *_differences(comparisons),
        *_over_seeds(comparisons),
    ]
    DOCS.mkdir(exist_ok=True)
    (DOCS / "evidence.md").write_text("\n".join(lines), encoding="utf-8")
    figures = [_figures(key, comparison) for key, comparison in comparisons.items()]
    (DOCS / "evidence.json").write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")
    print("\n".join(lines))


def _training(configs: Mapping[int, Config]) -> list[str]:
    rows = [
        "## Training",
        "",
        "Validation loss of SFT after each epoch, the best in bold; minutes of GRPO's steps, which the control arms had"
        " too; what GRPO's steps spent them on, and what share of the prompts' tokens the engine had in its cache.",
        "",
        f"| seed | SFT, validation loss | GRPO, minutes | {' | '.join(PARTS)} | prefix hits |",
        "|---|---|---|" + "---|" * (len(PARTS) + 1),
    ]
    for seed, config in configs.items():
        losses = [record["val_loss"] for record in metrics_of(config, "sft") if "val_loss" in record]
        words = [f"**{loss:.4f}**" if loss == min(losses) else f"{loss:.4f}" for loss in losses]
        steps = [record for record in metrics_of(config, "grpo") if "seconds" in record]
        seconds = grpo_seconds(config)
        shares = [
            f"{sum(step[f'seconds/{part}'] for step in steps) / seconds:.1%}" for part in PARTS.values()
        ]
        hits = sum(step["prefix_hit_rate"] for step in steps) / len(steps)
        cells = [str(seed), " ".join(words), f"{seconds / 60:.1f}", *shares, f"{hits:.0%}"]
        rows.append(f"| {' | '.join(cells)} |")
    return [*rows, ""]


def _levels(runs: Mapping[int, Mapping[str, BenchRun]]) -> list[str]:
    rows = [
        "## Every arm, every seed",
        "",
        "| seed | arm | balanced accuracy | mean IoU | accuracy | strict |",
        "|---|---|---|---|---|---|",
    ]
    for seed, arms in runs.items():
        for name, run in arms.items():
            table = tables(grade_run(run))
            cells = " | ".join(
                f"{table.values[measure]['Overall'].value:.3f}"
                for measure in ("balanced_accuracy", "iou", "accuracy", "strict")
            )
            rows.append(f"| {seed} | {name} | {cells} |")
    return [*rows, ""]


def _differences(comparisons: Mapping[tuple[int, str, str], Comparison]) -> list[str]:
    rows = [
        "## Paired differences",
        "",
        "95 % bootstrap-t intervals over patients.",
        "",
        "| seed | comparison | endpoint | difference | interval | outcome |",
        "|---|---|---|---|---|---|",
    ]
    for (seed, a, b), comparison in comparisons.items():
        for measure, words in ENDPOINTS:
            d = comparison.get(measure)
            if d is not None:
                rows.append(
                    f"| {seed} | {b} − {a} | {words} | {signed(d.difference)} | {_interval(d)} | {outcome(d)} |"
                )
    return [*rows, ""]


def _over_seeds(comparisons: Mapping[tuple[int, str, str], Comparison]) -> list[str]:
    rows = [
        "## Over seeds",
        "",
        "Mean difference with a t interval over seeds (df = seeds − 1).",
        "",
        "| comparison | endpoint | mean | interval | by seed |",
        "|---|---|---|---|---|",
    ]
    for a, b in dict.fromkeys((a, b) for _, a, b in comparisons):
        summaries = seed_summary([c for (_, x, y), c in comparisons.items() if (x, y) == (a, b)])
        for measure, words in ENDPOINTS:
            for s in summaries:
                if (s.measure, s.column) == (measure, "Overall"):
                    interval = (
                        f"{signed(s.interval.low)} to {signed(s.interval.high)}"
                        if s.interval
                        else "too few seeds"
                    )
                    seeds = ", ".join(signed(x) for x in s.differences)
                    rows.append(f"| {b} − {a} | {words} | {signed(s.mean)} | {interval} | {seeds} |")
    return [*rows, ""]


def _interval(d: Difference) -> str:
    return f"{signed(d.interval.low)} to {signed(d.interval.high)}"


def _figures(key: tuple[int, str, str], comparison: Comparison) -> dict[str, object]:
    seed, a, b = key
    found = {m: comparison.get(m) for m, _ in ENDPOINTS}
    return {
        "seed": seed,
        "a": a,
        "b": b,
        "n_items": comparison.n_items,
        "n_patients": comparison.n_patients,
        **{
            m: {
                "a": d.a,
                "b": d.b,
                "difference": d.difference,
                "low": d.interval.low,
                "high": d.interval.high,
            }
            for m, d in found.items()
            if d is not None
        },
    }


if __name__ == "__main__":
    main()
