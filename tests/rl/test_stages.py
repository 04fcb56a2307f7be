"""Which stages run again after which change, and what becomes of former results.

The stages' real inputs, with stand-ins for the work: each writes what the real one leaves behind.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from rl.config import Config, load_config
from rl.data.phantom.marker import MARKER
from rl.progress import StageProgress
from rl.stages import (
    STAGES,
    Run,
    StageError,
    eval_folder,
    read_record,
    require_finished,
    run_name,
    run_stage,
    stage_of,
)

SPLIT_HEADER = "patient_id,time,study_folder,series_folder,knee_side,path,image_filepath,label_filepath"
REWARD = "from rewards import reward\n\n@reward\ndef found(answer) -> float:\n    return 1.0\n"


@pytest.fixture
def config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Config:
    """A run in a folder of its own, with a model folder and a reward file beside it."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.py").write_text(REWARD)
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("{}")
    (tmp_path / "model" / "model.safetensors").write_bytes(b"weights")
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("rewards: {components: [{name: output_format}, {name: 'mine.py:found'}]}")
    return load_config(recipe, ["run_dir=run", "data.root=data", "model.path=model"])


def _write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def phantom(config: Config, progress: StageProgress) -> str:
    root = Path(config.phantom.out_dir)
    for split in ("train", "val", "test"):
        image = f"images/{split}.nii.gz"
        _write(root / image, f"voxels {config.phantom.seed}")
        row = f"1,00M,1,1,1,p,{image},masks/{split}.nii.gz"
        _write(root / "split_files" / f"{split}_split.csv", f"{SPLIT_HEADER}\n{row}\n")
        _write(root / "generate_data" / f"{split}.json", f"[{config.phantom.seed}]")
    _write(root / MARKER, "{}")
    return "phantoms"


def embed(config: Config, progress: StageProgress) -> str:
    Path(config.embed.cache_dir).mkdir(parents=True, exist_ok=True)
    return "features"


def sft(config: Config, progress: StageProgress) -> str:
    return _train(config, "sft", f"{config.sft.learning_rate} {config.view.height} {config.phantom.seed}")


def grpo(config: Config, progress: StageProgress) -> str:
    return _train(
        config, "grpo", f"{config.grpo.learning_rate} {config.grpo.max_steps} {config.phantom.seed}"
    )


def _train(config: Config, name: str, weights: str) -> str:
    folder = Path(config.run_dir) / name
    _write(folder / "adapter" / "adapter_model.safetensors", f"{name} {weights}")
    _write(folder / "metrics.jsonl", "{}")
    return "adapter"


def evaluate(config: Config, progress: StageProgress) -> str:
    for name in ("SFT", "GRPO"):
        adapter = Path(config.run_dir) / name.lower() / "adapter" / "adapter_model.safetensors"
        _write(
            Path(config.run_dir) / "eval" / name / "run.json",
            f"{adapter.read_text()} {config.eval.temperature}",
        )
    return "answers"


def compare(config: Config, progress: StageProgress) -> str:
    for name in ("report.html", "results.json"):
        _write(Path(config.run_dir) / name, "verdict")
    return "verdict"


WORK: dict[str, Run] = {
    "phantom": phantom,
    "embed": embed,
    "sft": sft,
    "grpo": grpo,
    "eval": evaluate,
    "compare": compare,
}


def demo(config: Config) -> list[str]:
    """What the demo does with the stages; returns the names of those that ran."""
    stages = [replace(stage, run=WORK[name]) for name, stage in STAGES.items()]
    return [stage.name for stage in stages if run_stage(config, stage, outdated="move") is not None]


def changed(config: Config, *overrides: str) -> Config:
    return load_config(Path("recipe.yaml"), ["run_dir=run", "data.root=data", "model.path=model", *overrides])


def test_a_run_whose_stages_are_done_does_nothing(config: Config) -> None:
    assert demo(config) == list(WORK)
    assert demo(config) == []


@pytest.mark.parametrize(
    ("override", "done_again"),
    [
        ("grpo.learning_rate=1e-3", ["grpo", "eval", "compare"]),
        ("sft.learning_rate=1e-3", ["sft", "grpo", "eval", "compare"]),
        ("phantom.seed=1", list(WORK)),
        ("view.height=112", ["embed", "sft", "grpo", "eval", "compare"]),
        ("eval.temperature=0.5", ["eval", "compare"]),
        ("compare.bootstrap_draws=70", ["compare"]),
        ("grpo.max_steps=70", ["grpo", "eval", "compare"]),
        ("grpo.max_tokens_per_microbatch=99", []),
        ("grpo.probe_tolerance=0.1", []),
        ("engine.max_num_seqs=3", []),
    ],
)
def test_a_setting_that_changes_makes_those_stages_run_again_that_depend_on_it(
    config: Config, override: str, done_again: list[str]
) -> None:
    demo(config)
    assert demo(changed(config, override)) == done_again


