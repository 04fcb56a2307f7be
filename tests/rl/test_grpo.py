"""GRPO on tiny phantoms with a real sampler: what a step does, and what must not change its gradient."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import polars as pl
import pytest
import torch
from accelerate import Accelerator
from safetensors.torch import load_file

from rewards import format_answer
from rl.advantages import group_advantages, normalized_sum
from rl.completions import ScoredGroup, microbatches
from rl.config import Config, ConfigError, save_config
from rl.credit import token_parts
from rl.engine import start_engine
from rl.grpo import GRPOTrainer, train_grpo
from rl.loss import LOSS_TYPES
from rl.model import reference_adapter, trainable
from rl.pipeline import run_embed
from rl.probe import AgreementError
from rl.progress import StageProgress
from rl.replay import replay
from rl.training import Stopwatch
from rl.validation import Best, Validation
from rollouts.types import Engine, Group, Rollout

KEYS = {
    *(
        "step",
        "time",
        "reward",
        "reward_above_prior",
        "reward/output_format",
        "reward/moaks_accuracy",
        "reward/box_iou",
    ),
    *("reward/variety", "groups_without_signal", "completion_length", "truncated", "loss", "grad_norm", "lr"),
    *("entropy", "clip_ratio", "agreement/max", "agreement/mean"),
    *("seconds/rollout", "seconds/reward", "seconds/train", "seconds/sync", "seconds"),
}
MakeTrainer = Callable[..., GRPOTrainer]


def records(config: Config) -> list[dict[str, float]]:
    lines = (Path(config.run_dir) / "grpo" / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def tensors(adapter: Path) -> dict[str, torch.Tensor]:
    return load_file(adapter / "adapter_model.safetensors")


@pytest.fixture
def make_trainer(make_config: Callable[..., Config], engine: Engine, accelerator: Accelerator) -> MakeTrainer:
    """A trainer whose optimizer does not move the weights and does not clip: it is asked for gradients."""

    def make(*overrides: str) -> GRPOTrainer:
        still = ("grpo.learning_rate=0", "grpo.max_grad_norm=1e9")
        return GRPOTrainer(make_config(*still, *overrides), engine, accelerator)

    return make


def scored_groups(trainer: GRPOTrainer, step: int = 0) -> list[ScoredGroup]:
    return trainer.scorer.score(trainer.generation.draw(step, 2))


def gradient(trainer: GRPOTrainer, scored: list[ScoredGroup]) -> torch.Tensor:
    trainer._update(scored)
    return torch.cat([p.grad.flatten() for p in trainable(trainer.policy) if p.grad is not None])


def close(a: torch.Tensor, b: torch.Tensor) -> bool:
    return float((a - b).norm()) <= 1e-5 * float(b.norm())


def flat(scored: ScoredGroup) -> ScoredGroup:
    """The group as if all its rewards were equal."""
    return replace(scored, advantages_G=torch.zeros_like(scored.advantages_G))


def ending(scored: ScoredGroup, *reasons: str) -> ScoredGroup:
    """The group as if its completions had ended for these reasons."""
    rollouts = [replace(r, finish_reason=x) for r, x in zip(scored.group.rollouts, reasons, strict=True)]
    return replace(scored, group=Group(scored.group.prompt, tuple(rollouts)))


def test_the_box_and_each_grade_can_answer_for_themselves(make_trainer: MakeTrainer) -> None:
    """Two answers, each with one grade right: the first is a little off in its first slice, the other far off in its
    last."""
    trainer = make_trainer("grpo.credit=part", "rewards.components=[{name: box_iou}, {name: moaks_accuracy}]")
    examples = trainer.task.examples
    index = next(i for i, example in enumerate(examples) if len(example.question.attributes) == 2)
    example = examples[index]
    true, box = example.truth.grades, example.truth.bbox
    assert box is not None
    (first, second), wrong = true, {name: (grade + 1) % 2 for name, grade in true.items()}
    near, far = replace(box, slice_min=box.slice_min + 1), replace(box, slice_max=box.slice_max + 9)
    grades = [{first: wrong[first], second: true[second]}, {first: true[first], second: wrong[second]}]
    texts = [
        format_answer(example.question, *answer, "x") for answer in zip(grades, (near, far), strict=True)
    ]
    tokens = [tuple(trainer.task.tokenizer.encode(text, add_special_tokens=False)) for text in texts]
    rollouts = [
        Rollout(ids, (0.0,) * len(ids), text, "stop", 1) for ids, text in zip(tokens, texts, strict=True)
    ]
    (scored,) = trainer.scorer.score([(index, Group(trainer.task.prompt(index, 10), tuple(rollouts)))])
    for ids, advantages, total, sign in zip(
        tokens, scored.token_advantages, scored.advantages_G, (1, -1), strict=True
    ):
        parts = token_parts([trainer.task.tokenizer.decode(i) for i in ids], (first, second))
        by_part = {
            part: {float(a) for a, p in zip(advantages, parts, strict=True) if p == part} for part in parts
        }
        rest, first_slice, last_slice, *others, of_first, of_second = (by_part[part] for part in range(9))
        assert rest == {float(total)}  # one grade right each: the better box decides
        assert {math.copysign(1, a) for a in rest | last_slice | of_second} == {sign}
        assert {math.copysign(1, a) for a in first_slice | of_first} == {-sign}
        assert others == [{0.0}] * 4
    assert scored.has_signal


def test_components_can_be_normalised_before_they_are_added(make_trainer: MakeTrainer) -> None:
    choice = ("grpo.multi_objective_aggregation=normalize_then_sum", "grpo.scale_rewards=batch")
    scored = scored_groups(make_trainer(*choice))
    rows = [row for s in scored for row in s.rows]
    shape = len(scored), -1, len(rows[0].components)
    scores = torch.tensor([[float(v or 0) for v in row.components.values()] for row in rows]).view(shape)
    weights = torch.tensor([list(row.weights.values()) for row in rows]).view(shape)[:, 0]
    expected = group_advantages(normalized_sum(scores, weights), "batch")
    torch.testing.assert_close(torch.stack([s.advantages_G for s in scored]), expected)
    assert any(s.has_signal for s in scored)


def test_a_run_changes_the_adapter_and_records_every_step(
    config: Config, engine: Engine, accelerator: Accelerator, workshop: Path
) -> None:
    seen: list[dict[str, float]] = []
    adapter = train_grpo(config, engine, accelerator, seen.append)
    folder = Path(config.run_dir) / "grpo"
    assert adapter == folder / "adapter"
    before, after = tensors(workshop / "sft"), tensors(adapter)
    assert before.keys() == after.keys()
    assert all(not torch.equal(before[name], after[name]) for name in before)

    assert [r["step"] for r in records(config)] == [1, 2]
    for record in records(config):
        assert set(record) == KEYS
        assert all(math.isfinite(value) for value in record.values())
        assert record["agreement/max"] < 1e-4
        assert record["grad_norm"] > 0
    assert [{k: v for k, v in r.items() if k != "steps"} for r in seen] == records(config)
    assert [p.name for p in (folder / "checkpoints").iterdir()] == ["step-000002"]
    saved = tensors(folder / "checkpoints" / "step-000002" / "adapter")
    assert all(torch.equal(saved[name], after[name]) for name in after)
    assert (folder / "config.yaml").exists()

    table = pl.read_parquet(folder / "completions")
    assert len(table) == 2 * 2 * 2 * 3  # steps, volumes, questions, completions
    components = [f"reward/{n}" for n in ("output_format", "moaks_accuracy", "box_iou", "variety")]
    assert {"step", "example_id", "sample", "completion", "reward", "advantage", *components} <= set(
        table.columns
    )
    assert table["adapter_version"].n_unique() == 2  # the engine was given the second step's adapter
    for step, record in enumerate(records(config), start=1):
        of_step = table.filter(pl.col("step") == step)
        assert record["reward"] == pytest.approx(of_step["reward"].mean())
        assert record["reward/variety"] == pytest.approx(of_step["reward/variety"].mean())


@pytest.mark.slow
def test_a_killed_and_restarted_run_is_the_uninterrupted_one(
    make_config: Callable[..., Config], engine: Engine, accelerator: Accelerator
) -> None:
    """Killed after its second step, whose checkpoint is not due: the second step is made again."""
    settings = ("grpo.max_steps=3", "grpo.save_steps=1")
    whole = make_config(*settings, run="whole")
    train_grpo(whole, engine, accelerator)

    def kill(record: dict[str, float]) -> None:
        if record["step"] == 2:
            raise KeyboardInterrupt

    killed = make_config("grpo.max_steps=3", "grpo.save_steps=3", run="killed")
    trainer = GRPOTrainer(replace(killed, grpo=replace(killed.grpo, save_steps=1)), engine, accelerator)
    trainer.step(0)
    with pytest.raises(KeyboardInterrupt):
        train_grpo(killed, engine, accelerator, kill)
    assert [r["step"] for r in records(killed)] == [1, 2]
    train_grpo(killed, engine, accelerator)

    assert [r["step"] for r in records(killed)] == [1, 2, 3]
    for got, expected in zip(records(killed), records(whole), strict=True):
        for name in ("reward", "loss", "grad_norm", "lr", "entropy", "completion_length"):
            assert got[name] == pytest.approx(expected[name], rel=1e-4, abs=1e-6), name
    after = tensors(Path(killed.run_dir) / "grpo" / "adapter")
    for name, tensor in tensors(Path(whole.run_dir) / "grpo" / "adapter").items():
        torch.testing.assert_close(after[name], tensor, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_a_finished_run_started_again_does_nothing(
    config: Config, engine: Engine, accelerator: Accelerator
) -> None:
    config.grpo.max_steps = 1
    adapter = train_grpo(config, engine, accelerator)
    before, metrics = tensors(adapter), records(config)
    assert train_grpo(config, engine, accelerator) == adapter
    assert records(config) == metrics
    assert all(torch.equal(before[name], tensor) for name, tensor in tensors(adapter).items())


@pytest.mark.slow
def test_groups_without_signal_make_room_for_other_questions(
    workshop: Path, make_trainer: MakeTrainer
) -> None:
    rounds = "grpo.resample_rounds=3"
    # no signal in half of the questions
    picky = f"rewards.components=[{{name: '{workshop}/variety.py:picky'}}]"
    plain, dynamic = make_trainer(picky), make_trainer(picky, rounds)
    before, _ = plain._scored_groups(1, Stopwatch())
    after, counts = dynamic._scored_groups(1, Stopwatch())
    flat = [s.example_index for s in before if not s.has_signal]
    kept = {s.example_index for s in before if s.has_signal}
    assert flat  # else nothing is shown here
    assert counts["drawn"] > len(before) == len(after)
    assert counts["replaced"] == len({s.example_index for s in after} - {s.example_index for s in before})
    assert kept < {s.example_index for s in after}
    assert sum(s.has_signal for s in after) > len(kept)
    assert len({s.example_index for s in after}) == len(after)
    volumes = [dynamic.task.volume_ids[s.example_index] for s in after]
    assert volumes == sorted(volumes)  # questions of a volume follow each other
    record = make_trainer(rounds).step(0)
    assert record["groups_drawn"] >= len(before)
    assert record["groups_replaced"] == 0  # all have signal


@pytest.mark.slow
def test_groups_of_several_draws_are_scaled_by_the_spread_of_those_that_are_kept(
    workshop: Path, make_trainer: MakeTrainer
) -> None:
    picky = f"rewards.components=[{{name: '{workshop}/variety.py:picky'}}]"
    trainer = make_trainer(picky, "grpo.resample_rounds=3", "grpo.scale_rewards=batch")
    scored, counts = trainer._scored_groups(1, Stopwatch())
    assert counts["drawn"] > len(scored)
    rewards_B_G = torch.tensor([[row.total for row in s.rows] for s in scored])
    expected = group_advantages(rewards_B_G, "batch")
    torch.testing.assert_close(torch.stack([s.advantages_G for s in scored]), expected)


def test_groups_without_signal_are_left_out_without_changing_the_gradient(
    make_trainer: MakeTrainer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Under bnpo they are not left out: its normaliser is the tokens of a micro-batch."""
    trainer = make_trainer()
    scored = scored_groups(trainer)
    scored = [flat(scored[0]), *scored[1:]]
    packed: list[int] = []
    pack = trainer._pack
    monkeypatch.setattr(trainer, "_pack", lambda part: packed.append(len(part)) or pack(part))
    for loss_type in LOSS_TYPES:
        trainer.settings.loss_type = loss_type
        skipped = gradient(trainer, scored)
        with monkeypatch.context() as patch:
            patch.setattr(ScoredGroup, "has_signal", True)
            assert close(skipped, gradient(trainer, scored))
        with_signal = sum(s.has_signal for s in scored)
        assert packed[-2:] == [4 if loss_type == "bnpo" else with_signal, 4]
    assert 0 < with_signal < 4


