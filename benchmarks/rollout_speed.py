"""Rollouts: cached features, one request of G samples, volume by volume, beside pictures, G requests, unsorted.

    python benchmarks/rollout_speed.py [--visual-tokens 2000] [--generations 8] [--volumes 2]
        [--questions 1 4] [--caches on off] [--repetitions 5] [--out docs/performance]

The same model (35 million parameters, random weights, LoRA r = 16) in the same vLLM answers the same number of
questions about the same number of visual tokens with completions of at most 96 tokens:

    stock      vLLM's own `LLM.generate`: slices as pictures, every sample a request of its own, in random order
    pictures   the same with our LoRA kernel for CPUs
    features   `rollouts.VllmEngine`: the vision tower has run once, before training; a question is one request

with vLLM's prefix and multimodal caches on, and off (not `stock`, which is vLLM as it comes). No volume is shown twice,
and each repetition is a new training step with a new adapter, so that no cache is warm from the last. The share of
decoding is what remains when only the first token is sampled. Ratios are formed within a repetition.
"""

from __future__ import annotations

import argparse
import os
import random
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

import numpy as np
import torch
from arms import Arm
from middle_model import (
    PIXELS_PER_TOKEN,
    SLICES_AND_SIDE,
    TOKENIZER,
    VIDEO,
    VISION_END,
    VISION_START,
    WORDS,
    Volume,
    build_model,
    words,
)
from performance_page import at_least, page_with, spread, update_page

from rl.base.model import save_base

QUESTION_TOKENS, COMPLETION_TOKENS = 60, 96
KV_CACHE_GIB = 2.0


def save_model(folder: Path) -> tuple[Path, Path]:
    """Folders of the base and of its adapter."""
    model = build_model()
    model.save_pretrained(folder / "adapter")
    save_base(folder / "base", model.unload(), TOKENIZER)
    return folder / "base", folder / "adapter"


def questions_of(volume: Volume, number: int) -> list[list[int]]:
    """Token ids of the questions about a volume."""
    generator = torch.Generator().manual_seed(volume.seed)
    return [words(QUESTION_TOKENS, generator) for _ in range(number)]


def features(
    base: Path, adapter: Path, caches: bool, generations: int
) -> Callable[[list[Volume], int, int], Any]:
    """Ours."""
    from rollouts import vllm_engine
    from rollouts.types import Prompt, Sampling, VolumeFeatures

    if not caches:  # a run never turns them off
        vllm_engine._FIXED_OPTIONS |= {"enable_prefix_caching": False, "mm_processor_cache_gb": 0}
    engine = vllm_engine.VllmEngine(base, max_model_len=10_000, kv_cache_gib=KV_CACHE_GIB)
    engine.wait_until_ready()

    def answer(volumes: list[Volume], questions: int, tokens: int) -> tuple[int, float | None]:
        engine.load_adapter(adapter)
        prompts = []
        for volume in volumes:
            slices, side = SLICES_AND_SIDE[volume.visual_tokens]
            generator = torch.Generator().manual_seed(volume.seed)
            embeds = torch.randn(volume.visual_tokens, 512, generator=generator)
            cached = VolumeFeatures(f"volume {volume.seed}", embeds, (slices, 2 * side, 2 * side), 1.0)
            ids = (*WORDS[:8], VISION_START, *[VIDEO] * volume.visual_tokens, VISION_END)
            prompts += [Prompt("", cached, ids, tuple(q)) for q in questions_of(volume, questions)]
        groups = engine.generate(prompts, generations, Sampling(max_tokens=tokens), list(range(len(prompts))))
        rollouts = [rollout for group in groups for rollout in group.rollouts]
        return sum(len(rollout.token_ids) for rollout in rollouts), rollouts[0].prefix_hit_rate

    return answer


