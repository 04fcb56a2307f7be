"""The benchmark's tables on a terminal."""

from __future__ import annotations

from collections.abc import Mapping

from rich.console import Console
from rich.table import Table
from rich.text import Text

from rl.bench.compare import Comparison, verdict
from rl.bench.metrics import Tables
from rl.bench.views import TableView, all_views, differences_table

_STYLES = {"published": "dim", "count": "dim", "baseline": "italic"}


def print_tables(by_run: Mapping[str, Tables], console: Console | None = None) -> None:
    """Print every table of these runs, each under its test file, question set, reader, items and patients."""
    console = console or Console()
    for view in all_views(by_run):
        _print_view(view, console)
    for name, tables in by_run.items():
        console.print(Text(f"{name} ({tables.meta.decoding_words}): {tables.failures}."))


def print_comparison(comparison: Comparison, console: Console | None = None) -> None:
    """Print the verdict, then every difference."""
    console = console or Console()
    console.print(Text(verdict(comparison), style="bold"))
    _print_view(differences_table(comparison), console)


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
