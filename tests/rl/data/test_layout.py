"""Split CSVs, paths and question files of the released layout."""

import json
import re
from pathlib import Path

import pytest

from rewards.ontology import QUESTIONS
from rl.config import ConfigError
from rl.data.layout import (
    HEADER,
    DataError,
    data_root,
    question_ids,
    read_question_file,
    read_question_labels,
    read_split,
    relative_path,
    scan_split,
)

PUBLIC_QUESTIONS = Path(__file__).parents[4] / "shared/reasonknee/questions_nobbox_zeroshot.json"


def test_a_row_is_read_as_written(dataset):
    row = read_split(dataset.root, "train")[2]
    assert row.volume_id == "9000002_00M_20040915_10242_2"
    assert (row.side, row.visit, row.line) == ("left", "00M", 4)
    assert row.image == "images/9000002/00M/20040915_10242_2.nii.gz"
    assert row.mask == "masks/knee_002.nii.gz"


@pytest.mark.parametrize(
    ("written", "expected"),
    [
        ("../data/images/a.nii.gz", "images/a.nii.gz"),
        ("../../data/images/a.nii.gz", "images/a.nii.gz"),
        ("./images/a.nii.gz", "images/a.nii.gz"),
        ("data/images//a.nii.gz", "images/a.nii.gz"),
        ("images/b/../a.nii.gz", "images/a.nii.gz"),
    ],
)
def test_released_paths_resolve_against_the_root(written, expected):
    assert relative_path(written, "file:1") == expected


@pytest.mark.parametrize(
    "written", ["/etc/passwd", "../data/../../x", "images/../../x", "..", ".", "", "../data/"]
)
def test_a_path_that_leaves_the_root_is_refused(written):
    with pytest.raises(
        DataError, match=re.escape(f"train.csv:7: path {written!r} does not stay inside data.root")
    ):
        relative_path(written, "train.csv:7")


@pytest.mark.parametrize(
    ("header", "problem"),
    [
        (HEADER[:-1], "missing columns: label_filepath"),
        ((*HEADER, "extra"), "extra columns: 'extra'"),
        ((*HEADER[:4], "side", *HEADER[5:]), "missing columns: knee_side; extra columns: 'side'"),
        ((HEADER[1], HEADER[0], *HEADER[2:]), "columns in another order: time,patient_id"),
        ((), "missing columns: patient_id, time"),
    ],
)
def test_a_wrong_header_is_refused_by_name(dataset, header, problem):
    dataset.edit_csv(lambda lines: lines.__setitem__(0, ",".join(header)))
    with pytest.raises(DataError) as error:
        read_split(dataset.root, "train")
    assert str(dataset.csv_file()) in str(error.value)
    assert problem in str(error.value)
    assert "The first line must be patient_id,time,study_folder" in str(error.value)


def test_a_missing_split_file_is_named(dataset):
    dataset.csv_file("val").unlink()
    with pytest.raises(DataError, match=r"val_split\.csv is missing; is data\.root"):
        read_split(dataset.root, "val")


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        ("9,00M,1,2,3,p,../data/images/z.nii.gz,../data/masks/z.nii.gz", "knee_side is '3'"),
        (",00M,1,2,1,p,../data/images/z.nii.gz,../data/masks/z.nii.gz", "patient_id is empty"),
        ("9,00M,1,2,1,p,../data/images/z.nii.gz", "7 values for 8 columns"),
        ("9,00M,1,2,1,p,/images/z.nii.gz,", "does not stay inside data.root"),
        (
            "9,00M,1,2,1,p,../data/images/9000003/00M/20040915_10243_1.nii.gz,x",
            "images/9000003/00M/20040915_10243_1.nii.gz is already on line 5",
        ),
    ],
)
def test_a_bad_row_is_named_by_file_and_line_and_the_others_are_kept(dataset, line, problem):
    dataset.edit_csv(lambda lines: lines.append(line))
    rows, errors = scan_split(dataset.root, "train")
    assert len(rows) == 4
    assert f"{dataset.csv_file()}:6" in str(errors[0])
    assert problem in str(errors[0])


