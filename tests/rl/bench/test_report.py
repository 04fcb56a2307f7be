"""The report: self-contained, safe with hostile completions, and complete."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import shutil
from html.parser import HTMLParser

import nibabel
import numpy as np
import polars as pl
import pytest
from playwright.sync_api import sync_playwright

from rl.bench.answers import BenchRun, examples_of, make_run
from rl.bench.arms import Arm, ArmComparison, compare_arms, verdicts
from rl.bench.baselines import BASELINE_MODEL, baseline_rows, fit_baselines
from rl.bench.compare import compare, verdict
from rl.bench.figures import MetricsError, grade_histograms, read_metrics, reward_curves
from rl.bench.metrics import grade_histogram, grade_run
from rl.bench.report import write_report
from rl.bench.samples import choose, make_sample, reward_suites
from rl.config import CompareConfig
from rl.config_rewards import RewardComponent, RewardsConfig

QUICK = CompareConfig(bootstrap_draws=500)
IDS = [1, 16, 30, 42, 44, 60]
HOSTILE = "<script>alert(1)</script><img src=x onerror=alert(2)>\"'</pre>{{ 7*7 }}"


class Page(HTMLParser):
    """Elements with their attributes, and all text."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.words = ""
        self.feed(html)

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))

    def handle_data(self, data):
        self.words += data


def report_on(folder, runs, comparison, log=None):
    graded = {name: grade_run(run) for name, run in runs.items()}
    arms = [ArmComparison("SFT", "GRPO", (comparison,))]
    return write_report(folder, runs, graded, arms, log, rewards=RewardsConfig())


@pytest.fixture(scope="module")
def built(tmp_path_factory, examples, answered, meta):
    """A report of four runs, one with hostile completions, on volumes of which one is missing."""
    folder = tmp_path_factory.mktemp("report")
    test = []
    for example in examples(6, IDS):
        path = folder / f"{example.volume.volume_id}.nii.gz"
        if example.patient_id != "p001" and not path.exists():
            voxels = np.random.default_rng(0).random((48, 40, 16)).astype(np.float32)
            nibabel.save(nibabel.Nifti1Image(voxels, np.diag([1.5, 1.5, 4.0, 1.0])), path)
        test.append(
            dataclasses.replace(example, volume=dataclasses.replace(example.volume, image_path=str(path)))
        )
    sft = answered(test, "SFT", 0.4, seed=1)
    hostile = pl.when(pl.int_range(pl.len()) % 2 == 0).then(pl.lit(HOSTILE)).otherwise("completion")
    sft = BenchRun(sft.meta, sft.answers.with_columns(completion=hostile))
    grpo = answered(test, "GRPO", 0.8, seed=2)
    baseline = make_run(
        baseline_rows(fit_baselines(examples(6, IDS, seed=5)), test, "strict", "required"),
        dataclasses.replace(meta("Baseline", IDS), model=BASELINE_MODEL, decoding={}),
    )
    runs = {"Base": answered(test, "Base", 0.1), "SFT": sft, "GRPO": grpo, "Baseline": baseline}
    log = folder / "metrics.jsonl"
    records = [
        {"step": s, "reward": s / 9, "reward/box_iou": s / 10, "kl": None, "loss": 0.1} for s in range(8)
    ]
    log.write_text("".join(json.dumps(r) + "\n" for r in records))
    comparison = compare(sft, grpo, QUICK)
    path = report_on(folder / "out", runs, comparison, log)
    return path, runs, comparison


@pytest.fixture(scope="module")
def page(built):
    return Page(built[0].read_text())


def test_the_verdict_comes_first(built, page):
    assert verdict(built[2]) in page.words
    assert page.words.index(verdict(built[2])[:40]) < page.words.index("Table 2: accuracy")


