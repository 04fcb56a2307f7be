"""The benchmark scripts run, at sizes that say nothing about speed, and write what they measured into their page."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


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
