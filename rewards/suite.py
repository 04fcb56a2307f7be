"""Composition: several reward functions become one number for each completion.

    total = sum_{i in A} w_i s_i / sum_{i in A} w_i  +  sum_{p in P} w_p v_p

A are the rewards that apply to the example (score not None), with weights w >= 0, renormalised over A so that an
example without a box is worth as much as one with. P are the penalties that apply: shares violated v in [0, 1], with
weights w <= 0, outside the renormalisation. When no reward applies the first term is 0. A component behind a gate
scores 0 when its gate's component scores under 1; it still applies, so its weight stays in the sum.
"""

from __future__ import annotations

import graphlib
import inspect
import math
import numbers
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import numpy as np

from rewards.errors import ReasonKneeError
from rewards.reading import read_answer
from rewards.records import as_example
from rewards.registry import About, RewardSpec, find_reward
from rewards.types import Answer, Example, Problem, ReaderMode, Reasoning

OnError = Literal["raise", "score_none"]


class RewardError(ReasonKneeError, ValueError):
    """A reward function failed or broke its contract; the message names function, example and value."""


@dataclass(frozen=True)
class Component:
    """One reward function in a suite."""

    name: str
    """Registered name, or `path/to/file.py:function`."""
    weight: float = 1.0
    """At least 0 for a reward (0: shown, not counted), at most 0 for a penalty."""
    gate: str = ""
    """Component that must score 1 for this one to count; empty for none."""
    params: Mapping[str, Any] = field(default_factory=dict)
    """Keyword-only parameters of the function."""


@dataclass(frozen=True, slots=True)
class RewardRow:
    """What one completion earned."""

    components: dict[str, float | None]
    """Score of every component (after gates); None where it does not apply."""
    weights: dict[str, float]
    """Weight of every component that applies, such that `total` is the weighted sum of the scores."""
    total: float
    closed_gates: dict[str, str]
    """Component -> why its gate was closed."""
    errors: dict[str, str]
    """Component -> why it could not be scored (`on_error="score_none"` only)."""
    answer: Answer


