"""transformers' video processing can be imported next to packages built for another torch; matching ones are kept."""

from __future__ import annotations

import subprocess
import sys
from importlib.metadata import entry_points
from pathlib import Path

import pytest

from rollouts import torchvision_shim


def test_installing_twice_adds_one_finder() -> None:
    before = list(sys.meta_path)
    torchvision_shim.install()
    assert sys.meta_path == before


def test_vllm_loads_the_shim_in_its_own_processes() -> None:
    plugins = {plugin.name: plugin.value for plugin in entry_points(group="vllm.general_plugins")}
    assert plugins.get("reasonknee_imports") == "rollouts.torchvision_shim:install"


@pytest.mark.parametrize(
    ("links_cuda", "torch_has_cuda", "hidden"),
    [(True, False, True), (True, True, False), (False, False, False)],
)
def test_a_package_is_hidden_only_when_this_torch_cannot_load_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, links_cuda: bool, torch_has_cuda: bool, hidden: bool
) -> None:
    for name in ("torch", "audio_of_test"):
        (tmp_path / name / "lib").mkdir(parents=True)
        (tmp_path / name / "__init__.py").touch()
    (tmp_path / "audio_of_test" / "lib" / "_a.so").write_bytes(
        b"\0libc10_cuda.so\0" if links_cuda else b"\0libc10.so\0"
    )
    if torch_has_cuda:
        (tmp_path / "torch" / "lib" / "libc10_cuda.so").touch()
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    monkeypatch.setattr(sys, "modules", dict(sys.modules))
    torchvision_shim._hide_if_built_for_cuda("audio_of_test", "lib/_a*.so")
    assert ("audio_of_test" in sys.modules) is hidden


@pytest.mark.slow
def test_the_video_processor_imports_in_a_fresh_interpreter() -> None:
    code = (
        "import rollouts; from transformers import Qwen2VLVideoProcessor, Qwen2_5_VLForConditionalGeneration"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd="/")
