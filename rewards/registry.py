"""Reward functions: how one is declared, registered, and found by name or in a user's file.

A reward is a plain function of one sample. Its positional arguments are injected by name, its keyword-only ones are
parameters set from the configuration:

    @reward
    def few_words(completion: str, *, limit: int = 200) -> float:
        return float(len(completion.split()) <= limit)

It returns a score in [0, 1], or None for "does not apply", which may depend on question and truth only. No I/O, no
randomness, no clock.
"""

from __future__ import annotations

import difflib
import hashlib
import importlib.util
import inspect
import sys
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar, overload

Kind = Literal["reward", "penalty"]
Scope = Literal["sample", "group"]
About = Literal["completion", "grades", "bbox"]
F = TypeVar("F", bound=Callable[..., Any])

ARGUMENTS: Mapping[Scope, frozenset[str]] = {
    "sample": frozenset({"answer", "truth", "question", "completion", "example"}),
    "group": frozenset({"answers", "truth", "question", "completions", "example"}),
}
"""Names that can be injected. `answers` and `completions` are the G samples of one question, in order."""


@dataclass(frozen=True, slots=True)
class RewardSpec:
    """A registered reward function."""

    name: str
    function: Callable[..., Any]
    kind: Kind
    """"reward": share achieved; "penalty": share violated, whose weight is negative."""
    about: About
    """Part of the answer it judges, for training with `grpo.credit: part`; "completion": all of it."""
    scope: Scope
    """"sample": returns one score; "group": returns a list of G scores (or one None)."""
    arguments: tuple[str, ...]
    """Injected arguments, in order."""
    parameters: Mapping[str, Any]
    """Keyword-only parameter -> default (`inspect.Parameter.empty` when it must be given)."""


_REGISTRY: dict[str, RewardSpec] = {}


@overload
def reward(function: F, /) -> F: ...
@overload
def reward(*, kind: Kind = "reward", about: About = "completion") -> Callable[[F], F]: ...
def reward(function: Any = None, /, *, kind: Kind = "reward", about: About = "completion") -> Any:
    """Register a function of one sample; it stays callable as it is. Use as `@reward` or `@reward(kind="penalty")`.

    Args:
        kind: "reward" for a share achieved, "penalty" for a share violated.
        about: part of the answer that decides the score, where it is one: "grades" or "bbox".

    Raises:
        ValueError: an argument that cannot be injected, or a name another file has registered.
    """
    register = _register("sample", kind, about)
    return register if function is None else register(function)


@overload
def group_reward(function: F, /) -> F: ...
@overload
def group_reward(*, kind: Kind = "reward", about: About = "completion") -> Callable[[F], F]: ...
def group_reward(function: Any = None, /, *, kind: Kind = "reward", about: About = "completion") -> Any:
    """Register a function that sees the G samples of one question at once and returns G scores, or None for all.

    Raises:
        ValueError: an argument that cannot be injected, or a name another file has registered.
    """
    register = _register("group", kind, about)
    return register if function is None else register(function)


def registered() -> Mapping[str, RewardSpec]:
    """All registered functions by name."""
    return dict(_REGISTRY)


def find_reward(name: str) -> RewardSpec:
    """Look up a registered name, or load `path/to/file.py:function`.

    Raises:
        ValueError: unknown name (the nearest is suggested), a file that cannot be loaded, or a function that cannot be
            used as a reward.
        FileNotFoundError: the file of a path does not exist.
    """
    path, colon, function_name = name.rpartition(":")
    if colon and path.endswith(".py"):
        return _from_file(Path(path), function_name)
    if name.endswith(".py"):
        raise ValueError(f"{name!r} names a file; name the function in it too, as in {name}:my_reward")
    if name not in _REGISTRY:
        nearest = difflib.get_close_matches(name, _REGISTRY, n=1, cutoff=0.0)
        hint = f"; did you mean {nearest[0]!r}?" if nearest else ""
        raise ValueError(
            f"unknown reward {name!r}{hint} Known: {', '.join(sorted(_REGISTRY))}, or path/to/file.py:function"
        )
    return _REGISTRY[name]


