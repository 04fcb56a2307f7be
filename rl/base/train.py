"""The command that made the stand-in base: phantoms, tokenizer, tower, language model, weights in bfloat16."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch

from rl.base.answers import AnswerTrees
from rl.base.corpus import knee_example, tokenizer_corpus
from rl.base.knees import make_knees
from rl.base.language import LanguageTrainer
from rl.base.model import build_model, build_tokenizer, save_base
from rl.base.vision import train_tower
from rl.config import Config
from rl.data.layout import question_ids
from rollouts.volumes import PatchSizes

OnProgress = Callable[[int, int, str], None]
_CORPUS_KNEES = 20


def train_base(config: Config, on_progress: OnProgress = lambda done, total, note: None) -> Path:
    """Train on phantom patients that no dataset split holds; deterministic in `base.seed` on one machine.

    Returns:
        `base.out_dir`, a folder like a downloaded checkpoint.
    """
    settings = config.base
    torch.manual_seed(settings.seed)
    total = settings.knees + settings.vision_steps + settings.lookup_steps + settings.answer_steps

    def show(offset: int) -> Callable[[int, dict[str, float]], None]:
        def on_step(step: int, stats: dict[str, float]) -> None:
            note = "  ".join(f"{name} {value:.3f}" for name, value in stats.items())
            on_progress(offset + step + 1, total, note)

        return on_step

    sizes = PatchSizes(8, 2, 2)
    knees = []
    for knee in make_knees(settings.knees, settings.seed, config.phantom, config.view, sizes):
        knees.append(knee)
        on_progress(len(knees), total, "knees drawn")
    examples = [
        knee_example(knee, i, question_id, config.phantom)
        for i, knee in enumerate(knees[:_CORPUS_KNEES])
        for question_id in question_ids(config)
    ]
    tokenizer = build_tokenizer(tokenizer_corpus(examples), settings.vocab_size)
    model = build_model(tokenizer, settings.seed)
    train_tower(
        model.model.visual,
        knees,
        sizes,
        steps=settings.vision_steps,
        learning_rate=settings.vision_learning_rate,
        seed=settings.seed,
        on_step=show(settings.knees),
    )
    tokens_per_second = float(model.config.vision_config.tokens_per_second)
    trainer = LanguageTrainer(
        model,
        AnswerTrees(knees, tokenizer, config.phantom, tokens_per_second, sizes.merge),
        question_ids(config),
        sizes,
        learning_rate=settings.language_learning_rate,
        seed=settings.seed,
    )
    trainer.lookup(settings.lookup_steps, show(settings.knees + settings.vision_steps))
    trainer.answer(
        settings.answer_steps, show(settings.knees + settings.vision_steps + settings.lookup_steps)
    )
    folder = Path(settings.out_dir)
    save_base(folder, model, tokenizer, torch.bfloat16)
    return folder
