"""Result files of the public baseline as benchmark runs, on phantoms written in the released layout."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from typer.testing import Result

from rewards.types import Example
from rl.bench.answers import BenchRun, read_run
from rl.bench.compare import CompareError, check_same_items
from rl.bench.endpoints import OVERALL
from rl.bench.metrics import Tables, grade_run, tables
from rl.config import Config, ConfigError, load_config
from rl.data.examples import load_examples
from rl.data.phantom.dataset import write_phantom
from rl.data.results import ResultsError
from rl.evaluate import evaluate_baselines
from rl.imported import ERROR, MISSING, NO_ITEM, OTHER_KNEE, OTHER_QUESTION, REPEATED
from rl.pipeline import run_import

RECIPE = """
data: {{root: {folder}/data, question_ids: [1, 16, 42, 60]}}
phantom:
  {{seed: 12, train_patients: 2, val_patients: 1, test_patients: 3, max_visits: 1,
   shape: [48, 48, 12], grades: balanced}}
compare: {{bootstrap_draws: 50}}
"""


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A recipe whose phantoms are written, one knee a patient: 3 test knees with 4 questions each, 12 items."""
    folder = tmp_path_factory.mktemp("imported")
    path = folder / "recipe.yaml"
    path.write_text(RECIPE.format(folder=folder))
    write_phantom(load_config(path))
    return path


@pytest.fixture
def config(recipe: Path, tmp_path: Path) -> Config:
    return load_config(recipe, [f"run_dir={tmp_path / 'run'}", "rewards.reader=tolerant"])


@pytest.fixture
def examples(config: Config) -> list[Example]:
    return list(load_examples(config, "test"))


def public_answer(example: Example) -> dict[str, Any]:
    """The right answer in the shape of the public template, without a box, which it does not ask for."""
    answer: dict[str, Any] = {}
    for attribute in example.question.attributes:
        node = answer
        for key in attribute.path[:-1]:
            node = node.setdefault(key, {})
        node[attribute.path[-1]] = example.truth.grades[attribute.name]
    return answer


def zero_shot(examples: Sequence[Example], model: str = "o1") -> dict[str, dict[str, Any]]:
    """What the zero-shot script stores for a model that is always right."""
    kinds = ("total", "completion", "prompt", "reasoning")
    return {
        e.example_id: {
            "question": "Grade this knee.",
            f"{model}_result": public_answer(e),
            **{f"{model}_{kind}_tokens": 9 + i for kind in kinds},
        }
        for i, e in enumerate(examples)
    }


def sft_entries(config: Config) -> list[dict[str, str]]:
    """What the SFT inference script stores for a model that repeats the released answers."""
    items = json.loads((Path(config.data.root) / "generate_data" / "test.json").read_text())
    return [
        {
            "image": item["image"],
            "prompt": item["prompt"],
            "generated_text": f"{item['answer']} Final diagnosis: {item['final_diagnosis']}<|im_end|>",
            "final_diagnosis": item["final_diagnosis"],
        }
        for item in items
    ]


def write(path: Path, content: Any) -> Path:
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(content, indent=2))
    return path


def score(run: BenchRun) -> Tables:
    return tables(grade_run(run))


def test_a_perfect_zero_shot_file_scores_1(config: Config, examples: list[Example], tmp_path: Path) -> None:
    imported = run_import(config, "o1-zero-shot", [write(tmp_path / "o1.json", zero_shot(examples))])
    result = score(imported.run)
    assert result.values["accuracy"][OVERALL].value == 1
    assert result.values["all_correct"][OVERALL].value == 1
    assert result.counts["unread_boxes"] == 12  # the question asked for none
    assert "o1-zero-shot: 12 of 12 items of test.json answered, tolerant reader" in imported.summary()
    assert not any(imported.notes.values())


def test_perfect_sft_shards_score_1_in_grades_and_boxes(config: Config, tmp_path: Path) -> None:
    entries = sft_entries(config)
    for index in range(4):
        write(tmp_path / "sft" / f"OUT_{index}.json", entries[3 * index : 3 * index + 3])
    imported = run_import(config, "SFT-3B", [tmp_path / "sft"])
    result = score(imported.run)
    assert result.values["all_correct"][OVERALL].value == 1
    assert result.values["iou"][OVERALL].value == 1
    assert read_run(imported.folder).meta == imported.run.meta


