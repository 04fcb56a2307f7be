"""What the documents tell people to type exists: commands, options, recipes, settings and make targets."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

import rl.cli
from rewards import RewardSuite
from rl.config import Config, load_config

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
PROSE = "".join(
    path.read_text(encoding="utf-8") for path in [*ROOT.glob("*.md"), *sorted((ROOT / "notebooks").iterdir())]
)


def lines_to_type() -> list[str]:
    """The lines of the README's shell blocks, without comments; `$NAME` is what the block sets it to."""
    lines: list[str] = []
    for block in re.findall(r"```bash\n(.*?)```", README, re.DOTALL):
        values: dict[str, str] = {}
        for line in block.splitlines():
            words = " ".join(shlex.split(line, comments=True))
            for name, value in values.items():
                words = words.replace(f"${name}", value)
            if assigned := re.fullmatch(r"([A-Z]+)=(\S+)", words):
                values[assigned[1]] = assigned[2]
            elif words:
                lines.append(words)
    return lines


COMMANDS = [line for line in lines_to_type() if line.startswith("reasonknee ")]


@pytest.mark.parametrize("line", COMMANDS)
def test_a_command_of_the_readme_is_understood_with_its_recipe_and_settings(
    line: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Everything up to the work itself: an unknown command, option, recipe or setting would end in an error."""
    loaded: list[Config] = []

    def load_and_stop(path: Path | None, overrides: list[str] | None, **_: object) -> None:
        loaded.append(load_config(path, overrides or []))
        raise typer.Exit

    monkeypatch.setattr(rl.cli, "_load", load_and_stop)
    monkeypatch.chdir(ROOT)
    result = CliRunner().invoke(rl.cli.app, line.split()[1:])
    assert result.exit_code == 0, result.output
    assert loaded


def test_the_plan_in_the_readme_is_the_one_that_is_printed(monkeypatch: pytest.MonkeyPatch) -> None:
    (shown,) = re.findall(r"```text\n(Qwen/.*?)```", README, re.DOTALL)
    (command,) = [line for line in COMMANDS if line.startswith("reasonknee plan ")]
    monkeypatch.chdir(ROOT)
    printed = (
        CliRunner().invoke(rl.cli.app, command.split()[1:], env={"COLUMNS": "100", "TERM": "dumb"}).output
    )
    assert [line.rstrip() for line in printed.splitlines()] == shown.splitlines()


def test_every_command_named_in_prose_has_help() -> None:
    named = set(re.findall(r"`reasonknee ((?:data )?[a-z]+)", PROSE))
    stages = re.search(r"`reasonknee STAGE --config [^:]*`: ((?:`[a-z]+`,?\s*)+)", README)
    assert stages is not None
    for command in sorted(named | set(re.findall(r"`([a-z]+)`", stages[1]))):
        result = CliRunner().invoke(rl.cli.app, [*command.split(), "--help"])
        assert result.exit_code == 0, f"reasonknee {command} --help: {result.output}"


def test_every_make_target_that_is_named_exists() -> None:
    targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
    named = set(re.findall(r"`make ([a-z-]+)", PROSE)) | {
        line.split()[1] for line in lines_to_type() if line.startswith("make ")
    }
    assert named
    assert named <= set(targets)


def test_the_reward_of_the_readme_passes_its_test_and_works_with_the_yaml_beside_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, body in re.findall(r"```python\n# (\w+\.py)\n(.*?)```", README, re.DOTALL):
        (tmp_path / name).write_text(body, encoding="utf-8")
    (recipe,) = re.findall(r"```yaml\n(.*?)```", README, re.DOTALL)
    (tmp_path / "run.yaml").write_text("data: {root: data}\n" + recipe, encoding="utf-8")
    tested = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert "1 passed" in tested.stdout, tested.stdout
    monkeypatch.chdir(tmp_path)
    suite = RewardSuite.from_config(load_config(tmp_path / "run.yaml").rewards)
    assert suite.names == ("output_format", "moaks_accuracy", "box_found")
