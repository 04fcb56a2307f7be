"""`index.json` of an embedding cache: which key a volume file had, so that later stages hash no volume again.

The index is a shortcut only. An entry counts while the file's size and modification time are what they were;
losing the index costs one hash of each volume and no embedding.
"""

from __future__ import annotations

import fcntl
import json
import logging
import uuid
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from rewards.types import VolumeRef

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class IndexEntry:
    """A volume file as it was when its key was computed."""

    path: str
    size: int
    mtime_ns: int
    key: str

    @classmethod
    def of(cls, volume: VolumeRef, key: str) -> IndexEntry:
        """Entry of a volume that is on disk now."""
        stat = Path(volume.image_path).stat()
        return cls(volume.image_path, stat.st_size, stat.st_mtime_ns, key)

    def is_current(self, volume: VolumeRef) -> bool:
        """True while the volume's file is the one the key was computed from."""
        try:
            return self == IndexEntry.of(volume, self.key)
        except OSError:
            return False


class CacheIndex:
    """Recipe -> volume id -> `IndexEntry`, in one file that several processes may update."""

    def __init__(self, folder: Path) -> None:
        self._path = folder / "index.json"
        self._lock = folder / "index.lock"

    def read(self, recipe: str) -> dict[str, IndexEntry]:
        """Entries of one recipe; empty when there is no index, or none that can be read."""
        return {name: IndexEntry(**entry) for name, entry in self._load().get(recipe, {}).items()}

    def update(self, recipe: str, entries: Mapping[str, IndexEntry]) -> None:
        """Add entries, keeping those other processes added meanwhile."""
        with self._lock.open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            content = self._load()
            content.setdefault(recipe, {}).update({name: asdict(entry) for name, entry in entries.items()})
            temporary = self._path.with_name(f".index.{uuid.uuid4().hex}.tmp")
            temporary.write_text(json.dumps(content, indent=1, sort_keys=True), encoding="utf-8")
            temporary.replace(self._path)

    def _load(self) -> dict[str, dict[str, dict]]:
        if not self._path.is_file():
            return {}
        try:
            content = json.loads(self._path.read_text(encoding="utf-8"))
            for entries in content.values():
                for entry in entries.values():
                    IndexEntry(**entry)
        except (ValueError, TypeError, AttributeError) as error:
            _log.warning("%s cannot be read (%s); volumes are hashed again", self._path, error)
            return {}
        return content
