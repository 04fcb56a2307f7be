"""The command `reasonknee`."""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

app = typer.Typer(
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="GRPO with verifiable rewards for 3D medical vision-language models. Research software, not for clinical use.",
)
data_app = typer.Typer(no_args_is_help=True, help="Look at a dataset.")
app.add_typer(data_app, name="data")

DEFAULT_CONFIG = Path("configs/demo.yaml")
ConfigFile = Annotated[Path, typer.Option("--config", help="YAML file; see configs/ for recipes.")]
Overrides = Annotated[list[str] | None, typer.Argument(metavar="[key=value]...", help="Config overrides.")]
Again = Annotated[bool, typer.Option("--again", help="Do it even when nothing has changed, from the beginning.")]

# Imports of the stages wait until a command runs: torch and transformers take seconds, and `--help` should not.


@app.command()
def demo(config: ConfigFile = DEFAULT_CONFIG, overrides: Overrides = None, again: Again = False) -> None:
    """The whole path: phantoms, embeddings, SFT, GRPO, benchmark, comparison. Finished stages are skipped."""
    loaded = _load(config, overrides)
    from rl.pipeline import STAGES
    from rl.stages import run_stage

    console = Console(highlight=False)
    table = Table("stage", "time", title="time of each stage")
    started = time.monotonic()
    for number, stage in enumerate(STAGES.values(), start=1):
        console.rule(f"{number}/{len(STAGES)} {stage.name}")
        seconds = run_stage(loaded, stage, again=again)
        if seconds is None:
            console.print("nothing has changed: skipped")
        table.add_row(stage.name, "skipped" if seconds is None else _clock(seconds))
    table.add_row("total", _clock(time.monotonic() - started), style="bold")
    console.print(table)
    console.print(f"report: {Path(loaded.run_dir) / 'report.html'}")


@app.command()
def phantom(config: ConfigFile = DEFAULT_CONFIG, overrides: Overrides = None, again: Again = False) -> None:
    """Write knee phantoms in the released dataset's on-disk layout."""
    _stage("phantom", config, overrides, again)


@app.command()
def base(config: ConfigFile = DEFAULT_CONFIG, overrides: Overrides = None) -> None:
    """Train the small stand-in base model that ships with the package (real users skip this)."""
    loaded = _load(config, overrides)
    from rl.pipeline import base as train
    from rl.progress import StageProgress

    with StageProgress("base") as progress:
        train(loaded, progress)


@app.command()
def embed(config: ConfigFile = DEFAULT_CONFIG, overrides: Overrides = None, again: Again = False) -> None:
    """Put every volume through the vision tower once, into the cache on disk."""
    _stage("embed", config, overrides, again)


@app.command()
def sft(config: ConfigFile = DEFAULT_CONFIG, overrides: Overrides = None, again: Again = False) -> None:
    """LoRA SFT over the cached features; the best adapter by validation loss is kept."""
    _stage("sft", config, overrides, again)


@app.command()
def grpo(config: ConfigFile = DEFAULT_CONFIG, overrides: Overrides = None, again: Again = False) -> None:
    """GRPO from the SFT adapter, in one process; `launch` runs the same job under Ray."""
    _stage("grpo", config, overrides, again)


@app.command(name="eval")
def evaluate(config: ConfigFile = DEFAULT_CONFIG, overrides: Overrides = None, again: Again = False) -> None:
    """The benchmark on held-out patients for base, SFT and GRPO, next to two baselines."""
    loaded = _stage("eval", config, overrides, again)
    from rl.bench.console import print_tables
    from rl.bench.metrics import grade_run, tables
    from rl.pipeline import read_runs

    print_tables({name: tables(grade_run(run)) for name, run in read_runs(loaded).items()})


@app.command()
def compare(
    a: Annotated[str, typer.Argument(help="SFT, GRPO, base, baseline, or the folder of a run.")],
    b: Annotated[str, typer.Argument(help="The run that is compared with it.")],
    config: ConfigFile = DEFAULT_CONFIG,
    overrides: Overrides = None,
) -> None:
    """Paired differences with patient-level intervals, a verdict in words, and report.html."""
    loaded = _load(config, overrides)
    from rl.pipeline import comparison
    from rl.progress import StageProgress

    with StageProgress("comparison") as progress:
        comparison(loaded, progress, a, b)


@app.command()
def launch(
    config: Annotated[Path, typer.Argument(metavar="CONFIG", help="YAML file.")],
    overrides: Overrides = None,
    address: Annotated[str, typer.Option(help="Ray cluster; default: a local one is started.")] = "",
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show the placement and check that it fits.")] = False,
) -> None:
    """GRPO under Ray: engines and training workers on the cluster's CPUs and GPUs."""
    given = [*(overrides or []), *([f"ray.address={address}"] if address else [])]
    loaded = _load(config, given)
    from rl.launch import launch as run

    raise typer.Exit(run(loaded, dry_run=dry_run))


@data_app.command()
def check(
    root: Annotated[str, typer.Option(help="Folder in the released layout; default: the config's data.root.")] = "",
    config: ConfigFile = DEFAULT_CONFIG,
    overrides: Overrides = None,
) -> None:
    """Counts, missing and broken files, unreadable truths, patients in two splits, the box convention."""
    loaded = _load(config, [*(overrides or []), *([f"data.root={root}"] if root else [])])
    from rl.data.check import run_check

    raise typer.Exit(run_check(loaded))


def _stage(name: str, config: Path, overrides: list[str] | None, again: bool):  # type: ignore[no-untyped-def]
    loaded = _load(config, overrides)
    from rl.pipeline import STAGES
    from rl.stages import run_stage

    seconds = run_stage(loaded, STAGES[name], again=again)
    done = "nothing has changed: skipped (--again to do it over)" if seconds is None else f"done in {_clock(seconds)}"
    Console(highlight=False).print(f"{name}: {done}")
    return loaded


def _load(path: Path, overrides: list[str] | None):  # type: ignore[no-untyped-def]
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    from rl.config import load_config
    from rl.config_check import validate
    from rl.environment import check_one_install

    check_one_install()
    config = load_config(path, overrides or [])
    validate(config)
    return config


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes}:{rest:02d} min"


def main() -> None:
    """Entry point: errors that name their remedy are printed without a traceback."""
    from rl.errors import expected_errors

    try:
        app()
    except expected_errors() as error:
        Console(stderr=True, highlight=False).print(f"error: {error}", style="red", markup=False)
        sys.exit(1)
    except KeyboardInterrupt:
        Console(stderr=True).print("interrupted")
        sys.exit(130)
