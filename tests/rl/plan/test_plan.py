"""The plan of a recipe: what it is made from, what binds, and what a user reads."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import nibabel
import numpy as np
import pytest
from typer.testing import Result

from rewards.ontology import QUESTIONS
from rewards.types import Example, Truth
from rl.config import Config, ConfigError, load_config, save_config
from rl.data.layout import HEADER
from rl.data.phantom.dataset import write_phantom
from rl.environment import describe_environment
from rl.geometry import cache_bytes, vision_geometry
from rl.model import load_tokenizer, resolve_model
from rl.plan import hardware
from rl.plan.estimate import SHARE, Plan, make_plan, microbatches, training
from rl.plan.flops import TreeShape
from rl.plan.hardware import Hardware, described, device_name, measured
from rl.plan.limits import demands, limits
from rl.plan.sizes import model_sizes
from rl.plan.workload import _volume, phantom_volumes, workload
from rollouts.prompts import PromptBuilder
from rollouts.types import VolumeFeatures

CONFIGS = Path(__file__).parents[3] / "configs"
RECIPES = sorted(CONFIGS.glob("*.yaml"))
ONE_GPU = CONFIGS / "qwen2_5_vl_3b_1gpu.yaml"
H200 = ("--peak-tflops", "989", "--memory-gb", "141")
Cli = Callable[..., Result]


def recipe(*overrides: str, path: Path = ONE_GPU) -> Config:
    return load_config(path, list(overrides))


def plan(*overrides: str, memory_gb: float = 141, bandwidth_gbs: float = 4800, path: Path = ONE_GPU) -> Plan:
    config = recipe(*overrides, path=path)
    return make_plan(config, described(config, 989, memory_gb, bandwidth_gbs))


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_every_recipe_is_planned_without_weights_and_without_data(
    path: Path, cli: Cli, tmp_path: Path
) -> None:
    """Nor does it matter what lies where the tests are started, the run and the data of a demo say."""
    result = cli("plan", path, *H200, f"run_dir={tmp_path}", f"data.root={tmp_path}/data")
    assert result.exit_code == 0, result.output
    config, geometry = load_config(path), vision_geometry(load_config(path).model.path)
    assert geometry is not None
    volumes = 7_970 if path.stem.startswith("qwen") else sum(phantom_volumes(config).values())
    cache_gb = cache_bytes(config, geometry, volumes) / 1e9
    for text in (
        f"{volumes:,} volumes",
        f"{cache_gb:,.1f}" if cache_gb > 1 else f"{cache_gb:.2g}",
        "training, backward",
        "trainer, peak",
        "GRPO, an epoch",
        "binds: ",
        "assumed: ",
    ):
        assert text in result.output


def test_tokens_operations_and_time_follow_the_recipe() -> None:
    small, large = plan("grpo.volumes_per_step=8"), plan("grpo.volumes_per_step=16")
    assert large.training.whole.needed == pytest.approx(2 * small.training.whole.needed)
    assert large.train_s == pytest.approx(2 * small.train_s)
    assert large.memory == small.memory  # the micro-batch is the same
    assert large.rollout_s > small.rollout_s
    iterated = plan("grpo.num_iterations=3", "grpo.beta=0.1")
    assert iterated.training.forward.needed == pytest.approx(4 * small.training.forward.needed)
    assert iterated.training.backward.needed == pytest.approx(3 * small.training.backward.needed)
    spread = plan("grpo.volumes_per_step=16", "ray.num_workers=2", "ray.num_engines=2")
    assert spread.training.whole.needed == pytest.approx(large.training.whole.needed)
    assert spread.train_s == pytest.approx(large.train_s / 2)
    assert spread.devices == 2 * large.devices


def test_a_volume_that_is_cut_into_two_micro_batches_is_computed_twice() -> None:
    config = recipe("grpo.max_tokens_per_microbatch=16000")
    shape = TreeShape(7_900, 130, 384, 8, "sdpa")
    assert microbatches(config, shape, 1) == [[2], [2]]
    assert microbatches(recipe(), shape, 2) == [[4], [4]]
    cut, whole = plan("grpo.max_tokens_per_microbatch=16000"), plan()
    assert (cut.training.volumes, whole.training.volumes) == (16, 8)
    assert cut.training.whole.needed > 1.3 * whole.training.whole.needed


def test_decoding_is_bound_by_bandwidth_and_a_full_kv_cache_slows_it() -> None:
    fast, slow = plan(bandwidth_gbs=1e9), plan(bandwidth_gbs=2000)
    computed = fast.sampling.prefill.needed + fast.sampling.decoding.needed
    assert fast.sampling.ideal_s == pytest.approx(computed / fast.hardware.flops)
    assert slow.rollout_s > 2 * fast.rollout_s
    cramped = plan("engine.gpu_memory_utilization=0.07", bandwidth_gbs=2000)
    assert 0 < cramped.engine.sequences < slow.engine.sequences == slow.engine.wanted
    assert cramped.rollout_s > slow.rollout_s


def test_on_a_cpu_sequences_that_are_decoded_together_share_the_calls_of_a_step() -> None:
    def on_cpu(questions: int, at_once: int) -> Plan:
        overrides = (f"grpo.questions_per_volume={questions}", f"engine.max_num_seqs={at_once}")
        config = recipe("run_dir=absent", "engine.kv_cache_gib=4", *overrides, path=CONFIGS / "smoke.yaml")
        return make_plan(config, Hardware("cpu", 1e11, 1e10, 2e10, False, True, "float32"))

    one, four, cramped = on_cpu(1, 256), on_cpu(4, 256), on_cpu(4, on_cpu(1, 256).engine.wanted)
    assert four.engine.sequences == 4 * one.engine.sequences
    assert four.sampling.calls_s == pytest.approx(one.sampling.calls_s)
    assert cramped.sampling.calls_s == pytest.approx(4 * one.sampling.calls_s)
    assert one.rollout_s < four.rollout_s < 4 * one.rollout_s
    assert plan().sampling.calls_s == 0


def test_the_phases_of_a_step_share_a_gpu_as_the_placement_says() -> None:
    asleep, awake = plan(), plan("engine.sleep=false")
    trainer, sft = asleep.memory[True], {"SFT": asleep.sft_memory[True].peak}
    assert demands(asleep) == sft | {
        "training": trainer.peak,
        "sampling": trainer.resident + asleep.engine.share,
    }
    assert demands(awake)["training"] == trainer.peak + awake.engine.share
    apart = plan("engine.sleep=false", "ray.placement=separate")
    assert demands(apart) == sft | {"training": trainer.peak, "sampling": apart.engine.share}
    assert (asleep.devices, apart.devices) == (1, 2)


@pytest.mark.parametrize(
    ("overrides", "memory_gb", "words"),
    [
        ((), 141, "rollouts: "),
        (("model.gradient_checkpointing=false",), 60, "set model.gradient_checkpointing=true"),
        (("engine.sleep=false", "engine.gpu_memory_utilization=0.9"), 141, "set engine.sleep=true"),
        ((), 13, "GB of 12.3 GB; lower grpo.max_tokens_per_microbatch (24576)"),
        (("grpo.max_tokens_per_microbatch=1",), 10, "lower grpo.num_generations"),
        (("engine.gpu_memory_utilization=1",), 141, "sampling needs 147.7 GB"),
        (("engine.gpu_memory_utilization=0.06",), 141, "memory: the KV cache holds "),
        (("engine.gpu_memory_utilization=0.04",), 141, "no sequence fits into the engine's 5.6 GB, of which"),
        (("ray.placement=separate", "engine.sleep=false"), 141, "more engines (ray.num_engines)"),
        ((), 11.5, "SFT needs 11.2 GB of 10.9 GB; lower sft.questions_per_volume (16)"),
        (("sft.questions_per_volume=62", "model.gradient_checkpointing=false"), 141, "SFT needs 13"),
    ],
)
def test_what_binds_is_said_with_a_remedy(overrides: tuple[str, ...], memory_gb: float, words: str) -> None:
    assert words in "\n".join(limits(plan(*overrides, memory_gb=memory_gb)))


def test_training_binds_where_engines_are_many_and_a_full_disk_before_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    many = ("ray.num_engines=8", "ray.placement=separate", "engine.sleep=false")
    assert limits(plan(*many))[0].startswith("compute: training is ")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: type("usage", (), {"free": 10**9}))
    (tmp_path / "cache" / "ab").mkdir(parents=True)
    of_another_view, entry = (tmp_path / "cache" / "ab" / f"{name}.safetensors" for name in "xy")
    of_another_view.write_bytes(b"0" * 1000)
    entry.touch()
    os.truncate(entry, plan().cache_bytes + 300)
    full = plan(f"embed.cache_dir={tmp_path / 'cache'}")
    eight_bits = plan("embed.dtype=float8_e4m3fn", f"embed.cache_dir={tmp_path / 'cache'}")
    assert limits(eight_bits)[0].startswith("disk: the cache needs 128 GB and ")
    assert full.disk_free == 10**9 + full.cache_bytes + 300
    assert limits(full)[0].startswith("disk: the cache needs 256 GB and ")


def test_overlapped_rollouts_take_no_time_of_their_own_on_devices_of_their_own() -> None:
    node = CONFIGS / "qwen2_5_vl_3b_node4.yaml"
    for overrides, path in (("grpo.overlap=true",), node), ((), node), (("grpo.overlap=true",), ONE_GPU):
        planned = plan(*overrides, path=path)
        parts = (planned.train_s, planned.rollout_s)
        together = overrides and planned.config.ray.placement == "separate"
        assert planned.step_s == (max(parts) if together else sum(parts))
    assert plan("grpo.overlap=true", path=node).rollout_s > plan("grpo.overlap=true", path=node).train_s
    assert limits(plan("grpo.overlap=true", path=node))[0].startswith(
        "rollouts: 100% of a step; more engines"
    )


@pytest.mark.parametrize("reasoning", ["required", "none"])
def test_text_is_counted_as_prompts_are_built(reasoning: str) -> None:
    import torch

    config = recipe(f"model.reasoning={reasoning}", path=CONFIGS / "demo.yaml")
    config.data.question_ids = [7]
    work = workload(config)
    volume = _volume(config, Path("absent"), None)
    example = Example("", volume, QUESTIONS[7], Truth({}, None), "", "00M", "right")
    features = VolumeFeatures("", torch.empty(work.visual, 1), (1, 1, 1), 1.0)
    prompt = PromptBuilder(load_tokenizer(resolve_model("builtin:base")), config.model.reasoning).build(  # type: ignore[arg-type]
        example, features
    )
    assert work.visual == 288
    assert len(prompt.volume_ids) == work.visual + work.header
    assert len(prompt.question_ids) == work.question


def finished_run(folder: Path, config: Config, steps: list[tuple[float, float, float, float]]) -> None:
    """A GRPO run of so many tokens a completion, share of groups without signal, seconds of training and rollouts."""
    names = ("completion_length", "groups_without_signal", "seconds/train", "seconds/rollout")
    (folder / "grpo").mkdir(parents=True)
    records = [dict(zip(names, step, strict=True)) for step in steps]
    lines = [json.dumps({"step": 0, "reward": 1.0}), *map(json.dumps, records)]
    (folder / "grpo" / "metrics.jsonl").write_text("\n".join(lines))
    (folder / "grpo" / "environment.json").write_text(json.dumps(describe_environment()))
    save_config(config, folder / "grpo" / "config.yaml")


def test_a_run_in_run_dir_says_how_long_completions_are_and_how_fast_the_machine_is(tmp_path: Path) -> None:
    given = [f"run_dir={tmp_path}", "model.device=cpu"]
    config = recipe(*given, path=CONFIGS / "smoke.yaml")
    name = device_name(describe_environment(), is_gpu=False)
    cpu = Hardware(name, 1e11, 1e10, 2e10, is_gpu=False, measured=True, dtype="float32")
    finished_run(tmp_path, config, [(90, 0.0, 50.0, 50.0), (40, 0.25, 2.0, 4.0)])
    found = make_plan(config, cpu)
    assert (found.shape.completion, found.computed) == (40, 0.75)
    assert (found.train_s, found.rollout_s) == (
        pytest.approx(2.0),
        pytest.approx(4.0),
    )  # the same recipe again
    longer = make_plan(recipe(*given, "grpo.volumes_per_step=4", path=CONFIGS / "smoke.yaml"), cpu)
    assert longer.train_s == pytest.approx(4.0, rel=0.01)
    groups = config.grpo.volumes_per_step * config.grpo.questions_per_volume
    (tmp_path / "without").mkdir()
    finished_run(tmp_path / "without", config, [(40, 1.0, 1.0, 4.0)])
    nothing = make_plan(
        recipe(f"run_dir={tmp_path / 'without'}", *given[1:], path=CONFIGS / "smoke.yaml"), cpu
    )
    assert (nothing.computed, nothing.train_s) == (1 / groups, pytest.approx(1.0))  # the one that is computed
    elsewhere = make_plan(config, replace(cpu, name="another"))
    assert (elsewhere.share, elsewhere.pace) == (SHARE, 1)
    assert elsewhere.shape.completion == 40
    assert "that run was on CPU" in elsewhere.assumed[-1]
    (tmp_path / "grpo" / "metrics.jsonl").write_text('{"completion_length": 3}')
    with pytest.raises(ConfigError, match=r"metrics\.jsonl: not the records of a GRPO run.*another run_dir"):
        make_plan(config, cpu)


def test_the_dataset_is_counted_where_it_is(tmp_path: Path) -> None:
    """Volumes by the split files, their slices by the first volume, each asked every question."""
    (tmp_path / "split_files").mkdir()
    nibabel.save(nibabel.Nifti1Image(np.ones((40, 48, 7), np.float32), np.eye(4)), tmp_path / "0.nii.gz")
    rows = [f"{i},00M,s,{i},1,p,{i}.nii.gz," for i in range(3)]
    for split, found in (("train", rows), ("test", rows[:1])):
        lines = [",".join(HEADER), *found]
        (tmp_path / "split_files" / f"{split}_split.csv").write_text("\n".join(lines))
    found = workload(recipe(f"data.root={tmp_path}", "data.question_ids=[1,16]"))
    assert found.volumes == {"train": 3, "test": 1}
    assert (found.questions, found.grid) == (2, (2, 14, 14))
    assert "every volume in " in found.assumed[0]


def test_a_recipe_for_phantoms_is_planned_for_its_own_until_they_are_there(tmp_path: Path) -> None:
    overrides = [f"phantom.{split}_patients={n}" for split, n in (("train", 3), ("val", 2), ("test", 1))]
    config = recipe(f"data.root={tmp_path}", "phantom.max_visits=2", *overrides, path=CONFIGS / "smoke.yaml")
    expected = workload(config)
    assert "the recipe's " in expected.assumed[0]
    write_phantom(config)
    found = workload(config)
    assert (found.volumes, found.grid) == (expected.volumes, expected.grid)


def test_the_machine_at_hand_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hardware, "_SECONDS", 0.05)
    found = measured(recipe("model.device=cpu", "model.dtype=auto"))
    assert (found.dtype, found.is_gpu, found.measured) == ("float32", False, True)
    assert 1e8 < found.flops < 1e14
    assert 1e7 < found.bandwidth < 1e13
    assert found.memory > 1e8


def test_a_machine_is_described_whole_or_not_at_all(refusal: Callable[..., str]) -> None:
    given = ("plan", ONE_GPU)
    assert "--peak-tflops and --memory-gb together" in refusal(*given, "--peak-tflops", "989", code=2)
    assert "together" in refusal(*given, "--bandwidth-gbs", "4800", code=2)
    assert "--memory-gb is -1.0: it must be greater than 0" in refusal(
        *given, "--peak-tflops", "9", "--memory-gb", "-1"
    )


def test_without_a_gpu_the_plan_of_one_asks_for_its_numbers(
    refusal: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert "--peak-tflops and --memory-gb (an H200: 989 and 141)" in refusal("plan", ONE_GPU)


def test_the_time_of_training_is_that_of_the_busiest_rank() -> None:
    config = recipe("grpo.volumes_per_step=3", "ray.num_workers=2", "ray.num_engines=2")
    gpu = described(config, 1, 1, 1)
    shape = TreeShape(100, 10, 20, 8, "sdpa")
    whole = training(config, model_sizes(config.model.path), shape, gpu)
    assert whole.ideal_s * gpu.flops == pytest.approx(whole.whole.executed * 2 / 3, rel=0.05)