class RewardSuite:
    """Reward functions with weights and gates, and the reader they share.

    Args:
        components: in the order of the columns.
        reader: "strict" or "tolerant".
        reasoning: the declared format, "required" or "none".
        on_error: what happens when a function raises or breaks its contract. "raise": `RewardError`. "score_none": the
            component counts as not applying to the whole group, and `RewardRow.errors` says why.

    Raises:
        ValueError: unknown function, parameter or gate, a name twice, gates in a circle, a weight of the wrong sign.
    """

    def __init__(
        self,
        components: Iterable[Component],
        *,
        reader: ReaderMode = "strict",
        reasoning: Reasoning = "required",
        on_error: OnError = "raise",
    ) -> None:
        if on_error not in ("raise", "score_none"):
            raise ValueError(f'on_error must be "raise" or "score_none", got {on_error!r}')
        if reader not in ("strict", "tolerant"):
            raise ValueError(f'reader must be "strict" or "tolerant", got {reader!r}')
        if reasoning not in ("required", "none"):
            raise ValueError(f'reasoning must be "required" or "none", got {reasoning!r}')
        self.reader: ReaderMode = reader
        self.reasoning: Reasoning = reasoning
        self.on_error: OnError = on_error
        self._specs: dict[str, RewardSpec] = {}
        self._components: dict[str, Component] = {}
        for component in components:
            spec = find_reward(component.name)
            if spec.name in self._specs:
                raise ValueError(f"reward {spec.name!r} is listed twice")
            _check_component(component, spec)
            self._specs[spec.name] = spec
            self._components[spec.name] = component
        if not any(spec.kind == "reward" for spec in self._specs.values()):
            raise ValueError("a suite needs at least one reward that is not a penalty")
        self._gates, self._gate_order = self._resolve_gates()

    @classmethod
    def from_config(cls, config: Any, *, reasoning: Reasoning = "required") -> RewardSuite:
        """From a mapping or object with `reader`, `on_error` and `components` (name, weight, gate, params).

        A component's `schedule` is for whoever trains (`set_parameter`).

        Raises:
            ValueError: as the constructor, or a component without a name or with another key than these.
        """
        components = []
        for entry in _get(config, "components"):
            unknown = set(entry) - _COMPONENT_KEYS if isinstance(entry, Mapping) else set()
            if unknown:
                raise ValueError(
                    f"a component has {', '.join(sorted(_COMPONENT_KEYS))}, not {sorted(unknown)}: {entry}"
                )
            components.append(
                Component(
                    name=_get(entry, "name"),
                    weight=float(_get(entry, "weight", 1.0)),
                    gate=_get(entry, "gate", ""),
                    params=dict(_get(entry, "params", {})),
                )
            )
        return cls(
            components,
            reader=_get(config, "reader", "strict"),
            reasoning=reasoning,
            on_error=_get(config, "on_error", "raise"),
        )

    @property
    def names(self) -> tuple[str, ...]:
        """Column names, in order."""
        return tuple(self._specs)

    @property
    def group_rewards(self) -> tuple[str, ...]:
        """Columns that need the whole group."""
        return tuple(name for name, spec in self._specs.items() if spec.scope == "group")

    def about(self, name: str) -> About:
        """What a column judges: "completion", "grades" or "bbox"."""
        return self._specs[name].about

    def set_parameter(self, name: str, parameter: str, value: Any) -> None:
        """Change a keyword-only parameter of a component from now on: how a schedule raises a threshold.

        Raises:
            ValueError: no such component or parameter.
        """
        if name not in self._components:
            raise ValueError(f"the suite has no reward {name!r}; it has {', '.join(self._components)}")
        component = self._components[name]
        component = replace(component, params={**component.params, parameter: value})
        _check_component(component, self._specs[name])
        self._components[name] = component

    def read(self, example: Example, completion: str) -> Answer:
        """The completion as this suite's reader sees it."""
        return read_answer(
            completion,
            example.question,
            mode=self.reader,
            reasoning=self.reasoning,
            shape=example.volume.shape,
        )

    def score(self, example: Example, completion: str) -> RewardRow:
        """Score one completion (a group of one)."""
        return self.score_group(example, [completion])[0]

    def score_group(self, example: Example, completions: Sequence[str]) -> list[RewardRow]:
        """Score the G completions of one question.

        Raises:
            RewardError: a function that raised, a score that is not a number in [0, 1], or None for some completions
                of the group only; unless `on_error` is "score_none".
        """
        if not completions:
            return []
        answers = [self.read(example, completion) for completion in completions]
        columns: dict[str, list[float | None]] = {}
        errors: dict[str, str] = {}
        for name in self._specs:
            try:
                columns[name] = self._column(name, example, completions, answers)
            except RewardError as error:
                if self.on_error == "raise":
                    raise
                columns[name], errors[name] = [None] * len(completions), str(error)
        return [
            self._row({name: column[g] for name, column in columns.items()}, answer, errors)
            for g, answer in enumerate(answers)
        ]

    def trl_reward(self, prompts: Sequence[Any], completions: Sequence[Any], **columns: Any) -> list[float]:
        """TRL's reward signature: `GRPOTrainer(reward_funcs=suite.trl_reward)`.

        The dataset must have a column `example` with `Example`s, their `example_to_dict` form or that as JSON.
        Completions are strings or TRL's conversational message lists. Samples of one example are scored as one group,
        so group rewards see the part of the group that is in this process's batch.
        """
        if "example" not in columns:
            raise ValueError(f"the dataset needs a column 'example'; it has {sorted(columns)}")
        examples = [as_example(item) for item in columns["example"]]
        return [row.total for row in self.score_batch(examples, [_text_of(c) for c in completions])]

    def score_batch(self, examples: Sequence[Example], completions: Sequence[str]) -> list[RewardRow]:
        """Score completions of several questions, in any order; those of one example form a group.

        Raises:
            ValueError: not as many examples as completions, or one `example_id` for two examples.
            RewardError: as `score_group`.
        """
        if len(examples) != len(completions):
            raise ValueError(f"each completion needs its example: {len(completions)} and {len(examples)}")
        groups: dict[str, list[int]] = {}
        for index, example in enumerate(examples):
            group = groups.setdefault(example.example_id, [])
            if group and example != examples[group[0]]:
                raise ValueError(f"two different examples have the example_id {example.example_id!r}")
            group.append(index)
        rows: dict[int, RewardRow] = {}
        for indices in groups.values():
            scored = self.score_group(examples[indices[0]], [completions[index] for index in indices])
            rows |= zip(indices, scored, strict=True)
        return [rows[index] for index in range(len(completions))]

    def _column(
        self, name: str, example: Example, completions: Sequence[str], answers: Sequence[Answer]
    ) -> list[float | None]:
        spec, params = self._specs[name], self._components[name].params
        shared = {"truth": example.truth, "question": example.question, "example": example}
        scores: Any
        if spec.scope == "group":
            available = {**shared, "answers": list(answers), "completions": list(completions)}
            scores = _call(spec, available, params)
            if scores is None:
                return [None] * len(completions)
            if isinstance(scores, np.ndarray):
                scores = scores.tolist()
            if not isinstance(scores, Sequence) or len(scores) != len(completions):
                raise RewardError(
                    f"group reward {name!r} must return a list of {len(completions)} scores, or None, "
                    f"for example {example.example_id}, got {scores!r}"
                )
        else:
            scores = []
            for completion, answer in zip(completions, answers, strict=True):
                available = {**shared, "answer": answer, "completion": completion}
                scores.append(_call(spec, available, params))
        absent = sum(score is None for score in scores)
        if 0 < absent < len(scores):
            raise RewardError(
                f"reward {name!r} returned None for {absent} of {len(scores)} completions of example "
                f"{example.example_id}; None may depend on question and truth only (return 0.0 for a bad answer)"
            )
        return [_checked_score(name, example, score) for score in scores]

    def _row(self, raw: dict[str, float | None], answer: Answer, errors: dict[str, str]) -> RewardRow:
        scores, closed = dict(raw), {}
        for name in self._gate_order:
            gate = self._gates[name]
            gate_score = scores[gate]
            if gate_score is not None and gate_score < 1 and scores[name] is not None:
                scores[name] = 0.0
                closed[name] = f"{gate} scored {gate_score:g}{_problems(answer)}"
        applying = {name: score for name, score in scores.items() if score is not None}
        weights = {name: self._components[name].weight for name in applying}
        rewards = [name for name in weights if self._specs[name].kind == "reward"]
        weight_sum = sum(weights[name] for name in rewards)
        for name in rewards:
            weights[name] /= weight_sum or 1.0
        total = math.fsum(weights[name] * score for name, score in applying.items())
        return RewardRow(scores, weights, total, closed, errors, answer)

    def _resolve_gates(self) -> tuple[dict[str, str], list[str]]:
        """Gated column -> gating column, and the gated columns in an order that settles every gate first."""
        by_given_name = {component.name: name for name, component in self._components.items()}
        gates: dict[str, str] = {}
        for name, component in self._components.items():
            if not component.gate:
                continue
            gate = by_given_name.get(component.gate, component.gate)
            if gate not in self._specs:
                raise ValueError(
                    f"reward {name!r} is gated by {component.gate!r}, which is not in the suite: {self.names}"
                )
            gates[name] = gate
        try:
            order = list(
                graphlib.TopologicalSorter({name: {gate} for name, gate in gates.items()}).static_order()
            )
        except graphlib.CycleError as error:
            raise ValueError(f"gates run in a circle: {' <- '.join(error.args[1])}") from error
        return gates, [name for name in order if name in gates]


