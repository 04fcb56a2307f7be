"""Placement as a pure plan; then real Ray on this machine's CPUs with a stand-in model (`ray_job.py`)."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest
import ray
from hypothesis import given
from hypothesis import strategies as st

from rl.config import Config, ConfigError, RayConfig, load_config
from rl.install_check import DISTRIBUTION, check_nodes, difference
from rl.launch import FAILED, INTERRUPTED, OK, REFUSED, launch
from rl.one_install import check_one_install
from rl.placement import Node, check_shares, plan, real_cores, refusal, this_machine
from rl.stage_inputs import Inputs
from rl.stages import Stage

JOB = Path(__file__).with_name("ray_job.py")


def _config(folder: Path, *settings: str) -> Config:
    return load_config(None, [f"run_dir={folder}", f"data.root={folder}", "model.device=cpu", *settings])


@pytest.mark.parametrize(
    ("address", "words"),
    [("127.0.0.1:1", "no cluster answers there"), ("head", "write it as HOST:PORT"), ("h:p", "HOST:PORT")],
)
def test_an_address_without_a_cluster_is_an_error_at_once(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], address: str, words: str
) -> None:
    """Left to Ray, it is one after fourteen minutes."""
    started = time.monotonic()
    assert launch(_config(tmp_path, f"ray.address={address}"), dry_run=True) == REFUSED
    assert f"ray.address is '{address}'" in (said := capsys.readouterr().out)
    assert words in said
    assert time.monotonic() - started < 60


class TestPlan:
    @given(
        st.builds(
            RayConfig,
            num_workers=st.integers(1, 4),
            cpus_per_worker=st.sampled_from([0.5, 1.0, 2.0]),
            gpus_per_worker=st.sampled_from([0.0, 0.5, 1.0]),
            num_engines=st.integers(1, 4),
            cpus_per_engine=st.sampled_from([0.5, 1.0, 4.0]),
            gpus_per_engine=st.sampled_from([0.0, 0.6, 2.0]),
        ),
        st.lists(st.tuples(st.integers(1, 8), st.integers(0, 4)), min_size=1, max_size=3),
    )
    def test_no_node_and_no_gpu_is_given_out_twice(
        self, settings: RayConfig, sizes: list[tuple[int, int]]
    ) -> None:
        nodes = [Node(f"n{i}", cpus, gpus) for i, (cpus, gpus) in enumerate(sizes)]
        seats = plan(settings, nodes)
        assert len(seats) == settings.num_workers + settings.num_engines
        for node in nodes:
            here = [seat for seat in seats if seat.node == node.name]
            assert sum(seat.cpus for seat in here) <= node.cpus + 1e-6
            for gpu in range(node.gpus):
                assert sum(min(seat.gpus, 1) for seat in here if gpu in seat.gpu_ids) <= 1 + 1e-6
        assert (refusal(settings, nodes, seats) is None) == all(seat.node for seat in seats)

    def test_two_halves_beside_one_engine_fit_on_two_cores(self) -> None:
        settings = RayConfig(num_workers=2, cpus_per_worker=0.5)
        assert refusal(settings, [Node("n", 2, 0)], plan(settings, [Node("n", 2, 0)])) is None

    def test_a_refusal_says_what_was_asked_and_what_there_is(self) -> None:
        settings = RayConfig(num_workers=2, cpus_per_worker=1)
        nodes = [Node("n", 2, 0)]
        problem = refusal(settings, nodes, plan(settings, nodes))
        assert problem is not None
        assert "requested 1 engine x 1 CPU + 2 workers x 1 CPU = 3 CPUs" in problem
        assert "available 2 CPUs on 1 node; no room for worker 1" in problem

    def test_engines_alone_are_asked_for_without_a_word_on_workers(self) -> None:
        settings = RayConfig(num_workers=0, num_engines=3)
        nodes = [Node("n", 2, 0)]
        problem = refusal(settings, nodes, plan(settings, nodes))
        assert problem is not None
        assert "requested 3 engines x 1 CPU = 3 CPUs" in problem
        assert "worker" not in problem

    def test_colocated_pairs_share_a_gpu(self) -> None:
        settings = RayConfig(
            placement="colocate", num_workers=2, num_engines=2, gpus_per_worker=0.4, gpus_per_engine=0.6
        )
        check_shares(settings)
        seats = plan(settings, [Node("n", 8, 2)])
        assert [seat.gpu_ids for seat in seats] == [(0,), (1,), (0,), (1,)]

    @pytest.mark.parametrize(
        ("worker", "engine", "engines", "field"),
        [
            (1.5, 0.0, 1, "gpus_per_worker is 1.5"),
            (0.6, 0.6, 1, "share one GPU"),
            (0.0, 0.6, 1, "share one GPU"),
            (0.5, 0.5, 2, "two on one GPU"),
        ],
    )
    def test_shares_that_cannot_work_are_refused(
        self, worker: float, engine: float, engines: int, field: str
    ) -> None:
        settings = RayConfig(
            placement="colocate", gpus_per_worker=worker, gpus_per_engine=engine, num_engines=engines
        )
        with pytest.raises(ConfigError, match=field):
            check_shares(settings)

    def test_cores_are_no_more_than_this_process_may_use(self) -> None:
        assert 1 <= real_cores() <= (os.cpu_count() or 1)


class TestDryRun:
    def test_it_prints_the_placement_and_starts_nothing(
        self, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        assert launch(_config(tmp_path, "ray.cpus_per_engine=0.5"), dry_run=True) == OK
        printed = capsys.readouterr().out
        assert "engine 0" in printed
        assert "worker 0" in printed
        assert "can hold" in printed
        assert not ray.is_initialized()
        assert list(tmp_path.iterdir()) == []

    def test_it_says_what_is_missing(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        assert launch(_config(tmp_path, "ray.num_engines=1000"), dry_run=True) == FAILED
        assert "requested 1000 engines x 1 CPU" in capsys.readouterr().out.replace("\n", " ")


def test_what_a_local_cluster_could_never_hold_is_refused_before_anything_starts(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "grpo").mkdir()
    assert launch(_config(tmp_path, "ray.num_workers=1000")) == REFUSED
    assert "no room for" in capsys.readouterr().out
    assert (tmp_path / "grpo").is_dir()
    assert not ray.is_initialized()


def test_a_node_with_another_install_is_told_apart() -> None:
    same: dict[str, str | None] = {"rl": "/a", "rollouts": "/a", "rewards": "/a", DISTRIBUTION: "1"}
    assert difference(same, "/a", "1") is None
    assert "'rewards' would be imported from /home/me" in str(
        difference(same | {"rewards": "/home/me"}, "/a", "1")
    )
    assert "'rl' cannot be imported" in str(difference(same | {"rl": None}, "/a", "1"))
    assert "is 1, on the driver it is 2" in str(difference(same, "/a", "2"))


@pytest.fixture
def two_cores() -> Iterator[None]:
    ray.init(
        num_cpus=2, num_gpus=0, include_dashboard=False, log_to_driver=False, object_store_memory=100 * 2**20
    )
    yield
    ray.shutdown()


@pytest.mark.slow
@pytest.mark.parametrize("settings", [["ray.cpus_per_engine=2"], ["ray.num_workers=2"]])
def test_a_busy_cluster_ends_in_an_error_after_the_timeout(
    settings: list[str], two_cores: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The engines' place is taken; or theirs is free and the workers' is taken."""

    @ray.remote(num_cpus=0.5)
    class Other:
        def here(self) -> bool:
            return True

    other = Other.remote()
    ray.get(other.here.remote())
    check_nodes()
    began = time.monotonic()
    stage = Stage("grpo", "GRPO", inputs=lambda config: Inputs({}, {}), results=lambda config: [])
    assert (
        launch(
            _config(tmp_path, "ray.placement_timeout_s=3", *settings), stage=stage, check=lambda config: None
        )
        == REFUSED
    )
    assert time.monotonic() - began < 30
    printed = " ".join(capsys.readouterr().out.split())
    assert "no placement within 3 s (ray.placement_timeout_s): requested 1 engine" in printed
    assert "have 2 CPUs" in printed
    assert ray.is_initialized()  # the cluster was there before
    for _ in range(100):  # it gets everything back, in its own time
        if ray.available_resources()["CPU"] == 1.5:
            break
        time.sleep(0.1)
    assert ray.available_resources()["CPU"] == 1.5


