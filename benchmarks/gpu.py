"""The training part of a GRPO step on a GPU, at true sizes: the packed prefix tree beside the padded forward.

    PYTHONPATH=. python benchmarks/gpu.py [--size 3B] [--visual-tokens 8192] [--generations 8] [--completion-tokens 256]
        [--repetitions 5] [--out docs/performance]

A Qwen2.5-VL shaped like the 3B model with random weights in bfloat16, LoRA r = 16, cached features. A step is
forward, loss, backward and AdamW. The padded forward runs at the fastest batch size of 1, 2, 4 and 8 that fits into
memory; a packed arm that does not fit is left out and said to be. The tree attends by SDPA per level (packed) and by
FlexAttention (flex). Before anything is timed, on a model of 35 million parameters in float32, packed is held against
padded and flex against packed, gradients included. On a CPU torch has no backward of FlexAttention: there it is
compared forward and not timed.
Arms take their steps in turn; seconds are those of a question, ratios are formed within a repetition, and utilisation
is what the tree must compute (nothing masked) over time and the measured peak of a matrix product.
Needs torch, transformers, peft and accelerate; neither trl nor vllm, nor this package installed.
`--device cpu --size 35M` tries it without a GPU.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from middle_model import IMAGE, LANGUAGE, SLICES_AND_SIDE, build_model
from performance_page import at_least, page_with, spread, update_page
from step_arms import Work, answers, tree, tree_flops

from rl.packed import PackedPolicy, pack

BATCHES = (1, 2, 4, 8)
TOLERANCE = 1e-4
"""Greatest difference of a log-probability or loss, and of all gradients by their norm, between two ways to compute."""
TARGETS = {"ratio": 8.0, "utilisation": 0.4}


def timed(device: str, step: Callable[[str], Any]) -> tuple[float, float]:
    """Seconds of a step, and the most memory it took on top of what was there, in GiB (0 on a CPU)."""
    on_gpu = device != "cpu"
    if on_gpu:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
    resting = torch.cuda.memory_allocated() if on_gpu else 0
    started = time.perf_counter()
    step("step")
    if on_gpu:
        torch.cuda.synchronize()
    peak = torch.cuda.max_memory_allocated() if on_gpu else 0
    return time.perf_counter() - started, (peak - resting) / 2**30


def fastest_padded(device: str, size: str, work: Work) -> tuple[int, Callable[[str], Any]]:
    """The padded forward at its best batch size, by one timed step each after one to warm up."""
    model = build_model(size, device)
    seconds = {}
    for batch in (b for b in BATCHES if work.generations % b == 0):
        step = answers("padded", model, work, batch)
        try:
            timed(device, step)
            seconds[batch], _ = timed(device, step)
        except torch.OutOfMemoryError:
            print(f"  padded at {batch} rows a forward: out of memory", flush=True)
            torch.cuda.empty_cache()
            break
        print(f"  padded at {batch} rows a forward: {seconds[batch]:.2f} s", flush=True)
    if not seconds:
        raise SystemExit("not one padded row fits into memory: take fewer visual tokens")
    best = min(seconds, key=seconds.__getitem__)
    return best, answers("padded", model, work, best)


def matmul_peak(device: str) -> float:
    """Floating-point operations per second of the best of ten products, in the model's number format."""
    n = 2048 if device == "cpu" else 8192
    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    a, b = (torch.randn(n, n, device=device, dtype=dtype) for _ in range(2))
    seconds = [timed(device, lambda _: a @ b)[0] for _ in range(10)]
    return 2 * n**3 / min(seconds)


def check_flex(device: str) -> None:
    """FlexAttention against SDPA per level, at two lengths: it is compiled for the first and must serve the second.

    Raises:
        SystemExit: they differ.
    """
    on_gpu = device != "cpu"
    model = build_model("35M", device).float()
    adapter = [p for p in model.parameters() if p.requires_grad]
    for visual_tokens, completion_tokens in ((32, 5), (512, 40)):
        root, _ = tree(model, Work(visual_tokens, 2, 3, completion_tokens))
        logps, gradients = [], []
        for attention in ("sdpa", "flex"):
            with torch.set_grad_enabled(on_gpu):
                logps_N_T, _ = PackedPolicy(model, attention)(pack([root], IMAGE).to(device))
            logps.append(logps_N_T.detach())
            if on_gpu:
                parts = torch.autograd.grad(logps_N_T.sum(), adapter)
                gradients.append(torch.cat([g.flatten() for g in parts]))
        off = {"log-probabilities": float((logps[1] - logps[0]).abs().max())}
        if on_gpu:
            off["gradients"] = float((gradients[1] - gradients[0]).norm() / gradients[0].norm())
        said = ", ".join(f"{name} {value:.1e}" for name, value in off.items())
        print(f"  flex against packed, {visual_tokens} visual tokens, float32: {said}", flush=True)
        if not all(value <= TOLERANCE for value in off.values()):
            raise SystemExit(
                f"FlexAttention differs from SDPA by more than {TOLERANCE:g}: do not set model.attention=flex here"
            )


