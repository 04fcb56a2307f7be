"""Result files of the public baseline, in the shape its scripts write, whole and damaged."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from rl.data.results import Entry, ResultsError, read_results

PUBLIC_QUESTIONS = Path(__file__).parents[4] / "shared/reasonknee/questions_nobbox_zeroshot.json"
KNEE = "9000005_00M_20040915_10245_1"
TOKENS = {f"o1_{kind}_tokens": 7 for kind in ("total", "completion", "prompt", "reasoning")}


def asked(result: Any, question: str = "Grade this knee.") -> dict[str, Any]:
    """An entry as the zero-shot scripts store it."""
    return {"question": question, "o1_result": result, **TOKENS}


def sft(**changes: str) -> dict[str, str]:
    """An entry as the SFT inference script stores it."""
    image = "../data/images/9000005/00M/20040915_10245_1.nii.gz"
    texts = {"image": image, "prompt": "?", "generated_text": "2<|im_end|>", "final_diagnosis": "{}"}
    return texts | changes


def write(path: Path, content: Any) -> Path:
    path.write_text(json.dumps(content, indent=2))
    return path


def test_a_zero_shot_result_is_read_as_the_text_it_was(tmp_path: Path) -> None:
    """JSON is written again, other text is kept, an error is no answer, and a reserved key is none either."""
    content = {
        f"{KNEE}_1": asked({"MOAKS_scores": {"a": {"Size ≥": 2}}}),
        f"{KNEE}_4": asked({"response": "I cannot say."}),
        f"{KNEE}_42": asked({"error": "CUDA out of memory"}),
        f"{KNEE}_60": {},
        f"{KNEE}_61": asked(2),
        f"{KNEE}_62": asked({"response": "no", "grade": 1}),
        f"{KNEE}_2": asked('{"grade": 2}'),
    }
    results = read_results([write(tmp_path / "o1.json", content)])
    assert results.model == "o1"
    assert results.entries == (
        Entry(f"{KNEE}_1", KNEE, 1, '{"MOAKS_scores": {"a": {"Size ≥": 2}}}'),
        Entry(f"{KNEE}_4", KNEE, 4, "I cannot say."),
        Entry(f"{KNEE}_42", KNEE, 42, "", "CUDA out of memory"),
        Entry(f"{KNEE}_60", KNEE, 60, "", "asked, and nothing was stored"),
        Entry(f"{KNEE}_61", KNEE, 61, "2"),
        Entry(f"{KNEE}_62", KNEE, 62, '{"response": "no", "grade": 1}'),
        Entry(f"{KNEE}_2", KNEE, 2, '{"grade": 2}'),
    )


def test_the_answer_and_token_counts_of_the_entry_before_are_a_failed_call_of_the_o1_script(
    tmp_path: Path,
) -> None:
    """Even where the answer does not say what it is about; an equal answer at another cost is an answer."""
    short = {"Size": 0, "Depth": 0}
    content = {
        f"{KNEE}_16": asked(short),
        f"{KNEE}_17": asked(short),
        f"{KNEE}_18": asked(short) | {"o1_total_tokens": 8},
    }
    entries = read_results([write(tmp_path / "o1.json", content)]).entries
    assert [entry.error for entry in entries] == [
        None,
        "answer and token counts of the entry before: a failed call",
        None,
    ]
    assert entries[1].completion == ""


def test_what_is_printed_of_a_file_is_one_printable_line(tmp_path: Path) -> None:
    content = {f"{KNEE}_1": asked({"error": "CUDA error:\nout of \x1b[31mmemory \udc00"})}
    (entry,) = read_results([write(tmp_path / "o1.json", content)]).entries
    assert entry.error == "CUDA error: out of  [31mmemory  "


def test_the_shards_of_sft_inference_are_one_run(tmp_path: Path, dataset: Any) -> None:
    """Question by the prompt's template, knee by the image path, text up to the token that ended the turn."""
    for index, question_id in ((0, 1), (1, 60)):
        prompt = "<|vision_start|>" + dataset.template(question_id)
        write(tmp_path / f"OUT_{index}.json", [sft(prompt=prompt), sft(image="/elsewhere.nii.gz")])
    results = read_results([tmp_path])
    assert results.model == "SFT inference"
    assert results == read_results([tmp_path / "OUT_0.json", tmp_path / "OUT_1.json"])
    assert [(e.knee, e.question_id, e.completion) for e in results.entries] == [
        ("images/9000005/00M/20040915_10245_1.nii.gz", 1, "2"),
        ("/elsewhere.nii.gz", None, "2"),
        ("images/9000005/00M/20040915_10245_1.nii.gz", 60, "2"),
        ("/elsewhere.nii.gz", None, "2"),
    ]
    assert results.entries[2].name.startswith("OUT_1.json entry 0 (../data/images/")


def test_a_key_given_twice_is_named_and_its_last_value_read(tmp_path: Path) -> None:
    file = tmp_path / "o1.json"
    one, two = (json.dumps(asked({"grade": grade})) for grade in (1, 2))
    file.write_text(f'{{"{KNEE}_42": {one}, "{KNEE}_43": {one}, "{KNEE}_42": {two}}}')
    results = read_results([file])
    assert results.repeated_keys == (f"{KNEE}_42",)
    assert [entry.completion for entry in results.entries] == ['{"grade": 2}', '{"grade": 1}']


