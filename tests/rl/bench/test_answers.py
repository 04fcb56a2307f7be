"""A run on disk: what is written is read back, and what cannot be trusted is refused by file and row."""

from __future__ import annotations

import dataclasses
import hashlib
import json

import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rewards.types import Truth
from rl.bench.answers import (
    SCHEMA,
    AnswerRow,
    RunError,
    answer_row,
    examples_of,
    item_hash,
    make_run,
    read_run,
    write_run,
)


def rows_of(run):
    return [
        AnswerRow(**{n: tuple(v) if isinstance(v, list) else v for n, v in zip(SCHEMA, row, strict=True)})
        for row in run.answers.iter_rows()
    ]


@pytest.fixture
def run(examples, answered):
    return answered(examples(2, [1, 42, 60], visits=1), "SFT", 0.5)


def test_a_run_is_read_back_as_written(tmp_path, run):
    written = write_run(tmp_path / "sft", rows_of(run), run.meta)
    again = read_run(tmp_path / "sft")
    assert again.meta == written.meta
    assert again.meta.n == 6
    assert again.answers.equals(run.answers)
    assert sorted(p.name for p in (tmp_path / "sft").iterdir()) == ["answers.parquet", "run.json"]


def test_a_completion_with_a_lone_surrogate_can_be_stored(examples, meta):
    row = answer_row(examples(1, [1], visits=1)[0], "a\ud800b", "stop", "strict")
    assert make_run([row], meta("SFT")).answers["completion"][0] == "a?b"


def test_a_folder_without_run_json_is_an_unfinished_run(tmp_path, run):
    write_run(tmp_path, rows_of(run), run.meta)
    (tmp_path / "run.json").unlink()
    with pytest.raises(RunError, match=r"run\.json does not exist"):
        read_run(tmp_path)


def test_a_truncated_parquet_is_named(tmp_path, run):
    write_run(tmp_path, rows_of(run), run.meta)
    path = tmp_path / "answers.parquet"
    path.write_bytes(path.read_bytes()[:200])
    with pytest.raises(RunError, match=r"answers\.parquet is truncated or damaged"):
        read_run(tmp_path)


def test_a_truncated_run_json_is_named(tmp_path, run):
    write_run(tmp_path, rows_of(run), run.meta)
    path = tmp_path / "run.json"
    path.write_text(path.read_text()[:50])
    with pytest.raises(RunError, match=r"run\.json cannot be read"):
        read_run(tmp_path)


def test_an_unknown_key_in_run_json_is_named(tmp_path, run):
    write_run(tmp_path, rows_of(run), run.meta)
    path = tmp_path / "run.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"temprature": 1}))
    with pytest.raises(RunError, match="temprature"):
        read_run(tmp_path)


def test_missing_rows_are_noticed(tmp_path, run):
    write_run(tmp_path, rows_of(run), run.meta)
    run.answers.head(4).write_parquet(tmp_path / "answers.parquet")
    with pytest.raises(RunError, match=r"has 4 rows but run\.json says n = 6"):
        read_run(tmp_path)


def test_another_layout_names_the_columns(tmp_path, run):
    write_run(tmp_path, rows_of(run), run.meta)
    run.answers.rename({"completion": "text"}).write_parquet(tmp_path / "answers.parquet")
    with pytest.raises(RunError, match=r"completion.*text"):
        read_run(tmp_path)


def test_a_duplicate_item_is_refused_with_its_rows(run):
    rows = rows_of(run)
    with pytest.raises(RunError, match=r"occurs 2 times \(rows \[1, 6\]\)"):
        make_run([*rows, rows[1]], run.meta)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"question_id": 77}, "row 2: unknown question id 77"),
        ({"question_id": 5}, r"row 2: question outside the set: 5; .* 3 questions \(1, 42, 60\)"),
        ({"reader": "tolerant"}, "row 2: reader is 'tolerant', run.json says 'strict'"),
        ({"truth_grades": '{"no such": 1}'}, "row 2: question 60 has no attribute 'no such'"),
        ({"truth_grades": '{"ACL Repair": 2}'}, "row 2: true grade 2 of 'ACL Repair' is outside 0-1"),
        ({"truth_grades": '{"ACL Repair": true}'}, "row 2: true grade True"),
        ({"truth_grades": "{"}, "row 2: truth_grades is not JSON"),
        ({"truth_bbox": (3, 1, 0, 1, 0, 1)}, "row 2: truth_bbox .* is not three ordered pairs"),
        ({"volume_id": "another"}, "row 2: item_hash .* does not match"),
    ],
)
def test_a_bad_row_is_refused_by_number(run, change, message):
    rows = rows_of(run)
    rows[2] = dataclasses.replace(rows[2], **change)
    with pytest.raises(RunError, match=message):
        make_run(rows, run.meta)


