"""The stages of a run, and which of them need doing.

Each stage leaves a record in `<run_dir>/stages/` with a hash of what went into it: its part of the config, the data
files, and the records of the stages before it. With the same hash a finished stage is skipped and an interrupted one
goes on; with another hash its old outputs are removed first.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from rl.config import Config, ConfigError, save_config
from rl.progress import StageProgress
from rl.training import write_atomically

Run = Callable[[Config, StageProgress], None]


@dataclass(frozen=True)
class Stage:
    """One step of the path."""

    name: str
    title: str
    run: Run
    sections: tuple[str, ...]
    """Config sections the result depends on."""
    after: tuple[str, ...] = ()
    """Stages whose outputs it reads."""
    outputs: tuple[str, ...] = ()
    """Paths under `run_dir` that it owns: removed when its inputs change, looked for before it is skipped."""


def run_stage(config: Config, stage: Stage, *, again: bool = False) -> float | None:
    """Do a stage unless it is done. Returns its seconds, None when it was skipped.

    Args:
        again: do it even when nothing has changed, from the beginning.
    """
    run_dir = Path(config.run_dir)
    record_path = _record_path(config, stage.name)
    fingerprint = _fingerprint(config, stage)
    record = _read(record_path)
    owned = [run_dir / output for output in stage.outputs]
    same = record is not None and record["fingerprint"] == fingerprint and not again
    if same and record is not None and record["done"] and all(path.exists() for path in owned):
        return None
    if not same:
        for path in owned:
            shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
    record_path.parent.mkdir(parents=True, exist_ok=True)
    save_config(config, run_dir / "config.yaml")
    _write(record_path, fingerprint, done=False, seconds=0.0)
    started = time.monotonic()
    with StageProgress(stage.title) as progress:
        stage.run(config, progress)
    seconds = time.monotonic() - started
    _write(record_path, fingerprint, done=True, seconds=seconds)
    return seconds


def _record_path(config: Config, name: str) -> Path:
    return Path(config.run_dir) / "stages" / f"{name}.json"


def _read(path: Path) -> dict[str, Any] | None:
    if not path.exists():
        return None
    try:
        record: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ConfigError(f"{path}: not JSON ({error}); delete it to run the stage again") from error
    return record


def _write(path: Path, fingerprint: str, *, done: bool, seconds: float) -> None:
    record = {"fingerprint": fingerprint, "done": done, "seconds": round(seconds, 1)}
    write_atomically(path, json.dumps(record, indent=2) + "\n")


def _fingerprint(config: Config, stage: Stage) -> str:
    sections = asdict(config)
    content = {
        "version": version("reasonknee-rl"),
        "seed": config.seed,
        "sections": {name: sections[name] for name in stage.sections},
        "before": {name: _read(_record_path(config, name)) for name in stage.after},
        "files": _data_files(config) if "data" in stage.sections else [],
    }
    return hashlib.blake2b(json.dumps(content, sort_keys=True).encode(), digest_size=16).hexdigest()


def _data_files(config: Config) -> list[tuple[str, int, int]]:
    """Name, size and time of the dataset's lists (not of the volumes, which the embedding cache checks)."""
    root = Path(config.data.root).expanduser()
    lists = [p for folder in ("split_files", "question_files", "generate_data") for p in (root / folder).glob("*")]
    return [(str(p.relative_to(root)), p.stat().st_size, p.stat().st_mtime_ns) for p in sorted(lists)]
