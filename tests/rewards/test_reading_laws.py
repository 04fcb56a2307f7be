"""Laws of reading: total on any text, linear in its length, and inverse to writing."""

import json
import random
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rewards import QUESTIONS, Answer, Box3D, Problem, Question, format_answer, read_answer

MODES = ("strict", "tolerant")

questions = st.sampled_from(list(QUESTIONS.values()))
thoughts = st.text(min_size=1).filter(lambda text: any(c.isalnum() and c != "_" for c in text))


@st.composite
def grades_of(draw: st.DrawFn, question: Question) -> dict[str, int]:
    return {a.name: draw(st.sampled_from(a.grades)) for a in question.attributes}


@st.composite
def boxes(draw: st.DrawFn) -> Box3D:
    corners = []
    for _ in range(3):
        low = draw(st.integers(0, 383))
        corners += [low, draw(st.integers(low, 383))]
    return Box3D.from_text(corners)


def check(answer: Answer, question: Question) -> None:
    """What holds for every answer, whatever was read."""
    for name, grade in answer.grades.items():
        assert type(grade) is int
        assert grade in question.attribute(name).grades
    if answer.grades_problem is Problem.NONE:
        assert len(answer.grades) == len(question.attributes)
    assert (answer.bbox is not None) == (answer.bbox_problem in (Problem.NONE, Problem.BOX_OUTSIDE_VOLUME))
    if not answer.ok:
        assert answer != Answer()


def read_both(text: str, question: Question) -> None:
    for mode in MODES:
        for reasoning in ("required", "none"):
            check(read_answer(text, question, mode=mode, reasoning=reasoning, shape=(16, 96, 96)), question)  # type: ignore[arg-type]


@given(questions.flatmap(lambda q: st.tuples(st.just(q), grades_of(q))), boxes(), st.none() | thoughts)
def test_what_is_written_is_read_back(
    asked: tuple[Question, dict[str, int]], box: Box3D, thought: str | None
) -> None:
    question, grades = asked
    text = format_answer(question, grades, box, reasoning=thought)
    for mode in MODES:
        answer = read_answer(
            text,
            question,
            mode=mode,  # type: ignore[arg-type]
            reasoning="none" if thought is None else "required",
        )
        assert answer.ok
        assert answer.strict
        assert answer.grades == grades
        assert answer.bbox == box
        assert answer.reasoning == (thought or "").strip()


@given(st.text(), questions)
def test_any_text_is_read(text: str, question: Question) -> None:
    read_both(text, question)


PIECES = [
    *(
        "<think>",
        "</think>",
        "<answer>",
        "</answer>",
        "<Answer>",
        "Final diagnosis:",
        "```json",
        "```",
        "\n",
        " ",
    ),
    *("{", "}", "[", "]", ":", ",", '"', "'", "\\", ".", "<", ">", "\x00"),
    *("0", "1", "2", "2.0", "-1", "1e400", "NaN", "true", "null", '"2"', '"0-3"', "9" * 50, "[0,1,2,3]"),
    *('"bbox":', '"bbox":[2,5,10,29,20,49]', "[5,2,10,29,20,49]", '"MOAKS_scores":', '"MOAKS_grade":{'),
    *('"ACL":{', '"Complete Tear":1', '"Complete Tear":', '"ACL Repair":0,', '"ACL.complete_tear":1', "x"),
]
FRAGMENTS = st.sampled_from(PIECES)


@given(st.lists(FRAGMENTS | st.text(max_size=3), max_size=40).map("".join))
def test_any_heap_of_answer_fragments_is_read(text: str) -> None:
    read_both(text, QUESTIONS[60])