def test_tables_show_runs_baselines_and_published_rows(page):
    for words in (
        *("Base", "SFT", "GRPO", "Baseline (train-majority grade)", "Baseline (train-mean box)"),
        *(
            "Paper: Qwen2.5VL-3B, SFT without CoT",
            "Paper: Med3DVLM",
            "as published, test file and weighting unknown",
        ),
        *("test.json", "6 questions (1, 16, 30, 42, 44, 60)", "strict reader", "72 items of 6 patients"),
    ):
        assert words in page.words


def test_published_rows_have_a_dash_where_the_paper_gives_nothing_and_no_difference(built):
    text = (built[0].parent / "tables.md").read_text()
    paper, _, differences = text.partition("## Differences")
    assert "| Paper: o1, zero-shot | 0.479 | 0.553 | 0.353 | 0.332 | 0.476 | 0.477 | – |" in paper  # no Macro
    assert (
        "| Paper: Med3DVLM | 0.298 | 0.314 | 0.359 | 0.197 | 0.319 | 0.384 | 0.470 | – |" in paper
    )  # no Overall
    assert "Paper" not in differences


def test_an_empty_column_is_printed_as_empty(page):
    assert "empty" in page.words


def test_hostile_completions_stay_text(built, page):
    html = built[0].read_text()
    assert "<script" not in html
    assert "&lt;script&gt;alert(1)" in html
    assert HOSTILE in page.words
    assert not any(name.startswith("on") for _, attributes in page.elements for name in attributes)


def test_nothing_is_fetched_from_anywhere(built, page):
    html = built[0].read_text()
    assert "http://" not in html
    assert "https://" not in html
    for tag, attributes in page.elements:
        assert tag not in ("script", "link", "iframe", "object", "embed", "base")
        for name in ("src", "href"):
            assert (attributes.get(name) or "data:").startswith(("data:", "#"))


def test_samples_show_three_planes_or_say_why_not(page):
    samples = sum(tag == "article" for tag, _ in page.elements)
    drawings = sum(tag == "svg" for tag, _ in page.elements)
    assert 12 <= samples <= 18
    assert drawings % 3 == 0
    assert 0 < drawings <= 3 * samples
    assert any(
        "truth" in (attributes.get("class") or "") for tag, attributes in page.elements if tag == "rect"
    )


def test_samples_show_what_each_component_of_the_reward_paid_both_answers(built):
    _, runs, _ = built
    graded = [grade_run(runs[name]) for name in ("SFT", "GRPO")]
    item = runs["SFT"].answers["example_id"][0]  # a hostile completion against a sound one
    suites = reward_suites(RewardsConfig(), [runs["SFT"].meta, runs["GRPO"].meta])
    sample = make_sample(item, "gain", [runs["SFT"], runs["GRPO"]], graded, (2, 0, 1), suites)
    row = runs["GRPO"].answers.filter(pl.col("example_id") == item)
    (example,) = examples_of(row)
    paid = suites[1].score(example, row["completion"][0])
    assert [line.component for line in sample.rewards] == [
        *("output_format (weight 0.09)", "moaks_accuracy (weight 0.45)", "box_iou (weight 0.45)", "Total")
    ]
    assert [line.a for line in sample.rewards] == ["0.000"] * 4
    assert (sample.box_a, sample.box_b) == ("no box read", f"IoU {graded[1].items['iou'][0]:.2f}")
    assert [line.b for line in sample.rewards] == [
        *(f"{score:.3f}" for score in (*paid.components.values(), paid.total))
    ]


def test_a_reward_that_cannot_score_a_sample_says_so_and_costs_no_report(built, tmp_path):
    broken = tmp_path / "broken.py"
    broken.write_text("from rewards import reward\n@reward\ndef broken(answer):\n    raise KeyError('x')\n")
    settings = RewardsConfig(components=[RewardComponent(name=f"{broken}:broken")])
    _, runs, _ = built
    arms = [runs["SFT"], runs["GRPO"]]
    suites = reward_suites(settings, [run.meta for run in arms])
    item = arms[0].answers["example_id"][0]
    sample = make_sample(item, "gain", arms, [grade_run(run) for run in arms], (2, 0, 1), suites)
    assert [(line.component, line.a, line.b) for line in sample.rewards] == [
        ("broken", "failed", "failed"),
        ("Total", "0.000", "0.000"),
    ]


