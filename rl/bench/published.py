"""Figures of the 3DReasonKnee paper (arXiv 2510.20967, Tables 2 and 3), shown beside ours and never reproduced.

Which test file they were measured on and how their overall column is weighted is not stated, so they are no
reference for a difference.
"""

from __future__ import annotations

from dataclasses import dataclass

NOTE = "as published, test file and weighting unknown"


@dataclass(frozen=True, slots=True)
class PublishedRow:
    """One row of a table as printed in the paper."""

    model: str
    setting: str
    values: tuple[float, ...]


TABLE2: tuple[PublishedRow, ...] = (
    PublishedRow("Qwen2.5VL-3B", "zero-shot", (0.081, 0.253, 0.251, 0.093, 0.159, 0.158)),
    PublishedRow("Qwen2.5VL-7B", "zero-shot", (0.642, 0.309, 0.348, 0.347, 0.469, 0.470)),
    PublishedRow("o1", "zero-shot", (0.479, 0.553, 0.353, 0.332, 0.476, 0.477)),
    PublishedRow("Qwen2.5VL-3B", "instruction", (0.092, 0.149, 0.253, 0.205, 0.146, 0.146)),
    PublishedRow("Qwen2.5VL-7B", "instruction", (0.629, 0.466, 0.342, 0.297, 0.503, 0.504)),
    PublishedRow("o1", "instruction", (0.635, 0.579, 0.345, 0.391, 0.567, 0.568)),
    PublishedRow("Qwen2.5VL-7B", "instruction + true region", (0.697, 0.549, 0.338, 0.166, 0.563, 0.556)),
    PublishedRow("Qwen2.5VL-3B", "SFT without CoT", (0.706, 0.602, 0.345, 0.387, 0.616, 0.613)),
    PublishedRow("Med3DVLM", "SFT without CoT", (0.670, 0.578, 0.330, 0.346, 0.600, 0.596)),
    PublishedRow("Qwen2.5VL-3B", "SFT with CoT", (0.667, 0.600, 0.342, 0.340, 0.590, 0.588)),
    PublishedRow("Med3DVLM", "SFT with CoT", (0.671, 0.579, 0.333, 0.343, 0.605, 0.581)),
)
"""Accuracy: BML, Cartilage, Osteophyte, Meniscus, Others, Overall."""

TABLE3: tuple[PublishedRow, ...] = (
    PublishedRow("Qwen2.5VL-3B", "", (0.293, 0.275, 0.322, 0.174, 0.299, 0.305, 0.519)),
    PublishedRow("Med3DVLM", "", (0.298, 0.314, 0.359, 0.197, 0.319, 0.384, 0.470)),
)
"""Mean IoU: Patella, Femur, Tibia, Meniscus, ACL, PCL, Synovitis."""
