"""Comparing two runs: nothing where there is nothing, something where it was planted, only like with like."""

from __future__ import annotations

import dataclasses

import polars as pl
import pytest

from rl.bench.answers import BenchRun
from rl.bench.compare import (
    CompareError,
    check_same_items,
    compare,
    corrected,
    detectable,
    outcome,
    outcome_of,
    signed,
    verdict,
)
from rl.bench.holm import holm
from rl.bench.metrics import grade_run, tables
from rl.config import CompareConfig

QUICK = CompareConfig(bootstrap_draws=1000)
QUESTIONS = [1, 2, 16, 17, 30, 42, 48, 54, 60, 61]


@pytest.fixture(scope="module")
def items(examples):
    return examples(24, QUESTIONS)


@pytest.fixture(scope="module")
def weak(items, answered):
    return answered(items, "SFT", 0.5, seed=1, patient_sd=0.1)


@pytest.fixture(scope="module")
def strong(items, answered):
    return answered(items, "GRPO", 0.8, seed=2, patient_sd=0.1)


@pytest.fixture(scope="module")
def comparison(weak, strong):
    return compare(weak, strong, QUICK)


def named(run: BenchRun, name: str) -> BenchRun:
    return BenchRun(dataclasses.replace(run.meta, name=name), run.answers)


def test_identical_runs_differ_by_exactly_0(weak):
    for difference in compare(weak, named(weak, "again"), QUICK).differences:
        assert difference.difference == 0
        for interval in (difference.interval, difference.jackknife, difference.percentile, difference.bca):
            assert (interval.low, interval.high) == (0, 0)
        assert difference.p_value == 1
        assert outcome(difference) == "no difference shown"


def test_a_planted_improvement_is_found(comparison):
    for measure in ("accuracy", "balanced_accuracy", "balanced_accuracy_pooled", "iou"):
        difference = comparison.get(measure)
        assert difference.difference > 0.1
        assert outcome(difference) == "won"
        assert difference.p_value < 0.01


def test_turning_the_comparison_round_turns_every_sign(weak, strong, comparison):
    for there, back in zip(comparison.differences, compare(strong, weak, QUICK).differences, strict=True):
        assert (back.a, back.b) == (there.b, there.a)
        assert back.difference == pytest.approx(-there.difference, abs=1e-12)
        assert back.interval.low == pytest.approx(-there.interval.high, abs=1e-9)
        assert back.p_value == there.p_value


def test_the_compared_values_are_the_tables_values(weak, strong, comparison):
    of_a, of_b = tables(grade_run(weak)).values, tables(grade_run(strong)).values
    for difference in comparison.differences:
        cell_a, cell_b = (
            of_a[difference.measure][difference.column],
            of_b[difference.measure][difference.column],
        )
        assert (difference.a, difference.b) == pytest.approx((cell_a.value, cell_b.value))
        assert difference.difference == pytest.approx(cell_b.value - cell_a.value)
        assert difference.n == cell_a.n


def test_the_order_of_rows_does_not_matter(weak, strong, comparison):
    shuffled = BenchRun(strong.meta, strong.answers.sample(fraction=1, shuffle=True, seed=0))
    for ours, theirs in zip(comparison.differences, compare(weak, shuffled, QUICK).differences, strict=True):
        assert ours.difference == pytest.approx(theirs.difference)
        assert ours.interval.low == pytest.approx(theirs.interval.low)


def test_the_seed_decides_the_interval(weak, strong, comparison):
    assert compare(weak, strong, QUICK, seed=0) == comparison
    assert compare(weak, strong, QUICK, seed=1).get("iou").interval != comparison.get("iou").interval


def test_empty_columns_are_absent(comparison):
    assert comparison.get("accuracy", "Periarticular") is None
    assert comparison.get("iou", "Synovitis") is not None


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("dataset_fingerprint", "other"),
        ("split_file", "test_balanced.json"),
        ("reader", "tolerant"),
        ("question_ids", (1, 2)),
    ],
)
def test_runs_on_different_terms_are_refused_by_field(weak, strong, field, value):
    other = BenchRun(dataclasses.replace(strong.meta, **{field: value}), strong.answers)
    with pytest.raises(CompareError, match=f"differ in {field}"):
        compare(weak, other, QUICK)