DAMAGED = {
    "cut off": (json.dumps({f"{KNEE}_1": asked(2)})[:-9], r"damaged JSON \(.*line 1 column"),
    "cut off in a list": (json.dumps([sft(), sft()])[:-9], r"damaged JSON \(.*line 1 column"),
    "empty": ("", "damaged JSON"),
    "no text": ("\udcff", "damaged JSON"),
    "endlessly nested": ('{"a": ' + "[" * 100_000, "damaged JSON"),
    "an endless number": ('{"a": ' + "9" * 5_000 + "}", "damaged JSON"),
    "no results": ("{}", "holds no results"),
    "no object": ("3", "holds no results"),
    "no key of an item": (json.dumps({"images/a.nii.gz": asked(2)}), r"entry 0 \(images/a.nii.gz\): the key"),
    "a key without a knee": (json.dumps({"_12": asked(2)}), r"entry 0 \(_12\): the key"),
    "no question": (
        json.dumps({f"{KNEE}_1": asked(2), f"{KNEE}_2": {"o1_result": 2}}),
        rf"entry 1 \({KNEE}_2\): expected .* found \{{'o1_result': 2\}}",
    ),
    "an entry that is no object": (
        json.dumps({f"{KNEE}_1": asked(2), f"{KNEE}_2": [2]}),
        rf"entry 1 \({KNEE}_2\): expected",
    ),
    "results of no model": (json.dumps({f"{KNEE}_1": {"question": "?"}}), "found those of: none"),
    "results of two models": (
        json.dumps({f"{KNEE}_1": asked(2), f"{KNEE}_2": {"question": "?", "qwen25vl_result": 2}}),
        "found those of: o1, qwen25vl",
    ),
    "an SFT entry without an answer": (
        json.dumps([sft(), {"image": "a", "prompt": "b", "answer": "c", "final_diagnosis": "d"}]),
        "entry 1: expected texts image, prompt, generated_text, found",
    ),
    "an SFT entry that is no object": ("[[]]", "entry 0: expected texts"),
}


@pytest.mark.parametrize("damage", DAMAGED)
def test_a_damaged_file_is_an_error_that_names_file_and_place(damage: str, tmp_path: Path) -> None:
    text, said = DAMAGED[damage]
    file = tmp_path / "results.json"
    file.write_bytes(text.encode("utf-8", "surrogateescape"))
    with pytest.raises(ResultsError, match=f"(?s){re.escape(str(file))}.*{said}"):
        read_results([file])


def test_a_key_that_disagrees_with_the_question_it_asks_is_refused(tmp_path: Path, dataset: Any) -> None:
    """Another numbering of the questions would have every answer graded as another question's."""
    right = write(tmp_path / "right.json", {f"{KNEE}_4": asked(2, dataset.template(4))})
    assert read_results([right]).entries[0].question_id == 4
    wrong = write(tmp_path / "wrong.json", {f"{KNEE}_5": asked(2, dataset.template(4))})
    with pytest.raises(ResultsError, match=r"the key says question 5, but its text asks question 4"):
        read_results([wrong])


@pytest.mark.skipif(not PUBLIC_QUESTIONS.is_file(), reason="the public question file is not at hand")
def test_the_public_questions_agree_with_their_keys(tmp_path: Path) -> None:
    questions = json.loads(PUBLIC_QUESTIONS.read_text(encoding="utf-8"))
    content = {f"{KNEE}_{number}": asked(2, text) for number, text in questions.items()}
    entries = read_results([write(tmp_path / "o1.json", content)]).entries
    assert [entry.question_id for entry in entries] == list(range(1, 70))


def test_zero_shot_results_are_one_file_for_a_model(tmp_path: Path) -> None:
    """The public scripts write those of three models to one folder."""
    for name in ("o1", "qwen"):
        write(tmp_path / f"{name}.json", {f"{KNEE}_1": asked(2)})
    with pytest.raises(
        ResultsError, match=r"o1\.json holds zero-shot results, which are one file for a model"
    ):
        read_results([tmp_path])


def test_a_path_without_results_is_named(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "missing.json"):
        with pytest.raises(ResultsError, match=re.escape(str(path))):
            read_results([path])


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=12,
)
KEYS = st.sampled_from([f"{KNEE}_1", f"{KNEE}_70", "_", ""]) | st.text(max_size=9)
FIELDS = st.sampled_from(["question", "o1_result", "image", "prompt", "generated_text"]) | st.text(max_size=9)
ENTRIES = st.dictionaries(FIELDS, JSON, max_size=4) | JSON
FILES = st.dictionaries(KEYS, ENTRIES, max_size=3) | st.lists(ENTRIES, max_size=3)


def readable_or_named(file: Path) -> bool:
    """Whether a file gives entries, or an error that names it; any other exception is the caller's."""
    try:
        return bool(read_results([file]).entries)
    except ResultsError as error:
        return str(file) in str(error)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(content=st.binary(max_size=60) | FILES.map(lambda content: json.dumps(content).encode()))
@example(content=json.dumps({f"{KNEE}_1": asked({"response": "\ud800"})}).encode())
@example(content=json.dumps({f"{KNEE}_1": asked(float("nan"))}).encode())
@example(content=f'{{"{KNEE}_1": {{"question": "?", "o1_result": {"[" * 900}{"]" * 900}}}}}'.encode())
def test_whatever_a_file_holds_it_gives_entries_or_the_named_error(content: bytes, tmp_path: Path) -> None:
    file = tmp_path / "results.json"
    file.write_bytes(content)
    assert readable_or_named(file)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_a_sound_file_with_any_bytes_changed_gives_entries_or_the_named_error(
    data: st.DataObject, tmp_path: Path
) -> None:
    sound = json.dumps(data.draw(st.sampled_from([{f"{KNEE}_1": asked({"grade": 2})}, [sft(), sft()]])))
    start = data.draw(st.integers(0, len(sound)))
    end = data.draw(st.integers(start, min(len(sound), start + 20)))
    changed = sound[:start].encode() + data.draw(st.binary(max_size=6)) + sound[end:].encode()
    file = tmp_path / "results.json"
    file.write_bytes(changed)
    assert readable_or_named(file)
