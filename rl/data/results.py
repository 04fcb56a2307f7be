"""Result files of the public baseline (github.com/rajpurkarlab/3DReasonKnee), entry by entry.

Its scripts write two formats. Zero-shot: one JSON object for a model,

    {"{patient}_{time}_{study}_{series}_{side}_{question id}": {"question": text, "<model>_result": result, …}, …}

where a result is the JSON that the model answered (text, if that was a JSON string), `{"response": text}` when that
was no JSON, or `{"error": message}` when there was no answer. SFT: a JSON list for each of eight shards, `OUT_0.json`
to `OUT_7.json`,

    [{"image": path, "prompt": text, "generated_text": text, "final_diagnosis": truth}, …]

The files are untrusted: whatever they hold, the outcome is entries or a `ResultsError`.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rewards.errors import ReasonKneeError
from rl.data.items import recognise
from rl.data.layout import DataError, relative_path

SFT_KEYS = ("image", "prompt", "generated_text")
"""What is read of an SFT entry; its `final_diagnosis` is not: the truth is that of the configured test file."""

_ZERO_SHOT_KEY = re.compile(r"(.+)_([0-9]{1,4})", re.DOTALL)
_RESULT = "_result"
# decoded with its special tokens; the model stopped at the first of these
_END_OF_TURN = re.compile(r"<\|(?:im_end|endoftext)\|>")


class ResultsError(ReasonKneeError, ValueError):
    """A result file cannot be used; the message names the file, the entry where there is one, and the remedy."""


@dataclass(frozen=True, slots=True)
class Entry:
    """What a file holds for one question about one knee."""

    name: str
    """The entry's key, or its file, position, image and question; for people."""
    knee: str
    """Volume id (`SplitRow.volume_id`) in zero-shot files, image path relative to the data folder in SFT files."""
    question_id: int | None
    """None: the prompt carries no answer template of the 69 questions."""
    completion: str
    """Answer as text: a parsed one is written as JSON again. Empty when there is none."""
    error: str | None = None
    """Message stored in place of an answer."""


@dataclass(frozen=True, slots=True)
class Results:
    """The entries of one model, in the order of the files."""

    model: str
    """As the files call it: `qwen25vl`, `o1`; "SFT inference" where they do not."""
    entries: tuple[Entry, ...]
    repeated_keys: tuple[str, ...]
    """JSON keys given more than once in an object: the last value is the one that was read."""


def read_results(paths: Sequence[Path]) -> Results:
    """The results of one model: a zero-shot file, or the shards of SFT inference.

    Args:
        paths: files, or folders of which every `*.json` is read.

    Raises:
        ResultsError: no such file, damaged JSON, an entry of another shape, or files of several models.
    """
    files = _files(paths)
    entries: list[Entry] = []
    models: set[str] = set()
    repeated: list[str] = []
    for file in files:
        content = _load(file, repeated)
        if isinstance(content, dict) and content:
            if len(files) > 1:
                raise ResultsError(
                    f"{file} holds zero-shot results, which are one file for a model; give it without the "
                    f"{len(files) - 1} others"
                )
            models.add(_model(file, content))
            entries += _zero_shot(file, content)
        elif isinstance(content, list) and content:
            models.add("SFT inference")
            entries += _sft(file, content)
        else:
            raise ResultsError(
                f"{file} holds no results; expected a JSON object of zero-shot results or a list of SFT results"
            )
    return Results(models.pop(), tuple(entries), tuple(repeated))


def _files(paths: Sequence[Path]) -> list[Path]:
    files: list[Path] = []
    for path in paths:
        found = sorted(path.glob("*.json")) if path.is_dir() else [path] if path.is_file() else []
        if not found:
            raise ResultsError(
                f"{path} is no file, nor a folder with .json files; name a result file or the folder of its shards"
            )
        files += found
    return files


def _load(file: Path, repeated: list[str]) -> Any:
    """The content of a file; keys that an object gives more than once are added to `repeated`."""

    def as_dict(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) < len(pairs):
            repeated.extend(
                _short(key) for key, times in Counter(key for key, _ in pairs).items() if times > 1
            )
        return found

    try:
        return json.loads(file.read_bytes(), object_pairs_hook=as_dict)
    except (ValueError, RecursionError) as error:  # also bytes that are no text, and endless numbers
        raise ResultsError(f"{file}: damaged JSON ({error}); copy or make the file again") from error


