"""The repository as a whole: one-way imports, small files, and a wheel that carries what it needs."""

from __future__ import annotations

import ast
import functools
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = ("rewards", "rollouts", "rl")
FORBIDDEN = {"rewards": {"rollouts", "rl"}, "rollouts": {"rl"}, "rl": set[str]()}
"""Imports go one way: rl -> rollouts -> rewards."""
HEAVY = {"torch", "transformers", "ray", "vllm", "trl", "peft", "datasets"}
LONGEST_FILE = 400


def sources(package: str) -> list[Path]:
    return sorted((ROOT / package).rglob("*.py"))


@functools.cache
def nodes(path: Path) -> tuple[ast.AST, ...]:
    """Every node of a file's syntax tree."""
    return tuple(ast.walk(ast.parse(path.read_text(encoding="utf-8"))))


@functools.cache
def imported_packages(path: Path) -> frozenset[str]:
    """Top-level names of every import in a file, wherever it stands."""
    found: set[str] = set()
    for node in nodes(path):
        if isinstance(node, ast.Import):
            found |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            found.add(node.module.partition(".")[0])
    return frozenset(found)


@pytest.mark.parametrize("package", PACKAGES)
def test_imports_between_the_packages_go_one_way(package: str) -> None:
    offenders = {
        str(path.relative_to(ROOT)): sorted(imported_packages(path) & FORBIDDEN[package])
        for path in sources(package)
        if imported_packages(path) & FORBIDDEN[package]
    }
    assert not offenders


def test_rewards_needs_numpy_and_nothing_else() -> None:
    """But for what only its host imports: pytest its plugin, OpenRLHF the adapter that returns tensors."""
    allowed = {"numpy", "rewards"} | sys.stdlib_module_names
    offenders = {path.name: imported_packages(path) - allowed for path in sources("rewards")}
    beyond = {name: extra for name, extra in offenders.items() if extra}
    assert beyond == {"adapters.py": {"torch"}, "pytest_plugin.py": {"pytest"}}


def test_importing_rewards_in_a_fresh_interpreter_loads_neither_torch_nor_ray() -> None:
    code = f"import sys, rewards; print(sorted({HEAVY!r} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd="/")
    assert done.stdout.strip() == "[]"


def test_no_script_is_imported_instead_of_a_package() -> None:
    """A script's folder comes first on the path."""
    assert not {path.stem for path in (ROOT / "benchmarks").glob("*.py")} & set(PACKAGES)


def test_no_source_file_is_longer_than_400_lines() -> None:
    lengths = {
        str(path.relative_to(ROOT)): len(path.read_text(encoding="utf-8").splitlines())
        for package in PACKAGES
        for path in sources(package)
    }
    assert not {name: length for name, length in lengths.items() if length > LONGEST_FILE}


@pytest.mark.parametrize("package", PACKAGES)
def test_nothing_unpickles_evaluates_text_or_loads_weights_loosely(package: str) -> None:
    """Weights are safetensors and must all land; untrusted text is parsed, never run."""
    offenders = []
    for path in sources(package):
        if imported_packages(path) & {"pickle", "dill", "cloudpickle", "joblib"}:
            offenders.append(f"{path.relative_to(ROOT)} imports a pickling package")
        for node in nodes(path):
            if not isinstance(node, ast.Call):
                continue
            name = ast.unparse(node.func).rpartition(".")[2]
            loose = any(k.arg == "strict" and ast.unparse(k.value) == "False" for k in node.keywords)
            if ast.unparse(node.func) in ("eval", "exec") or (name == "load_state_dict" and loose):
                offenders.append(f"{path.relative_to(ROOT)}:{node.lineno} {ast.unparse(node)}")
    assert not offenders


def test_the_ci_scripts_are_executable_and_valid_shell() -> None:
    for script in (ROOT / ".ci" / "install", ROOT / ".ci" / "run"):
        assert script.stat().st_mode & 0o111, f"{script} is not executable"
    for script in (
        ROOT / ".ci" / "install",
        ROOT / ".ci" / "run",
        *(ROOT / "configs" / "slurm").glob("*.sbatch"),
    ):
        subprocess.run(["bash", "-n", str(script)], check=True)


def test_the_python_versions_of_the_installer_are_those_of_the_package() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert project["requires-python"] == ">=3.11,<3.14"
    assert "(3, 11) <= sys.version_info[:2] <= (3, 13)" in (ROOT / ".ci" / "install").read_text(
        encoding="utf-8"
    )


def test_the_wheel_builds_and_carries_every_file_of_the_packages(tmp_path: Path) -> None:
    """Templates, assets and the ontology are found by pattern: a new kind of file must not be left behind."""
    copy = tmp_path / "source"
    for package in PACKAGES:
        shutil.copytree(ROOT / package, copy / package, ignore=shutil.ignore_patterns("__pycache__", ".*"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, copy)
    build = "import sys; from setuptools.build_meta import build_wheel; build_wheel(sys.argv[1])"
    subprocess.run([sys.executable, "-c", build, str(tmp_path)], cwd=copy, capture_output=True, check=True)
    (wheel,) = tmp_path.glob("reasonknee_rl-*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        (entry_points,) = (name for name in names if name.endswith("entry_points.txt"))
        assert "reasonknee = rl.cli:main" in archive.read(entry_points).decode()
    files = {
        str(path.relative_to(copy))
        for package in PACKAGES
        for path in (copy / package).rglob("*")
        if path.is_file()
    }
    assert "rewards/ontology.json" in files
    assert not files - names, "files of the packages that the wheel lacks"
    assert not {name for name in names if not name.startswith((*PACKAGES, "reasonknee_rl-"))}


@pytest.mark.parametrize("document", ["README.md", "CONTRIBUTING.md", "CHANGELOG.md"])
def test_the_local_links_of_the_documents_lead_somewhere(document: str) -> None:
    text = (ROOT / document).read_text(encoding="utf-8")
    links = [link for link in re.findall(r"\]\(([^)]+)\)", text) if not link.startswith(("http", "#"))]
    assert not [link for link in links if not (ROOT / link.partition("#")[0]).exists()]


def test_the_documents_name_only_recipes_that_exist() -> None:
    for document in ("README.md", "CONTRIBUTING.md", "Makefile"):
        named = re.findall(r"configs/[\w/]+\.(?:yaml|sbatch)", (ROOT / document).read_text(encoding="utf-8"))
        assert not [name for name in named if not (ROOT / name).is_file()]
