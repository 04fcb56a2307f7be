"""Progress of a stage with an ETA: a live bar on a terminal, a line every so often in a log."""

from __future__ import annotations

import time
from types import TracebackType

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

SECONDS_BETWEEN_LINES = 15.0


class StageProgress:
    """`with StageProgress("embed") as progress: progress.update(3, 10, "12 volumes/s")`."""

    def __init__(self, title: str, console: Console | None = None) -> None:
        self.title = title
        self.console = console or Console(highlight=False)
        # not `is_terminal`: a notebook asks for colours (FORCE_COLOR), and rich takes its log file for a terminal
        self._live = self.console.file.isatty()
        self._bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("ETA"),
            TimeRemainingColumn(elapsed_when_finished=True),
            TextColumn("{task.fields[note]}", markup=False),
            console=self.console,
            disable=not self._live,
            transient=True,
            speed_estimate_period=600,
        )
        self._task = self._bar.add_task(title, total=None, note="")
        self._printed = time.monotonic()
        self._first: tuple[float, int] | None = None
        """When the first report came, and what was done by then: a run that goes on does not begin at 0."""
        self._last = (0, 0)

    def __enter__(self) -> StageProgress:
        self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.stop()

    def update(self, done: int, total: int, note: str = "") -> None:
        """`done` of `total` units are finished."""
        now = time.monotonic()
        if done < self._last[0] or total != self._last[1]:  # another part of the stage begins
            self._bar.reset(self._task)
            self._first = None
        self._last = (done, total)
        self._bar.update(self._task, completed=done, total=total, note=note)
        if self._first is None:
            self._first = (now, done)
        if self._live or (now - self._printed < SECONDS_BETWEEN_LINES and done != total):
            return
        self._printed = now
        started, before = self._first
        left = f", ETA {clock((now - started) / (done - before) * (total - done))}" if done > before else ""
        self.log(f"{self.title}: {done}/{total}{left if done < total else ''}  {note}".rstrip())

    def log(self, text: str) -> None:
        """A line above the bar."""
        self.console.print(text, highlight=False, markup=False, soft_wrap=True)


def clock(seconds: float) -> str:
    """A duration to read: `8 s`, `3 min 05 s`, `2 h 10 min`."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"
