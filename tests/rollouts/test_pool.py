"""The pool of engines: sharding laws, then real Ray actors around a small deterministic engine."""

from __future__ import annotations

import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import pytest
import ray
import torch
from hypothesis import given
from hypothesis import strategies as st

from rollouts.actor import EngineLocation, pack, unpack
from rollouts.pool import EnginePool, PoolLimits, shard_by_volume
from rollouts.types import NO_PICTURE, EngineError, Group, Prompt, Rollout, Sampling, VolumeFeatures

LIMITS = PoolLimits(start_s=300, generate_s=60)
SAMPLING = Sampling(max_tokens=4)


def _prompt(volume: int, question: int, visual_tokens: int = 3) -> Prompt:
    embeds = torch.full((visual_tokens, 2), float(volume), dtype=torch.bfloat16)
    features = VolumeFeatures(f"volume{volume}", embeds, (visual_tokens, 2, 2), 0.5)
    return Prompt(f"volume{volume}_{question}", features, (7,) * visual_tokens, (8, question))


class EchoEngine:
    """Answers each prompt with (volume value, question, seed, process id); obeys orders written to a folder.

    `die`, `die_always`, `hang`, `refuse` in the folder make it do so; all but `die_always` are obeyed once.
    """

    def __init__(self, orders: Path) -> None:
        self.orders = orders
        self.version = 0
        self.adapter: str | None = None
        if (orders / "broken").exists():
            raise EngineError("weights are missing")

    def _ordered(self, order: str) -> bool:
        path = self.orders / order
        if order == "die_always":
            return path.exists()
        try:
            path.unlink()  # of several engines one alone obeys
        except FileNotFoundError:
            return False
        return True

    def generate(self, prompts: list[Prompt], n: int, sampling: Sampling, seeds: list[int]) -> list[Group]:
        if self._ordered("die") or self._ordered("die_always"):
            os._exit(17)
        if self._ordered("hang"):
            time.sleep(1000)
        if self._ordered("refuse"):
            raise EngineError("volume1: features are not finite")
        groups = []
        for prompt, seed in zip(prompts, seeds, strict=True):
            value = int(prompt.features.embeds_V_H.float().mean())
            tokens = (value, prompt.question_ids[-1], seed)
            rollout = Rollout(tokens, (0.0,) * 3, f"{os.getpid()} {self.adapter}", "stop", self.version)
            groups.append(Group(prompt, (rollout,) * n))
        return groups

    def load_adapter(self, folder: Path | None) -> int:
        if folder is not None and folder.name == "foreign":
            raise EngineError(f"{folder}: adapter does not fit")
        self.adapter = folder.name if folder is not None else None
        self.version += 1
        return self.version

    def close(self) -> None:
        pass


@given(
    st.lists(st.tuples(st.integers(0, 5), st.integers(1, 50)), max_size=30),
    st.integers(1, 4),
    st.integers(0, 100),
)
def test_sharding_keeps_every_prompt_once_and_volumes_whole(
    asked: list[tuple[int, int]], shards: int, completion_tokens: int
) -> None:
    prompts = [_prompt(volume, i, visual_tokens=volume + 1) for i, (volume, _) in enumerate(asked)]
    result = shard_by_volume(prompts, shards, completion_tokens)
    assert sorted(i for shard in result for i in shard) == list(range(len(prompts)))
    owners: dict[str, set[int]] = {}
    for engine, shard in enumerate(result):
        for i in shard:
            owners.setdefault(prompts[i].features.key, set()).add(engine)
    assert all(len(engines) == 1 for engines in owners.values())


def test_sharding_balances_tokens_not_prompts() -> None:
    """Three small volumes weigh less than one large one."""
    prompts = [_prompt(0, 0, visual_tokens=400), *(_prompt(v, 0, visual_tokens=100) for v in (1, 2, 3))]
    assert shard_by_volume(prompts, 2, completion_tokens=10) == [[0], [1, 2, 3]]