@pytest.mark.parametrize(
    ("failure", "reason"),
    [({"error": "2"}, ERROR), ({"response": "I cannot tell."}, "imported"), (None, MISSING)],
)
@pytest.mark.parametrize("k", [1, 5])
def test_a_file_with_k_failures_scores_the_share_of_the_others(
    k: int,
    failure: dict[str, str] | None,
    reason: str,
    config: Config,
    examples: list[Example],
    tmp_path: Path,
) -> None:
    """An error's message is never read as an answer, not even one that is a grade."""
    content = zero_shot(examples)
    for example in examples[:k]:
        if failure is None:
            del content[example.example_id]
        else:
            content[example.example_id]["o1_result"] = failure
    run = run_import(config, "o1", [write(tmp_path / "o1.json", content)]).run
    result = score(run)
    assert result.values["all_correct"][OVERALL].value == pytest.approx((12 - k) / 12)
    assert run.answers["finish_reason"].to_list() == [reason] * k + ["imported"] * (12 - k)
    assert (result.counts["missing"], result.counts["errors"]) == (
        k * (reason == MISSING),
        k * (reason == ERROR),
    )


def test_every_entry_that_is_no_answer_is_counted_and_named(
    config: Config, examples: list[Example], tmp_path: Path
) -> None:
    entries = sft_entries(config)
    knee = examples[0].volume.volume_id
    content = zero_shot(examples[:10])
    content[f"{knee}_69"] = content["9999999_00M_1_2_1_42"] = content[examples[3].example_id]
    content[examples[1].example_id]["o1_result"] = {"error": "CUDA out of memory"}
    imported = run_import(config, "o1", [write(tmp_path / "o1.json", content)])
    lost = [example.example_id for example in examples[10:]]
    assert imported.notes == {
        MISSING: lost,
        ERROR: [f"{examples[1].example_id} (CUDA out of memory)"],
        REPEATED: [],
        OTHER_QUESTION: [f"{knee}_69"],
        OTHER_KNEE: ["9999999_00M_1_2_1_42"],
        NO_ITEM: [],
    }
    assert f"2 missing: {lost[0]}, {lost[1]}" in imported.summary()
    assert json.loads((imported.folder / "import.json").read_text()) == imported.notes
    assert "those of 2 unanswered and 1 failed items among them" in score(imported.run).failures

    foreign = {**entries[0], "image": "../data/images/x.nii.gz"}
    strange = {**entries[0], "prompt": "How is this knee?"}
    again = {**entries[0], "generated_text": "no idea"}
    imported = run_import(config, "sft", [write(tmp_path / "sft.json", [*entries, foreign, strange, again])])
    assert [len(imported.notes[heading]) for heading in (REPEATED, OTHER_QUESTION, OTHER_KNEE)] == [1, 1, 1]
    assert imported.notes[REPEATED][0].startswith("sft.json entry 14 (../data/images/")
    assert imported.run.answers["completion"][0] == "no idea"


def test_an_answer_stored_for_the_next_question_is_wrong(
    config: Config, examples: list[Example], tmp_path: Path
) -> None:
    """The public o1 script stores the former answer and token counts again when a call fails."""
    content = zero_shot(examples)
    content[examples[1].example_id] = content[examples[0].example_id]
    imported = run_import(config, "o1", [write(tmp_path / "o1.json", content)])
    assert imported.notes[ERROR] == [
        f"{examples[1].example_id} (answer and token counts of the entry before: a failed call)"
    ]
    result = score(imported.run)
    assert result.values["all_correct"][OVERALL].value == pytest.approx(11 / 12)


def test_an_item_file_that_asks_less_leaves_entries_unused_and_named(
    config: Config, examples: list[Example], tmp_path: Path
) -> None:
    config.eval.max_examples = 7
    imported = run_import(config, "o1", [write(tmp_path / "o1.json", zero_shot(examples))])
    assert imported.run.meta.n == 7
    assert imported.notes[NO_ITEM] == [example.example_id for example in examples[7:8]]
    assert imported.notes[OTHER_KNEE] == [example.example_id for example in examples[8:]]