def test_every_differing_term_is_named_at_once(weak, strong):
    meta = dataclasses.replace(strong.meta, split_file="test_balanced.json", question_ids=(1, 2))
    with pytest.raises(
        CompareError, match=r"split_file: .*test_balanced.*; question_ids: .*\(1, 2\); evaluate"
    ):
        compare(weak, BenchRun(meta, strong.answers), QUICK)


def test_items_of_one_run_only_are_refused_by_name(weak, strong):
    fewer = BenchRun(strong.meta, strong.answers.tail(-1))
    with pytest.raises(
        CompareError, match=f"1 items are in one run only, e.g. {strong.answers['example_id'][0]}"
    ):
        check_same_items(weak, fewer)


def test_another_truth_is_refused_with_both_truths_named(weak, examples, answered):
    other = [
        dataclasses.replace(e, truth=dataclasses.replace(e.truth, grades=dict.fromkeys(e.truth.grades, 1)))
        for e in examples(24, QUESTIONS)
    ]
    with pytest.raises(CompareError, match=r"items differ .* truth_grades: .* against"):
        compare(weak, answered(other, "GRPO", 0.5), QUICK)


def test_an_unknown_primary_endpoint_is_refused(weak, strong):
    with pytest.raises(CompareError, match="primary_endpoint is 'balanced'"):
        compare(weak, strong, dataclasses.replace(QUICK, primary_endpoint="balanced"))


def test_the_verdict_says_who_won_on_each_of_the_two_apart(comparison):
    text = verdict(comparison)
    assert "Balanced accuracy (the primary endpoint, declared in the config): GRPO won" in text
    assert "Mean IoU: GRPO won" in text
    for words in (
        "24 patients",
        "480 items",
        "test.json",
        "greedy decoding",
        "strict reader",
        "95% interval +",
    ):
        assert words in text
    assert "\n" not in text


def test_the_verdict_says_lost_and_no_difference_shown(weak, strong):
    assert "Mean IoU: GRPO lost" in verdict(compare(named(strong, "SFT"), named(weak, "GRPO"), QUICK))
    same = verdict(compare(weak, named(weak, "again"), QUICK))
    assert "no difference shown" in same
    assert "difference 0.000 (95% interval 0.000 to 0.000)" in same


def in_setting(run: BenchRun, name: str, **changed: str) -> BenchRun:
    return BenchRun(dataclasses.replace(run.meta, name=name, **changed), run.answers)


def test_a_blind_run_may_be_compared_and_both_settings_are_said(weak):
    said = verdict(compare(weak, in_setting(weak, "SFT-none", image="none"), QUICK))
    assert (
        "; SFT-none: shown no picture, own prompts; SFT: shown the volume, own prompts). They differ in"
        in said
    )
    assert "shown the volume, own prompts)." in verdict(compare(weak, named(weak, "again"), QUICK))


def test_prompts_of_another_source_are_said_and_told_apart_by_content(weak):
    runs = [in_setting(weak, h, prompts="guided.json", prompts_hash=h) for h in ("0a", "0b")]
    said = verdict(compare(*runs, QUICK))
    assert (
        "0b: shown the volume, prompts of guided.json (0b); 0a: shown the volume, prompts of guided" in said
    )


def test_iou_is_not_compared_with_a_run_that_was_shown_the_true_regions(items, weak, answered_cut_out):
    given = answered_cut_out(items, "cut")
    for pair in ((weak, given), (given, weak)):
        comparison = compare(*pair, QUICK)
        assert {d.measure for d in comparison.differences} & {"iou", "accuracy"} == {"accuracy"}
        assert "Mean IoU: not comparable, the true box was given." in verdict(comparison)
        with pytest.raises(CompareError, match="shown the true region"):
            compare(*pair, dataclasses.replace(QUICK, primary_endpoint="iou"))