def test_the_page_shows_the_rewards_of_every_sample(built, page):
    samples = sum(tag == "article" for tag, _ in page.elements)
    assert page.words.count("moaks_accuracy (weight") == samples


@pytest.fixture(scope="module")
def browser():
    """A headless Chromium; without one the test is skipped, except where REASONKNEE_NEEDS_BROWSER says it may not."""
    found = shutil.which("chromium") or shutil.which("google-chrome")
    if not found:
        assert not os.environ.get("REASONKNEE_NEEDS_BROWSER"), "install chromium: the report is tested in it"
        pytest.skip("no chromium on this machine")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=found, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.mark.slow
@pytest.mark.parametrize("width", [1280, 390])
def test_the_report_works_in_a_browser_wide_or_narrow(built, browser, width):
    page = browser.new_page(viewport={"width": width, "height": 844})
    said: list[str] = []
    page.on("console", lambda message: said.append(message.text))
    page.on("pageerror", lambda error: said.append(str(error)))
    page.on("request", lambda request: said.append(request.url[:80]))
    page.goto(built[0].as_uri())
    requests = [line for line in said if not line.startswith("data:")]
    assert requests == [built[0].as_uri()]  # itself alone, and nothing in the console
    assert page.evaluate("document.documentElement.scrollWidth") == width
    assert page.evaluate("[...document.images].every(image => image.naturalWidth > 0)")

    shown = page.locator(".sample:visible")
    everything = shown.count()
    page.get_by_label("large gain").check()
    gains = shown.count()
    assert 0 < gains < everything
    page.get_by_label("all right").check()
    assert 0 < shown.count() <= gains
    for sample in shown.all():
        assert "among the largest gains of GRPO over SFT" in sample.inner_text()
        assert sample.locator("tbody td:last-child.wrong").count() == 0
    for any_of in page.get_by_label("any").all():
        any_of.check()
    assert shown.count() == everything
    page.close()


def test_the_curves_say_why_there_is_no_kl(built, page, tmp_path):
    _, runs, comparison = built  # its log has no KL
    assert "KL to the SFT policy was not logged: it is where grpo.beta is above 0" in page.words
    log = tmp_path / "metrics.jsonl"
    log.write_text('{"step": 1, "reward": 0.5, "kl": 0.01}\n')
    assert "KL to the SFT policy was not" not in report_on(tmp_path, runs, comparison, log).read_text()


def test_the_report_is_small(built):
    assert built[0].stat().st_size < 10e6


def test_a_missing_volume_costs_only_its_images(built, tmp_path):
    _, runs, comparison = built
    gone = {
        name: BenchRun(run.meta, run.answers.with_columns(image_path=pl.lit("/nowhere/v.nii.gz")))
        for name, run in runs.items()
    }
    words = Page(report_on(tmp_path, gone, comparison).read_text()).words
    assert "No images: volume /nowhere/v.nii.gz does not exist" in words
    assert "Training of" not in words


def test_results_json_holds_every_number(built):
    results = json.loads((built[0].parent / "results.json").read_text())
    assert results["runs"]["GRPO"]["values"]["accuracy"]["Periarticular"] == {"value": None, "n": 0}
    assert len(results["comparison"]["differences"]) == len(built[2].differences)
    assert results["verdict"] == verdict(built[2])


def test_tables_md_is_a_github_table(built):
    text = (built[0].parent / "tables.md").read_text()
    assert "## Table 3: mean IoU of boxes" in text
    assert "| Run | Patella | Femur |" in text


def test_no_temporary_file_is_left(built):
    names = ["report.html", "results.json", "samples.parquet", "tables.md", "tables.tex"]
    assert sorted(p.name for p in built[0].parent.iterdir()) == names


