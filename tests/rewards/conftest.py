"""Examples to score."""

from collections.abc import Callable, Mapping

import pytest

from rewards import QUESTIONS, Box3D, Example, Truth, VolumeRef

TRUE_BOX = Box3D(2, 6, 10, 30, 20, 50)


@pytest.fixture
def make_example() -> Callable[..., Example]:
    """`make_example(question_id, grades=None, bbox=..., visit=...)`: grade 1 everywhere unless told otherwise."""

    def make(
        question_id: int = 1,
        grades: Mapping[str, int] | None = None,
        bbox: Box3D | None = TRUE_BOX,
        visit: str = "00M",
        example_id: str = "9000001_00M_s_s_1_1",
    ) -> Example:
        question = QUESTIONS[question_id]
        if grades is None:
            grades = {attribute.name: 1 for attribute in question.attributes}
        volume = VolumeRef("9000001_00M_s_s_1", "image.nii.gz", None, (16, 96, 96), (6.5, 1.5, 1.5))
        return Example(example_id, volume, question, Truth(grades, bbox), "9000001", visit, "right")

    return make
