"""The report's figures as SVG data URIs: an `<img>` cannot run scripts or reach the network."""

from __future__ import annotations

import base64
import io
import json
import math
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import polars as pl
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from rewards.errors import ReasonKneeError
from rl.bench.arms import ArmComparison
from rl.bench.compare import MEASURE_NAMES, corrected, outcome, outcome_of
from rl.bench.differences import shown_endpoints
from rl.bench.endpoints import TABLE3_COLUMNS, grades_of
from rl.bench.intervals import Interval

TRUTH, ARM_A, ARM_B = "#009e73", "#e69f00", "#0072b2"
"""Okabe-Ito colours, told apart with any colour vision; the template's style sheet repeats them."""
GREY = "#777777"
_OUTCOME_COLOURS = {"won": ARM_B, "lost": "#d55e00"}
_STYLE = {
    "font.size": 9,
    "font.family": "sans-serif",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlesize": 9,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "svg.hashsalt": "reasonknee",  # the same figure gives the same bytes
}

KEY_CURVES: Mapping[str, str] = {
    "reward": "Reward (weighted total)",
    "reward_above_prior": "Reward above the prior",
    "validation/balanced_accuracy": "Validation: balanced accuracy",
    "validation/iou": "Validation: mean IoU",
    "kl": "KL to the SFT policy",
    "entropy": "Entropy (nats per token)",
    "completion_length": "Completion length (tokens)",
    "loss": "Loss",
    "clip_ratio": "Clipped share of tokens",
    "grad_norm": "Gradient norm",
}
"""metrics.jsonl key -> panel title, after the reward's components."""


