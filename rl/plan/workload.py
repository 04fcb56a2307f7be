"""What there is to compute: tokens of volumes, questions and completions, and how many of them there are."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from importlib.resources import files
from pathlib import Path

from rewards.ontology import BENCHMARK_QUESTION_IDS, QUESTIONS
from rewards.types import Example, Truth, VolumeRef
from rl.choices import reasoning_of
from rl.config import Config
from rl.data.boxes import parse_convention
from rl.data.layout import SPLITS, SplitRow, question_ids, read_split, split_file
from rl.data.nifti import read_header
from rl.data.phantom.dataset import planned_patients
from rl.geometry import vision_geometry, visual_grid
from rollouts.prompts import INSTRUCTION, SYSTEM_PROMPT, question_text, volume_header

RELEASED = {"train": 5_977, "val": 797, "test": 1_196}
"""Volumes of 3DReasonKnee (arXiv 2510.20967)."""
CHARACTERS_PER_TOKEN = 3.3
"""Assumed of the prompts' text where there is no tokenizer to ask."""
VOLUME_MARKS, QUESTION_MARKS = 6, 3
"""Tokens that `PromptBuilder` puts around the text, line ends included."""


@dataclass(frozen=True)
class Workload:
    """A dataset as a view shows it and as it is asked about."""

    grid: tuple[int, int, int]
    """Visual tokens along slices, rows, columns."""
    header: int
    """Text tokens before a volume."""
    question: int
    """Tokens of a question, the mean over those that are asked."""
    questions: int
    """Asked about each volume."""
    volumes: dict[str, int]
    """By split."""
    assumed: list[str] = field(default_factory=list)
    """What is not known, in words."""

    @property
    def visual(self) -> int:
        """Visual tokens of a volume."""
        frames, rows, columns = self.grid
        return frames * rows * columns

    @property
    def all_volumes(self) -> int:
        return sum(self.volumes.values())


def workload(config: Config) -> Workload:
    """From the dataset at `data.root` where there is one, else from what was released and the recipe's view.

    Raises:
        rl.data.layout.DataError: there is a dataset and it cannot be read.
    """
    geometry = vision_geometry(config.model.path)
    assert geometry is not None  # the sizes were read
    root = Path(config.data.root).expanduser()
    rows = {s: read_split(root, s) for s in SPLITS if split_file(root, s).is_file()}
    assumed: list[str] = []
    if rows:
        volumes: dict[str, int] = {split: len(found) for split, found in rows.items()}
        ids = question_ids(config)
        assumed.append(f"every volume in {root} is asked each of {len(ids)} questions")
    else:
        ids = tuple(config.data.question_ids) or BENCHMARK_QUESTION_IDS
        phantoms = config.model.path == "builtin:base"  # which has learned nothing else
        volumes = phantom_volumes(config) if phantoms else dict(RELEASED)
        kind = "recipe's {:,} phantoms" if phantoms else "released {:,} volumes"
        assumed.append(
            f"no dataset at {root}: the {kind.format(sum(volumes.values()))} x {len(ids)} questions"
        )
    first = next((row for found in rows.values() for row in found), None)
    volume = _volume(config, root, first)
    examples = [
        Example("", volume, QUESTIONS[i], Truth({}, None), patient_id="", visit="00M", side="right")
        for i in ids
    ]
    count = _counter(config.model.path, assumed)
    instruction = INSTRUCTION[reasoning_of(config)]
    asked = [count(f"{question_text(e.question)} {instruction}") for e in examples]
    return Workload(
        grid=visual_grid(config, geometry, volume.shape[0]),
        header=VOLUME_MARKS
        + count(f"system\n{SYSTEM_PROMPT}")
        + count(f"user\n{volume_header(examples[0])}"),
        question=QUESTION_MARKS + round(sum(asked) / len(asked)) + count("assistant\n"),
        questions=len(ids),
        volumes=volumes,
        assumed=assumed,
    )


def phantom_volumes(config: Config) -> dict[str, int]:
    """Volumes by split of the dataset that `reasonknee phantom` would write."""
    return {
        split: sum(len(knee) for patient in patients for knee in patient.knees)
        for split, patients in planned_patients(config.phantom).items()
    }


def _volume(config: Config, root: Path, row: SplitRow | None) -> VolumeRef:
    """The first volume of the dataset, or one like those of the recipe's `phantom` section."""
    if row is not None and (root / row.image).is_file():
        header = read_header(root / row.image, row.place)
        s, x, y = parse_convention(config.data.box_convention).axes
        shape, spacing = header.shape, header.spacing_mm
        return VolumeRef("", "", None, (shape[s], shape[x], shape[y]), (spacing[s], spacing[x], spacing[y]))
    x, y, slices = config.phantom.shape
    fov_x, fov_y, fov_slices = config.phantom.fov_mm
    return VolumeRef("", "", None, (slices, x, y), (fov_slices / slices, fov_x / x, fov_y / y))


def _counter(model_path: str, assumed: list[str]) -> Callable[[str], int]:
    """Counts the tokens of a text: by the model's tokenizer where it is on disk."""
    folder = files("rl") / "assets" / "base" if model_path == "builtin:base" else Path(model_path)
    if (folder / "tokenizer.json").is_file():
        from tokenizers import Tokenizer  # of transformers, which takes seconds to load

        tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        return lambda text: len(tokenizer.encode(text, add_special_tokens=False).ids)
    assumed.append(f"{CHARACTERS_PER_TOKEN} characters of a prompt's text make a token")
    return lambda text: round(len(text) / CHARACTERS_PER_TOKEN)
