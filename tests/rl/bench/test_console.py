"""What the terminal shows."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from rl.bench.arms import Arm, compare_arms
from rl.bench.console import print_headlines, print_tables
from rl.bench.metrics import grade_run, tables
from rl.config import CompareConfig


@pytest.fixture
def console():
    return Console(file=io.StringIO(), width=180)


def test_every_table_names_test_file_question_set_reader_items_and_patients(examples, answered, console):
    run = answered(examples(3, [1, 42]), "SFT", 0.5, broken=0.3)
    print_tables({"[red]SFT": tables(grade_run(run))}, console)
    shown = " ".join(console.file.getvalue().split())  # notes are as wide as their tables
    assert shown.count("Test file test.json, 2 questions (1, 42), strict reader, 12 items of 3 patients") == 9
    assert "[red]SFT" in shown  # a name is text, not markup
    assert "greedy decoding" in shown
    assert "could not be read and count as wrong" in shown


def test_every_pair_and_the_method_are_in_one_table(examples, answered, console):
    items = examples(4, [1, 42])
    arms = [
        Arm(name, tuple(grade_run(answered(items, f"{name} #{s}", skill, seed=s)) for s in (1, 2, 3)))
        for name, skill in (("SFT", 0.2), ("[red]GRPO", 0.9))
    ]
    print_headlines(compare_arms(arms, CompareConfig(bootstrap_draws=50)), console)
    shown = console.file.getvalue()
    assert shown.count("[red]GRPO #2 − SFT #2") == 2  # both endpoints; a name is text, not markup
    assert shown.count("[red]GRPO − SFT, 3 seeds") == 2
