"""The report of a comparison: one self-contained HTML file, the tables as Markdown, every number as JSON.

Completions are untrusted text: the template escapes everything, the page's content policy forbids scripts and the
network, and figures are images.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import polars as pl
from jinja2 import Environment, PackageLoader, StrictUndefined

from rl.bench import figures
from rl.bench.answers import BenchRun, settings_words
from rl.bench.baselines import BASELINE_MODEL
from rl.bench.compare import (
    MEASURE_NAMES,
    Comparison,
    Difference,
    outcome,
    primary_and_usual,
    signed,
    verdict,
)
from rl.bench.markup import latex, markdown
from rl.bench.metrics import Graded, Tables, grade_histogram, grade_run, on_equal_terms, tables
from rl.bench.samples import Sample, choose, make_sample
from rl.bench.views import TableView, all_views, differences_table
from rl.errors import staged

REPORT_FILE = "report.html"


def write_report(
    out_dir: Path,
    runs: Mapping[str, BenchRun],
    comparison: Comparison,
    metrics_jsonl: Path | None = None,
    axes: Sequence[int] = (2, 0, 1),
) -> Path:
    """Write `report.html`, `tables.md`, `tables.tex`, `results.json`, and `samples.parquet`: every item as graded.

    Args:
        out_dir: folder to write into.
        runs: label -> run, in the order of the tables' rows, baselines included. The two compared runs are found by
            the names in `comparison`.
        comparison: the comparison the verdict is about.
        metrics_jsonl: log of the GRPO run, for its curves.
        axes: file axis of slice, x and y (`rl.data.boxes.Convention.axes`), to cut the volumes.

    Returns:
        The path of `report.html`.

    Raises:
        ValueError: a compared run is not among `runs`, or the runs do not belong in one table.
        MetricsError: the log cannot be read.
    """
    graded = {name: grade_run(run) for name, run in runs.items()}
    by_run = {name: tables(g) for name, g in graded.items()}
    views, differences = all_views(by_run), differences_table(comparison)
    arms = [_find(runs, meta.name) for meta in (comparison.a, comparison.b)]
    arm_runs, arm_graded = [runs[name] for name in arms], on_equal_terms(*(graded[name] for name in arms))
    box_given = any(run.meta.box_given for run in arm_runs)
    chosen = choose(*arm_graded)
    samples = [make_sample(item, kind, arm_runs, arm_graded, axes) for item, kind in chosen.items()]
    fixed = [name for name, run in runs.items() if run.meta.model == BASELINE_MODEL]
    page = {
        **_verdict_part(comparison),
        "runs": runs,
        "views": views,
        "failures": {name: t.failures for name, t in by_run.items()},
        "differences": differences,
        "forest": figures.forest_plot(comparison),
        "histograms": figures.grade_histograms({name: grade_histogram(graded[name]) for name in arms}),
        "curves": figures.reward_curves(figures.read_metrics(metrics_jsonl)) if metrics_jsonl else None,
        "confusion": figures.confusion({name: graded[name].attributes for name in arms}),
        "ious": None
        if box_given
        else figures.iou_distributions({name: graded[name].items for name in [*fixed, *arms]}),
        "samples": samples,
        "filters": _filters(samples, comparison.b.name),
        "slug": slug,
        "arms": [comparison.a.name, comparison.b.name],
        "colours": {"truth": figures.TRUTH, "a": figures.ARM_A, "b": figures.ARM_B},
    }
    environment = Environment(
        loader=PackageLoader("rl.bench"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    html = environment.get_template("report.html.j2").render(page)
    out_dir.mkdir(parents=True, exist_ok=True)
    _write(out_dir / "tables.md", _tables_md([*views, differences], by_run, comparison))
    _write(out_dir / "tables.tex", "\n".join(latex(view) for view in [*views, differences]))
    _write_samples(out_dir / "samples.parquet", runs, graded)
    _write(
        out_dir / "results.json",
        json.dumps(_results(by_run, comparison), indent=2, ensure_ascii=False) + "\n",
    )
    _write(out_dir / REPORT_FILE, html)
    return out_dir / REPORT_FILE


def _find(runs: Mapping[str, BenchRun], name: str) -> str:
    for label, run in runs.items():
        if run.meta.name == name:
            return label
    known = ", ".join(repr(run.meta.name) for run in runs.values())
    raise ValueError(f"the comparison is about run {name!r}, which is not among the runs given: {known}")


def _verdict_part(comparison: Comparison) -> dict[str, Any]:
    """The verdict, and its endpoints as short cards."""
    cards = []
    for key in primary_and_usual(comparison):
        difference = comparison.get(*key)
        if difference is not None:
            cards.append(_card(difference, comparison))
    settings = settings_words({meta.name: meta for meta in (comparison.b, comparison.a)})
    return {"comparison": comparison, "verdict": verdict(comparison), "cards": cards, "settings": settings}


def _card(d: Difference, comparison: Comparison) -> dict[str, str]:
    return {
        "title": MEASURE_NAMES[d.measure] + ("" if d.column == "Overall" else f", {d.column}"),
        "outcome": outcome(d),
        "difference": signed(d.difference),
        "interval": f"{comparison.confidence:.0%} interval {signed(d.interval.low)} to {signed(d.interval.high)}",
        "both": f"{comparison.b.name} {d.b:.3f}, {comparison.a.name} {d.a:.3f}",
    }


def _filters(samples: Sequence[Sample], arm: str) -> list[dict[str, Any]]:
    """The choices above the samples: a style class and the words of each."""
    categories = sorted({sample.category for sample in samples})
    return [
        {"name": "category", "title": "Category", "choices": [(slug(c), c) for c in categories]},
        {
            "name": "kind",
            "title": f"Change to {arm}",
            "choices": [("gain", "large gain"), ("loss", "large loss"), ("ordinary", "ordinary item")],
        },
        {
            "name": "grades",
            "title": f"Grades of {arm}",
            "choices": [("right", "all right"), ("wrong", "some wrong")],
        },
    ]


def slug(text: str) -> str:
    """The text as a word for a style class."""
    return re.sub(r"\W+", "-", text.lower())


def _tables_md(views: Sequence[TableView], by_run: Mapping[str, Tables], comparison: Comparison) -> str:
    parts = ["# ReasonKnee-Bench", "", verdict(comparison), ""]
    parts += [markdown(view) for view in views]
    parts += [f"- {name}: {t.failures}." for name, t in by_run.items()]
    return "\n".join(parts) + "\n"


def _results(by_run: Mapping[str, Tables], comparison: Comparison) -> dict[str, Any]:
    """Every number of the report, plain JSON."""
    return {
        "verdict": verdict(comparison),
        "runs": {name: asdict(t) | {"header": t.header} for name, t in by_run.items()},
        "comparison": asdict(comparison),
    }


def _write_samples(path: Path, runs: Mapping[str, BenchRun], graded: Mapping[str, Graded]) -> None:
    """One row per run and item: what was asked, answered and graded."""
    frames = []
    for name, run in runs.items():
        answered = run.answers.select("example_id", "truth_grades", "truth_bbox", "completion")
        items = graded[name].items.join(answered, on="example_id", how="left", maintain_order="left")
        frames.append(items.select(pl.lit(name).alias("run"), pl.all()))
    with staged(path) as staging:
        pl.concat(frames).write_parquet(staging)


def _write(path: Path, text: str) -> None:
    with staged(path) as staging:
        staging.write_text(text, encoding="utf-8")
