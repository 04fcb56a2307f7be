"""Reading a split: joined, typed, lazy, cached; and every way the input can be wrong, named."""

import errno
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from rewards.ontology import QUESTIONS
from rewards.types import VolumeRef
from rl.config import ConfigError
from rl.data import arrow_cache, rows
from rl.data.boxes import Convention
from rl.data.examples import load_examples
from rl.data.items import Item, read_items, reasoning_text
from rl.data.layout import DataError


def test_an_item_is_joined_to_its_row_question_truth_and_volume(dataset):
    example = load_examples(dataset.config(), "train")[7]
    assert example.example_id == "9000002_00M_20040915_10242_2_4"
    assert (example.patient_id, example.visit, example.side) == ("9000002", "00M", "left")
    assert example.question is QUESTIONS[4]
    assert example.truth.grades == dataset.grades(2, 4)
    assert example.truth.bbox == dataset.boxes(2)[4]
    assert example.reasoning == "The signal of region 4 was judged."
    assert example.volume == VolumeRef(
        "9000002_00M_20040915_10242_2",
        str(dataset.image(2)),
        str(dataset.mask(2)),
        (6, 12, 10),
        tuple(np.float32([0.7, 0.4, 0.5]).tolist()),
    )


def test_text_boxes_of_another_convention_become_the_same_file_grid_boxes(
    dataset, write_dataset, tmp_path: Path
):
    convention = Convention((2, 0, 1), (True, False, True), False)
    other = write_dataset(tmp_path / "other", convention).write()
    config = other.config()
    config.data.box_convention.flip, config.data.box_convention.end = "slice,y", "exclusive"
    theirs, ours = load_examples(config, "train"), load_examples(dataset.config(), "train")
    assert [e.truth.bbox for e in theirs] == [e.truth.bbox for e in ours]


def test_boxes_can_come_from_the_masks(dataset):
    dataset.edit_items(lambda items: [i.update(final_diagnosis=_without_box(i)) for i in items])
    dataset.edit_items(lambda items: [i.update(answer="") for i in items])
    config = dataset.config()
    assert load_examples(config, "train")[0].truth.bbox is None
    config.data.box_source = "mask"
    examples = load_examples(config, "train")
    assert [e.truth.bbox for e in examples[:3]] == list(dataset.boxes(0).values())


def test_the_box_may_stand_in_the_answer_only(dataset):
    dataset.edit_items(lambda items: [i.update(final_diagnosis=_without_box(i)) for i in items])
    assert load_examples(dataset.config(), "train")[0].truth.bbox == dataset.boxes(0)[1]


def _without_box(item: dict) -> str:
    truth = json.loads(item["final_diagnosis"])
    del truth["bbox"]
    return json.dumps(truth)


def test_a_diagnosis_may_be_an_object_rather_than_text(dataset):
    before = load_examples(dataset.config(), "train").fingerprint
    dataset.edit_items(
        lambda items: [i.update(final_diagnosis=json.loads(i["final_diagnosis"])) for i in items]
    )
    assert load_examples(dataset.config(), "train").fingerprint == before


def test_examples_are_a_sequence_with_lazy_selection(dataset):
    examples = load_examples(dataset.config(), "train")
    assert len(examples) == 12
    assert examples[-1].example_id == examples[11].example_id
    assert [e.example_id for e in examples.select([5, 0, 5])] == [examples[i].example_id for i in (5, 0, 5)]
    assert [e.question.question_id for e in examples[::3]] == [1, 1, 1, 1]
    assert len(examples.select([])) == 0
    with pytest.raises(IndexError, match="example 12 of 12"):
        examples[12]


def test_columns_are_read_without_building_examples(dataset, monkeypatch):
    examples = load_examples(dataset.config(), "train").select([4, 3])
    monkeypatch.setattr("rl.data.examples._example", None)
    assert examples.column("question_id") == [4, 1]
    assert examples.column("patient_id") == ["9000001"] * 2
    assert [json.loads(g) for g in examples.column("grades")] == [dataset.grades(1, q) for q in (4, 1)]


def test_examples_are_grouped_by_volume(dataset):
    examples = load_examples(dataset.config(), "train")
    groups = examples.by_volume()
    assert list(groups.values()) == [[0, 1, 2], [3, 4, 5], [6, 7, 8], [9, 10, 11]]
    assert [ref.image_path for ref in examples.volumes().values()] == [
        str(dataset.image(k)) for k in range(4)
    ]


def test_only_the_chosen_questions_are_read(dataset):
    config = dataset.config()
    config.data.question_ids = [60]
    assert set(load_examples(config, "train").column("question_id")) == {60}
    config.data.question_ids = [61]
    with pytest.raises(DataError, match=r"train\.json holds no item for questions \[61\]"):
        load_examples(config, "train")


