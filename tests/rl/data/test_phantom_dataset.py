"""The phantom dataset on disk: the released layout, true geometry, the same bytes every time."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from rewards.boxes import Box3D
from rewards.ontology import QUESTIONS
from rl.config import Config, ConfigError
from rl.data.check import check_dataset
from rl.data.examples import load_examples
from rl.data.layout import HEADER, SPLITS, question_ids, read_question_labels, read_split
from rl.data.phantom import dataset
from rl.data.phantom.dataset import balanced_selection, write_phantom
from rl.data.phantom.labels import region_box
from rl.data.phantom.patients import plan_patients
from rl.data.phantom.reasoning import reasoning_sentence


def phantom_config(root: Path, patients: tuple[int, int, int] = (2, 1, 1)) -> Config:
    config = Config(run_dir=str(root.parent / "run"))
    config.data.root = config.phantom.out_dir = str(root)
    config.phantom.train_patients, config.phantom.val_patients, config.phantom.test_patients = patients
    config.phantom.max_visits = 2
    return config


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Config:
    config = phantom_config(tmp_path_factory.mktemp("phantom") / "data")
    write_phantom(config)
    return config


def digests(root: Path) -> dict[str, str]:
    return {
        str(p.relative_to(root)): hashlib.sha256(p.read_bytes()).hexdigest()
        for p in root.rglob("*")
        if p.is_file()
    }


def test_the_csv_header_is_the_released_one(config: Config) -> None:
    for split in SPLITS:
        text = (Path(config.data.root) / "split_files" / f"{split}_split.csv").read_text()
        assert text.splitlines()[0] == (
            "patient_id,time,study_folder,series_folder,knee_side,path,image_filepath,label_filepath"
        )
        assert text.splitlines()[0].split(",") == list(HEADER)


def test_so_many_training_patients_can_have_a_file_with_reasoning_of_their_own(tmp_path: Path) -> None:
    config = phantom_config(tmp_path / "data")
    config.phantom.reasoned_patients, config.data.question_ids = 1, [1, 42]
    folder = write_phantom(config) / "generate_data"
    whole, few = (json.loads((folder / f"{name}.json").read_text()) for name in ("train", "train_reasoned"))
    first = read_split(folder.parent, "train")[0].patient_id
    assert few == [item for item in whole if f"/{first}/" in item["image"]]
    assert len(few) < len(whole)
    assert all(item["answer"] for item in few)


def test_no_patient_is_in_two_splits_and_visits_start_at_baseline(config: Config) -> None:
    patients = {split: {r.patient_id for r in read_split(Path(config.data.root), split)} for split in SPLITS}
    assert [len(patients[split]) for split in SPLITS] == [2, 1, 1]
    assert not patients["train"] & patients["test"]
    assert not patients["train"] & patients["val"]
    assert not patients["val"] & patients["test"]
    for split in SPLITS:
        rows = read_split(Path(config.data.root), split)
        assert {r.patient_id for r in rows if r.visit == "00M"} == patients[split]
        assert all(len(r.patient_id) == 7 for r in rows)


def test_written_volumes_carry_the_true_grid(config: Config) -> None:
    root = Path(config.data.root)
    for row in read_split(root, "train"):
        image, mask = nib.load(root / row.image), nib.load(root / str(row.mask))
        assert image.get_data_dtype() == np.int16
        assert mask.get_data_dtype() == np.uint8
        assert image.shape == mask.shape == (96, 96, 16)
        np.testing.assert_allclose(image.header.get_zooms(), (140 / 96, 140 / 96, 6.5), rtol=1e-6)
        np.testing.assert_array_equal(image.affine, mask.affine)
        assert nib.aff2axcodes(image.affine) == ("P", "I", "R")
        assert int(np.asarray(mask.dataobj).max()) <= 64


def test_the_reader_takes_every_item_and_finds_the_box_of_the_mask(config: Config) -> None:
    for split in SPLITS:
        examples = load_examples(config, split)
        assert {e.question.question_id for e in examples} == set(range(1, 63))
        rows = read_split(Path(config.data.root), split)
        assert len(examples) == 62 * len(rows)
    first = examples[0].volume
    labels = np.asarray(nib.load(str(first.mask_path)).dataobj)
    for example in examples[:62]:
        assert example.truth.bbox == region_box(labels, example.question.question_id)
        assert example.reasoning == reasoning_sentence(example.question, example.truth.grades)


def test_the_dataset_check_finds_nothing_to_complain_about(config: Config) -> None:
    report = check_dataset(config)
    assert not report.faults


def test_items_without_reasoning_differ_in_the_answer_alone(config: Config) -> None:
    folder = Path(config.data.root) / "generate_data"
    for name in ("train", "val", "test", "train_balanced", "test_balanced"):
        full, bare = (
            json.loads((folder / f"{name}{suffix}.json").read_text()) for suffix in ("", "_no_reasoning")
        )
        assert [item | {"answer": ""} for item in full] == bare
        assert all(item["answer"] for item in full)
        box = json.loads(full[0]["final_diagnosis"])["bbox"]
        assert Box3D.from_text(box).to_text() == box


def test_the_question_files_are_read_back(config: Config) -> None:
    assert question_ids(config) == tuple(range(1, 63))
    labels = read_question_labels(Path(config.data.root))
    assert set(labels) == set(range(1, 63))


def test_the_same_settings_give_the_same_bytes_and_another_seed_does_not(
    config: Config, tmp_path: Path
) -> None:
    again = phantom_config(tmp_path / "again")
    write_phantom(again)
    assert digests(Path(again.data.root)) == digests(Path(config.data.root))
    other = phantom_config(tmp_path / "other", (1, 1, 1))
    other.phantom.seed = 1
    write_phantom(other)
    assert not set(digests(tmp_path / "other").values()) & set(digests(tmp_path / "again").values()) - {
        digests(tmp_path / "again")[f"question_files/{name}.json"]
        for name in ("questions", "labels", "grade_dict", "question_subregion_mapping")
    }


@pytest.mark.slow
def test_two_processes_write_the_same_bytes_as_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[int, int]] = []
    for name, processes in (("one", 1), ("two", 2)):
        monkeypatch.setattr(dataset.os, "cpu_count", lambda processes=processes: processes)
        config = phantom_config(tmp_path / name, (10, 2, 4))
        config.phantom.shape = [64, 64, 16]
        write_phantom(config, lambda done, total: seen.append((done, total)))
    assert digests(tmp_path / "one") == digests(tmp_path / "two")
    assert seen[-1] == (16, 16)


def test_a_balanced_selection_evens_out_the_grades_without_repeats() -> None:
    keys = [(4, 0)] * 50 + [(4, 1)] * 6 + [(4, 2)] * 5 + [(4, 3)] * 7 + [(60, 0)] * 9 + [(60, 1)] * 3
    chosen = balanced_selection(keys, seed=0)
    counts = Counter(keys[i] for i in chosen)
    assert len(set(chosen)) == len(chosen)
    assert counts == {(4, 0): 6, (4, 1): 6, (4, 2): 5, (4, 3): 6, (60, 0): 6, (60, 1): 3}
    assert balanced_selection(keys, seed=0) == chosen


def test_mixed_grades_make_every_second_patient_balanced() -> None:
    plans = plan_patients({"train": 4, "val": 1, "test": 2}, 3, "mixed", 0)
    assert [p.mode for p in plans["train"]] == ["natural", "balanced", "natural", "balanced"]
    assert {p.mode for p in plan_patients({"train": 4}, 3, "natural", 0)["train"]} == {"natural"}


def test_more_patients_in_one_split_change_nobody_in_another() -> None:
    """Nor those the split had before: more test patients can be added to a trained model."""
    few = plan_patients({"train": 5, "val": 2, "test": 3}, 3, "mixed", 0)
    many = plan_patients({"train": 5, "val": 2, "test": 9}, 3, "mixed", 0)
    assert (many["train"], many["val"], many["test"][:3]) == (few["train"], few["val"], few["test"])
    more = plan_patients({"train": 8, "val": 2, "test": 3}, 3, "mixed", 0)
    scans = [[(s.patient_id, s.visit, s.study) for k in p.knees for s in k] for p in more["test"]]
    assert scans == [[(s.patient_id, s.visit, s.study) for k in p.knees for s in k] for p in few["test"]]
    assert [p.seed for p in more["test"]] == [p.seed for p in few["test"]]  # lesions and noise


def test_every_split_has_both_sides_and_several_visits() -> None:
    plans = plan_patients({"train": 96, "val": 16, "test": 40}, 3, "mixed", 0)
    for patients in plans.values():
        scans = [s for p in patients for knee in p.knees for s in knee]
        assert {s.side for s in scans} == {"right", "left"}
        assert {len(knee) for p in patients for knee in p.knees} == {1, 2, 3}
    every = [s for patients in plans.values() for p in patients for knee in p.knees for s in knee]
    assert sorted(s.mask_number for s in every) == list(range(len(every)))
    assert len({s.image_path for s in every}) == len(every)


def test_a_dataset_that_is_no_phantom_is_never_overwritten(tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()  # a part of a download
    with pytest.raises(ConfigError, match="holds images that are no phantoms"):
        write_phantom(phantom_config(tmp_path))


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("grades", "even", "phantom.grades is 'even'"),
        ("max_visits", 0, "phantom.max_visits is 0"),
        ("shape", [96, 96], "phantom.shape"),
        ("shape", [12, 12, 2], "vanish on a grid"),
    ],
)
def test_settings_that_cannot_be_used_are_named(
    tmp_path: Path, field: str, value: object, message: str
) -> None:
    config = phantom_config(tmp_path / "data")
    setattr(config.phantom, field, value)
    with pytest.raises(ConfigError, match=message):
        write_phantom(config)


def test_every_question_and_grade_has_a_reasoning_sentence_without_tags() -> None:
    for question in QUESTIONS.values():
        for grade in range(9):
            grades = {a.name: min(grade, a.grades[-1]) for a in question.attributes}
            sentence = reasoning_sentence(question, grades)
            assert sentence.endswith(".")
            assert "<" not in sentence
            assert "{" not in sentence
