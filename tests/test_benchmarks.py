"""The benchmark scripts run, at sizes that say nothing about speed, and write what they measured into their page."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from argparse import ArgumentTypeError
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
sys.path.append(str(ROOT / "benchmarks"))
from arms import Arm  # noqa: E402  (scripts are in no package)
from performance_page import at_least, page_with, update_page  # noqa: E402
from plan_check import Measurement, worst_prediction  # noqa: E402


def test_the_page_keeps_every_cell_and_adds_up_whole_steps_once_it_has_both_parts(tmp_path: Path) -> None:
    marks = [
        f"<!-- {end}{name} -->"
        for name in ("a", "train_step", "rollout_speed", "iterations")
        for end in ("", "end of ")
    ]
    page = tmp_path / "page"
    page.with_suffix(".md").write_text("\n".join(marks) + "\n")
    trained = {"seconds": {"trl": [10.0, 9.0, 11.0], "packed-1": [1.0], "packed-4": [0.5]}}
    sampled = {"volumes": 2, "seconds": {"stock": [40.0], "features": [6.0]}}
    update_page(page, "train_step", "2000-8", trained, lambda cells: f"{len(cells)} trained")
    assert "1 trained" in page.with_suffix(".md").read_text()
    assert "| ratio |" not in page.with_suffix(".md").read_text()
    for questions in (1, 4):
        update_page(
            page, "rollout_speed", f"2000-8-2-{questions}-on", sampled, lambda cells: f"{len(cells)} sampled"
        )
    text = page.with_suffix(".md").read_text()
    assert "1 trained" in text
    assert "2 sampled" in text
    assert "| 1 | 120 | 900 | 7.5 |" in text  # 20 + 10 seconds, 3 + 1 seconds
    assert "| 4 | 60 | 720 | 12.0 |" in text
    with pytest.raises(SystemExit, match="has no lines <!-- b -->"):
        update_page(page, "b", "", {}, lambda cells: "")


def test_arguments_are_looked_at_before_anything_is_timed(tmp_path: Path) -> None:
    assert at_least(2)("2") == 2
    for text in ("1", "-3", "2.5", "two"):
        with pytest.raises(ArgumentTypeError, match=f"'{text}': a whole number from 2 up"):
            at_least(2)(text)
    page = tmp_path / "page"
    with pytest.raises(ArgumentTypeError, match=r"page\.md does not exist; docs/performance is the page"):
        page_with("gpu")(str(page))
    page.with_suffix(".md").write_text("<!-- gpu -->\n<!-- end of gpu -->\n")
    assert page_with("gpu")(str(page)) == page
    with pytest.raises(ArgumentTypeError, match="has no lines <!-- train_step -->"):
        page_with("train_step")(str(page))


def _failing(killed: bool) -> Callable[[], None]:
    if killed:
        os.kill(os.getpid(), signal.SIGKILL)
    raise ValueError("no such arm")


@pytest.mark.parametrize(("killed", "error"), [(True, EOFError), (False, SystemExit)])
def test_an_arm_that_was_killed_is_told_from_one_that_failed(
    killed: bool, error: type[BaseException]
) -> None:
    with pytest.raises(error):
        Arm(_failing, killed)


def script(name: str, *words: str | Path, codes: Sequence[int] = (0,)) -> str:
    """What a benchmark prints. It must exit with one of `codes`."""
    paths = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, str(ROOT / "benchmarks" / name), *map(str, words)],
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": paths},
        capture_output=True,
        text=True,
        timeout=400,
    )
    assert done.returncode in codes, done.stderr
    return done.stdout


@pytest.mark.slow
def test_the_gpu_benchmark_runs_without_one_and_keeps_its_page(tmp_path: Path) -> None:
    page = tmp_path / "performance"
    page.with_suffix(".md").write_text("before\n<!-- gpu -->\nold figures\n<!-- end of gpu -->\nafter\n")
    sizes = ("--visual-tokens", "32", "--generations", "2", "--completion-tokens", "4", "--repetitions", "2")
    printed = script("gpu.py", "--device", "cpu", "--size", "35M", "--out", page, *sizes)
    assert "packed-4: " in printed
    assert "packed against padded, 512 visual tokens, float32: loss " in printed
    assert "flex against packed, 512 visual tokens, float32: log-probabilities " in printed
    text = page.with_suffix(".md").read_text()
    assert text.startswith("before\n<!-- gpu -->\n| device")
    assert text.endswith(" cores.\n<!-- end of gpu -->\nafter\n")
    assert "old figures" not in text
    (cell,) = json.loads(page.with_suffix(".json").read_text())["gpu"].values()
    assert len(cell["seconds"]["packed-4"]) == 2
    assert all(share > 0 for share in cell["utilisation"]["packed-4"])


@pytest.mark.slow
def test_the_gpu_benchmark_needs_none_of_the_project_s_larger_dependencies() -> None:
    """A GPU machine that has torch, transformers, peft and accelerate is enough."""
    absent = ("omegaconf", "tensorboard", "trl", "vllm", "ray", "datasets", "polars", "nibabel")
    code = f"""
