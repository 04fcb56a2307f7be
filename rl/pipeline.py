"""What each stage does. The CLI and the demo run these; `rl.stages` decides which need running."""

from __future__ import annotations

from pathlib import Path

from accelerate import Accelerator

from rl.base.train import train_base
from rl.bench.answers import BenchRun, read_run
from rl.bench.compare import compare, verdict
from rl.bench.report import write_report
from rl.config import Config, ConfigError
from rl.data.boxes import parse_convention
from rl.data.check import require_best_convention
from rl.data.examples import load_examples
from rl.data.layout import split_file
from rl.data.phantom.dataset import write_phantom
from rl.engine import start_engine
from rl.environment import pick_device, pick_dtype
from rl.evaluate import evaluate, evaluate_baselines
from rl.grpo import train_grpo
from rl.model import resolve_model
from rl.progress import StageProgress
from rl.sft import train_sft
from rl.stages import Stage
from rl.task import feature_dtypes
from rollouts.cache import EmbeddingCache
from rollouts.embed import embed_examples
from rollouts.vision import VisionTower

BASELINE, BASE, SFT, GRPO = "baseline", "base", "SFT", "GRPO"
"""Names of the runs `eval` makes."""


def phantom(config: Config, progress: StageProgress) -> None:
    """Write the phantom dataset."""
    write_phantom(config, lambda done, total: progress.update(done, total, "visits"))


def base(config: Config, progress: StageProgress) -> None:
    """Train the stand-in base model from nothing."""
    train_base(config, progress.update)


def embed(config: Config, progress: StageProgress) -> None:
    """Every volume of the three splits through the vision tower, once."""
    compute, storage = feature_dtypes(config)
    tower = VisionTower(resolve_model(config.model.path), pick_device(config.model.device), compute)
    volumes = [
        volume
        for split in ("train", "val", "test")
        if split_file(Path(config.data.root), split).exists()
        for volume in load_examples(config, split).volumes().values()
    ]
    embed_examples(
        volumes,
        tower,
        EmbeddingCache(config.embed.cache_dir),
        config.view,
        axes=parse_convention(config.data.box_convention).axes,
        storage_dtype=storage,
        progress=lambda done, total: progress.update(done, total, "volumes"),
        log=progress.log,
    )


def sft(config: Config, progress: StageProgress) -> None:
    """LoRA SFT from the base."""
    require_best_convention(config)
    best = float("inf")

    def show(record: dict[str, float]) -> None:
        nonlocal best
        if "val_loss" in record:
            best = min(best, record["val_loss"])
            progress.log(
                f"epoch {record['epoch']:.0f}: validation loss {record['val_loss']:.4f} (best {best:.4f})"
            )
        else:
            progress.update(int(record["step"]), int(record["steps"]), f"at most; loss {record['loss']:.3f}")

    train_sft(config, show)


def grpo(config: Config, progress: StageProgress) -> None:
    """GRPO from the SFT adapter, in this process, with an engine of its own."""
    require_best_convention(config)

    def show(record: dict[str, float]) -> None:
        parts = [f"reward {record['reward']:.3f}"]
        parts += [
            f"{k.removeprefix('reward/')} {v:.3f}" for k, v in record.items() if k.startswith("reward/")
        ]
        progress.update(int(record["step"]), int(record["steps"]), "  ".join(parts))

    engine = start_engine(config)
    try:
        train_grpo(config, engine, Accelerator(cpu=pick_device(config.model.device).type == "cpu"), show)
    finally:
        engine.close()


def evaluation(config: Config, progress: StageProgress) -> None:
    """The benchmark for base, SFT and GRPO (those that exist), next to the baselines."""
    run_dir = Path(config.run_dir)
    adapters: dict[str, Path | None] = {BASE: None}
    for name in (SFT, GRPO):
        trained = run_dir / name.lower() / "adapter"
        if trained.is_dir():
            adapters[name] = trained
    evaluate_baselines(config, run_dir / "eval" / BASELINE)
    engine = start_engine(config)
    try:
        for number, (name, adapter) in enumerate(adapters.items()):

            def show(done: int, total: int, number: int = number, name: str = name) -> None:
                progress.update(number * total + done, len(adapters) * total, name)

            evaluate(config, engine, name, adapter, run_dir / "eval" / name, show)
    finally:
        engine.close()


def read_runs(config: Config) -> dict[str, BenchRun]:
    """The runs under `<run_dir>/eval`, baselines first."""
    folder = Path(config.run_dir) / "eval"
    names = [name for name in (BASELINE, BASE, SFT, GRPO) if (folder / name / "run.json").exists()]
    if not names:
        raise ConfigError(f"{folder} has no benchmark run; run `reasonknee eval` first")
    return {name: read_run(folder / name) for name in names}


def comparison(config: Config, progress: StageProgress, a: str = SFT, b: str = GRPO) -> None:
    """Paired comparison of two runs, verdict and report."""
    runs = read_runs(config)
    for name in (a, b):
        if name not in runs:
            path = Path(name)
            if not (path / "run.json").exists():
                raise ConfigError(
                    f"no run {name!r}: it is none of {', '.join(runs)} and no folder with a run.json"
                )
            runs[name] = read_run(path)
    result = compare(runs[a], runs[b], config.compare, config.seed)
    metrics = Path(config.run_dir) / "grpo" / "metrics.jsonl"
    report = write_report(
        Path(config.run_dir),
        runs,
        result,
        metrics if metrics.exists() else None,
        parse_convention(config.data.box_convention).axes,
    )
    progress.log(f"\n{verdict(result)}\n\nreport: {report}")


_DATA = ("data", "view", "model", "embed")

STAGES = {
    stage.name: stage
    for stage in (
        Stage("phantom", "phantoms", phantom, ("phantom",), outputs=()),
        Stage("embed", "embed", embed, _DATA, after=("phantom",)),
        Stage("sft", "SFT", sft, (*_DATA, "sft"), after=("embed",), outputs=("sft",)),
        Stage("grpo", "GRPO", grpo, (*_DATA, "rewards", "grpo", "engine"), after=("sft",), outputs=("grpo",)),
        Stage(
            "eval",
            "benchmark",
            evaluation,
            (*_DATA, "rewards", "eval"),
            after=("sft", "grpo"),
            outputs=("eval",),
        ),
        Stage("compare", "comparison", comparison, ("compare",), after=("eval",), outputs=("report.html",)),
    )
}
"""Every stage of the demo, in order. `base` is not among them: its result ships with the package."""