def test_every_item_of_every_run_is_in_the_samples_as_it_was_graded(built):
    report, runs, *_ = built
    samples = pl.read_parquet(report.parent / "samples.parquet")
    assert samples.height == sum(run.answers.height for run in runs.values())
    assert set(samples["run"]) == set(runs)
    assert {"item_hash", "iou", "distance_mm", "all_correct", "completion", "truth_grades"} <= set(
        samples.columns
    )


def test_tables_for_a_paper_have_as_many_cells_in_every_row_and_nothing_unescaped(built):
    text = (built[0].parent / "tables.tex").read_text()
    assert text.count(r"\begin{table}") == text.count(r"\end{table}") == 10
    for table in text.split(r"\begin{table}")[1:]:
        width = len(table.split(r"\begin{tabular}{")[1].split("}")[0])
        rows = [line for line in table.splitlines() if line.endswith(r" \\")]
        assert {row.replace(r"\&", "").count("&") for row in rows} == {width - 1}
    assert not re.search(r"(?<!\\)[%#_]", text)


def test_the_same_input_gives_the_same_page(built, tmp_path):
    path, runs, comparison = built
    assert (
        report_on(tmp_path, runs, comparison, path.parent.parent / "metrics.jsonl").read_text()
        == path.read_text()
    )


def test_a_compared_run_that_is_not_given_is_named(built, tmp_path):
    _, runs, comparison = built
    with pytest.raises(ValueError, match="about run 'SFT', which is not among"):
        report_on(tmp_path, {"GRPO": runs["GRPO"]}, comparison)


def test_runs_on_other_items_do_not_share_a_table(built, tmp_path, examples, answered):
    _, runs, comparison = built
    with pytest.raises(ValueError, match="runs on the same items"):
        report_on(tmp_path, {**runs, "other": answered(examples(2, [1]), "other", 0.5)}, comparison)


def test_the_boxes_of_a_run_that_was_shown_the_true_regions_are_measured_nowhere(
    tmp_path, examples, answered, answered_cut_out
):
    items = examples(6, IDS)
    runs = {"SFT": answered(items, "SFT", 0.4), "cut": answered_cut_out(items, "cut")}
    graded = {name: grade_run(run) for name, run in runs.items()}
    arms = [ArmComparison("SFT", "cut", (compare(*runs.values(), QUICK),))]
    html = write_report(tmp_path, runs, graded, arms, rewards=RewardsConfig()).read_text()
    words = Page(html).words
    assert "moaks_accuracy" not in words
    setting = "cut: shown the true region alone, own prompts; SFT: shown the volume, own prompts"
    assert f"Setting: {setting}." in words.partition("Table 2")[0]  # in the heading
    table3 = words.partition("Table 3: mean IoU of boxes")[2].partition("Boxes: spread")[0]
    assert "SFT: shown the volume, own prompts; cut: shown the true region alone, own prompts" in table3
    assert table3.count("box given") == 8  # seven structures and all
    assert "so its boxes are not comparable" in table3
    assert "(IoU" not in words
    assert "Distribution of IoU" not in html
    assert "Mean IoU: not comparable" in words
    spread = (tmp_path / "tables.md").read_text().partition("## Boxes")[2].partition("##")[0]
    assert "| cut | box given |" in spread
    assert "| SFT | 0." in spread


def test_samples_are_chosen_by_rule_and_from_different_volumes(built):
    graded = [grade_run(built[1][name]) for name in ("SFT", "GRPO")]
    chosen = choose(*graded, count=2)
    assert chosen == choose(*graded, count=2)
    volumes = graded[0].items.filter(pl.col("example_id").is_in(list(chosen)))["volume_id"]
    assert volumes.n_unique() == len(chosen) == 6