def test_files_are_compared_by_content_so_that_a_moved_dataset_is_the_same(config: Config) -> None:
    demo(config)
    shutil.copytree("data", "elsewhere")
    assert demo(changed(config, "data.root=elsewhere")) == ["embed"]
    (Path("elsewhere") / "generate_data" / "train.json").touch()
    assert demo(changed(config, "data.root=elsewhere")) == []


@pytest.mark.parametrize(
    ("file", "done_again"),
    [
        ("mine.py", ["grpo", "compare"]),
        ("model/model.safetensors", ["embed", "sft", "grpo", "eval", "compare"]),
        ("data/generate_data/train.json", ["sft", "grpo", "eval", "compare"]),
        ("data/generate_data/val.json", ["sft"]),
        ("data/generate_data/test.json", ["eval"]),
        ("data/images/val.nii.gz", ["embed", "sft"]),
        ("run/sft/adapter/adapter_model.safetensors", ["grpo", "eval", "compare"]),
    ],
)
def test_a_file_that_changes_makes_those_stages_run_again_that_read_it(
    config: Config, file: str, done_again: list[str]
) -> None:
    demo(config)
    with Path(file).open("a") as stream:
        stream.write("\n# changed")
    ran = demo(config)
    # a stage that came out as before leaves those after it in peace
    assert ran == [name for name in done_again if name in ran]
    assert set(done_again) - {"compare"} <= set(ran)


def test_a_deleted_result_is_made_again(config: Config) -> None:
    demo(config)
    Path("run/report.html").unlink()
    shutil.rmtree("run/cache")
    assert demo(config) == ["embed", "compare"]


def test_a_stage_asked_for_by_name_refuses_to_replace_results_of_other_settings(config: Config) -> None:
    demo(config)
    before = Path("run/grpo/adapter/adapter_model.safetensors").read_text()
    with pytest.raises(StageError) as error:
        run_stage(changed(config, "grpo.learning_rate=0.5"), replace(STAGES["grpo"], run=grpo))
    assert "grpo.learning_rate was 0.0001 and is 0.5" in str(error.value)
    assert "--again" in str(error.value)
    assert Path("run/grpo/adapter/adapter_model.safetensors").read_text() == before
    assert demo(config) == []


@pytest.mark.parametrize("how", ["again", "demo"])
def test_results_that_are_out_of_date_are_moved_and_not_deleted(
    config: Config, how: str, capsys: pytest.CaptureFixture[str]
) -> None:
    demo(config)
    before = Path("run/grpo/adapter/adapter_model.safetensors").read_text()
    new = changed(config, "grpo.learning_rate=0.5")
    if how == "again":
        run_stage(new, replace(STAGES["grpo"], run=grpo), again=True)
    else:
        demo(new)
    assert Path("run/old/grpo-1/grpo/adapter/adapter_model.safetensors").read_text() == before
    assert json.loads(Path("run/old/grpo-1/grpo.json").read_text())["settings"]["grpo.learning_rate"] == 1e-4
    assert Path("run/grpo/adapter/adapter_model.safetensors").read_text() != before
    assert "grpo.learning_rate was 0.0001 and is 0.5; the former results are now in run/old/grpo-1" in (
        capsys.readouterr().out
    )


def test_a_longer_run_goes_on_where_the_shorter_one_ended(config: Config) -> None:
    demo(config)
    _write(Path("run/grpo/checkpoints/step-60/state.json"), "{}")
    run_stage(changed(config, "grpo.max_steps=80"), replace(STAGES["grpo"], run=grpo))
    assert Path("run/grpo/checkpoints/step-60/state.json").exists()
    with pytest.raises(StageError, match=r"grpo\.max_steps was 80 and is 60"):
        run_stage(config, replace(STAGES["grpo"], run=grpo))


def test_an_interrupted_stage_finds_its_checkpoints_again(config: Config) -> None:
    checkpoint = Path("run/grpo/checkpoints/step-3")

    def interrupted(config: Config, progress: StageProgress) -> str:
        _write(checkpoint / "state.json", "{}")
        _write(Path("run/grpo/metrics.jsonl"), "{}")
        raise KeyboardInterrupt

    def goes_on(config: Config, progress: StageProgress) -> str:
        assert checkpoint.exists()
        return "done"

    with pytest.raises(KeyboardInterrupt):
        run_stage(config, replace(STAGES["grpo"], run=interrupted))
    assert run_stage(config, replace(STAGES["grpo"], run=goes_on)) is not None
    assert run_stage(config, replace(STAGES["grpo"], run=goes_on)) is None


