"""Second half of the base: the whole model learns to look things up in the visual tokens.

Next-token prediction on short answers about several questions of each volume (the packed forward), plus dense
supervision of the visual tokens half-way up the language model: which region each belongs to and its grades. Only the
language model sees all slices and the side of the knee, and without that help it stays at the commonest grade for a
long time. The tower goes on learning at a lower rate; it is frozen ever after.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers import Qwen2_5_VLForConditionalGeneration

from rl.base.corpus import knee_example, short_answer
from rl.base.knees import KneeArrays
from rl.base.vision import MAX_GRADES, TokenHeads, TokenTargets, tower_embeds
from rl.config import PhantomConfig
from rl.packed import Node, PackedBatch, PackedPolicy, pack
from rollouts.positions import mrope_positions
from rollouts.prompts import PromptBuilder
from rollouts.types import VolumeFeatures
from rollouts.volumes import PatchSizes

GRADE_WEIGHT = 4.0

OnStep = Callable[[int, dict[str, float]], None]


class AnswerTrees:
    """Packed trees of short answers about phantoms: the training data of the language model."""

    def __init__(
        self,
        knees: Sequence[KneeArrays],
        tokenizer: Any,
        phantom: PhantomConfig,
        tokens_per_second: float,
        merge: int,
    ) -> None:
        self.knees, self.phantom = knees, phantom
        self.tokenizer, self.tokens_per_second, self.merge = tokenizer, tokens_per_second, merge
        self.builder = PromptBuilder(tokenizer, "required")
        self._grade_tokens = torch.tensor(
            [tokenizer.convert_tokens_to_ids(str(g)) for g in range(MAX_GRADES)]
        )
        self._box_token = tokenizer.convert_tokens_to_ids("Box")

    def weights(self, batch: PackedBatch) -> torch.Tensor:
        """Weight of each answer token: a grade is one token of twenty and the hardest to learn."""
        numbers = torch.isin(batch.targets_N_T, self._grade_tokens)
        before_box = (batch.targets_N_T == self._box_token).cumsum(dim=1) == 0
        return torch.where(numbers & before_box, GRADE_WEIGHT, 1.0) * batch.mask_N_T

    def tree(self, index: int, embeds_V_H: torch.Tensor, question_ids: Sequence[int]) -> Node:
        """One volume with its questions and their short answers."""
        knee = self.knees[index]
        t, h, w = knee.shares_t_h_w_R.shape[:3]
        grid = (t, h * self.merge, w * self.merge)
        features = VolumeFeatures(f"knee{index}", embeds_V_H, grid, knee.second_per_grid_t)
        root: Node | None = None
        for question_id in question_ids:
            example = knee_example(knee, index, question_id, self.phantom)
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


def train_jointly(
    model: Qwen2_5_VLForConditionalGeneration,
    data: AnswerTrees,
    question_ids: Sequence[int],
    sizes: PatchSizes,
    *,
    steps: int,
    volumes: int = 8,
    questions: int = 10,
    learning_rate: float = 1.5e-3,
    tower_learning_rate: float = 5e-4,
    seed: int = 0,
    on_step: OnStep = lambda step, stats: None,
) -> None:
    """Full-parameter training of tower and language model; the rates stay high for two thirds, then decay."""
    policy, visual = PackedPolicy(model), model.model.visual
    language = policy.language_model
    torch.manual_seed(seed)
    heads, targets = TokenHeads(language.config.hidden_size), TokenTargets()
    middle: list[torch.Tensor] = []
    hook = language.layers[len(language.layers) // 2 - 1].register_forward_hook(
        lambda module, args, output: middle.append(output[0] if isinstance(output, tuple) else output)
    )
    groups: list[dict[str, Any]] = [
        {"params": [*language.parameters(), *heads.parameters()], "lr": learning_rate},
        {"params": list(visual.parameters()), "lr": tower_learning_rate},
    ]
    optimizer = torch.optim.AdamW(groups, weight_decay=0.01, betas=(0.9, 0.98))
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda s: min(1.0, (s + 1) / 30, max(0.02, 3 * (1 - s / steps)))
    )
    rng = np.random.default_rng(seed)
    for step in range(steps):
        chosen = [int(i) for i in rng.choice(len(data.knees), volumes, replace=False)]
        knees = [data.knees[i] for i in chosen]
        embeds = tower_embeds(visual, knees, sizes).view(volumes, -1, language.config.hidden_size)
        roots = [
            data.tree(i, embeds_V_H, rng.choice(question_ids, questions, replace=False).tolist())
            for i, embeds_V_H in zip(chosen, embeds, strict=True)
        ]
        batch = pack(roots, data.builder.video_pad)
        middle.clear()
        logps_N_T, _ = policy(batch)
        weights_N_T = data.weights(batch)
        answer_loss = -(weights_N_T * logps_N_T).sum() / len(logps_N_T)
        visual_N_H = middle[0].reshape(-1, language.config.hidden_size)[batch.visual_V]
        dense_loss, stats = targets.loss(heads, visual_N_H, knees)
        optimizer.zero_grad()
        torch.autograd.backward(answer_loss + dense_loss)
        nn.utils.clip_grad_norm_([p for group in groups for p in group["params"]], 1.0)
        optimizer.step()
        schedule.step()
        on_step(
            step,
            {
                "answer": -logps_N_T.detach().sum().item() / int(batch.mask_N_T.sum()),
                **stats,
                **_probabilities(logps_N_T.detach(), data),
            },
        )
    hook.remove()


def _probabilities(logps_N_T: torch.Tensor, data: AnswerTrees) -> dict[str, float]:
    """Mean probability of the first grade of each answer: at chance until the model looks."""
    prefix = len(data.tokenizer.encode("Grades ", add_special_tokens=False))
    return {"p_grade": logps_N_T[:, prefix].exp().mean().item()}
