"""A handful of answers with their volume in three planes, chosen by rule and not by hand."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import polars as pl

from rewards.ontology import QUESTIONS, Question
from rewards.suite import RewardRow, RewardSuite
from rewards.types import Answer
from rl.bench.answers import BenchRun, examples_of, row_truth
from rl.bench.meta import RunMeta
from rl.bench.metrics import Graded, read_row
from rl.bench.planes import Plane, draw_planes, load_volume
from rl.config_rewards import RewardsConfig
from rollouts.prompts import answer_template, question_text
from rollouts.volumes import VolumeError

MAX_SHOWN_CHARS = 4000
"""Characters of a completion that are shown."""
CANDIDATES = 50
"""How far down a ranking a sample may be taken for the sake of variety."""

Kind = Literal["gain", "loss", "ordinary"]


@dataclass(frozen=True, slots=True)
class GradeLine:
    """One attribute of a sample, as text; `*_right` is None where there is no true grade."""

    attribute: str
    truth: str
    a: str
    b: str
    a_right: bool | None
    b_right: bool | None


@dataclass(frozen=True, slots=True)
class RewardLine:
    """What one component of the reward, or all together, paid both answers, as text."""

    component: str
    a: str
    b: str


@dataclass(frozen=True, slots=True)
class Sample:
    """One item with both answers."""

    example_id: str
    kind: Kind
    category: str
    question: str
    grades: tuple[GradeLine, ...]
    rewards: tuple[RewardLine, ...]
    """Empty where no rewards are configured, or a box was given."""
    box_a: str
    box_b: str
    """`IoU 0.43`, `no box read`, or nothing where there is no true box to compare with."""
    strict_a: bool
    strict_b: bool
    completion_a: str
    completion_b: str
    planes: tuple[Plane, ...]
    missing_volume: str
    """Why there are no planes; empty when there are."""

    @property
    def all_right(self) -> bool:
        """Whether b answered every grade that has a truth right."""
        return all(line.b_right is not False for line in self.grades)


def choose(a: Graded, b: Graded, count: int = 6) -> dict[str, Kind]:
    """Items worth looking at, example_id -> kind, from different volumes and categories as far as possible.

    An item's score is the mean of its share of right grades and its IoU. Chosen are `count` items each among the
    largest gains of b over a, among its largest losses, and around the median of b.
    """
    scores = _scores(a).join(_scores(b), on="example_id", suffix="_b").sort("example_id")
    gain, from_median = (
        pl.col("score_b") - pl.col("score"),
        (pl.col("score_b") - pl.col("score_b").median()).abs(),
    )
    rankings: dict[Kind, pl.DataFrame] = {
        "gain": scores.filter(gain > 0).sort(gain, descending=True, maintain_order=True),
        "loss": scores.filter(gain < 0).sort(gain, maintain_order=True),
        "ordinary": scores.sort(from_median, maintain_order=True),
    }
    traits = {row[0]: row[1:] for row in b.items.select("example_id", "volume_id", "category").iter_rows()}
    chosen: dict[str, Kind] = {}
    seen: set[str] = set()
    for kind, ranking in rankings.items():
        for _ in range(count):
            left = [item for item in ranking["example_id"].head(CANDIDATES) if item not in chosen]
            if left:
                # min keeps the first of equals, so the ranking decides between equally new items
                pick = min(left, key=lambda item: sum(trait in seen for trait in traits[item]))
                chosen[pick] = kind
                seen.update(traits[pick])
    return chosen


def reward_suites(settings: RewardsConfig, metas: Sequence[RunMeta]) -> list[RewardSuite]:
    """The configured rewards for each run, with the reader of that run; none where one was shown the true region.

    Rewards that rise with performance stand where they started. One that fails costs its own figure only.
    """
    if any(meta.box_given for meta in metas):
        return []
    return [
        RewardSuite.from_config(
            {"components": settings.components, "reader": meta.reader, "on_error": "score_none"},
            reasoning=meta.reasoning,
        )
        for meta in metas
    ]


def make_sample(
    example_id: str,
    kind: Kind,
    arms: Sequence[BenchRun],
    graded: Sequence[Graded],
    axes: Sequence[int],
    suites: Sequence[RewardSuite] = (),
) -> Sample:
    """Everything the report shows of one item.

    Args:
        example_id: the item, in both runs.
        kind: what it was chosen as.
        arms: the runs a and b.
        graded: the same, graded.
        axes: file axis of slice, x and y (`rl.data.boxes.Convention.axes`).
        suites: what rewards the answers of a and of b; empty for none.
    """
    a, b = arms
    this = pl.col("example_id") == example_id
    item_a, item_b = (g.items.row(by_predicate=this, named=True) for g in graded)
    row_a, row_b = (run.answers.row(by_predicate=this, named=True) for run in (a, b))
    question, truth = QUESTIONS[row_a["question_id"]], row_truth(row_a)
    answer_a, answer_b = read_row(row_a, a.meta), read_row(row_b, b.meta)
    planes: tuple[Plane, ...] = ()
    missing = ""
    try:
        volume = load_volume(row_a["image_path"], axes)
        planes = draw_planes(volume, {"truth": truth.bbox, "a": answer_a.bbox, "b": answer_b.bbox})
    except VolumeError as error:  # the answers are worth showing without their images
        missing = str(error)
    return Sample(
        example_id=example_id,
        kind=kind,
        category=question.category,
        question=question_text(question).removesuffix(answer_template(question)).strip(),
        grades=_grade_lines(question, truth.grades, answer_a, answer_b),
        rewards=_reward_lines(suites, [run.answers.filter(this) for run in arms]) if suites else (),
        box_a=_box_words(item_a),
        box_b=_box_words(item_b),
        strict_a=item_a["strict"],
        strict_b=item_b["strict"],
        completion_a=_capped(row_a["completion"]),
        completion_b=_capped(row_b["completion"]),
        planes=planes,
        missing_volume=missing,
    )


def _scores(graded: Graded) -> pl.DataFrame:
    """example_id, score: mean of the share of right grades and IoU, over those that have a truth."""
    grades = graded.attributes.group_by("example_id").agg(pl.col("correct").cast(pl.Float64).mean())
    joined = graded.items.select("example_id", "iou").join(grades, on="example_id", how="left")
    return joined.select("example_id", score=pl.mean_horizontal("iou", "correct")).drop_nulls()


def _grade_lines(question: Question, truth: Mapping[str, int], a: Answer, b: Answer) -> tuple[GradeLine, ...]:
    lines = []
    for attribute in question.attributes:
        name = attribute.name
        grades = [source.get(name) for source in (truth, a.grades, b.grades)]
        texts = [
            word if grade is None else str(grade)
            for grade, word in zip(grades, ("not graded", "not read", "not read"), strict=True)
        ]
        right = [None if grades[0] is None else grade == grades[0] for grade in grades[1:]]
        lines.append(GradeLine(name, texts[0], texts[1], texts[2], right[0], right[1]))
    return tuple(lines)


def _reward_lines(suites: Sequence[RewardSuite], answers: Sequence[pl.DataFrame]) -> tuple[RewardLine, ...]:
    """A line for each component that judges an answer by itself, and one for the total."""
    a, b = (
        suite.score(next(examples_of(row)), row["completion"][0])
        for suite, row in zip(suites, answers, strict=True)
    )
    names = [name for name in suites[0].names if name not in suites[0].group_rewards]
    lines = [RewardLine(_weighted(name, a), _paid(name, a), _paid(name, b)) for name in names]
    return (*lines, RewardLine("Total", f"{a.total:.3f}", f"{b.total:.3f}"))


def _weighted(name: str, row: RewardRow) -> str:
    return f"{name} (weight {row.weights[name]:.2f})" if name in row.weights else name


def _paid(name: str, row: RewardRow) -> str:
    score = row.components[name]
    return f"{score:.3f}" if score is not None else "failed" if name in row.errors else "does not apply"


def _box_words(item: Mapping[str, Any]) -> str:
    if item["iou"] is None:
        return ""
    return f"IoU {item['iou']:.2f}" if item["box_read"] else "no box read"


def _capped(text: str) -> str:
    if len(text) <= MAX_SHOWN_CHARS:
        return text
    return f"{text[:MAX_SHOWN_CHARS]}… ({len(text) - MAX_SHOWN_CHARS:,} more characters)"