@pytest.mark.parametrize(
    ("overrides", "passes"),
    [
        ((), 1),
        (("grpo.beta=0.1",), 2),
        (("grpo.num_iterations=3",), 3),
        (("grpo.beta=0.1", "grpo.num_iterations=3"), 4),
    ],
)
def test_a_batch_is_packed_once_and_its_old_and_reference_log_probabilities_cost_one_pass_at_most(
    make_trainer: MakeTrainer, monkeypatch: pytest.MonkeyPatch, overrides: tuple[str, ...], passes: int
) -> None:
    """On-policy the old ones are the new ones; the reference looks at the same packed batch, and once."""
    trainer = make_trainer(*overrides)
    scored = scored_groups(trainer)
    packed, seen, pack = [], [], trainer._pack
    monkeypatch.setattr(trainer, "_pack", lambda part: packed.append(pack(part)) or packed[-1])
    trainer.policy.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    trainer._update(scored)
    (micro,) = packed
    assert [batch is micro.batch for batch in seen] == [True] * passes


def test_a_step_without_any_signal_moves_nothing_but_still_probes_the_engine(
    make_trainer: MakeTrainer,
) -> None:
    trainer = make_trainer()
    scored = [flat(s) for s in scored_groups(trainer)]
    sums, agreement = trainer._update(scored)
    assert sums["loss"] == sums["grad_norm"] == 0
    assert agreement.tokens == sum(len(r.token_ids) for r in scored[0].group.rollouts)


