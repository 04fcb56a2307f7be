"""Phantom knees for training the stand-in base: frames, grades and where each region lies, as arrays in memory."""

from __future__ import annotations

import os
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path

import numpy as np

from rewards.ontology import QUESTIONS
from rl.config import PhantomConfig, VolumeViewConfig
from rl.data.phantom.anatomy import Knee, sample_knee
from rl.data.phantom.labels import LABELS, question_labels, region_box
from rl.data.phantom.render import affine_of, render
from rollouts.volumes import PatchSizes, Volume, view_frames

NUM_LABELS = max(LABELS.values()) + 1
ATTRIBUTES = tuple((q.question_id, a) for q in QUESTIONS.values() for a in q.attributes)
"""All 118 attributes in ontology order."""


@dataclass(frozen=True)
class KneeArrays:
    """One phantom as training data; t, h, w is the token grid (after merging)."""

    knee: Knee
    frames_T_H_W: np.ndarray
    """uint8."""
    second_per_grid_t: float
    grades: np.ndarray
    """[118] int8, in the order of `ATTRIBUTES`."""
    boxes: np.ndarray
    """[70, 6] int16 inclusive text boxes by question id; row 0 unused."""
    shares_t_h_w_R: np.ndarray
    """uint8 percentage of each token's voxels that carries each region label."""
    edges_t_R_4: np.ndarray
    """float32 x_min, x_max, y_min, y_max of each label within a frame pair, as shares of the field; NaN if absent."""


def make_knees(
    count: int, seed: int, phantom: PhantomConfig, view: VolumeViewConfig, sizes: PatchSizes
) -> Iterator[KneeArrays]:
    """`count` phantoms with balanced grades, rendered by two processes; phantom i depends on (seed, i) only."""
    work = [(seed, i, phantom, view, sizes) for i in range(count)]
    with ProcessPoolExecutor(min(2, os.cpu_count() or 1), mp_context=get_context("spawn")) as pool:
        yield from pool.map(_make_knee, work, chunksize=16)


def _make_knee(work: tuple[int, int, PhantomConfig, VolumeViewConfig, PatchSizes]) -> KneeArrays:
    seed, index, phantom, view, sizes = work
    rng = np.random.default_rng([seed, index])
    x, y, s = phantom.shape
    fov_x, fov_y, fov_s = phantom.fov_mm
    shape, fov = (x, y, s), (fov_x, fov_y, fov_s)
    knee = sample_knee(
        rng, "right" if index % 2 else "left", "00M" if rng.random() < 0.6 else "24M", "balanced"
    )
    image, labels, _ = render(knee, shape, fov, rng)
    spacing = (fov_x / x, fov_y / y, fov_s / s)
    volume = Volume(Path("phantom"), image.astype(np.float32), affine_of(shape, fov), spacing)
    framed = view_frames(volume, view, sizes=sizes)
    boxes = np.zeros((70, 6), np.int16)
    for i in QUESTIONS:
        boxes[i] = region_box(labels, i).to_text()
    return KneeArrays(
        knee=knee,
        frames_T_H_W=framed.frames_T_H_W.numpy(),
        second_per_grid_t=framed.second_per_grid_t,
        grades=np.array([knee.grades[q][a.name] for q, a in ATTRIBUTES], np.int8),
        boxes=boxes,
        shares_t_h_w_R=_shares(labels, framed.geometry.token_grid),
        edges_t_R_4=_edges(labels, framed.geometry.token_grid[0]),
    )


def _shares(labels: np.ndarray, grid: tuple[int, int, int]) -> np.ndarray:
    t, h, w = grid
    x, y, s = labels.shape
    cells = labels.transpose(2, 1, 0).reshape(t, s // t, h, y // h, w, x // w)
    cells = cells.transpose(0, 2, 4, 1, 3, 5).reshape(t * h * w, -1)
    offsets = np.arange(len(cells))[:, None] * NUM_LABELS
    counts = np.bincount((cells + offsets).ravel(), minlength=len(cells) * NUM_LABELS)
    return (counts.reshape(t, h, w, NUM_LABELS) * 100 // cells.shape[1]).astype(np.uint8)


def _edges(labels: np.ndarray, frames: int) -> np.ndarray:
    x, y, s = labels.shape
    pairs = labels.reshape(x, y, frames, s // frames)
    edges = np.full((frames, NUM_LABELS, 4), np.nan, np.float32)
    for t in range(frames):
        frame = pairs[:, :, t]
        for label in np.unique(frame)[1:]:
            where = (frame == label).any(axis=2)
            xs, ys = where.any(axis=1).nonzero()[0], where.any(axis=0).nonzero()[0]
            edges[t, label] = xs[0] / x, (xs[-1] + 1) / x, ys[0] / y, (ys[-1] + 1) / y
    return edges


def attribute_labels() -> list[tuple[int, ...]]:
    """Region labels each of the 118 attributes is about."""
    return [question_labels(q) for q, _ in ATTRIBUTES]
