"""SFT on tiny phantoms: what the loss is on, what is kept, and when it stops."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from rl.config import Config, ConfigError
from rl.model import load_policy
from rl.packed import PackedPolicy, pack
from rl.sft import SFTTrainer, completion_nll, mean_loss, train_sft
from rl.task import Task


def records(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def tensors(adapter: Path) -> dict[str, torch.Tensor]:
    return load_file(adapter / "adapter_model.safetensors")


def test_the_loss_is_on_the_whole_completion_and_nothing_else(config: Config) -> None:
    """A model that finds every token equally likely pays log(vocabulary) for each token of the loss."""
    policy, task = load_policy(config), Task(config, "train")
    policy.language_model.norm.weight.data.zero_()
    indices = next(iter(task.examples.by_volume().values()))[:3]
    nll, tokens = completion_nll(policy, task, indices)
    targets = [task.target_ids(i) for i in indices]
    assert tokens == sum(len(ids) for ids in targets)
    vocabulary = policy.causal_lm.config.text_config.vocab_size
    assert nll.item() == pytest.approx(tokens * math.log(vocabulary), rel=1e-5)


def test_each_token_of_the_completion_counts_and_no_token_of_the_prompt(
    config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another last token changes the loss by its own log-probability; prompt tokens are only looked at."""
    policy, task = load_policy(config).eval(), Task(config, "train")
    target = task.target_ids(0)
    losses = []
    with torch.no_grad():
        for end in ([], target[-1:]):
            monkeypatch.setattr(task, "target_ids", lambda i, end=end: [*target[:-1], *end])
            losses.append(completion_nll(policy, task, [0])[0].item())
        roots = task.tree([task.prompt(0, 1)], [[target]])
        logps_N_T, _ = policy(pack(roots, task.builder.video_pad))
    assert losses[1] - losses[0] == pytest.approx(-logps_N_T[0, -1].item(), abs=1e-3)
    assert -logps_N_T.sum().item() == pytest.approx(losses[1], rel=1e-5)


@pytest.mark.slow
def test_the_adapter_of_the_best_epoch_is_kept_and_patience_ends_the_run(
    make_config: Callable[..., Config], monkeypatch: pytest.MonkeyPatch
) -> None:
    losses, seen, at_validation = iter([3.0, 2.0, 2.5, 2.0, 1.0]), [], []

    def planted(policy: PackedPolicy, *_: object) -> float:
        at_validation.append({n: p.clone() for n, p in policy.named_parameters() if "lora" in n})
        return next(losses)

    monkeypatch.setattr("rl.sft.mean_loss", planted)
    config = make_config(
        "sft.max_epochs=9", "sft.patience=2", "sft.steps_per_epoch=1", "sft.volumes_per_step=1"
    )
    adapter = train_sft(config, seen.append)
    assert adapter == Path(config.run_dir) / "sft" / "adapter"
    best = {n: p for n, p in load_policy(config, adapter).named_parameters() if "lora" in n}
    assert all(torch.equal(best[n], p) for n, p in at_validation[1].items())
    assert not all(torch.equal(best[n], p) for n, p in at_validation[3].items())
    summary = json.loads((adapter.parent / "summary.json").read_text())
    assert (summary["epoch"], summary["best_epoch"], summary["best_loss"]) == (4, 2, 2.0)
    steps = [r for r in records(adapter.parent) if "loss" in r]
    assert [r["step"] for r in steps] == [1, 2, 3, 4]
    assert set(steps[0]) == {"step", "loss", "lr", "seconds"}
    assert [r["val_loss"] for r in seen if "val_loss" in r] == [3.0, 2.0, 2.5, 2.0]


@pytest.mark.slow
def test_training_lowers_the_validation_loss(make_config: Callable[..., Config]) -> None:
    config = make_config("sft.max_epochs=3")
    adapter = train_sft(config)
    losses = [r["val_loss"] for r in records(adapter.parent) if "val_loss" in r]
    assert losses == sorted(losses, reverse=True)


@pytest.mark.slow
@pytest.mark.parametrize("killed_at", [1, 3])
def test_a_killed_and_restarted_run_is_the_uninterrupted_one(
    make_config: Callable[..., Config], killed_at: int
) -> None:
    """Dropout included. Killed in the first epoch, it starts over; later, it goes on from the last checkpoint."""

    def kill(record: dict[str, float]) -> None:
        if record["step"] == killed_at:
            raise KeyboardInterrupt

    whole = train_sft(make_config(run="whole"))
    config = make_config(run="killed")
    with pytest.raises(KeyboardInterrupt):
        train_sft(config, kill)
    restarted = train_sft(config)
    keep = ("step", "loss", "lr", "epoch", "val_loss")
    got, expected = (
        [{k: r[k] for k in keep if k in r} for r in records(adapter.parent)] for adapter in (restarted, whole)
    )
    assert got == [pytest.approx(record, rel=1e-5) for record in expected]
    for name, tensor in tensors(whole).items():
        torch.testing.assert_close(tensors(restarted)[name], tensor, rtol=1e-4, atol=1e-6)


def test_sft_may_have_a_training_file_of_its_own(make_config: Callable[..., Config], tmp_path: Path) -> None:
    whole = json.loads((Path(make_config().data.root) / "generate_data" / "train.json").read_text())
    (tmp_path / "few.json").write_text(json.dumps(whole[:3]))
    trainer = SFTTrainer(make_config(f"sft.train_file={tmp_path / 'few.json'}"), "sft", lambda record: None)
    assert (len(trainer.train.examples), len(trainer.val.examples)) == (
        3,
        len(Task(make_config(), "val").examples),
    )


@pytest.mark.slow
def test_training_goes_on_from_an_adapter(make_config: Callable[..., Config], workshop: Path) -> None:
    config = make_config(f"sft.init_adapter={workshop / 'sft'}", "sft.learning_rate=1e-9", "sft.max_epochs=1")
    adapter = train_sft(config)
    for name, tensor in tensors(workshop / "sft").items():
        torch.testing.assert_close(tensors(adapter)[name], tensor, rtol=0, atol=1e-6)


def test_a_validation_without_questions_is_refused(config: Config) -> None:
    with pytest.raises(ConfigError, match=r"data\.val_file"):
        mean_loss(load_policy(config), Task(config, "val"), [])
