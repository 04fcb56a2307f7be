"""The benchmark scripts run, at sizes that say nothing about speed, and write what they measured into their page."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
sys.path.append(str(ROOT / "benchmarks"))
from performance_page import update_page  # noqa: E402  (a script's neighbour, in no package)


def test_the_page_keeps_every_cell_and_adds_up_whole_steps_once_it_has_both_parts(tmp_path: Path) -> None:
    marks = [
        f"<!-- {end}{name} -->"
        for name in ("a", "train_step", "rollout_speed", "iterations")
        for end in ("", "end of ")
    ]
    page = tmp_path / "page"
    page.with_suffix(".md").write_text("\n".join(marks) + "\n")
    trained = {"seconds": {"trl": [10.0, 9.0, 11.0], "packed-1": [1.0], "packed-4": [0.5]}}
    sampled = {"volumes": 2, "seconds": {"pictures": [40.0], "features": [6.0]}}
    update_page(page, "train_step", "2000-8", trained, lambda cells: f"{len(cells)} trained")
    assert "1 trained" in page.with_suffix(".md").read_text()
    assert "| ratio |" not in page.with_suffix(".md").read_text()
    for questions in (1, 4):
        update_page(
            page, "rollout_speed", f"2000-{questions}-on", sampled, lambda cells: f"{len(cells)} sampled"
        )
    text = page.with_suffix(".md").read_text()
    assert "1 trained" in text
    assert "2 sampled" in text
    assert "| 1 | 120 | 900 | 7.5 |" in text  # 20 + 10 seconds, 3 + 1 seconds
    assert "| 4 | 60 | 720 | 12.0 |" in text
    with pytest.raises(SystemExit, match="has no lines <!-- b -->"):
        update_page(page, "b", "", {}, lambda cells: "")


@pytest.mark.slow
def test_the_gpu_benchmark_runs_without_one_and_keeps_its_page(tmp_path: Path) -> None:
    page = tmp_path / "performance"
    page.with_suffix(".md").write_text("before\n<!-- gpu -->\nold figures\n<!-- end of gpu -->\nafter\n")
    command = [
        *(sys.executable, ROOT / "benchmarks" / "gpu.py", "--device", "cpu", "--size", "35M", "--out", page),
        *("--visual-tokens", "32", "--generations", "2", "--completion-tokens", "4", "--repetitions", "2"),
    ]
    paths = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        command,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": paths},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    assert "packed-4: " in done.stdout
    assert "flex against packed, 512 visual tokens, float32: log-probabilities " in done.stdout
    text = page.with_suffix(".md").read_text()
    assert text.startswith("before\n<!-- gpu -->\n| device")
    assert text.endswith("|\n<!-- end of gpu -->\nafter\n")
    assert "old figures" not in text
    (cell,) = json.loads(page.with_suffix(".json").read_text())["gpu"].values()
    assert len(cell["seconds"]["packed-4"]) == 2
    assert all(share > 0 for share in cell["utilisation"]["packed-4"])
