"""The benchmark's tables on a terminal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from rich.console import Console
from rich.table import Table
from rich.text import Text

from rl.bench.arms import ArmComparison
from rl.bench.differences import headline_table
from rl.bench.metrics import Tables
from rl.bench.views import TableView, all_views

_STYLES = {"published": "dim", "count": "dim", "baseline": "italic"}


def print_tables(by_run: Mapping[str, Tables], console: Console | None = None) -> None:
    """Print every table of these runs, each under its test file, question set, reader, items and patients."""
    console = console or Console()
    for view in all_views(by_run):
        _print_view(view, console)
    for name, tables in by_run.items():
        console.print(Text(f"{name} ({tables.meta.decoding_words}): {tables.failures}."))


def print_headlines(comparisons: Sequence[ArmComparison], console: Console | None = None) -> None:
    """Print the endpoints that the verdict is about, for every pair of runs and over seeds."""
    _print_view(headline_table(comparisons), console or Console())


def _print_view(view: TableView, console: Console) -> None:
    # Text, never markup: a run may be called "[red]"
    table = Table(
        title=Text(view.title), caption=Text(view.note), title_justify="left", caption_justify="left"
    )
    for index, column in enumerate(view.columns):
        table.add_column(Text(column), justify="right" if index else "left")
    for row in view.rows:
        table.add_row(*(Text(cell) for cell in row.cells), style=_STYLES.get(row.kind))
    console.print(table)