@pytest.mark.slow
@pytest.mark.parametrize("beta", [0.0, 0.1])
def test_splitting_into_microbatches_never_changes_the_gradient(
    make_trainer: MakeTrainer, beta: float
) -> None:
    """For every type but bnpo, which is by definition a mean over micro-batches."""
    trainer = make_trainer(f"grpo.beta={beta}")
    scored = scored_groups(trainer)
    for loss_type in ("grpo", "dr_grpo", "dapo"):
        trainer.settings.loss_type = loss_type
        trainer.settings.max_tokens_per_microbatch = 10**6
        whole = gradient(trainer, scored)
        for budget in (1, 350):
            trainer.settings.max_tokens_per_microbatch = budget
            assert close(gradient(trainer, scored), whole)


def test_microbatches_keep_groups_whole_and_the_budget(make_trainer: MakeTrainer) -> None:
    """A volume's tokens count once, and again after a split; a group over the budget is alone."""
    scored = scored_groups(make_trainer())
    sizes = [
        len(s.group.prompt.question_ids) + sum(len(r.token_ids) for r in s.group.rollouts) for s in scored
    ]
    volume = len(scored[0].group.prompt.volume_ids)
    assert [s.group.prompt.features.key for s in scored[:2]] == [scored[0].group.prompt.features.key] * 2
    assert [len(p) for p in microbatches(scored, 10**6)] == [4]
    assert [len(p) for p in microbatches(scored, 1)] == [1, 1, 1, 1]
    both = volume + sizes[0] + sizes[1]
    assert len(next(microbatches(scored, both))) == 2
    assert len(next(microbatches(scored, both - 1))) == 1
    assert list(microbatches([], 10)) == []


