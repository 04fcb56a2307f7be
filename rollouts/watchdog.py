"""A worker process under watch: it answers in time, or it is killed and the cause is told.

The engine runs apart from the trainer because it can hang for ever or be killed by the operating system, and
neither may take the trainer along. Messages are a JSON header and raw tensor bytes in shared memory, whose descriptor
goes over a socket (no pickle). The worker leads a session of its own, so that Ctrl-C reaches only the parent, and dies
when the parent does.
"""

from __future__ import annotations

import contextlib
import json
import mmap
import os
import select
import shutil
import signal
import socket
import subprocess
import sys
import threading
import weakref
from collections.abc import Mapping, Sequence
from itertools import accumulate
from multiprocessing.connection import Connection
from multiprocessing.reduction import recv_handle, send_handle
from pathlib import Path
from typing import Any

_LOG_TAIL_BYTES = 2000
_PACKAGE_ROOT = Path(__file__).resolve().parent.parent

Header = dict[str, Any]
Buffer = bytes | memoryview


class WorkerFailure(RuntimeError):
    """The worker died, passed its time limit, or reported an error; it has been killed."""


def send(connection: Connection, header: Mapping[str, Any], buffers: Sequence[Buffer] = ()) -> None:
    """One message: memory that a JSON header and the buffers were written into, one after the other.

    Through the socket itself go a few bytes, for which it has room: a peer that hangs does not keep the sender.
    """
    text = json.dumps({**header, "buffers": [len(buffer) for buffer in buffers]}).encode()
    text += b" " * (-len(text) % mmap.PAGESIZE)  # whole pages are copied faster
    with os.fdopen(os.memfd_create("message"), "wb") as shared:
        shared.writelines([text, *buffers])
        shared.flush()
        connection.send_bytes(str(len(text)).encode())
        send_handle(connection, shared.fileno(), None)


def receive(connection: Connection) -> tuple[Header, list[memoryview]]:
    """The other end of `send`; the buffers are views of the shared memory. Raises EOFError when the peer is gone."""
    start = int(connection.recv_bytes())
    with os.fdopen(recv_handle(connection), "rb+") as shared:
        # all pages at once: one by one they take as long as a copy
        memory = memoryview(mmap.mmap(shared.fileno(), 0, mmap.MAP_SHARED | mmap.MAP_POPULATE))
    header = json.loads(bytes(memory[:start]))
    lengths = header.pop("buffers")
    ends = list(accumulate(lengths, initial=start))[1:]
    return header, [memory[end - length : end] for length, end in zip(lengths, ends, strict=True)]


class WorkerProcess:
    """A fresh Python process that serves requests one at a time.

    Args:
        module: has a `main(connection_fd: str, folder: str)` that calls `die_with_parent` first.
        environment: variables set over this process's own.
        folder: scratch folder, takes the worker's output. The caller removes it; the worker does when the caller
            was killed.
    """

    def __init__(self, module: str, environment: Mapping[str, str], folder: Path) -> None:
        self._log = folder / "worker.log"
        ours, theirs = socket.socketpair()
        # Run by import from where this package lies, after every other path: `-m` would put the working
        # directory first, and a user's own `rollouts/` there would be imported instead.
        code = f"import sys; sys.path.append({str(_PACKAGE_ROOT)!r}); import {module} as m; m.main(*sys.argv[1:])"
        with self._log.open("ab") as log, theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-P", "-c", code, str(theirs.fileno()), str(folder)],
                env={**os.environ, **environment},
                pass_fds=(theirs.fileno(),),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        self._connection = Connection(ours.detach())
        self._kill = weakref.finalize(self, _kill, self._process, self._connection)

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def alive(self) -> bool:
        return self._kill.alive and self._process.poll() is None

    def send(self, header: Mapping[str, Any], buffers: Sequence[Buffer] = ()) -> None:
        """Send a request without waiting for the answer. Raises WorkerFailure when the worker is gone."""
        try:
            send(self._connection, header, buffers)
        except OSError as error:
            raise self._failure("died") from error
        except BaseException:  # Ctrl-C after it: the answer would be taken for that to the next request
            self.kill()
            raise

    def receive(self, timeout_s: float) -> tuple[Header, list[memoryview]]:
        """The answer to the oldest open request.

        Raises:
            WorkerFailure: no answer within `timeout_s` seconds, the worker died, or it answered with an error. The
                worker is killed in each case: after an error an engine's state is not to be trusted.
        """
        try:
            if not self._connection.poll(timeout_s):
                raise self._failure(f"gave no answer within {timeout_s:g} s")
            header, buffers = receive(self._connection)
        except (EOFError, OSError) as error:
            raise self._failure("died") from error
        except BaseException:  # Ctrl-C in the middle of an answer leaves half a message in the socket
            self.kill()
            raise
        if "error" in header:
            raise self._failure(f"failed: {header['error']}")
        return header, buffers

    def request(
        self, header: Mapping[str, Any], buffers: Sequence[Buffer] = (), *, timeout_s: float
    ) -> tuple[Header, list[memoryview]]:
        """`send`, then `receive`."""
        self.send(header, buffers)
        return self.receive(timeout_s)

    def kill(self) -> None:
        """End the worker and everything it started, at once. Idempotent."""
        self._kill()

    def _failure(self, what: str) -> WorkerFailure:
        if not self._kill.alive:
            return WorkerFailure("the engine process has already been ended")
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(0.5)  # a worker whose socket closed is about to have an exit status
        status = self._process.poll()
        exited = f" (exit status {status})" if status is not None else ""
        with self._log.open("rb") as log:
            log.seek(max(0, self._log.stat().st_size - _LOG_TAIL_BYTES))
            tail = log.read().decode(errors="replace").strip()
        self.kill()
        return WorkerFailure(
            f"the engine process {what}{exited}" + (f"; its last output:\n{tail}" if tail else "")
        )


def _kill(process: subprocess.Popen[bytes], connection: Connection) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    connection.close()


def die_with_parent(connection_fd: int, folder: Path) -> threading.Thread:
    """In the worker: a thread that ends this process group when the other end of the socket closes.

    Works for a parent killed with SIGKILL too, on any Unix, and unlike PR_SET_PDEATHSIG it does not depend on
    which thread of the parent started the worker. `folder` is removed on the way out;
    join the returned thread rather than exit when the connection ends, or it is not.
    """

    def watch() -> None:
        poller = select.poll()
        poller.register(connection_fd, 0)  # hang-up is reported without being asked for
        poller.poll()
        shutil.rmtree(folder, ignore_errors=True)
        os.killpg(os.getpgrp(), signal.SIGKILL)

    thread = threading.Thread(target=watch, name="die-with-parent", daemon=True)
    thread.start()
    return thread
