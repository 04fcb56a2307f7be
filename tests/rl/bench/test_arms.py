"""Several arms and several seeds: each pair is what it is alone, and what covers all of them is said."""

from __future__ import annotations

import dataclasses
from itertools import permutations

import pytest

from rl.bench.arms import Arm, compare_arms, pairs_of, verdicts
from rl.bench.compare import CompareError, compare_graded, verdict
from rl.bench.differences import differences_table, headline_table, seeds_table
from rl.bench.endpoints import OVERALL, SAME_COLUMNS
from rl.bench.holm import holm
from rl.bench.metrics import grade_run
from rl.config import CompareConfig

QUICK = CompareConfig(bootstrap_draws=100)
SKILLS = {"SFT": 0.4, "GRPO": 0.8, "RLOO": 0.6}


@pytest.fixture(scope="module")
def graded(examples, answered):
    """(arm, seed) -> graded run."""
    items = examples(12, [1, 16, 30, 42, 48, 60])
    return {
        (name, seed): grade_run(answered(items, f"{name} #{seed}", skill, seed=10 * seed, patient_sd=0.1))
        for name, skill in SKILLS.items()
        for seed in (1, 2, 3)
    }


@pytest.fixture(scope="module")
def compared(graded):
    """Compare these arms over these seeds."""
    return lambda names, seeds: compare_arms(
        [Arm(name, tuple(graded[name, seed] for seed in seeds)) for name in names], QUICK
    )


def without_holm(comparison):
    return dataclasses.replace(
        comparison, differences=tuple(dataclasses.replace(d, p_holm=0) for d in comparison.differences)
    )


def test_two_runs_alone_are_compared_as_ever(graded, compared):
    alone = compare_graded(graded["SFT", 1], graded["GRPO", 1], QUICK)
    (arm,) = compared(["SFT", "GRPO"], [1])
    assert arm.pairs == (alone,)
    assert arm.over_seeds == ()
    assert verdicts([arm]) == [verdict(alone)]
    assert seeds_table([arm]) is None


def test_a_pair_comes_out_the_same_whatever_it_stands_beside(graded, compared):
    alone = without_holm(compare_graded(graded["SFT", 2], graded["RLOO", 2], QUICK))
    beside_seeds = compared(["SFT", "RLOO"], [1, 2, 3])[0].pairs[1]
    beside_arms = compared(["SFT", "GRPO", "RLOO"], [2])[1].pairs[0]
    assert without_holm(beside_seeds) == without_holm(beside_arms) == alone


def test_the_order_of_the_seeds_changes_only_the_order_of_the_pairs(compared):
    first, *others = [compared(["SFT", "GRPO"], seeds)[0] for seeds in list(permutations([1, 2, 3]))[:3]]
    by_name = {pair.b.name: pair for pair in first.pairs}
    for other in others:
        assert {pair.b.name: pair for pair in other.pairs} == by_name
        for ours, theirs in zip(first.over_seeds, other.over_seeds, strict=True):
            assert dataclasses.replace(theirs, differences=ours.differences) == ours


def test_holm_covers_the_columns_of_a_measure_in_all_pairs_and_its_overall_apart(compared):
    pairs = pairs_of(compared(["SFT", "GRPO", "RLOO"], [1, 2]))
    assert len(pairs) == 4
    for measure in ("accuracy", "balanced_accuracy", "iou"):
        tests = [d for pair in pairs for d in pair.differences if d.measure == measure]
        columns = [d for d in tests if d.column not in (OVERALL, *SAME_COLUMNS)]
        overall = [d for d in tests if d.column == OVERALL]
        for family in (columns, overall):
            assert [d.p_holm for d in family] == holm([d.p_value for d in family])
    (together,) = {differences_table(compared(["SFT", "GRPO", "RLOO"], [1, 2])).note.split("Holm: ")[1][:95]}
    assert together.startswith("corrected over the columns of a measure in all 4 pairs of runs together")


def test_method_and_checkpoints_are_told_apart(compared):
    paragraph, how_to_read = verdicts(compared(["SFT", "GRPO"], [1, 2, 3]))
    method, checkpoints = paragraph.split("The checkpoints, each pair by itself:")
    assert paragraph.startswith("GRPO against SFT, 3 training seeds of each")
    assert "GRPO won, mean of the differences +" in method
    assert "t interval over seeds" in method
    assert "df 2" in method
    assert "standard deviation between seeds" in method
    assert all(f"#{number} +" in checkpoints for number in (1, 2, 3))
    assert "all 3 pairs of runs together" in how_to_read


def test_tables_of_differences_name_test_file_question_set_reader_and_setting(compared):
    comparisons = compared(["SFT", "GRPO"], [1, 2, 3])
    words = (
        "Test file test.json, 6 questions (1, 16, 30, 42, 48, 60), strict reader, 144 items of 12 patients; "
        "shown the volume, own prompts. "
    )
    for table in (differences_table, seeds_table, headline_table):
        assert table(comparisons).note.startswith(words)


def test_two_seeds_make_no_claim_about_the_method_and_say_why(compared):
    comparisons = compared(["SFT", "GRPO"], [1, 2])
    text = verdicts(comparisons)[0]
    assert "No claim is made about the method: that takes 3 training seeds, and here are 2" in text
    assert "t interval over" not in text
    assert {row.cells[-1] for row in seeds_table(comparisons).rows} == {"no claim"}
    assert "No claim is made with fewer than 3 seeds" in seeds_table(comparisons).note


def test_every_arm_has_its_paragraph_and_its_rows(compared):
    comparisons = compared(["SFT", "GRPO", "RLOO"], [1])
    grpo, rloo, _ = verdicts(comparisons)
    assert grpo.startswith("GRPO #1 against SFT #1")
    assert rloo.startswith("RLOO #1 against SFT #1")
    assert {row.cells[1] for row in headline_table(comparisons).rows} == {
        "GRPO #1 − SFT #1",
        "RLOO #1 − SFT #1",
    }


def test_arms_that_cannot_be_paired_are_refused(graded):
    reference = Arm("SFT", (graded["SFT", 1], graded["SFT", 2]))
    with pytest.raises(CompareError, match="'GRPO' has 1 runs and 'SFT' has 2: they are paired by seed"):
        compare_arms([reference, Arm("GRPO", (graded["GRPO", 1],))], QUICK)
    with pytest.raises(CompareError, match="at least two arms"):
        compare_arms([reference], QUICK)
