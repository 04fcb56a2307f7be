"""Phantom patients: who has which knee at which visits, and their volumes on disk.

Plans are drawn for a whole split before anything is rendered, and every patient has random streams of its own, so the
files do not depend on how many processes write them.
"""

from __future__ import annotations

import gzip
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import nibabel as nib
import numpy as np

from rewards.boxes import Box3D
from rewards.ontology import QUESTIONS
from rewards.types import Side
from rl.config import ConfigError
from rl.data.boxes import extent_box, region_extents
from rl.data.phantom.anatomy import BASELINE, Knee, Mode, follow_up, sample_knee
from rl.data.phantom.labels import TEXT_ORDER, question_labels
from rl.data.phantom.render import render
from rl.errors import staged, writing

LATER_VISITS = ("12M", "18M", "24M", "30M", "36M", "48M", "72M", "96M")
_BOTH_KNEES = 0.25
"""Share of patients of whom both knees were scanned."""


@dataclass(frozen=True)
class Scan:
    """One knee at one visit, as a row of a split CSV names it."""

    patient_id: str
    visit: str
    study: str
    series: str
    side: Side
    mask_number: int

    @property
    def image_path(self) -> str:
        """Relative to the data root."""
        return f"images/{self.patient_id}/{self.visit}/{self.study}_{self.series}.nii.gz"

    @property
    def mask_path(self) -> str:
        """Relative to the data root."""
        return f"masks/knee_{self.mask_number:03d}.nii.gz"


@dataclass(frozen=True)
class Patient:
    """The plan of one patient: scans grouped by knee, visits in order, and the seed of the rest."""

    knees: tuple[tuple[Scan, ...], ...]
    mode: Mode
    seed: tuple[int, ...]


@dataclass(frozen=True)
class Finding:
    """A scan with its truth."""

    scan: Scan
    grades: Mapping[int, Mapping[str, int]]
    """Question id (1-69) -> attribute -> grade."""
    boxes: Mapping[int, Box3D]
    """Question id -> box of its region."""


def plan_patients(
    counts: Mapping[str, int], max_visits: int, grades: str, seed: int
) -> dict[str, list[Patient]]:
    """Plans of every split's patients.

    Args:
        counts: split -> number of patients.
        grades: "natural", "balanced" or "mixed" (`PhantomConfig.grades`).

    Raises:
        ConfigError: a number of visits or a mode that cannot be had.
    """
    if not 1 <= max_visits <= len(LATER_VISITS) + 1:
        raise ConfigError(f"phantom.max_visits is {max_visits}; give 1 to {len(LATER_VISITS) + 1}")
    modes: dict[str, tuple[Mode, ...]] = {
        "natural": ("natural",), "balanced": ("balanced",), "mixed": ("natural", "balanced")
    }  # fmt: skip
    if grades not in modes:
        raise ConfigError(f"phantom.grades is {grades!r}; give one of {', '.join(modes)}")
    ids = np.random.default_rng((seed, 0)).permutation(1_000_000)
    plans: dict[str, list[Patient]] = {}
    scans = 0
    for split_index, (split, count) in enumerate(counts.items()):
        plans[split] = []
        for i in range(count):
            mode = modes[grades][i % len(modes[grades])]
            # no split's patients depend on how many another has
            patient_id = f"9{ids[i * len(counts) + split_index]:06d}"
            patient = _plan(patient_id, max_visits, mode, (seed, 1 + split_index, i), scans)
            scans += sum(len(knee) for knee in patient.knees)
            plans[split].append(patient)
    return plans


def _plan(patient_id: str, max_visits: int, mode: Mode, seed: tuple[int, ...], first: int) -> Patient:
    rng = np.random.default_rng((*seed, 1))  # a trailing 0 would be the stream of `seed` itself
    later = sorted(rng.choice(len(LATER_VISITS), rng.integers(max_visits), replace=False))
    visits = (BASELINE, *(LATER_VISITS[i] for i in later))
    sides: tuple[Side, ...] = ("right", "left")
    if rng.random() >= _BOTH_KNEES:
        sides = (sides[int(rng.integers(2))],)
    knees, number = [], first
    for side in sides:
        scans = []
        for visit in visits:
            months = int(visit[:2])
            study = f"{2004 + months // 12}{1 + months % 12:02d}{rng.integers(1, 29):02d}"
            scans.append(
                Scan(patient_id, visit, study, str(10_000_000 + rng.integers(1_000_000)), side, number)
            )
            number += 1
        knees.append(tuple(scans))
    return Patient(tuple(knees), mode, seed)


def write_patient(
    patient: Patient, root: Path, shape: tuple[int, int, int], fov_mm: tuple[float, float, float]
) -> list[Finding]:
    """Render a patient's scans, write images and masks under `root`, and return what they show."""
    rng = np.random.default_rng(patient.seed)
    findings = []
    for scans in patient.knees:
        knee: Knee | None = None
        for scan in scans:
            knee = (
                sample_knee(rng, scan.side, scan.visit, patient.mode)
                if knee is None
                else follow_up(knee, rng, scan.visit)
            )
            image, labels, affine = render(knee, shape, fov_mm, rng)
            findings.append(Finding(scan, knee.grades, _boxes(labels)))
            write_volume(root / scan.image_path, image, affine)
            write_volume(root / scan.mask_path, labels, affine)
    return findings


def _boxes(labels: np.ndarray) -> dict[int, Box3D]:
    extents = region_extents(labels, {i: question_labels(i) for i in QUESTIONS})
    return {i: extent_box(extent, TEXT_ORDER) for i, extent in extents.items()}


def write_volume(path: Path, voxels: np.ndarray, affine: np.ndarray) -> None:
    """Write a gzipped NIfTI-1 file whole or not at all; equal voxels give equal bytes."""
    image = nib.Nifti1Image(voxels, affine)
    image.header.set_xyzt_units("mm", "sec")
    path.parent.mkdir(parents=True, exist_ok=True)
    with writing(path), staged(path) as staging:
        staging.write_bytes(gzip.compress(image.to_bytes(), compresslevel=1, mtime=0))
