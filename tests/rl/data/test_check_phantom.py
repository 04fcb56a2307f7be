"""`data check` on a phantom dataset: sound as written, and refused under every wrong convention."""

import json
import shutil
from pathlib import Path

import pytest

from rl.config import Config
from rl.data import check
from rl.data.boxes import Convention, box_from_text, box_to_text, extent_box, parse_convention
from rl.data.check import check_dataset, require_best_convention
from rl.data.examples import load_examples
from rl.data.layout import DataError, Fault
from rl.data.phantom.dataset import write_phantom
from rl.data.ranking import ALL_CONVENTIONS, configured_values
from rl.data.records import completion_text

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Config:
    folder = tmp_path_factory.mktemp("phantom")
    config = Config(run_dir=str(folder / "run"))
    config.data.root = config.phantom.out_dir = str(folder / "data")
    config.phantom.train_patients, config.phantom.val_patients, config.phantom.test_patients = 6, 2, 3
    config.data.question_ids = [1, 9, 16, 30, 42, 48, 54, 60]
    write_phantom(config)
    return config


def _with_convention(config: Config, convention: Convention) -> Config:
    copy = Config(run_dir=config.run_dir)
    copy.data.root = config.data.root
    values = copy.data.box_convention
    values.axes, values.flip, values.end = configured_values(convention)
    return copy


def test_a_phantom_is_sound_and_its_convention_certain(config: Config):
    report = check_dataset(config)
    assert report.faults == []
    assert report.volumes_opened == report.volumes
    assert report.ranking[0].convention == report.convention
    assert report.ranking[0].mean_iou == 1.0
    assert not report.ranking[1].same_as_best
    require_best_convention(config)


def test_every_wrong_setting_is_refused_for_training(config: Config, monkeypatch: pytest.MonkeyPatch):
    pairs = check._probe(config)  # what the data say does not depend on the setting: read it once
    monkeypatch.setattr(check, "_probe", lambda _: pairs)
    right = parse_convention(config.data.box_convention)
    for wrong in ALL_CONVENTIONS:
        if wrong != right:
            with pytest.raises(DataError, match="training refused"):
                require_best_convention(_with_convention(config, wrong))


WRITTEN_BY = (
    Convention((2, 1, 0), (False, False, False), True),
    Convention((0, 1, 2), (True, False, True), True),
    Convention((2, 0, 1), (False, False, False), False),
)


@pytest.mark.parametrize("written_by", WRITTEN_BY, ids=Convention.describe)
def test_boxes_written_in_another_convention_are_found_out(
    config: Config, tmp_path: Path, written_by: Convention
):
    copy = tmp_path / "data"
    shutil.copytree(config.data.root, copy)
    right = parse_convention(config.data.box_convention)
    for file in (copy / "generate_data").glob("*.json"):
        items = json.loads(file.read_text())
        for item in items:
            truth = json.loads(item["final_diagnosis"])
            truth["bbox"] = _rewrite(truth["bbox"], config.phantom.shape, right, written_by)
            item["final_diagnosis"] = json.dumps(truth)
        file.write_text(json.dumps(items))
    theirs = Config(run_dir=config.run_dir)
    theirs.data.root = str(copy)
    assert len(check_dataset(theirs).of(Fault.CONVENTION)) == 1
    theirs = _with_convention(theirs, written_by)
    theirs.data.root = str(copy)
    assert check_dataset(theirs).ok


def _rewrite(numbers: list[int], shape: list[int], right: Convention, other: Convention) -> list[int]:
    box = box_from_text(numbers, right.grid(shape), right)
    along = dict(zip(right.axes, ("slice", "x", "y"), strict=True))
    a, b, c = (slice(getattr(box, f"{along[i]}_min"), getattr(box, f"{along[i]}_max")) for i in range(3))
    return box_to_text(extent_box((a, b, c), other), other.grid(shape), other)


@pytest.mark.parametrize(
    ("split", "file"),
    [("train", None), ("train", "train_balanced.json"), ("val", None), ("test", "test_balanced.json")],
)
def test_every_item_file_of_a_phantom_becomes_training_completions(config: Config, split, file):
    examples = load_examples(config, split, file)
    for example in examples[:: max(1, len(examples) // 100)]:
        assert example.reasoning
        assert completion_text(example, "required").startswith("<think>")


def test_text_boxes_and_mask_boxes_of_a_phantom_are_the_same(config: Config):
    by_text = load_examples(config, "test").column("bbox")
    from_masks = _with_convention(config, parse_convention(config.data.box_convention))
    from_masks.data.box_source = "mask"
    assert load_examples(from_masks, "test").column("bbox") == by_text
