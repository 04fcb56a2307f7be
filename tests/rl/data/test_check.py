"""`data check`: each fault planted in a sound dataset is found, named by file and row, and ends in exit code 1."""

import gzip
import json
import warnings
from io import StringIO

import nibabel as nib
import numpy as np
import pytest
from rich.console import Console

from rl.config import ConfigError
from rl.data import check_items
from rl.data.boxes import Convention
from rl.data.check import check_dataset, require_best_convention, run_check
from rl.data.layout import DataError, Fault
from rl.data.ranking import configured_values
from rl.data.report import print_report

AFFINE = np.diag([0.4, 0.5, 0.7, 1.0])


def _save(path, array, affine=AFFINE) -> None:
    nib.save(nib.Nifti1Image(array, affine), path)


def _stored(path) -> bytes:
    """The file as an uncompressed gzip stream, in which a byte is a voxel."""
    return gzip.compress(gzip.decompress(path.read_bytes()), compresslevel=0)


def _truncate(path) -> None:
    path.write_bytes(_stored(path)[:-12])


def _flip_bit(path) -> None:
    """One voxel differs: only the checksum tells."""
    content = bytearray(_stored(path))
    content[-20] ^= 1
    path.write_bytes(content)


def _mask_of(data, knee: int) -> np.ndarray:
    return np.asarray(nib.load(data.mask(knee)).dataobj)


def _with_nan(data) -> None:
    voxels = np.zeros((12, 10, 6), np.float32)
    voxels[1, 2, 3] = np.nan
    _save(data.image(1), voxels)


def _move_patient(data) -> None:
    """A visit of the validation patient is put into the training split."""
    lines = data.csv_file("val").read_text().splitlines()
    moved = lines[1].replace("00M", "24M")
    data.image(4).parent.parent.joinpath("24M").mkdir()
    data.image(4).parent.parent.joinpath("24M", data.image(4).name).write_bytes(data.image(4).read_bytes())
    data.edit_csv(lambda train: train.append(moved))


def _with_an_affine_of_nan(data) -> None:
    content = bytearray(gzip.decompress(data.image(1).read_bytes()))
    content[280:284] = np.float32(np.nan).tobytes()  # the first number of srow_x
    data.image(1).write_bytes(gzip.compress(content))


def _with_a_header_of_terabytes(data) -> None:
    header = nib.Nifti1Header()
    header.set_data_shape((30_000, 30_000, 30_000))
    header.set_data_dtype(np.float32)
    data.image(1).write_bytes(gzip.compress(header.binaryblock + bytes(4)))


def _first_item(**change):
    return lambda data: data.edit_items(lambda items: items[0].update(change), "val.json")


def _set_json(name: str, change):
    def plant(data) -> None:
        path = data.root / "question_files" / name
        content = json.loads(path.read_text())
        change(content)
        path.write_text(json.dumps(content))

    return plant


