"""Finished answers on disk: a run that was killed goes on where it was, and no answer is paid for twice."""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path

from pydantic import ConfigDict, TypeAdapter, ValidationError

from rewards.errors import ReasonKneeError


class JournalError(ReasonKneeError, ValueError):
    """A line that holds no answer; the message names the file, the line and the remedy."""


@dataclass(frozen=True, slots=True)
class Entry:
    """One line: an answer as it was given."""

    __pydantic_config__ = ConfigDict(extra="forbid")

    key: str
    """Hash of all that was sent: another question, picture, model or sampling has another one."""
    example_id: str
    completion: str
    finish_reason: str


class Journal:
    """Answers by the key of their request, in a file of JSON lines.

    A last line without its end is what a process leaves that was killed while it wrote: it is cut off.

    Raises:
        JournalError: any other line that holds no answer.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        content = path.read_bytes() if path.exists() else b""
        whole = content.rfind(b"\n") + 1
        self._entries = {entry.key: entry for entry in _entries(content[:whole], path)}
        if whole < len(content):
            os.truncate(path, whole)

    def __contains__(self, key: str) -> bool:
        return key in self._entries

    def __getitem__(self, key: str) -> Entry:
        return self._entries[key]

    def append(self, entry: Entry) -> None:
        """Keep an answer; it is with the operating system when this returns."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("ab") as stream:
            stream.write(json.dumps(asdict(entry)).encode() + b"\n")
        self._entries[entry.key] = entry


def _entries(content: bytes, path: Path) -> list[Entry]:
    entries, reader = [], TypeAdapter(Entry)
    for number, line in enumerate(content.splitlines(), start=1):
        try:
            entries.append(reader.validate_json(line))
        except ValidationError as error:
            problem = error.errors()[0]["msg"]
            raise JournalError(
                f"{path} line {number} is no answer ({problem}); remove the line, and its question is asked again"
            ) from error
    return entries