def test_results_of_other_data_are_refused(config: Config, examples: list[Example], tmp_path: Path) -> None:
    (entry, *_) = zero_shot(examples).values()
    file = write(tmp_path / "o1.json", {"9999999_00M_1_2_1_42": entry})
    with pytest.raises(ResultsError, match=r"o1\.json: none of 1 entries answers an item, e\.g\. 9999999"):
        run_import(config, "o1", [file])


@pytest.mark.parametrize("name", ["GRPO", "baseline", "", " ", "..", "a/b", "a,b"])
def test_a_name_that_is_taken_or_no_folder_is_refused(name: str, config: Config, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"choose another|is no name of a folder"):
        run_import(config, name, [tmp_path / "o1.json"])


def test_a_former_import_of_the_same_name_is_kept(
    config: Config, examples: list[Example], tmp_path: Path
) -> None:
    first = run_import(config, "o1", [write(tmp_path / "o1.json", zero_shot(examples[:5]))]).run
    run_import(config, "o1", [write(tmp_path / "o1.json", zero_shot(examples))])
    kept = read_run(Path(config.run_dir) / "old" / "imported-1" / "o1")
    assert kept.answers.equals(first.answers)


def test_an_imported_run_is_on_the_same_items_as_ours(
    config: Config, examples: list[Example], tmp_path: Path
) -> None:
    theirs = run_import(config, "o1", [write(tmp_path / "o1.json", zero_shot(examples[:5]))]).run
    check_same_items(evaluate_baselines(config, tmp_path / "ours")["baseline"], theirs)
    config.rewards.reader = "strict"
    with pytest.raises(CompareError, match=r"or add rewards\.reader=tolerant"):
        check_same_items(evaluate_baselines(config, tmp_path / "strict")["baseline"], theirs)


@pytest.mark.slow
def test_the_command_scores_and_compare_takes_the_run_by_its_name(
    recipe: Path,
    examples: list[Example],
    tmp_path: Path,
    cli: Callable[..., Result],
    refusal: Callable[..., str],
) -> None:
    """Read by the tolerant reader unless the command says otherwise; runs recorded as strict can be read so too."""
    words = ["--config", recipe, f"run_dir={tmp_path / 'run'}"]
    file = write(tmp_path / "o1.json", zero_shot(examples[:10]))
    result = cli("import", "o1", "--results", file, *words)
    assert result.exit_code == 0, (result.output, result.exception)
    assert "tolerant reader" in result.output
    assert "Paper: o1, zero-shot" in result.output
    assert f"2 missing: {examples[10].example_id}" in result.output
    strict = cli("import", "o1-strict", "--results", file, *words, "rewards.reader=strict")
    assert "strict reader" in strict.output

    ours = load_config(recipe, [f"run_dir={tmp_path / 'run'}"])
    assert "run `reasonknee eval` first" in refusal("compare", "baseline", "o1", *words)
    evaluate_baselines(ours, tmp_path / "run" / "eval")
    assert "add rewards.reader=tolerant" in refusal("compare", "baseline", "o1", *words)
    compared = cli("compare", "baseline", "o1", *words, "rewards.reader=tolerant")
    assert compared.exit_code == 0, (compared.output, compared.exception)
    assert "o1 against baseline, 12 items of 3 patients" in compared.output
    assert "o1: decoding not recorded" in compared.output
    assert "| o1 | " in (tmp_path / "run" / "tables.md").read_text()


def test_damaged_results_are_an_error_in_words(recipe: Path, tmp_path: Path, refusal: Any) -> None:
    file = tmp_path / "o1.json"
    file.write_text('{"9000001_00M_1_2_1_42": {')
    message = refusal("import", "o1", "--results", file, "--config", recipe, f"run_dir={tmp_path / 'run'}")
    assert f"{file}: damaged JSON" in message
    assert not (tmp_path / "run").exists()