class _Run:
    """`ray_job.py` as a child, and every process that descends from it, found by a mark in the environment."""

    def __init__(self, mode: str, run_dir: Path) -> None:
        self.mark = uuid.uuid4().hex
        self.log = run_dir / f"{self.mark}.log"
        with self.log.open("w") as log:
            self.process = subprocess.Popen(
                [sys.executable, str(JOB), mode, str(run_dir)],
                stdout=log,
                stderr=subprocess.STDOUT,
                env={**os.environ, "REASONKNEE_TEST_MARK": self.mark, "OMP_NUM_THREADS": "1"},
                cwd=run_dir,
            )

    def kill(self) -> None:
        """After a test that failed."""
        for process in filter(self._is_ours, psutil.process_iter()):
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()

    @property
    def output(self) -> str:
        return self.log.read_text()

    def wait_for(self, text: str, seconds: float = 400) -> None:
        until = time.monotonic() + seconds
        while text not in self.output:
            assert time.monotonic() < until, f"{text!r} did not appear:\n{self.output}"
            assert self.process.poll() is None, self.output
            time.sleep(0.5)

    def end(self) -> int:
        code = self.process.wait(timeout=400)
        time.sleep(1)
        left = [p for p in psutil.process_iter() if self._is_ours(p)]
        assert not left, f"left over: {[p.cmdline() for p in left]}\n{self.output}"
        return code

    def _is_ours(self, process: psutil.Process) -> bool:
        try:
            marked = process.environ().get("REASONKNEE_TEST_MARK") == self.mark
            return marked and process.status() != psutil.STATUS_ZOMBIE
        except psutil.Error:
            return False