def test_a_run_that_stopped_before_its_first_step_may_be_corrected_and_started_again(config: Config) -> None:
    def stops(config: Config, progress: StageProgress) -> str:
        _write(Path("run/sft/config.yaml"), "")
        raise StageError("run `reasonknee embed` first")

    with pytest.raises(StageError, match="embed"):
        run_stage(config, replace(STAGES["sft"], run=stops))
    assert run_stage(changed(config, "view.height=112"), replace(STAGES["sft"], run=sft)) is not None
    assert not Path("run/old").exists()


def test_an_adapter_that_somebody_put_there_is_not_written_over(config: Config) -> None:
    _write(Path("run/sft/adapter/adapter_model.safetensors"), "from a colleague")
    with pytest.raises(StageError, match="no record says what they were made from"):
        run_stage(config, replace(STAGES["sft"], run=sft))
    assert Path("run/sft/adapter/adapter_model.safetensors").read_text() == "from a colleague"


def test_nothing_builds_on_a_half_trained_adapter(config: Config) -> None:
    def interrupted(config: Config, progress: StageProgress) -> str:
        raise KeyboardInterrupt

    require_finished(config, "sft", "run `reasonknee sft`")
    with pytest.raises(KeyboardInterrupt):
        run_stage(config, replace(STAGES["sft"], run=interrupted))
    with pytest.raises(StageError, match="SFT has not finished"):
        require_finished(config, "sft", "run `reasonknee sft`")


def test_two_processes_do_not_do_the_same_stage_at_once(config: Config) -> None:
    def starts_it_again(config: Config, progress: StageProgress) -> str:
        with pytest.raises(StageError, match="another process is doing GRPO of this run"):
            run_stage(config, replace(STAGES["grpo"], run=grpo))
        return "done"

    assert run_stage(config, replace(STAGES["grpo"], run=starts_it_again)) is not None


def test_two_runs_share_one_dataset_without_writing_it_twice(config: Config) -> None:
    demo(config)
    assert "phantom" not in demo(changed(config, "run_dir=other"))


def test_another_setting_is_evaluated_beside_the_usual_one_and_leaves_it_in_peace(config: Config) -> None:
    demo(config)
    blind = changed(config, "eval.image=none")
    stage = stage_of(blind, "eval")
    assert [str(path) for path in stage.results(blind)] == [
        f"run/settings/{name}-none" for name in ("base", "SFT", "GRPO")
    ]

    def answer(config: Config, progress: StageProgress) -> str:
        for folder in stage.results(config):
            _write(folder / "run.json", "{}")
        return "answers"

    assert run_stage(blind, replace(stage, run=answer)) is not None
    assert run_stage(blind, replace(stage, run=answer)) is None
    assert run_stage(config, replace(STAGES["eval"], run=evaluate)) is None
    assert demo(config) == ["compare"]  # there are more runs to choose from
    run_stage(blind, replace(stage, run=answer), again=True)
    assert Path("run/old/eval-none-1/GRPO-none/run.json").exists()
    assert Path("run/eval/GRPO/run.json").exists()


def test_the_setting_names_the_runs(config: Config) -> None:
    Path("guided.json").write_text("{}")
    assert run_name(config, "GRPO") == "GRPO"
    both = changed(config, "eval.prompts=guided.json", "eval.image=true_region")
    assert eval_folder(both, "GRPO") == Path("run/settings/GRPO-guided-true_region")
    assert "SFT-guided-true_region" in str(stage_of(both, "compare").inputs(both).settings["runs"])


def test_a_record_that_cannot_be_read_is_named(config: Config) -> None:
    demo(config)
    Path("run/stages/sft.json").write_text("[]")
    with pytest.raises(StageError, match=r"run/stages/sft\.json: not a record of a stage"):
        demo(config)
    assert read_record(Path("run/stages/nothing.json")) == (None, False)


def test_a_run_that_is_up_to_date_imports_no_torch(tmp_path: Path) -> None:
    heavy = {"torch", "transformers", "ray"}
    code = f"import sys, rl.cli, rl.stages, rl.config_check; print({heavy} & set(sys.modules))"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=tmp_path
    )
    assert done.stdout.strip() == "set()"