def test_volumes_with_the_same_header_are_counted_apart(make_trainer: MakeTrainer) -> None:
    """Two visits of a knee can have equal prompt tokens; their features are not the same."""
    scored = scored_groups(make_trainer())[:2]
    prompt = scored[0].group.prompt
    twin = replace(prompt, features=replace(prompt.features, key="another"))
    scored[1] = replace(scored[1], group=Group(twin, scored[0].group.rollouts))
    size = len(prompt.token_ids) + sum(len(r.token_ids) for r in scored[0].group.rollouts)
    assert len(next(microbatches(scored, 2 * size - 1))) == 1
    assert len(next(microbatches(scored, 2 * size))) == 2


@pytest.mark.slow
def test_gradient_checkpointing_changes_no_gradient(make_trainer: MakeTrainer) -> None:
    plain, saving = make_trainer(), make_trainer("model.gradient_checkpointing=true")
    scored = scored_groups(plain)
    assert close(gradient(saving, scored), gradient(plain, scored))


def test_completions_that_were_cut_off_can_be_left_out(make_trainer: MakeTrainer) -> None:
    trainer = make_trainer("grpo.loss_type=grpo")
    first = ending(scored_groups(trainer)[0], "stop", "length", "stop")
    first = replace(first, advantages_G=torch.tensor([1.0, -2.0, 1.0]))
    with_all = gradient(trainer, [first])
    trainer.settings.mask_truncated_completions = True
    masked = gradient(trainer, [first])
    without = gradient(trainer, [replace(first, advantages_G=torch.tensor([1.0, 0.0, 1.0]))])
    assert close(masked, without)
    assert not close(masked, with_all)
    nothing = ending(first, "length", "length", "length")
    sums, _ = trainer._update([nothing])
    assert sums["loss"] == sums["grad_norm"] == sums["tokens"] == 0


