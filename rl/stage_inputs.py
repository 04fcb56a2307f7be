"""What the result of a stage depends on, so that it is made again when, and only when, that has changed.

Settings are compared by value and files by content, so that a moved or copied dataset is the same dataset. Nothing
here imports torch: a run whose stages are all done says so at once.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any

import xxhash

from rl.config import Config
from rl.data.layout import Split, item_file_name, read_split, split_file

WITHOUT_EFFECT = frozenset(
    {
        *("data.root", "embed.cache_dir", "phantom.out_dir", "model.device", "model.gradient_checkpointing"),
        *("model.attention", "grpo.save_steps", "grpo.max_tokens_per_microbatch"),
        *("grpo.probe_tolerance", "grpo.probe_tolerance_bf16", "openai.api_key_env", "openai.concurrency"),
        *("openai.requests_per_minute", "openai.retries", "openai.timeout_s"),
    }
)
"""Settings that say where, how fast or how closely watched, and not what is computed: a run goes on when one of
them changes (a tolerance that proved too tight, a token budget that did not fit into memory)."""

MAY_GROW = frozenset({"grpo.max_steps"})
"""Settings that make a finished run longer: it goes on from its last checkpoint."""

SEEN_AS_FILES = frozenset(
    {"data.train_file", "data.val_file", "data.test_file", "sft.train_file", "eval.prompts"}
)
"""Names of files whose content is compared by those stages that read them."""

_ENDS = 1 << 20


@dataclass(frozen=True)
class Inputs:
    """Settings by their dotted names, and a hash of each file or folder that is read."""

    settings: dict[str, Any]
    files: dict[str, str]

    def changes_since(self, before: Inputs) -> list[str]:
        """What is otherwise than `before`, in words; what only makes the run longer is left out."""
        return [
            *(
                f"{name} was {before.settings.get(name)!r} and is {self.settings.get(name)!r}"
                for name in sorted(before.settings.keys() | self.settings.keys())
                if not self._same(name, before)
            ),
            *(
                f"{name} has changed"
                for name in sorted(before.files.keys() | self.files.keys())
                if before.files.get(name) != self.files.get(name)
            ),
        ]

    def _same(self, name: str, before: Inputs) -> bool:
        old, new = before.settings.get(name), self.settings.get(name)
        return old == new or (name in MAY_GROW and old is not None and new is not None and new > old)


def settings(config: Config, *names: str) -> dict[str, Any]:
    """The named fields and sections, flat; without those that a result does not depend on by their value."""
    flat = _flat(asdict(config), "")
    return {
        name: value
        for name, value in flat.items()
        if name not in WITHOUT_EFFECT | SEEN_AS_FILES
        and any(name == wanted or name.startswith(f"{wanted}.") for wanted in names)
    }


def dataset(config: Config, splits: Sequence[Split]) -> dict[str, str]:
    """The lists of these splits by content, their volumes (and masks, where boxes come from them) by size."""
    root = Path(config.data.root).expanduser()
    lists = [split_file(root, split) for split in splits]
    lists += [root / "generate_data" / item_file_name(config, split) for split in splits]
    lists += sorted((root / "question_files").glob("*.json"))
    found = {f"data/{path.relative_to(root)}": _content(path) for path in lists if path.is_file()}
    masks = config.data.box_source == "mask"
    return found | {"data/volumes": volumes(config, splits, masks=masks, modified=False)}


def volumes(config: Config, splits: Sequence[Split], *, masks: bool, modified: bool) -> str:
    """Volumes of the splits that exist, by path, size and (if `modified`) time of modification.

    Raises:
        DataError: a split file cannot be read.
    """
    root = Path(config.data.root).expanduser()
    digest = xxhash.xxh128()
    for split in splits:
        for row in read_split(root, split) if split_file(root, split).exists() else ():
            for name in (row.image, row.mask if masks else None):
                if name:
                    digest.update(repr((name, *_stamp(root / name, modified))).encode())
    return digest.hexdigest()


def model_files(config: Config) -> dict[str, str]:
    """A model that lies in a folder: its JSON files by content, its weights by size and by their two ends."""
    path = config.model.path
    folder = Path(str(files("rl") / "assets" / "base")) if path == "builtin:base" else Path(path)
    if not folder.is_dir():  # a name on the Hugging Face hub
        return {}
    return {f"model {path}": _folder([*folder.glob("*.json"), *folder.glob("*.safetensors")])}


def adapter_files(folder: Path, name: str) -> dict[str, str]:
    """A PEFT adapter by content; nothing when it does not exist."""
    return {name: _folder(folder.glob("adapter_*"))} if folder.is_dir() else {}


def reward_files(config: Config) -> dict[str, str]:
    """The user's own reward functions, by the content of their files."""
    paths = {component.name.rpartition(":")[0] for component in config.rewards.components}
    return {
        f"reward file {path}": _content(Path(path)) for path in sorted(paths) if path and Path(path).is_file()
    }


def question_file(config: Config) -> dict[str, str]:
    """The question file that the benchmark asks, by content; nothing for our own wording."""
    path = Path(config.eval.prompts)
    return {"question file": _content(path)} if path.is_file() else {}


def run_files(folders: Iterable[Path]) -> dict[str, str]:
    """Benchmark runs under these folders, by content."""
    return {
        f"{folder.name}/{path.parent.name}/{path.name}": _content(path)
        for folder in folders
        for pattern in ("*/run.json", "*/answers.parquet")
        for path in sorted(folder.glob(pattern))
    }


def _flat(node: Any, prefix: str) -> dict[str, Any]:
    if not isinstance(node, dict):
        return {prefix[:-1]: node}
    return {
        name: value for key, child in node.items() for name, value in _flat(child, f"{prefix}{key}.").items()
    }


def _folder(paths: Iterable[Path]) -> str:
    digest = xxhash.xxh128()
    for path in sorted(paths):
        digest.update(f"{path.name} {_content(path) if path.suffix == '.json' else _ends(path)}".encode())
    return digest.hexdigest()


def _ends(path: Path) -> str:
    """Size, first and last MiB: weights of many gigabytes are told apart without being read."""
    size = path.stat().st_size
    with path.open("rb") as stream:
        first = stream.read(_ENDS)
        stream.seek(max(0, size - _ENDS))
        return f"{size} {xxhash.xxh128_hexdigest(first + stream.read())}"


def _content(path: Path) -> str:
    return _content_at(path, *_stamp(path, modified=True))


@cache
def _content_at(path: Path, size: int, modified_ns: int) -> str:
    """Hash of a file; a process reads each version of it once."""
    digest = xxhash.xxh128()
    with path.open("rb") as stream:
        while chunk := stream.read(1 << 22):
            digest.update(chunk)
    return digest.hexdigest()


def _stamp(path: Path, modified: bool) -> tuple[int, int]:
    """Size, and time of modification if asked for; -1 for what is no file, a link in a circle say."""
    try:
        stat = path.stat()
    except OSError:
        return -1, 0
    return stat.st_size, stat.st_mtime_ns if modified else 0
