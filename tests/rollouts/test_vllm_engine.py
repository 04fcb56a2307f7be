"""The real vLLM: what it says it sampled is what the trainer will score, and it survives what may happen to it."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from rollouts.adapters import AdapterError
from rollouts.engines import make_engine
from rollouts.types import EngineError, Prompt, Sampling
from rollouts.vllm_engine import VllmEngine

pytestmark = pytest.mark.slow

Score = Callable[..., list[float]]
TOLERANCE = 1e-4


@pytest.fixture(scope="module")
def engine(base_folder: Path) -> Iterator[VllmEngine]:
    engine = make_engine(
        "vllm",
        base_folder,
        device="cpu",
        dtype="float32",
        max_model_len=256,
        max_lora_rank=8,
        kv_cache_gib=0.25,
    )
    assert isinstance(engine, VllmEngine)
    yield engine
    engine.close()


@pytest.fixture(autouse=True)
def start_from_the_base(engine: VllmEngine) -> None:
    engine.load_adapter(None)


@pytest.fixture
def prompts(make_prompt: Callable[..., Prompt]) -> list[Prompt]:
    """Two volumes with two questions each, volumes interleaved: the engine regroups them."""
    return [make_prompt(volume, question) for question in (0, 1) for volume in (0, 1)]


@pytest.mark.parametrize("temperature", [1.0, 0.7, 0.0])
def test_log_probabilities_are_the_trainers_through_hot_swaps(
    engine: VllmEngine,
    prompts: list[Prompt],
    make_adapter: Callable[[int], Path],
    score: Score,
    temperature: float,
) -> None:
    """Positions, cached features, temperature and the adapter just swapped in, all at once."""
    for adapter in (None, make_adapter(1), make_adapter(2), make_adapter(1), None):
        version = engine.load_adapter(adapter)
        n = 4 if temperature else 1
        groups = engine.generate(prompts, n, Sampling(temperature, 1.0, 12), [1, 2, 3, 4])
        assert [group.prompt for group in groups] == prompts
        for group in groups:
            for rollout in group.rollouts:
                expected = score(group.prompt, rollout.token_ids, temperature, adapter)
                assert rollout.logps == pytest.approx(expected, abs=TOLERANCE)
                assert rollout.adapter_version == version


def test_a_prompt_without_a_picture_is_answered_like_plain_text(
    engine: VllmEngine, prompts: list[Prompt], no_picture: Prompt, score: Score
) -> None:
    """Alone, and among prompts that show volumes."""
    for asked in ([no_picture], [prompts[0], no_picture, prompts[1]]):
        for group in engine.generate(asked, 2, Sampling(max_tokens=8), list(range(len(asked)))):
            for rollout in group.rollouts:
                expected = score(group.prompt, rollout.token_ids, 1.0)
                assert rollout.logps == pytest.approx(expected, abs=TOLERANCE)


def test_two_questions_about_one_volume_are_answered_apart(
    engine: VllmEngine, make_prompt: Callable[..., Prompt], score: Score
) -> None:
    """They share the volume's KV; each prompt is long enough to fill the cache's blocks."""
    long = [make_prompt(5, question, words=150) for question in (0, 1)]
    groups = engine.generate(long, 2, Sampling(max_tokens=8), [0, 0])
    for group in groups:
        for rollout in group.rollouts:
            assert rollout.logps == pytest.approx(score(group.prompt, rollout.token_ids, 1.0), abs=TOLERANCE)
    assert groups[0].rollouts != groups[1].rollouts


def test_the_share_of_the_prefix_cache_is_told(
    engine: VllmEngine, make_prompt: Callable[..., Prompt], make_adapter: Callable[[int], Path]
) -> None:
    """Of G samples one pays for the prompt; a new adapter makes the cache worthless; short prompts fill no block."""
    prompt = make_prompt(6, 0, words=150)
    block, length, n = 32, len(prompt.token_ids), 4
    once = (n - 1) / n * (length // block * block) / length
    engine.load_adapter(make_adapter(1))
    for rate in (once, length // block * block / length):
        (group,) = engine.generate([prompt], n, Sampling(max_tokens=4), [0])
        assert [rollout.prefix_hit_rate for rollout in group.rollouts] == pytest.approx([rate] * n)
    engine.load_adapter(make_adapter(2))
    (group,) = engine.generate([prompt], n, Sampling(max_tokens=4), [0])
    assert group.rollouts[0].prefix_hit_rate == pytest.approx(once)


def test_adapter_versions_are_never_reused(engine: VllmEngine, make_adapter: Callable[[int], Path]) -> None:
    versions = [
        engine.load_adapter(folder) for folder in (make_adapter(1), None, make_adapter(1), make_adapter(2))
    ]
    assert versions[1] == 0
    assert 0 < versions[0] < versions[2] < versions[3]


def test_an_adapter_is_read_when_it_is_handed_over(
    engine: VllmEngine, prompts: list[Prompt], make_adapter: Callable[[int], Path], score: Score
) -> None:
    """So that the time of the handing over is all of it, and `generate` only samples."""
    engine.wait_until_ready()
    version = engine.load_adapter(make_adapter(1))
    shutil.rmtree(engine._folder / f"v{version}")
    (group,) = engine.generate(prompts[:1], 1, Sampling(max_tokens=8), [0])
    (rollout,) = group.rollouts
    expected = score(prompts[0], rollout.token_ids, 1.0, make_adapter(1))
    assert rollout.logps == pytest.approx(expected, abs=TOLERANCE)


def test_an_adapter_overwritten_on_disk_is_not_served(
    engine: VllmEngine,
    prompts: list[Prompt],
    make_adapter: Callable[[int], Path],
    tmp_path: Path,
    score: Score,
) -> None:
    """A trainer may write its next adapter over the last one before the engine has read it."""
    folder = tmp_path / "adapter"
    folder.mkdir()
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        (folder / name).write_bytes((make_adapter(1) / name).read_bytes())
    engine.load_adapter(folder)
    tensors = load_file(folder / "adapter_model.safetensors")
    save_file(
        {name: torch.zeros_like(t) for name, t in tensors.items()}, folder / "adapter_model.safetensors"
    )
    (group,) = engine.generate(prompts[:1], 1, Sampling(max_tokens=6), [0])
    rollout = group.rollouts[0]
    assert rollout.logps == pytest.approx(
        score(group.prompt, rollout.token_ids, 1.0, make_adapter(1)), abs=TOLERANCE
    )


def test_a_foreign_adapter_is_refused_and_the_last_one_stays(
    engine: VllmEngine,
    prompts: list[Prompt],
    make_adapter: Callable[[int], Path],
    tmp_path: Path,
    score: Score,
) -> None:
    tensors = load_file(make_adapter(2) / "adapter_model.safetensors")
    (tmp_path / "adapter_config.json").write_bytes((make_adapter(2) / "adapter_config.json").read_bytes())
    foreign = {name.replace("language_model.", "text_model."): tensor for name, tensor in tensors.items()}
    save_file(foreign, tmp_path / "adapter_model.safetensors")
    version = engine.load_adapter(make_adapter(1))
    with pytest.raises(AdapterError, match="text_model"):
        engine.load_adapter(tmp_path)
    (group,) = engine.generate(prompts[:1], 1, Sampling(max_tokens=6), [0])
    rollout = group.rollouts[0]
    assert rollout.adapter_version == version
    assert rollout.logps == pytest.approx(
        score(group.prompt, rollout.token_ids, 1.0, make_adapter(1)), abs=TOLERANCE
    )


def test_seeds_reproduce_samples_and_neighbours_share_none(engine: VllmEngine, prompts: list[Prompt]) -> None:
    """vLLM draws sample i of a group with seed + i: plain neighbouring seeds would repeat samples."""
    sampling = Sampling(max_tokens=10)
    same = [prompts[0]] * 3
    groups = engine.generate(same, 8, sampling, [7, 8, 9])
    assert len({r.token_ids for group in groups for r in group.rollouts}) == 24
    (again,) = engine.generate([prompts[0]], 8, sampling, [8])
    assert [r.token_ids for r in again.rollouts] == [r.token_ids for r in groups[1].rollouts]


@pytest.mark.parametrize("spoil", [lambda e: e * float("nan"), lambda e: e[:-1], lambda e: torch.cat([e, e])])
def test_bad_features_are_refused_and_the_next_request_is_right(
    engine: VllmEngine, prompts: list[Prompt], score: Score, spoil: Callable[[torch.Tensor], torch.Tensor]
) -> None:
    pid = engine._started().pid
    features = replace(prompts[0].features, key="spoiled", embeds_V_H=spoil(prompts[0].features.embeds_V_H))
    with pytest.raises(EngineError, match="spoiled"):
        engine.generate(
            [replace(prompts[0], features=features), prompts[1]], 1, Sampling(max_tokens=4), [0, 1]
        )
    (group,) = engine.generate(prompts[:1], 1, Sampling(max_tokens=4), [0])
    assert group.rollouts[0].logps == pytest.approx(
        score(prompts[0], group.rollouts[0].token_ids, 1.0), abs=TOLERANCE
    )
    assert engine._started().pid == pid


def test_sampling_stops_at_the_end_of_turn_and_at_the_limit(
    engine: VllmEngine, prompts: list[Prompt]
) -> None:
    groups = engine.generate(prompts, 32, Sampling(temperature=1.5, max_tokens=60), [0, 1, 2, 3])
    rollouts = [rollout for group in groups for rollout in group.rollouts]
    assert {rollout.finish_reason for rollout in rollouts} == {"stop", "length"}
    ends = {r.token_ids[-1] for r in rollouts if r.finish_reason == "stop"}
    assert len(ends) == 1
    assert not any(ends & set(r.token_ids[:-1]) for r in rollouts)
    assert all(len(r.token_ids) == 60 for r in rollouts if r.finish_reason == "length")


def test_a_killed_engine_comes_back_with_its_adapter(
    engine: VllmEngine, prompts: list[Prompt], make_adapter: Callable[[int], Path], score: Score
) -> None:
    version = engine.load_adapter(make_adapter(2))
    pid = engine._started().pid
    os.kill(pid, signal.SIGKILL)
    (group,) = engine.generate(prompts[:1], 2, Sampling(max_tokens=6), [0])
    assert engine._started().pid != pid
    for rollout in group.rollouts:
        assert rollout.adapter_version == version
        expected = score(group.prompt, rollout.token_ids, 1.0, make_adapter(2))
        assert rollout.logps == pytest.approx(expected, abs=TOLERANCE)


def test_an_engine_stopped_in_the_middle_is_replaced_and_twice_is_an_error(
    engine: VllmEngine, prompts: list[Prompt], monkeypatch: pytest.MonkeyPatch
) -> None:
    engine.wait_until_ready()
    stopped = engine._started().pid
    os.kill(stopped, signal.SIGSTOP)  # as a hang looks from outside
    monkeypatch.setattr(engine, "_generate_timeout_s", 20.0)
    (group,) = engine.generate(prompts[:1], 1, Sampling(max_tokens=4), [0])
    assert len(group.rollouts[0].token_ids) == 4
    assert not Path(f"/proc/{stopped}").exists()

    monkeypatch.setattr(engine, "_generate_timeout_s", 0.0)
    with pytest.raises(EngineError, match="generating failed twice") as error:
        engine.generate(prompts[:1], 1, Sampling(max_tokens=200), [0])
    assert "no answer within 0 s" in str(error.value)


def test_a_model_that_vllm_cannot_load_is_told_with_its_cause(base_folder: Path, tmp_path: Path) -> None:
    for path in base_folder.iterdir():
        if path.suffix != ".safetensors":
            (tmp_path / path.name).write_bytes(path.read_bytes())
    engine = VllmEngine(tmp_path, device="cpu", kv_cache_gib=0.25)
    with pytest.raises(EngineError, match=r"vLLM did not start for .*(.|\n)*weights"):
        engine.wait_until_ready()
    engine.close()


INTERRUPTED = """
import sys
from rollouts.vllm_engine import VllmEngine
engine = VllmEngine(sys.argv[1], device="cpu", kv_cache_gib=0.25)
print(engine._worker.pid, engine._folder, flush=True)
engine.wait_until_ready()
"""


def test_ctrl_c_leaves_no_process_and_no_folder(base_folder: Path) -> None:
    parent = subprocess.Popen([sys.executable, "-c", INTERRUPTED, str(base_folder)], stdout=subprocess.PIPE,
                              stderr=subprocess.DEVNULL, text=True)  # fmt: skip
    assert parent.stdout is not None
    pid, folder = parent.stdout.readline().split()
    time.sleep(3)
    parent.send_signal(signal.SIGINT)
    assert parent.wait(30) != 0
    parent.stdout.close()
    assert not Path(f"/proc/{pid}").exists()
    assert not Path(folder).exists()
