"""Intervals and tests hold their level when answers about one patient are alike.

Small simulations, one quantity each; the limits are wide enough for a fixed seed on any machine and far from what
an unclustered method gives.
"""

from __future__ import annotations

import numpy as np
import pytest
from scipy.stats import bootstrap, norm, sem
from scipy.stats import t as student_t

from rl.bench.endpoints import Endpoint, cell_weights, value
from rl.bench.intervals import (
    Resampled,
    bca_interval,
    bootstrap_t_interval,
    bootstrap_weights,
    jackknife_t_interval,
    percentile_interval,
    resample,
)

ONE = np.ones((1, 1))


def balanced(attributes: int, grades: int) -> Endpoint:
    group = np.kron(np.eye(attributes), np.ones((grades, 1)))
    return Endpoint("balanced_accuracy", "Overall", np.eye(attributes * grades), group)


def micro(cells: int) -> Endpoint:
    return Endpoint("accuracy", "Overall", np.ones((cells, 1)), ONE)


def null_world(rng, patients, attributes=6, shares=(0.6, 0.2, 0.2), visits=2):
    """[patients, cells] observations and differences of two equally good models.

    Patients differ in how much either model gets right (shared and own effects), so that items of a patient are
    alike, and visits of a patient repeat the truth.
    """
    effect = 0.9 * rng.normal(size=(patients, 1, 2)) + 0.9 * rng.normal(size=(patients, 1, 1))
    right = 1 / (1 + np.exp(-effect))
    grades = rng.choice(len(shares), p=shares, size=(patients, attributes))
    n, d = np.zeros((2, patients, attributes, len(shares)))
    for _ in range(visits):
        a, b = rng.random((2, patients, attributes)) < np.moveaxis(right, 2, 0)
        index = np.indices((patients, attributes))
        np.add.at(n, (*index, grades), 1)
        np.add.at(d, (*index, grades), b.astype(float) - a)
    return n.reshape(patients, -1), d.reshape(patients, -1)


def test_the_patient_bootstrap_holds_its_level_where_item_resampling_does_not():
    """Under no difference the 95 % interval excludes 0 in about 5 % of worlds; ignoring patients, far more often."""
    rng = np.random.default_rng(0)
    worlds, rejected, p_below, naive = 200, 0, 0, 0
    for world in range(worlds):
        n, d = null_world(rng, 40)
        (result,) = resample(n, d, [micro(18)], 300, seed=world)
        interval = bootstrap_t_interval(result, 0.95)
        rejected += not interval.low <= 0 <= interval.high
        p_below += result.p_value <= 0.05
        # items taken as independent: the difference of an item is -1, 0 or 1, at most one per count
        items, total = n.sum(), d.sum()
        naive_se = np.sqrt(np.abs(d).sum()) / items
        naive += abs(total / items) > norm.ppf(0.975) * naive_se
    assert 0.02 <= rejected / worlds <= 0.085
    assert 0.02 <= p_below / worlds <= 0.085
    assert naive / worlds > 0.12


@pytest.mark.parametrize("patients", [20, 40])
def test_balanced_accuracy_is_covered_with_few_patients(patients):
    rng = np.random.default_rng(patients)
    worlds, covered = 200, np.zeros(2)
    for world in range(worlds):
        n, d = null_world(rng, patients)
        (result,) = resample(n, d, [balanced(6, 3)], 300, seed=world)
        for i, method in enumerate((bootstrap_t_interval, jackknife_t_interval)):
            interval = method(result, 0.95)
            covered[i] += interval.low <= 0 <= interval.high
    assert ((covered / worlds >= 0.92) & (covered / worlds <= 0.99)).all()


@pytest.mark.slow
@pytest.mark.parametrize("patients", [20, 40])
def test_the_method_is_calibrated_with_few_patients(patients):
    calibration(patients)


@pytest.mark.evidence
def test_the_method_is_calibrated_at_the_size_of_the_benchmark():
    calibration(399)