# What is planted, the kind it is reported as, and what the message must name.
FAULTS = {
    "wrong header": (
        lambda d: d.edit_csv(
            lambda lines: lines.__setitem__(0, lines[0].replace("knee_side", "side")), "val"
        ),
        Fault.HEADER,
        ("val_split.csv", "missing columns: knee_side", "extra columns: 'side'", "The first line must be"),
    ),
    "missing CSV": (
        lambda d: d.csv_file("test").unlink(),
        Fault.MISSING_FILE,
        ("test_split.csv", "data.root"),
    ),
    "bad side": (
        lambda d: d.edit_csv(lambda lines: lines.append("9,00M,1,2,x,p,../data/i.nii.gz,../data/m.nii.gz")),
        Fault.ROW,
        ("train_split.csv:6", "knee_side is 'x'", "1 (right) or 2 (left)"),
    ),
    "escaping path": (
        lambda d: d.edit_csv(lambda lines: lines.append("9,00M,1,2,1,p,../data/../../i.nii.gz,")),
        Fault.PATH,
        ("train_split.csv:6 (image_filepath)", "'../data/../../i.nii.gz'", "relative to data.root"),
    ),
    "missing volume": (
        lambda d: d.image(2).unlink(),
        Fault.MISSING_VOLUME,
        ("train_split.csv:4", "20040915_10242_2.nii.gz does not exist", "place the file there"),
    ),
    "missing mask": (
        lambda d: d.mask(2).unlink(),
        Fault.MISSING_MASK,
        ("train_split.csv:4", "knee_002.nii.gz does not exist"),
    ),
    "unnamed mask": (
        lambda d: d.edit_csv(lambda lines: lines.__setitem__(1, lines[1].rsplit(",", 1)[0] + ",")),
        Fault.MISSING_MASK,
        ("train_split.csv:2", "label_filepath is empty"),
    ),
    "truncated volume": (
        lambda d: _truncate(d.image(0)),
        Fault.UNREADABLE_VOLUME,
        ("train_split.csv:2", "20040915_10240_1.nii.gz is truncated or damaged", "again"),
    ),
    "damaged volume": (
        lambda d: d.image(0).write_bytes(gzip.compress(b"not a volume")),
        Fault.UNREADABLE_VOLUME,
        ("train_split.csv:2", "20040915_10240_1.nii.gz is not a readable NIfTI"),
    ),
    "truncated mask": (
        lambda d: _truncate(d.mask(0)),
        Fault.UNREADABLE_MASK,
        ("train_split.csv:2", "knee_000.nii.gz is truncated or damaged"),
    ),
    "one flipped bit": (
        lambda d: _flip_bit(d.image(0)),
        Fault.UNREADABLE_VOLUME,
        ("train_split.csv:2", "20040915_10240_1.nii.gz is truncated or damaged", "CRC"),
    ),
    "NaN volume": (
        _with_nan,
        Fault.UNREADABLE_VOLUME,
        ("train_split.csv:3", "10241_1.nii.gz", "1 voxels that are NaN"),
    ),
    "4D volume": (
        lambda d: _save(d.image(1), np.zeros((12, 10, 6, 2), np.int16)),
        Fault.UNREADABLE_VOLUME,
        ("train_split.csv:3", "is 4D with shape (12, 10, 6, 2)", "one 3D volume per file"),
    ),
    "blank volume": (
        lambda d: _save(d.image(1), np.full((12, 10, 6), 7, np.int16)),
        Fault.UNREADABLE_VOLUME,
        ("train_split.csv:3", "10241_1.nii.gz is blank, every voxel is 7"),
    ),
    "complex volume": (
        lambda d: _save(d.image(1), np.zeros((12, 10, 6), np.complex64)),
        Fault.UNREADABLE_VOLUME,
        ("train_split.csv:3", "10241_1.nii.gz holds complex64 values"),
    ),
    "colour volume": (
        lambda d: _save(d.image(1), np.zeros((12, 10, 6), [("R", "u1"), ("G", "u1"), ("B", "u1")])),
        Fault.UNREADABLE_VOLUME,
        ("train_split.csv:3", "10241_1.nii.gz holds ", "plain integers or real numbers"),
    ),
    "volume larger than memory": (
        _with_a_header_of_terabytes,
        Fault.UNREADABLE_VOLUME,
        ("train_split.csv:3", "10241_1.nii.gz is truncated or damaged"),
    ),
    "NaN in an affine": (
        _with_an_affine_of_nan,
        Fault.UNREADABLE_VOLUME,
        ("train_split.csv:3", "10241_1.nii.gz has NaN or infinite numbers in its affine"),
    ),
    "CSV in another encoding": (
        lambda d: d.csv_file("val").write_bytes(
            d.csv_file("val").read_bytes() + "M\u00fcller".encode("latin-1")
        ),
        Fault.ROW,
        ("val_split.csv: cannot be read after line", "UTF-8"),
    ),
    "mask of another shape": (
        lambda d: _save(d.mask(3), np.zeros((12, 10, 5), np.uint8)),
        Fault.MASK_MISMATCH,
        ("train_split.csv:5", "knee_003.nii.gz has shape (12, 10, 5)", "(12, 10, 6)"),
    ),
    "mask elsewhere": (
        lambda d: _save(d.mask(3), _mask_of(d, 3), AFFINE + _shift(5.0)),
        Fault.MASK_MISMATCH,
        ("train_split.csv:5", "knee_003.nii.gz has another affine", "[5.0, 0.0, 0.0]"),
    ),
    "mask of another type": (
        lambda d: _save(d.mask(3), _mask_of(d, 3).astype(np.int16)),
        Fault.MASK_MISMATCH,
        ("train_split.csv:5", "knee_003.nii.gz is stored as int16", "uint8"),
    ),
    "patient in two splits": (
        _move_patient,
        Fault.SHARED_PATIENT,
        ("patient 9000004 is in train and val", "train_split.csv:6", "val_split.csv:2", "one split"),
    ),
    "unparsable truth": (
        _first_item(final_diagnosis='{"patella medial BML": {"Size of BML (including cyst)": 9}}'),
        Fault.TRUTH,
        ("val.json item 0", "question 1 (patella medial BML)", "outside_grade_space"),
    ),
    "inverted box": (
        lambda d: _first_item(final_diagnosis=d.diagnosis(1, d.grades(4, 1), [2, 1, 0, 1, 0, 1]))(d),
        Fault.TRUTH,
        ("val.json item 0", "box_inverted", "[2, 1, 0, 1, 0, 1]"),
    ),
    "box outside the volume": (
        lambda d: _first_item(final_diagnosis=d.diagnosis(1, d.grades(4, 1), [1, 2, 1, 12, 2, 4]))(d),
        Fault.TRUTH,
        ("val.json item 0", "x runs from 1 to 12", "the 12 voxels"),
    ),
    "foreign image": (
        _first_item(image="../data/images/9000001/00M/20040915_10240_1.nii.gz"),
        Fault.UNKNOWN_IMAGE,
        ("val.json item 0", "is not in the val split", "val_split.csv"),
    ),
    "unknown question": (
        _first_item(prompt="What is it?"),
        Fault.QUESTION,
        ("val.json item 0", "What is it?"),
    ),
    "damaged item file": (
        lambda d: d.items_file("val.json").write_text(d.items_file("val.json").read_text()[:-9]),
        Fault.ITEM,
        ("val.json", "damaged JSON after 2 items"),
    ),
    "missing item file": (
        lambda d: d.items_file("val.json").unlink(),
        Fault.MISSING_FILE,
        ("val.json is missing",),
    ),
    "another file's item": (
        lambda d: d.items_file("test_balanced.json").write_text(d.items_file("val.json").read_text()),
        Fault.UNKNOWN_IMAGE,
        ("test_balanced.json item 0", "is not in the test split"),
    ),
    "swapped questions": (
        lambda d: _set_json("questions.json", lambda q: q.update({"1": q["4"]}))(d),
        Fault.QUESTION,
        ("questions.json: key '1' holds the template of question 4", "'patella medial BML'"),
    ),
    "unknown region": (
        _set_json("question_subregion_mapping.json", lambda m: m.update({"1": "knee cap"})),
        Fault.MAPPING,
        ("question_subregion_mapping.json: question 1 maps to 'knee cap'", "labels.json"),
    ),
}