def pictures(
    base: Path, adapter: Path, caches: bool, generations: int, own_lora: bool = True
) -> Callable[[list[Volume], int, int], Any]:
    """vLLM as it comes, but for its LoRA kernel on CPUs, which is ours here too if `own_lora`."""
    from PIL import Image
    from vllm import LLM, SamplingParams
    from vllm.lora.request import LoRARequest

    from rollouts import vllm_lora_cpu

    if own_lora:
        vllm_lora_cpu.install()
    slices = max(slices for slices, _ in SLICES_AND_SIDE.values())
    llm = LLM(
        model=str(base),
        dtype="float32",
        max_model_len=10_000,
        max_num_batched_tokens=10_000,
        max_num_seqs=256,
        enforce_eager=True,
        enable_lora=True,
        max_loras=1,
        max_lora_rank=16,
        enable_prefix_caching=caches,
        enable_chunked_prefill=False,
        kv_cache_memory_bytes=int(KV_CACHE_GIB * 2**30),
        block_size=32,
        limit_mm_per_prompt={"image": slices, "video": 0},
        **({} if caches else {"mm_processor_cache_gb": 0}),
    )
    versions = iter(range(1, 10_000))

    def answer(volumes: list[Volume], questions: int, tokens: int) -> tuple[int, None]:
        version = next(versions)
        folder = Path(mkdtemp()) / "adapter"
        folder.symlink_to(adapter)
        lora = LoRARequest(f"adapter-{version}", version, str(folder))
        requests = []
        for volume in volumes:
            slices, side = SLICES_AND_SIDE[volume.visual_tokens]
            pixels = np.random.default_rng(volume.seed)
            shape = (side * PIXELS_PER_TOKEN, side * PIXELS_PER_TOKEN, 3)
            shown = [Image.fromarray(pixels.integers(0, 256, shape, dtype=np.uint8)) for _ in range(slices)]
            for question in questions_of(volume, questions):
                prompt = {
                    "prompt_token_ids": [*volume.token_ids(1), *question],
                    "multi_modal_data": {"image": shown},
                }
                for _ in range(generations):
                    seed = 100_000 * volume.seed + len(requests)
                    requests.append(
                        (prompt, SamplingParams(temperature=1.0, max_tokens=tokens, seed=seed, logprobs=0))
                    )
        random.Random(0).shuffle(requests)
        prompts, parameters = zip(*requests, strict=True)
        outputs = llm.generate(list(prompts), list(parameters), use_tqdm=False, lora_request=lora)
        expected = len(volumes[0].token_ids(volumes[0].visual_tokens // slices)) + QUESTION_TOKENS
        assert all(len(output.prompt_token_ids) == expected for output in outputs)
        return sum(len(output.outputs[0].token_ids) for output in outputs), None

    return answer


ARMS = {"stock": partial(pictures, own_lora=False), "pictures": pictures, "features": features}


def measure(
    arms: Mapping[str, Arm], visual_tokens: int, volumes: int, questions: int, repetitions: int
) -> dict[str, Any]:
    """Seconds of each arm, repetition by repetition; the first, in which kernels are loaded, is not counted."""
    cell: dict[str, Any] = {"visual_tokens": visual_tokens, "volumes": volumes, "questions": questions}
    cell |= {key: {name: [] for name in arms} for key in ("seconds", "first_token", "tokens", "hit_rate")}
    for repetition in range(repetitions + 1):
        for name, arm in arms.items():
            for key, length in (("seconds", COMPLETION_TOKENS), ("first_token", 1)):
                seed = 100_000 * questions + 1000 * repetition + 100 * (key == "seconds")
                shown = [Volume(visual_tokens, seed + i) for i in range(volumes)]
                timed = arm.ask(shown, questions, length)
                if repetition:
                    cell[key][name].append(timed.seconds)
                if repetition and key == "seconds":
                    for what, value in zip(("tokens", "hit_rate"), timed.result, strict=True):
                        cell[what][name].append(value)
    return cell


def section(cells: Sequence[dict[str, Any]]) -> str:
    """The cells as a table."""
    lines = [
        "| visual tokens | volumes | questions | G | caches | arm | seconds | stock's time / its own | "
        "pictures' time / its own | decoding |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for cell in cells:
        work = " | ".join(
            str(cell[key]) for key in ("visual_tokens", "volumes", "questions", "generations", "caches")
        )
        timed = {name: cell["seconds"][name] for name in ARMS if name in cell["seconds"]}
        for name, seconds in timed.items():
            shares = " | ".join(
                spread(np.divide(timed[other], seconds), 2) if other in timed else ""
                for other in ("stock", "pictures")
            )
            decoding = np.median([1 - f / s for f, s in zip(cell["first_token"][name], seconds, strict=True)])
            lines.append(f"| {work} | {name} | {np.median(seconds):.2f} | {shares} | {decoding:.0%} |")
    rates = ", ".join(
        f"{np.mean(cell['hit_rate']['features']):.1%} with {cell['questions']} "
        f"question{'s' * (cell['questions'] > 1)} a volume"
        for cell in cells
        if cell["caches"] == "on"
    )
    if rates:
        lines += ["", f"Prompt tokens found in the prefix cache by the arm with features: {rates}."]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--visual-tokens", type=int, default=2000, choices=sorted(SLICES_AND_SIDE))
    parser.add_argument("--generations", type=at_least(1), default=8)
    parser.add_argument("--volumes", type=at_least(1), default=2)
    parser.add_argument("--questions", type=at_least(1), nargs="+", default=[1, 4])
    parser.add_argument("--caches", nargs="+", default=["on", "off"], choices=["on", "off"])
    parser.add_argument("--repetitions", type=at_least(1), default=5)
    parser.add_argument(
        "--out", type=page_with("rollout_speed"), help="page to bring up to date, without its ending"
    )
    options = parser.parse_args()
    os.environ |= {
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_LOGGING_LEVEL": "ERROR",
        "VLLM_NO_USAGE_STATS": "1",
        "DO_NOT_TRACK": "1",
        "TORCHDYNAMO_DISABLE": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }
    base, adapter = save_model(Path(mkdtemp()))
    for caches in options.caches:
        arms = {
            name: Arm(make, base, adapter, caches == "on", options.generations)
            for name, make in ARMS.items()
            if caches == "on" or name != "stock"
        }
        for questions in options.questions:
            sizes = options.visual_tokens, options.volumes, questions, options.repetitions
            cell = {"caches": caches, "generations": options.generations, **measure(arms, *sizes)}
            print(section([cell]), flush=True)
            if options.out:
                key = f"{options.visual_tokens}-{options.generations}-{options.volumes}-{questions}-{caches}"
                update_page(options.out, "rollout_speed", key, cell, section)
        for arm in arms.values():
            arm.stop()


if __name__ == "__main__":
    main()
