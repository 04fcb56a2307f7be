"""What a run records about where it ran, and the device and dtype `auto` stands for."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import rewards
from rl.config import ConfigError
from rl.environment import (
    AUTO_ATTENTION,
    describe_environment,
    pick_attention,
    pick_device,
    pick_dtype,
    write_environment,
)
from rl.one_install import check_one_install

needs_no_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="tests a machine without a GPU")


@needs_no_gpu
def test_auto_without_a_gpu_is_the_cpu_in_float32() -> None:
    device = pick_device("auto")
    assert device == torch.device("cpu")
    assert pick_dtype("auto", device) is torch.float32


def test_auto_on_a_gpu_is_bfloat16_and_a_named_dtype_is_taken_as_named() -> None:
    gpu = torch.device("cuda")
    assert pick_dtype("auto", gpu) is torch.bfloat16
    assert pick_dtype("float32", gpu) is torch.float32
    assert pick_dtype("bfloat16", torch.device("cpu")) is torch.bfloat16


@needs_no_gpu
def test_cuda_without_a_gpu_says_what_to_install() -> None:
    with pytest.raises(ConfigError, match=r"sees no GPU.*extra `gpu`"):
        pick_device("cuda")


@needs_no_gpu
@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_flex_attention_needs_a_gpu_and_a_compiler_for_it(device: str) -> None:
    assert pick_attention("sdpa", torch.device(device)) == "sdpa"
    assert pick_attention("auto", torch.device(device)) == AUTO_ATTENTION[device]
    with pytest.raises(
        ConfigError, match=rf"model\.attention is 'flex'.* Triton; torch .* on {device} .*: use sdpa"
    ):
        pick_attention("flex", torch.device(device))


def test_unknown_names_are_refused_with_the_known_ones() -> None:
    with pytest.raises(ConfigError, match="auto, cpu or cuda"):
        pick_device("tpu")
    with pytest.raises(ConfigError, match="auto, float32, bfloat16"):
        pick_dtype("float16", torch.device("cpu"))
    with pytest.raises(ConfigError, match=r"model\.attention is 'flash': use auto, sdpa, subtree or flex"):
        pick_attention("flash", torch.device("cpu"))


def test_attention_by_subtrees_has_no_kernel_for_a_gpu() -> None:
    assert pick_attention("subtree", torch.device("cpu")) == "subtree"
    with pytest.raises(ConfigError, match=r"'subtree', whose kernel is one for CPUs, not for cuda: use auto"):
        pick_attention("subtree", torch.device("cuda"))


def test_the_environment_names_versions_hardware_and_seed() -> None:
    environment = describe_environment(seed=7)
    assert environment["seed"] == 7
    assert environment["packages"]["torch"] == torch.__version__
    assert environment["cpu"]["count"] >= 1
    assert len(environment["gpus"]) == torch.cuda.device_count()


def test_the_environment_file_is_complete_json_and_leaves_no_temporary_file(tmp_path: Path) -> None:
    path = write_environment(tmp_path / "run", seed=1)
    assert json.loads(path.read_text(encoding="utf-8"))["seed"] == 1
    assert [p.name for p in path.parent.iterdir()] == ["environment.json"]


def test_a_folder_that_shadows_a_package_is_named(tmp_path: Path) -> None:
    """A fresh interpreter started where the user has a `rewards/` of their own."""
    own = tmp_path / "rewards"
    shutil.copytree(Path(rewards.__file__).parent, own)
    code = "import sys; sys.path.insert(0, '.'); from rl.one_install import check_one_install; check_one_install()"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode == 1
    assert f"ConfigError: the package 'rewards' was imported from {tmp_path}" in done.stderr


def test_the_packages_of_one_install_pass() -> None:
    assert check_one_install() == Path(rewards.__file__).resolve().parents[1]