def check_packed(device: str) -> None:
    """The tree against padded rows: loss and gradients of one question.

    Raises:
        SystemExit: they differ.
    """
    model = build_model("35M", device).float()
    work = Work(512, 4, 1, 40)
    found = [answers(*arm)("gradients") for arm in (("padded", model, work, 2), ("packed", model, work))]
    losses, gradients = zip(
        *((loss, torch.cat([g.flatten() for g in named.values()])) for loss, named in found), strict=True
    )
    off = abs(losses[1] - losses[0]), float((gradients[1] - gradients[0]).norm() / gradients[0].norm())
    print(
        f"  packed against padded, 512 visual tokens, float32: loss {off[0]:.1e}, gradients {off[1]:.1e}",
        flush=True,
    )
    if not all(value <= TOLERANCE for value in off):
        raise SystemExit(
            f"the packed forward differs from the padded one by more than {TOLERANCE:g}: do not trust it here"
        )


def fitting(
    device: str, arms: dict[str, tuple[Callable[[str], Any], int]]
) -> dict[str, tuple[Callable[[str], Any], int]]:
    """The arms that fit into memory, each after a step to warm up."""
    found = {}
    for name, arm in arms.items():
        try:
            timed(device, arm[0])
            found[name] = arm
        except torch.OutOfMemoryError:
            print(f"  {name}: out of memory, left out", flush=True)
            torch.cuda.empty_cache()
    return found


def measure(device: str, size: str, sizes: tuple[int, int, int], repetitions: int) -> dict[str, Any]:
    """All arms of one cell of the table."""
    visual_tokens, generations, completion_tokens = sizes
    check_packed(device)
    check_flex(device)
    work = {q: Work(visual_tokens, generations, q, completion_tokens) for q in (1, 4)}
    batch, padded = fastest_padded(device, size, work[1])
    model = build_model(size, device)
    timed(device, padded)  # beside the second model
    kinds = ("packed",) if device == "cpu" else ("packed", "flex")
    packed = {f"{kind}-{q}": (answers(kind, model, work[q]), q) for kind in kinds for q in work}
    arms = {"padded": (padded, 1), **fitting(device, packed)}
    seconds: dict[str, list[float]] = {name: [] for name in arms}
    gib = dict.fromkeys(arms, 0.0)
    peaks = []
    for _ in range(repetitions):
        for name, (step, questions) in arms.items():
            took, memory = timed(device, step)
            seconds[name].append(took / questions)
            gib[name] = max(gib[name], memory)
        peaks.append(matmul_peak(device))
    flops = {name: tree_flops(model, work[q]) / q for name, (_, q) in arms.items() if name != "padded"}
    return {
        "device": torch.cuda.get_device_name() if device != "cpu" else "CPU",
        "size": size,
        "visual_tokens": visual_tokens,
        "generations": generations,
        "completion_tokens": completion_tokens,
        "batch": batch,
        "seconds": seconds,
        "gib": gib,
        "peak_tflops": max(peaks) / 1e12,
        "utilisation": {
            name: [f / s / peak for s, peak in zip(seconds[name], peaks, strict=True)]
            for name, f in flops.items()
        },
    }


def section(cells: Sequence[dict[str, Any]]) -> str:
    """The cells as a table."""
    lines = [
        "| device | model | visual tokens | G | tokens each | arm | seconds | padded / own | GiB | of matmul peak |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for cell in cells:
        work = " | ".join(
            str(cell[key]) for key in ("device", "size", "visual_tokens", "generations", "completion_tokens")
        )
        for name, seconds in cell["seconds"].items():
            ratios = [p / s for p, s in zip(cell["seconds"]["padded"], seconds, strict=True)]
            used = cell["utilisation"].get(name)
            rows = f", {cell['batch']} rows a forward" if name == "padded" else ""
            lines.append(
                f"| {work} | {name}{rows} | {np.median(seconds):.2f} | "
                f"{spread(ratios, 1)} | {cell['gib'][name]:.1f} | "
                f"{f'{np.median(used):.0%}' if used else ''} |"
            )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"])
    parser.add_argument("--size", default="3B", choices=sorted(LANGUAGE))
    parser.add_argument("--visual-tokens", type=int, default=8192, choices=sorted(SLICES_AND_SIDE))
    parser.add_argument("--generations", type=at_least(1), default=8)
    parser.add_argument("--completion-tokens", type=at_least(1), default=256)
    parser.add_argument("--repetitions", type=at_least(1), default=5)
    parser.add_argument("--out", type=page_with("gpu"), help="page to bring up to date, without its ending")
    options = parser.parse_args()
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("no GPU is here; `--device cpu --size 35M` tries it without one")
    sizes = options.visual_tokens, options.generations, options.completion_tokens
    cell = measure(options.device, options.size, sizes, options.repetitions)
    print(section([cell]))
    for name in cell["utilisation"]:
        ratio = np.median(np.divide(cell["seconds"]["padded"], cell["seconds"][name]))
        used = np.median(cell["utilisation"][name])
        print(
            f"{name}: {ratio:.1f} times as fast as padded (target {TARGETS['ratio']:g}), "
            f"{used:.0%} of the matmul peak (target {TARGETS['utilisation']:.0%})"
        )
    if options.out:
        key = "-".join(map(str, (cell["device"], options.size, *sizes)))
        update_page(options.out, "gpu", key, cell, section)


if __name__ == "__main__":
    main()