def test_a_step_logged_twice_counts_once_and_a_cut_last_line_is_left_out(tmp_path):
    log = tmp_path / "metrics.jsonl"
    log.write_text(
        '{"step": 1, "reward": 0.1}\n{"step": 2, "reward": 0.2}\n{"step": 2, "reward": 0.3}\n{"step": 3, "re'
    )
    assert [(r["step"], r["reward"]) for r in read_metrics(log)] == [(1, 0.1), (2, 0.3)]


@pytest.mark.parametrize("line", ["nonsense", "[1]", '{"reward": 1}', '{"step": null}'])
def test_a_bad_line_of_the_log_is_named(tmp_path, line):
    log = tmp_path / "metrics.jsonl"
    log.write_text(f'{{"step": 1}}\n{line}\n')
    with pytest.raises(MetricsError, match=r"metrics\.jsonl line 2"):
        read_metrics(log)


def test_a_log_without_rewards_gives_no_curves():
    assert reward_curves([]) is None
    assert reward_curves([{"step": 1, "reward": float("nan")}]) is None


def test_figures_are_images_that_cannot_run_scripts(built):
    histograms = {name: grade_histogram(grade_run(built[1][name])) for name in ("SFT", "GRPO")}
    assert grade_histograms(histograms).startswith("data:image/svg+xml;base64,")


@pytest.fixture(scope="module")
def of_many(tmp_path_factory, examples, answered):
    """Reports of three arms, of three seeds of two arms, and of two seeds of two arms."""
    items = examples(5, [1, 42])
    runs = {
        f"{name} #{seed}": answered(items, f"{name} #{seed}", skill, seed=seed)
        for name, skill in (("SFT", 0.4), ("GRPO", 0.8), ("RLOO", 0.6))
        for seed in (1, 2, 3)
    }
    graded = {name: grade_run(run) for name, run in runs.items()}

    def report(names, seeds):
        labels = [f"{name} #{seed}" for name in names for seed in seeds]
        arms = [Arm(name, tuple(graded[f"{name} #{seed}"] for seed in seeds)) for name in names]
        comparisons = compare_arms(arms, QUICK)
        folder = tmp_path_factory.mktemp("many")
        chosen = {label: runs[label] for label in labels}
        write_report(folder, chosen, {label: graded[label] for label in labels}, comparisons)
        return folder, comparisons

    return {
        "arms": report(["SFT", "GRPO", "RLOO"], [1]),
        "seeds": report(["SFT", "GRPO"], [1, 2, 3]),
        "two seeds": report(["SFT", "GRPO"], [1, 2]),
    }


@pytest.mark.parametrize("kind", ["arms", "seeds", "two seeds"])
def test_a_report_of_many_has_every_paragraph_every_pair_and_every_number(of_many, kind):
    folder, comparisons = of_many[kind]
    words = Page((folder / "report.html").read_text()).words
    tables_md = (folder / "tables.md").read_text()
    results = json.loads((folder / "results.json").read_text())
    for paragraph in verdicts(comparisons):
        assert paragraph in words
        assert paragraph in tables_md
        assert paragraph in results["verdict"]
    for arm, saved in zip(comparisons, results["comparisons"], strict=True):
        assert len(saved["pairs"]) == len(arm.pairs)
        assert len(saved["over_seeds"]) == len(arm.over_seeds)
        for pair in arm.pairs:
            assert f"{pair.b.name} − {pair.a.name}" in tables_md
    assert "Of the first pair of runs alone" in words


def test_the_title_names_every_arm_and_the_method_stands_apart(of_many):
    words = {kind: Page((folder / "report.html").read_text()).words for kind, (folder, _) in of_many.items()}
    assert "GRPO, RLOO against SFT" in words["arms"]
    assert "training seeds" not in words["arms"]
    assert "Differences over 3 training seeds" in words["seeds"]
    assert "mean of 3 seeds, 95% t interval" in words["seeds"]
    assert "mean of 2 seeds, which are too few for a claim" in words["two seeds"]
    assert "No claim is made with fewer than 3 seeds" in words["two seeds"]
