"""How fast are rewards? Completions per second, hostile input, import time.

    python benchmarks/reward_speed.py [--completions 20000] [--processes 1]

The workload: answers in the declared format of about 300 tokens (1,100 characters), right and wrong ones mixed, to
all 62 questions, in groups of 8, scored by the default suite. Best of five runs. Beside it, on the same completions:
the standard library's parsing of the answer alone, and the three rewards as they are commonly written (a pattern,
`json.loads`, an overlap; nothing guarded). A component's share of the default suite is what a suite without it saves;
what is left over is the suite's own.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from multiprocessing import get_context

import numpy as np

from rewards import Component, Example, RewardSuite, read_answer
from rewards.redteam import EXPLOITS, cases, honest_answer

GROUP = 8
REASONING = "The signal was followed from slice to slice and compared with the normal side. " * 9
DEFAULT = (Component("output_format", 0.2), Component("moaks_accuracy"), Component("box_iou"))
Group = tuple[Example, list[str]]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--completions", type=int, default=20_000)
    parser.add_argument("--processes", type=int, default=1)
    options = parser.parse_args()
    groups = workload(options.completions)
    texts = [text for _, group in groups for text in group]
    print(f"{len(texts)} completions, {np.mean([len(text) for text in texts]):.0f} characters on the average")

    parsing = best(lambda: [json.loads(text[text.index("<answer>") + 8 : -9]) for text in texts])
    print(f"json.loads of the answer alone          {len(texts) / parsing:10,.0f} /s")

    def tell(name: str, seconds: float) -> None:
        print(f"{name:40}{len(texts) / seconds:10,.0f} /s  {seconds / parsing:5.1f} x parsing")

    seconds = best(lambda: [common(text, example) for example, group in groups for text in group])
    tell("the same rewards, nothing guarded", seconds)
    whole = best(partial(score, RewardSuite(DEFAULT), groups))
    tell("default suite", whole)
    reading = best(
        lambda: [read_answer(text, example.question) for example, group in groups for text in group]
    )
    print(f"{'  of it reading the answer':40}{reading / whole:10.0%}")
    for component in DEFAULT:
        others = RewardSuite([c for c in DEFAULT if c is not component])
        print(f"{'  ' + component.name:40}{1 - best(partial(score, others, groups)) / whole:10.0%}")
    tell(
        "default suite, tolerant reader",
        best(partial(score, RewardSuite(DEFAULT, reader="tolerant"), groups)),
    )
    if options.processes > 1:
        with get_context("spawn").Pool(options.processes) as pool:
            parts = [groups[i :: options.processes] for i in range(options.processes)]
            pool.map(
                score_default, [part[:1] for part in parts]
            )  # the processes have imported what they need
            seconds = best(partial(pool.map, score_default, parts))
        print(f"{f'default suite, {options.processes} processes':40}{len(texts) / seconds:10,.0f} /s")
    hostile()
    print(f"import rewards on top of numpy: {import_seconds() * 1000:.0f} ms")


def workload(completions: int) -> list[Group]:
    """Groups of answers of mixed quality."""
    rng = np.random.default_rng(0)
    drawn = cases("balanced", knees=-(-completions // (62 * GROUP)))
    groups = []
    for case in drawn[: completions // GROUP]:
        answers = [honest_answer(case, *rng.random(2), rng) for _ in range(GROUP)]
        groups.append((case.example, [text.replace("<think>", f"<think>{REASONING}") for text in answers]))
    return groups


FORMAT = re.compile(r"<think>.*?</think>\s*<answer>(.*?)</answer>", re.DOTALL)


def common(text: str, example: Example) -> float:
    """Format, accuracy and IoU the way reward functions in public use compute them."""
    found = FORMAT.fullmatch(text)
    if not found:
        return 0.0
    answer = json.loads(found[1])
    true = example.truth.bbox.to_text() if example.truth.bbox else [0, 1] * 3
    sides = [
        (max(0, min(a1, b1) - max(a0, b0)), a1 - a0, b1 - b0)
        for a0, a1, b0, b1 in zip(
            answer["bbox"][::2], answer["bbox"][1::2], true[::2], true[1::2], strict=True
        )
    ]
    overlap, given, wanted = (s * x * y for s, x, y in zip(*sides, strict=True))
    grades: dict[str, object] = {}
    pending = [answer.get("MOAKS_scores", answer.get("MOAKS_grade", answer))]
    while pending:
        for name, value in pending.pop().items():
            if isinstance(value, dict):
                pending.append(value)
            else:
                grades[name] = value
    right = sum(grades.get(name) == grade for name, grade in example.truth.grades.items())
    return 0.2 + right / len(example.truth.grades) + overlap / max(1, given + wanted - overlap)


def score(suite: RewardSuite, groups: list[Group]) -> None:
    for example, texts in groups:
        suite.score_group(example, texts)


def score_default(groups: list[Group]) -> None:
    score(RewardSuite(DEFAULT), groups)


def hostile() -> None:
    """The slowest completion of each exploit, cut to 100 KB, in both readers."""
    case = cases("balanced", knees=1)[0]
    for reader in ("strict", "tolerant"):
        suite = RewardSuite(DEFAULT, reader=reader)  # type: ignore[arg-type]
        slowest = max(
            (best(partial(suite.score, case.example, exploit.attack(case)[:100_000])), exploit.name)
            for exploit in EXPLOITS
        )
        print(f"slowest hostile 100 KB, {reader:8} reader    {slowest[0] * 1000:10.2f} ms  ({slowest[1]})")


def import_seconds() -> float:
    code = "import time, numpy; t = time.perf_counter(); import rewards; print(time.perf_counter() - t)"
    return min(float(subprocess.check_output([sys.executable, "-c", code])) for _ in range(5))


def best(run: Callable[[], object], repeats: int = 5) -> float:
    """Seconds of the fastest run."""
    seconds = []
    for _ in range(repeats):
        started = time.perf_counter()
        run()
        seconds.append(time.perf_counter() - started)
    return min(seconds)


if __name__ == "__main__":
    main()
