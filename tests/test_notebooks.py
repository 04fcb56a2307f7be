"""The notebooks run from top to bottom on a demo's output, and are stored without outputs."""

from __future__ import annotations

from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

NOTEBOOKS = sorted((Path(__file__).parents[1] / "notebooks").glob("*.ipynb"))
BY_NAME = pytest.mark.parametrize("path", NOTEBOOKS, ids=[path.stem for path in NOTEBOOKS])
SECONDS_A_CELL = 900


def test_there_are_notebooks_for_the_three_things_users_come_for() -> None:
    assert [path.stem for path in NOTEBOOKS] == [
        "01_write_a_reward",
        "02_grpo_on_ray",
        "03_compare_rl_with_sft",
    ]


@BY_NAME
def test_a_notebook_is_stored_without_outputs(path: Path) -> None:
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert not [cell.source for cell in code if cell.outputs or cell.execution_count]


@pytest.mark.slow
@pytest.mark.timeout(2400)  # the first also makes the smoke run
@BY_NAME
def test_a_notebook_runs_on_the_smoke_run(
    path: Path, smoke_run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("REASONKNEE_RUN", str(smoke_run))
    notebook = nbformat.read(path, as_version=4)
    NotebookClient(
        notebook, timeout=SECONDS_A_CELL, resources={"metadata": {"path": str(path.parent)}}
    ).execute()
    pictures = [
        output
        for cell in notebook.cells
        for output in cell.get("outputs", [])
        if "image/png" in output.get("data", {}) or "<img" in output.get("data", {}).get("text/html", "")
    ]
    assert pictures
