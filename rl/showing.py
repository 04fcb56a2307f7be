"""What the benchmark shows a model with each question (`eval.image`), and how it asks it (`eval.prompts`).

| eval.image | shown | says |
|---|---|---|
| volume | the item's volume | how good the model is |
| none | no picture, the question alone | what needs no looking |
| shuffled | a volume of another patient | whether it matters whose knee it is |
| true_region | the true box of the question, cut out | how well it grades where it need not search |

The last is the paper's "instruction + true region" (arXiv 2510.20967, Table 2). The region is shown as finely as the
frames of the view allow, by the same frozen tower, and the prompt speaks of the region's own grid: boxes in such
answers are counted from its lowest corner, and `rl.bench.metrics` moves them back to the file's grid. That grid gives
the true box away, so the IoU of such a run is no measure of anything.
"""

from __future__ import annotations

import hashlib
import math
from dataclasses import astuple, replace
from functools import lru_cache
from pathlib import Path

import numpy as np

from rewards.boxes import Box3D
from rewards.types import Example, VolumeRef
from rl.choices import OWN_PROMPTS, image_of
from rl.config import Config, ConfigError, VolumeViewConfig
from rl.data.boxes import parse_convention
from rl.data.examples import Examples
from rl.data.layout import read_question_file
from rollouts.volumes import (
    FramesView,
    PatchSizes,
    ViewGeometry,
    Volume,
    intensity_window,
    read_volume,
    view_frames,
)

NAMED = 3
"""Items named in an error."""


class Showing:
    """Which volume, and which part of it, is shown with each item of a split, and what is asked.

    Args:
        examples: of the whole split, so that a quick look shows what the full run does.

    Raises:
        ConfigError: an item has no true region to show, there is no other patient whose volume could be, or the
            question file lacks a question.
        rl.data.layout.DataError: the question file cannot be read.
    """

    def __init__(self, config: Config, examples: Examples) -> None:
        self.image = image_of(config)
        self.texts = _question_texts(config, examples)
        """What is asked by question id; empty for our own wording."""
        self._others = other_patients(examples, config.seed) if self.image == "shuffled" else {}
        if self.image == "true_region":
            _require_regions(examples)

    def volume(self, example: Example) -> VolumeRef:
        """The volume that is shown, if any is."""
        return self._others.get(example.volume.volume_id, example.volume)

    def region(self, example: Example) -> Box3D | None:
        """The region that is shown alone; None for all that the view shows."""
        return example.truth.bbox if self.image == "true_region" else None


def other_patients(examples: Examples, seed: int) -> dict[str, VolumeRef]:
    """For each volume id a volume of another patient, the same in every run with this seed.

    The patients stand in a random circle and each is shown the next one's: of that patient's volumes the one of the
    same side, if there is one, and of the same visit, so that nothing but the patient is otherwise.

    Raises:
        ConfigError: there is only one patient.
    """
    knees: dict[str, list[Example]] = {}
    for indices in examples.by_volume().values():
        knee = examples[indices[0]]
        knees.setdefault(knee.patient_id, []).append(knee)
    if len(knees) < 2:
        raise ConfigError(
            f"eval.image is 'shuffled', but the split has one patient ({', '.join(knees)}) and so no volume of "
            "another to show; evaluate on a split with more patients"
        )
    circle = np.random.default_rng(seed).permutation(sorted(knees)).tolist()
    shown = {}
    for patient, other in zip(circle, [*circle[1:], circle[0]], strict=True):
        for knee in knees[patient]:
            alike = min(
                knees[other], key=lambda o: (o.side != knee.side, o.visit != knee.visit, o.example_id)
            )
            shown[knee.volume.volume_id] = alike.volume
    return shown


def _require_regions(examples: Examples) -> None:
    missing = [i for i, box in enumerate(examples.column("bbox")) if box is None]
    if missing:
        names, questions = examples.column("example_id"), examples.column("question_id")
        raise ConfigError(
            f"eval.image is 'true_region', but {len(missing)} of {len(examples)} items have no true box and so no "
            f"region to show: {', '.join(names[i] for i in missing[:NAMED])}{', …' if len(missing) > NAMED else ''} "
            f"(questions {sorted({questions[i] for i in missing})}). Leave these questions out (data.question_ids), "
            "name a file without these items (data.test_file), or take boxes from masks (data.box_source=mask)"
        )


def _question_texts(config: Config, examples: Examples) -> dict[int, str]:
    if config.eval.prompts == OWN_PROMPTS:
        return {}
    texts = read_question_file(Path(config.eval.prompts))
    missing = sorted(set(examples.column("question_id")) - texts.keys())
    if missing:
        raise ConfigError(
            f"eval.prompts: {config.eval.prompts} has no text for questions {missing}; add them to the file, or leave "
            "them out with data.question_ids"
        )
    return texts


class Pictures:
    """Frames of volumes and of regions of them; a volume is read once for questions that follow each other.

    Args:
        sizes: how the vision tower cuts frames into tokens.
    """

    def __init__(self, config: Config, sizes: PatchSizes) -> None:
        self._view, self._sizes = config.view, sizes
        self._axes = parse_convention(config.data.box_convention).axes
        self._read = lru_cache(maxsize=1)(self._read_anew)

    def frames(self, path: str, region: Box3D | None) -> FramesView:
        """What is shown of a volume: the configured view, or a region alone.

        Raises:
            rollouts.volumes.VolumeError, rollouts.volumes.ViewError: it cannot be read, or shown in this view.
        """
        volume, window = self._read(path)
        view = self._view
        if region is not None:
            slices, x, y = (volume.array.shape[axis] for axis in self._axes)
            view = region_view(view, region, (slices, x, y), self._sizes)
        return view_frames(volume, view, *self._axes, sizes=self._sizes, window=window)

    def _read_anew(self, path: str) -> tuple[Volume, tuple[float, float]]:
        volume = read_volume(path)
        return volume, intensity_window(volume, self._view)


def region_view(
    view: VolumeViewConfig, region: Box3D, shape: tuple[int, int, int], sizes: PatchSizes
) -> VolumeViewConfig:
    """The view of one region: as fine as it can be with no more frames and pixels than the whole view has.

    Voxels keep the proportions they have in the whole view, height and width are rounded to whole tokens, and no token
    becomes smaller than a voxel. A region of a single slice fills a temporal patch twice, as the last slice of
    a volume may (`ViewGeometry.slices`).

    Args:
        shape: (slices, x, y) of the volume.
    """
    whole = ViewGeometry.of(shape, view, sizes)
    all_slices, all_columns, all_rows = whole.crop.extents
    slices, columns, rows = region.extents
    zoom = min(all_columns / columns, all_rows / rows)
    side = sizes.pixels_per_token

    def pixels(of_view: int, of_all: int, voxels: int) -> int:
        tokens = round(of_view / side * zoom * voxels / of_all)
        return side * min(max(tokens, 1), voxels)

    return replace(
        view,
        crop=list(astuple(region)),
        slice_stride=math.ceil(slices / math.ceil(all_slices / view.slice_stride)),
        height=pixels(view.height, all_rows, rows),
        width=pixels(view.width, all_columns, columns),
    )


def prompts_source(config: Config) -> tuple[str, str]:
    """Name of the questions' source and hash of its content: of a question file, or `own` and no hash."""
    if config.eval.prompts == OWN_PROMPTS:
        return OWN_PROMPTS, ""
    path = Path(config.eval.prompts)
    return path.name, hashlib.blake2b(path.read_bytes(), digest_size=8).hexdigest()
