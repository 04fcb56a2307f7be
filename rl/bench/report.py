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
from rl.bench.answers import BenchRun
from rl.bench.arms import ArmComparison, pairs_of, verdicts
from rl.bench.baselines import BASELINE_MODEL
from rl.bench.compare import MEASURE_NAMES, outcome, outcome_of, primary_and_usual, signed, who
from rl.bench.differences import differences_table, seeds_table, settings_of_pairs
from rl.bench.endpoints import OVERALL
from rl.bench.markup import latex, markdown
from rl.bench.metrics import Graded, Tables, grade_histogram, on_equal_terms, tables
from rl.bench.samples import Sample, choose, make_sample, reward_suites
from rl.bench.views import TableView, all_views
from rl.config_rewards import RewardsConfig
from rl.errors import write_atomically
from rl.parquet import write_parquet

REPORT_FILE = "report.html"


def write_report(
    out_dir: Path,
    runs: Mapping[str, BenchRun],
    graded: Mapping[str, Graded],
    comparisons: Sequence[ArmComparison],
    metrics_jsonl: Path | None = None,
    axes: Sequence[int] = (2, 0, 1),
    rewards: RewardsConfig | None = None,
) -> Path:
    """Write `report.html`, `tables.md`, `tables.tex`, `results.json`, and `samples.parquet`: every item as graded.

    Tables, verdict and forest plot show every comparison. Samples, histograms and curves of overlap would make the page
    unwieldy with more: they show the first pair of runs, and say so.

    Args:
        out_dir: folder to write into.
        runs: label -> run, in the order of the tables' rows, baselines included. The compared runs are found by the
            names in `comparisons`.
        graded: the same runs, graded.
        comparisons: what the verdict is about, each further arm against the reference.
        metrics_jsonl: log of the GRPO run, for its curves.
        axes: file axis of slice, x and y (`rl.data.boxes.Convention.axes`), to cut the volumes.
        rewards: what the samples are scored by, component by component; None to leave it out.

    Returns:
        The path of `report.html`.

    Raises:
        ValueError: a compared run is not among `runs`, or the runs do not belong in one table.
        MetricsError: the log cannot be read.
    """
    by_run = {name: tables(g) for name, g in graded.items()}
    views, over_seeds = all_views(by_run), seeds_table(comparisons)
    metrics = figures.read_metrics(metrics_jsonl) if metrics_jsonl else []
    differences = [*([over_seeds] if over_seeds else []), differences_table(comparisons)]
    html = (
        _environment()
        .get_template("report.html.j2")
        .render(
            **_verdict_part(comparisons),
            **_first_pair_part(runs, graded, comparisons, axes, rewards),
            runs=runs,
            views=views,
            failures={name: t.failures for name, t in by_run.items()},
            differences=differences,
            forest=figures.forest_plot(comparisons),
            curves=figures.reward_curves(metrics),
            has_kl=any(record.get("kl") is not None for record in metrics),
            slug=slug,
            colours={"truth": figures.TRUTH, "a": figures.ARM_A, "b": figures.ARM_B},
        )
    )
    out_dir.mkdir(parents=True, exist_ok=True)
    write_atomically(out_dir / "tables.md", _tables_md([*views, *differences], by_run, comparisons))
    write_atomically(out_dir / "tables.tex", "\n".join(latex(view) for view in [*views, *differences]))
    _write_samples(out_dir / "samples.parquet", runs, graded)
    write_atomically(
        out_dir / "results.json",
        json.dumps(_results(by_run, comparisons), indent=2, ensure_ascii=False) + "\n",
    )
    write_atomically(out_dir / REPORT_FILE, html)
    return out_dir / REPORT_FILE


