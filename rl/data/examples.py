"""Examples of a split: a lazy view on a memory-mapped Arrow table built once from the released files."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, overload

import xxhash
from datasets import Dataset

from rewards.boxes import Box3D
from rewards.ontology import QUESTIONS
from rewards.types import Example, Truth, VolumeRef
from rl.config import Config, ConfigError
from rl.data.arrow_cache import cache_key, cached_table
from rl.data.layout import (
    DataError,
    Fault,
    Split,
    data_root,
    item_file_name,
    question_label_files,
    read_split,
    split_file,
)
from rl.data.rows import Row, RowBuilder


class Examples(Sequence[Example]):
    """The examples of a file in order, built from Arrow rows one at a time.

    `column(name)` reads one field of every example without building any: `question_id`, `patient_id`,
    `volume_id`, `grades` (JSON, attribute -> grade) and the other names of `items.Row`.
    """

    def __init__(self, dataset: Dataset, root: Path, fingerprint: str) -> None:
        self.dataset = dataset
        """The rows as a Hugging Face dataset, for `filter` and `map`."""
        self.root = root
        self.fingerprint = fingerprint
        """Hash of the rows' content: equal for equal data, wherever it lies on disk."""

    def __len__(self) -> int:
        return len(self.dataset)

    @overload
    def __getitem__(self, index: int) -> Example: ...
    @overload
    def __getitem__(self, index: slice) -> Examples: ...
    def __getitem__(self, index: int | slice) -> Example | Examples:
        if isinstance(index, slice):
            return self.select(range(*index.indices(len(self))))
        if not -len(self) <= index < len(self):
            raise IndexError(f"example {index} of {len(self)}")
        return _example(self.dataset[int(index) % len(self)], self.root)

    def column(self, name: str) -> list[Any]:
        """One field of every example, in order."""
        return list(self.dataset[name][:])

    def select(self, indices: Iterable[int]) -> Examples:
        """The examples at these positions, in this order; still a view on the same file."""
        chosen = [int(i) for i in indices]
        fingerprint = xxhash.xxh128(f"{self.fingerprint}{chosen}".encode()).hexdigest()
        return Examples(self.dataset.select(chosen), self.root, fingerprint)

    def by_volume(self) -> dict[str, list[int]]:
        """Positions of the examples of each volume, volumes in order of first appearance."""
        groups: dict[str, list[int]] = {}
        for index, volume_id in enumerate(self.column("volume_id")):
            groups.setdefault(volume_id, []).append(index)
        return groups

    def volumes(self) -> dict[str, VolumeRef]:
        """Each volume once, by its id."""
        return {volume_id: self[indices[0]].volume for volume_id, indices in self.by_volume().items()}


def _example(row: Row, root: Path) -> Example:
    question = QUESTIONS[row["question_id"]]
    slices, x, y = row["shape"]
    volume = VolumeRef(
        volume_id=row["volume_id"],
        image_path=str(root / row["image"]),
        mask_path=None if row["mask"] is None else str(root / row["mask"]),
        shape=(slices, x, y),
        spacing_mm=(row["spacing_mm"][0], row["spacing_mm"][1], row["spacing_mm"][2]),
    )
    return Example(
        example_id=row["example_id"],
        volume=volume,
        question=question,
        truth=Truth(json.loads(row["grades"]), None if row["bbox"] is None else Box3D(*row["bbox"])),
        patient_id=row["patient_id"],
        visit=row["visit"],
        side="right" if row["side"] == "right" else "left",
        reasoning=row["reasoning"],
    )


def load_examples(config: Config, split: Split, file: str | None = None) -> Examples:
    """The examples of a split: items of `generate_data/<file>` joined to `<split>_split.csv` by image path.

    Args:
        config: `data` says where and how to read; `run_dir` holds the Arrow cache.
        split: train, val or test.
        file: name under `generate_data/`; by default `data.<split>_file`.

    Items of questions outside `layout.question_ids(config)` are left out; nothing else ever is.

    Raises:
        DataError: the first fault met, naming file, item or row, and remedy. A missing volume is one.
        ConfigError: a data setting that cannot be used.
    """
    root = data_root(config)
    if config.data.box_source not in ("text", "mask"):
        raise ConfigError(f'data.box_source is {config.data.box_source!r}; write "text" or "mask"')
    name = file or item_file_name(config, split)
    path = root / "generate_data" / name
    sources = read_split(root, split)
    builder = RowBuilder(config, root, split, sources)
    from_masks = config.data.box_source == "mask"
    key = cache_key(
        (builder.convention, builder.question_ids, from_masks),
        [path, split_file(root, split), *(question_label_files(root) if from_masks else ())],
        root,
        sources,
        masks=from_masks,
    )
    folder = Path(config.run_dir) / "data-cache" / f"{split}-{Path(name).stem}-{key}"
    dataset, fingerprint = cached_table(folder, lambda: builder.rows(path))
    if not len(dataset):
        raise DataError(
            Fault.ITEM,
            f"{path} holds no item for questions {list(builder.question_ids)}; set data.question_ids to ids it asks",
        )
    return Examples(dataset, root, fingerprint)
