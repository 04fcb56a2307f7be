"""Freed memory stays with the process."""

from __future__ import annotations

import subprocess
import sys

import pytest

PAGE_FAULTS = """
import resource, sys
from rl.heap import keep_freed_memory
if sys.argv[1] == "kept":
    keep_freed_memory()
def step():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    b'x' * 2**27
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
step()
print(step())
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="glibc's allocator")
def test_the_pages_of_a_large_array_are_not_asked_for_again() -> None:
    faults = {
        mode: int(
            subprocess.run([sys.executable, "-c", PAGE_FAULTS, mode], capture_output=True, check=True).stdout
        )
        for mode in ("usual", "kept")
    }
    assert faults["usual"] > 50  # 128 MiB in pages of 4 KiB, or 2 MiB
    assert faults["kept"] < faults["usual"] / 4
