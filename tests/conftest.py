"""Shared by all tests. Importing `rl` first lets torchvision be imported beside a CPU torch."""

from __future__ import annotations

import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import settings

import rewards.registry as registry
import rl  # noqa: F401

# Started in the background by a shell, this process ignores Ctrl-C and so would every process it starts; tests of
# what Ctrl-C ends need the default.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

ROOT = Path(__file__).parents[1]

# A busy machine must not fail a law: tests that bound time measure CPU time themselves.
settings.register_profile("busy-machine", deadline=None)
settings.load_profile("busy-machine")


@pytest.fixture
def own_registry(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Rewards that a test declares are gone after it, and so are the files it has loaded them from."""
    monkeypatch.setattr(registry, "_REGISTRY", dict(registry._REGISTRY))
    before = set(sys.modules)
    yield
    for name in set(sys.modules) - before:
        if name.startswith("rewards_user_"):
            del sys.modules[name]


@pytest.fixture(scope="session")
def reasonknee() -> Path:
    """The command of the installation under test."""
    return Path(sys.executable).with_name("reasonknee")


@pytest.fixture(scope="session")
def smoke_run(tmp_path_factory: pytest.TempPathFactory, reasonknee: Path) -> Path:
    """Folder of the demo at its smallest (`configs/smoke.yaml`), made once for all slow tests.

    What it printed is in `demo.log`. Tests may add folders of their own and run stages again, if it ends complete.
    """
    folder = tmp_path_factory.mktemp("smoke")
    with (folder / "demo.log").open("w", encoding="utf-8") as log:
        done = subprocess.run(
            [
                reasonknee,
                "demo",
                "--config",
                ROOT / "configs" / "smoke.yaml",
                f"run_dir={folder}",
                f"data.root={folder / 'data'}",
            ],
            stdout=log,
            stderr=subprocess.STDOUT,
            check=False,
        )
    assert done.returncode == 0, (folder / "demo.log").read_text(encoding="utf-8")
    return folder
