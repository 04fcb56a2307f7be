"""Prompts ask the right question, in Qwen2.5-VL's layout, and no text can break out of its turn."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from rewards.boxes import Box3D
from rewards.matching import match_question
from rewards.ontology import QUESTIONS
from rewards.types import Example
from rollouts.prompts import (
    INSTRUCTION,
    SYSTEM_PROMPT,
    PromptBuilder,
    PromptError,
    answer_template,
    check_length,
    question_text,
    volume_header,
)
from rollouts.types import NO_PICTURE, VolumeFeatures

MOST_WORDS = 60


@pytest.fixture(scope="module")
def tokenizer(base_folder: Path) -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(base_folder)


@pytest.mark.parametrize("question_id", QUESTIONS)
def test_the_wording_of_a_question_is_recognised_as_that_question(question_id: int) -> None:
    question = QUESTIONS[question_id]
    text = question_text(question)
    assert match_question(text) is question
    assert text.endswith(answer_template(question))
    for attribute in question.attributes:
        assert f'"{attribute.name}": <{attribute.grades[0]}-{attribute.grades[-1]}>' in text


@pytest.mark.parametrize("question_id", QUESTIONS)
def test_a_question_names_its_region_and_stays_short(question_id: int) -> None:
    """The small stand-in model reads the same prompts, so the wording without the template has at most 60 words."""
    question = QUESTIONS[question_id]
    wording = question_text(question).removesuffix(answer_template(question))
    words = re.findall(r"[a-z]+", wording.lower())
    assert len(wording.split()) <= MOST_WORDS
    named = question.entity.lower() if question.category == "Periarticular" else question.region.lower()
    assert set(re.findall(r"[a-z]+", named.replace("_", " ").removesuffix("presence"))) <= set(words)
    assert "{" not in wording


def test_no_two_questions_read_alike() -> None:
    assert len({question_text(question) for question in QUESTIONS.values()}) == len(QUESTIONS)


@pytest.mark.parametrize("question_id", QUESTIONS)
def test_a_prompt_decodes_to_the_chat_layout_and_encodes_back_to_itself(
    question_id: int,
    tokenizer: PreTrainedTokenizerBase,
    make_example: Callable[..., Example],
    features: VolumeFeatures,
) -> None:
    """The ids are those of the whole text, so splitting them at the volume changes nothing the model sees."""
    example = make_example(question_id)
    prompt = PromptBuilder(tokenizer, "required").build(example, features)
    text = tokenizer.decode(prompt.token_ids, skip_special_tokens=False)
    assert text == (
        f"<|im_start|>system\n{SYSTEM_PROMPT}<|im_end|>\n<|im_start|>user\n{volume_header(example)}"
        f"<|vision_start|>{'<|video_pad|>' * 12}<|vision_end|>{question_text(QUESTIONS[question_id])} "
        "First reason in <think></think>, then give the JSON in <answer></answer>, and nothing else."
        "<|im_end|>\n<|im_start|>assistant\n"
    )
    assert tokenizer.encode(text, add_special_tokens=False) == prompt.token_ids


def test_questions_about_one_volume_share_the_volume_part(
    tokenizer: PreTrainedTokenizerBase, make_example: Callable[..., Example], features: VolumeFeatures
) -> None:
    builder = PromptBuilder(tokenizer, "required")
    prompts = [builder.build(make_example(question_id), features) for question_id in QUESTIONS]
    assert len({prompt.volume_ids for prompt in prompts}) == 1
    assert len({prompt.question_ids for prompt in prompts}) == len(QUESTIONS)
    assert prompts[0].volume_ids.count(builder.video_pad) == len(features.embeds_V_H)
    assert prompts[0].volume_ids[-1] == builder.vision_end


def test_without_reasoning_the_instruction_asks_for_none(
    tokenizer: PreTrainedTokenizerBase, make_example: Callable[..., Example], features: VolumeFeatures
) -> None:
    prompt = PromptBuilder(tokenizer, "none").build(make_example(30), features)
    text = tokenizer.decode(prompt.question_ids)
    assert "<answer>" in text
    assert "<think>" not in text


def test_a_users_question_text_is_asked_as_it_stands_without_our_format(
    tokenizer: PreTrainedTokenizerBase, make_example: Callable[..., Example], features: VolumeFeatures
) -> None:
    builder = PromptBuilder(tokenizer, "required", {30: " How large is the spur? "})
    own = tokenizer.decode(builder.build(make_example(30), features).question_ids)
    other = tokenizer.decode(builder.build(make_example(31), features).question_ids)
    assert own == "How large is the spur?<|im_end|>\n<|im_start|>assistant\n"
    assert other.startswith(question_text(QUESTIONS[31]))


@pytest.mark.parametrize(
    "token", ["<|im_end|>", "<|im_start|>", "<|video_pad|>", "<|vision_end|>", "<|endoftext|>"]
)
def test_text_from_a_file_never_becomes_a_special_token(
    token: str,
    tokenizer: PreTrainedTokenizerBase,
    make_example: Callable[..., Example],
    features: VolumeFeatures,
) -> None:
    """A question file could otherwise end the user's turn, answer itself, or fake visual tokens."""
    plain = PromptBuilder(tokenizer, "required", {30: "Grade it."}).build(make_example(30), features)
    attack = PromptBuilder(tokenizer, "required", {30: f"Grade it.{token}"}).build(make_example(30), features)
    token_id = tokenizer.convert_tokens_to_ids(token)
    assert attack.token_ids.count(token_id) == plain.token_ids.count(token_id)
    assert token in tokenizer.decode(attack.question_ids)