class MetricsError(ReasonKneeError, ValueError):
    """metrics.jsonl cannot be read; the message names file and line."""


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The steps of a training run, in order; of a step logged twice (after a restart) the later one counts.

    Raises:
        MetricsError: the file is missing, or a line is no JSON object with a `step`. A last line without its
            line break is a run caught while writing and is left out.
    """
    if not path.is_file():
        raise MetricsError(f"{path} does not exist; give the metrics.jsonl of the GRPO run")
    lines = path.read_text(encoding="utf-8").split("\n")
    steps: dict[int, dict[str, Any]] = {}
    for number, line in enumerate(lines[:-1], start=1):
        try:
            record = json.loads(line)
            steps[int(record["step"])] = record
        except (ValueError, TypeError, KeyError) as error:
            raise MetricsError(
                f"{path} line {number} is no JSON object with a step: {line[:100]!r}"
            ) from error
    return [steps[step] for step in sorted(steps)]


def reward_curves(metrics: Sequence[Mapping[str, Any]]) -> str | None:
    """One panel for each reward component and key quantity that the run logged; None when it logged nothing."""
    components = sorted({key for record in metrics for key in record if key.startswith("reward/")})
    titles = {**{key: key.removeprefix("reward/") for key in components}, **KEY_CURVES}
    keys = ["reward", *components, *[key for key in KEY_CURVES if key != "reward"]]
    series = {key: [(r["step"], r[key]) for r in metrics if _is_number(r.get(key))] for key in keys}
    shown = [key for key in keys if series[key]]
    if not shown:
        return None

    def draw(figure: Figure) -> None:
        rows = math.ceil(len(shown) / 3)
        for index, key in enumerate(shown):
            axes = figure.add_subplot(rows, 3, index + 1)
            steps, values = zip(*series[key], strict=True)
            axes.plot(
                steps, values, color=ARM_B, alpha=0.35, linewidth=1, marker="." if len(steps) == 1 else None
            )
            axes.plot(steps, _smooth(values), color=ARM_B, linewidth=1.8)
            axes.set_title(titles[key])
            axes.grid(alpha=0.25)
            if index >= len(shown) - 3:
                axes.set_xlabel("step")

    return _svg(draw, 9, 2.0 * math.ceil(len(shown) / 3))


def forest_plot(comparisons: Sequence[ArmComparison]) -> str:
    """Differences with their intervals, grouped by measure: a panel for each further arm, a row for each endpoint.

    Circles are pairs of runs with their interval over patients; a diamond is the mean over seeds, with its interval
    where there is one. Hollow: Holm's correction takes the outcome back.
    """
    endpoints = shown_endpoints(comparisons[0].pairs[0])
    gaps = np.cumsum([0.0, *(0.8 * (a[0] != b[0]) for a, b in pairwise(endpoints))])
    places = np.arange(len(endpoints)) + gaps

    def draw(figure: Figure) -> None:
        panels = figure.subplots(1, len(comparisons), sharey=True, squeeze=False)[0]
        for axes, arm in zip(panels, comparisons, strict=True):
            axes.axvline(0, color="black", linewidth=0.8)
            for endpoint, place in zip(endpoints, places, strict=True):
                _forest_row(axes, arm, endpoint, place)
            axes.grid(axis="x", alpha=0.25)
            axes.spines["left"].set_visible(False)
            axes.tick_params(axis="y", length=0)
            over = "patients (circles) and seeds (diamonds)" if arm.over_seeds else "patients"
            between = ",\n" if len(comparisons) > 1 else ", "
            axes.set_xlabel(
                f"{arm.b} minus {arm.a}{between}{arm.pairs[0].confidence:.0%} interval over {over}"
            )
        panels[0].set_yticks(places, [f"{MEASURE_NAMES[measure]}, {column}" for measure, column in endpoints])
        panels[0].set_ylim(places[-1] + 0.7, -0.7)

    lines = 1 + 0.4 * (len(comparisons[0].pairs) - 1)
    return _svg(draw, 4 + 4 * len(comparisons), 0.6 + 0.24 * lines * len(endpoints))


def grade_histograms(histograms: Mapping[str, pl.DataFrame]) -> str:
    """Predicted grades against the truth, a panel for each column and grade space.

    Args:
        histograms: arm -> `rl.bench.metrics.grade_histogram`, at most two, on the same items.
    """
    first = next(iter(histograms.values()))
    panels = first.select("table2_column", "grade_space").unique(maintain_order=True).rows()

    def draw(figure: Figure) -> None:
        handles: list[Any] = []
        for index, (column, space) in enumerate(panels):
            axes = figure.add_subplot(math.ceil(len(panels) / 3), 3, index + 1)
            handles = _histogram_panel(axes, histograms, column, space)
            if index % 3 == 0:
                axes.set_ylabel("share")
        figure.legend(handles, ["truth", *histograms], loc="outside upper center", ncols=3, frameon=False)

    return _svg(draw, 9, 0.5 + 1.9 * math.ceil(len(panels) / 3))


def confusion(arms: Mapping[str, pl.DataFrame]) -> str:
    """What each true grade was answered with: a matrix for each grade space and arm, rows adding up to 1.

    Args:
        arms: name -> `rl.bench.metrics.Graded.attributes`, on the same items.
    """
    known = {name: frame.filter(pl.col("truth").is_not_null()) for name, frame in arms.items()}
    spaces = sorted(next(iter(known.values()))["grade_space"].unique())

    def draw(figure: Figure) -> None:
        for row, space in enumerate(spaces):
            for column, (name, frame) in enumerate(known.items()):
                axes = figure.add_subplot(len(spaces), len(known), row * len(known) + column + 1)
                _confusion_panel(axes, frame.filter(pl.col("grade_space") == space), space)
                axes.set_title(f"{name}, {space.replace('-', '–')}")
                axes.set_ylabel("true grade" if column == 0 else "")
                axes.set_xlabel("answered" if row == len(spaces) - 1 else "")

    heights = [0.9 + 0.28 * len(grades_of(space)) for space in spaces]
    return _svg(draw, 3.6 * len(known), sum(heights))


def _confusion_panel(axes: Axes, frame: pl.DataFrame, space: str) -> None:
    grades = grades_of(space)
    counts = np.zeros((len(grades), len(grades) + 1))
    for truth, predicted, n in frame.group_by("truth", "predicted").len().iter_rows():
        # an answer outside the space is read as none at all
        counts[grades.index(truth), len(grades) if predicted is None else grades.index(predicted)] = n
    totals = counts.sum(axis=1, keepdims=True)
    shares = counts / np.maximum(totals, 1)
    axes.imshow(shares, cmap="Blues", vmin=0, vmax=1, aspect="auto")
    for (i, j), share in np.ndenumerate(shares):
        if totals[i, 0] and share >= 0.005:
            colour = "white" if share > 0.55 else "black"
            axes.text(
                j, i, f"{share:.2f}"[1:] if share < 0.995 else "1", ha="center", va="center", color=colour
            )
    axes.set_xticks(range(len(grades) + 1), [*map(str, grades), "×"])
    axes.set_yticks(
        range(len(grades)), [f"{g} ({int(n):,})" for g, n in zip(grades, totals[:, 0], strict=True)]
    )
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)


def iou_distributions(runs: Mapping[str, pl.DataFrame]) -> str | None:
    """Share of items whose box overlaps the true one by at least a given IoU, a panel for each structure.

    Args:
        runs: name -> `rl.bench.metrics.Graded.items`, on the same items; the last two are the arms.

    Returns:
        None when no item has a true box.
    """
    structures = [name for name in TABLE3_COLUMNS if _ious(next(iter(runs.values())), name).size]
    if not structures:
        return None
    styles = [*[(GREY, ":")] * (len(runs) - 2), (ARM_A, "-"), (ARM_B, "-")]

    def draw(figure: Figure) -> None:
        handles: list[Any] = []
        for index, structure in enumerate(structures):
            axes = figure.add_subplot(math.ceil(len(structures) / 4), 4, index + 1)
            handles = []
            for (colour, style), frame in zip(styles, runs.values(), strict=True):
                ious = _ious(frame, structure)
                shares = 1 - np.arange(len(ious)) / len(ious)
                handles += axes.step(ious, shares, where="pre", color=colour, linestyle=style, linewidth=1.4)
            axes.set(title=f"{structure} ({len(ious):,})", xlim=(0, 1), ylim=(0, 1.02))
            axes.grid(alpha=0.25)
            if index % 4 == 0:
                axes.set_ylabel("share of items")
            if index >= len(structures) - 4:
                axes.set_xlabel("IoU at least")
        figure.legend(handles, list(runs), loc="outside upper center", ncols=len(runs), frameon=False)

    return _svg(draw, 9, 0.5 + 2.0 * math.ceil(len(structures) / 4))


def _ious(items: pl.DataFrame, structure: str) -> np.ndarray:
    """IoU of every item of a structure that has a true box, ascending."""
    return np.sort(items.filter(pl.col("table3_column") == structure)["iou"].drop_nulls().to_numpy())


def _histogram_panel(
    axes: Axes, histograms: Mapping[str, pl.DataFrame], column: str, space: str
) -> list[Any]:
    width, handles = 0.8 / (1 + len(histograms)), []
    rows = [
        h.filter((pl.col("table2_column") == column) & (pl.col("grade_space") == space))
        for h in histograms.values()
    ]
    bars = [
        (rows[0]["true_count"], TRUTH),
        *zip((r["predicted_count"] for r in rows), (ARM_A, ARM_B), strict=False),
    ]
    for index, (counts, colour) in enumerate(bars):
        shares = (counts / max(int(counts.sum()), 1)).to_list()
        places = [g + (index - len(bars) / 2 + 0.5) * width for g in range(len(shares))]
        handles.append(axes.bar(places, shares, width, color=colour))
    grades = rows[0]["grade"].to_list()
    axes.set_xticks(range(len(grades)), ["×" if g is None else str(g) for g in grades])
    axes.set_ylim(0, 1)
    axes.set_title(f"{column}, {space.replace('-', '–')}")
    return handles


def _forest_row(axes: Axes, arm: ArmComparison, endpoint: tuple[str, str], place: float) -> None:
    found = [pair.get(*endpoint) for pair in arm.pairs]
    summary = arm.over(*endpoint)
    lines: list[tuple[float, Interval | None, float | None, str, str, float]] = [
        (d.difference, d.interval, d.p_holm, outcome(d), "o", 1.8) for d in found if d is not None
    ]
    if summary is not None:
        result = outcome_of(summary.interval) if summary.interval else "no claim"
        lines.append((summary.mean, summary.interval, summary.p_holm, result, "D", 3.0))
    for index, (difference, interval, p_holm, result, marker, width) in enumerate(lines):
        y = place + 0.8 * ((index + 0.5) / len(lines) - 0.5)
        colour = inside = _OUTCOME_COLOURS.get(result, GREY)
        if p_holm is not None and corrected(result, p_holm, arm.pairs[0].confidence) != result:
            inside = "white"
        if interval:
            axes.plot(
                [interval.low, interval.high], [y, y], color=colour, linewidth=width, solid_capstyle="butt"
            )
        axes.plot([difference], [y], marker=marker, color=colour, markerfacecolor=inside, markersize=4.5)


def _smooth(values: Sequence[float]) -> list[float]:
    """Exponential moving average over about a tenth of the run, started at the first value."""
    weight = 2 / (max(len(values) / 10, 1) + 1)
    smoothed = [values[0]]
    for value in values[1:]:
        smoothed.append((1 - weight) * smoothed[-1] + weight * value)
    return smoothed


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _svg(draw: Any, width: float, height: float) -> str:
    """`draw` on a figure of that many inches, as a data URI. Uses no global state, so threads do not matter."""
    buffer = io.BytesIO()
    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(width, height), layout="constrained")
        draw(figure)
        figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
    return f"data:image/svg+xml;base64,{base64.b64encode(buffer.getvalue()).decode('ascii')}"
