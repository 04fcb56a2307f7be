"""Prompts and trees of real (tiny) data."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from rl.choices import reader_of, reasoning_of
from rl.config import Config, ConfigError
from rl.packed import pack
from rl.task import Task
from rollouts.cache import CacheError
from rollouts.positions import mrope_positions
from rollouts.prompts import PromptError


@pytest.fixture
def task(config: Config) -> Task:
    return Task(config, "train")


def volume_of(task: Task, count: int, skip: int = 0) -> list[int]:
    """Positions of the first examples about one volume."""
    return list(task.examples.by_volume().values())[skip][:count]


def test_questions_about_a_volume_share_one_root(task: Task) -> None:
    indices = [*volume_of(task, 3), *volume_of(task, 2, skip=1)]
    prompts = [task.prompt(i, 4) for i in indices]
    roots = task.tree(prompts, [[[50, 60], [70]]] * len(prompts))
    assert [len(root.children) for root in roots] == [3, 2]
    assert prompts[0].features is prompts[1].features  # read once
    for root, first in zip(roots, (prompts[0], prompts[3]), strict=True):
        assert root.token_ids == first.volume_ids
        assert torch.equal(root.features_V_H, first.features.embeds_V_H)  # type: ignore[arg-type]
    questions = [tuple(child.token_ids) for root in roots for child in root.children]
    assert questions == [prompt.question_ids for prompt in prompts]


def test_positions_of_a_packed_completion_are_those_of_the_whole_sequence(task: Task) -> None:
    prompt = task.prompt(volume_of(task, 1)[0], 4)
    batch = pack(task.tree([prompt], [[[50, 60, 70]]]), task.builder.video_pad)
    vision = json.loads((task.model_path / "config.json").read_text())["vision_config"]
    expected = mrope_positions(
        [*prompt.token_ids, 50, 60, 70],
        prompt.features.grid_thw,
        prompt.features.second_per_grid_t,
        video_token_id=task.builder.video_pad,
        merge_size=vision["spatial_merge_size"],
        tokens_per_second=vision["tokens_per_second"],
    )
    assert torch.equal(batch.positions_3_L, expected)
    flat = pack(task.tree([prompt], [[[50, 60, 70]]], flat_positions=True), task.builder.video_pad)
    assert torch.equal(flat.positions_3_L, torch.arange(len(expected[0])).expand(3, -1))


@pytest.mark.parametrize("reasoning", ["required", "none"])
def test_the_target_is_the_canonical_answer_and_the_end_of_turn(
    make_config: Callable[..., Config], reasoning: str
) -> None:
    task = Task(make_config(f"model.reasoning={reasoning}"), "train")
    ids = task.target_ids(0)
    text = task.tokenizer.decode(ids[:-1])
    assert ids[-1] == task.builder.im_end
    assert task.builder.im_end not in ids[:-1]
    assert text.startswith("<think>") == (reasoning == "required")
    assert json.loads(text.split("<answer>")[1].removesuffix("</answer>"))["MOAKS_scores"]


def test_a_prompt_that_leaves_no_room_for_the_completion_is_refused(task: Task) -> None:
    length = len(task.prompt(0, 1).token_ids)
    task.prompt(0, 512 - length)
    with pytest.raises(PromptError, match="max_model_len is 512"):
        task.prompt(0, 513 - length)


def test_a_volume_that_was_not_embedded_is_named(make_config: Callable[..., Config], tmp_path: Path) -> None:
    with pytest.raises(CacheError, match="reasonknee embed"):
        Task(make_config(f"embed.cache_dir={tmp_path / 'empty'}"), "train")
    with pytest.raises(CacheError, match="reasonknee embed"):
        Task(make_config("view.height=48"), "train")  # embedded in another view


def test_unknown_formats_and_readers_are_refused(config: Config) -> None:
    assert (reasoning_of(config), reader_of(config)) == ("required", "strict")
    config.model.reasoning = config.rewards.reader = "loose"
    with pytest.raises(ConfigError, match="loose"):
        reasoning_of(config)
    with pytest.raises(ConfigError, match="loose"):
        reader_of(config)


def test_the_sampler_draws_examples_of_the_task(task: Task) -> None:
    drawn = task.sampler(seed=0, balance=True).draw(0, 2, 3)
    for questions in drawn:
        assert len({task.volume_ids[i] for i in questions}) == 1
