"""Progress of a stage with an ETA: a live bar on a terminal, a line every so often in a log."""

from __future__ import annotations

import time
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

SECONDS_BETWEEN_LINES = 15.0


class StageProgress:
    """`with StageProgress("embed") as progress: progress.update(3, 10, "12 volumes/s")`."""

    def __init__(self, title: str, console: Console | None = None) -> None:
        self.title = title
        self.console = console or Console(highlight=False)
        self._bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("ETA"),
            TimeRemainingColumn(elapsed_when_finished=True),
            TextColumn("{task.fields[note]}"),
            console=self.console,
            disable=not self.console.is_terminal,
        )
        self._task = self._bar.add_task(title, total=None, note="")
        self._started = self._printed = time.monotonic()

    def __enter__(self) -> StageProgress:
        self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.stop()

    def update(self, done: int, total: int, note: str = "") -> None:
        """`done` of `total` units are finished."""
        self._bar.update(self._task, completed=done, total=total, note=note)
        now = time.monotonic()
        if not self.console.is_terminal and (now - self._printed >= SECONDS_BETWEEN_LINES or done == total):
            self._printed = now
            left = (now - self._started) / max(done, 1) * (total - done)
            self.console.print(f"{self.title}: {done}/{total}, ETA {left:.0f} s  {note}")

    def log(self, text: str) -> None:
        """A line above the bar."""
        self.console.print(text, highlight=False, markup=False)
