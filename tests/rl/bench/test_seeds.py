"""Seeds are the unit for a claim about a method."""

from __future__ import annotations

import dataclasses

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import ttest_1samp

from rl.bench.compare import CompareError, compare
from rl.bench.endpoints import OVERALL
from rl.bench.holm import holm
from rl.bench.seeds import MIN_SEEDS, seed_summaries, seed_summary
from rl.config import CompareConfig

differences = st.floats(-1, 1).map(lambda x: round(x, 6))
of_seeds = st.lists(differences, min_size=MIN_SEEDS, max_size=8)


@pytest.fixture(scope="module")
def comparison(examples, answered):
    items = examples(4, [1, 16, 42])
    pair = answered(items, "SFT", 0.5, seed=1), answered(items, "GRPO", 0.8, seed=2)
    found = compare(*pair, CompareConfig(bootstrap_draws=50))
    overall = tuple(d for d in found.differences if d.column == OVERALL)  # a handful: laws try many
    return dataclasses.replace(found, differences=overall)


def with_difference(comparison, value):
    """A comparison that came out with this difference in every endpoint."""
    changed = (dataclasses.replace(d, difference=value) for d in comparison.differences)
    return dataclasses.replace(comparison, differences=tuple(changed))


def summary_of(comparison, values):
    found = seed_summary([with_difference(comparison, value) for value in values])
    return next(s for s in found if (s.measure, s.column) == ("iou", OVERALL))


@settings(max_examples=50)
@given(values=of_seeds.filter(lambda values: max(values) - min(values) > 1e-3))
def test_interval_and_p_are_those_of_scipys_t_test(comparison, values):
    summary, expected = summary_of(comparison, values), ttest_1samp(values, 0)
    wanted = expected.confidence_interval(0.95)
    assert (summary.interval.low, summary.interval.high) == pytest.approx(wanted, rel=1e-9, abs=1e-9)
    assert summary.p_value == pytest.approx(expected.pvalue, rel=1e-6)


@settings(max_examples=50)
@given(values=of_seeds, random=st.randoms())
def test_the_order_of_the_seeds_changes_nothing(comparison, values, random):
    shuffled = random.sample(values, len(values))
    ours, theirs = summary_of(comparison, values), summary_of(comparison, shuffled)
    assert dataclasses.replace(theirs, differences=ours.differences) == ours
    assert sorted(theirs.differences) == sorted(ours.differences)


def test_three_seeds_that_agree_to_the_last_digit_have_an_interval_of_a_point(comparison):
    same = summary_of(comparison, [0.25] * 3)
    assert (same.interval.low, same.interval.high, same.sd, same.p_value) == (0.25, 0.25, 0, 0)
    assert summary_of(comparison, [0.0] * 3).p_value == 1


@pytest.mark.parametrize("seeds", range(1, MIN_SEEDS))
def test_fewer_than_three_seeds_make_no_claim(comparison, seeds):
    summary = summary_of(comparison, [0.2, 0.4][:seeds])
    assert summary.interval is summary.p_value is summary.p_holm is None
    assert summary.mean == pytest.approx(0.2 + 0.1 * (seeds - 1))
    assert (summary.sd is None) == (seeds == 1)


def test_no_seeds_are_refused():
    with pytest.raises(CompareError, match="at least one"):
        seed_summary([])


def test_seeds_on_different_test_files_are_refused(comparison):
    other = dataclasses.replace(comparison, b=dataclasses.replace(comparison.b, split_file="other.json"))
    with pytest.raises(CompareError, match="differ in test file"):
        seed_summary([comparison, other])


def test_seeds_in_different_settings_are_refused(comparison):
    blind = dataclasses.replace(comparison, b=dataclasses.replace(comparison.b, image="none"))
    with pytest.raises(CompareError, match="or setting"):
        seed_summary([comparison, blind])


def test_arms_are_corrected_together(comparison):
    arms = [[with_difference(comparison, v) for v in values] for values in ([0.1, 0.2, 0.3], [0.1, 0.3, 0.7])]
    overall = [
        next(s for s in arm if (s.measure, s.column) == ("iou", OVERALL)) for arm in seed_summaries(arms)
    ]
    assert [s.p_holm for s in overall] == holm([s.p_value for s in overall])
