"""Arms of a benchmark: each in a process of its own, asked in turn, so that they share one machine and one hour."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import signal
import time
from collections.abc import Callable
from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NamedTuple

import psutil

from rl.heap import keep_freed_memory

Answer = Callable[..., Any]


class Timed(NamedTuple):
    """What an arm did for a request."""

    result: Any
    seconds: float
    bytes: int
    """Most memory that any request has taken so far on top of the arm at rest."""


class Arm:
    """A process that builds `make(*args)`, a function, and calls it with every request.

    It keeps the memory of a request for the next one, as our trainer does; where the arms would not fit into the
    machine together, `gives_back` lets it return what it does not hold, each time.
    """

    def __init__(self, make: Callable[..., Answer], *args: Any, gives_back: bool = False) -> None:
        context = get_context("spawn")
        self._connection, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs, make, args, gives_back))
        self._process.start()
        theirs.close()  # or the death of the process would not be noticed
        self._receive()

    def ask(self, *request: Any) -> Timed:
        """Call the arm's function.

        Raises:
            EOFError: the process was killed, most often for the memory it took.
            SystemExit: it ended with an error, which it has printed.
        """
        self._connection.send(request)
        return Timed(*self._receive())

    def _receive(self) -> Any:
        try:
            return self._connection.recv()
        except EOFError:
            self._process.join()
            if self._process.exitcode == -signal.SIGKILL:
                raise
            raise SystemExit("an arm ended with the error above") from None

    def stop(self) -> None:
        """End the process."""
        with contextlib.suppress(BrokenPipeError):  # it has died already
            self._connection.send(None)
        self._process.join()


def _serve(
    connection: Connection, make: Callable[..., Answer], args: tuple[Any, ...], gives_back: bool
) -> None:
    keep_freed_memory()  # without it, arms with larger tensors would look worse than they are
    answer = make(*args)
    gc.collect()
    resting = psutil.Process().memory_info().rss
    Path("/proc/self/clear_refs").write_text("5")  # forgets what building took
    connection.send("ready")
    while (request := connection.recv()) is not None:
        started = time.perf_counter()
        result = answer(*request)
        seconds = time.perf_counter() - started
        peak = Path("/proc/self/status").read_text().partition("VmHWM:")[2].split()[0]
        if gives_back:
            ctypes.CDLL(None).malloc_trim(0)
        connection.send((result, seconds, 1024 * int(peak) - resting))