def test_the_reference_is_the_policy_at_the_start_and_stays_so(
    make_config: Callable[..., Config], engine: Engine, accelerator: Accelerator
) -> None:
    config = make_config("grpo.beta=0.1")
    trainer = GRPOTrainer(config, engine, accelerator)
    parameters = dict(trainer.policy.named_parameters())
    frozen = {name: p.clone() for name, p in parameters.items() if ".reference." in name}
    trained = [name for name, p in parameters.items() if p.requires_grad]
    assert frozen
    assert all(".default." in name for name in trained)

    first, second = trainer.step(0), trainer.step(1)
    assert set(first) == KEYS | {"kl"}
    assert first["kl"] == pytest.approx(0, abs=1e-9)
    assert second["kl"] > 1e-6
    assert all(torch.equal(parameters[name], value) for name, value in frozen.items())
    assert [name for name, p in parameters.items() if p.requires_grad] == trained
    with reference_adapter(trainer.policy):
        assert not any(p.requires_grad for p in parameters.values() if p is not None)
    saved = tensors(Path(config.run_dir) / "grpo" / "adapter")
    assert not any("reference" in name for name in saved)

    restarted = GRPOTrainer(config, engine, accelerator)
    assert restarted.first_step == 2
    again = dict(restarted.policy.named_parameters())
    assert all(torch.equal(again[name], value) for name, value in frozen.items())
    assert all(torch.equal(again[name], parameters[name]) for name in trained)


def test_a_second_pass_over_the_batch_is_off_policy(
    make_config: Callable[..., Config], engine: Engine, accelerator: Accelerator
) -> None:
    """The old log-probabilities are those of the first pass, so in the second the ratio has moved."""
    once = GRPOTrainer(make_config("grpo.warmup_steps=0", run="once"), engine, accelerator).step(0)
    trainer = GRPOTrainer(
        make_config(
            "grpo.num_iterations=2", "grpo.warmup_steps=0", "grpo.epsilon=0.001", "grpo.epsilon_high=0.001"
        ),
        engine,
        accelerator,
    )
    twice = trainer.step(0)
    assert once["clip_ratio"] == 0 < twice["clip_ratio"]
    assert {int(state["step"]) for state in trainer.optimizer.state.values()} == {2}


