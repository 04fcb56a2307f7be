"""`benchmarks/bench.py`, which needs a quarter of an hour at full size, on a few volumes."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

from rl.bench.answers import read_run
from rl.bench.metrics import grade_run, tables

SCRIPT = Path(__file__).parents[3] / "benchmarks" / "bench.py"


@pytest.fixture(scope="module")
def bench():
    spec = importlib.util.spec_from_file_location("bench_at_scale", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def runs(bench, tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    for name in bench.SKILLS:
        bench.write(folder / name, name, volumes=6)
    return folder


def test_every_phase_is_measured(bench, runs):
    laps = bench.measure(runs, draws=50)
    assert [phase for phase, *_ in laps] == ["reading", "grading", "tables", "comparison"]
    assert all(seconds > 0 and peak > 0.05 for _, seconds, _, peak in laps)


def test_the_made_up_answers_are_as_long_and_as_mixed_as_real_ones(bench, runs):
    run = read_run(runs / "SFT")
    assert 300 < run.answers["completion"].str.len_chars().mean() < 500
    result = tables(grade_run(run))
    assert 0.9 < result.values["strict"]["Overall"].value < 1
    assert 0.2 < result.values["balanced_accuracy"]["Overall"].value < 0.9
    assert all(result.problems[part] for part in ("format", "bbox"))
