"""Everything a user can get wrong, and what can break: each ends in words that name it, and nothing is lost."""

from __future__ import annotations

import gzip
import json
import resource
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import nibabel as nib
import numpy as np
import polars as pl
import pytest
from safetensors.torch import load_file, save_file
from typer.testing import Result

from rl.completions import write_completions
from rl.data.layout import HEADER
from rl.errors import WriteError, in_words

Cli = Callable[..., Result]
Refusal = Callable[..., str]


@pytest.fixture
def data(workshop: Path, tmp_path: Path) -> Path:
    """A copy of the phantoms, to be damaged."""
    return Path(shutil.copytree(workshop / "data", tmp_path / "data"))


@pytest.fixture
def words(workshop: Path, tmp_path: Path) -> list[str | Path]:
    """Arguments of a stage on sound data, with a run folder of its own."""
    return [
        "--config",
        workshop / "recipe.yaml",
        f"run_dir={tmp_path / 'run'}",
        "eval.max_completion_length=10",
    ]


@pytest.fixture
def damaged(words: list[str | Path], data: Path) -> list[str | Path]:
    """The same on the copy."""
    return [*words, f"data.root={data}"]


def first_row(data: Path, split: str = "train") -> dict[str, str]:
    line = (data / "split_files" / f"{split}_split.csv").read_text().splitlines()[1]
    return dict(zip(HEADER, line.split(","), strict=True))


def image_of(data: Path) -> Path:
    return data / first_row(data)["image_filepath"].removeprefix("../data/")


def mask_of(data: Path) -> Path:
    return data / first_row(data)["label_filepath"].removeprefix("../data/")


def rewrite(path: Path, change: Callable[[np.ndarray], np.ndarray]) -> None:
    old = nib.load(path)
    nib.save(nib.Nifti1Image(change(np.asarray(old.dataobj)), old.affine), path)


def remove_volume(data: Path) -> str:
    image_of(data).unlink()
    return f"train_split.csv:2: {image_of(data)} does not exist"


def rename_column(data: Path) -> str:
    path = data / "split_files" / "train_split.csv"
    path.write_text(path.read_text().replace("knee_side", "side"))
    return f"{path}: wrong header (missing columns: knee_side; extra columns: 'side')"


def plant_nan(data: Path) -> str:
    def change(voxels: np.ndarray) -> np.ndarray:
        changed = voxels.astype(np.float32)
        changed[3, 4, 5] = np.nan
        return changed

    rewrite(image_of(data), change)
    return f"{image_of(data)}"


def add_an_axis(data: Path) -> str:
    rewrite(image_of(data), lambda voxels: np.stack([voxels, voxels], axis=-1))
    return f"{image_of(data)}"


def cut_off(data: Path) -> str:
    path = image_of(data)
    path.write_bytes(path.read_bytes()[:-200])
    return f"{path}"


def crop_mask(data: Path) -> str:
    rewrite(mask_of(data), lambda voxels: voxels[:-4])
    return f"{mask_of(data)}"


FAULTS = {
    "a missing volume": (remove_volume, "does not exist"),
    "a wrong CSV header": (rename_column, "wrong header"),
    "a voxel that is no number": (plant_nan, "NaN or infinite"),
    "a 4D volume": (add_an_axis, "(48, 48, 12, 2)"),
    "a volume that was cut off": (cut_off, "Compressed file ended"),
}


@pytest.mark.parametrize("fault", [*FAULTS, "a mask on another grid"])
def test_the_dataset_check_names_file_and_fault(
    fault: str, data: Path, damaged: list[str | Path], cli: Cli
) -> None:
    plant, said = FAULTS.get(fault, (crop_mask, "(44, 48, 12)"))
    where = plant(data)
    result = cli("data", "check", *damaged)
    assert result.exit_code == 1
    assert isinstance(result.exception, SystemExit)
    printed = " ".join(result.output.split())
    assert where in printed
    assert said in printed


