"""What `data check` found, and how it is printed."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, field
from pathlib import Path

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from rl.data.boxes import Convention
from rl.data.layout import DataError, Fault, Split
from rl.data.ranking import RankedConvention

FAULTS_SHOWN = 20
CONVENTIONS_SHOWN = 8


@dataclass
class SplitCounts:
    """What a split's CSV lists."""

    rows: int
    patients: int
    visits: int
    """Distinct (patient, time)."""
    volumes: int
    """Rows whose volume exists and is sound, as far as it was read."""


@dataclass
class FileCounts:
    """What an item file holds."""

    split: Split
    items: int = 0
    sound: int = 0
    """Items without a fault of their own."""
    with_box: int = 0
    with_reasoning: int = 0
    questions: set[int] = field(default_factory=set)
    volumes: set[str] = field(default_factory=set)


@dataclass
class CheckReport:
    """Everything `check_dataset` found."""

    root: Path
    convention: Convention
    """The configured one."""
    splits: dict[Split, SplitCounts] = field(default_factory=dict)
    files: dict[str, FileCounts] = field(default_factory=dict)
    volumes: int = 0
    volumes_opened: int = 0
    """Volumes read whole, mask included; of the others only the header was read."""
    faults: list[DataError] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    ranking: list[RankedConvention] = field(default_factory=list)
    """All 96 conventions, best first; empty when nothing could be compared."""
    box_pairs: int = 0
    """Text boxes that were compared with a mask box."""

    @property
    def ok(self) -> bool:
        """True when nothing is wrong."""
        return not self.faults

    def of(self, fault: Fault) -> list[str]:
        """Messages of one kind of fault."""
        return [str(error) for error in self.faults if error.fault is fault]


def print_report(report: CheckReport, console: Console | None = None) -> None:
    """Print counts, the ranking of box conventions, every kind of fault, and the verdict."""
    console = console or Console()
    console.print(f"[bold]Dataset[/] {escape(str(report.root))}")
    console.print(_splits_table(report))
    console.print(_files_table(report))
    console.print(
        f"Read {report.volumes_opened} of {report.volumes} volumes whole, with their masks"
        + (
            "."
            if report.volumes_opened == report.volumes
            else "; of the others the headers only (--volumes)."
        )
    )
    if report.ranking:
        console.print(_ranking_table(report))
    for note in report.notes:
        console.print(f"[yellow]note[/] {escape(note)}", soft_wrap=True)
    _print_faults(report, console)
    kinds = len({error.fault for error in report.faults})
    if not report.ok:
        console.print(f"[bold red]{len(report.faults)} errors of {kinds} kinds.[/]")
    elif report.volumes_opened == report.volumes:
        console.print("[bold green]No errors.[/]")
    else:
        console.print("[bold yellow]No errors in what was read; without --volumes all is.[/]")


def _splits_table(report: CheckReport) -> Table:
    table = Table(
        "split", "rows", "patients", "visits", "sound volumes", title="Splits", title_justify="left"
    )
    for split, counts in report.splits.items():
        table.add_row(split, *map(str, (counts.rows, counts.patients, counts.visits, counts.volumes)))
    return table


def _files_table(report: CheckReport) -> Table:
    table = Table(title="Item files", title_justify="left")
    table.add_column("file", no_wrap=True)
    for heading in ("split", "items", "sound", "questions", "volumes", "with box", "with reasoning"):
        table.add_column(heading)
    for name, c in report.files.items():
        numbers = (c.items, c.sound, len(c.questions), len(c.volumes), c.with_box, c.with_reasoning)
        table.add_row(escape(name), c.split, *map(str, numbers))
    return table


def _ranking_table(report: CheckReport) -> Table:
    table = Table(
        "rank",
        "mean IoU",
        "convention",
        "",
        title=f"Box conventions, {report.box_pairs} boxes",
        title_justify="left",
    )
    for rank, entry in enumerate(report.ranking, start=1):
        configured = entry.convention == report.convention
        if rank > CONVENTIONS_SHOWN and not configured:
            continue
        remarks = ["configured"] if configured else []
        if rank > 1 and entry.same_as_best:
            remarks.append("cannot be told from the best by these boxes")
        table.add_row(str(rank), f"{entry.mean_iou:.4f}", entry.convention.describe(), ", ".join(remarks))
    return table


def _print_faults(report: CheckReport, console: Console) -> None:
    by_kind: dict[Fault, list[str]] = defaultdict(list)
    for error in report.faults:
        by_kind[error.fault].append(str(error))
    for fault, messages in by_kind.items():
        console.print(f"[bold red]{fault.value}[/]: {len(messages)}")
        for message in messages[:FAULTS_SHOWN]:
            console.print(f"  {escape(message)}", soft_wrap=True)
        if len(messages) > FAULTS_SHOWN:
            console.print(f"  … and {len(messages) - FAULTS_SHOWN} more")
