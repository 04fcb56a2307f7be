"""Second half of the base: the whole model learns to look things up in the visual tokens.

Two phases, both next-token prediction on the packed forward with several questions of each volume:

1. lookup: nothing but the name of a finding, answered by its grades. A question is four tokens, so forty fit where
   ten full prompts would, and grades are all there is to learn.
2. answers: full prompts, answered with grades and box, half of them in the declared format. The rate decays.

In both the visual tokens are also supervised half-way up the language model: which region each belongs to and its
grades. Only the language model sees all slices and the side of the knee, and without that help it stays at the
commonest grade for a long time. The tower goes on learning at a lower rate; it is frozen ever after.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers import Qwen2_5_VLForConditionalGeneration

from rl.base.answers import AnswerTrees
from rl.base.vision import TokenHeads, TokenTargets, tower_embeds
from rl.packed import PackedPolicy, pack
from rollouts.volumes import PatchSizes

OnStep = Callable[[int, dict[str, float]], None]

VOLUMES = 8
"""Volumes per step."""
LOOKUPS, ANSWERS = 40, 10
"""Questions per volume in the two phases."""


class LanguageTrainer:
    """Full-parameter training of tower and language model on phantoms."""

    def __init__(
        self,
        model: Qwen2_5_VLForConditionalGeneration,
        data: AnswerTrees,
        question_ids: Sequence[int],
        sizes: PatchSizes,
        *,
        learning_rate: float,
        seed: int,
    ) -> None:
        self.policy, self.visual = PackedPolicy(model), model.model.visual
        self.data, self.question_ids, self.sizes = data, question_ids, sizes
        self.hidden = int(self.policy.language_model.config.hidden_size)
        torch.manual_seed(seed)
        self.heads, self.targets = TokenHeads(self.hidden), TokenTargets()
        self.rng = np.random.default_rng(seed)
        language = [*self.policy.language_model.parameters(), *self.heads.parameters()]
        self.groups: list[dict[str, Any]] = [
            {"params": language, "lr": learning_rate},
            {"params": list(self.visual.parameters()), "lr": learning_rate / 3},
        ]
        self._middle: list[torch.Tensor] = []
        layers = self.policy.language_model.layers
        layers[len(layers) // 2 - 1].register_forward_hook(
            lambda module, args, output: self._middle.append(
                output[0] if isinstance(output, tuple) else output
            )
        )

    def lookup(self, steps: int, on_step: OnStep) -> None:
        """Phase 1, at a constant rate."""
        self._train(steps, self.data.lookups, LOOKUPS, lambda s: min(1.0, (s + 1) / 30), on_step)

    def answer(self, steps: int, on_step: OnStep) -> None:
        """Phase 2; the rate stays high for two thirds, then decays."""
        self._train(
            steps,
            self.data.answers,
            ANSWERS,
            lambda s: min(1.0, (s + 1) / 30, max(0.02, 3 * (1 - s / steps))),
            on_step,
        )

    def _train(
        self,
        steps: int,
        tree: Callable[..., Any],
        questions: int,
        rate: Callable[[int], float],
        on_step: OnStep,
    ) -> None:
        optimizer = torch.optim.AdamW(self.groups, weight_decay=0.01, betas=(0.9, 0.98))
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, rate)
        parameters = [p for group in self.groups for p in group["params"]]
        for step in range(steps):
            loss, stats = self._loss(tree, questions)
            optimizer.zero_grad()
            torch.autograd.backward(loss)
            nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            schedule.step()
            on_step(step, stats)

    def _loss(self, tree: Callable[..., Any], questions: int) -> tuple[torch.Tensor, dict[str, float]]:
        chosen = [int(i) for i in self.rng.choice(len(self.data.knees), VOLUMES, replace=False)]
        knees = [self.data.knees[i] for i in chosen]
        embeds = tower_embeds(self.visual, knees, self.sizes).view(VOLUMES, -1, self.hidden)
        count = min(questions, len(self.question_ids))
        roots = [
            tree(i, embeds_V_H, self.rng.choice(self.question_ids, count, replace=False).tolist())
            for i, embeds_V_H in zip(chosen, embeds, strict=True)
        ]
        batch = pack(roots, self.data.builder.video_pad)
        self._middle.clear()
        logps_N_T, _ = self.policy(batch)
        answer_loss = -logps_N_T.sum() / batch.mask_N_T.sum()
        visual_N_H = self._middle[0].reshape(-1, self.hidden)[batch.visual_V]
        dense_loss, stats = self.targets.loss(self.heads, visual_N_H, knees)
        # the dense loss settles near 2 and would drown an answer's few uncertain tokens
        return 5 * answer_loss + dense_loss, {"answer": answer_loss.item(), **stats}
