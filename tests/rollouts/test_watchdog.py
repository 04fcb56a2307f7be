"""A worker that dies, hangs or raises is killed and the cause is told; none outlives its parent."""

from __future__ import annotations

import mmap
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from rollouts.watchdog import WorkerFailure, WorkerProcess, send

ECHO_WORKER = """
import os, sys, time
from multiprocessing.connection import Connection
from pathlib import Path
from rollouts.watchdog import die_with_parent, receive, send

def main(fd, folder):
    parents_death = die_with_parent(int(fd), Path(folder))
    connection = Connection(int(fd))
    while True:
        try:
            header, buffers = receive(connection)
        except EOFError:
            parents_death.join()
        if header["op"] == "echo":
            send(connection, header, buffers)
        elif header["op"] == "hang":
            time.sleep(600)
        elif header["op"] == "die":
            print("out of memory, says the worker", flush=True)
            os._exit(9)
        else:
            send(connection, {"error": "a bad tensor"})
"""


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[[], WorkerProcess]]:
    (tmp_path / "echo_worker.py").write_text(ECHO_WORKER)
    workers: list[WorkerProcess] = []

    def make() -> WorkerProcess:
        workers.append(WorkerProcess("echo_worker", {"PYTHONPATH": str(tmp_path)}, tmp_path))
        return workers[-1]

    yield make
    for worker in workers:
        worker.kill()


def is_running(pid: int) -> bool:
    status = Path(f"/proc/{pid}/stat")
    if status.parent.parent.joinpath("self").exists():  # Linux: a zombie is not running
        return status.exists() and status.read_text().rsplit(")", 1)[1].split()[0] != "Z"
    return subprocess.run(["ps", "-p", str(pid)], capture_output=True, check=False).returncode == 0


def wait_for(condition: Callable[[], bool], seconds: float = 30) -> bool:
    deadline = time.monotonic() + seconds
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.05)
    return condition()


def test_headers_and_buffers_arrive_unchanged_in_shared_memory(start: Callable[[], WorkerProcess]) -> None:
    large = os.urandom(3_000_000)
    header, buffers = start().request({"op": "echo", "text": "µ"}, [large, b""], timeout_s=60)
    assert header == {"op": "echo", "text": "µ"}
    assert buffers == [large, b""]
    assert isinstance(buffers[0].obj, mmap.mmap)


def test_a_hanging_worker_is_killed_after_its_time(start: Callable[[], WorkerProcess]) -> None:
    worker = start()
    worker.request({"op": "echo"}, timeout_s=60)
    with pytest.raises(WorkerFailure, match=r"no answer within 0\.2 s"):
        worker.request({"op": "hang"}, timeout_s=0.2)
    assert not worker.alive
    assert not is_running(worker.pid)


def test_a_worker_that_reads_nothing_does_not_keep_the_sender_of_a_long_message(
    start: Callable[[], WorkerProcess],
) -> None:
    worker = start()
    worker.request({"op": "echo"}, timeout_s=60)
    os.kill(worker.pid, signal.SIGSTOP)
    with pytest.raises(WorkerFailure, match=r"no answer within 0\.2 s"):
        worker.request({"op": "echo", "text": "x" * 3_000_000}, timeout_s=0.2)
    assert not is_running(worker.pid)


def test_an_interrupt_while_a_request_is_sent_ends_the_worker(
    start: Callable[[], WorkerProcess], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its answer would be taken for that to the next request."""
    worker = start()

    def interrupted(*message: object) -> None:
        send(*message)  # type: ignore[arg-type]
        raise KeyboardInterrupt

    monkeypatch.setattr("rollouts.watchdog.send", interrupted)
    with pytest.raises(KeyboardInterrupt):
        worker.send({"op": "echo"})
    assert not worker.alive


def test_a_dying_workers_last_words_are_told(start: Callable[[], WorkerProcess]) -> None:
    worker = start()
    with pytest.raises(WorkerFailure, match=r"died \(exit status 9\)(.|\n)*out of memory, says the worker"):
        worker.request({"op": "die"}, timeout_s=60)
    with pytest.raises(WorkerFailure, match="already been ended"):
        worker.request({"op": "echo"}, timeout_s=60)


def test_an_error_is_passed_on_and_ends_the_worker(start: Callable[[], WorkerProcess]) -> None:
    worker = start()
    with pytest.raises(WorkerFailure, match="a bad tensor"):
        worker.request({"op": "fail"}, timeout_s=60)
    assert not worker.alive


def test_kill_ends_the_worker_and_may_be_repeated(start: Callable[[], WorkerProcess]) -> None:
    worker = start()
    worker.request({"op": "echo"}, timeout_s=60)
    worker.kill()
    worker.kill()
    assert not is_running(worker.pid)


PARENT = """
import sys, tempfile
from pathlib import Path
from rollouts.watchdog import WorkerProcess
folder = Path(tempfile.mkdtemp())
worker = WorkerProcess("echo_worker", {}, folder)
worker.request({"op": "echo"}, timeout_s=60)
print(worker.pid, folder, flush=True)
worker.request({"op": "hang"}, timeout_s=600)
"""


@pytest.mark.parametrize("ending", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_no_worker_outlives_its_parent(tmp_path: Path, ending: signal.Signals) -> None:
    (tmp_path / "echo_worker.py").write_text(ECHO_WORKER)
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    parent = subprocess.Popen([sys.executable, "-c", PARENT], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
                              env=environment, text=True)  # fmt: skip
    assert parent.stdout is not None
    pid, folder = parent.stdout.readline().split()
    assert is_running(int(pid))
    time.sleep(0.5)  # until it waits for the answer: Python does not see a signal just before a blocking call
    parent.send_signal(ending)
    parent.wait(30)
    parent.stdout.close()
    assert wait_for(lambda: not is_running(int(pid)))
    # a parent that ends in its own time cleans up itself; for one that was killed the worker does
    assert ending == signal.SIGINT or wait_for(lambda: not Path(folder).exists())


def test_a_users_rollouts_folder_is_not_imported_instead(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The worker is started from the user's working directory, where such a folder may lie."""
    (tmp_path / "rollouts").mkdir()
    (tmp_path / "rollouts" / "__init__.py").write_text("raise SystemExit('shadowed')")
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "echo_worker.py").write_text(ECHO_WORKER)
    monkeypatch.chdir(tmp_path)
    worker = WorkerProcess("echo_worker", {"PYTHONPATH": str(tmp_path / "elsewhere")}, tmp_path)
    assert worker.request({"op": "echo"}, timeout_s=60)[0] == {"op": "echo"}
    worker.kill()