def calibration(patients):
    """1,000 worlds without a difference: how often the 5 % test rejects and the 95 % interval covers.

    A sound test rejects in 3.5-6.5 % of them with probability .97; one that takes items for independent in a quarter.
    """
    rng = np.random.default_rng(patients)
    worlds, rejected, covered, naive = 1000, np.zeros(2), np.zeros(2), 0
    for world in range(worlds):
        n, d = null_world(rng, patients)
        for i, result in enumerate(resample(n, d, [micro(18), balanced(6, 3)], 1000, seed=world)):
            interval = bootstrap_t_interval(result, 0.95)
            rejected[i] += result.p_value <= 0.05
            covered[i] += interval.low <= 0 <= interval.high
        naive += abs(d.sum()) > norm.ppf(0.975) * np.sqrt(np.abs(d).sum())
    shown = f"{patients} patients: rejected {rejected / worlds}, covered {covered / worlds}, naive {naive / worlds}"
    print(shown)
    assert ((rejected / worlds >= 0.035) & (rejected / worlds <= 0.065)).all(), shown
    assert ((covered / worlds >= 0.935) & (covered / worlds <= 0.965)).all(), shown
    assert naive / worlds > 0.2, shown


def test_a_mean_gets_the_intervals_scipy_gives_it():
    """With one observation per patient an endpoint is a mean, and percentile and BCa must match scipy's."""
    values = np.random.default_rng(0).gamma(1.0, 0.2, size=60)
    (result,) = resample(np.ones((60, 1)), values[:, None], [micro(1)], 20_000, seed=0)
    assert result.estimate == pytest.approx(values.mean())
    assert result.se == pytest.approx(values.std(ddof=1) / np.sqrt(60))
    for ours, method in ((percentile_interval, "percentile"), (bca_interval, "BCa")):
        theirs = bootstrap((values,), np.mean, n_resamples=20_000, method=method, rng=1).confidence_interval
        mine = ours(result, 0.95)
        assert (mine.low, mine.high) == pytest.approx((theirs.low, theirs.high), abs=0.003)


def test_the_jackknife_of_a_mean_is_the_t_interval_of_the_textbook():
    values = np.random.default_rng(0).gamma(1.0, 0.2, size=60)
    (result,) = resample(np.ones((60, 1)), values[:, None], [micro(1)], 10, seed=0)
    mine = jackknife_t_interval(result, 0.95)
    assert (mine.low, mine.high) == pytest.approx(student_t.interval(0.95, 59, values.mean(), sem(values)))


def test_each_draw_is_the_estimate_on_the_drawn_patients():
    """The matrix form equals pooling the drawn patients' items and computing the endpoint from scratch."""
    n, d = null_world(np.random.default_rng(1), 15)
    endpoint = balanced(6, 3)
    (result,) = resample(n, d, [endpoint], 50, seed=3)
    (weights,) = bootstrap_weights(15, 50, seed=3)
    for draw in (0, 17, 49):
        drawn = np.repeat(np.arange(15), weights[draw].astype(int))
        totals, sums = n[drawn].sum(0).reshape(6, 3), d[drawn].sum(0).reshape(6, 3)
        recalls = [
            [s / t for s, t in zip(s_row, t_row, strict=True) if t > 0]
            for s_row, t_row in zip(sums, totals, strict=True)
        ]
        assert result.draws[draw] == pytest.approx(np.mean([np.mean(r) for r in recalls if r]))


def test_a_grade_absent_from_a_draw_is_left_out_of_its_mean():
    group = np.ones((2, 1))
    assert value(np.array([4.0, 0.0]), np.array([1.0, 0.0]), group) == 0.25
    assert np.isnan(value(np.zeros(2), np.zeros(2), group))
    assert cell_weights(np.array([4.0, 2.0]), group).tolist() == [0.5, 0.5]


def test_patients_that_are_all_alike_leave_no_doubt():
    (result,) = resample(np.full((10, 1), 3.0), np.full((10, 1), 1.0), [micro(1)], 100, seed=0)
    interval = bootstrap_t_interval(result, 0.95)
    assert (interval.low, interval.high) == pytest.approx((1 / 3, 1 / 3))


def test_an_interval_stays_inside_the_possible():
    result = Resampled(
        estimate=0.9,
        se=0.5,
        jackknife=np.array([0.8, 0.9, 1.0]),
        draws=np.array([0.9, 0.1, 1.0, 0.4]),
        draw_ses=np.array([0.1, 0.0, 0.2, 0.1]),
        p_value=0.5,
    )
    interval = bootstrap_t_interval(result, 0.95)
    assert (interval.low, interval.high) == (-1, 1)
