"""First half of the base: the vision tower learns what lies in each visual token.

Next-token loss alone never teaches a tower this small to grade. Each visual token is therefore supervised: which
regions it covers, the grades of the findings there, and where the region ends in its frame. The heads are thrown
away, the outputs are whitened (grades sit in directions of a thousandth of the variance, which a language model would
be slow to find), and the tower stays frozen ever after.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from rl.base.knees import ATTRIBUTES, NUM_LABELS, KneeArrays, attribute_labels
from rollouts.vision import Normalisation, patchify
from rollouts.volumes import PatchSizes

MAX_GRADES = 9
COVERED = 8
"""Per cent of a token's voxels a region must fill for the token to be held to its grades."""
SMALLEST_VARIANCE = 3e-3
"""Directions of less variance than this are not blown up to full size by whitening."""


class TokenHeads(nn.Module):
    """Linear read-outs of a visual token: regions, grades, edges."""

    def __init__(self, hidden: int) -> None:
        super().__init__()
        self.regions = nn.Linear(hidden, NUM_LABELS)
        self.grades = nn.Linear(hidden, len(ATTRIBUTES) * MAX_GRADES)
        self.edges = nn.Linear(hidden, NUM_LABELS * 4)


class TokenTargets:
    """Batches of supervision for the visual tokens of several knees."""

    def __init__(self) -> None:
        about = torch.zeros(len(ATTRIBUTES), NUM_LABELS, dtype=torch.bool)
        for row, labels in enumerate(attribute_labels()):
            about[row, list(labels)] = True
        self.about_A_R = about.float()
        self.legal_A_K = torch.tensor([[k in a.grades for k in range(MAX_GRADES)] for _, a in ATTRIBUTES])

    def loss(
        self, heads: TokenHeads, embeds_N_H: torch.Tensor, knees: Sequence[KneeArrays]
    ) -> tuple[torch.Tensor, dict[str, float]]:
        """Sum of the three losses over the tokens of all knees, and what they achieve."""
        shares = torch.from_numpy(np.stack([k.shares_t_h_w_R for k in knees])).float()
        frames, per_frame = shares.shape[:2], shares.shape[2] * shares.shape[3]
        shares_N_R = shares.flatten(0, 3)
        present_N_R = (shares_N_R >= 2).float()
        region_loss = F.binary_cross_entropy_with_logits(heads.regions(embeds_N_H), present_N_R)

        truth_N_A = torch.from_numpy(np.stack([k.grades for k in knees])).long()
        truth_N_A = truth_N_A.repeat_interleave(frames[1] * per_frame, dim=0)
        token, attribute = (shares_N_R @ self.about_A_R.T >= COVERED).nonzero(as_tuple=True)
        logits = heads.grades(embeds_N_H).view(len(shares_N_R), len(ATTRIBUTES), MAX_GRADES)[token, attribute]
        logits = logits.masked_fill(~self.legal_A_K[attribute], -1e4)
        truth = truth_N_A[token, attribute]
        grade_loss = F.cross_entropy(logits, truth)

        edges = torch.from_numpy(np.stack([k.edges_t_R_4 for k in knees])).flatten(0, 1)
        edges_N_R_4 = edges.repeat_interleave(per_frame, dim=0)
        token, region = (present_N_R * ~edges_N_R_4.isnan().any(-1)).nonzero(as_tuple=True)
        predicted = heads.edges(embeds_N_H).view(-1, NUM_LABELS, 4)[token, region]
        edge_loss = (predicted - edges_N_R_4[token, region])[region > 0].abs().mean()

        stats = {
            "region": region_loss.item(),
            "grade": grade_loss.item(),
            "grade_accuracy": (logits.argmax(-1) == truth).float().mean().item(),
            "edge": edge_loss.item(),
        }
        return 10 * region_loss + grade_loss + 20 * edge_loss, stats


def tower_embeds(visual: nn.Module, knees: Sequence[KneeArrays], sizes: PatchSizes) -> torch.Tensor:
    """Visual tokens [N, hidden] of several knees of one grid, with gradient."""
    frames = torch.from_numpy(np.concatenate([k.frames_T_H_W for k in knees]))
    patches, grid = patchify(frames, sizes, Normalisation())
    return visual(patches, grid_thw=torch.tensor([grid])).pooler_output


def train_tower(
    visual: Any,
    knees: Sequence[KneeArrays],
    sizes: PatchSizes,
    *,
    steps: int,
    batch: int = 8,
    learning_rate: float = 2e-3,
    seed: int = 0,
    on_step: Callable[[int, dict[str, float]], None] = lambda step, stats: None,
) -> None:
    """Full-parameter training of the tower on dense token targets, one-cycle learning rate."""
    hidden = visual.config.out_hidden_size
    torch.manual_seed(seed)
    heads, targets = TokenHeads(hidden), TokenTargets()
    parameters = [*visual.parameters(), *heads.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=learning_rate, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, learning_rate, total_steps=steps, pct_start=0.1)
    rng = np.random.default_rng(seed)
    visual.train()
    for step in range(steps):
        chosen = [knees[i] for i in rng.choice(len(knees), batch, replace=False)]
        loss, stats = targets.loss(heads, tower_embeds(visual, chosen, sizes), chosen)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        on_step(step, stats)
    visual.eval()


@torch.no_grad()
def embed_knees(visual: nn.Module, knees: Sequence[KneeArrays], sizes: PatchSizes) -> torch.Tensor:
    """Visual tokens of each knee, [knees, V, hidden], a few knees at a time."""
    parts = [tower_embeds(visual, knees[i : i + 8], sizes) for i in range(0, len(knees), 8)]
    embeds_N_H = torch.cat(parts)
    return embeds_N_H.view(len(knees), -1, embeds_N_H.shape[-1])


@torch.no_grad()
def whiten_tower(visual: Any, knees: Sequence[KneeArrays], sizes: PatchSizes) -> None:
    """Give the visual tokens mean 0 and equal variance in all directions, by changing the tower's last layer."""
    embeds_N_H = embed_knees(visual, knees, sizes).flatten(0, 1)
    variances, directions = torch.linalg.eigh(embeds_N_H.T.cov())
    whitening = directions @ torch.diag((variances + SMALLEST_VARIANCE).rsqrt()) @ directions.T
    last = visual.merger.mlp[-1]
    last.weight.copy_(whitening @ last.weight)
    last.bias.copy_(whitening @ (last.bias - embeds_N_H.mean(0)))
