"""Progress of a stage in a log file: plain lines with what is left."""

from __future__ import annotations

import io
from types import SimpleNamespace

import pytest
from rich.console import Console

from rl import progress
from rl.progress import StageProgress, clock


@pytest.fixture
def times(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The clock, first entry now."""
    now = [0.0]
    monkeypatch.setattr(progress, "time", SimpleNamespace(monotonic=lambda: now[0]))
    return now


def test_a_log_gets_a_line_now_and_then_and_at_the_end(times: list[float]) -> None:
    log = io.StringIO()
    with StageProgress("embed", Console(file=log)) as stage:
        for done in range(1, 6):
            times[0] = 10.0 * done
            stage.update(done, 5, "volumes")
    assert log.getvalue().splitlines() == [
        "embed: 2/5, ETA 30 s  volumes",
        "embed: 4/5, ETA 10 s  volumes",
        "embed: 5/5  volumes",
    ]


def test_a_run_that_goes_on_does_not_count_what_was_done_before(times: list[float]) -> None:
    log = io.StringIO()
    with StageProgress("GRPO", Console(file=log)) as stage:
        stage.update(50, 60)
        times[0] = 20.0
        stage.update(52, 60)
    assert log.getvalue() == "GRPO: 52/60, ETA 1 min 20 s\n"


def test_the_second_part_of_a_stage_does_not_count_the_first(times: list[float]) -> None:
    log = io.StringIO()
    with StageProgress("SFT", Console(file=log)) as stage:
        for now, done, total in ((0.0, 1, 60), (590.0, 60, 60), (600.0, 1, 140), (620.0, 3, 140)):
            times[0] = now
            stage.update(done, total)
    assert log.getvalue().splitlines()[-1] == "SFT: 3/140, ETA 22 min 50 s"


def test_a_notebooks_wish_for_colours_does_not_make_its_log_a_terminal(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Jupyter sets FORCE_COLOR for all it starts, and a live bar in a file is megabytes of control codes."""
    monkeypatch.setenv("FORCE_COLOR", "1")
    log = io.StringIO()
    with StageProgress("embed", Console(file=log)) as stage:
        stage.update(1, 1)
        stage.log("done")
    assert log.getvalue() == "embed: 1/1\ndone\n"


def test_durations_are_easy_to_read() -> None:
    assert [clock(s) for s in (0.4, 8, 185, 7800)] == ["0 s", "8 s", "3 min 05 s", "2 h 10 min"]
