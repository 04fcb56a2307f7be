"""What the benchmark shows and asks in each of its settings."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import astuple, replace
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rewards.boxes import Box3D
from rewards.ontology import QUESTIONS
from rewards.types import Example, Side, Truth, VolumeRef
from rl.answering import Exam, RegionEncoder
from rl.config import Config, ConfigError, VolumeViewConfig
from rl.config_check import validate
from rl.data.examples import Examples, load_examples
from rl.data.layout import DataError
from rl.model import resolve_model
from rl.showing import Showing, other_patients, prompts_source, region_view
from rl.task import Task
from rollouts.types import Prompt
from rollouts.volumes import PatchSizes, ViewGeometry, read_volume

PUBLIC_QUESTIONS = Path(__file__).parents[3] / "shared/reasonknee/questions_nobbox_zeroshot.json"
SHAPE = (160, 384, 384)


def text_of(exam: Exam, prompt: Prompt) -> str:
    return exam._builder._tokenizer.decode(prompt.token_ids)


class Knees(list[Example]):
    """Examples in memory, with what `Examples` offers besides."""

    def by_volume(self) -> dict[str, list[int]]:
        return {example.volume.volume_id: [i] for i, example in enumerate(self)}


def knee(patient: int, visit: int, side: Side) -> Example:
    volume = VolumeRef(f"{patient}_{visit}_{side}", "none.nii.gz", None, (4, 4, 4), (1.0, 1.0, 1.0))
    return Example(
        f"{volume.volume_id}_1", volume, QUESTIONS[1], Truth({}, None), str(patient), f"{visit}M", side
    )


knees = st.sets(
    st.tuples(st.integers(0, 30), st.sampled_from([0, 12, 24]), st.sampled_from(["left", "right"])),
    min_size=2,
).filter(lambda found: len({patient for patient, _, _ in found}) > 1)


@given(found=knees, seed=st.integers(0, 99))
def test_every_knee_gets_one_of_another_patient_and_every_patient_is_shown_for_one(
    found: set[tuple[int, int, Side]], seed: int
) -> None:
    examples = Knees(knee(*key) for key in sorted(found))
    shown = other_patients(examples, seed)  # type: ignore[arg-type]
    assert shown.keys() == {example.volume.volume_id for example in examples}
    pairs = {(own.split("_")[0], other.volume_id.split("_")[0]) for own, other in shown.items()}
    assert all(own != other for own, other in pairs)
    patients = {patient for patient, _ in pairs}
    assert len(pairs) == len(patients) == len({other for _, other in pairs})
    assert shown == other_patients(Knees(reversed(examples)), seed)  # type: ignore[arg-type]


def test_the_other_patients_knee_is_of_the_same_side_and_visit_where_there_is_one() -> None:
    both = [knee(p, v, side) for p in (1, 2) for v in (0, 12) for side in ("left", "right")]  # type: ignore[arg-type]
    for own, other in other_patients(Knees(both), 0).items():  # type: ignore[arg-type]
        assert own.split("_")[1:] == other.volume_id.split("_")[1:]


def test_the_seed_decides_who_is_shown_for_whom() -> None:
    many = Knees(knee(patient, 0, "left") for patient in range(12))
    assert other_patients(many, 0) != other_patients(many, 1)  # type: ignore[arg-type]


def test_a_single_patient_cannot_be_shuffled() -> None:
    with pytest.raises(ConfigError, match=r"eval\.image is 'shuffled', but the split has one patient \(7\)"):
        other_patients(Knees([knee(7, 0, "left"), knee(7, 12, "right")]), 0)  # type: ignore[arg-type]


@st.composite
def regions(draw: st.DrawFn) -> Box3D:
    limits = []
    for size in SHAPE:
        low = draw(st.integers(0, size - 1))
        limits += [low, draw(st.integers(low + 1, size))]
    return Box3D(*limits)


@given(
    region=regions(),
    stride=st.integers(1, 7),
    tokens=st.tuples(st.integers(1, 14), st.integers(1, 14)),
    crop=st.sampled_from([[], [10, 60, 100, 300, 20, 380]]),
)
def test_a_region_is_shown_whole_with_no_more_tokens_than_the_volume(
    region: Box3D, stride: int, tokens: tuple[int, int], crop: list[int]
) -> None:
    """However thin: one slice, one voxel."""
    sizes = PatchSizes()
    view = VolumeViewConfig(crop=crop, slice_stride=stride, height=28 * tokens[0], width=28 * tokens[1])
    whole = ViewGeometry.of(SHAPE, view, sizes)
    shown = ViewGeometry.of(SHAPE, region_view(view, region, SHAPE, sizes), sizes)
    assert shown.crop == region
    assert all(part <= all_ for part, all_ in zip(shown.token_grid, whole.token_grid, strict=True))
    assert crop or shown.slice_stride <= stride


def test_a_region_keeps_its_proportions_and_is_shown_as_large_as_fits() -> None:
    view = VolumeViewConfig(slice_stride=2, height=392, width=392)
    flat = region_view(view, Box3D(10, 40, 0, 200, 50, 100), SHAPE, PatchSizes())
    assert (flat.width, flat.height, flat.slice_stride) == (392, 112, 1)  # 4 : 1, to the nearest token of 28
    assert flat.crop == [10, 40, 0, 200, 50, 100]


def test_the_region_that_is_the_volume_is_shown_as_the_volume_is(config: Config) -> None:
    task = Task(config, "test")
    example = task.examples[0]
    slices, x, y = example.volume.shape
    everything = replace(example, truth=replace(example.truth, bbox=Box3D(0, slices, 0, x, 0, y)))
    features = RegionEncoder(config, resolve_model(config.model.path))(everything)
    cached = task.store[example.volume.volume_id]
    assert (features.grid_thw, features.second_per_grid_t) == (cached.grid_thw, cached.second_per_grid_t)
    torch.testing.assert_close(features.embeds_V_H, cached.embeds_V_H)


def test_a_true_region_is_encoded_for_itself_and_asked_about_in_its_own_grid(
    make_config: Callable[..., Config], tmp_path: Path
) -> None:
    """Without the cache: it holds whole volumes only."""
    exam = Exam(make_config("eval.image=true_region", f"embed.cache_dir={tmp_path / 'none'}"))
    first, second = exam.prompt(0, 4), exam.prompt(1, 4)
    assert exam.examples[0].volume == exam.examples[1].volume
    assert first.features.key != second.features.key
    for index, prompt in enumerate((first, second)):
        box = exam.examples[index].truth.bbox
        assert box is not None
        slices, columns, rows = box.extents
        assert f"cut to the region asked about: {slices} slices of {columns} x {rows} voxels" in text_of(
            exam, prompt
        )
        assert prompt.volume_ids.count(exam._builder.video_pad) == len(prompt.features.embeds_V_H) > 0


@pytest.mark.parametrize("axes", ["slice=2,x=0,y=1", "slice=0,x=1,y=2"])
def test_a_region_is_cut_along_the_axes_of_the_box_convention(
    make_config: Callable[..., Config], axes: str
) -> None:
    """The same six numbers cut other voxels when they name other axes."""
    config = make_config("view.window_low=0", "view.window_high=100")
    example = load_examples(config, "test")[0]
    config.data.box_convention.axes = axes
    region = Box3D(2, 6, 4, 24, 8, 48 if axes[6] == "2" else 12)
    encoder = RegionEncoder(config, resolve_model(config.model.path))
    frames = encoder._pictures.frames(example.volume.image_path, region)
    array = read_volume(example.volume.image_path).array
    s, x, y = (
        slice(low, high) for low, high in zip(astuple(region)[::2], astuple(region)[1::2], strict=True)
    )
    part, other = (array[x, y, s], array[s, x, y])[:: 1 if axes[6] == "2" else -1]
    assert float(part.mean()) != pytest.approx(float(other.mean()), rel=0.06)
    shown = frames.frames_T_H_W.float() / 255 * (array.max() - array.min()) + array.min()
    assert float(shown.mean()) == pytest.approx(float(part.mean()), rel=0.03)
    assert frames.geometry.crop == region


def test_items_without_a_true_box_are_refused_by_name(make_config: Callable[..., Config]) -> None:
    config = make_config("eval.image=true_region")
    examples = load_examples(config, "test")
    bare = examples.dataset.map(lambda row: {"bbox": None if row["question_id"] == 42 else row["bbox"]})
    with pytest.raises(ConfigError) as error:
        Showing(config, Examples(bare, examples.root, "bare"))
    for part in ("2 of 8 items have no true box", "_42", "questions [42]", "data.question_ids", "test_file"):
        assert part in str(error.value)


def test_no_picture_needs_no_cache_and_leaves_the_question(
    make_config: Callable[..., Config], tmp_path: Path
) -> None:
    exam = Exam(make_config("eval.image=none", f"embed.cache_dir={tmp_path / 'none'}"))
    prompt = exam.prompt(0, 4)
    assert prompt.features.absent
    assert "video_pad" not in text_of(exam, prompt)
    assert "Bone marrow lesions" in text_of(exam, prompt)


def test_a_shuffled_item_keeps_its_question_and_header_and_shows_another_patient(
    make_config: Callable[..., Config],
) -> None:
    usual, shuffled = Exam(make_config()), Exam(make_config("eval.image=shuffled"))
    store = Task(make_config(), "test").store
    for index, example in enumerate(shuffled.examples):
        own, other = usual.prompt(index, 4), shuffled.prompt(index, 4)
        assert own.token_ids == other.token_ids
        (shown,) = (name for name in store if torch.equal(store[name].embeds_V_H, other.features.embeds_V_H))
        assert shown.split("_")[0] != example.patient_id


def write_questions(path: Path, ids: tuple[int, ...] = (1, 16, 42, 60)) -> Path:
    texts = {str(i): f'Grade it: {{"{QUESTIONS[i].entity}": {{"grade": (0-3)}}}}.' for i in ids}
    path.write_text(json.dumps(texts))
    return path


def test_the_users_questions_are_asked_as_they_stand(
    make_config: Callable[..., Config], tmp_path: Path
) -> None:
    exam = Exam(make_config(f"eval.prompts={write_questions(tmp_path / 'mine.json')}"))
    asked = text_of(exam, exam.prompt(0, 4)).partition("<|vision_end|>")[2]
    assert asked.startswith('Grade it: {"patella medial BML": {"grade": (0-3)}}.<|im_end|>')


def test_a_question_file_that_lacks_a_question_or_asks_another_is_refused(
    make_config: Callable[..., Config], tmp_path: Path
) -> None:
    path = write_questions(tmp_path / "mine.json", (1, 16))
    with pytest.raises(ConfigError, match=r"has no text for questions \[42, 60\]"):
        Exam(make_config(f"eval.prompts={path}"))
    path.write_text(path.read_text().replace('"16"', '"17"'))
    with pytest.raises(DataError, match="holds the template of question 16"):
        Exam(make_config(f"eval.prompts={path}"))
    with pytest.raises(ConfigError, match=r"eval\.prompts is 'nowhere\.json', which is no file"):
        validate(make_config("eval.prompts=nowhere.json"))


def test_the_source_of_the_prompts_is_a_name_and_the_hash_of_what_it_says(
    make_config: Callable[..., Config], tmp_path: Path
) -> None:
    assert prompts_source(make_config()) == ("own", "")
    path = write_questions(tmp_path / "mine.json")
    name, before = prompts_source(make_config(f"eval.prompts={path}"))
    path.write_text(path.read_text() + "\n")
    assert name == "mine.json"
    assert prompts_source(make_config(f"eval.prompts={path}")) != (name, before)


@pytest.mark.skipif(not PUBLIC_QUESTIONS.is_file(), reason="the public question file is not here")
def test_the_public_zero_shot_file_can_be_asked(make_config: Callable[..., Config]) -> None:
    settings = [f"eval.prompts={PUBLIC_QUESTIONS}", "engine.max_model_len=2048", "data.question_ids=[]"]
    exam = Exam(make_config(*settings))
    text = json.loads(PUBLIC_QUESTIONS.read_text())["1"]
    assert f"<|vision_end|>{text}<|im_end|>" in text_of(exam, exam.prompt(0, 4))
