"""The command line as a user meets it: help, the stages by name, and what each says."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from typer.testing import Result

Cli = Callable[..., Result]
Refusal = Callable[..., str]
Words = list[str | Path]

STAGES = ("phantom", "base", "embed", "sft", "grpo", "controls", "eval", "compare")


@pytest.fixture
def recipe(workshop: Path, tmp_path: Path) -> Words:
    """Arguments of a stage: the tiny recipe, with a run folder of its own."""
    folder = f"run_dir={tmp_path / 'run'}"
    return ["--config", workshop / "recipe.yaml", folder, "eval.max_completion_length=10"]


@pytest.mark.parametrize("stage", ["demo", *STAGES])
def test_every_stage_takes_a_recipe_and_overrides(stage: str, cli: Cli) -> None:
    result = cli(stage, "--help")
    assert result.exit_code == 0
    assert "--config" in result.output
    assert "[key=value]..." in result.output


def test_help_names_every_command_and_imports_nothing_heavy() -> None:
    code = (
        "import sys\nfrom rl.cli import app\n"
        "try:\n    app(['--help'])\n"
        "finally:\n    print(sorted({'torch', 'numpy', 'ray', 'transformers', 'omegaconf'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    for name in ("demo", *STAGES, "launch", "data", "rewards"):
        assert re.search(rf"│ {name} ", done.stdout), name
    assert done.stdout.strip().endswith("[]")


@pytest.mark.slow
def test_a_blind_run_is_compared_with_the_usual_one_of_the_same_model(
    recipe: Words, tmp_path: Path, cli: Cli, refusal: Refusal
) -> None:
    few = [*recipe, "eval.max_examples=4", "compare.bootstrap_draws=50"]
    for words in ([], ["eval.image=none"]):
        done = cli("eval", *few, *words)
        assert done.exit_code == 0, (done.output, done.exception)
    assert f"benchmark, none: answers of base-none in {tmp_path}/run/settings" in done.output
    assert "shown no picture, own prompts" in done.output
    assert "nothing has changed" in cli("eval", *few).output
    assert "no run 'base-shuffled'" in refusal("compare", "base", "base-shuffled", *few)

    compared = cli("compare", "base", "base-none", *few)
    assert compared.exit_code == 0, (compared.output, compared.exception)
    setting = "base-none: shown no picture, own prompts; base: shown the volume, own prompts"
    assert setting in " ".join(compared.output.split())
    assert f"Setting: {setting}." in (tmp_path / "run" / "report.html").read_text()


@pytest.mark.slow
def test_the_stages_by_name_lead_from_embeddings_to_a_report(
    recipe: Words, tmp_path: Path, cli: Cli, refusal: Refusal
) -> None:
    """Each says what came out and where it is; asked again, it does nothing."""
    grpo = ["grpo", *recipe, "grpo.init_adapter=", "eval.max_examples=4", "compare.bootstrap_draws=50"]
    said = {}
    (tmp_path / "run" / "eval" / "base").mkdir(parents=True)  # a benchmark that was stopped
    (tmp_path / "run" / "eval" / "base" / "journal.jsonl").touch()
    for words in (["embed", *recipe], ["sft", *recipe], grpo, ["eval", *grpo[1:]]):
        result = cli(*words)
        assert result.exit_code == 0, (result.output, result.exception)
        said[words[0]] = result.output
    assert re.search(r"embed: features of 7 volumes in \S+/cache \(\d+ s\)", said["embed"])
    assert re.search(rf"SFT: validation loss .* of 2; adapter in {tmp_path}/run/sft/adapter", said["sft"])
    assert re.search(rf"GRPO: adapter in {tmp_path}/run/grpo/adapter", said["grpo"])
    assert f"benchmark: answers of baseline, prior, base, SFT, GRPO in {tmp_path}/run/eval" in said["eval"]
    assert "former answers" not in said["eval"]
    assert "Loading weights" not in "".join(said.values())

    compared = cli("compare", "SFT", "GRPO", *grpo[1:])
    assert compared.exit_code == 0, (compared.output, compared.exception)
    assert "GRPO against SFT" in compared.output
    assert (tmp_path / "run" / "report.html").is_file()

    assert "nothing has changed" in cli(*grpo).output
    message = refusal(*grpo, "grpo.learning_rate=0.5")
    assert "grpo.learning_rate was 0.003 and is 0.5" in message
    again = cli(*grpo, "grpo.learning_rate=0.5", "--again")
    assert again.exit_code == 0, (again.output, again.exception)
    assert (tmp_path / "run" / "old" / "grpo-1" / "grpo" / "adapter").is_dir()

    answered = cli("eval", *grpo[1:], "grpo.learning_rate=0.5")
    assert "SFT: has answered already" in answered.output
    assert "GRPO: former answers" in answered.output
    assert "no run 'nobody': use one of baseline, prior, base, SFT, GRPO" in refusal(
        "compare", "SFT", "nobody", *recipe
    )


def test_grpo_before_sft_names_the_command_to_run_first(recipe: Words, refusal: Refusal) -> None:
    message = refusal("grpo", *recipe, "grpo.init_adapter=")
    assert message.endswith("run/sft/adapter does not exist; run `reasonknee sft` first")


def test_sft_before_embed_names_the_command_to_run_first(
    recipe: Words, tmp_path: Path, refusal: Refusal
) -> None:
    message = refusal("sft", *recipe, f"embed.cache_dir={tmp_path / 'empty'}")
    assert "run `reasonknee embed` with the same config" in message


def test_compare_before_eval_names_the_command_to_run_first(recipe: Words, refusal: Refusal) -> None:
    assert "run `reasonknee eval` first" in refusal("compare", "SFT", "GRPO", *recipe)


def test_phantoms_are_written_once_and_never_over_other_data(
    recipe: Words, tmp_path: Path, cli: Cli, refusal: Refusal
) -> None:
    words = ["phantom", *recipe, f"data.root={tmp_path / 'data'}"]
    said = cli(*words).output
    assert re.search(
        rf"phantoms: 7 knees of 7 patients in {tmp_path}/data, one of them as preview.png \(\d+ s\)", said
    )
    assert "skipped" in cli(*words).output
    (tmp_path / "real" / "split_files").mkdir(parents=True)
    assert "holds split_files that are no phantoms" in refusal(
        "phantom", *recipe, f"data.root={tmp_path / 'real'}"
    )
    assert [path.name for path in (tmp_path / "real").iterdir()] == ["split_files"]


def test_the_dataset_check_needs_no_recipe(workshop: Path, cli: Cli, refusal: Refusal) -> None:
    result = cli("data", "check", "--root", workshop / "data", "data.question_ids=[1,16,42,60]")
    assert result.exit_code == 0, result.output
    assert "No errors." in result.output
    assert "give --root DIR" in refusal("data", "check", code=2)


def test_a_folder_that_shadows_a_package_ends_the_command(tmp_path: Path) -> None:
    (tmp_path / "rewards").mkdir()
    (tmp_path / "rewards" / "__init__.py").write_text("")
    done = subprocess.run(
        [sys.executable, "-c", "from rl.cli import main; main()", "demo"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1
    assert f"error: the package 'rewards' was imported from {tmp_path}" in done.stderr


def test_a_bug_keeps_its_traceback(monkeypatch: pytest.MonkeyPatch, recipe: Words, cli: Cli) -> None:
    def broken(config: object) -> str:
        raise ZeroDivisionError

    monkeypatch.setattr("rl.config_check.validate", broken)
    result = cli("embed", *recipe)
    assert not isinstance(result.exception, SystemExit)


@pytest.mark.slow
@pytest.mark.parametrize(("ending", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_an_ended_command_cleans_up_and_says_so_by_its_exit_code(
    ending: signal.Signals, code: int, workshop: Path, tmp_path: Path
) -> None:
    program = (
        "import rl.stages, sys\nfrom rl.cli import main\n"
        "def wait(*arguments):\n"
        "    import time\n"
        "    try:\n        print('working', flush=True)\n"
        # in short naps: a signal between Python's last look and the call of `sleep` is only seen after it
        "        while True: time.sleep(0.1)\n"
        "    finally:\n        print('cleaned up', flush=True)\n"
        "rl.stages._function = lambda name: wait\n"
        f"sys.argv[1:] = ['embed', '--config', '{workshop / 'recipe.yaml'}', 'run_dir={tmp_path / 'run'}', "
        "'eval.max_completion_length=10']\nmain()"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", program], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    while "working" not in process.stdout.readline():
        assert process.poll() is None
    os.kill(process.pid, ending)
    out, err = process.communicate(timeout=60)
    assert "cleaned up" in out
    assert "Traceback" not in err
    assert process.returncode == code
    assert json.loads((tmp_path / "run" / "stages" / "embed.json").read_text())["done"] is False
