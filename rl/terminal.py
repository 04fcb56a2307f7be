"""The driver's terminal, reached from Ray's workers.

Ray can copy every process's output to the driver, but its own messages come along, late and out of order. Here only
what the job says travels, over one actor: step records, lines it prints, and the error it ends with.
"""

from __future__ import annotations

import contextlib
import io
import logging
import threading
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import ray
from ray.exceptions import RayError

if TYPE_CHECKING:  # the actor's process needs neither torch nor what else that module imports
    from rl.training import OnMetrics

SECONDS_BETWEEN_LOOKS = 0.3


@dataclass(frozen=True)
class Failure:
    """The exception a rank ended with."""

    rank: int
    kind: str
    message: str
    own_traceback: str
    """Of the exception itself, without those it was raised from."""


@dataclass(frozen=True)
class News:
    """What arrived since the last look."""

    lines: list[str]
    records: list[dict[str, float]]


class Terminal:
    """The actor in the middle."""

    def __init__(self) -> None:
        self._lines: list[str] = []
        self._records: list[dict[str, float]] = []
        self._failures: list[Failure] = []

    def say(self, line: str) -> None:
        self._lines.append(line)

    def record(self, record: dict[str, float]) -> None:
        self._records.append(record)

    def fail(self, failure: Failure) -> None:
        self._failures.append(failure)

    def take(self) -> News:
        news = News(self._lines, self._records)
        self._lines, self._records = [], []
        return news

    def failures(self) -> list[Failure]:
        return self._failures

    def flush(self) -> None:
        """Answers when everything the caller sent before has arrived."""


def open_terminal() -> Any:
    """Start the actor; the handle goes to the workers."""
    return ray.remote(Terminal).options(num_cpus=0).remote()


class _LineSender(io.TextIOBase):
    """A text stream whose complete lines go to the terminal."""

    def __init__(self, terminal: Any, prefix: str) -> None:
        self._terminal, self._prefix, self._rest = terminal, prefix, ""

    def writable(self) -> bool:
        return True

    def write(self, text: str) -> int:
        *lines, self._rest = (self._rest + text).replace("\r", "\n").split("\n")
        for line in lines:
            if line.strip():
                self._terminal.say.remote(self._prefix + line)
        return len(text)


@contextlib.contextmanager
def connected_to(terminal: Any, rank: int) -> Iterator[OnMetrics]:
    """In a worker: prints, warnings, log records from WARNING up and an exception reach the terminal.

    Yields the function that shows a step's record.
    """
    stream = _LineSender(terminal, f"[rank {rank}] ")
    handler = logging.StreamHandler(stream)
    handler.setLevel(logging.WARNING)
    logging.getLogger().addHandler(handler)
    try:
        with contextlib.redirect_stdout(stream), contextlib.redirect_stderr(stream):
            yield terminal.record.remote
        ray.get(terminal.flush.remote())
    except Exception as error:
        own = "".join(traceback.format_exception(error, chain=False))
        ray.get(terminal.fail.remote(Failure(rank, type(error).__name__, str(error), own)))
        raise
    finally:
        logging.getLogger().removeHandler(handler)


class Viewer(threading.Thread):
    """On the driver: shows what arrives until `stop`, which shows the rest."""

    def __init__(self, terminal: Any, log: Callable[[str], None], show: OnMetrics) -> None:
        super().__init__(name="terminal", daemon=True)
        self._terminal, self._log, self._show = terminal, log, show
        self._stopped = threading.Event()

    def run(self) -> None:
        while not self._stopped.wait(SECONDS_BETWEEN_LOOKS):
            self._look()

    def stop(self) -> list[Failure]:
        """Show what is still there. Returns the failures in the order they happened."""
        self._stopped.set()
        self.join()
        self._look()
        try:
            return list(ray.get(self._terminal.failures.remote(), timeout=10))
        except RayError:
            return []

    def _look(self) -> None:
        try:
            news = ray.get(self._terminal.take.remote(), timeout=10)
        except RayError:  # the actor went with its node, or is too busy: nothing to show
            return
        for line in news.lines:
            self._log(line)
        for record in news.records:
            self._show(record)
