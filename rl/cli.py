"""The command `reasonknee`.

Imports of what a command does wait until it runs: torch and transformers take seconds to load, and neither `--help`
nor a run whose stages are all done needs them.
"""

from __future__ import annotations

import json
import signal
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
import typer.core
from rich.console import Console
from rich.table import Table

from rl.cli_options import DEFAULT_CONFIG, OVERRIDE, Overrides
from rl.one_install import shadowing
from rl.progress import clock
from rl.quiet import quiet_libraries
from rl.rewards_cli import app as rewards_app

if TYPE_CHECKING:
    from rl.bench.answers import BenchRun
    from rl.config import Config
    from rl.stages import Stage

FAILED, INTERRUPTED, TERMINATED = 1, 130, 143


class Commands(typer.core.TyperGroup):
    """Shows errors that a user can put right in words; everything else is a bug and keeps its traceback."""

    def invoke(self, context: Any) -> Any:
        """Run the command that was asked for."""
        try:
            return super().invoke(context)
        except KeyboardInterrupt:
            Console(stderr=True).print("interrupted; run the same command again to go on")
            raise typer.Exit(INTERRUPTED) from None
        except Exception as error:
            from rl.errors import in_words

            words = in_words(error)
            if words is None:
                raise
            Console(stderr=True, highlight=False).print(
                f"error: {words}", style="red", markup=False, soft_wrap=True
            )
            raise typer.Exit(FAILED) from error


app = typer.Typer(
    cls=Commands,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="GRPO with verifiable rewards for 3D medical vision-language models: 3DReasonKnee, ReasonKnee-Bench. "
    "Research software, not for clinical use.",
)
data_app = typer.Typer(no_args_is_help=True, help="Look at a dataset.")
app.add_typer(data_app, name="data")
app.add_typer(rewards_app, name="rewards")

ConfigFile = Annotated[Path, typer.Option("--config", metavar="FILE", help="Recipe; configs/ has some.")]
Again = Annotated[
    bool,
    typer.Option(
        "--again", help="Begin anew, even when nothing has changed; former results are moved to old/."
    ),
]


@app.command()
def demo(config: ConfigFile = DEFAULT_CONFIG, overrides: Overrides = None, again: Again = False) -> None:
    """The whole path: phantoms, embeddings, SFT, GRPO, benchmark, comparison.

    Stages whose settings and files have not changed are skipped; an interrupted one goes on. Results that are out of
    date are moved to RUN_DIR/old/, never deleted.
    """
    loaded = _load(config, overrides)
    from rl.stages import STAGES, run_stage, stage_of

    console = Console(highlight=False)
    table = Table("stage", "time", title="time of each stage", title_justify="left")
    started = time.monotonic()
    for number, name in enumerate(STAGES, start=1):
        stage = stage_of(loaded, name)
        console.rule(f"{number}/{len(STAGES)} {stage.title}", align="left")
        seconds = run_stage(loaded, stage, again=again, outdated="move")
        if seconds is None:
            console.print("nothing has changed: skipped")
        table.add_row(stage.title, "skipped" if seconds is None else clock(seconds))
    table.add_row("total", clock(time.monotonic() - started), style="bold")
    console.print(table)
    if seconds is None:  # else the comparison has just said it
        results = json.loads((Path(loaded.run_dir) / "results.json").read_text(encoding="utf-8"))
        console.print(results["verdict"], markup=False)
    console.print(f"report: {Path(loaded.run_dir) / 'report.html'}", markup=False, soft_wrap=True)


@app.command()
def phantom(config: ConfigFile = DEFAULT_CONFIG, overrides: Overrides = None, again: Again = False) -> None:
    """Write knee phantoms in the released dataset's on-disk layout, into phantom.out_dir."""
    _stage("phantom", config, overrides, again)


@app.command()
def base(config: ConfigFile = DEFAULT_CONFIG, overrides: Overrides = None) -> None:
    """Train the small stand-in base model that ships with the package (real users skip this)."""
    loaded = _load(config, overrides, needs_model=False)
    from rl.pipeline import run_base
    from rl.progress import StageProgress

    started = time.monotonic()
    with StageProgress("base") as progress:
        summary = run_base(loaded, progress)
        progress.log(f"base: {summary} ({clock(time.monotonic() - started)})")


@app.command()
def embed(config: ConfigFile = DEFAULT_CONFIG, overrides: Overrides = None) -> None:
    """Put every volume through the vision tower once, into the cache on disk; what is there is checked and kept.

    Several processes fill one embed.cache_dir faster, each with a run_dir of its own.
    """
    _stage("embed", config, overrides)