def _model(file: Path, content: dict[str, Any]) -> str:
    """The one model whose results a zero-shot file holds, by the names of its `<model>_result` fields."""
    names = {
        field.removesuffix(_RESULT)
        for entry in content.values()
        if isinstance(entry, dict)
        for field in entry
        if field.endswith(_RESULT)
    }
    if len(names) != 1:
        found = ", ".join(sorted(names)[:5]) or "none"
        raise ResultsError(
            f"{file}: expected the results of one model in fields such as o1_result, found those of: {found}"
        )
    return names.pop()


def _zero_shot(file: Path, content: dict[str, Any]) -> Iterator[Entry]:
    before: dict[str, Any] = {}
    for index, (key, entry) in enumerate(content.items()):
        name = _short(key)
        place = f"{file} entry {index} ({name})"
        named = _ZERO_SHOT_KEY.fullmatch(key)
        if named is None:
            raise ResultsError(
                f"{place}: the key is not of the form patient_time_study_series_side_question, as in "
                "9010308_00M_20040915_10243212_1_42"
            )
        knee, question_id = named[1], int(named[2])
        if entry == {}:  # the scripts reserve the key before they ask
            yield Entry(name, knee, question_id, "", "asked, and nothing was stored")
            continue
        results = [field for field in entry if field.endswith(_RESULT)] if isinstance(entry, dict) else []
        if len(results) != 1 or not isinstance(entry.get("question"), str):
            raise ResultsError(
                f'{place}: expected {{"question": text, "<model>_result": result, …}}, found {_short(entry)}'
            )
        _check_question(place, question_id, entry["question"])
        result = entry[results[0]]
        told = {field: value for field, value in entry.items() if field.startswith("o1_")}
        if isinstance(result, dict) and result.keys() == {"error"}:
            yield Entry(name, knee, question_id, "", _short(result["error"]))
        elif len(told) > 1 and told == before:
            yield Entry(
                name, knee, question_id, "", "answer and token counts of the entry before: a failed call"
            )
        else:
            yield Entry(name, knee, question_id, _as_text(place, result))
        before = told


def _check_question(place: str, question_id: int, text: str) -> None:
    """Refuse a file made with questions that are numbered otherwise: every answer would be graded as another's."""
    asked = _asked(text)
    if asked not in (None, question_id):
        raise ResultsError(
            f"{place}: the key says question {question_id}, but its text asks question {asked} of the public "
            "question files; make the keys follow those"
        )


def _as_text(place: str, result: Any) -> str:
    if isinstance(result, dict) and result.keys() == {"response"}:
        result = result["response"]
    if isinstance(result, str):
        return result
    try:
        return json.dumps(result, ensure_ascii=False)
    except RecursionError as error:
        raise ResultsError(f"{place}: nested too deeply to be an answer") from error


def _sft(file: Path, content: list[Any]) -> Iterator[Entry]:
    for index, entry in enumerate(content):
        place = f"{file} entry {index}"
        if not isinstance(entry, dict) or not all(isinstance(entry.get(key), str) for key in SFT_KEYS):
            raise ResultsError(f"{place}: expected texts {', '.join(SFT_KEYS)}, found {_short(entry)}")
        image, prompt, text = (entry[key] for key in SFT_KEYS)
        question_id = _asked(prompt)
        name = f"{file.name} entry {index} ({_short(image)}, question {question_id or _short(prompt)})"
        yield Entry(name, _knee(image, place), question_id, _END_OF_TURN.split(text, maxsplit=1)[0])


def _knee(image: str, place: str) -> str:
    try:
        return relative_path(image, place)
    except DataError:  # outside the data folder: no knee of the split
        return image


def _asked(text: str) -> int | None:
    """The question whose answer template a text carries, None without one."""
    try:
        return recognise(text).question_id
    except ValueError:
        return None


def _short(content: object) -> str:
    """What can be printed of it on one line."""
    text = content if isinstance(content, str) else repr(content)
    text = "".join(c if c.isprintable() else " " for c in text[:121])
    return text if len(text) <= 120 else f"{text[:120]}…"