@pytest.mark.parametrize("fault", FAULTS)
def test_embed_names_file_and_fault(
    fault: str, data: Path, damaged: list[str | Path], tmp_path: Path, refusal: Refusal
) -> None:
    plant, said = FAULTS[fault]
    where = plant(data)
    message = refusal("embed", *damaged, f"embed.cache_dir={tmp_path / 'cache'}")
    assert where in message
    assert said in message


def test_one_bad_volume_does_not_cost_the_features_of_the_others(
    data: Path, damaged: list[str | Path], tmp_path: Path, refusal: Refusal
) -> None:
    plant_nan(data)
    assert "1 of 7 volumes" in refusal("embed", *damaged, f"embed.cache_dir={tmp_path / 'cache'}")
    assert len(list((tmp_path / "cache").rglob("*.safetensors"))) == 6


def test_a_mask_on_another_grid_stops_training_on_boxes_from_masks(
    data: Path, damaged: list[str | Path], refusal: Refusal
) -> None:
    where = crop_mask(data)
    message = refusal("sft", *damaged, "data.box_source=mask")
    assert where in message
    assert "(44, 48, 12)" in message


def test_an_unknown_setting_names_the_nearest_one(words: list[str | Path], refusal: Refusal) -> None:
    message = refusal("grpo", *words, "grpo.learnig_rate=1")
    assert "unknown config key 'grpo.learnig_rate'; did you mean 'grpo.learning_rate'?" in message


