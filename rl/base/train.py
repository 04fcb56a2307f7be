"""The command that made the stand-in base: phantoms, tokenizer, tower, language model, weights in bfloat16.

Each of the three phases of training leaves its weights in `phases/`; a command that was interrupted goes on after the
last one that ended.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_model, save_model
from torch import nn

from rewards.ontology import BENCHMARK_QUESTION_IDS
from rl.base.answers import FULL, AnswerTrees
from rl.base.corpus import knee_example, tokenizer_corpus
from rl.base.knees import make_knees
from rl.base.language import LanguageTrainer, OnStep
from rl.base.model import build_model, build_tokenizer, ease_learning, save_base
from rl.base.vision import embed_knees, train_tower, whiten_tower
from rl.config import Config, ConfigError
from rl.errors import writing
from rollouts.volumes import PatchSizes

OnProgress = Callable[[int, int, str], None]
_CORPUS_KNEES = 20
_WHITENING_KNEES = 200


def train_base(config: Config, on_progress: OnProgress = lambda done, total, note: None) -> Path:
    """Train on phantom patients that no dataset split holds; deterministic in `base.seed` on one machine.

    It is asked about `data.question_ids`, or about the 62 of the benchmark when that is empty.

    Returns:
        `base.out_dir`, a folder like a downloaded checkpoint.
    Raises:
        ConfigError: too few questions to ask a volume some in full and some as lookups.
    """
    settings = config.base
    folder = Path(settings.out_dir)
    question_ids = list(config.data.question_ids or BENCHMARK_QUESTION_IDS)
    if len(question_ids) <= FULL:
        raise ConfigError(
            f"data.question_ids has {len(question_ids)} questions, and a base model is taught with at least "
            f"{FULL + 1}: name more, or none for the 62 of the benchmark"
        )
    total = settings.knees + settings.vision_steps + settings.lookup_steps + settings.answer_steps

    sizes = PatchSizes(8, 2, 2)
    knees = []
    for knee in make_knees(settings.knees, settings.seed, config.phantom, config.view, sizes):
        knees.append(knee)
        on_progress(len(knees), total, "knees drawn")
    examples = [
        knee_example(knee, i, question_id, config.phantom)
        for i, knee in enumerate(knees[:_CORPUS_KNEES])
        for question_id in question_ids
    ]
    tokenizer = build_tokenizer(tokenizer_corpus(examples), settings.vocab_size)
    model = build_model(tokenizer, settings.seed)
    ease_learning(model)
    made_from = {
        "phantom": asdict(config.phantom),
        "view": asdict(config.view),
        "questions": question_ids,
        **{name: getattr(settings, name) for name in ("knees", "seed", "vocab_size")},
    }
    phases = _Phases(model, folder / "phases", on_progress, settings.knees, total, made_from)

    def vision(steps: int, on_step: OnStep) -> None:
        tower, rate = model.model.visual, settings.vision_learning_rate
        train_tower(tower, knees, sizes, steps=steps, learning_rate=rate, seed=settings.seed, on_step=on_step)
        whiten_tower(tower, knees[:_WHITENING_KNEES], sizes)
        for weights in tower.parameters():  # the language model learns from what is shipped
            weights.data = weights.data.to(torch.bfloat16).to(torch.float32)

    phases.run("vision", settings.vision_steps, settings.vision_learning_rate, vision)
    data = AnswerTrees(
        knees,
        embed_knees(model.model.visual, knees, sizes),
        tokenizer,
        config.phantom,
        float(model.config.vision_config.tokens_per_second),
        sizes.merge,
    )
    trainer = LanguageTrainer(
        model, data, question_ids, learning_rate=settings.language_learning_rate, seed=settings.seed
    )
    phases.run("lookup", settings.lookup_steps, settings.language_learning_rate, trainer.lookup)
    phases.run("answer", settings.answer_steps, settings.language_learning_rate, trainer.answer)
    save_base(folder, model, tokenizer, torch.bfloat16)
    return folder


@dataclass
class _Phases:
    """Runs phases of training; one that has ended before, from the same settings, is loaded instead."""

    model: nn.Module
    folder: Path
    on_progress: OnProgress
    done: int
    total: int
    made_from: dict[str, Any]
    """All settings that the weights depend on, up to the phase that is running."""

    def run(self, name: str, steps: int, rate: float, train: Callable[[int, OnStep], None]) -> None:
        self.made_from |= {f"{name}_steps": steps, f"{name}_rate": rate}
        file, key = self.folder / f"{name}.safetensors", json.dumps(self.made_from)
        if _made_from(file) == key:
            load_model(self.model, file)
        else:
            train(steps, self._on_step)
            with writing(file):
                self.folder.mkdir(parents=True, exist_ok=True)
                save_model(self.model, f"{file}.tmp", {"made_from": key})
                Path(f"{file}.tmp").replace(file)
        self.done += steps

    def _on_step(self, step: int, stats: dict[str, float]) -> None:
        note = "  ".join(f"{name} {value:.3f}" for name, value in stats.items())
        self.on_progress(self.done + step + 1, self.total, note)


def _made_from(file: Path) -> str | None:
    if not file.exists():
        return None
    with safe_open(file, framework="pt") as opened:
        return (opened.metadata() or {}).get("made_from")
