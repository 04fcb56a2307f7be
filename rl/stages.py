"""The stages of a run: what each depends on, whether it needs doing, and what becomes of its former results.

A stage leaves a record of its inputs (`rl.stage_inputs`) and whether it came to its end. With the same inputs a
finished stage is skipped and an interrupted one goes on from its last checkpoint. With other inputs its results are
out of date; they may have taken days, so nothing is ever deleted: a stage asked for by name refuses and says what
has changed, `--again` and the demo move them to `<run_dir>/old/` and begin anew.

The stages' functions are in `rl.pipeline`, imported when one has to run: torch takes seconds to load.
"""

from __future__ import annotations

import fcntl
import importlib
import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Literal

from rewards.errors import ReasonKneeError
from rl import stage_inputs as inputs
from rl.choices import OWN_PROMPTS, split_of
from rl.config import Config, ConfigError, save_config
from rl.config_check import TRAINED_RUNS
from rl.data.layout import Split
from rl.data.phantom.marker import refuse_other_data
from rl.errors import write_atomically
from rl.progress import StageProgress, clock
from rl.quiet import quiet_bars
from rl.stage_inputs import Inputs

Run = Callable[[Config, StageProgress], str | None]
"""Does a stage. Returns what came out and where it is, one line or more."""


class StageError(ReasonKneeError, RuntimeError):
    """A stage cannot be done as things are; the message says what has changed, or what to do first."""


@dataclass(frozen=True)
class Stage:
    """One step of the path."""

    name: str
    title: str
    inputs: Callable[[Config], Inputs]
    results: Callable[[Config], list[Path]]
    """What it leaves: all are looked for before it is skipped."""
    costly: bool = False
    """Former results are never written over: moved aside when the inputs have changed, or refused."""
    kept_when_again: bool = False
    """Moved aside by `--again`; the others write over what they made."""
    looks_itself: bool = False
    """Asked for by name, it always runs: it finds out in seconds what is left to do."""
    run: Run | None = None
    """None: `rl.pipeline.run_<name>`."""


def run_stage(
    config: Config,
    stage: Stage,
    *,
    again: bool = False,
    outdated: Literal["refuse", "move"] = "refuse",
    skip: bool = True,
) -> float | None:
    """Do a stage unless it is done, and print what came out. Returns its seconds, None when it was skipped.

    Args:
        again: begin anew even when nothing has changed; former results are moved to `<run_dir>/old/`.
        outdated: what to do with results of a costly stage that were made from other inputs.
        skip: False runs it even when it is done.
    Raises:
        StageError: there are results made from other inputs, and `outdated` is "refuse".
    """
    now = stage.inputs(config)
    record_path = _record_path(config, stage)
    before, done = read_record(record_path)
    changes = now.changes_since(before) if before else ["no record says what they were made from"]
    former = [path for path in stage.results(config) if path.exists()]
    complete = len(former) == len(stage.results(config))
    if skip and not again and done and complete and before == now:
        return None
    out_of_date = (stage.costly and changes) or (stage.kept_when_again and again)
    must_move = bool(former and out_of_date and (before is None or _has_figures(former)))
    if must_move and not again and outdated == "refuse":
        raise StageError(_refusal(stage, former, changes))
    with _alone(record_path, stage), StageProgress(stage.title) as progress:
        if must_move:
            moved = move_aside(Path(config.run_dir), stage.name, [*former, record_path])
            why = "; ".join(changes) or "asked for again"
            progress.log(f"{stage.title}: {why}; the former results are now in {moved}")
        save_config(config, _made(Path(config.run_dir)) / "config.yaml")
        write_record(record_path, now, done=False, seconds=0.0)
        quiet_bars()
        started = time.monotonic()
        summary = (stage.run or _function(stage.name))(config, progress)
        seconds = time.monotonic() - started
        write_record(record_path, now, done=True, seconds=seconds)
        progress.log(f"{stage.title}: {summary or 'done'} ({clock(seconds)})")
    return seconds


@contextmanager
def _alone(record_path: Path, stage: Stage) -> Iterator[None]:
    """Keeps a second process from doing the same stage of the same run at once.

    Raises:
        StageError: another process is at it.
    """
    lock = _made(record_path.parent) / f"{stage.name}.lock"
    with lock.open("w") as held:
        try:
            fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise StageError(
                f"another process is doing {stage.title} of this run (it holds {lock})"
            ) from error
        except OSError:  # a file system without locks: then there is no guard
            pass
        yield


def require_finished(config: Config, name: str, remedy: str) -> None:
    """Refuse to build on a stage that was begun and has not come to its end.

    Raises:
        StageError: it has not.
    """
    path = _record_path(config, STAGES[name])
    before, done = read_record(path)
    if before and not done:
        raise StageError(f"{STAGES[name].title} has not finished ({path}): {remedy}")


