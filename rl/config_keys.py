"""How a nested mapping differs from the tree of dataclasses it is to fill."""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Iterator
from typing import Any, get_origin, get_type_hints


def unknown_keys(layer: Any, schema: type) -> Iterator[tuple[str, str | None]]:
    """Dotted keys of `layer` that `schema` lacks, each with the nearest key it has (None: nothing is near)."""
    known = list(_schema_keys(schema, ""))
    for key in _layer_keys(layer, ""):
        if key not in known:
            yield key, next(iter(difflib.get_close_matches(key, known, n=1)), None)


def _schema_keys(schema: type, prefix: str) -> Iterator[str]:
    for field in dataclasses.fields(schema):
        name = f"{prefix}{field.name}"
        yield name
        default = field.default_factory() if field.default_factory is not dataclasses.MISSING else None
        if dataclasses.is_dataclass(default):
            yield from _schema_keys(type(default), f"{name}.")


def _layer_keys(node: Any, prefix: str) -> Iterator[str]:
    """Sections and leaves of a nested mapping; what is inside a list is left to the typed merge."""
    for name, value in node.items() if isinstance(node, dict) else ():
        key = f"{prefix}{name}"
        yield key
        yield from _layer_keys(value, f"{key}.")


def misshapen_values(layer: Any, schema: type, prefix: str = "") -> Iterator[str]:
    """What is wrong with values that stand where a section or a list belongs."""
    kinds = get_type_hints(schema)
    for name, value in layer.items():
        key, kind = f"{prefix}{name}", kinds[name]
        if isinstance(kind, type) and dataclasses.is_dataclass(kind):
            if isinstance(value, dict):
                yield from misshapen_values(value, kind, f"{key}.")
            else:
                yield f"{key} is {value!r}: it is a section, set {key}.{dataclasses.fields(kind)[0].name} say"
        elif get_origin(kind) is list and not isinstance(value, list) and "${" not in str(value):
            yield f"{key} is {value!r}: give a list, as in {key}=[{value or ''}]"