def test_prompts_without_a_picture_are_spread() -> None:
    """They have their features, none, in common, and nothing that an engine could share."""
    prompts = [Prompt(f"{i}", NO_PICTURE, (7,), (8, i)) for i in range(6)]
    assert [len(shard) for shard in shard_by_volume(prompts, 3, completion_tokens=10)] == [2, 2, 2]
    assert unpack(pack(NO_PICTURE)).absent


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_features_survive_packing_bit_by_bit(dtype: torch.dtype) -> None:
    features = VolumeFeatures("key", torch.randn(5, 4).to(dtype), (5, 2, 2), 0.25)
    packed = pack(features)
    packed.data.flags.writeable = False  # as Ray's object store hands it out
    back = unpack(packed)
    assert back.embeds_V_H.data_ptr() == features.embeds_V_H.data_ptr(), "neither way copies"
    assert back.embeds_V_H.dtype == dtype
    assert torch.equal(back.embeds_V_H, features.embeds_V_H)
    assert (back.key, back.grid_thw, back.second_per_grid_t) == ("key", (5, 2, 2), 0.25)


@pytest.fixture(scope="module")
def cluster() -> Iterator[None]:
    """Four CPUs and two GPUs by name only: Ray hands out what it is told it has."""
    ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])  # Ray's processes cannot import tests
    with tempfile.TemporaryDirectory(prefix="rk", dir="/tmp", ignore_cleanup_errors=True) as folder:
        ray.init(
            num_cpus=4,
            num_gpus=2,
            include_dashboard=False,
            log_to_driver=False,
            _temp_dir=folder,
            object_store_memory=100 * 2**20,
        )
        yield
        ray.shutdown()
    ray.cloudpickle.unregister_pickle_by_value(sys.modules[__name__])


@pytest.fixture
def start(cluster: None, tmp_path: Path) -> Iterator[Callable[..., EnginePool]]:
    pools = []

    def start_pool(num_engines: int = 1, limits: PoolLimits = LIMITS, **options: float) -> EnginePool:
        options.setdefault("cpus", 0.5)
        pools.append(EnginePool.start(partial(EchoEngine, tmp_path), num_engines, limits, **options))  # type: ignore[arg-type]
        return pools[-1]

    yield start_pool
    for pool in pools:
        pool.close()


def _ask(pool: EnginePool, volumes: int = 3, questions: int = 2, n: int = 2) -> list[Group]:
    prompts = [_prompt(v, q) for q in range(questions) for v in range(volumes)]  # volumes interleaved
    return pool.generate(prompts, n, SAMPLING, [100 + i for i in range(len(prompts))])


@pytest.mark.slow
def test_groups_come_back_in_order_and_each_volume_from_one_engine(start: Callable[..., EnginePool]) -> None:
    groups = _ask(start(num_engines=2))
    assert [g.prompt.example_id for g in groups] == [f"volume{v}_{q}" for q in range(2) for v in range(3)]
    assert [g.rollouts[0].token_ids for g in groups] == [
        (v, q, 100 + q * 3 + v) for q in range(2) for v in range(3)
    ]
    assert all(len(g.rollouts) == 2 for g in groups)
    engines = [g.rollouts[0].text for g in groups]
    assert engines[:3] == engines[3:]
    assert len(set(engines)) == 2


@pytest.mark.slow
def test_a_dead_engine_is_restarted_with_the_published_adapter(
    start: Callable[..., EnginePool], tmp_path: Path
) -> None:
    """The restarted engine counts from one again; the pool's version must not."""
    pool = start(num_engines=2)
    for name in ("first", "second"):
        version = pool.load_adapter(tmp_path / name)
    before = _ask(pool)
    (tmp_path / "die").touch()
    after = _ask(pool)
    assert [g.rollouts[0].token_ids for g in after] == [g.rollouts[0].token_ids for g in before]
    assert {g.rollouts[0].text for g in after} != {g.rollouts[0].text for g in before}
    assert {g.rollouts[0].text.split()[1] for g in after} == {"second"}
    assert {g.rollouts[0].adapter_version for g in after} == {version}


@pytest.mark.slow
def test_an_engine_that_dies_twice_is_an_error(start: Callable[..., EnginePool], tmp_path: Path) -> None:
    pool = start()
    (tmp_path / "die_always").touch()
    with pytest.raises(EngineError, match=r"^engine 0 died") as caught:
        _ask(pool)
    assert "restarted after: engine 0 died" in str(caught.value)


