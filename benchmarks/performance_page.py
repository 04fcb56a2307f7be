"""docs/performance.md: a section for each benchmark, remade from the figures in docs/performance.json."""

from __future__ import annotations

import json
import platform
from argparse import ArgumentTypeError
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import psutil

from rl.errors import write_atomically


def update_page(
    page: Path,
    benchmark: str,
    key: str,
    cell: dict[str, Any],
    section: Callable[[Sequence[dict[str, Any]]], str],
) -> None:
    """Keep a benchmark's cell among its others in `page`.json, and write their section into `page`.md.

    Args:
        section: the text of all cells of the benchmark; it goes between the marks of the benchmark in the page.

    Raises:
        SystemExit: the page has no marks for the benchmark.
    """
    figures, path = page.with_suffix(".json"), page.with_suffix(".md")
    known = json.loads(figures.read_text()) if figures.exists() else {}
    machine = f"{platform.machine()}, {psutil.cpu_count()} cores"
    known.setdefault(benchmark, {})[key] = {**cell, "machine": machine}
    write_atomically(figures, json.dumps(known, indent=1) + "\n")
    cells = list(known[benchmark].values())
    machines = "; ".join(sorted({cell["machine"] for cell in cells}))
    text = _between(path.read_text(), benchmark, f"{section(cells)}\n\nMeasured on {machines}.", path)
    if {"train_step", "rollout_speed"} <= known.keys():
        text = _between(text, "iterations", iterations(known), path)
    write_atomically(path, text)


def at_least(least: int) -> Callable[[str], int]:
    """For argparse: a whole number that is not below `least`."""

    def number(text: str) -> int:
        if not text.isdecimal() or int(text) < least:
            raise ArgumentTypeError(f"{text!r}: a whole number from {least} up is needed")
        return int(text)

    return number


def page_with(benchmark: str) -> Callable[[str], Path]:
    """For argparse: a page, without its ending, that has a section of the benchmark."""

    def page(text: str) -> Path:
        path = Path(text).with_suffix(".md")
        if not path.is_file():
            raise ArgumentTypeError(
                f"{path} does not exist; docs/performance is the page to bring up to date"
            )
        try:
            _between(path.read_text(), benchmark, "", path)
        except SystemExit as error:
            raise ArgumentTypeError(str(error)) from None
        return Path(text)

    return page


def iterations(known: Mapping[str, Mapping[str, Any]]) -> str:
    """Whole steps per hour: what the two benchmarks took for one volume, sampling and training, added up."""
    lines = [
        "| questions | stock TRL and vLLM, an hour | here, an hour | ratio |",
        "|---|---|---|---|",
    ]
    trained = known["train_step"].get("2000-8")
    for questions in (1, 4):
        sampled = known["rollout_speed"].get(f"2000-8-2-{questions}-on")
        if trained and sampled:
            seconds = [
                median(sampled["seconds"][engine]) / sampled["volumes"]
                + questions * median(trained["seconds"][arm])
                for engine, arm in (("stock", "trl"), ("features", f"packed-{questions}"))
            ]
            theirs, ours = (3600 / s for s in seconds)
            lines.append(f"| {questions} | {theirs:.0f} | {ours:.0f} | {ours / theirs:.1f} |")
    return "\n".join(lines)


def spread(values: Sequence[float], digits: int) -> str:
    """Median, smallest and largest."""
    middle, low, high = (f"{value:.{digits}f}" for value in (median(values), min(values), max(values)))
    return f"{middle} ({low} to {high})"


def _between(text: str, benchmark: str, body: str, path: Path) -> str:
    """The page's text with another body between the marks of a benchmark."""
    start, end = f"<!-- {benchmark} -->", f"<!-- end of {benchmark} -->"
    before, found, rest = text.partition(start)
    _, closed, after = rest.partition(end)
    if not (found and closed):
        raise SystemExit(f"{path} has no lines {start} and {end} to write the figures between")
    return f"{before}{start}\n{body}\n{end}{after}"