@pytest.mark.slow
def test_importance_correction_changes_nothing_while_engine_and_trainer_agree(
    make_trainer: MakeTrainer,
) -> None:
    """And when the engine was surer of a token than the trainer, the token weighs less."""
    plain = make_trainer()
    scored = scored_groups(plain)
    corrected = make_trainer("grpo.importance_correction=token_truncate", "grpo.probe_tolerance=10")
    sums, _ = corrected._update(scored)
    assert sums["importance"] == pytest.approx(sums["tokens"], rel=1e-4)
    assert close(gradient(corrected, scored), gradient(plain, scored))
    surer = [replace(r, logps=tuple(x + math.log(2) for x in r.logps)) for r in scored[0].group.rollouts]
    scored[0] = replace(scored[0], group=Group(scored[0].group.prompt, tuple(surer)))
    halved, _ = corrected._update(scored[:1])
    assert halved["importance"] == pytest.approx(halved["tokens"] / 2, rel=1e-4)


@pytest.mark.slow
def test_an_overlapped_run_trains_on_what_the_weights_before_the_last_update_said(
    make_config: Callable[..., Config], engine: Engine, accelerator: Accelerator
) -> None:
    """Its first step is on-policy. The probe compares with the weights that sampled, so it agrees all the same."""
    config = make_config("grpo.overlap=true", "grpo.max_steps=3", "grpo.eval_steps=2", "grpo.eval_examples=2")
    trainer = GRPOTrainer(config, engine, accelerator)
    served = engine.load_adapter(trainer.folder / "adapter")  # versions count up from here
    for step in range(3):
        trainer.step(step)
    trainer.finish()
    versions = [
        pl.read_parquet(trainer.folder / "completions" / f"step-{step:06d}.parquet")[
            "adapter_version"
        ].unique()
        for step in (1, 2, 3)
    ]
    # each step's questions are asked after a publication of their own
    assert [v.to_list() for v in versions] == [[served], [served + 1], [served + 2]]
    _, first, second, third = records(config)
    assert max(r["agreement/max"] for r in (first, second, third)) < config.grpo.probe_tolerance
    assert first["importance_ratio"] == pytest.approx(1, abs=1e-4)
    assert abs(third["importance_ratio"] - 1) > 1e-4


@pytest.mark.slow
def test_rollouts_of_one_update_ago_weigh_by_how_much_likelier_they_have_become(
    make_trainer: MakeTrainer,
) -> None:
    trainer, corrected = (
        make_trainer("grpo.overlap=true"),
        make_trainer("grpo.importance_correction=token_truncate", "grpo.probe_tolerance=10"),
    )
    scored = scored_groups(trainer)
    before = [p.detach().clone() for p in trainable(trainer.policy)]
    for moved in (trainer, corrected):
        torch.manual_seed(0)
        for parameter in trainable(moved.policy):
            parameter.data += 0.03 * torch.randn_like(parameter)
    with pytest.raises(AgreementError):
        trainer._update(scored)
    expected = gradient(corrected, scored)
    sums, agreement = trainer._update(scored, before)
    assert agreement.largest < trainer.settings.probe_tolerance
    assert abs(sums["importance"] / sums["tokens"] - 1) > 1e-4
    after = [p.grad for p in trainable(trainer.policy) if p.grad is not None]
    assert close(torch.cat([g.flatten() for g in after]), expected)
    assert not any(torch.equal(a, b) for a, b in zip(trainable(trainer.policy), before, strict=True))


