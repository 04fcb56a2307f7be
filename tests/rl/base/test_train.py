"""Tests of the command that makes the stand-in base model, on a few steps."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import Qwen2_5_VLForConditionalGeneration

import rl
from rl.base.train import train_base
from rl.config import Config, ConfigError, load_config

pytestmark = pytest.mark.slow


def _config(folder: Path, **changes: int) -> Config:
    small = {"knees": 8, "vision_steps": 1, "lookup_steps": 1, "answer_steps": 2, "seed": 3} | changes
    given = [f"base.{name}={value}" for name, value in small.items()]
    return load_config(None, ["data.root=none", f"base.out_dir={folder}", *given])


def _weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train_base(_config(tmp_path_factory.mktemp("whole") / "base"))


def test_a_base_needs_no_dataset_and_loads_like_a_downloaded_checkpoint(whole: Path) -> None:
    model = Qwen2_5_VLForConditionalGeneration.from_pretrained(whole)
    assert model.dtype == torch.bfloat16
    assert sum(p.numel() for p in model.parameters()) <= 4_000_000
    assert all(w.isfinite().all() for w in _weights(whole).values())


def test_the_base_that_is_shipped_is_small_and_in_bfloat16() -> None:
    path = Path(rl.__file__).parent / "assets" / "base" / "model.safetensors"
    weights = load_file(path)
    assert sum(w.numel() for w in weights.values()) <= 4_000_000
    assert {w.dtype for w in weights.values()} == {torch.bfloat16}
    assert path.stat().st_size <= 10_000_000


def test_an_interrupted_base_goes_on_to_the_weights_of_an_uninterrupted_one(
    whole: Path, tmp_path: Path
) -> None:
    class Killed(Exception):
        pass

    def kill_in_the_last_phase(done: int, total: int, note: str) -> None:
        if done == total:
            raise Killed

    config = _config(tmp_path / "base")
    with pytest.raises(Killed):
        train_base(config, kill_in_the_last_phase)
    shown: list[int] = []
    train_base(config, lambda done, total, note: shown.append(done))
    # phantoms are drawn again, vision and lookup are not trained again
    assert shown == [*range(1, 9), 11, 12]
    again = _weights(tmp_path / "base")
    assert all(torch.equal(w, again[name]) for name, w in _weights(whole).items())


def test_phases_made_from_other_settings_are_not_used(tmp_path: Path) -> None:
    shown: list[int] = []
    config = _config(tmp_path / "base", vision_steps=2)
    train_base(config)
    train_base(_config(tmp_path / "base"), lambda done, total, note: shown.append(done))
    assert shown == list(range(1, 13))


def test_a_base_of_too_few_questions_is_refused(tmp_path: Path) -> None:
    config = load_config(
        None, ["data.root=none", f"base.out_dir={tmp_path}", "data.question_ids=[1,2,3,4,5,6]"]
    )
    with pytest.raises(ConfigError, match=r"6 questions.*at least 7"):
        train_base(config)