@app.command()
def sft(config: ConfigFile = DEFAULT_CONFIG, overrides: Overrides = None, again: Again = False) -> None:
    """LoRA SFT over the cached features; the best adapter by validation loss is kept. Goes on if interrupted."""
    _stage("sft", config, overrides, again)


@app.command()
def grpo(config: ConfigFile = DEFAULT_CONFIG, overrides: Overrides = None, again: Again = False) -> None:
    """GRPO from the SFT adapter, in one process; goes on if interrupted. `launch` runs the same job under Ray."""
    _stage("grpo", config, overrides, again)


@app.command()
def controls(config: ConfigFile = DEFAULT_CONFIG, overrides: Overrides = None, again: Again = False) -> None:
    """What else GRPO's wall-clock could buy: SFT continued, and SFT on the best of G samples of the SFT policy.

    For a run whose GRPO has finished; `eval` and `compare` take both up beside SFT and GRPO.
    """
    loaded = _load(config, overrides)
    from rl.stages import CONTROLS

    for stage in CONTROLS:
        _run(loaded, stage, again=again)


@app.command(name="eval")
def evaluate(config: ConfigFile = DEFAULT_CONFIG, overrides: Overrides = None, again: Again = False) -> None:
    """The benchmark on held-out patients for base, SFT and GRPO, next to baselines that never see the image.

    With engine.kind=openai, for the model that the section `openai` names, at any OpenAI-compatible endpoint. What is
    shown and asked is up to eval.image and eval.prompts; runs of other settings lie beside the usual ones. With
    ray.num_engines above 1, so many engines share the questions under Ray, placed as the section `ray` says.
    """
    loaded = _stage("eval", config, overrides, again)
    from rl.pipeline import read_runs

    _print_runs(read_runs(loaded))


@app.command(name="import")
def import_(
    name: Annotated[str, typer.Argument(metavar="NAME", help="How tables call the run, e.g. o1-zero-shot.")],
    results: Annotated[
        list[Path],
        typer.Option(
            "--results", metavar="PATH", help="Result file, or folder of shards; may be given several times."
        ),
    ],
    config: ConfigFile = DEFAULT_CONFIG,
    overrides: Overrides = None,
) -> None:
    """Result files of the public 3DReasonKnee baseline as a benchmark run on our items, scored.

    Zero-shot results (one JSON object for a model) and SFT inference (JSON lists in shards). Models of others do not
    keep our answer format, so they are read by the tolerant reader whatever the recipe says, unless rewards.reader is
    given here. Items that are not answered count as wrong.
    """
    loaded = _load(config, ["rewards.reader=tolerant", *(overrides or [])], needs_model=False)
    from rl.pipeline import run_import

    imported = run_import(loaded, name, results)
    _print_runs({name: imported.run})
    Console(highlight=False).print(imported.summary(), markup=False, soft_wrap=True)


@app.command()
def compare(
    a: Annotated[
        str,
        typer.Argument(
            metavar="A",
            help="The reference: SFT, GRPO, base, baseline, an imported run, or the folder of a run; several, one for "
            "each training seed, with commas between them.",
        ),
    ],
    b: Annotated[
        str, typer.Argument(metavar="B", help="What is compared with it; as many runs, in the same order.")
    ],
    rest: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[C]... [key=value]...",
            help="More arms to compare with A, and settings of the recipe to override.",
        ),
    ] = None,
    config: ConfigFile = DEFAULT_CONFIG,
) -> None:
    """Paired differences of B (and C ...) against A with patient-level intervals, a verdict in words, and report.html.

    Of three training seeds or more (`compare s0/SFT,s1/SFT,s2/SFT s0/GRPO,s1/GRPO,s2/GRPO`) also what the method did:
    the mean of the differences with a t interval over seeds.
    """
    overrides = [word for word in rest or [] if OVERRIDE.match(word)]
    further = [word for word in rest or [] if not OVERRIDE.match(word)]
    _stage("compare", config, overrides, compared=(a, b, *further))


@app.command()
def launch(
    config: Annotated[Path, typer.Argument(metavar="CONFIG", help="Recipe; configs/ has some.")],
    overrides: Overrides = None,
    address: Annotated[str, typer.Option(help="Ray cluster; default: a local one is started.")] = "",
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Show the placement and check that it fits.")
    ] = False,
    again: Again = False,
) -> None:
    """GRPO under Ray: engines and training workers on the cluster's CPUs and GPUs."""
    given = [*(overrides or []), *([f"ray.address={address}"] if address else [])]
    loaded = _load(config, given)
    from rl.launch import launch as run

    raise typer.Exit(run(loaded, dry_run=dry_run, again=again))