def spec_of(function: Callable[..., Any]) -> RewardSpec:
    """The registration of a function.

    Raises:
        ValueError: it is not registered.
    """
    for spec in _REGISTRY.values():
        if spec.function is function:
            return spec
    raise ValueError(f"{getattr(function, '__name__', function)} is not a reward yet; put @reward above it")


def _register(scope: Scope, kind: Kind, about: About) -> Callable[[F], F]:
    def decorate(function: F) -> F:
        spec = _inspect(function, scope, kind, about)
        known = _REGISTRY.get(spec.name)
        if known is not None and not _replaces(function, known.function):
            raise ValueError(
                f"a reward named {spec.name!r} is already registered by {_file_of(known.function)}; "
                f"rename the one in {_file_of(function)}"
            )
        _REGISTRY[spec.name] = spec
        return function

    return decorate


def _inspect(function: Callable[..., Any], scope: Scope, kind: Kind, about: About) -> RewardSpec:
    name = function.__name__
    where = f"reward {name!r} ({_file_of(function)})"
    if kind not in ("reward", "penalty"):
        raise ValueError(f'{where}: kind must be "reward" or "penalty", got {kind!r}')
    if about not in ("completion", "grades", "bbox"):
        raise ValueError(f'{where}: about must be "completion", "grades" or "bbox", got {about!r}')
    arguments: list[str] = []
    parameters: dict[str, Any] = {}
    for parameter in inspect.signature(function).parameters.values():
        if parameter.kind is parameter.KEYWORD_ONLY:
            parameters[parameter.name] = parameter.default
        elif parameter.kind is not parameter.POSITIONAL_OR_KEYWORD or parameter.name not in ARGUMENTS[scope]:
            raise ValueError(
                f"{where}: argument {str(parameter)!r} cannot be injected. Available: "
                f"{', '.join(sorted(ARGUMENTS[scope]))}. A parameter set from the configuration must be "
                f"keyword-only: write it after a bare *"
            )
        else:
            arguments.append(parameter.name)
    return RewardSpec(name, function, kind, about, scope, tuple(arguments), parameters)


def _from_file(path: Path, function_name: str) -> RewardSpec:
    if not path.is_file():
        raise FileNotFoundError(f"reward file {path} does not exist (looked in {Path.cwd()})")
    # one module per version of a file: two rewards of one file share its state and it runs once, and a file that
    # was edited since (from a notebook, say) is loaded anew
    version = hashlib.blake2b(path.read_bytes(), digest_size=4).hexdigest()
    module_name = f"rewards_user_{path.resolve().as_posix().replace('/', '_').replace('.', '_')}_{version}"
    if module_name not in sys.modules:
        module_spec = importlib.util.spec_from_file_location(module_name, path)
        assert module_spec is not None
        assert module_spec.loader is not None
        module = importlib.util.module_from_spec(module_spec)
        # listed before it runs, as the import system does: dataclasses look their module up
        sys.modules[module_name] = module
        try:
            module_spec.loader.exec_module(module)
        except Exception as error:
            del sys.modules[module_name]
            lines = [
                f.lineno
                for f in traceback.extract_tb(error.__traceback__)
                if f.filename == module_spec.origin
            ]
            where = f" in line {lines[-1]}" if lines else ""
            raise ValueError(f"{path} cannot be loaded: {type(error).__name__}{where}: {error}") from error
    module = sys.modules[module_name]
    function = getattr(module, function_name, None)
    if callable(function):
        try:
            return spec_of(function)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from None
    names = [spec.name for spec in _REGISTRY.values() if spec.function.__module__ == module_name]
    raise ValueError(f"{path} has no function {function_name!r}; its rewards: {', '.join(names) or 'none'}")


def _replaces(new: Callable[..., Any], old: Callable[..., Any]) -> bool:
    """Whether `new` is another version of `old`: of the same file, or typed again in the same notebook."""
    typed = new.__module__ == old.__module__ == "__main__"
    return typed or _file_of(new) == _file_of(old)


def _file_of(function: Callable[..., Any]) -> str:
    return inspect.getsourcefile(function) or "unknown file"