def _shift(mm: float) -> np.ndarray:
    offset = np.zeros((4, 4))
    offset[0, 3] = mm
    return offset


def test_a_sound_dataset_passes_with_its_counts(dataset, capsys):
    assert run_check(dataset.config()) == 0
    report = check_dataset(dataset.config())
    train = report.splits["train"]
    assert (train.rows, train.patients, train.visits, train.volumes) == (4, 3, 4, 4)
    items = report.files["train.json"]
    assert (items.items, items.sound, items.with_box, items.with_reasoning) == (12, 12, 12, 12)
    assert items.questions == set(dataset.labels)
    assert report.ranking[0].mean_iou == 1.0
    printed = capsys.readouterr().out
    assert "Read 6 of 6 volumes whole" in printed
    assert "No errors." in printed


@pytest.mark.parametrize(("plant", "fault", "fragments"), FAULTS.values(), ids=FAULTS)
def test_each_planted_fault_is_named_and_ends_in_exit_code_1(dataset, capsys, plant, fault, fragments):
    plant(dataset)
    messages = check_dataset(dataset.config()).of(fault)
    assert any(all(fragment in message for fragment in fragments) for message in messages), messages
    assert run_check(dataset.config()) == 1
    assert fault.value in capsys.readouterr().out


def test_all_faults_are_found_in_one_run(dataset):
    dataset.image(2).unlink()
    dataset.mask(0).unlink()
    _first_item(prompt="What is it?")(dataset)
    _move_patient(dataset)
    found = {error.fault for error in check_dataset(dataset.config()).faults}
    assert found == {Fault.MISSING_VOLUME, Fault.MISSING_MASK, Fault.QUESTION, Fault.SHARED_PATIENT}


def test_a_sample_of_the_volumes_is_read_whole_and_said_so(dataset):
    _truncate(dataset.image(3))
    config = dataset.config()
    report = check_dataset(config, max_volumes=2)  # the first and the last row
    assert (report.volumes_opened, report.volumes) == (2, 6)
    assert report.ok
    output = StringIO()
    print_report(report, Console(file=output, width=120))
    assert "Read 2 of 6 volumes whole" in output.getvalue()
    assert "No errors in what was read" in output.getvalue()
    assert not check_dataset(config).ok


def test_a_mask_of_another_grid_is_found_outside_the_sample_too(dataset):
    _save(dataset.mask(3), np.zeros((12, 10, 5), np.uint8))
    report = check_dataset(dataset.config(), max_volumes=1)
    assert [error.fault for error in report.faults] == [Fault.MASK_MISMATCH]


def test_a_blank_line_of_a_csv_is_no_row(dataset):
    dataset.edit_csv(lambda lines: lines.insert(2, ""))
    assert check_dataset(dataset.config()).ok


