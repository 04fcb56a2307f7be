"""A tiny dataset in the released layout, written by hand: 5 patients, 6 volumes of 12x10x6 voxels, 3 questions."""

from __future__ import annotations

import csv
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest

from rewards.boxes import Box3D
from rewards.ontology import QUESTIONS
from rl.config import Config
from rl.data.boxes import Convention, box_to_text, extent_box
from rl.data.layout import HEADER

FILE_SHAPE = (12, 10, 6)
SPACING = (0.4, 0.5, 0.7)
DEFAULT = Convention((2, 0, 1), (False, False, False), True)
LABELS = {1: 3, 4: 5, 60: 9}
"""Question id -> mask label."""

# (split, patient, visit, side): two visits of one patient, both sides.
KNEES = (
    ("train", "9000001", "00M", "1"),
    ("train", "9000001", "12M", "1"),
    ("train", "9000002", "00M", "2"),
    ("train", "9000003", "00M", "1"),
    ("val", "9000004", "00M", "2"),
    ("test", "9000005", "00M", "1"),
)


def template(question_id: int) -> str:
    """A prompt in our own words that ends with the question's answer template."""
    question = QUESTIONS[question_id]
    answer: dict[str, Any] = {}
    for attribute in question.attributes:
        node = answer
        for key in attribute.path[:-1]:
            node = node.setdefault(key, {})
        node[attribute.path[-1]] = f"(grade from {attribute.grades[0]}-{attribute.grades[-1]})"
    return f"Look at this knee and grade it. Reply with JSON: {json.dumps(answer)}".replace(
        '"(', "("
    ).replace(')"', ")")


def diagnosis(question_id: int, grades: dict[str, int], bbox: list[int] | None) -> str:
    """A released truth: box and grades as one JSON object."""
    answer: dict[str, Any] = {} if bbox is None else {"bbox": bbox}
    for attribute in QUESTIONS[question_id].attributes:
        node = answer
        for key in attribute.path[:-1]:
            node = node.setdefault(key, {})
        node[attribute.path[-1]] = grades[attribute.name]
    return json.dumps(answer)


def region_boxes(knee: int) -> dict[int, Box3D]:
    """True boxes (slice, x, y) of a knee; they lie off centre, so that every axis, direction and end shows."""
    shift = knee % 2
    return {
        1: Box3D(1, 3, 1 + shift, 5 + shift, 2, 5),
        4: Box3D(0, 2, 6, 11 - shift, 4, 9),
        60: Box3D(3, 5, 2, 4, 0, 3 + shift),
    }


def knee_grades(knee: int, question_id: int) -> dict[str, int]:
    attributes = QUESTIONS[question_id].attributes
    return {a.name: a.grades[(knee + n) % len(a.grades)] for n, a in enumerate(attributes)}


@dataclass
class TinyDataset:
    """The dataset on disk, and handles to damage it."""

    root: Path
    convention: Convention = DEFAULT
    labels = LABELS
    template = staticmethod(template)
    diagnosis = staticmethod(diagnosis)
    boxes = staticmethod(region_boxes)
    grades = staticmethod(knee_grades)

    def image(self, knee: int) -> Path:
        return self.root / self._image_name(knee)

    def mask(self, knee: int) -> Path:
        return self.root / f"masks/knee_{knee:03d}.nii.gz"

    def items_file(self, name: str = "train.json") -> Path:
        return self.root / "generate_data" / name

    def csv_file(self, split: str = "train") -> Path:
        return self.root / "split_files" / f"{split}_split.csv"

    def edit_items(self, change: Any, name: str = "train.json") -> None:
        """Apply `change(items)` to an item file."""
        items = json.loads(self.items_file(name).read_text())
        change(items)
        self.items_file(name).write_text(json.dumps(items))

    def edit_csv(self, change: Any, split: str = "train") -> None:
        """Apply `change(lines)` to the lines of a split's CSV."""
        lines = self.csv_file(split).read_text().splitlines()
        change(lines)
        self.csv_file(split).write_text("\n".join(lines) + "\n")

    def config(self, run_dir: Path | None = None) -> Config:
        config = Config(run_dir=str(run_dir or self.root.parent / "run"))
        config.data.root = str(self.root)
        return config

    def _image_name(self, knee: int) -> str:
        _, patient, visit, side = KNEES[knee]
        return f"images/{patient}/{visit}/20040915_1024{knee}_{side}.nii.gz"

    def write(self) -> TinyDataset:
        for knee in range(len(KNEES)):
            self._write_volume(knee)
        for folder in ("split_files", "generate_data", "question_files"):
            (self.root / folder).mkdir(parents=True)
        for split in ("train", "val", "test"):
            knees = [k for k in range(len(KNEES)) if KNEES[k][0] == split]
            self._write_csv(split, knees)
            items = [self._item(knee, question) for knee in knees for question in LABELS]
            self.items_file(f"{split}.json").write_text(json.dumps(items))
        questions = {str(i): template(i) for i in LABELS}
        (self.root / "question_files/questions.json").write_text(json.dumps(questions))
        mapping = {str(i): label for i, label in LABELS.items()}
        (self.root / "question_files/question_subregion_mapping.json").write_text(json.dumps(mapping))
        return self

    def _write_volume(self, knee: int) -> None:
        affine = np.diag([*SPACING, 1.0])
        mask = np.zeros(FILE_SHAPE, np.uint8)
        for question, b in region_boxes(knee).items():
            mask[b.x_min : b.x_max, b.y_min : b.y_max, b.slice_min : b.slice_max] = LABELS[question]
        voxels = np.random.default_rng(knee).integers(0, 1000, FILE_SHAPE).astype(np.int16)
        for path, data in ((self.image(knee), voxels), (self.mask(knee), mask)):
            path.parent.mkdir(parents=True, exist_ok=True)
            nib.save(nib.Nifti1Image(data, affine), path)

    def _write_csv(self, split: str, knees: list[int]) -> None:
        with self.csv_file(split).open("w", newline="") as stream:
            writer = csv.writer(stream)
            writer.writerow(HEADER)
            for knee in knees:
                _, patient, visit, side = KNEES[knee]
                image, mask = f"../data/{self._image_name(knee)}", f"../data/masks/knee_{knee:03d}.nii.gz"
                writer.writerow(
                    [patient, visit, "20040915", f"1024{knee}", side, "../data/OAI/x", image, mask]
                )

    def _item(self, knee: int, question: int) -> dict[str, str]:
        b = region_boxes(knee)[question]
        extent = (slice(b.x_min, b.x_max), slice(b.y_min, b.y_max), slice(b.slice_min, b.slice_max))
        box = extent_box(extent, self.convention)
        numbers = box_to_text(box, self.convention.grid(FILE_SHAPE), self.convention)
        truth = diagnosis(question, knee_grades(knee, question), numbers)
        return {
            "image": f"../data/{self._image_name(knee)}",
            "prompt": template(question),
            "answer": f"The signal of region {question} was judged. Final diagnosis: {truth}",
            "final_diagnosis": truth,
        }


@pytest.fixture
def write_dataset() -> type[TinyDataset]:
    """To write it elsewhere or in another convention: `write_dataset(root, convention).write()`."""
    return TinyDataset


@pytest.fixture
def dataset(tmp_path: Path) -> TinyDataset:
    """A sound tiny dataset of its own for each test."""
    return TinyDataset(tmp_path / "data").write()