@pytest.mark.slow
def test_an_engine_that_hangs_is_restarted(start: Callable[..., EnginePool], tmp_path: Path) -> None:
    pool = start(limits=PoolLimits(start_s=300, generate_s=3))
    (tmp_path / "hang").touch()
    began = time.monotonic()
    assert len(_ask(pool)) == 6
    assert time.monotonic() - began < 40


@pytest.mark.slow
def test_an_engines_own_error_comes_first_and_is_not_retried(
    start: Callable[..., EnginePool], tmp_path: Path
) -> None:
    pool = start()
    (tmp_path / "refuse").touch()
    with pytest.raises(EngineError, match=r"^volume1: features are not finite"):
        _ask(pool)
    assert len(_ask(pool)) == 6  # the engine itself is alive


@pytest.mark.slow
def test_an_engine_that_cannot_start_is_an_error(start: Callable[..., EnginePool], tmp_path: Path) -> None:
    (tmp_path / "broken").touch()
    with pytest.raises(EngineError, match=r"^weights are missing"):
        start()


@pytest.mark.slow
def test_a_refused_adapter_leaves_the_old_one_serving(
    start: Callable[..., EnginePool], tmp_path: Path
) -> None:
    pool = start(num_engines=2)
    version = pool.load_adapter(tmp_path / "good")
    with pytest.raises(EngineError, match="adapter does not fit"):
        pool.load_adapter(tmp_path / "foreign")
    assert {(g.rollouts[0].text.split()[1], g.rollouts[0].adapter_version) for g in _ask(pool)} == {
        ("good", version)
    }
    assert pool.load_adapter(tmp_path / "better") > version + 1  # the refused version is not used again


@pytest.mark.slow
def test_a_copy_in_another_process_sees_a_new_adapter_at_once_and_cannot_end_the_engines(
    start: Callable[..., EnginePool], tmp_path: Path
) -> None:
    pool = start(num_engines=2)

    @ray.remote(num_cpus=0.5)
    def other_rank(copy: EnginePool) -> set[int]:
        versions = {g.rollouts[0].adapter_version for g in _ask(copy)}
        copy.close()
        return versions

    assert ray.get(other_rank.remote(pool)) == {0}
    version = pool.load_adapter(tmp_path / "new")
    assert ray.get(other_rank.remote(pool)) == {version}
    assert len(_ask(pool)) == 6


@pytest.mark.slow
def test_a_volume_is_stored_once_for_all_its_questions_and_calls(start: Callable[..., EnginePool]) -> None:
    pool = start()
    _ask(pool, volumes=2, questions=3)
    first = {key: ref for key, (ref, _) in pool._stored.items()}
    _ask(pool, volumes=2, questions=3)
    assert {key: ref for key, (ref, _) in pool._stored.items()} == first
    assert len(first) == 2


@pytest.mark.slow
def test_shares_above_one_half_put_each_engine_on_a_gpu_of_its_own(start: Callable[..., EnginePool]) -> None:
    """And the remainder, taken whole by a worker, on the same GPUs: how `placement: colocate` pairs them."""
    pool = start(num_engines=2, gpus=0.6)
    assert {location.gpu_ids for location in pool.locations} == {(0,), (1,)}

    @ray.remote(num_cpus=0.5, num_gpus=0.4)
    class Worker:
        def place(self) -> EngineLocation:
            return EngineLocation(
                ray.get_runtime_context().get_node_id(), tuple(int(gpu) for gpu in ray.get_gpu_ids())
            )

    workers = [Worker.remote() for _ in range(2)]
    places = ray.get([worker.place.remote() for worker in workers])
    assert {pool.beside(place, 0).serving for place in places} == {(0,), (1,)}
    for worker in workers:
        ray.kill(worker)


def test_a_worker_without_an_engine_beside_it_is_told_where_they_are() -> None:
    pool = EnginePool((None,), None, LIMITS, (EngineLocation("a", (0,)),), (0,))
    with pytest.raises(EngineError, match=r"no engine on node b, GPUs \[1\]"):
        pool.beside(EngineLocation("b", (1,)), 0)