def _check_component(component: Component, spec: RewardSpec) -> None:
    unknown = sorted(set(component.params) - set(spec.parameters))
    if unknown:
        raise ValueError(f"reward {spec.name!r} has no parameter {unknown}; it has {sorted(spec.parameters)}")
    missing = [
        name
        for name, default in spec.parameters.items()
        if default is inspect.Parameter.empty and name not in component.params
    ]
    if missing:
        raise ValueError(f"reward {spec.name!r} needs a value for {missing} under params")
    right_sign = component.weight <= 0 if spec.kind == "penalty" else component.weight >= 0
    if not (right_sign and math.isfinite(component.weight)):
        expected = "at most 0 (a penalty)" if spec.kind == "penalty" else "at least 0"
        raise ValueError(f"reward {spec.name!r}: weight must be {expected}, got {component.weight}")
    if spec.kind == "penalty" and component.gate:
        raise ValueError(f"penalty {spec.name!r} must not have a gate: closing it would be rewarded")


def _call(spec: RewardSpec, available: Mapping[str, Any], params: Mapping[str, Any]) -> Any:
    try:
        return spec.function(*[available[a] for a in spec.arguments], **params)
    except (Exception, SystemExit) as error:  # a user's sys.exit() would end a run without a word
        completion = available.get("completion", available.get("completions"))
        raise RewardError(
            f"reward {spec.name!r} raised {type(error).__name__}: {error}; example {available['example'].example_id}, "
            f"completion {str(completion)[:300]!r}"
        ) from error


def _checked_score(name: str, example: Example, score: Any) -> float | None:
    if score is None:
        return None
    value: Any = score if isinstance(score, (float, int, numbers.Real)) else math.nan
    # NaN fails both comparisons
    if not 0 <= value <= 1:
        raise RewardError(
            f"reward {name!r} returned {score!r:.300} for example {example.example_id}; it must be a number in [0, 1]"
        )
    return float(value)


def _problems(answer: Answer) -> str:
    parts = {"format": answer.format_problem, "grades": answer.grades_problem, "bbox": answer.bbox_problem}
    found = [f"{part}: {problem.value}" for part, problem in parts.items() if problem is not Problem.NONE]
    return f" ({', '.join(found)})" if found else ""


def _text_of(completion: Any) -> str:
    if isinstance(completion, str):
        return completion
    content = completion[-1]["content"]
    return content if isinstance(content, str) else "".join(part.get("text", "") for part in content)


_REQUIRED = object()
_COMPONENT_KEYS = {"name", "weight", "gate", "params", "schedule"}


def _get(source: Any, key: str, default: Any = _REQUIRED) -> Any:
    value = source.get(key, default) if isinstance(source, Mapping) else getattr(source, key, default)
    if value is _REQUIRED:
        raise ValueError(f"reward configuration lacks {key!r}: {source!r}")
    return value
