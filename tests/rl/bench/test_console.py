"""What the terminal shows."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from rl.bench.compare import compare
from rl.bench.console import print_comparison, print_tables
from rl.bench.metrics import grade_run, tables
from rl.config import CompareConfig


@pytest.fixture
def console():
    return Console(file=io.StringIO(), width=180)


def test_every_table_names_test_file_question_set_reader_items_and_patients(examples, answered, console):
    run = answered(examples(3, [1, 42]), "SFT", 0.5, broken=0.3)
    print_tables({"[red]SFT": tables(grade_run(run))}, console)
    shown = console.file.getvalue()
    assert shown.count("Test file test.json, 2 questions (1, 42), strict reader, 12 items of 3 patients") == 8
    assert "[red]SFT" in shown  # a name is text, not markup
    assert "greedy decoding" in shown
    assert "could not be read and count as wrong" in shown


def test_a_comparison_prints_verdict_and_differences(examples, answered, console):
    items = examples(4, [1, 42])
    settings = CompareConfig(bootstrap_draws=200)
    print_comparison(compare(answered(items, "SFT", 0.2), answered(items, "GRPO", 0.9), settings), console)
    shown = console.file.getvalue()
    assert "GRPO against SFT" in shown
    assert "Differences, GRPO minus SFT" in shown
