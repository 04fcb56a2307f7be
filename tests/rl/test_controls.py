"""Control arms on tiny phantoms: what they are trained on, and for how long."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from accelerate import Accelerator

from rewards.reading import format_answer
from rewards.types import Answer, Example
from rl.config import Config
from rl.controls import as_item, best_of_g, continue_sft, grpo_seconds
from rl.data.boxes import parse_convention
from rl.data.examples import load_examples
from rl.grpo import train_grpo
from rl.sft import train_sft
from rl.task import Task
from rollouts.types import Engine, Group, Prompt, Rollout, Sampling


def records(folder: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


class Scripted:
    """An engine that gives the texts it is told to."""

    def __init__(self, texts: Callable[[Example], list[str]], examples: dict[str, Example]) -> None:
        self.texts, self.examples = texts, examples

    def generate(self, prompts: list[Prompt], n: int, sampling: Sampling, seeds: list[int]) -> list[Group]:
        return [
            Group(
                p, tuple(Rollout((), (), text, "stop", 1) for text in self.texts(self.examples[p.example_id]))
            )
            for p in prompts
        ]

    def load_adapter(self, folder: Path | None) -> int:
        return 1

    def close(self) -> None:
        pass


@pytest.mark.parametrize("flip", ["", "slice,y"])
def test_a_sampled_answer_reads_back_as_the_truth_under_the_datasets_convention(
    make_config: Callable[..., Config], tmp_path: Path, flip: str
) -> None:
    config = make_config(f"data.box_convention.flip={flip!r}")
    examples = load_examples(config, "train")
    answers = [
        Answer({name: 1 - min(grade, 1) for name, grade in e.truth.grades.items()}, e.truth.bbox, e.reasoning)
        for e in examples
    ]
    convention = parse_convention(config.data.box_convention)
    items = [as_item(e, a, examples.root, convention) for e, a in zip(examples, answers, strict=True)]
    (tmp_path / "items.json").write_text(json.dumps(items))
    again = load_examples(config, "train", str(tmp_path / "items.json"))
    assert [(e.example_id, e.truth.bbox, dict(e.truth.grades)) for e in again] == [
        (e.example_id, a.bbox, dict(a.grades)) for e, a in zip(examples, answers, strict=True)
    ]


def test_the_best_readable_answer_inside_the_volume_is_kept_and_a_question_without_one_is_left_out(
    make_config: Callable[..., Config],
) -> None:
    rewards = "rewards.components=[{name: moaks_accuracy}, {name: box_iou}]"
    config = make_config("model.reasoning=none", "grpo.max_steps=8", rewards)
    examples = {e.example_id: e for e in Task(config, "train").examples}

    def texts(example: Example) -> list[str]:
        question, truth = example.question, example.truth
        wrong = {a.name: (truth.grades[a.name] + 1) % len(a.grades) for a in question.attributes}
        outside = None if truth.bbox is None else truth.bbox.shifted(1000, 0, 0)
        right = format_answer(question, truth.grades, truth.bbox)
        readable = [format_answer(question, wrong, truth.bbox), right, right.replace("}", "")]
        return {42: ["no answer"], 60: [format_answer(question, truth.grades, outside)]}.get(
            question.question_id, readable
        )

    items = best_of_g(config, Scripted(texts, examples))
    truths = {
        (str(Path(e.volume.image_path).relative_to(config.data.root)), texts(e)[1])
        for e in examples.values()
        if e.question.question_id in (1, 16)
    }
    assert {(item["image"], item["final_diagnosis"]) for item in items} == truths


@pytest.mark.slow
def test_sft_goes_on_for_as_many_steps_as_it_makes_in_the_seconds_of_grpo(
    make_config: Callable[..., Config], engine: Engine, accelerator: Accelerator
) -> None:
    config = make_config()
    begun = train_sft(config)
    train_grpo(config, engine, accelerator)
    run_dir = Path(config.run_dir)
    metrics = run_dir / "sft" / "metrics.jsonl"
    lines = [r for r in records(run_dir / "sft") if "seconds" in r]
    lines[-1] |= {"step": 4, "seconds": grpo_seconds(config) * 4 / 30}  # then GRPO's time is worth 30 steps
    metrics.write_text("".join(json.dumps(line) + "\n" for line in lines))
    adapter = continue_sft(config, lambda record: None)
    made = records(adapter.parent)
    assert adapter.parent.name == "sft-continued"
    assert [r["step"] for r in made if "loss" in r] == list(range(1, 31))
    assert len([r for r in made if "val_loss" in r]) == 10
    weights = "adapter_model.safetensors"
    assert (adapter / weights).read_bytes() != (begun / weights).read_bytes()
