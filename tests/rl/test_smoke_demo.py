"""The demo at its smallest, as a program of its own: from nothing to the report, then again, killed and interrupted."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]  # the first of all also makes the run

PROGRAM = Path(sys.executable).with_name("reasonknee")
RECIPE = Path(__file__).parents[2] / "configs" / "smoke.yaml"
STAGES = ("phantoms", "embed", "SFT", "GRPO", "benchmark", "comparison")
STEPS = 8
NOISE = ("Traceback", "Loading weights", "Warning", "WARNING", "it/s]", "INFO")


@pytest.fixture(scope="module")
def folder(smoke_run: Path) -> Path:
    """The run that all slow tests share; the tests of this file follow one another in it and leave it complete."""
    return smoke_run


def words(folder: Path, *command: str) -> list[str]:
    return [
        str(PROGRAM),
        *command,
        "--config",
        str(RECIPE),
        f"run_dir={folder}",
        f"data.root={folder / 'data'}",
    ]


def demo(folder: Path, *overrides: str) -> str:
    """What a demo that ends well prints."""
    done = subprocess.run(
        [*words(folder, "demo"), *overrides], capture_output=True, text=True, check=False, timeout=500
    )
    printed = done.stdout + done.stderr
    assert done.returncode == 0, printed
    return quiet(printed)


def quiet(printed: str) -> str:
    assert not [noise for noise in NOISE if noise in printed], printed
    return printed


def steps(folder: Path) -> list[int]:
    path = folder / "grpo" / "metrics.jsonl"
    return [int(json.loads(line)["step"]) for line in path.read_text().splitlines() if line.endswith("}")]


def grpo_until(folder: Path, step: int) -> tuple[subprocess.Popen[str], list[psutil.Process]]:
    """GRPO with more steps than before, when it has done `step` of them; and the processes it started."""
    process = subprocess.Popen(
        [*words(folder, "grpo"), f"grpo.max_steps={STEPS}"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    deadline = time.monotonic() + 300
    while steps(folder)[-1] < step:
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.05)
    return process, psutil.Process(process.pid).children(recursive=True)


def all_gone(processes: list[psutil.Process]) -> bool:
    return not psutil.wait_procs(processes, timeout=20)[1]


def test_the_demo_leads_from_nothing_to_a_report(folder: Path) -> None:
    printed = quiet((folder / "demo.log").read_text(encoding="utf-8"))
    for number, stage in enumerate(STAGES, start=1):
        assert f"{number}/{len(STAGES)} {stage}" in printed
    for result in ("sft/adapter", "grpo/adapter", "eval/baseline", "eval/base", "eval/SFT", "eval/GRPO"):
        assert (folder / result).is_dir(), result
    assert "<html" in (folder / "report.html").read_text(encoding="utf-8")
    assert "GRPO against SFT" in printed
    assert f"report: {folder / 'report.html'}" in printed
    assert steps(folder) == [1, 2]


def test_the_demo_run_again_does_nothing(folder: Path) -> None:
    started = time.monotonic()
    printed = demo(folder)
    assert printed.count("nothing has changed: skipped") == len(STAGES)
    assert "GRPO against SFT" in printed
    assert time.monotonic() - started < 60  # seconds where nothing else runs


def test_grpo_killed_in_the_middle_leaves_no_process_and_its_checkpoint(folder: Path) -> None:
    process, children = grpo_until(folder, 4)
    assert children
    process.kill()
    process.communicate()
    assert all_gone(children)
    # the former one is removed after the new one is complete, so there may be two
    newest = max(path.name for path in (folder / "grpo" / "checkpoints").glob("step-*"))
    assert int(newest.partition("-")[2]) >= 3


def test_grpo_goes_on_from_its_checkpoint_and_ctrl_c_leaves_no_process(folder: Path) -> None:
    process, children = grpo_until(folder, 6)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130, out + err
    assert "interrupted; run the same command again to go on" in err
    assert all_gone(children)
    done = steps(folder)
    assert done == list(range(1, len(done) + 1))  # no step lost, none counted twice


def test_the_demo_goes_on_with_what_is_left(folder: Path) -> None:
    printed = demo(folder, f"grpo.max_steps={STEPS}")
    assert steps(folder) == list(range(1, STEPS + 1))
    assert printed.count("nothing has changed: skipped") == 3
    assert "base: has answered already" in printed
    assert "SFT: has answered already" in printed
    assert f"GRPO: {STEPS}/{STEPS}" in printed
    assert not (folder / "old" / "grpo-1").exists()