def test_another_file_of_the_split_can_be_named(dataset):
    shutil.copy(dataset.items_file(), dataset.items_file("train_balanced.json"))
    dataset.edit_items(lambda items: items.extend(items[:2]), "train_balanced.json")
    assert len(load_examples(dataset.config(), "train", "train_balanced.json")) == 14


# The cache


def test_the_table_is_built_once(dataset, monkeypatch):
    first = load_examples(dataset.config(), "train")
    monkeypatch.setattr(arrow_cache, "_write_rows", None)
    second = load_examples(dataset.config(), "train")
    assert second.fingerprint == first.fingerprint
    assert second[3] == first[3]


def test_the_fingerprint_is_of_the_content_not_of_the_place(dataset, write_dataset, tmp_path: Path):
    copy = write_dataset(tmp_path / "copy/data").write()
    before = load_examples(dataset.config(), "train").fingerprint
    assert load_examples(copy.config(), "train").fingerprint == before
    copy.edit_items(
        lambda items: items[0].update(final_diagnosis=dataset.diagnosis(1, dataset.grades(3, 1), None))
    )
    assert load_examples(copy.config(), "train").fingerprint != before


def test_a_selection_has_a_fingerprint_of_its_own(dataset):
    examples = load_examples(dataset.config(), "train")
    prints = {examples.fingerprint, examples.select([0, 1]).fingerprint, examples.select([1, 0]).fingerprint}
    assert len(prints) == 3
    assert examples.select([0, 1]).fingerprint == examples[:2].fingerprint


def test_a_volume_that_vanished_after_the_table_was_built_is_missed(dataset):
    load_examples(dataset.config(), "train")
    dataset.image(0).unlink()
    with pytest.raises(DataError, match=re.escape(str(dataset.image(0)))):
        load_examples(dataset.config(), "train")


def test_a_damaged_table_is_made_again(dataset):
    config = dataset.config()
    before = load_examples(config, "train").fingerprint
    (table,) = Path(config.run_dir).glob("data-cache/*/rows.arrow")
    table.write_bytes(table.read_bytes()[:100])
    assert load_examples(config, "train").fingerprint == before


def test_a_full_disk_is_named_and_leaves_nothing_half_written(dataset, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(arrow_cache, "_write_rows", full)
    with pytest.raises(OSError, match="No space left on device; free space or set run_dir") as error:
        load_examples(dataset.config(), "train")
    assert error.value.errno == errno.ENOSPC
    assert list(Path(dataset.config().run_dir).rglob("*.*")) == []


def test_of_two_processes_that_finish_together_both_read_the_same_table(dataset, monkeypatch):
    """The second rename fails because the first one won; its table is used."""
    config = dataset.config()
    write = arrow_cache._write_rows

    def slower(path, made):
        monkeypatch.setattr(arrow_cache, "_write_rows", write)
        load_examples(config, "train")  # the other process
        return write(path, made)

    monkeypatch.setattr(arrow_cache, "_write_rows", slower)
    assert len(load_examples(config, "train")) == 12
    assert len(list(Path(config.run_dir).glob("data-cache/*"))) == 1
    assert list(Path(config.run_dir).glob("data-cache/.*")) == []


@pytest.mark.slow
def test_processes_share_the_cache_and_leave_the_home_folder_alone(dataset, tmp_path: Path):
    config = dataset.config()
    home = tmp_path / "home"
    home.mkdir()
    code = (
        "import sys, rl; from rl.config import Config; from rl.data.examples import load_examples; "
        "c = Config(run_dir=sys.argv[1]); c.data.root = sys.argv[2]; print(load_examples(c, 'train').fingerprint)"
    )
    command = [sys.executable, "-c", code, config.run_dir, config.data.root]
    environment = {**os.environ, "HOME": str(home), "XDG_CACHE_HOME": str(home / ".cache")}
    running = [
        subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) for _ in range(2)
    ]
    outputs = [process.communicate()[0] for process in running]
    assert [process.returncode for process in running] == [0, 0]
    assert outputs[0] == outputs[1]
    assert not list(home.rglob("*huggingface*"))
    assert len(list(Path(config.run_dir).glob("data-cache/*"))) == 1


def test_items_are_streamed(dataset):
    """The first item comes out although the file is broken further down."""
    file = dataset.items_file()
    file.write_text(file.read_text()[:-40])
    stream = read_items(file)
    assert isinstance(next(stream), Item)
    with pytest.raises(DataError, match=r"train\.json: damaged JSON after 11 items"):
        list(stream)


