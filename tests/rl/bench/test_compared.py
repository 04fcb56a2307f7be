"""`reasonknee compare A B [C ...]`: which runs are meant, what they are called, and what is refused."""

from __future__ import annotations

import dataclasses
import json
import shutil

import pytest

from rl.compared import runs_to_compare
from rl.config import ConfigError, load_config

SEEDS = (0, 1, 2)


def save(run, folder):
    folder.mkdir(parents=True)
    run.answers.write_parquet(folder / "answers.parquet")
    (folder / "run.json").write_text(json.dumps(dataclasses.asdict(run.meta)))


@pytest.fixture(scope="module")
def runs(tmp_path_factory, examples, answered):
    """s0, s1, s2: folders of three training seeds, each with SFT, GRPO and base; `other` is about other patients."""
    folder = tmp_path_factory.mktemp("runs")
    items = examples(4, [1, 42])
    for seed in SEEDS:
        for name, skill in (("base", 0.0), ("SFT", 0.4), ("GRPO", 0.8)):
            save(answered(items, name, skill, seed=seed), folder / f"s{seed}" / "eval" / name)
    save(answered(examples(5, [1, 42]), "SFT", 0.4), folder / "other")
    changed = answered(items, "SFT", 0.4)
    save(
        dataclasses.replace(changed, meta=dataclasses.replace(changed.meta, split_file="test_balanced.json")),
        folder / "balanced",
    )
    return folder


def config_of(runs, run_dir="empty"):
    return load_config(None, [f"data.root={runs}", f"run_dir={runs / run_dir}", "compare.bootstrap_draws=50"])


def arm(runs, name, seeds=SEEDS):
    return ",".join(str(runs / f"s{seed}" / "eval" / name) for seed in seeds)


def test_runs_of_an_arm_are_numbered_and_the_arm_bears_their_name(runs):
    compared = runs_to_compare(config_of(runs), [arm(runs, "SFT"), arm(runs, "GRPO")])
    assert compared.arms == {
        "SFT": ["SFT #1", "SFT #2", "SFT #3"],
        "GRPO": ["GRPO #1", "GRPO #2", "GRPO #3"],
    }
    assert [run.meta.name for run in compared.runs.values()] == list(compared.runs)


def test_runs_of_this_folder_are_found_by_name_and_not_shown_twice(runs):
    compared = runs_to_compare(config_of(runs, "s0"), ["SFT", "GRPO"])
    assert compared.arms == {"SFT": ["SFT"], "GRPO": ["GRPO"]}
    assert list(compared.runs) == ["base", "SFT", "GRPO"]
    by_folder = runs_to_compare(config_of(runs, "s0"), [arm(runs, "SFT"), arm(runs, "GRPO")])
    assert [run.meta.name for run in by_folder.runs.values()][:3] == ["base", "SFT #1", "GRPO #1"]
    assert len(by_folder.runs) == 7


def test_arms_whose_runs_bear_one_name_are_told_apart_by_what_was_asked_for(runs):
    words = ["SFT", "GRPO", arm(runs, "GRPO", [1])]
    compared = runs_to_compare(config_of(runs, "s0"), words)
    assert list(compared.arms) == words
    names = [run.meta.name for run in compared.runs.values()]
    assert names == ["base", *words]


def test_a_run_without_seeds_may_stand_against_several(runs):
    base = ",".join([str(runs / "s0" / "eval" / "base")] * 3)
    compared = runs_to_compare(config_of(runs), [base, arm(runs, "GRPO")])
    assert len(set(compared.arms["base"])) == 1
    assert len(compared.runs) == 4


def test_a_name_that_several_runs_bear_is_refused_with_their_folders(runs, tmp_path):
    config = config_of(runs, tmp_path)
    for kind in ("served", "imported"):
        shutil.copytree(runs / "s0" / "eval" / "GRPO", tmp_path / kind / "twin")
    with pytest.raises(
        ConfigError, match=r"'twin' is the name of several runs: write one of .*served.*imported"
    ):
        runs_to_compare(config, ["twin", str(runs / "s0" / "eval" / "SFT")])


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["SFT,SFT", "GRPO"], "'SFT,SFT' names 2 runs and 'GRPO' 1: runs are paired by seed"),
        (["SFT", "GRPO", "GRPO"], "'GRPO' is given twice"),
        (["SFT", "{s0}/SFT"], "compares the run 'SFT' with itself"),
        (["SFT,SFT", "GRPO,GRPO"], "has the pair 'GRPO' and 'SFT' twice"),
        (["SFT,", "GRPO,GRPO"], "no run ''"),
        (["SFT", "{other}"], "runs 'SFT' and '{other}': 4 items are in one run only"),
        (
            ["SFT,SFT", "GRPO,{balanced}"],
            "runs 'SFT' and '{balanced}' differ in split_file: 'test.json' against",
        ),
    ],
)
def test_what_cannot_be_compared_is_refused_in_words(runs, refusal, words, message):
    places = {"s0": runs / "s0" / "eval", "other": runs / "other", "balanced": runs / "balanced"}
    given = [word.format(**places) for word in words]
    settings = [f"data.root={runs}", f"run_dir={runs / 's0'}"]
    assert message.format(**places) in refusal("compare", *given, *settings)


@pytest.mark.slow
def test_the_command_compares_seeds_and_further_arms(runs, tmp_path, cli):
    settings = [f"data.root={runs}", f"run_dir={tmp_path}", "compare.bootstrap_draws=50"]
    arms = [arm(runs, name) for name in ("base", "SFT", "GRPO")]
    done = cli("compare", *arms, *settings)
    assert done.exit_code == 0, (done.output, done.exception)
    assert "SFT against base, 3 training seeds of each, 16 items of 4 patients" in done.output
    assert "GRPO against base, 3 training seeds of each" in done.output
    assert "GRPO #3 − base #3" in done.output
    saved = json.loads((tmp_path / "results.json").read_text())
    assert [(c["a"], c["b"], len(c["pairs"])) for c in saved["comparisons"]] == [
        ("base", "SFT", 3),
        ("base", "GRPO", 3),
    ]
    assert (tmp_path / "report.html").exists()
