"""An adapter is served or trained only when every tensor of it lands, and none it needs is missing."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import Qwen2_5_VLForConditionalGeneration

from rollouts.adapters import AdapterError, check_adapter, linear_shapes, linear_shapes_of


@pytest.fixture
def adapter(make_adapter: Callable[[int], Path], tmp_path: Path) -> Path:
    """A copy that a test may spoil."""
    return Path(shutil.copytree(make_adapter(1), tmp_path / "adapter"))


def rewrite(folder: Path, change: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]) -> None:
    path = folder / "adapter_model.safetensors"
    save_file(change(load_file(path)), path)


def reconfigure(folder: Path, **fields: object) -> None:
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))


def test_an_adapter_of_this_base_passes(adapter: Path, base_folder: Path) -> None:
    info = check_adapter(adapter, linear_shapes_of(str(base_folder)), max_rank=8)
    assert (info.rank, info.alpha, len(info.modules)) == (8, 16.0, 4 * 7)
    assert "model.language_model.layers.0.self_attn.q_proj" in info.modules


def test_shapes_from_the_configuration_are_those_of_the_model(base_folder: Path) -> None:
    model = Qwen2_5_VLForConditionalGeneration.from_pretrained(base_folder)
    assert linear_shapes(model) == linear_shapes_of(str(base_folder))
    assert not any("visual" in name or "lm_head" in name for name in linear_shapes(model))


def test_foreign_key_names_are_refused_by_name(adapter: Path, base_folder: Path) -> None:
    """vLLM would serve such an adapter without an error, and answer as the base model."""
    rewrite(adapter, lambda tensors: {n.replace("language_model.", ""): t for n, t in tensors.items()})
    with pytest.raises(
        AdapterError, match=r"do not belong to this base: base_model\.model\.model\.layers"
    ) as error:
        check_adapter(adapter, linear_shapes_of(str(base_folder)))
    assert "named like base_model.model.model.language_model.layers.0" in str(error.value)


def test_a_tensor_of_the_vision_tower_is_refused(adapter: Path, base_folder: Path) -> None:
    visual = "base_model.model.model.visual.blocks.0.mlp.up_proj.lora_A.weight"
    rewrite(adapter, lambda tensors: {**tensors, visual: torch.ones(8, 128)})
    with pytest.raises(AdapterError, match="visual"):
        check_adapter(adapter, linear_shapes_of(str(base_folder)))


def test_a_missing_tensor_is_refused_by_name(adapter: Path, base_folder: Path) -> None:
    gone = "base_model.model.model.language_model.layers.2.mlp.down_proj.lora_B.weight"
    rewrite(adapter, lambda tensors: {n: t for n, t in tensors.items() if n != gone})
    with pytest.raises(AdapterError, match=r"1 tensors are missing .*layers\.2\.mlp\.down_proj\.lora_B"):
        check_adapter(adapter, linear_shapes_of(str(base_folder)))


def test_an_adapter_of_a_wider_base_is_refused(adapter: Path, base_folder: Path) -> None:
    rewrite(
        adapter, lambda tensors: {n: torch.cat([t, t]) if ".lora_B." in n else t for n, t in tensors.items()}
    )
    with pytest.raises(AdapterError, match="wrong shape"):
        check_adapter(adapter, linear_shapes_of(str(base_folder)))


def test_a_diverged_adapter_is_refused(adapter: Path, base_folder: Path) -> None:
    rewrite(adapter, lambda tensors: {n: t * float("nan") for n, t in tensors.items()})
    with pytest.raises(AdapterError, match="not finite"):
        check_adapter(adapter, linear_shapes_of(str(base_folder)))


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"use_dora": True}, "use_dora"),
        ({"bias": "all"}, "bias"),
        ({"alpha_pattern": {"q_proj": 4}}, "alpha_pattern"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
        ({"peft_type": "IA3"}, "peft_type"),
        ({"r": "x"}, "r is 'x'"),
        ({"r": 0}, "r is missing"),
    ],
)
def test_what_vllm_would_ignore_is_refused(
    adapter: Path, base_folder: Path, fields: dict[str, object], named: str
) -> None:
    reconfigure(adapter, **fields)
    with pytest.raises(AdapterError, match=named):
        check_adapter(adapter, linear_shapes_of(str(base_folder)))


def test_a_rank_that_the_engine_has_no_room_for_is_refused(adapter: Path, base_folder: Path) -> None:
    with pytest.raises(AdapterError, match="rank 8, but the engine was started for at most 4"):
        check_adapter(adapter, linear_shapes_of(str(base_folder)), max_rank=4)


def test_damaged_and_absent_files_are_named(adapter: Path, base_folder: Path) -> None:
    linears = linear_shapes_of(str(base_folder))
    weights = adapter / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:100])
    with pytest.raises(AdapterError, match="not a readable safetensors file"):
        check_adapter(adapter, linears)
    weights.rename(adapter / "adapter_model.bin")
    with pytest.raises(AdapterError, match="is a pickle and is not read"):
        check_adapter(adapter, linears)
    (adapter / "adapter_config.json").write_text("{")
    with pytest.raises(AdapterError, match="not JSON"):
        check_adapter(adapter, linears)
    (adapter / "adapter_config.json").unlink()
    with pytest.raises(AdapterError, match="does not exist"):
        check_adapter(adapter, linears)
