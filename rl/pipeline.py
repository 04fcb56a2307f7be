"""What each stage does. The CLI, the demo and `rl.launch` run these; `rl.stages` decides which need running.

Every function takes the config and a progress bar and returns what came out and where it is.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from accelerate import Accelerator

from rl.base.train import train_base
from rl.bench.answers import META_FILE, BenchRun, read_run
from rl.bench.arms import Arm, compare_arms, pairs_of, verdicts
from rl.bench.console import print_headlines
from rl.bench.metrics import grade_run
from rl.bench.report import write_report
from rl.compared import own_folders, runs_to_compare
from rl.config import Config, ConfigError
from rl.config_check import OWN_RUNS
from rl.controls import continue_sft, train_on_best_of_g
from rl.data.boxes import parse_convention
from rl.data.check import require_best_convention
from rl.data.examples import load_examples
from rl.data.layout import SPLITS, data_root, read_split, split_file
from rl.data.phantom.dataset import write_phantom
from rl.data.phantom.preview import save_preview
from rl.engine import start_engine
from rl.environment import pick_device
from rl.evaluate import evaluate, evaluate_baselines, is_current
from rl.grpo import train_grpo
from rl.imported import Imported, import_results
from rl.model import resolve_model
from rl.progress import StageProgress
from rl.sft import train_sft
from rl.stages import (
    STAGES,
    eval_folder,
    move_aside,
    require_finished,
    served_folder,
    setting_of,
    sft_adapter,
    trained_adapters,
)
from rl.task import feature_dtypes
from rollouts.cache import EmbeddingCache
from rollouts.embed import embed_examples
from rollouts.types import Engine
from rollouts.vision import VisionTower
from rollouts.volumes import read_volume

__all__ = ["BASE", "BASELINE", "BEST_OF_G", "GRPO", "SFT", "SFT_CONTINUED", "STAGES"]

BASELINE, PRIOR, BASE, SFT, GRPO, SFT_CONTINUED, BEST_OF_G = OWN_RUNS
PREVIEW = "preview.png"


def run_phantom(config: Config, progress: StageProgress) -> str:
    """Write the phantom dataset, and a picture of one knee to look at."""
    root = write_phantom(config, lambda done, total: progress.update(done, total, "patients"))
    rows = [row for split in SPLITS for row in read_split(root, split)]
    knee = read_volume(root / rows[-1].image)
    save_preview(root / PREVIEW, knee.array, knee.spacing_mm)
    patients = len({row.patient_id for row in rows})
    return f"{len(rows)} knees of {patients} patients in {root}, one of them as {PREVIEW}"


def run_base(config: Config, progress: StageProgress) -> str:
    """Train the stand-in base model from nothing."""
    return f"base model in {train_base(config, progress.update)}"


def run_embed(config: Config, progress: StageProgress) -> str:
    """Every volume of the three splits through the vision tower, once."""
    compute, storage = feature_dtypes(config)
    root = data_root(config)
    there = [split for split in SPLITS if split_file(root, split).exists()]
    volumes = [
        volume
        for split in there or SPLITS  # without any, reading the first says which file is missing
        for volume in load_examples(config, split).volumes().values()
    ]
    keys = embed_examples(
        volumes,
        VisionTower(resolve_model(config.model.path), pick_device(config.model.device), compute),
        EmbeddingCache(config.embed.cache_dir),
        config.view,
        axes=parse_convention(config.data.box_convention).axes,
        storage_dtype=storage,
        progress=lambda done, total: progress.update(done, total, "volumes"),
        log=progress.log,
    )
    return f"features of {len(keys)} volumes in {config.embed.cache_dir}"


def run_sft(config: Config, progress: StageProgress) -> str:
    """LoRA SFT from the base."""
    require_best_convention(config)
    return _sft_summary(train_sft(config, lambda record: _show_sft(record, progress)))


def _show_sft(record: dict[str, float], progress: StageProgress) -> None:
    if "val_loss" in record:
        progress.log(f"epoch {record['epoch']:.0f}: validation loss {record['val_loss']:.4f}")
    else:
        note = f"steps at most, loss {record['loss']:.3f}" if "loss" in record else "steps sampled"
        progress.update(int(record["step"]), int(record["steps"]), note)


def _sft_summary(adapter: Path) -> str:
    summary = json.loads((adapter.parent / "summary.json").read_text(encoding="utf-8"))
    return (
        f"validation loss {summary['best_loss']:.4f} after epoch {summary['best_epoch']} of {summary['epoch']}; "
        f"adapter in {adapter}"
    )


def require_sft(config: Config) -> None:
    """Refuse to start GRPO from an adapter that is missing or half-trained.

    Raises:
        ConfigError: there is none.
        StageError: SFT has not finished.
    """
    adapter = sft_adapter(config)
    if not config.grpo.init_adapter:
        require_finished(config, "sft", "run `reasonknee sft` to let it go on, or name a grpo.init_adapter")
    if not adapter.is_dir():
        raise ConfigError(
            f"GRPO starts from an SFT adapter and {adapter} does not exist; run `reasonknee sft` first"
        )


def run_grpo(config: Config, progress: StageProgress) -> str:
    """GRPO from the SFT adapter, in this process, with an engine of its own."""
    require_sft(config)
    require_best_convention(config)
    progress.log(f"starting the {config.engine.kind} engine")
    engine = start_engine(config)
    try:
        adapter = train_grpo(
            config,
            engine,
            Accelerator(cpu=pick_device(config.model.device).type == "cpu"),
            lambda record: show_grpo(record, progress),
        )
    finally:
        engine.close()
    return f"adapter in {adapter}; curves: tensorboard --logdir {adapter.parent}"


def show_grpo(record: dict[str, float], progress: StageProgress) -> None:
    """A step's rewards on the bar."""
    names = [name for name in record if name.startswith("reward/")]
    rewards = [f"{name.removeprefix('reward/')} {record[name]:.3f}" for name in names]
    above = f"reward {record['reward']:.3f} ({record['reward_above_prior']:+.3f} to the prior)"
    note = "  ".join([above, *rewards])
    progress.update(int(record["step"]), int(record["steps"]), note)


