"""`reasonknee rewards`: questions, a new reward, the red team, scoring, explaining, replaying."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import polars as pl
import pytest
from accelerate import Accelerator
from typer.testing import Result

from rewards import QUESTIONS, Box3D, format_answer
from rl.config import Config, save_config
from rl.grpo import train_grpo
from rollouts.types import Engine

Cli = Callable[..., Result]
Refusal = Callable[..., str]
GRADES = {"Size of lesion": 2, "Depth of lesion": 1}
BOX = Box3D(2, 6, 10, 30, 20, 50)


@pytest.fixture
def recipe(workshop: Path, tmp_path: Path) -> list[str | Path]:
    return ["--config", workshop / "recipe.yaml", f"run_dir={tmp_path / 'run'}"]


@pytest.fixture
def completions(tmp_path: Path) -> Path:
    gold = format_answer(QUESTIONS[16], GRADES, BOX, "thin")
    truth = {"grades": GRADES, "bbox": BOX.to_text()}
    file = tmp_path / "x.jsonl"
    lines = [{"question_id": 16, "completion": c, "truth": truth} for c in (gold, "[red]x", gold)]
    file.write_text("\n".join(json.dumps(line) for line in lines))
    return file


def test_questions_are_listed_and_shown_in_full(cli: Cli, refusal: Refusal) -> None:
    listed = cli("rewards", "questions").output
    assert all(f"│ {question_id} " in listed for question_id in QUESTIONS)
    shown = cli("rewards", "questions", "--id", "48").output
    assert "medial meniscus anterior morphology" in shown
    assert "nominal" in shown
    assert "8 complete." in " ".join(shown.split())
    assert "numbered 1 to 69, got 70" in refusal("rewards", "questions", "--id", "70", code=2)


@pytest.mark.slow
def test_a_new_reward_and_its_test_pass_as_they_stand(tmp_path: Path, cli: Cli, refusal: Refusal) -> None:
    file = tmp_path / "near_enough.py"
    result = cli("rewards", "new", file)
    assert result.exit_code == 0, result.output
    assert f"pytest {tmp_path}/test_near_enough.py" in result.output
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "pytest",
            "-q",
            tmp_path,
            "--rootdir",
            tmp_path,
        ],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout
    assert " passed" in done.stdout
    before = file.read_text()
    assert "is there already; nothing was written" in refusal("rewards", "new", file)
    assert file.read_text() == before
    for reason, names in {
        "named like the reward, a Python name": ("my-reward.py", "class.py", "reward.txt"),
        "is taken by the rewards package or by a module": (
            "box_iou.py",
            "Truth.py",
            "json.py",
            "rewards.py",
            "numpy.py",
        ),
        "pytest would take this for a test": ("test_mine.py", "conftest.py"),
    }.items():
        for name in names:
            assert reason in refusal("rewards", "new", tmp_path / name)


@pytest.mark.slow
def test_the_red_team_lets_sound_rewards_pass_and_names_what_beats_others(
    workshop: Path, tmp_path: Path, cli: Cli, refusal: Refusal
) -> None:
    recall = tmp_path / "recall.py"
    recall.write_text(
        "from rewards import reward\n\n\n@reward\ndef covered(answer, truth):\n"
        "    if truth.bbox is None:\n        return None\n"
        "    a, b = answer.bbox, truth.bbox\n"
        "    return float(a is not None and a.x_min <= b.x_min and a.x_max >= b.x_max)\n"
    )
    recipe = ["--config", workshop / "recipe.yaml"]
    passed = cli(
        "rewards", "redteam", *recipe, "rewards.components=[{name: moaks_accuracy}, {name: box_iou}]"
    )
    assert passed.exit_code == 0, passed.output
    assert "none of" in passed.output
    assert "train_majority_and_mean_box" in passed.output
    failed = cli("rewards", "redteam", *recipe, f"rewards.components=[{{name: '{recall}:covered'}}]")
    assert failed.exit_code == 1
    assert "beyond_the_volume: earns 1.000, honest accuracy 0.60 with IoU 0.30" in " ".join(
        failed.output.split()
    )


def test_completions_are_scored_line_by_line(
    completions: Path, tmp_path: Path, recipe: list[str | Path], cli: Cli, refusal: Refusal
) -> None:
    out = tmp_path / "y.jsonl"
    shipped = "rewards.components=[{name: output_format}, {name: box_iou}]"
    words = ["rewards", "score", "--in", completions, "--out", out, *recipe, shipped]
    result = cli(*words)
    assert result.exit_code == 0, result.output
    assert "3 completions scored, mean reward 0.6667; 0 bad lines" in result.output
    assert [json.loads(line)["reward"] for line in out.read_text().splitlines()] == [1.0, 0.0, 1.0]
    completions.write_text(completions.read_text() + "\nnonsense\n")
    result = cli(*words)
    assert result.exit_code == 1
    assert "line 4: not JSON" in result.output
    assert len(out.read_text().splitlines()) == 3
    good = completions.read_bytes().splitlines(keepends=True)[0]
    completions.write_bytes(b"\xef\xbb\xbf" + good + b"\xff\xfe{}\n" + good)
    result = cli(*words)
    assert "line 2: not UTF-8" in result.output
    assert "2 completions scored" in result.output
    words[5] = completions
    assert "are the same file" in refusal(*words, code=2)


def test_one_completion_is_explained(
    completions: Path, recipe: list[str | Path], cli: Cli, refusal: Refusal
) -> None:
    gated = "rewards.components=[{name: output_format}, {name: box_iou, gate: output_format}]"
    words = ["rewards", "explain", "--in", completions, *recipe, gated]
    first = cli(*words).output
    assert "[2, 5, 10, 29, 20, 49]" in first
    assert "+0.5000" in first
    second = cli(*words, "--line", "2").output
    assert "'[red]x'" in second
    assert "missing think" in second
    assert "output_format scored 0" in second
    assert "fewer than 9 lines" in refusal(*words, "--line", "9", code=2)


@pytest.mark.slow
def test_a_run_is_replayed_under_other_rewards(
    config: Config, engine: Engine, accelerator: Accelerator, tmp_path: Path, cli: Cli, refusal: Refusal
) -> None:
    train_grpo(config, engine, accelerator)
    run = Path(config.run_dir)
    save_config(config, run / "config.yaml")
    same = cli("rewards", "replay", run, "--config", run / "config.yaml", "--out", tmp_path / "again.parquet")
    assert same.exit_code == 0, (same.output, same.exception)
    table = pl.read_parquet(tmp_path / "again.parquet")
    assert table["reward"].to_list() == table["replayed"].to_list()
    assert "(0 gained, 0 lost)" in same.output
    assert "the best completion is another in 0; mean rank correlation 1.000" in same.output
    other = cli(
        "rewards", "replay", run, "--config", run / "config.yaml", "rewards.components=[{name: box_iou}]"
    )
    assert "8 groups: 8 had something to learn from, 0 would have (0 gained, 8 lost)" in other.output
    message = refusal("rewards", "replay", tmp_path / "nothing", "--config", run / "config.yaml")
    assert (
        "is the folder of a GRPO run?" in message.replace(f"{tmp_path}/nothing ", "")
        or "no completions" in message
    )
