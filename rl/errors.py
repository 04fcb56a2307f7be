"""Which exceptions are the user's to put right: shown in a few words, without a traceback."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

from rewards.errors import ReasonKneeError

DISK_FULL = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})
_ON_A_FULL_DISK = "free space, or choose another place, and run again: what was finished is kept"
_ABOUT_A_PATH = (FileNotFoundError, FileExistsError, PermissionError, NotADirectoryError, IsADirectoryError)


class WriteError(ReasonKneeError, OSError):
    """Something could not be written; what was there before still is."""


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Around code that writes `path` under a temporary name: failures name the path and the remedy.

    Raises:
        WriteError: the disk is full, or the folder not writable. Libraries have errors of their own for it.
    """
    try:
        yield
    except (OSError, SafetensorError) as error:
        raise WriteError(f"cannot write {path} ({error}); {_ON_A_FULL_DISK}") from error


@contextmanager
def staged(path: Path) -> Iterator[Path]:
    """A temporary name beside `path` to write to, which becomes `path` at the end: complete or not at all."""
    staging = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield staging
        staging.replace(path)
    finally:
        staging.unlink(missing_ok=True)  # what is half written


def write_atomically(path: Path, text: str) -> None:
    """Write to a temporary name, then rename, so that a full disk or a kill leaves the old file.

    Raises:
        WriteError: as `writing`.
    """
    with writing(path), staged(path) as staging:
        staging.write_text(text, encoding="utf-8")


def expected_errors() -> tuple[type[Exception], ...]:
    """What may be caught and shown in words."""
    return (ReasonKneeError, OSError)


def in_words(error: BaseException) -> str | None:
    """The message for the user; None when the error is a bug, whose traceback is worth more."""
    if isinstance(error, ReasonKneeError):
        return str(error)
    if isinstance(error, OSError) and error.errno in DISK_FULL:
        return f"{_named(error)}; {_ON_A_FULL_DISK}"
    if isinstance(error, _ABOUT_A_PATH) and error.filename:
        return _named(error)
    return None


def _named(error: OSError) -> str:
    return f"{error.filename}: {error.strerror}" if error.filename else str(error.strerror or error)


@contextmanager
def staged_folder(folder: Path) -> Iterator[Path]:
    """A folder to fill instead of `folder`, which it replaces at the end; at every moment a complete one is on disk.

    Raises:
        WriteError: as `writing`; the former folder stays.
    """
    staging, replaced = folder.with_name(f".{folder.name}.tmp"), folder.with_name(f".{folder.name}.old")
    for leftover in (staging, replaced):
        shutil.rmtree(leftover, ignore_errors=True)
    with writing(folder):
        yield staging
        if folder.exists():
            folder.rename(replaced)  # not deleted yet
        staging.rename(folder)
    shutil.rmtree(replaced, ignore_errors=True)
