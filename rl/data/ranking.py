"""Which box convention the data speaks: truth boxes against mask boxes under every one there is.

The dataset does not say which axis is x, which way each runs, or whether the last number is included, and the
end rule alone moves the IoU of a thin box from 0.31 to 0.38. Each of the 6 axis orders x 8 flips x 2 end rules
is applied to the text boxes, and the mean IoU with the boxes of the masks' largest components ranks them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import permutations, product

import numpy as np

from rl.data.boxes import Convention, Extent

CONVINCING_IOU = 0.5
"""Below this mean IoU even the best convention does not explain the boxes."""

ALL_CONVENTIONS = tuple(
    Convention((axes[0], axes[1], axes[2]), (flip[0], flip[1], flip[2]), inclusive)
    for axes in permutations(range(3))
    for flip in product((False, True), repeat=3)
    for inclusive in (True, False)
)


@dataclass(frozen=True, slots=True)
class BoxPair:
    """A box as the text gives it beside the box of the mask, both of one region of one volume."""

    numbers: tuple[int, ...]
    """Six numbers of the text."""
    extent: Extent
    """Largest component of the region, along the file's axes."""
    file_shape: tuple[int, int, int]


@dataclass(frozen=True, slots=True)
class RankedConvention:
    """One line of the ranking."""

    convention: Convention
    mean_iou: float
    same_as_best: bool
    """Its IoU is that of the best convention on every single box: these data cannot tell the two apart."""


def rank_conventions(pairs: Sequence[BoxPair]) -> list[RankedConvention]:
    """Every convention with its mean IoU over the pairs, best first (ties in a fixed order).

    Raises:
        ValueError: no pairs.
    """
    if not pairs:
        raise ValueError("no pair of a text box and a mask box to rank conventions by")
    numbers_N_3_2 = np.array([pair.numbers for pair in pairs], dtype=np.int64).reshape(-1, 3, 2)
    truth_N_3_2 = np.array([[(s.start, s.stop) for s in pair.extent] for pair in pairs], dtype=np.int64)
    shapes_N_3 = np.array([pair.file_shape for pair in pairs], dtype=np.int64)
    ious = [_ious(numbers_N_3_2, truth_N_3_2, shapes_N_3, c) for c in ALL_CONVENTIONS]
    order = sorted(range(len(ious)), key=lambda i: (-ious[i].mean(), i))
    best = ious[order[0]]
    return [
        RankedConvention(ALL_CONVENTIONS[i], float(ious[i].mean()), bool(np.array_equal(ious[i], best)))
        for i in order
    ]


def judge(ranking: Sequence[RankedConvention], configured: Convention) -> str | None:
    """Why the configured convention must not be used, with the remedy; None when it is the best.

    A convention that cannot be told from the best by any box counts as the best.
    """
    best = ranking[0]
    mine = next(entry for entry in ranking if entry.convention == configured)
    if best.mean_iou < CONVINCING_IOU:
        return (
            f"no convention explains the boxes: the best one ({best.convention.describe()}) reaches a mean IoU of "
            f"{best.mean_iou:.3f} with the masks' boxes. Check question_subregion_mapping.json and that the masks "
            "belong to the images, or take boxes from the masks with data.box_source=mask"
        )
    if mine.same_as_best:
        return None
    axes, flip, end = configured_values(best.convention)
    return (
        f"the configured data.box_convention ({configured.describe()}) has a mean IoU of {mine.mean_iou:.3f} with the "
        f"masks' boxes, rank {list(ranking).index(mine) + 1} of {len(ranking)}; the best reaches {best.mean_iou:.3f}. "
        f'Set data.box_convention.axes="{axes}" data.box_convention.flip="{flip}" data.box_convention.end={end}'
    )


def configured_values(convention: Convention) -> tuple[str, str, str]:
    """A convention as the three values of `data.box_convention`."""
    s, x, y = convention.axes
    flip = ",".join(
        name for name, flipped in zip(("slice", "x", "y"), convention.flip, strict=True) if flipped
    )
    return f"slice={s},x={x},y={y}", flip, "inclusive" if convention.inclusive else "exclusive"


def _ious(
    numbers_N_3_2: np.ndarray, truth_N_3_2: np.ndarray, shapes_N_3: np.ndarray, c: Convention
) -> np.ndarray:
    """IoU of each text box, read by a convention, with its mask box. An empty or inverted box scores 0."""
    read_N_3_2 = np.empty_like(numbers_N_3_2)
    for position, axis in enumerate(c.axes):
        low, high = numbers_N_3_2[:, position, 0], numbers_N_3_2[:, position, 1] + int(c.inclusive)
        size = shapes_N_3[:, axis]
        read_N_3_2[:, axis, 0] = size - high if c.flip[position] else low
        read_N_3_2[:, axis, 1] = size - low if c.flip[position] else high
    overlap_N_3 = np.minimum(read_N_3_2[..., 1], truth_N_3_2[..., 1]) - np.maximum(
        read_N_3_2[..., 0], truth_N_3_2[..., 0]
    )
    overlap_N = np.clip(overlap_N_3, 0, None).prod(axis=1)
    volumes_N = [
        np.clip(box[..., 1] - box[..., 0], 0, None).prod(axis=1) for box in (read_N_3_2, truth_N_3_2)
    ]
    return overlap_N / (volumes_N[0] + volumes_N[1] - overlap_N)