def test_a_missing_volume_is_found_outside_the_sample_too(dataset):
    dataset.image(2).unlink()
    dataset.mask(3).unlink()
    report = check_dataset(dataset.config(), max_volumes=1)
    assert [error.fault for error in report.faults] == [Fault.MISSING_VOLUME, Fault.MISSING_MASK]


def test_many_faults_of_a_kind_are_cut_short_with_their_number(dataset):
    dataset.edit_items(lambda items: items.extend({**items[0], "prompt": "?"} for _ in range(50)))
    report = check_dataset(dataset.config())
    output = StringIO()
    print_report(report, Console(file=output, width=120))
    assert len(report.of(Fault.QUESTION)) == 50
    assert "… and 30 more" in output.getvalue()


def test_a_root_that_does_not_exist_is_a_config_error(dataset):
    config = dataset.config()
    config.data.root = "/nowhere"
    with pytest.raises(ConfigError, match="/nowhere"):
        check_dataset(config)


# The box convention

WRITTEN_BY = [
    Convention((2, 1, 0), (False, False, False), True),
    Convention((0, 1, 2), (False, False, False), True),
    Convention((2, 0, 1), (True, False, False), True),
    Convention((2, 0, 1), (False, True, True), True),
    Convention((2, 0, 1), (False, False, False), False),
    Convention((1, 2, 0), (True, True, False), False),
]


@pytest.mark.parametrize("written_by", WRITTEN_BY, ids=Convention.describe)
def test_a_wrong_convention_is_refused_and_the_right_one_accepted(write_dataset, tmp_path, written_by):
    data = write_dataset(tmp_path / "data", written_by).write()
    config = data.config()
    report = check_dataset(config)
    (message,) = report.of(Fault.CONVENTION)
    axes, flip, end = configured_values(written_by)
    assert f'.axes="{axes}" data.box_convention.flip="{flip}" data.box_convention.end={end}' in message
    assert report.of(Fault.TRUTH) == []  # boxes outside the grid are the convention's fault, not the items'
    with pytest.raises(DataError, match="training refused"):
        require_best_convention(config)
    config.data.box_convention.axes, config.data.box_convention.flip = axes, flip
    config.data.box_convention.end = end
    assert check_dataset(config).ok
    require_best_convention(config)


def test_the_ranking_is_printed_with_the_configured_convention_marked(write_dataset, tmp_path, capsys):
    data = write_dataset(tmp_path / "data", WRITTEN_BY[-1]).write()
    run_check(data.config())
    lines = capsys.readouterr().out.splitlines()
    assert any("1.0000" in line and "configured" not in line for line in lines)
    assert any("configured" in line and "1.0000" not in line for line in lines)


def test_boxes_from_the_masks_need_no_text_convention(write_dataset, tmp_path):
    data = write_dataset(tmp_path / "data", WRITTEN_BY[0]).write()
    config = data.config()
    config.data.box_source = "mask"
    assert check_dataset(config).ok
    require_best_convention(config)


def test_without_masks_the_check_fails_and_training_warns(dataset):
    for knee in range(6):
        dataset.mask(knee).unlink()
    assert "unverified" in check_dataset(dataset.config()).of(Fault.CONVENTION)[0]
    with pytest.warns(UserWarning, match=r"data\.box_convention is unverified"):
        require_best_convention(dataset.config())


def test_without_the_regions_of_questions_the_check_fails_and_training_warns(dataset):
    (dataset.root / "question_files" / "question_subregion_mapping.json").unlink()
    assert check_dataset(dataset.config()).of(Fault.MISSING_FILE)
    with pytest.warns(UserWarning, match=r"question_subregion_mapping\.json is missing"):
        require_best_convention(dataset.config())


def test_training_looks_at_a_few_volumes_only(dataset, monkeypatch):
    monkeypatch.setattr("rl.data.check.PROBE_VOLUMES", 2)
    dataset.mask(2).write_bytes(b"never opened")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        require_best_convention(dataset.config())


def test_masks_that_belong_to_other_knees_explain_no_box(dataset):
    for knee in range(6):
        _save(
            dataset.mask(knee),
            _far_corner(),
        )
    (message,) = check_dataset(dataset.config()).of(Fault.CONVENTION)
    assert "no convention explains the boxes" in message


def _far_corner() -> np.ndarray:
    mask = np.zeros((12, 10, 6), np.uint8)
    mask[11, 9, 5], mask[11, 0, 5], mask[11, 9, 0] = 3, 5, 9
    return mask


def test_checker_and_reader_share_their_item_functions():
    """What is checked is what is read: neither may grow a parser of its own."""
    from rl.data import items, rows

    for name in ("find_row", "find_question", "find_truth", "text_box"):
        assert getattr(check_items, name) is getattr(rows, name) is getattr(items, name)
