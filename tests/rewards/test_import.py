"""`import rewards` is for every trainer and every laptop: numpy only."""

import subprocess
import sys


def test_importing_rewards_loads_no_framework() -> None:
    code = (
        "import sys, rewards\n"
        "heavy = {'torch', 'transformers', 'ray', 'vllm', 'trl', 'pandas', 'polars', 'scipy', 'rl', 'rollouts'}\n"
        "print(sorted(heavy & set(sys.modules)))"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60
    )
    assert result.stdout.strip() == "[]"