def test_the_verdict_names_a_primary_column(weak, strong):
    settings = dataclasses.replace(QUICK, primary_endpoint="accuracy/BML")
    assert "Accuracy of BML (the primary endpoint" in verdict(compare(weak, strong, settings))


def test_a_primary_endpoint_that_was_changed_after_the_answers_were_made_is_told(weak, strong):
    def declared(run, endpoint):
        return BenchRun(dataclasses.replace(run.meta, primary_endpoint=endpoint), run.answers)

    runs = declared(weak, "iou"), declared(strong, "iou")
    assert "(the primary endpoint, chosen after the answers were made, when it was iou)" in verdict(
        compare(*runs, QUICK)
    )
    settings = dataclasses.replace(QUICK, primary_endpoint="iou")
    assert "Mean IoU (the primary endpoint, declared in the config)" in verdict(compare(*runs, settings))


def test_a_handful_of_patients_is_no_evidence(examples, answered):
    few = examples(9, [1, 42])
    result = compare(answered(few, "SFT", 0.2), answered(few, "GRPO", 0.9), QUICK)
    text = verdict(result)
    assert outcome_of(result.get("balanced_accuracy").interval) == "won"
    assert {outcome(d) for d in result.differences} == {"too few patients"}
    assert "With 9 patients nothing here should be taken as shown" in text


def test_one_patient_shows_nothing_however_large_the_difference(examples, answered):
    one = examples(1, [1, 42])
    result = compare(answered(one, "SFT", 0.0), answered(one, "GRPO", 1.0), QUICK)
    assert result.n_patients == 1
    assert {outcome_of(d.interval) for d in result.differences} == {"no difference shown"}


def test_four_times_the_patients_show_half_the_difference(comparison):
    difference = comparison.get("iou")
    patients = difference.n_patients
    assert detectable(difference, 4 * patients, 0.95) == detectable(difference, patients, 0.95) / 2
    # the textbook's 1.96 + 0.84 standard errors
    assert detectable(difference, patients, 0.95) == pytest.approx(2.8016 * difference.se, rel=1e-4)


def test_a_negative_zero_is_never_written():
    assert [signed(x) for x in (-0.0001, 0.0121, -0.5)] == ["0.000", "+0.012", "−0.500"]


def test_a_run_that_reads_nothing_loses(weak):
    broken = BenchRun(
        dataclasses.replace(weak.meta, name="broken"), weak.answers.with_columns(completion=pl.lit("…"))
    )
    result = compare(weak, broken, QUICK)
    assert outcome(result.get("balanced_accuracy")) == "lost"
    assert result.get("strict").b == 0


def test_an_outcome_that_holms_correction_takes_back_says_so():
    assert corrected("won", 0.04, 0.95) == "won"
    assert corrected("won", 0.2, 0.95) == "won, Holm > 0.05"
    assert corrected("lost", 0.2, 0.9) == "lost, Holm > 0.1"
    assert corrected("no difference shown", 0.2, 0.95) == "no difference shown"
    assert corrected("too few patients", 0.2, 0.95) == "too few patients"


def test_holm_adjusts_as_in_the_textbook():
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.9, 0.8]) == [1.0, 1.0]
    assert holm([]) == []


def test_columns_are_corrected_within_their_measure_and_overall_stands_alone(examples, answered):
    chosen = examples(12, range(1, 63))
    a, b = answered(chosen, "SFT", 0.5, seed=1), answered(chosen, "GRPO", 0.6, seed=2)
    comparison = compare(a, b, CompareConfig(bootstrap_draws=200))
    by_key = {(d.measure, d.column): d for d in comparison.differences}
    for measure in ("accuracy", "iou"):
        family = [
            d
            for (m, c), d in by_key.items()
            if m == measure and c not in ("Overall", "Osteophytes", "Menisci")
        ]
        assert [d.p_holm for d in family] == holm([d.p_value for d in family])
        assert by_key[measure, "Overall"].p_holm == by_key[measure, "Overall"].p_value
    assert by_key["accuracy", "Menisci"].p_holm == by_key["accuracy", "Meniscus"].p_holm