def run_sft_continued(config: Config, progress: StageProgress) -> str:
    """A control arm: SFT for the time that GRPO took."""
    require_finished(config, "grpo", "run `reasonknee grpo` to let it go on")
    return _sft_summary(continue_sft(config, lambda record: _show_sft(record, progress)))


def run_sft_best_of_g(config: Config, progress: StageProgress) -> str:
    """A control arm: SFT on the best of G samples, for the time that GRPO took."""
    require_finished(config, "grpo", "run `reasonknee grpo` to let it go on")
    return _sft_summary(train_on_best_of_g(config, lambda record: _show_sft(record, progress)))


def run_eval(config: Config, progress: StageProgress) -> str:
    """The benchmark for base, SFT, GRPO and the control arms, as far as they exist; beside the baselines if usual."""
    made = [] if setting_of(config) else [*evaluate_baselines(config, Path(config.run_dir) / "eval")]
    adapters: dict[str, Path | None] = {BASE: None, **trained_adapters(config)}
    folders = {eval_folder(config, name): adapter for name, adapter in adapters.items()}
    wanted = [folder for folder, adapter in folders.items() if not is_current(config, adapter, folder)]
    for folder in folders.keys() - set(wanted):
        progress.log(f"{folder.name}: has answered already, with the same model, data and settings")
    if wanted:
        with _engine_for_benchmark(config, progress) as engine:
            for number, folder in enumerate(wanted):

                def show(done: int, total: int, number: int = number, name: str = folder.name) -> None:
                    progress.update(number * total + done, len(wanted) * total, name)

                if (folder / META_FILE).exists():
                    moved = move_aside(Path(config.run_dir), "eval", [folder])
                    progress.log(
                        f"{folder.name}: former answers, of another model or other settings, are now in {moved}"
                    )
                evaluate(config, engine, folder.name, folders[folder], folder, show)
    names = ", ".join([*made, *(folder.name for folder in folders)])
    return f"answers of {names} in {eval_folder(config, BASE).parent}"


@contextmanager
def _engine_for_benchmark(config: Config, progress: StageProgress) -> Iterator[Engine]:
    """The engine in this process's charge, or `ray.num_engines` of them under Ray; closed in the end."""
    if config.ray.num_engines > 1:
        from rl.pool import engines_alone  # Ray takes seconds to load

        with engines_alone(config, progress) as pool:
            yield pool
        return
    progress.log(f"starting the {config.engine.kind} engine")
    engine = start_engine(config)
    try:
        yield engine
    finally:
        engine.close()


def run_served(config: Config, progress: StageProgress) -> str:
    """The benchmark for a model behind an endpoint."""
    from rl.bench.served import evaluate_served  # its client takes seconds to load

    folder, model = served_folder(config), config.openai.model
    run = evaluate_served(config, folder, lambda done, total: progress.update(done, total, "answers"))
    return f"{run.meta.n} answers of {model} in {folder}"


def read_runs(config: Config) -> dict[str, BenchRun]:
    """The runs that `eval` makes with this configuration, as far as they exist; baselines first."""
    return {name: read_run(folder) for name, folder in own_folders(config).items()}


def run_import(config: Config, name: str, paths: Sequence[Path]) -> Imported:
    """Result files of the public baseline as a run that `compare` knows by this name; see `rl.imported`.

    Raises:
        ConfigError: the name is one of ours.
    """
    if name in OWN_RUNS:
        raise ConfigError(f"{name!r} is the name of a run that `reasonknee eval` makes; choose another")
    return import_results(config, name, paths)


def run_compare(config: Config, progress: StageProgress, *words: str) -> str:
    """Paired comparison of every further arm with the first, verdict and report.

    Args:
        words: the arms, each a run or several separated by commas (`rl.compared`).

    Raises:
        ConfigError, CompareError: see `runs_to_compare`.
    """
    compared = runs_to_compare(config, words)
    graded = {label: grade_run(run) for label, run in compared.runs.items()}
    arms = [Arm(name, tuple(graded[label] for label in labels)) for name, labels in compared.arms.items()]
    progress.log(f"resampling patients {config.compare.bootstrap_draws:,} times")
    comparisons = compare_arms(arms, config.compare, config.seed)
    metrics = Path(config.run_dir) / "grpo" / "metrics.jsonl"
    report = write_report(
        Path(config.run_dir),
        compared.runs,
        graded,
        comparisons,
        metrics if metrics.exists() else None,
        parse_convention(config.data.box_convention).axes,
        config.rewards,
    )
    if len(pairs_of(comparisons)) > 1:
        print_headlines(comparisons, progress.console)
    paragraphs = "\n\n".join(verdicts(comparisons))
    return f"{paragraphs}\nreport and tables in {report}"