def test_the_root_must_exist(dataset):
    config = dataset.config()
    config.data.root = str(dataset.root / "nowhere")
    with pytest.raises(ConfigError, match=r"data\.root is .*nowhere, which is not a folder"):
        data_root(config)


@pytest.mark.skipif(not PUBLIC_QUESTIONS.is_file(), reason="the public question file is not on this machine")
def test_all_69_public_questions_are_matched_to_the_ontology():
    """`read_question_file` refuses a key whose template is another question's, so reading is the proof."""
    assert sorted(read_question_file(PUBLIC_QUESTIONS)) == list(range(1, 70))


def test_a_key_that_holds_another_questions_template_is_refused_naming_both(dataset, tmp_path: Path):
    file = tmp_path / "questions.json"
    file.write_text(json.dumps({"1": dataset.template(1), "4": dataset.template(60)}))
    with pytest.raises(DataError) as error:
        read_question_file(file)
    for fragment in (str(file), "key '4'", "question 60 ('ACL')", QUESTIONS[4].entity):
        assert fragment in str(error.value)


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        ("[]", "expected a JSON object"),
        ("{", "not valid JSON"),
        ('{"70": "x"}', "key '70' is not a question id from 1 to 69"),
        ('{"1": 3}', "question 1 is a int, not text"),
        ('{"1": "how is it?"}', "question 1 is not recognised"),
    ],
)
def test_a_damaged_question_file_is_named(tmp_path: Path, content, problem):
    file = tmp_path / "questions.json"
    file.write_text(content)
    with pytest.raises(DataError, match=re.escape(problem)) as error:
        read_question_file(file)
    assert str(file) in str(error.value)


def test_a_question_file_without_questions_is_refused(tmp_path: Path):
    path = tmp_path / "questions.json"
    path.write_text("{}")
    with pytest.raises(DataError, match=r"questions\.json: no question in it"):
        read_question_file(path)


def test_the_questions_come_from_the_config_then_the_users_file_then_the_benchmark(dataset):
    config = dataset.config()
    assert question_ids(config) == tuple(dataset.labels)
    config.data.question_ids = [4, 1, 4]
    assert question_ids(config) == (1, 4)
    config.data.question_ids = [70]
    with pytest.raises(ConfigError, match=r"data\.question_ids names \[70\]"):
        question_ids(config)
    config.data.question_ids = []
    (dataset.root / "question_files/questions.json").unlink()
    assert question_ids(config) == tuple(range(1, 63))


@pytest.mark.parametrize(
    ("mapping", "names", "expected"),
    [
        ({"1": 3}, None, {1: (3,)}),
        ({"1": [5, 3, 3], "2": []}, None, {1: (3, 5)}),
        ({"1": "patella", "2": ["patella", 7], "3": None}, {"patella": 3}, {1: (3,), 2: (3, 7)}),
        ({"1": "patella"}, {"3": "patella"}, {1: (3,)}),
        ({"1": "3"}, None, {1: (3,)}),
    ],
)
def test_question_labels_may_be_numbers_or_names(dataset, mapping, names, expected):
    folder = dataset.root / "question_files"
    (folder / "question_subregion_mapping.json").write_text(json.dumps(mapping))
    if names is not None:
        (folder / "labels.json").write_text(json.dumps(names))
    assert read_question_labels(dataset.root) == expected


@pytest.mark.parametrize("value", ["nobody", 0, True, {"a": 1}, [[1]]])
def test_an_unknown_region_is_named_with_the_forms_expected(dataset, value):
    file = dataset.root / "question_files/question_subregion_mapping.json"
    file.write_text(json.dumps({"4": value}))
    with pytest.raises(DataError) as error:
        read_question_labels(dataset.root)
    assert f"{file}: question 4 maps to {value!r}" in str(error.value)
    assert "label number from 1" in str(error.value)
