"""The typed configuration: what is refused, how it is said, and that every recipe in `configs/` can be used."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from rl.config import Config, ConfigError, load_config, save_config
from rl.config_check import CHOICES, validate
from rl.geometry import VisionGeometry, cache_bytes, vision_geometry, visual_grid

CONFIGS = Path(__file__).parents[2] / "configs"
RECIPES = sorted(CONFIGS.glob("*.yaml"))
VOLUMES = 7_970
"""All volumes of 3DReasonKnee."""

SERVED = ("engine.kind=openai", "openai.model=gpt")


def published(model: str = "Qwen/Qwen2.5-VL-3B-Instruct") -> VisionGeometry:
    geometry = vision_geometry(model)
    assert geometry is not None
    return geometry


def qwen_config(*overrides: str) -> Config:
    """A configuration that is valid before `overrides` spoil it, and that needs no packaged weights."""
    legal = [
        "data.root=data",
        "model.path=Qwen/Qwen2.5-VL-3B-Instruct",
        "view.height=112",
        "view.width=112",
        "engine.max_model_len=4096",
    ]
    return load_config(None, [*legal, *overrides])


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_every_recipe_resolves_and_is_valid(recipe: Path) -> None:
    validate(load_config(recipe))


def test_the_recipes_for_the_real_data_are_all_there() -> None:
    assert {path.stem for path in RECIPES} >= {
        "demo",
        "smoke",
        "qwen2_5_vl_3b_1gpu",
        "qwen2_5_vl_7b_1gpu",
        "qwen2_5_vl_3b_node4",
        "qwen2_5_vl_3b_ray_cluster",
    }
    assert list((CONFIGS / "slurm").glob("*.sbatch"))


@pytest.mark.parametrize(
    "recipe", [path for path in RECIPES if "qwen" in path.stem], ids=lambda path: path.stem
)
def test_the_cache_size_a_recipe_states_is_the_one_its_view_makes(recipe: Path) -> None:
    config, text = load_config(recipe), recipe.read_text(encoding="utf-8")
    geometry = published(config.model.path)
    frames, rows, columns = visual_grid(config, geometry)
    assert f"{frames} x {rows} x {columns} = {frames * rows * columns:,} visual tokens a volume" in text
    assert f"= {round(cache_bytes(config, geometry, VOLUMES) / 1e9)} GB" in text


def test_a_whole_volume_at_native_size_is_15680_tokens() -> None:
    config = qwen_config("view.height=392", "view.width=392", "phantom.shape=[384,384,160]")
    assert visual_grid(config, published()) == (80, 14, 14)


def test_an_odd_number_of_slices_still_fills_its_last_frame() -> None:
    assert visual_grid(qwen_config("view.crop=[0,9,0,96,0,96]"), published()) == (5, 4, 4)
    assert visual_grid(qwen_config("view.slice_stride=2"), published(), slices=7) == (2, 4, 4)


def test_an_unknown_key_is_refused_and_the_nearest_known_one_named(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text("grpo:\n  num_generation: 4\n")
    with pytest.raises(ConfigError, match=r"run\.yaml.*'grpo\.num_generation'.*'grpo\.num_generations'"):
        load_config(file)
    with pytest.raises(ConfigError, match=r"'model\.lora\.rank'"):
        load_config(None, ["model.lora.rank=8"])


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("grpo.beta=small", "grpo.beta"),
        ("grpo", "key=value"),
        ("seed=0", "data.root"),
        ("view=3", "view is 3: it is a section, set view.crop say"),
        ("data.question_ids=3", r"data.question_ids is 3: give a list, as in data.question_ids=\[3\]"),
    ],
)
def test_a_wrong_type_a_malformed_override_and_a_missing_value_name_the_field(
    override: str, message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        load_config(None, [override])


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"absent\.yaml"):
        load_config(tmp_path / "absent.yaml")


def test_the_resolved_config_reads_back_as_it_was_written(tmp_path: Path) -> None:
    config = qwen_config("grpo.beta=0.04", "rewards.components=[{name: box_iou, params: {threshold: 0.5}}]")
    save_config(config, tmp_path / "config.yaml")
    assert load_config(tmp_path / "config.yaml") == config


THRESHOLD = (
    "rewards.components=[{name: box_iou_threshold, params: %s, "
    "schedule: {parameter: threshold, to: 0.8, by: 0.1, above: 0.5}}]"
)


@pytest.mark.parametrize("field", CHOICES)
def test_a_value_outside_a_choice_names_the_allowed_ones(field: str) -> None:
    with pytest.raises(ConfigError) as error:
        validate(qwen_config(f"{field}=bogus"))
    assert field in str(error.value)
    assert all(choice in str(error.value) for choice in CHOICES[field])


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["view.height=100"], "view.height is 100: .* multiple of 28 .* for example 112"),
        (["engine.max_model_len=512"], "engine.max_model_len is 512: .* at least .* 128 visual tokens"),
        (["grpo.num_generations=1"], "at least 2"),
        (["grpo.temperature=inf"], "grpo.temperature is inf: it must be a finite number"),
        (["run_dir=''"], "run_dir is empty: name a folder"),
        (["compare.bootstrap_draws=1"], "compare.bootstrap_draws is 1: too few for an interval of 95%"),
        (
            ["phantom.reasoned_patients=999"],
            r"phantom.reasoned_patients is 999: .* \(phantom.train_patients\)",
        ),
        (["data.root=''"], "data.root is empty: name a folder"),
        (["embed.cache_dir=''"], "embed.cache_dir is empty: name a folder"),
        (["model.lora.target_modules=[qq]"], r"target_modules has \['qq'\]: .* have q_proj, k_proj"),
        (["grpo.beta=-0.1"], "grpo.beta is -0.1: it must not be negative"),
        (["grpo.epsilon_high=0.1"], "grpo.epsilon_high is 0.1"),
        (["grpo.loss_type=cispo"], "grpo.epsilon_high is 0.28 with loss_type cispo"),
        (["grpo.delta=1.1"], r"grpo.delta is 1.1: it must be above 1 \+ grpo.epsilon_high \(1.28\)"),
        (["grpo.importance_sampling_level=sequence"], "set grpo.loss_type to 'grpo'"),
        (
            ["grpo.overlap=true", "grpo.importance_correction=none"],
            "whose rollouts are one update old: set 'auto'",
        ),
        (["grpo.overlap=true", "grpo.resample_rounds=2"], "grpo.resample_rounds is 2 with grpo.overlap"),
        (["grpo.overlap=true", "engine.sleep=true"], "engine.sleep is true with grpo.overlap"),
        (["grpo.warmup_steps=60"], "below grpo.max_steps"),
        (
            ["grpo.multi_objective_aggregation=normalize_then_sum"],
            "grpo.scale_rewards is 'group' .* set grpo.scale_rewards to 'batch'",
        ),
        (["grpo.temperature=0"], "grpo.temperature is 0.0: it must be greater than 0"),
        (
            ["rewards.components=[{name: box_iou, gate: format}]"],
            "gated by 'format', which is not in the suite",
        ),
        (["rewards.components=[{name: box_iou, gate: box_iou}]"], "circle"),
        (["rewards.components=[{name: box_iou}, {name: box_iou}]"], "twice"),
        (["rewards.components=[{name: box_uoi}]"], "unknown reward 'box_uoi'; did you mean 'box_iou'"),
        (["rewards.components=[{name: 'absent.py:f'}]"], r"absent\.py"),
        (["rewards.components=[{name: box_iou, weight: -1}]"], "no positive weight"),
        (["rewards.components=[]"], "no positive weight"),
        ([THRESHOLD % "{threshold: 0.9}"], "'box_iou_threshold' goes from 0.9 to 0.8 by 0.1: it must rise"),
        ([THRESHOLD % "{}"], "raises 'threshold': give its first value, a number, under params"),
        (["compare.primary_endpoint=auc"], "compare.primary_endpoint is 'auc': use one of accuracy"),
        (["data.question_ids=[0,1,70]"], r"\[0, 70\].* 1 to 69"),
        (["data.question_ids=[3,3]"], "twice"),
        (
            ["sft.train_file=../few.json"],
            "sft.train_file is '../few.json': it must be a file under data.root",
        ),
        (["data.test_file=/data/test.json"], "data.test_file is '/data/test.json': it must be a file under"),
        (["data.box_convention.axes='slice=2,x=0,y=0'"], "one file axis"),
        (["data.box_convention.flip='z'"], "axes of slice, x, y"),
        (["view.crop=[0,4,0,4]"], "six"),
        (["view.crop=[4,4,0,9,0,9]"], "empty or negative along slice"),
        (["view.window_low=99", "view.window_high=1"], "percentiles"),
        (["engine.sleep=true"], "needs 'colocate'"),
        (["engine.gpu_memory_utilization=1.5"], r"in \(0, 1\]"),
        (["model.device=cpu", "ray.gpus_per_worker=1"], "model.device is 'cpu'"),
        (["ray.placement=colocate", "ray.num_engines=2"], "ray.num_engines is 2"),
        (["ray.cpus_per_engine=0"], "ray.cpus_per_engine"),
        (["ray.num_workers=9"], "ray.num_workers is 9: with grpo.volumes_per_step 8"),
        (["sft.validation_volumes=0"], "sft.validation_volumes is 0: it must be greater than 0"),
        (["model.lora.dropout=1"], "model.lora.dropout"),
        (["model.attention=flex", "model.device=cpu"], "where torch cannot train with it: use 'auto'"),
        (["model.attention=subtree", "model.device=cuda"], "whose kernel is one for CPUs.*: use 'auto'"),
        ([*SERVED, "openai.model="], "openai.model is empty"),
        ([*SERVED, "openai.model=GRPO"], "openai.model is 'GRPO', which tables call"),
        ([*SERVED, "openai.base_url=localhost:8000/v1"], "openai.base_url must be like https://HOST/v1"),
        ([*SERVED, "openai.base_url=https://me:pass@host/v1"], "without user, password or query"),
        ([*SERVED, "openai.api_key_env=sk-secret"], "openai.api_key_env must be the name of an environment"),
        ([*SERVED, "openai.max_slices=0"], "openai.max_slices is 0: it must be greater than 0"),
        (["compare.confidence=95"], "between 0 and 1"),
        (["phantom.shape=[96,96]"], "three positive numbers"),
    ],
)
def test_a_rule_across_fields_says_which_field_which_value_and_what_to_do(
    overrides: list[str], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        validate(qwen_config(*overrides))


def test_a_secret_in_the_wrong_setting_is_not_repeated() -> None:
    with pytest.raises(ConfigError) as error:
        validate(
            qwen_config(*SERVED, "openai.api_key_env=sk-secret", "openai.base_url=https://me:secret@host")
        )
    assert "secret" not in str(error.value)


def test_all_problems_are_reported_at_once() -> None:
    with pytest.raises(ConfigError) as error:
        validate(qwen_config("grpo.num_generations=1", "ray.placement=nearby", "sft.patience=0"))
    assert str(error.value).count("\n  - ") == 3


def test_a_gate_may_be_a_function_from_a_file(tmp_path: Path) -> None:
    file = tmp_path / "mine.py"
    file.write_text(
        "from rewards import reward\n\n@reward\ndef brief(completion: str) -> float:\n    return 1.0\n"
    )
    validate(qwen_config(f"rewards.components=[{{name: '{file}:brief'}}, {{name: box_iou, gate: brief}}]"))


def test_the_geometry_of_a_local_model_is_read_from_its_folder(tmp_path: Path) -> None:
    vision = {"patch_size": 8, "spatial_merge_size": 2, "temporal_patch_size": 2, "out_hidden_size": 256}
    (tmp_path / "config.json").write_text(json.dumps({"vision_config": vision}))
    geometry = vision_geometry(str(tmp_path))
    assert geometry is not None
    assert (geometry.pixels_per_token, geometry.hidden_size) == (16, 256)
    (tmp_path / "config.json").write_text(json.dumps({"vision_config": {}}))
    with pytest.raises(ConfigError, match=r"no Qwen2\.5-VL configuration"):
        vision_geometry(str(tmp_path))


def test_an_unknown_hub_model_is_not_judged_by_size() -> None:
    validate(qwen_config("model.path=someone/fine-tuned-qwen", "view.height=100"))