# Bad input, named


def _text_instead(key: str, value: object):
    return lambda data: data.edit_items(lambda items: items[1].update({key: value}))


def _save(path: Path, array: np.ndarray) -> None:
    nib.save(nib.Nifti1Image(array, np.eye(4)), path)


BAD_INPUT = {
    "missing volume": (lambda d: d.image(1).unlink(), "train_split.csv:3", "10241_1.nii.gz does not exist"),
    "missing item file": (lambda d: d.items_file().unlink(), "generate_data/train.json is missing"),
    "4D volume": (
        lambda d: _save(d.image(1), np.zeros((4, 4, 4, 2), np.int16)),
        "train_split.csv:3",
        "is 4D with shape (4, 4, 4, 2)",
    ),
    "not a NIfTI": (
        lambda d: d.image(1).write_bytes(b"hello"),
        "10241_1.nii.gz is not a readable NIfTI file",
    ),
    "foreign image": (
        _text_instead("image", "../data/images/x.nii.gz"),
        "train.json item 1",
        "images/x.nii.gz' is not",
    ),
    "escaping image": (
        _text_instead("image", "../data/../../x"),
        "train.json item 1",
        "does not stay inside",
    ),
    "unknown question": (_text_instead("prompt", "How are you?"), "train.json item 1", "How are you?"),
    "no prompt": (lambda d: d.edit_items(lambda i: i[1].pop("prompt")), "item 1: 'prompt' is missing"),
    "no text": (_text_instead("answer", 3), "item 1: 'answer' is a int, not text"),
    "no object": (lambda d: d.edit_items(lambda i: i.insert(1, 5)), "item 1 is a int, not an object"),
    "unparsable truth": (
        _text_instead("final_diagnosis", "severe"),
        "train.json item 1",
        "question 4",
        "severe",
    ),
    "box outside": (
        lambda d: d.edit_items(
            lambda i: i[1].update(final_diagnosis=d.diagnosis(4, d.grades(0, 4), [0, 6, 0, 1, 0, 1]))
        ),
        "train.json item 1: box [0, 6, 0, 1, 0, 1]: slice runs from 0 to 6",
        "data check",
    ),
    "two truths": (
        lambda d: d.edit_items(
            lambda i: i.append(
                {**i[0], "final_diagnosis": d.diagnosis(1, d.grades(1, 1), [1, 2, 1, 4, 2, 4])}
            )
        ),
        "train.json item 12: question 1 of 9000001_00M_20040915_10240_1 was given another truth",
    ),
    "no list": (lambda d: d.items_file().write_text("{}"), "holds no items", "list"),
}


@pytest.mark.parametrize(("damage", "fragments"), [(d, f) for d, *f in BAD_INPUT.values()], ids=BAD_INPUT)
def test_bad_input_is_refused_naming_file_place_and_value(dataset, damage, fragments):
    damage(dataset)
    with pytest.raises(DataError) as error:
        load_examples(dataset.config(), "train")
    for fragment in fragments:
        assert fragment in str(error.value)
    assert list(Path(dataset.config().run_dir).rglob("*.arrow")) == []


def test_masks_are_needed_where_the_boxes_come_from_them(dataset):
    config = dataset.config()
    config.data.box_source = "mask"
    dataset.mask(2).unlink()
    with pytest.raises(DataError, match=r"train_split\.csv:4: .*knee_002\.nii\.gz does not exist"):
        load_examples(config, "train")
    dataset.edit_csv(lambda lines: lines.__setitem__(3, lines[3].rsplit(",", 1)[0] + ","))
    with pytest.raises(DataError, match=r"train_split\.csv:4: label_filepath is empty"):
        load_examples(config, "train")


def test_an_unknown_box_source_is_refused(dataset):
    config = dataset.config()
    config.data.box_source = "model"
    with pytest.raises(ConfigError, match=r"data\.box_source is 'model'"):
        load_examples(config, "train")


@pytest.mark.parametrize(
    ("answer", "reasoning"),
    [
        ('Bright marrow. Final diagnosis: {"a": 1}', "Bright marrow."),
        ('Bright marrow.\n{"a": 1}', "Bright marrow."),
        ("<think>Bright marrow.</think><answer>{}</answer>", "Bright marrow."),
        ('{"a": 1}', ""),
        ('```json\n{"a": 1}```', ""),
        ("", ""),
    ],
)
def test_the_reasoning_is_what_stands_before_the_diagnosis(answer, reasoning):
    assert reasoning_text(answer) == reasoning


def test_the_arrow_schema_and_the_row_type_name_the_same_columns():
    assert rows.SCHEMA.names == list(rows.Row.__annotations__)