@app.command()
def plan(
    config: Annotated[Path, typer.Argument(metavar="CONFIG", help="Recipe; configs/ has some.")],
    overrides: Overrides = None,
    peak_tflops: Annotated[
        float | None,
        typer.Option(metavar="N", help="Dense matrix product peak of a GPU that is not here, in TFLOP/s."),
    ] = None,
    memory_gb: Annotated[
        float | None, typer.Option(metavar="N", help="Its memory in GB (10^9 bytes).")
    ] = None,
    bandwidth_gbs: Annotated[
        float | None,
        typer.Option(metavar="N", help="Its memory bandwidth in GB/s; default: 4 x --peak-tflops."),
    ] = None,
) -> None:
    """What a recipe costs before it is started: disk, tokens, FLOPs, memory, hours, and which limit binds.

    Needs neither weights nor data. Planned for the device present, whose peak is measured, or for one that is
    described. A GRPO run in run_dir says how long completions are and what share of the peak is reached.
    """
    if (peak_tflops is None) != (memory_gb is None) or (bandwidth_gbs is not None and peak_tflops is None):
        raise typer.BadParameter(
            "describe a machine by --peak-tflops and --memory-gb together, or not at all"
        )
    loaded = _load(config, overrides)
    from rl.plan.estimate import make_plan
    from rl.plan.hardware import described, measured
    from rl.plan.show import print_plan

    if peak_tflops is None or memory_gb is None:
        hardware = measured(loaded)
    else:
        hardware = described(loaded, peak_tflops, memory_gb, bandwidth_gbs)
    print_plan(make_plan(loaded, hardware), Console(highlight=False))


@data_app.command()
def check(
    root: Annotated[
        str,
        typer.Option(metavar="DIR", help="Folder in the released layout; default: the recipe's data.root."),
    ] = "",
    config: Annotated[
        Path | None, typer.Option("--config", metavar="FILE", help="Recipe whose data section is used.")
    ] = None,
    volumes: Annotated[
        int,
        typer.Option(
            metavar="N", min=0, help="Read only so many volumes whole, of the others the headers; 0: all."
        ),
    ] = 0,
    overrides: Overrides = None,
) -> None:
    """Counts, missing and broken files, unreadable truths, patients in two splits, the box convention.

    Reads every volume and mask, about half a second of one core each. Exit code 1 when something is wrong.
    """
    if not root and config is None:
        raise typer.BadParameter("give --root DIR, or --config FILE whose data.root is the folder")
    loaded = _load(config, [*(overrides or []), *([f"data.root={root}"] if root else [])], needs_model=False)
    from rl.data.check import run_check

    raise typer.Exit(run_check(loaded, volumes))


def _stage(
    name: str,
    config: Path,
    overrides: list[str] | None,
    again: bool = False,
    compared: tuple[str, ...] = (),
) -> Config:
    """Run one stage; `compared` names the arms of `compare`."""
    loaded = _load(config, overrides, needs_model=name != "phantom")
    from rl.stages import comparison_of, stage_of

    _run(loaded, comparison_of(*compared) if compared else stage_of(loaded, name), again=again)
    return loaded


def _run(config: Config, stage: Stage, *, again: bool) -> None:
    from rl.stages import run_stage

    if run_stage(config, stage, again=again, skip=not stage.looks_itself) is None:
        Console(highlight=False).print(
            f"{stage.title}: nothing has changed since it finished; skipped (--again)"
        )


def _print_runs(runs: Mapping[str, BenchRun]) -> None:
    """The benchmark's tables of the runs, by the names they go by."""
    from rl.bench.console import print_tables
    from rl.bench.metrics import grade_run, tables

    print_tables({name: tables(grade_run(run)) for name, run in runs.items()})


def _load(path: Path | None, overrides: list[str] | None, *, needs_model: bool = True) -> Config:
    from rl.config_check import load_valid  # imports numpy

    return load_valid(path, overrides or [], needs_model=needs_model)


def main() -> None:
    """Entry point of the command."""
    problem = shadowing()
    if problem:
        sys.exit(f"error: {problem}")
    quiet_libraries()
    signal.signal(
        signal.SIGTERM, lambda number, frame: sys.exit(TERMINATED)
    )  # ends what was started, then goes
    app()