import sys
for name in {absent}:
    sys.modules[name] = None  # an import of it fails
sys.path[:0] = [{str(ROOT)!r}, {str(ROOT / "benchmarks")!r}]
import gpu
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
def test_the_training_step_is_timed_beside_trl_s_and_its_time_is_divided(tmp_path: Path) -> None:
    page = tmp_path / "performance"
    page.with_suffix(".md").write_text("<!-- train_step -->\n<!-- end of train_step -->\n")
    sizes = ("--visual-tokens", "32", "--generations", "2", "--repetitions", "1", "--threads", "1")
    script("train_step.py", *sizes, "--out", page)
    (cell,) = json.loads(page.with_suffix(".json").read_text())["train_step"].values()
    assert cell["gradient_difference"] < 1e-4
    assert {name: len(seconds) for name, seconds in cell["seconds"].items()} == {
        **{"trl": 1, "padded": 1, "packed-1": 1, "packed-4": 1}
    }
    for shares in cell["shares"].values():
        assert sum(shares.values()) == pytest.approx(1)
        assert min(shares["matrix products"], shares["attention"], shares["rest"]) > 0
    assert "| 32 | 2 | packed-4 | " in page.with_suffix(".md").read_text()


@pytest.mark.slow
def test_rollouts_on_features_are_timed_beside_pictures(tmp_path: Path) -> None:
    page = tmp_path / "performance"
    page.with_suffix(".md").write_text("<!-- rollout_speed -->\n<!-- end of rollout_speed -->\n")
    sizes = ("--visual-tokens", "32", "--generations", "2", "--volumes", "1", "--questions", "2")
    script("rollout_speed.py", *sizes, "--repetitions", "1", "--out", page)
    on, off = json.loads(page.with_suffix(".json").read_text())["rollout_speed"].values()
    assert off["seconds"].keys() == {"pictures", "features"}
    assert on["seconds"].keys() == {"stock", "pictures", "features"}
    for cell in (on, off):
        for name, seconds in cell["seconds"].items():
            assert len(seconds) == 1
            assert cell["tokens"][name][0] > 2 * 2
    assert on["hit_rate"]["features"][0] > 0
    assert off["hit_rate"]["features"] == [None]
    text = page.with_suffix(".md").read_text()
    assert "| 32 | 1 | 2 | 2 | on | stock | " in text
    assert "| 32 | 1 | 2 | 2 | off | features | " in text


@pytest.mark.slow
def test_whole_steps_are_timed_by_the_clock_and_held_against_the_plan(tmp_path: Path) -> None:
    page = tmp_path / "performance"
    page.with_suffix(".md").write_text("<!-- whole_steps -->\n<!-- end of whole_steps -->\n")
    sizes = ("--visual-tokens", "32", "--generations", "2", "--questions", "1", "2", "--steps", "2")
    script("whole_steps.py", *sizes, "--out", page)
    cells = json.loads(page.with_suffix(".json").read_text())["whole_steps"].values()
    assert [(cell["questions"], *cell["planned"]) for cell in cells] == [(1, "2"), (2, "1")]
    for cell in cells:
        assert len(cell["seconds"]) == 2
        for step, seconds in enumerate(cell["seconds"]):
            assert 0 < sum(of_part[step] for of_part in cell["parts"].values()) <= seconds
        assert min(cell["parts"]["training"]) > 0
        assert all(part > 0 for plan in cell["planned"].values() for part in plan.values())
    text = page.with_suffix(".md").read_text()
    assert "| 32 | 2 | 2 | " in text
    assert "| 2 a volume | 1 | " in text


def test_a_wrong_prediction_of_the_plan_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    small, large = Measurement(512, 1, seconds=1.0, flops=1e9), Measurement(2000, 1, seconds=4.0, flops=5e9)
    assert worst_prediction([small, large]) == pytest.approx(0.25)
    assert "5.00 s, +25%" in capsys.readouterr().out
    assert worst_prediction([small, replace(large, flops=4e9)]) == 0
    assert worst_prediction([small, replace(large, flops=2e9)]) == pytest.approx(1)  # 2 s instead of 1


@pytest.mark.slow
def test_the_check_of_the_plan_runs() -> None:
    """Whatever comes out: seconds are no matter of a test."""
    sizes = ("--visual", "256", "--questions", "1", "2", "--repeats", "1")
    printed = script("plan_check.py", *sizes, codes=(0, 1))
    assert "for 256 visual tokens, 2 questions" in printed
    assert "(target 25%): " in printed