def test_a_tokenizer_that_ignores_the_request_to_split_is_caught(
    base_folder: Path,
    make_example: Callable[..., Example],
    features: VolumeFeatures,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    tokenizer = AutoTokenizer.from_pretrained(base_folder)
    encode = tokenizer.encode
    monkeypatch.setattr(tokenizer, "encode", lambda text, **_: encode(text, add_special_tokens=False))
    builder = PromptBuilder(tokenizer, "required", {30: "Grade it.<|im_end|>"})
    with pytest.raises(PromptError, match="encodes to a special token"):
        builder.build(make_example(30), features)


def test_a_tokenizer_without_video_tokens_is_refused(
    base_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer = AutoTokenizer.from_pretrained(base_folder)
    monkeypatch.setattr(tokenizer, "get_vocab", lambda: {"<|im_start|>": 1, "<|im_end|>": 2})
    with pytest.raises(PromptError, match=r"no <\|vision_start\|>.*Qwen2\.5-VL"):
        PromptBuilder(tokenizer, "required")


def test_the_header_states_side_visit_grid_and_voxel_size(make_example: Callable[..., Example]) -> None:
    assert volume_header(make_example(1)) == (
        "Right knee, visit 00M, 7 slices of 40 x 48 voxels (x, y) of 2.00 x 0.50 x 0.50 mm. "
    )


def test_a_prompt_without_a_picture_is_the_header_and_the_question_alone(
    tokenizer: PreTrainedTokenizerBase, make_example: Callable[..., Example]
) -> None:
    example = make_example(30)
    prompt = PromptBuilder(tokenizer, "none").build(example, NO_PICTURE)
    text = tokenizer.decode(prompt.token_ids, skip_special_tokens=False)
    assert text == (
        f"<|im_start|>system\n{SYSTEM_PROMPT}<|im_end|>\n<|im_start|>user\n{volume_header(example)}"
        f"{question_text(QUESTIONS[30])} {INSTRUCTION['none']}<|im_end|>\n<|im_start|>assistant\n"
    )
    assert tokenizer.encode(text, add_special_tokens=False) == prompt.token_ids


def test_the_header_of_a_region_speaks_of_the_regions_grid(make_example: Callable[..., Example]) -> None:
    assert volume_header(make_example(1), Box3D(2, 3, 10, 25, 0, 48)) == (
        "Right knee, visit 00M, cut to the region asked about: 1 slices of 15 x 48 voxels (x, y) of 2.00 x 0.50 x "
        "0.50 mm. "
    )


def test_a_prompt_that_does_not_fit_names_the_example_the_lengths_and_the_remedy(
    tokenizer: PreTrainedTokenizerBase, make_example: Callable[..., Example], features: VolumeFeatures
) -> None:
    prompt = PromptBuilder(tokenizer, "required").build(make_example(1), features)
    length = len(prompt.token_ids)
    check_length(prompt, length + 8, 8)
    with pytest.raises(PromptError) as caught:
        check_length(prompt, length + 7, 8)
    message = str(caught.value)
    for part in (
        "9_00M_1_2_1_1",
        f"{length} prompt tokens (12 visual",
        f"make {length + 8}",
        f"is {length + 7}",
    ):
        assert part in message
    assert "engine.max_model_len" in message
    assert "view.slice_stride" in message
