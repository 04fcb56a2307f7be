"""Second half of the base: the language model learns to look things up in the visual tokens.

Two phases, both next-token prediction on the packed forward with several questions of each volume:

1. lookup: findings by name, each followed by its grades. A question is a few tokens, so dozens fit where a few full
   prompts would, and grades are all there is to learn.
2. exams: also full prompts, answered with grades and box, half of them in the declared format. The rate decays.

Next-token loss alone stays at the commonest grade for hundreds of steps. So in both phases the attention of the tokens
that predict an answer is guided in two layers: half the heads of one to the finding's name in the prompt (recall), and
the next one's, among the visual tokens, to the finding's region (look). The tower is frozen: the visual tokens are
computed once.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn.utils.rnn import pad_sequence
from transformers import Qwen2_5_VLForConditionalGeneration
from transformers.integrations.sdpa_attention import repeat_kv
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from rewards.ontology import QUESTIONS
from rl.base.answers import AnswerTrees, Quiz
from rl.base.knees import KneeArrays
from rl.base.vision import COVERED
from rl.data.phantom.labels import question_labels
from rl.packed import PackedBatch, PackedPolicy, pack, packed_tree_attention

OnStep = Callable[[int, dict[str, float]], None]

VOLUMES = 8
"""Volumes per step."""
LOOKUPS, EXAM = 24, 18
"""Questions per volume in the two phases."""
GUIDE_WEIGHT = 0.3
_WATCHED = "packed_tree_watched"


class LanguageTrainer:
    """Full-parameter training of the language model on phantoms."""

    def __init__(
        self,
        model: Qwen2_5_VLForConditionalGeneration,
        data: AnswerTrees,
        question_ids: Sequence[int],
        *,
        learning_rate: float,
        seed: int,
    ) -> None:
        self.policy, self.data, self.question_ids = PackedPolicy(model), data, question_ids
        self.learning_rate, self.seed = learning_rate, seed
        language = self.policy.language_model
        self.look_layer = len(language.layers) // 2
        self._seen: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
        """Queries and keys of the two guided layers, heads x L x d, of the last forward."""

        def watched(module: Any, query: torch.Tensor, key: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
            if module.layer_idx in (self.look_layer - 1, self.look_layer):
                self._seen[module.layer_idx] = query[0], repeat_kv(key, query.shape[1] // key.shape[1])[0]
            return packed_tree_attention(module, query, key, *args, **kwargs)

        ALL_ATTENTION_FUNCTIONS.register(_WATCHED, watched)
        language.config._attn_implementation = _WATCHED

    def lookup(self, steps: int, on_step: OnStep) -> None:
        """Phase 1, at a constant rate."""
        rng = np.random.default_rng([self.seed, 1])
        self._train(steps, self.data.lookups, LOOKUPS, rng, lambda s: min(1.0, (s + 1) / 30), on_step)

    def answer(self, steps: int, on_step: OnStep) -> None:
        """Phase 2; the rate stays high for two thirds, then decays."""
        rng = np.random.default_rng([self.seed, 2])
        self._train(
            steps,
            self.data.exams,
            EXAM,
            rng,
            lambda s: min(1.0, (s + 1) / 30, max(0.02, 3 * (1 - s / steps))),
            on_step,
        )

    def _train(
        self,
        steps: int,
        ask: Callable[[int, Sequence[int]], Quiz],
        questions: int,
        rng: np.random.Generator,
        rate: Callable[[int], float],
        on_step: OnStep,
    ) -> None:
        parameters = list(self.policy.language_model.parameters())
        optimizer = torch.optim.AdamW(parameters, self.learning_rate, weight_decay=0.01, betas=(0.9, 0.98))
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, rate)
        count = min(questions, len(self.question_ids))
        for step in range(steps):
            chosen = rng.choice(len(self.data.knees), VOLUMES, replace=False).tolist()
            quizzes = [ask(i, rng.choice(self.question_ids, count, replace=False).tolist()) for i in chosen]
            losses = self._losses([self.data.knees[i] for i in chosen], quizzes)
            optimizer.zero_grad()
            torch.autograd.backward(
                losses["grades"] + losses["rest"] + GUIDE_WEIGHT * (losses["look"] + losses["recall"])
            )
            nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            schedule.step()
            on_step(step, {name: loss.item() for name, loss in losses.items()})

    def _losses(self, knees: Sequence[KneeArrays], quizzes: Sequence[Quiz]) -> dict[str, torch.Tensor]:
        """Next-token loss where grades are said, and of the rest; how far attention strays."""
        batch = pack([quiz.root for quiz in quizzes], self.data.builder.video_pad)
        said = [row for quiz in quizzes for row in quiz.said]
        asks_N_T = _padded([[token.question_id for token in row] for row in said])
        tells_N_T = _padded([[token.tells for token in row] for row in said])
        batch = replace(batch, mask_N_T=asks_N_T > 0)
        logps_N_T, _ = self.policy(batch)
        rest_N_T = batch.mask_N_T & ~tells_N_T
        return {
            "grades": -logps_N_T[tells_N_T].mean(),
            "rest": -logps_N_T[rest_N_T].sum() / rest_N_T.sum().clamp(min=1),
            "look": self._look_loss(batch, knees, quizzes, asks_N_T),
            "recall": self._recall_loss(batch, quizzes),
        }

    def _look_loss(
        self,
        batch: PackedBatch,
        knees: Sequence[KneeArrays],
        quizzes: Sequence[Quiz],
        asks_N_T: torch.Tensor,
    ) -> torch.Tensor:
        """Minus the log of the attention, among a volume's visual tokens, that goes to the question's region."""
        query_h_L_d, key_h_L_d = self._seen[self.look_layer]
        rows = [len(quiz.said) for quiz in quizzes]
        losses = []
        for knee, visual_V, asks, predictors in zip(
            knees,
            batch.visual_V.chunk(len(knees)),
            asks_N_T.split(rows),
            batch.predictors_N_T.split(rows),
            strict=True,
        ):
            query, key = query_h_L_d[:, predictors[asks > 0]], key_h_L_d[:, visual_V]
            looks_h_M_V = (query @ key.transpose(1, 2) / query.shape[-1] ** 0.5).log_softmax(-1)
            outside_M_V = ~_regions_Q_V(knee)[asks[asks > 0]]
            losses.append(-looks_h_M_V.masked_fill(outside_M_V, -torch.inf).logsumexp(-1).flatten())
        return torch.cat(losses).mean()

    def _recall_loss(self, batch: PackedBatch, quizzes: Sequence[Quiz]) -> torch.Tensor:
        """Minus the log of the attention, among the text after the volume and the visual tokens, to the name."""
        query_h_L_d, key_h_L_d = (x[: len(x) // 2] for x in self._seen[self.look_layer - 1])
        rows = [len(quiz.said) for quiz in quizzes]
        losses = []
        for quiz, visual_V, predictors in zip(
            quizzes, batch.visual_V.chunk(len(quizzes)), batch.predictors_N_T.split(rows), strict=True
        ):
            for said, prompt, predictors_T in zip(quiz.said, quiz.prompt_lengths, predictors, strict=True):
                end = int(predictors_T[0]) + 1
                own = int(predictors_T[1])
                text_S = torch.cat([torch.arange(end - prompt, end), torch.arange(own, own + len(said))])
                place_S = torch.arange(-prompt, len(said))
                asked = torch.tensor([t for t, token in enumerate(said) if token.question_id])
                names = torch.tensor([(token.name.start, token.name.stop) for token in said])[asked]
                query, key = query_h_L_d[:, predictors_T[asked]], key_h_L_d[:, torch.cat([text_S, visual_V])]
                scores_h_M_SV = query @ key.transpose(1, 2) / query.shape[-1] ** 0.5
                everywhere = torch.zeros(len(asked), len(visual_V), dtype=torch.bool)
                future_M_SV = torch.cat([place_S >= asked[:, None], everywhere], dim=1)
                named_M_S = (names[:, :1] <= place_S) & (place_S < names[:, 1:])
                recalls_h_M_SV = scores_h_M_SV.masked_fill(future_M_SV, -torch.inf).log_softmax(-1)
                named_M_SV = torch.cat([named_M_S, everywhere], dim=1)
                losses.append(-recalls_h_M_SV.masked_fill(~named_M_SV, -torch.inf).logsumexp(-1).flatten())
        return torch.cat(losses).mean()


def _padded(rows: Sequence[Sequence[int]]) -> torch.Tensor:
    return pad_sequence([torch.tensor(row) for row in rows], batch_first=True)


def _regions_Q_V(knee: KneeArrays) -> torch.Tensor:
    """Visual tokens that show each question's region, at least the one that shows most of it; row 0 is unused."""
    shares_V_R = torch.from_numpy(knee.shares_t_h_w_R).flatten(0, 2).int()
    regions_Q_V = torch.zeros(1 + max(QUESTIONS), len(shares_V_R), dtype=torch.bool)
    for question_id in QUESTIONS:
        shares_V = shares_V_R[:, list(question_labels(question_id))].sum(1)
        regions_Q_V[question_id] = shares_V >= shares_V.max().clamp(max=COVERED)
    return regions_Q_V
