"""A reward suite in other trainers' forms. TRL's is `RewardSuite.trl_reward`.

Each function here takes a suite and returns what the trainer calls. The dataset carries, where the trainer wants the
truth, an `Example` as JSON: `json.dumps(example_to_dict(example))` (or the dict itself).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from rewards.records import as_example
from rewards.suite import RewardRow, RewardSuite


def verl_compute_score(suite: RewardSuite) -> Callable[..., dict[str, float]]:
    """For verl: `custom_reward_function.path=FILE custom_reward_function.name=compute_score`.

    FILE says `compute_score = verl_compute_score(RewardSuite([...]))`; `reward_model.ground_truth` of the dataset is
    the example. verl scores one completion at a time, so a suite with a group reward is refused; it wants the same keys
    every time, so a component that does not apply is NaN.
    """
    _refuse_group_rewards(suite, "verl")

    def compute_score(
        data_source: str, solution_str: str, ground_truth: Any, extra_info: Any = None, **_: Any
    ) -> dict[str, float]:
        row = suite.score(as_example(ground_truth), solution_str)
        return {"score": row.total, **dict.fromkeys(suite.names, math.nan), **_columns(row)}

    return compute_score


def openrlhf_reward_func(suite: RewardSuite, eos_token: str = "<|im_end|>") -> Callable[..., dict[str, Any]]:
    """For OpenRLHF: `--remote_rm_url FILE`, FILE says `reward_func = openrlhf_reward_func(RewardSuite([...]))`.

    `labels` (the dataset's `--label_key`) are the examples; a query is its prompt and the completion, special tokens
    included: `eos_token`, the tokenizer's, is taken off the end. OpenRLHF scores one completion at a time, so a suite
    with a group reward is refused.
    """
    _refuse_group_rewards(suite, "OpenRLHF")

    def reward_func(
        queries: Sequence[str], prompts: Sequence[str], labels: Sequence[Any], **_: Any
    ) -> dict[str, Any]:
        import torch

        for query, prompt in zip(queries, prompts, strict=True):
            if not query.startswith(prompt):
                raise ValueError(f"a query does not begin with its prompt: {query[:200]!r}, {prompt[:200]!r}")
        completions = [
            query[len(prompt) :].removesuffix(eos_token)
            for query, prompt in zip(queries, prompts, strict=True)
        ]
        rows = suite.score_batch([as_example(label) for label in labels], completions)
        columns = [_columns(row) for row in rows]
        logs = {
            name: torch.tensor([column.get(name, torch.nan) for column in columns]) for name in suite.names
        }
        totals = torch.tensor([row.total for row in rows])
        return {"rewards": totals, "scores": totals, "extra_logs": logs}

    return reward_func


def easyr1_compute_score(suite: RewardSuite) -> Callable[..., list[dict[str, float]]]:
    """For EasyR1: `worker.reward.reward_function=FILE:compute_score`, `worker.reward.reward_type=batch`.

    FILE says `compute_score = easyr1_compute_score(RewardSuite([...]))`; `ground_truth` is the example.
    """

    def compute_score(reward_inputs: Sequence[Mapping[str, Any]], **_: Any) -> list[dict[str, float]]:
        examples = [as_example(item["ground_truth"]) for item in reward_inputs]
        rows = suite.score_batch(examples, [item["response"] for item in reward_inputs])
        return [{"overall": row.total, **_columns(row)} for row in rows]

    return compute_score


def _refuse_group_rewards(suite: RewardSuite, trainer: str) -> None:
    if suite.group_rewards:
        raise ValueError(
            f"{trainer} scores one completion at a time; group rewards: {', '.join(suite.group_rewards)}"
        )


def _columns(row: RewardRow) -> dict[str, float]:
    """The components that apply."""
    return {name: score for name, score in row.components.items() if score is not None}