@pytest.mark.slow
def test_an_overlapped_run_goes_on_from_its_checkpoint(
    make_config: Callable[..., Config], engine: Engine, accelerator: Accelerator
) -> None:
    config = make_config("grpo.overlap=true", "grpo.max_steps=3")
    GRPOTrainer(config, engine, accelerator).step(0)
    train_grpo(config, engine, accelerator)
    assert [r["step"] for r in records(config)] == [1, 2, 3]
    final = tensors(Path(config.run_dir) / "grpo" / "adapter")
    checkpoint = tensors(Path(config.run_dir) / "grpo" / "checkpoints" / "step-000003" / "adapter")
    assert all(torch.equal(final[name], checkpoint[name]) for name in final)


@pytest.mark.slow
def test_in_bfloat16_the_adapter_is_float32_and_importance_is_corrected(
    make_config: Callable[..., Config], accelerator: Accelerator
) -> None:
    config = make_config("model.dtype=bfloat16")
    run_embed(config, StageProgress("embed"))
    engine = start_engine(config)
    trainer = GRPOTrainer(config, engine, accelerator)
    assert {p.dtype for p in trainable(trainer.policy)} == {torch.float32}
    assert trainer.policy.language_model.dtype == torch.bfloat16
    record = trainer.step(0)
    assert set(record) == KEYS | {"importance_ratio", "importance_capped"}
    assert record["importance_ratio"] == pytest.approx(1, abs=0.05)
    assert 0 < record["agreement/mean"] < 0.1
    engine.close()


@pytest.mark.slow
def test_each_step_asks_something_else_and_is_reproducible(make_trainer: MakeTrainer) -> None:
    trainer = make_trainer()

    def said(step: int) -> list[tuple[int, ...]]:
        return [r.token_ids for _, group in trainer.generation.draw(step, 2) for r in group.rollouts]

    assert said(0) == said(0) != said(1)
    assert len(set(said(0))) == len(said(0))


@pytest.mark.slow
def test_validation_is_the_benchmark_on_greedy_answers_and_picks_the_adapter(
    make_config: Callable[..., Config], engine: Engine, accelerator: Accelerator
) -> None:
    """Random text is never right, so every validation is a draw, which the first one wins: the SFT adapter."""
    config = make_config(
        "grpo.eval_steps=2", "grpo.eval_examples=3", "grpo.max_steps=3", "grpo.num_generations=2"
    )
    adapter = train_grpo(config, engine, accelerator)
    assert [record["step"] for record in records(config)] == [0, 1, 2, 3]
    start, first, second, last = records(config)
    names = {f"validation/{name}" for name in ("balanced_accuracy", "accuracy", "iou", "strict")}
    assert set(start) == {"step", *names, "seconds/validation"}
    assert not any(name.startswith("validation") for name in first)
    assert set(second) == set(last) == KEYS | names | {"seconds/validation"}
    summary = json.loads((adapter.parent / "summary.json").read_text())
    assert summary == {"best": {"step": 0, "value": start["validation/balanced_accuracy"]}}
    for name, tensor in tensors(adapter).items():
        torch.testing.assert_close(tensor, tensors(Path(config.grpo.init_adapter))[name])


@pytest.mark.parametrize("asked", [1, 3, 4, 1000])
def test_validation_questions_are_spread_over_the_whole_split(
    make_config: Callable[..., Config], asked: int
) -> None:
    """Of 199 questions and 100 asked, all of the first 100 would be of the first patients."""
    validation = Validation(make_config(f"grpo.eval_examples={asked}"))
    count = len(validation.task.examples)
    gaps = [after - before for before, after in pairwise([*validation.chosen, count])]
    assert len(gaps) == min(asked, count)
    assert validation.chosen[0] == 0
    assert max(gaps) - min(gaps) <= 1