def move_aside(run_dir: Path, label: str, paths: Sequence[Path]) -> Path:
    """Move results to a new folder `<run_dir>/old/<label>-<n>`, which is returned."""
    n = 1
    while (target := run_dir / "old" / f"{label}-{n}").exists():
        n += 1
    target.mkdir(parents=True)
    for path in paths:
        if path.exists():
            path.rename(target / path.name)
    return target


_FIGURES = ("metrics.jsonl", "run.json", "journal.jsonl")


def _has_figures(results: Sequence[Path]) -> bool:
    """Whether anything was computed: not so in the folder of a run that stopped at a missing file, say."""
    return any(any(path.rglob(name)) for path in results for name in _FIGURES)


def _refusal(stage: Stage, former: Sequence[Path], changes: Sequence[str]) -> str:
    return (
        f"{', '.join(map(str, former))} was made from other inputs: {'; '.join(changes)}. Set another run_dir to keep "
        f"both, or give --again to begin {stage.title} anew (the former results are then moved to old/)"
    )


def _function(name: str) -> Callable[..., str]:
    function: Callable[..., str] = getattr(
        importlib.import_module("rl.pipeline"), f"run_{name.replace('-', '_')}"
    )
    return function


def _record_path(config: Config, stage: Stage) -> Path:
    if stage.name == "phantom":  # several runs may share one dataset
        return Path(config.phantom.out_dir).expanduser() / "phantom-stage.json"
    return Path(config.run_dir) / "stages" / f"{stage.name}.json"


def read_record(path: Path) -> tuple[Inputs | None, bool]:
    """Inputs of the record and whether the stage came to its end."""
    if not path.exists():
        return None, False
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        return Inputs(record["settings"], record["files"]), bool(record["done"])
    except (ValueError, KeyError, TypeError) as error:
        raise StageError(
            f"{path}: not a record of a stage ({error!r}); delete it to do the stage anew"
        ) from error


def write_record(path: Path, now: Inputs, *, done: bool, seconds: float) -> None:
    """What a stage or a benchmark run is made from, on disk."""
    record = {"done": done, "seconds": round(seconds, 1), **asdict(now)}
    write_atomically(_made(path.parent) / path.name, json.dumps(record, indent=2) + "\n")


