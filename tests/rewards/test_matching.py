"""A question text is told by the JSON template in it, whatever else it says."""

import json
from pathlib import Path

import pytest

from rewards import QUESTIONS, Question, match_question
from rewards.keys import ENTITIES

PUBLIC = Path(__file__).parents[2] / "../shared/reasonknee/questions_nobbox_zeroshot.json"


def test_every_public_question_is_matched() -> None:
    if not PUBLIC.is_file():
        pytest.skip("the public question file is not here")
    texts = json.loads(PUBLIC.read_text(encoding="utf-8"))
    assert len(texts) == 69
    for number, text in texts.items():
        assert match_question(text).question_id == int(number)
        assert match_question(f"<video>\n{text}\nThink first. Report {{'bbox': [..]}}").question_id == int(
            number
        )


def canonical(question: Question) -> str:
    grades = ", ".join(f'"{a.name}": grade {a.grades[0]}-{a.grades[-1]}' for a in question.attributes)
    box = "[start_slice, end_slice, x_min, x_max, y_min, y_max]"
    return f'Answer as {{"bbox": {box}, "MOAKS_scores": {{"{question.entity}": {{{grades}}}}}}}'


@pytest.mark.parametrize("question", QUESTIONS.values(), ids=lambda q: str(q.question_id))
def test_our_own_template_is_matched(question: Question) -> None:
    assert match_question(canonical(question)) is question


def test_no_two_questions_share_an_entity_and_none_begins_another() -> None:
    """The reader and the matcher both rest on this."""
    assert len(ENTITIES) == 69
    assert not [(a, b) for a in ENTITIES for b in ENTITIES if a != b and b.startswith(f"{a}_")]


def test_snake_case_and_irregular_templates_are_matched() -> None:
    assert match_question('{"femur_medial_central_cartilage_lesion.size": 1}') is QUESTIONS[19]
    assert (
        match_question('end_slice, x_min], "medial_meniscal_root_tear": {"presence": (0 | 1)}}')
        is QUESTIONS[58]
    )


def test_other_findings_in_prose_do_not_confuse() -> None:
    text = 'An "ACL" tear is not asked. The PCL and "patella medial BML" neither. ' + canonical(QUESTIONS[62])
    assert match_question(text) is QUESTIONS[62]


def test_two_templates_are_refused_and_named() -> None:
    with pytest.raises(ValueError, match=r"60 \('ACL'\), 61 \('PCL'\)"):
        match_question(canonical(QUESTIONS[61]) + canonical(QUESTIONS[60]))


def test_a_text_without_a_template_is_refused_and_quoted() -> None:
    with pytest.raises(ValueError, match=r"no answer template .* 'How is the ACL"):
        match_question("How is the ACL?")
