"""Which runs `reasonknee compare A B [C ...]` means.

Each word names an arm: one run, or several separated by commas, one for each training seed. A run is named as in the
benchmark's tables, or by its folder.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from rl.bench.answers import BenchRun, read_run, reread
from rl.bench.compare import check_same_items
from rl.choices import reader_of
from rl.config import Config, ConfigError
from rl.config_check import OWN_RUNS
from rl.imported import imported_folder
from rl.stages import eval_folder, served_folder


@dataclass(frozen=True)
class Compared:
    """What is compared, and what stands beside it in the tables."""

    runs: Mapping[str, BenchRun]
    """Label in the tables -> run; no two have the same `meta.name`."""
    arms: Mapping[str, Sequence[str]]
    """Name of an arm -> labels of its runs, in the order of their seeds; the reference comes first."""


def own_folders(config: Config) -> dict[str, Path]:
    """The runs that `eval` makes with this configuration, as far as they exist; baselines first."""
    if config.engine.kind == "openai":
        folder = served_folder(config)
        return {folder.name: folder}
    folders = [eval_folder(config, name) for name in OWN_RUNS]
    return {folder.name: folder for folder in folders if (folder / "run.json").exists()}


def runs_to_compare(config: Config, words: Sequence[str]) -> Compared:
    """Find, read and name the runs of these arms, and the other runs of this configuration.

    Raises:
        ConfigError: there is no such run, an arm is given twice or compared with itself, arms have different numbers of
            runs, or a pair of runs occurs twice.
        CompareError: the runs are not on the same items, or were recorded for different readers. With
            `rewards.reader=tolerant` all are read so, however they were recorded.
    """
    folders = own_folders(config)
    arms = {word: [_find(config, item, folders) for item in word.split(",")] for word in words}
    _check_arms(words, arms)
    runs = {key: read_run(folder) for key, folder in folders.items()}
    if reader_of(config) == "tolerant":
        runs = {key: reread(run, "tolerant") for key, run in runs.items()}
    reference = next(iter(arms.values()))[0]
    for key, run in runs.items():
        check_same_items(_renamed(runs[reference], reference), _renamed(run, key))
    return _named(arms, runs)


def _find(config: Config, item: str, folders: dict[str, Path]) -> str:
    """The key of a run in `folders`, where it is put if it is not there: by the word it is asked for."""
    if item in folders:
        return item
    run_dir = Path(config.run_dir)
    of_this_run = [run_dir / kind / item for kind in ("eval", "settings", "served")]
    found = [
        f for f in (*of_this_run, imported_folder(config, item), Path(item)) if (f / "run.json").exists()
    ]
    if item and found:
        if len({folder.resolve() for folder in found}) > 1:
            raise ConfigError(
                f"{item!r} is the name of several runs: write one of {', '.join(map(str, found))}"
            )
        known = [key for key, other in folders.items() if other.resolve() == found[0].resolve()]
        folders.setdefault(known[0] if known else item, found[0])
        return known[0] if known else item
    others = f"use one of {', '.join(folders)}" if folders else "run `reasonknee eval` first"
    raise ConfigError(
        f"no run {item!r}: {others}, or name one of another setting (as GRPO-none is), a served model, an imported "
        "run or a folder that holds a run.json"
    )


def _check_arms(words: Sequence[str], arms: Mapping[str, Sequence[str]]) -> None:
    """Raise ConfigError for arms that make no comparison."""
    if len(arms) < len(words):
        twice = next(word for word in words if list(words).count(word) > 1)
        raise ConfigError(f"{twice!r} is given twice; each arm is compared with the first one, once")
    (reference, keys), *further = arms.items()
    for word, others in further:
        if len(others) != len(keys):
            raise ConfigError(
                f"{reference!r} names {len(keys)} runs and {word!r} {len(others)}: runs are paired by seed, so name as "
                "many for each arm, in the same order"
            )
        pairs = list(zip(keys, others, strict=True))
        for a, b in pairs:
            if a == b:
                raise ConfigError(f"{word!r} against {reference!r} compares the run {a!r} with itself")
            if pairs.count((a, b)) > 1:
                raise ConfigError(
                    f"{word!r} against {reference!r} has the pair {b!r} and {a!r} twice: that is one training seed, "
                    "and counts once"
                )


def _named(arms: Mapping[str, Sequence[str]], runs: Mapping[str, BenchRun]) -> Compared:
    """Arms under the name that their runs bear, or the word they were asked for where another run bears it too."""
    labels: dict[str, str] = {}
    names: dict[str, str] = {}
    by_name: dict[str, Sequence[str]] = {}
    for word, keys in arms.items():
        borne = {runs[key].meta.name for key in keys}
        elsewhere = {run.meta.name for key, run in runs.items() if key not in keys}
        name = next(iter(borne)) if len(borne) == 1 and not borne & elsewhere else word
        for number, key in enumerate(keys, start=1):
            several = len(set(keys)) > 1
            labels.setdefault(key, f"{name} #{number}" if several else key)
            names.setdefault(key, labels[key] if several else name)
        by_name[name] = keys
    return Compared(
        {labels.get(key, key): _renamed(run, names.get(key, run.meta.name)) for key, run in runs.items()},
        {name: [labels[key] for key in keys] for name, keys in by_name.items()},
    )


def _renamed(run: BenchRun, name: str) -> BenchRun:
    return BenchRun(replace(run.meta, name=name), run.answers)