def test_an_empty_run_is_refused(run):
    with pytest.raises(RunError, match="holds no answers"):
        make_run([], run.meta)


def test_the_hash_depends_on_question_volume_truth_and_reader_and_not_on_the_answer(run):
    base = (1, "v", (2, 3, 4), '{"a": 1}', (0, 1, 0, 1, 0, 1), "strict")
    others = [
        (2, *base[1:]),
        (1, "w", *base[2:]),
        (1, "v", (2, 3, 5), *base[3:]),
        (*base[:3], "{}", *base[4:]),
        (*base[:4], None, "strict"),
        (*base[:5], "tolerant"),
    ]
    assert len({item_hash(*content) for content in [base, *others]}) == 7
    assert run.answers["item_hash"].n_unique() == 6


@settings(max_examples=50)
@given(st.integers(), st.text(), st.lists(st.integers()), st.none() | st.lists(st.integers()))
def test_the_hash_is_that_of_the_content_as_json(question_id, text, shape, box):
    content = json.dumps([question_id, text, shape, text[::-1], box, "strict"], ensure_ascii=False)
    wanted = hashlib.blake2b(content.encode("utf-8", "surrogatepass"), digest_size=16).hexdigest()
    assert item_hash(question_id, text, shape, text[::-1], box, "strict") == wanted


def test_examples_come_back_from_their_rows(examples, meta):
    asked = examples(2, [1, 42])
    asked[1] = dataclasses.replace(asked[1], truth=Truth({}, None))
    rows = [answer_row(example, "", "stop", "strict") for example in asked]
    assert list(examples_of(make_run(rows, meta("x")).answers)) == asked


def test_the_question_set_is_said_in_words(meta):
    assert meta("x").question_set == "62 questions (1-62)"
    assert meta("x", [5, 1, 2, 3]).question_set == "4 questions (1-3, 5)"
    assert meta("x", [7]).question_set == "1 question (7)"


def test_the_setting_is_read_back_said_in_words_and_assumed_in_runs_that_name_none(tmp_path, run):
    meta = dataclasses.replace(run.meta, image="shuffled", prompts="mine.json", prompts_hash="0f")
    write_run(tmp_path, rows_of(run), meta)
    assert (
        read_run(tmp_path).meta.setting_words == "shown another patient's volume, prompts of mine.json (0f)"
    )
    assert meta.not_asked().setting_words == "setting not recorded"
    stored = json.loads((tmp_path / "run.json").read_text())
    for field in ("image", "prompts", "prompts_hash"):
        del stored[field]
    (tmp_path / "run.json").write_text(json.dumps(stored))
    assert read_run(tmp_path).meta.setting_words == "shown the volume, own prompts"
    (tmp_path / "run.json").write_text(json.dumps({**stored, "image": "hidden"}))
    with pytest.raises(RunError, match="image"):
        read_run(tmp_path)


def test_decoding_is_said_in_words(meta):
    assert meta("x").decoding_words == "greedy decoding, max_tokens 128"
    sampled = dataclasses.replace(meta("x"), decoding={"temperature": 0.7, "top_p": 0.9})
    assert sampled.decoding_words == "sampled with temperature 0.7, top_p 0.9"
    assert dataclasses.replace(meta("x"), decoding={}).decoding_words == "decoding not recorded"


def test_lists_survive_as_integers(tmp_path, run):
    write_run(tmp_path, rows_of(run), run.meta)
    assert pl.read_parquet_schema(tmp_path / "answers.parquet")["truth_bbox"] == pl.List(pl.Int64())
