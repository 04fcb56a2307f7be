"""Second half of the base: the language model learns to look things up in the visual tokens.

The tower is frozen by now, so its features are computed once. The loss is next-token prediction on short answers
about several questions of each volume (the packed forward), plus dense supervision of the visual tokens half-way up
the language model: which region each belongs to and its grades. Only the language model sees all slices and the side
of the knee, and without that help it stays at the commonest grade for a long time.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import nn

from rl.base.corpus import knee_example, short_answer
from rl.base.knees import KneeArrays
from rl.base.vision import TokenHeads, TokenTargets, tower_embeds
from rl.config import PhantomConfig
from rl.packed import Node, PackedPolicy, pack
from rollouts.positions import mrope_positions
from rollouts.prompts import PromptBuilder
from rollouts.types import VolumeFeatures
from rollouts.volumes import PatchSizes


class AnswerTrees:
    """Packed trees of short answers about phantoms: the training data of the language model."""

    def __init__(
        self,
        knees: Sequence[KneeArrays],
        features: Sequence[VolumeFeatures],
        tokenizer: Any,
        phantom: PhantomConfig,
        tokens_per_second: float,
        merge: int,
    ) -> None:
        self.knees, self.features, self.phantom = knees, features, phantom
        self.tokenizer, self.tokens_per_second, self.merge = tokenizer, tokens_per_second, merge
        self.builder = PromptBuilder(tokenizer, "required")

    def tree(self, index: int, question_ids: Sequence[int]) -> Node:
        """One volume with its questions and their short answers."""
        features = self.features[index]
        root: Node | None = None
        for question_id in question_ids:
            example = knee_example(self.knees[index], index, question_id, self.phantom)
            prompt = self.builder.build(example, features)
            if root is None:
                positions = mrope_positions(
                    prompt.volume_ids,
                    features.grid_thw,
                    features.second_per_grid_t,
                    video_token_id=self.builder.video_pad,
                    merge_size=self.merge,
                    tokens_per_second=self.tokens_per_second,
                )
                root = Node(prompt.volume_ids, positions, features.embeds_V_H)
            answer = self.tokenizer.encode(short_answer(example), add_special_tokens=False)
            leaf = Node([*answer, self.builder.im_end], scored=True)
            root.children.append(Node(prompt.question_ids, children=[leaf]))
        assert root is not None
        return root


@torch.no_grad()
def knee_features(visual: Any, knees: Sequence[KneeArrays], sizes: PatchSizes) -> list[VolumeFeatures]:
    """Frozen features of each knee."""
    features: list[VolumeFeatures] = []
    for start in range(0, len(knees), 16):
        part = knees[start : start + 16]
        embeds = tower_embeds(visual, part, sizes).view(len(part), -1, visual.config.out_hidden_size)
        for k, embeds_V_H in zip(part, embeds, strict=True):
            t, h, w = k.shares_t_h_w_R.shape[:3]
            grid = (t, h * sizes.merge, w * sizes.merge)
            features.append(
                VolumeFeatures(f"knee{len(features)}", embeds_V_H.clone(), grid, k.second_per_grid_t)
            )
    return features


def train_language(
    policy: PackedPolicy,
    data: AnswerTrees,
    question_ids: Sequence[int],
    *,
    steps: int,
    volumes: int = 8,
    questions: int = 10,
    learning_rate: float = 1.5e-3,
    dense_weight: float = 1.0,
    seed: int = 0,
    on_step: Callable[[int, dict[str, float]], None] = lambda step, stats: None,
) -> None:
    """Full-parameter training of the language model; the learning rate stays high for most of it, then decays."""
    language = policy.language_model
    torch.manual_seed(seed)
    heads, targets = TokenHeads(language.config.hidden_size), TokenTargets()
    middle: list[torch.Tensor] = []
    hook = language.layers[len(language.layers) // 2 - 1].register_forward_hook(
        lambda module, args, output: middle.append(output[0] if isinstance(output, tuple) else output)
    )
    parameters = [*language.parameters(), *heads.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=learning_rate, weight_decay=0.01, betas=(0.9, 0.98))
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda s: min(1.0, (s + 1) / 50, max(0.02, 3 * (1 - s / steps)))
    )
    rng = np.random.default_rng(seed)
    for step in range(steps):
        chosen = [int(i) for i in rng.choice(len(data.knees), volumes, replace=False)]
        roots = [data.tree(i, rng.choice(question_ids, questions, replace=False).tolist()) for i in chosen]
        batch = pack(roots, data.builder.video_pad)
        middle.clear()
        logps_N_T, _ = policy(batch)
        answer_loss = -logps_N_T.sum() / batch.mask_N_T.sum()
        visual_N_H = middle[0].reshape(-1, language.config.hidden_size)[batch.visual_V]
        dense_loss, stats = targets.loss(heads, visual_N_H, [data.knees[i] for i in chosen])
        optimizer.zero_grad()
        (answer_loss + dense_weight * dense_loss).backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        on_step(step, {"answer": answer_loss.item(), **stats, **_accuracies(logps_N_T.detach(), batch, data)})
    hook.remove()


def _accuracies(logps_N_T: torch.Tensor, batch: Any, data: AnswerTrees) -> dict[str, float]:
    """Mean probability of the first token after `Grades ` (the first grade), a cheap sign of learning."""
    prefix = len(data.tokenizer.encode("Grades ", add_special_tokens=False))
    return {
        "p_grade": logps_N_T[:, prefix].exp().mean().item(),
        "p_box": logps_N_T[:, -8:].exp().mean().item(),
    }
