"""docs/performance.md: a section for each benchmark, remade from the figures in docs/performance.json."""

from __future__ import annotations

import json
import platform
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import psutil

from rl.training import write_atomically


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
    figures, text = page.with_suffix(".json"), page.with_suffix(".md")
    known = json.loads(figures.read_text()) if figures.exists() else {}
    machine = f"{platform.machine()}, {psutil.cpu_count()} cores"
    known.setdefault(benchmark, {})[key] = {**cell, "machine": machine}
    write_atomically(figures, json.dumps(known, indent=1) + "\n")
    start, end = f"<!-- {benchmark} -->", f"<!-- end of {benchmark} -->"
    before, found, rest = text.read_text().partition(start)
    _, closed, after = rest.partition(end)
    if not (found and closed):
        raise SystemExit(f"{text} has no lines {start} and {end} to write the figures between")
    body = section(list(known[benchmark].values()))
    write_atomically(text, f"{before}{start}\n{body}\n{end}{after}")
