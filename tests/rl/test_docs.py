"""The pages of the documentation do what they say: their files are written and their commands run, in order."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

DOCS = Path(__file__).parents[2] / "docs"
BLOCK = re.compile(r"^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
FILE = re.compile(r"# (\S+\.(?:py|yaml))\n")


@pytest.mark.slow
def test_write_a_reward_in_ten_minutes(tmp_path: Path) -> None:
    commands = 0
    environment = {
        **os.environ,
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "PYTHONPATH": ".",
    }
    for language, text in BLOCK.findall((DOCS / "write-a-reward.md").read_text(encoding="utf-8")):
        if language == "bash":
            done = subprocess.run(
                ["bash", "-e", "-c", text],
                cwd=tmp_path,
                env=environment,
                capture_output=True,
                text=True,
                check=False,
            )
            assert done.returncode == 0, f"{text}\n{done.stdout}\n{done.stderr}"
            commands += 1
        else:
            name = FILE.match(text)
            assert name, f"a block that is no file: {text[:80]}"
            (tmp_path / name[1]).write_text(text, encoding="utf-8")
    assert commands == 5
    assert '"format": "none"' in (tmp_path / "scored.jsonl").read_text()