@pytest.fixture
def run_job(tmp_path: Path) -> Iterator[Callable[..., _Run]]:
    runs = []

    def start(mode: str) -> _Run:
        runs.append(_Run(mode, tmp_path))
        return runs[-1]

    yield start
    for run in runs:
        run.kill()


@pytest.mark.slow
def test_two_ranks_and_an_engine_run_on_two_cores_and_continue(
    run_job: Callable[..., _Run], tmp_path: Path
) -> None:
    run = run_job("ok")
    assert run.end() == OK, run.output
    assert "starting at step 0 with 2 ranks, 1 threads" in run.output
    # gradients of rank 0 and 1 are 0 and 1: averaged, both have 0.5; the new adapter is seen by both
    assert "ranks [(0, [0], 0.5), (1, [0], 0.5)]" in run.output
    assert "ranks [(0, [1], 0.5), (1, [1], 0.5)]" in run.output
    assert "GRPO: 2/2  reward 0.500 (+0.200 to the prior)  box_iou 0.250" in run.output
    assert "(raylet)" not in run.output
    assert sorted(p.name for p in tmp_path.iterdir() if p != run.log) == ["config.yaml", "grpo", "stages"]
    (tmp_path / "stages" / "grpo.json").write_text(
        (tmp_path / "stages" / "grpo.json").read_text().replace('"done": true', '"done": false')
    )
    again = run_job("ok")
    assert again.end() == OK, again.output
    assert "starting at step 2" in again.output


@pytest.mark.slow
def test_the_jobs_own_error_comes_first(run_job: Callable[..., _Run]) -> None:
    run = run_job("fail")
    assert run.end() == FAILED
    error = run.output[run.output.index("ValueError") :]
    assert error.startswith("ValueError: rank one does not like its rewards\n\non rank 1:\nTraceback")
    assert "raise ValueError(" in error
    assert "ray/" not in error
    assert "Ray" not in run.output[: run.output.index("ValueError")]


@pytest.mark.slow
def test_an_engine_that_cannot_start_is_the_jobs_error(run_job: Callable[..., _Run]) -> None:
    run = run_job("broken_engine")
    assert run.end() == FAILED
    assert "EngineError: no weights in this folder (engine 0, RuntimeError)" in run.output


@pytest.mark.slow
@pytest.mark.parametrize(
    ("mode", "sign", "number"),
    [
        ("slow_engine", "starting 1 x", signal.SIGINT),
        ("hang", "starting at step 0", signal.SIGINT),
        ("slow_step", "ranks [", signal.SIGTERM),
    ],
)
def test_an_interrupt_ends_everything(
    run_job: Callable[..., _Run], mode: str, sign: str, number: signal.Signals
) -> None:
    run = run_job(mode)
    run.wait_for(sign)
    time.sleep(5)
    began = time.monotonic()
    run.process.send_signal(number)
    assert run.end() == INTERRUPTED, run.output
    assert time.monotonic() - began < 60
    assert "interrupted; everything this run started was ended" in run.output
    assert "Traceback" not in run.output


@pytest.mark.slow
def test_a_folder_that_shadows_a_package_on_the_workers_is_named(
    run_job: Callable[..., _Run], tmp_path: Path
) -> None:
    """Ray puts the driver's working directory first on the workers' path; the driver itself does not see it."""
    (tmp_path / "rewards").mkdir()
    (tmp_path / "rewards" / "__init__.py").touch()
    run = run_job("ok")
    assert run.end() == REFUSED, run.output
    assert (
        f"'rewards' would be imported from {tmp_path}, on the driver it is {check_one_install()}"
        in run.output
    )


def test_this_machine_has_its_cores() -> None:
    assert this_machine()[0].cpus == real_cores()