def _environment() -> Environment:
    return Environment(
        loader=PackageLoader("rl.bench"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )


def _first_pair_part(
    runs: Mapping[str, BenchRun],
    graded: Mapping[str, Graded],
    comparisons: Sequence[ArmComparison],
    axes: Sequence[int],
    rewards: RewardsConfig | None,
) -> dict[str, Any]:
    """Samples and figures of the first pair of runs."""
    pair = comparisons[0].pairs[0]
    arms = [_find(runs, meta.name) for meta in (pair.a, pair.b)]
    arm_runs, arm_graded = [runs[name] for name in arms], on_equal_terms(*(graded[name] for name in arms))
    chosen = choose(*arm_graded)
    suites = reward_suites(rewards, [run.meta for run in arm_runs]) if rewards else []
    samples = [make_sample(item, kind, arm_runs, arm_graded, axes, suites) for item, kind in chosen.items()]
    fixed = [name for name, run in runs.items() if run.meta.model == BASELINE_MODEL]
    box_given = pair.a.box_given or pair.b.box_given
    return {
        "arms": [pair.a.name, pair.b.name],
        "histograms": figures.grade_histograms({name: grade_histogram(graded[name]) for name in arms}),
        "confusion": figures.confusion({name: graded[name].attributes for name in arms}),
        "ious": None
        if box_given
        else figures.iou_distributions({name: graded[name].items for name in [*fixed, *arms]}),
        "samples": samples,
        "filters": _filters(samples, pair.b.name),
    }


def _find(runs: Mapping[str, BenchRun], name: str) -> str:
    for label, run in runs.items():
        if run.meta.name == name:
            return label
    known = ", ".join(repr(run.meta.name) for run in runs.values())
    raise ValueError(f"the comparison is about run {name!r}, which is not among the runs given: {known}")


def _verdict_part(comparisons: Sequence[ArmComparison]) -> dict[str, Any]:
    """Title, verdict, and its endpoints as short cards: of the method where there are several seeds."""
    cards = []
    for arm in comparisons:
        keys = primary_and_usual(arm.pairs[0])
        found = [_seeds_card(arm, *key) if arm.over_seeds else _card(arm, *key) for key in keys]
        cards.append({"arm": f"{arm.b} against {arm.a}", "cards": [card for card in found if card]})
    return {
        "title": f"{', '.join(arm.b for arm in comparisons)} against {comparisons[0].a}",
        "pairs": len(pairs_of(comparisons)),
        "settings": settings_of_pairs(comparisons),
        "verdicts": verdicts(comparisons),
        "cards": cards,
    }


def _card(arm: ArmComparison, measure: str, column: str) -> dict[str, str] | None:
    d = arm.pairs[0].get(measure, column)
    if d is None:
        return None
    level = f"{arm.pairs[0].confidence:.0%}"
    return {
        **_card_head(arm, measure, column, outcome(d), d.difference),
        "interval": f"{level} interval {signed(d.interval.low)} to {signed(d.interval.high)}",
        "both": f"{arm.b} {d.b:.3f}, {arm.a} {d.a:.3f}",
    }


def _seeds_card(arm: ArmComparison, measure: str, column: str) -> dict[str, str] | None:
    s = arm.over(measure, column)
    if s is None:
        return None
    seeds, level = len(s.differences), f"{arm.pairs[0].confidence:.0%}"
    interval = f"mean of {seeds} seeds, which are too few for a claim"
    if s.interval:
        low, high = signed(s.interval.low), signed(s.interval.high)
        interval = f"mean of {seeds} seeds, {level} t interval {low} to {high}"
    result = outcome_of(s.interval) if s.interval else "no claim about the method"
    return {
        **_card_head(arm, measure, column, result, s.mean),
        "interval": interval,
        "both": f"by seed {', '.join(map(signed, s.differences))}",
    }


def _card_head(
    arm: ArmComparison, measure: str, column: str, result: str, difference: float
) -> dict[str, str]:
    words = who(arm.b, result)
    return {
        "title": MEASURE_NAMES[measure] + ("" if column == OVERALL else f", {column}"),
        "kind": result.split()[0],
        "outcome": words if words != result else result.capitalize(),
        "difference": signed(difference),
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


def _tables_md(
    views: Sequence[TableView], by_run: Mapping[str, Tables], comparisons: Sequence[ArmComparison]
) -> str:
    parts = ["# ReasonKnee-Bench", ""]
    parts += [line for paragraph in verdicts(comparisons) for line in (paragraph, "")]
    parts += [markdown(view) for view in views]
    parts += [f"- {name}: {t.failures}." for name, t in by_run.items()]
    return "\n".join(parts) + "\n"


def _results(by_run: Mapping[str, Tables], comparisons: Sequence[ArmComparison]) -> dict[str, Any]:
    """Every number of the report, plain JSON; `comparison` is the first pair, `comparisons` all if there are more."""
    pairs = pairs_of(comparisons)
    return {
        "verdict": "\n\n".join(verdicts(comparisons)),
        "runs": {name: asdict(t) | {"header": t.header} for name, t in by_run.items()},
        "comparison": asdict(pairs[0]),
        **({"comparisons": [asdict(arm) for arm in comparisons]} if len(pairs) > 1 else {}),
    }


def _write_samples(path: Path, runs: Mapping[str, BenchRun], graded: Mapping[str, Graded]) -> None:
    """One row per run and item: what was asked, answered and graded."""
    frames = []
    for name, run in runs.items():
        answered = run.answers.select("example_id", "truth_grades", "truth_bbox", "completion")
        items = graded[name].items.join(answered, on="example_id", how="left", maintain_order="left")
        frames.append(items.select(pl.lit(name).alias("run"), pl.all()))
    write_parquet(path, pl.concat(frames))
