"""The training part of a GRPO step: the packed prefix tree beside TRL, on the same model, rollouts and loss.

    python benchmarks/train_step.py [--visual-tokens 2000] [--generations 8] [--repetitions 5]
        [--out docs/performance]

A step is forward, loss, backward and AdamW on a LoRA adapter (r = 16) of a Qwen2.5-VL of 35 million parameters with
random weights, for completions of 96 tokens. Four arms, each in a process of its own, take their steps in turn:

    trl        `trl.GRPOTrainer.training_step`: pictures in, so vision tower and prompt run once per completion
    padded     transformers' forward on cached features: no vision tower, but the prompt once per completion
    packed-1   the prefix tree, one question about the volume
    packed-4   the prefix tree, four questions about the volume

The tree attends as it does in training on a CPU (`rl/subtree.py`), in layers that keep and copy less (`rl/lora.py`,
`rl/gated.py`, `rl/norm.py`). The first two run at the fastest of the batch sizes 1, 2, 4 and 8 per forward, without
gradient checkpointing and without a pass for old log-probabilities. Before anything is timed, loss and adapter
gradients of one question are compared across the arms that have one. Seconds are those of a question; a ratio is formed
within each repetition. Memory is what a step takes on top of the resting model, of the first two at the batch size that
takes least, whichever is fastest. At 8,192 visual tokens the arms would not fit into 24 GiB together with what they
have freed, so that there each gives it back after a step. Last, a step of the packed arms is profiled: matrix products,
attention, copies and the rest, as shares of the time of all operations.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from arms import Arm, Timed
from middle_model import SLICES_AND_SIDE, build_model
from performance_page import at_least, page_with, spread, update_page
from step_arms import Work, make_step, tree_flops

BATCHES = (1, 2, 4, 8)
"""Rows a forward that are tried."""
ROUNDS = 3
"""Timed steps of each, at most."""
PACKED = ("packed-1", "packed-4")
TARGETS = (
    ("packed-1: TRL's time / its own", 11.0, lambda cell: median_ratio(cell["seconds"], "trl", "packed-1")),
    ("packed-4: TRL's time / its own", 20.0, lambda cell: median_ratio(cell["seconds"], "trl", "packed-4")),
    ("packed-1: TRL's memory / its own", 3.0, lambda cell: cell["mib"]["trl"] / cell["mib"]["packed-1"]),
    (
        "packed-1: share of the matmul peak",
        0.6,
        lambda cell: float(np.median(cell["utilisation"]["packed-1"])),
    ),
)
"""What the 2,000 visual tokens at G = 8 are held against on two cores, and at least how much it should be."""


class Tried(NamedTuple):
    """A batch size of an arm."""

    seconds: float
    """Of a row, in one forward and backward: the median of its rounds."""
    mib: float


def try_batches(
    arm: str, visual_tokens: int, generations: Sequence[int], rounds: int, threads: int
) -> dict[int, Tried]:
    """Each batch size that divides one of `generations` and that the machine has memory for.

    In one forward and backward of so many rows, after one to warm up; in two of one row, as TRL refuses groups of one.
    The sizes take turns, each time in a process of their own, so that a slow minute of the machine decides nothing.
    """
    sizes = [b for b in BATCHES if any(g % b == 0 for g in generations)]
    found: dict[int, list[Timed]] = {}
    for _ in range(rounds):
        for batch in sizes:
            candidate = None
            try:
                candidate = Arm(make_step, arm, threads, Work(visual_tokens, max(2, batch), 1), batch)
                candidate.ask("step")
                found.setdefault(batch, []).append(candidate.ask("step"))
            except EOFError:
                print(f"  {arm} at {batch} rows a forward: killed, most likely for its memory", flush=True)
                sizes = [size for size in sizes if size < batch]
                break
            finally:
                if candidate:
                    candidate.stop()
    tried = {}
    for batch in sizes:
        seconds = float(np.median([timed.seconds for timed in found[batch]])) / max(2, batch)
        tried[batch] = Tried(seconds, max(timed.bytes for timed in found[batch]) / 2**20)
        print(
            f"  {arm} at {batch} rows a forward: {seconds:.2f} s a row, {tried[batch].mib:,.0f} MiB",
            flush=True,
        )
    if not tried:
        raise SystemExit(f"{arm} does not fit into memory with a single row")
    return tried


def require_the_same_work(arms: Mapping[str, Arm]) -> float:
    """Largest difference of an adapter tensor's gradient from the first arm's, relative to its norm.

    Raises:
        SystemExit: losses or gradients differ: the arms would not be doing the same work.
    """
    (first, (loss, gradients)), *others = ((name, arm.ask("gradients").result) for name, arm in arms.items())
    worst = []
    for name, (other_loss, other) in others:
        off = np.max([float((other[n] - g).norm() / g.norm()) for n, g in gradients.items()])  # NaN stays NaN
        if not (abs(other_loss - loss) <= 1e-5 * max(1.0, abs(loss)) and off <= 1e-4):
            raise SystemExit(f"{name} and {first} differ: losses {other_loss} and {loss}, gradients by {off}")
        worst.append(off)
    return float(max(worst))


def matmul_peak(threads: int) -> float:
    """Floating-point operations per second of the best of ten float32 products of 2048 x 2048."""
    torch.set_num_threads(threads)
    a, b = torch.randn(2, 2048, 2048)
    times = []
    for _ in range(10):
        started = time.perf_counter()
        a @ b
        times.append(time.perf_counter() - started)
    return 2 * 2048**3 / min(times)


def measure(
    visual_tokens: int,
    generations: int,
    tried: Mapping[str, Mapping[int, Tried]],
    repetitions: int,
    threads: int,
) -> dict[str, Any]:
    """All arms of one cell of the table, the first two at the best of the batch sizes that were tried."""
    print(f"  G = {generations}", flush=True)
    one, four = (Work(visual_tokens, generations, questions) for questions in (1, 4))
    works = {"trl": one, "padded": one, "packed-1": one, "packed-4": four}
    start = partial(Arm, make_step, gives_back=visual_tokens > 2000)
    batch, arms, mib = {}, {}, {}
    for name, sizes in tried.items():
        fitting = {size: found for size, found in sizes.items() if generations % size == 0}
        batch[name] = min(fitting, key=lambda size: fitting[size].seconds)
        mib[name] = min(found.mib for found in fitting.values())
        arms[name] = start(name, threads, one, batch[name])
    arms["packed-1"] = start("subtree", threads, one)
    difference = require_the_same_work(arms)
    arms["packed-4"] = start("subtree", threads, four)
    arms["packed-4"].ask("step")  # to warm up, as the others have by now
    seconds: dict[str, list[float]] = {name: [] for name in arms}
    peaks = []
    for _ in range(repetitions):
        for name, arm in arms.items():
            timed = arm.ask("step")
            seconds[name].append(timed.seconds / works[name].questions)
            if name in PACKED:
                mib[name] = timed.bytes / 2**20
        peaks.append(matmul_peak(threads))
    shares = {name: arms[name].ask("profile").result for name in PACKED}
    for arm in arms.values():
        arm.stop()
    flops = {name: tree_flops(build_model(), works[name]) / works[name].questions for name in PACKED}
    return {
        "visual_tokens": visual_tokens,
        "generations": generations,
        "threads": threads,
        "batch": batch,
        "gradient_difference": difference,
        "seconds": seconds,
        "mib": mib,
        "utilisation": {
            name: [flops[name] / s / peak for s, peak in zip(seconds[name], peaks, strict=True)]
            for name in PACKED
        },
        "shares": shares,
    }


def section(cells: Sequence[dict[str, Any]]) -> str:
    """The cells as a table."""
    lines = [
        "| visual tokens | G | arm | seconds | TRL's time / its own | MiB | TRL's MiB / its own | of matmul peak |",
        "|---|---|---|---|---|---|---|---|",
    ]
    cells = sorted(cells, key=lambda c: (c["visual_tokens"], c["generations"]))
    for cell in cells:
        for name, seconds in cell["seconds"].items():
            ratios = np.divide(cell["seconds"]["trl"], seconds)
            batch = f", {cell['batch'][name]} rows a forward" if name in cell["batch"] else ""
            used = cell["utilisation"].get(name)
            lines.append(
                f"| {cell['visual_tokens']:,} | {cell['generations']} | {name}{batch} | {np.median(seconds):.2f} | "
                f"{spread(ratios, 1)} | {cell['mib'][name]:,.0f} | "
                f"{cell['mib']['trl'] / cell['mib'][name]:.1f} | {f'{np.median(used):.0%}' if used else ''} |"
            )
    worst = max(cell["gradient_difference"] for cell in cells)
    lines += ["", f"Adapter gradients of the arms differ by {worst:.0e} of their norm at most.", ""]
    lines += [
        "| visual tokens | G | arm | TRL / padded, the tower's part | padded / own, the tree's and its layers' | "
        "matrix products | attention | copies | rest |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for cell in cells:
        tower = median_ratio(cell["seconds"], "trl", "padded")
        for name in PACKED:
            shares = " | ".join(f"{share:.0%}" for share in cell["shares"][name].values())
            tree = median_ratio(cell["seconds"], "padded", name)
            work = f"{cell['visual_tokens']:,} | {cell['generations']}"
            lines.append(f"| {work} | {name} | {tower:.1f} | {tree:.1f} | {shares} |")
    return "\n".join([*lines, *(line for cell in cells for line in against_targets(cell))])


def median_ratio(seconds: Mapping[str, Sequence[float]], a: str, b: str) -> float:
    """Median over repetitions of a's seconds over b's."""
    return float(np.median(np.divide(seconds[a], seconds[b])))


def against_targets(cell: Mapping[str, Any]) -> list[str]:
    """Each target with what was found; only for the work that has targets."""
    if (cell["visual_tokens"], cell["generations"]) != (2000, 8):
        return []
    rows = [
        f"| {name} | {target:g} | {found(cell):.2f} | {'held' if found(cell) >= target else 'MISSED'} |"
        for name, target, found in TARGETS
    ]
    return ["", "| at 2,000 visual tokens and G = 8 | at least | found | |", "|---|---|---|---|", *rows]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--visual-tokens", type=int, nargs="+", default=[2000], choices=sorted(SLICES_AND_SIDE)
    )
    parser.add_argument("--generations", type=at_least(2), nargs="+", default=[8])
    parser.add_argument("--repetitions", type=at_least(1), default=5)
    parser.add_argument("--threads", type=at_least(1), default=torch.get_num_threads())
    parser.add_argument(
        "--out", type=page_with("train_step"), help="page to bring up to date, without its ending"
    )
    options = parser.parse_args()
    for visual_tokens in options.visual_tokens:
        print(f"{visual_tokens} visual tokens", flush=True)
        tried = {
            arm: try_batches(
                arm,
                visual_tokens,
                options.generations,
                min(ROUNDS, options.repetitions),
                options.threads,
            )
            for arm in ("trl", "padded")
        }
        for generations in options.generations:
            cell = measure(visual_tokens, generations, tried, options.repetitions, options.threads)
            print(section([cell]), flush=True)
            if options.out:
                update_page(options.out, "train_step", f"{visual_tokens}-{generations}", cell, section)


if __name__ == "__main__":
    main()
