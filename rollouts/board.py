"""What a pool of engines serves, kept apart from the engines, in a module whose process needs no torch."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Adapter:
    """A published adapter: the pool's version and the PEFT folder (None: the bare base model)."""

    version: int
    folder: str | None


class AdapterBoard:
    """What the pool serves: the one place that every handle and every restarted engine agrees with."""

    def __init__(self) -> None:
        self._current = Adapter(version=0, folder=None)
        self._given = 0

    def next_version(self) -> int:
        self._given += 1
        return self._given

    def publish(self, adapter: Adapter) -> None:
        self._current = adapter

    def current(self) -> Adapter:
        return self._current
