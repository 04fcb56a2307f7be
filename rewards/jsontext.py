"""JSON inside untrusted text: decoding with caps, and finding objects in prose. Nothing here raises on any text.

Objects are decoded to `Pairs`, a list of (key, value), so that the caller sees duplicate keys. Numbers that are
not short integers become `NOT_A_NUMBER`, so no value can be inf, NaN or a million digits long.
"""

from __future__ import annotations

import json
import re
from typing import Any

from rewards.types import Problem

MAX_JSON_CHARS = 16_384
"""Longest text that is searched for an answer; a canonical answer has under 300 characters."""
MAX_DEPTH = 8
"""Deepest nesting of objects and lists; a canonical answer has depth 3."""
MAX_DIGITS = 6
"""Longest integer; the largest voxel index of the dataset has 3 digits."""
MAX_OBJECTS = 32
"""Most separate JSON objects that are looked at."""
MAX_MISSING_BRACES = 3
"""Most closing braces that are added to an object that was left open."""

NOT_A_NUMBER = object()
"""Stands for NaN, infinities, fractions, exponents and integers of more than `MAX_DIGITS` digits."""

_WHOLE_FLOAT = re.compile(r"(-?[0-9]{1,6})\.0{1,6}")
# An unterminated string runs to the end of the text: one pass, never a second look.
_TOKEN = re.compile(r'"(?:[^"\\]|\\.)*+"?|[{}\[\]]', re.DOTALL)
_SURROUNDING = " \t\r\n.`"


class Pairs(list[tuple[str, Any]]):
    """A JSON object as its (key, value) pairs in order, duplicates included."""


def _short_int(digits: str) -> Any:
    return int(digits) if len(digits.lstrip("-")) <= MAX_DIGITS else NOT_A_NUMBER


def _whole_float(literal: str) -> Any:
    match = _WHOLE_FLOAT.fullmatch(literal)
    return int(match[1]) if match else NOT_A_NUMBER


def _not_a_number(_literal: str) -> Any:
    return NOT_A_NUMBER


_STRICT = json.JSONDecoder(
    object_pairs_hook=Pairs, parse_int=_short_int, parse_float=_not_a_number, parse_constant=_not_a_number
)
_TOLERANT = json.JSONDecoder(
    object_pairs_hook=Pairs, parse_int=_short_int, parse_float=_whole_float, parse_constant=_not_a_number
)


def decode(text: str, *, whole_floats: bool = False) -> tuple[Problem, Any]:
    """Decode one JSON value, with nothing but JSON whitespace around it.

    Args:
        text: any text.
        whole_floats: read `2.0` as 2.

    Returns:
        (NONE, value), or the problem (TOO_LONG, TOO_DEEP, NOT_JSON) and None.
    """
    if len(text) > MAX_JSON_CHARS:
        return Problem.TOO_LONG, None
    if _too_deep(text):
        return Problem.TOO_DEEP, None
    try:
        return Problem.NONE, (_TOLERANT if whole_floats else _STRICT).decode(text)
    except ValueError:
        return Problem.NOT_JSON, None


def _too_deep(text: str) -> bool:
    if text.count("{") + text.count("[") <= MAX_DEPTH:
        return False
    depth = 0
    for match in _TOKEN.finditer(text):
        if match[0] in "{[":
            depth += 1
            if depth > MAX_DEPTH:
                return True
        elif match[0] in "}]":
            depth -= 1
    return False


def object_spans(text: str) -> tuple[list[tuple[int, int]], list[int]]:
    """Where balanced `{...}` lie in prose, in one pass.

    Returns:
        The outermost balanced spans (start, end), and the positions of the braces that were never closed.
        Quotation marks count only inside braces, so prose may hold any number of them.
    """
    spans: list[tuple[int, int]] = []
    open_at: list[int] = []
    position = text.find("{")
    while position >= 0:
        match = _TOKEN.search(text, position)
        if match is None:
            break
        position = match.end()
        if match[0] == "{":
            open_at.append(match.start())
        elif match[0] == "}" and open_at:
            start = open_at.pop()
            while spans and spans[-1][0] > start:
                spans.pop()
            spans.append((start, position))
        if not open_at:
            position = text.find("{", position)
    return spans, open_at


def decode_object(text: str) -> tuple[Problem, Any]:
    """Decode one object as models write it: `2.0` is 2, and Python's single quotes are taken."""
    problem, value = decode(text, whole_floats=True)
    if problem is Problem.NOT_JSON and '"' not in text:
        problem, value = decode(text.replace("'", '"'), whole_floats=True)
    return problem, value


def close_braces(text: str, missing: int) -> str:
    """The text with `missing` closing braces added, its trailing full stop or code fence removed."""
    return text.rstrip(_SURROUNDING) + "}" * missing