@given(st.data())
def test_any_damaged_answer_is_read(data: st.DataObject) -> None:
    question = data.draw(questions)
    text = format_answer(question, data.draw(grades_of(question)), data.draw(boxes()), reasoning="thin")
    for _ in range(data.draw(st.integers(1, 4))):
        start = data.draw(st.integers(0, len(text)))
        end = data.draw(st.integers(start, min(len(text), start + 20)))
        text = text[:start] + data.draw(FRAGMENTS | st.text(max_size=3)) + text[end:]
    read_both(text, question)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda children: (
        st.lists(children, max_size=7) | st.dictionaries(st.text(max_size=5), children, max_size=4)
    ),
    max_leaves=12,
)


@given(json_values, json_values, questions)
def test_any_json_in_place_of_grades_or_box_is_read(scores: object, bbox: object, question: Question) -> None:
    for content in (
        {"bbox": bbox, "MOAKS_scores": {question.entity: scores}},
        {"bbox": bbox, "MOAKS_scores": scores},
    ):
        read_both(f"<think>thin</think><answer>{json.dumps(content)}</answer>", question)


@given(
    questions.flatmap(lambda q: st.tuples(st.just(q), grades_of(q))),
    boxes(),
    st.text(alphabet=" \n\t", max_size=5),
)
def test_tolerant_reads_whatever_strict_reads_alike(
    asked: tuple[Question, dict[str, int]], box: Box3D, space: str
) -> None:
    question, grades = asked
    text = space + format_answer(question, grades, box, reasoning="thin") + space
    assert read_answer(text, question) == read_answer(text, question, mode="tolerant")


HOSTILE = [
    "{",
    "[",
    "}",
    "{} ",
    '"a":{} ',
    '"',
    '"\\',
    '{"\\"',
    "<think>",
    "</think>",
    "<answer>",
    "<answer></answer>",
    "<",
    " ",
    ".",
    "9",
    '{"a":',
    '{"a":[',
    "Final diagnosis:",
    "final diagnosis        ",
    '"a":1,',
    '[1]{"',
    "\ud800",
]


@pytest.mark.parametrize("pattern", HOSTILE, ids=repr)
@pytest.mark.parametrize(
    "frame", ["{}", "<think>{}</think><answer>{}</answer>", '<answer>{{"bbox":{}}}</answer>']
)
def test_a_hostile_text_costs_no_more_than_its_length(pattern: str, frame: str) -> None:
    """16 KB reach the JSON search, 250 KB the tag search. Quadratic steps would take minutes here."""
    for size in (16_000, 125_000):
        filler = pattern * (size // len(pattern))
        started = time.process_time()
        read_both(frame.format(filler, filler), QUESTIONS[1])
        assert time.process_time() - started < 2.0


@pytest.mark.parametrize("frame", ["0{}x", "{}0{}x", "<answer>0{}.{}x</answer>"])
def test_blanks_around_a_bare_grade_cost_no_more_than_their_length(frame: str) -> None:
    """Only a question of one attribute takes a grade without an object."""
    for blank in (" ", "\n", "\u2003"):
        filler = blank * 8_000
        started = time.process_time()
        read_both(frame.format(filler, filler), QUESTIONS[42])
        assert time.process_time() - started < 0.1


@pytest.mark.parametrize("pattern", HOSTILE, ids=repr)
def test_ten_megabytes_are_not_even_looked_at(pattern: str) -> None:
    text = pattern * (10_000_000 // len(pattern))
    started = time.process_time()
    for mode in MODES:
        answer = read_answer(text, QUESTIONS[1], mode=mode)  # type: ignore[arg-type]
        assert answer.format_problem is Problem.TOO_LONG
    assert time.process_time() - started < 0.1


@pytest.mark.evidence
def test_a_million_fragment_heaps_are_read() -> None:
    """The long fuzz: seeded, so that a failure can be run again."""
    rng = random.Random(0)
    for _ in range(1_000_000):
        text = "".join(rng.choices(PIECES, k=rng.randrange(20)))
        for mode in MODES:
            check(read_answer(text, QUESTIONS[60], mode=mode), QUESTIONS[60])  # type: ignore[arg-type]