def test_the_best_adapter_by_the_primary_endpoint_is_kept(tmp_path: Path) -> None:
    best = Best(tmp_path / "best", "iou/Femur", goes_on=True)
    for step, value in enumerate((0.2, 0.5, 0.5, 0.4)):
        folder = tmp_path / f"adapter-{step}"
        folder.mkdir()
        (folder / "weights").write_text(str(step))
        best.offer(step, {"validation/iou/Femur": value}, folder)
    assert best.state == {"step": 1, "value": 0.5}
    best.restore(tmp_path / "adapter-3")
    assert [path.name for path in (tmp_path / "adapter-3").iterdir()] == ["weights"]
    assert (tmp_path / "adapter-3" / "weights").read_text() == "1"
    # stopped before a checkpoint knew of it: a copy goes with its step and value
    again = Best(tmp_path / "best", "iou/Femur", goes_on=True)
    again.offer(1, {"validation/iou/Femur": 0.49}, tmp_path / "adapter-2")
    assert again.state == best.state
    assert (again.folder / "weights").read_text() == "1"
    assert Best(tmp_path / "best", "iou/Femur", goes_on=False).state == {}
    with pytest.raises(ConfigError, match=r"compare\.primary_endpoint: validation/iou/Femur has no value"):
        best.offer(4, {"validation/iou": 0.5}, tmp_path / "adapter-3")


@pytest.mark.slow
def test_a_scheduled_parameter_rises_with_the_score_and_outlives_a_restart(
    make_config: Callable[..., Config], workshop: Path, engine: Engine, accelerator: Accelerator
) -> None:
    schedule = "schedule: {parameter: bar, to: 0.9, by: 0.45, above: 0.01}"
    component = f"{{name: '{workshop}/variety.py:variety', params: {{bar: 0}}, {schedule}}}"
    config = make_config(f"rewards.components=[{component}, {{name: box_iou_threshold}}]", "grpo.max_steps=4")
    trainer = GRPOTrainer(config, engine, accelerator)
    assert [trainer.step(step)["schedule/variety"] for step in range(3)] == pytest.approx([0, 0.45, 0.9])
    restarted = GRPOTrainer(config, engine, accelerator)
    assert restarted.first_step == 3
    assert restarted.scorer.schedules.values == pytest.approx({"variety": 0.9})
    unmoved = restarted.scorer.schedules.after_step({"reward/variety": 0.01})
    assert unmoved == restarted.scorer.schedules.values
    save_config(config, Path(config.run_dir) / "config.yaml")
    table = replay(Path(config.run_dir), config).table
    assert table["replayed"].to_list() == table["reward"].to_list()  # moved as it did


def test_the_prior_is_what_the_same_questions_pay_for_answering_blind(make_trainer: MakeTrainer) -> None:
    trainer = make_trainer()
    record = trainer.step(0)
    table = pl.read_parquet(trainer.folder / "completions" / "step-000001.parquet")
    by_example = {example.example_id: i for i, example in enumerate(trainer.task.examples)}
    priors = [trainer.scorer.prior(by_example[example_id]) for example_id in table["example_id"]]
    assert max(priors) > 0.5  # the commonest grade and the mean box are often right
    assert record["reward_above_prior"] == pytest.approx(record["reward"] - sum(priors) / len(priors))


def test_a_missing_sft_adapter_is_named(
    make_config: Callable[..., Config], engine: Engine, accelerator: Accelerator, tmp_path: Path
) -> None:
    config = make_config("grpo.init_adapter=''")
    with pytest.raises(ConfigError, match=r"sft/adapter does not exist; run `reasonknee sft` first"):
        train_grpo(config, engine, accelerator)


def test_weights_that_are_not_finite_are_never_published(
    config: Config, engine: Engine, accelerator: Accelerator, workshop: Path
) -> None:
    """A reward function cannot cause it (the suite checks), a diverged step can."""
    trainer = GRPOTrainer(config, engine, accelerator)
    backward: Any = torch.autograd.backward

    def poisoned(loss: torch.Tensor) -> None:
        backward(loss * math.nan)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.autograd, "backward", poisoned)
        with pytest.raises(FloatingPointError, match="gradient"):
            trainer.step(0)
    published = tensors(Path(config.run_dir) / "grpo" / "adapter")
    assert all(torch.equal(published[n], t) for n, t in tensors(workshop / "sft").items())
