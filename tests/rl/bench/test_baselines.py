"""Train majority and train-mean box."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from rewards.boxes import Box3D
from rewards.types import Truth
from rl.bench.answers import make_run
from rl.bench.baselines import baseline_rows, fit_baselines, prior_rows
from rl.bench.endpoints import OVERALL
from rl.bench.metrics import grade_run, tables


def with_truth(example, grade, box, side="right"):
    return dataclasses.replace(example, truth=Truth({"grade": grade}, box), side=side)


@pytest.fixture
def one(examples):
    return examples(1, [42], visits=1)[0]


def test_the_commonest_grade_wins_and_ties_go_to_the_lowest(one):
    train = [with_truth(one, g, None) for g in (3, 3, 1, 1, 0)]
    assert fit_baselines(train).grades(one.question) == {"grade": 1}


def test_the_prior_draws_grades_as_often_as_training_has_them(one):
    baselines = fit_baselines([with_truth(one, g, None) for g in (3, 3, 3, 0)])
    rng = np.random.default_rng(0)
    drawn = [baselines.drawn_grades(one.question, rng)["grade"] for _ in range(2000)]
    assert set(drawn) == {0, 3}
    assert np.mean(drawn) / 3 == pytest.approx(0.75, abs=0.03)


def test_the_prior_answers_every_item_and_the_same_again(examples, meta):
    train, test = examples(6, [1, 42], seed=1), examples(3, [1, 42])
    fitted = fit_baselines(train)
    runs = [
        make_run(prior_rows(fitted, test, "strict", "required", seed), meta("prior", [1, 42]))
        for seed in (0, 0, 1)
    ]
    assert runs[0].answers.equals(runs[1].answers)
    assert not runs[0].answers.equals(runs[2].answers)
    assert tables(grade_run(runs[0])).values["strict"][OVERALL].value == 1


def test_the_mean_box_is_kept_apart_by_side(one):
    train = [
        with_truth(one, 0, Box3D(0, 4, 10, 20, 10, 20), "right"),
        with_truth(one, 0, Box3D(2, 6, 12, 22, 14, 24), "right"),
        with_truth(one, 0, Box3D(10, 14, 10, 20, 10, 20), "left"),
    ]
    fitted = fit_baselines(train)
    assert fitted.box(one.question.region, "right", one.volume.shape) == Box3D(1, 5, 11, 21, 12, 22)
    assert fitted.box(one.question.region, "left", one.volume.shape) == Box3D(10, 14, 10, 20, 10, 20)


def test_the_mean_box_scales_with_the_grid(one):
    fitted = fit_baselines([with_truth(one, 0, Box3D(0, 4, 10, 20, 10, 20))])
    doubled = tuple(2 * n for n in one.volume.shape)
    assert fitted.box(one.question.region, "right", doubled) == Box3D(0, 8, 20, 40, 20, 40)


def test_a_thin_mean_box_still_covers_a_voxel(one):
    fitted = fit_baselines([with_truth(one, 0, Box3D(15, 16, 47, 48, 0, 1))])
    box = fitted.box(one.question.region, "right", (2, 3, 4))
    assert box is not None
    assert box.inside((2, 3, 4))


def test_an_unseen_region_gets_no_box_and_counts_as_a_failure(one, meta):
    baselines = fit_baselines([with_truth(one, 2, None)])
    run = make_run(
        baseline_rows(baselines, [with_truth(one, 2, Box3D(0, 1, 0, 1, 0, 1))], "strict", "none"),
        dataclasses.replace(meta("baseline"), reasoning="none"),
    )
    result = tables(grade_run(run))
    assert result.values["accuracy"][OVERALL].value == 1
    assert result.counts["unread_boxes"] == 1


@pytest.mark.parametrize("reasoning", ["required", "none"])
def test_the_baselines_go_through_the_same_grading(examples, meta, reasoning):
    train, test = examples(30, [1, 16, 42, 60], seed=1), examples(8, [1, 16, 42, 60], seed=2)
    run = make_run(
        baseline_rows(fit_baselines(train), test, "strict", reasoning),
        dataclasses.replace(meta("baseline"), reasoning=reasoning),
    )
    result = tables(grade_run(run))
    assert result.values["strict"][OVERALL].value == 1
    hits = []
    for example in test:
        for name, grade in example.truth.grades.items():
            seen = [e.truth.grades[name] for e in train if e.question == example.question]
            hits.append(grade == np.bincount(seen).argmax())
    assert result.values["accuracy"][OVERALL].value == pytest.approx(np.mean(hits))
    assert result.values["iou"][OVERALL].value > 0.15


def test_fitting_on_nothing_is_an_error():
    with pytest.raises(ValueError, match="needs training examples"):
        fit_baselines([])