def _made(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def sft_adapter(config: Config) -> Path:
    """The adapter GRPO starts from."""
    return Path(config.grpo.init_adapter or Path(config.run_dir) / "sft" / "adapter")


_FEATURES = ("view", "model.path", "model.dtype", "embed.dtype", "data.box_convention.axes")
_TASK = ("seed", "data", "view", "model", "embed")


def _phantom_inputs(config: Config) -> Inputs:
    refuse_other_data(Path(config.phantom.out_dir).expanduser())
    return Inputs(inputs.settings(config, "phantom", "data.question_ids"), {})


def _embed_inputs(config: Config) -> Inputs:
    shown = inputs.volumes(config, ("train", "val", "test"), masks=False, modified=True)
    # the cache's index knows files by their path: those of a dataset that was moved are hashed once more
    chosen = {"data.root": config.data.root, **inputs.settings(config, *_FEATURES)}
    return Inputs(chosen, {"data/volumes": shown, **inputs.model_files(config)})


def _sft_inputs(config: Config) -> Inputs:
    begun_on = deepcopy(config)
    begun_on.data.train_file = config.sft.train_file or config.data.train_file
    files = inputs.dataset(begun_on, ("train", "val")) | inputs.model_files(config)
    if config.sft.init_adapter:
        files |= inputs.adapter_files(Path(config.sft.init_adapter), "sft.init_adapter")
    return Inputs(inputs.settings(config, *_TASK, "sft"), files)


def _grpo_inputs(config: Config) -> Inputs:
    if config.engine.kind == "openai":
        raise ConfigError(
            "engine.kind is 'openai', which is for `reasonknee eval` alone: GRPO needs an engine that takes cached "
            "features and adapters and gives log-probabilities; set engine.kind to vllm or hf"
        )
    chosen = [*_TASK, "grpo", "rewards", "engine.kind"]
    splits: list[Split] = ["train"]
    if config.grpo.eval_steps:  # the validation split decides which adapter is kept
        splits.append("val")
        chosen += ["compare.primary_endpoint", "eval.max_completion_length"]
    files = inputs.dataset(config, splits) | inputs.model_files(config) | inputs.reward_files(config)
    files |= inputs.adapter_files(sft_adapter(config), "the SFT adapter")
    return Inputs(inputs.settings(config, *chosen), files)


def _control_inputs(config: Config) -> Inputs:
    begun, trained = _sft_inputs(config), _grpo_inputs(config)
    adapter = inputs.adapter_files(Path(config.run_dir) / "grpo" / "adapter", "the GRPO adapter")
    return Inputs(begun.settings | trained.settings, begun.files | trained.files | adapter)


def eval_inputs(config: Config, adapters: Mapping[str, Path]) -> Inputs:
    """What the benchmark of the base and of models with these adapters depends on."""
    files = inputs.dataset(config, ("train", split_of(config)))
    files |= inputs.model_files(config) | inputs.question_file(config)
    for name, adapter in adapters.items():
        files |= inputs.adapter_files(adapter, f"the adapter of {name}")
    return Inputs(inputs.settings(config, *_TASK, "eval", "rewards.reader", "engine.kind"), files)


def setting_of(config: Config) -> str:
    """The setting of the benchmark as the end of a run's name, `none` or `questions_guided-true_region` say.

    Empty for what is usual: the volume shown, our own wording.
    """
    parts = [] if config.eval.prompts == OWN_PROMPTS else [Path(config.eval.prompts).stem]
    return "-".join([*parts, *([] if config.eval.image == "volume" else [config.eval.image])])


def run_name(config: Config, name: str) -> str:
    """How tables call the run of a model in the setting of the benchmark: `GRPO`, or `GRPO-none`."""
    return "-".join(filter(None, [name, setting_of(config)]))


def eval_folder(config: Config, name: str) -> Path:
    """Where the answers of a model of this run are: those of another setting lie beside the usual ones."""
    return Path(config.run_dir) / ("settings" if setting_of(config) else "eval") / run_name(config, name)


def trained_adapters(config: Config) -> dict[str, Path]:
    """The adapters of a run that exist, by the name of their run in the benchmark."""
    folders = {name: Path(config.run_dir) / name.lower() / "adapter" for name in TRAINED_RUNS}
    return {name: folder for name, folder in folders.items() if folder.is_dir()}


def _eval_inputs(config: Config) -> Inputs:
    return eval_inputs(config, trained_adapters(config))


def _in_run(*names: str) -> Callable[[Config], list[Path]]:
    return lambda config: [Path(config.run_dir) / name for name in names]


def served_folder(config: Config) -> Path:
    """Where the benchmark run of the served model is, apart from those of the models of this run."""
    return Path(config.run_dir) / "served" / run_name(config, config.openai.model.replace("/", "--"))


def _served_inputs(config: Config) -> Inputs:
    chosen = ("seed", "data", "view", "model.reasoning", "eval", "rewards.reader", "openai")
    files = inputs.dataset(config, (split_of(config),)) | inputs.question_file(config)
    return Inputs(inputs.settings(config, *chosen), files)


def stage_of(config: Config, name: str) -> Stage:
    """The stage by its name; `eval` may be that of a model served elsewhere, or of another setting."""
    setting = setting_of(config)
    if name == "compare" and setting:
        return comparison_of(run_name(config, "SFT"), run_name(config, "GRPO"))
    if name == "eval" and setting and config.engine.kind != "openai":
        return replace(
            STAGES[name],
            name=f"eval-{setting}",
            title=f"benchmark, {setting}",
            results=lambda config: [
                eval_folder(config, model) for model in ("base", *trained_adapters(config))
            ],
            run=lambda config, progress: _function("eval")(config, progress),
        )
    if name != "eval" or config.engine.kind != "openai":
        return STAGES[name]
    folder = served_folder(config)
    return Stage(
        f"eval-{folder.name}",
        f"benchmark of {config.openai.model}",
        _served_inputs,
        lambda config: [folder],
        kept_when_again=True,
        run=lambda config, progress: _function("served")(config, progress),
    )


def comparison_of(*arms: str) -> Stage:
    """The comparison of these arms, given as `reasonknee compare` takes them; the first is the reference."""

    def what_it_reads(config: Config) -> Inputs:
        chosen = {"runs": list(arms), **inputs.settings(config, "seed", "compare", "rewards.reader")}
        return Inputs(chosen, inputs.run_files(_in_run("eval", "settings", "served", "imported")(config)))

    def run(config: Config, progress: StageProgress) -> str | None:
        return _function("compare")(config, progress, *arms)

    results = _in_run("report.html", "results.json")
    return Stage("compare", "comparison", what_it_reads, results, looks_itself=True, run=run)


STAGES = {
    stage.name: stage
    for stage in (
        Stage(
            "phantom",
            "phantoms",
            _phantom_inputs,
            lambda config: [Path(config.phantom.out_dir).expanduser() / "generate_data" / "test.json"],
        ),
        Stage(
            "embed", "embed", _embed_inputs, lambda config: [Path(config.embed.cache_dir)], looks_itself=True
        ),
        Stage("sft", "SFT", _sft_inputs, _in_run("sft"), costly=True, kept_when_again=True),
        Stage("grpo", "GRPO", _grpo_inputs, _in_run("grpo"), costly=True, kept_when_again=True),
        Stage("eval", "benchmark", _eval_inputs, _in_run("eval"), kept_when_again=True),
        comparison_of("SFT", "GRPO"),
    )
}
"""Every stage of the demo, in order. `base` is not among them: its result ships with the package."""

CONTROLS = [
    Stage(name, title, _control_inputs, _in_run(name), costly=True, kept_when_again=True)
    for name, title in (("sft-continued", "SFT continued"), ("sft-best-of-g", "SFT on the best of G"))
]
"""What else the time of a GRPO run could have been spent on; `eval` and the tables take them up where they exist."""
