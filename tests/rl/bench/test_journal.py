"""The journal: what was answered stays, whatever ends the run, and damage is named."""

from __future__ import annotations

from pathlib import Path

import pytest

from rl.bench.journal import Entry, Journal, JournalError

FIRST, SECOND = Entry("a1", "p_1", "<answer>{}</answer>\n", "stop"), Entry("b2", "p_2", "é", "length")


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """A journal of two answers."""
    journal = Journal(tmp_path / "made" / "journal.jsonl")
    journal.append(FIRST)
    journal.append(SECOND)
    return journal.path


def test_answers_are_there_when_the_journal_is_opened_again(path: Path) -> None:
    journal = Journal(path)
    assert (journal["a1"], journal["b2"]) == (FIRST, SECOND)
    assert "c3" not in journal


def test_a_line_cut_off_by_a_kill_is_forgotten_and_the_next_answer_stands_on_its_own_line(path: Path) -> None:
    whole = path.read_bytes()
    for length in range(whole.index(b"\n") + 2, len(whole)):
        path.write_bytes(whole[:length])
        journal = Journal(path)
        assert "b2" not in journal
        journal.append(SECOND)
        assert path.read_bytes() == whole


@pytest.mark.parametrize("line", ["", "{", '{"key": "a"}', '{"key": 1}', "[]"])
def test_any_other_line_that_is_no_answer_is_named_with_its_file(path: Path, line: str) -> None:
    first, second = path.read_text().splitlines()
    path.write_text("\n".join([first, line, second, ""]))
    with pytest.raises(JournalError, match=r"journal\.jsonl line 2 is no answer .*; remove the line"):
        Journal(path)