def test_a_dataset_that_is_not_named_or_not_there_is_a_clear_error(
    workshop: Path, tmp_path: Path, words: list[str | Path], refusal: Refusal
) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(f"model: {{path: {workshop / 'base'}}}\nview: {{height: 32, width: 32}}\n")
    assert "data.root is not set" in refusal("sft", "--config", recipe)
    nowhere = tmp_path / "nowhere"
    assert f"data.root is {nowhere}, which is not a folder" in refusal("sft", *words, f"data.root={nowhere}")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda name, x: {name.replace("base_model", "other"): x}, "do not belong to this base"),
        (lambda name, x: {name: x[:, : len(x[0]) // 2].contiguous()}, "have the wrong shape"),
        (lambda name, x: {name: x * float("nan")}, "is not finite"),
        (lambda name, x: {} if "layers.0.mlp" in name else {name: x}, "are missing"),
    ],
)
def test_an_adapter_that_does_not_fit_the_base_is_refused_by_its_tensors(
    change: Callable, said: str, workshop: Path, tmp_path: Path, words: list[str | Path], refusal: Refusal
) -> None:
    """A foreign or incomplete adapter would load without an error and leave the base model to answer."""
    adapter = Path(shutil.copytree(workshop / "sft", tmp_path / "foreign"))
    weights = adapter / "adapter_model.safetensors"
    tensors = {new: y for name, x in load_file(weights).items() for new, y in change(name, x).items()}
    save_file(tensors, weights)
    message = refusal("grpo", *words, f"grpo.init_adapter={adapter}")
    assert str(adapter) in message
    assert said in message


def test_a_prompt_longer_than_the_context_names_the_lengths_and_the_setting(
    words: list[str | Path], refusal: Refusal
) -> None:
    message = refusal("grpo", *words, "engine.max_model_len=100")
    assert "engine.max_model_len is 100: it must be at least" in message
    assert "24 visual tokens" in message


@pytest.mark.slow
def test_features_that_were_damaged_on_disk_are_named_and_made_again(
    workshop: Path, tmp_path: Path, words: list[str | Path], cli: Cli, refusal: Refusal
) -> None:
    cache = Path(shutil.copytree(workshop / "cache", tmp_path / "cache"))
    for entry in cache.rglob("*.safetensors"):
        content = bytearray(entry.read_bytes())
        content[-4:] = b"\xff\xff\xff\xff"  # a NaN
        entry.write_bytes(content)
    given = [*words, f"embed.cache_dir={cache}"]
    assert "run `reasonknee embed` again" in refusal("sft", *given)
    assert cli("embed", *given).exit_code == 0
    assert cli("sft", *given).exit_code == 0


@contextmanager
def files_no_larger_than(size: int) -> Iterator[None]:
    """What a full disk does to a write, done by the kernel."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.slow
def test_a_disk_that_fills_up_while_an_adapter_is_written_costs_nothing_that_was_finished(
    workshop: Path, tmp_path: Path, words: list[str | Path], cli: Cli, refusal: Refusal
) -> None:
    given = [*words, f"grpo.init_adapter={workshop / 'sft'}"]
    assert cli("grpo", *given).exit_code == 0
    adapter = tmp_path / "run" / "grpo" / "adapter" / "adapter_model.safetensors"
    before = adapter.read_bytes()
    with files_no_larger_than(adapter.stat().st_size - 1):
        message = refusal("grpo", *given, "grpo.max_steps=4")
    assert f"cannot write {adapter.parent}" in message
    assert "free space" in message
    assert adapter.read_bytes() == before
    assert cli("grpo", *given, "grpo.max_steps=4").exit_code == 0
    lines = (tmp_path / "run" / "grpo" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [1, 2, 3, 4]


def test_a_table_that_the_disk_cannot_hold_leaves_the_former_one_and_nothing_half_written(
    tmp_path: Path,
) -> None:
    path = tmp_path / "completions" / "step-000001.parquet"
    former, larger = (
        pl.DataFrame({"reward": [1.0]}),
        pl.DataFrame({"reward": np.random.default_rng(0).random(99_999)}),
    )
    write_completions(path, former)
    with files_no_larger_than(20_000), pytest.raises(WriteError, match=f"cannot write {path}") as caught:
        write_completions(path, larger)
    assert "free space" in (in_words(caught.value) or "")
    assert pl.read_parquet(path).equals(former)
    assert list(path.parent.iterdir()) == [path]


@pytest.mark.parametrize("name", ["state.json", "optimizer.safetensors"])
def test_a_damaged_checkpoint_is_named_with_what_to_do(
    workshop: Path, tmp_path: Path, words: list[str | Path], cli: Cli, refusal: Refusal, name: str
) -> None:
    given = [*words, f"grpo.init_adapter={workshop / 'sft'}"]
    assert cli("grpo", *given).exit_code == 0
    (checkpoint,) = (tmp_path / "run" / "grpo" / "checkpoints").iterdir()
    (checkpoint / name).write_bytes(b"")
    message = refusal("grpo", *given, "grpo.max_steps=3")
    assert f"checkpoint {checkpoint} cannot be used" in message
    assert "delete it" in message


def test_an_embed_that_finds_no_dataset_says_so(
    tmp_path: Path, words: list[str | Path], refusal: Refusal
) -> None:
    (tmp_path / "empty").mkdir()
    assert "train_split.csv is missing" in refusal("embed", *words, f"data.root={tmp_path / 'empty'}")


def test_a_disk_that_fills_up_while_features_are_written_keeps_those_that_were(
    tmp_path: Path, words: list[str | Path], cli: Cli, refusal: Refusal
) -> None:
    given = [*words, f"embed.cache_dir={tmp_path / 'cache'}"]
    with files_no_larger_than(20_000):
        message = refusal("embed", *given)
    assert "free space" in message
    assert not list(tmp_path.rglob("*.tmp"))
    assert cli("embed", *given).exit_code == 0


def test_a_dataset_check_survives_a_file_that_is_no_gzip(
    data: Path, damaged: list[str | Path], cli: Cli
) -> None:
    image_of(data).write_bytes(gzip.compress(b"not a volume"))
    result = cli("data", "check", *damaged)
    assert result.exit_code == 1
    assert str(image_of(data)) in " ".join(result.output.split())
