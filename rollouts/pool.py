"""A pool of engines, one per Ray actor, behind the `Engine` protocol.

The driver starts the pool and hands it (it can be pickled) to the training workers. A call to `generate`
goes out as one request per engine and comes back in the order of the prompts:

- Prompts are sharded **by volume**: all questions about a volume go to one engine, whose prefix cache then
  holds the volume's tokens once; volumes are spread so that engines get about the same number of tokens.
- Features travel through Ray's object store: one copy per volume, which every question refers to.
- Adapter versions are numbered by the pool (an `AdapterBoard` that all handles share), because an engine that
  is restarted starts counting anew. Every request names the adapter it is to be answered with, so a
  restarted engine loads it before it answers, whichever worker asks first.
- An engine that dies or hangs is restarted and given its shard once more; the second time it is an error.
"""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import ActorUnavailableError, GetTimeoutError, RayError, RayTaskError
from ray.util.placement_group import PlacementGroup
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from rollouts.actor import EngineActor, EngineLocation, PromptOnWire, Request, pack
from rollouts.board import Adapter, AdapterBoard
from rollouts.types import Engine, EngineError, Group, Prompt, Sampling, VolumeFeatures

FEATURE_CACHE_BYTES = 2 * 2**30
"""Features a handle keeps in Ray's object store for volumes that are asked about again."""


@dataclass(frozen=True)
class PoolLimits:
    """How long the pool waits, in seconds, before it takes an engine for lost."""

    start_s: float
    """One engine's start, and one adapter's loading."""
    generate_s: float
    """One request, its wait behind the requests of other workers included."""


class _EngineLost(Exception):
    """An engine's process died or did not answer in time. Worth one restart, unlike an error it reports."""


@dataclass
class EnginePool:
    """Handle on the engines of a pool; an `Engine` itself. Pickle it to use it from another Ray process."""

    actors: tuple[Any, ...]
    board: Any
    limits: PoolLimits
    locations: tuple[EngineLocation, ...]
    serving: tuple[int, ...]
    """Indices of the engines that `generate` asks. `load_adapter` always reaches all of them."""
    owner: bool = True
    """Whether `close` ends the engines: true for the handle that started them, false for every copy."""
    _stored: OrderedDict[str, tuple[Any, int]] = field(default_factory=OrderedDict, repr=False)

    @classmethod
    def start(
        cls,
        factory: Callable[[], Engine],
        num_engines: int,
        limits: PoolLimits,
        *,
        cpus: float = 1.0,
        gpus: float = 0.0,
        placement_group: PlacementGroup | None = None,
        env: dict[str, str] | None = None,
    ) -> EnginePool:
        """Start the engines and wait until each has loaded.

        Args:
            factory: builds one engine; called in the actor, so it must be importable or picklable there.
            limits: how long to wait for a start and for an answer.
            cpus: Ray CPUs of one engine; it also gets this many OpenMP threads (at least one).
            gpus: Ray GPUs of one engine; a fraction shares a GPU.
            placement_group: one bundle per engine; None lets Ray place them.
            env: further environment variables of the engines' processes.

        Raises:
            EngineError: an engine did not start; the message begins with the engine's own error.
        """
        threads = {"OMP_NUM_THREADS": str(max(1, int(cpus)))}
        options: dict[str, Any] = {
            "num_cpus": cpus,
            "num_gpus": gpus,
            "max_restarts": -1,  # the pool decides how often (see `generate`), Ray only does it
            "runtime_env": {"env_vars": threads | (env or {})},
        }
        remote = ray.remote(EngineActor)
        actors = []
        for index in range(num_engines):
            if placement_group is not None:
                options["scheduling_strategy"] = PlacementGroupSchedulingStrategy(placement_group, index)
            actors.append(remote.options(**options).remote(factory))
        pool = cls(
            tuple(actors),
            ray.remote(AdapterBoard).options(num_cpus=0).remote(),
            limits,
            locations=(),
            serving=tuple(range(num_engines)),
        )
        try:
            starting = [actor.start.remote() for actor in actors]
            deadline = time.monotonic() + limits.start_s
            locations = [pool._get(i, ref, deadline, "start") for i, ref in enumerate(starting)]
            pool.locations = tuple(locations)
        except _EngineLost as lost:
            pool.close()
            raise EngineError(f"{lost} while it started") from lost
        except EngineError:
            pool.close()
            raise
        return pool

    def generate(self, prompts: list[Prompt], n: int, sampling: Sampling, seeds: list[int]) -> list[Group]:
        """`n` completions of each prompt, in the prompts' order, sharded over the engines by volume.

        Raises:
            EngineError: an engine reported an error, or was lost twice over the same prompts; the message
                begins with the engine's own error.
        """
        if len(seeds) != len(prompts):
            raise EngineError(f"{len(prompts)} prompts need as many seeds, not {len(seeds)}")
        if not prompts:
            return []
        adapter = self._ask_board(self.board.current.remote())
        by_volume = shard_by_volume(prompts, len(self.serving), n * sampling.max_tokens)
        shards = {index: shard for index, shard in zip(self.serving, by_volume, strict=True) if shard}
        calls = {}
        for index, shard in shards.items():
            asked = [prompts[i] for i in shard]
            calls[index] = self._call(index, asked, n, sampling, tuple(seeds[i] for i in shard), adapter)
        answers = self._answers(calls)
        groups: dict[int, Group] = {}
        for index, shard in shards.items():
            for position, rollouts in zip(shard, answers[index], strict=True):
                groups[position] = Group(prompts[position], rollouts)
        return [groups[i] for i in range(len(prompts))]

    def load_adapter(self, folder: Path | None) -> int:
        """Publish an adapter: returns its version once **every** engine has loaded it and said so.

        An adapter that an engine refuses is not published: the next `generate` asks for the old one again.

        Raises:
            EngineError: an engine refused the adapter or was lost twice.
        """
        version = self._ask_board(self.board.next_version.remote())
        adapter = Adapter(version, str(folder.resolve()) if folder is not None else None)
        self._answers({i: partial(actor.serve.remote, adapter) for i, actor in enumerate(self.actors)})
        self._ask_board(self.board.publish.remote(adapter))
        return version

    def beside(self, location: EngineLocation, local_rank: int) -> EnginePool:
        """The handle of a worker that shares its node and GPU with an engine: `generate` asks that engine only.

        Raises:
            EngineError: no engine of the pool is at this place.
        """
        near = [i for i, other in enumerate(self.locations) if other == location]
        if not near:
            raise EngineError(
                f"no engine on node {location.node_id}, GPUs {list(location.gpu_ids)}: engines are at "
                f"{[(other.node_id, list(other.gpu_ids)) for other in self.locations]}; "
                "use ray.placement 'separate', or shares of the GPU that put one engine and one worker on each"
            )
        return replace(self, serving=(near[local_rank % len(near)],), owner=False, _stored=OrderedDict())

    def close(self) -> None:
        """End the engines' processes. On a copy of the handle: only forget the features it stored."""
        self._stored.clear()
        if self.owner:
            for actor in (*self.actors, self.board):
                ray.kill(actor)

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"owner": False, "_stored": OrderedDict()}

    def _call(
        self,
        index: int,
        prompts: list[Prompt],
        n: int,
        sampling: Sampling,
        seeds: tuple[int, ...],
        adapter: Adapter,
    ) -> Callable[[], Any]:
        """A shard's request to an engine, ready to be sent (and sent again)."""
        volumes = {prompt.features.key: prompt.features for prompt in prompts}
        position = {key: i for i, key in enumerate(volumes)}
        questions = tuple(
            PromptOnWire(p.example_id, position[p.features.key], p.volume_ids, p.question_ids)
            for p in prompts
        )
        request = Request(questions, n, sampling, seeds, adapter)
        refs = [self._store(features) for features in volumes.values()]
        return partial(self.actors[index].generate.remote, request, *refs)

    def _store(self, features: VolumeFeatures) -> Any:
        """The reference to a volume's features in the object store; the least recently used ones are dropped."""
        if features.key not in self._stored:
            packed = pack(features)
            self._stored[features.key] = (ray.put(packed), packed.data.nbytes)
        self._stored.move_to_end(features.key)
        ref = self._stored[features.key][0]
        while len(self._stored) > 1 and sum(size for _, size in self._stored.values()) > FEATURE_CACHE_BYTES:
            self._stored.popitem(last=False)
        return ref

    def _answers(self, calls: dict[int, Callable[[], Any]]) -> dict[int, Any]:
        """Send one call per engine and collect the answers; engines that were lost get theirs once more."""
        deadline = time.monotonic() + self.limits.generate_s
        sent = {index: call() for index, call in calls.items()}
        answers: dict[int, Any] = {}
        lost: dict[int, _EngineLost] = {}
        for index, ref in sent.items():
            try:
                answers[index] = self._get(index, ref, deadline, "answer")
            except _EngineLost as first:
                lost[index] = first
        for index, reason in lost.items():
            try:
                self._await_restart(index)
                again = time.monotonic() + self.limits.generate_s
                answers[index] = self._get(index, calls[index](), again, "answer")
            except _EngineLost as second:
                raise EngineError(f"{second}; it had been restarted after: {reason}") from second
        return answers

    def _get(self, index: int, ref: Any, deadline: float, doing: str) -> Any:
        """The result of a call, with Ray's exceptions translated: lost engines apart from errors they report."""
        try:
            return ray.get(ref, timeout=max(0.0, deadline - time.monotonic()))
        except GetTimeoutError as late:
            # What hangs in native code does not react to anything softer.
            ray.kill(self.actors[index], no_restart=False)
            limit = self.limits.start_s if doing == "start" else self.limits.generate_s
            raise _EngineLost(f"engine {index} did not {doing} within {limit:.0f} s") from late
        except RayTaskError as failed:
            own = failed.cause
            raise EngineError(f"{own} (engine {index}, {type(own).__name__})") from own
        except RayError as died:
            raise _EngineLost(f"engine {index} died: {_first_lines(died)}") from died

    def _ask_board(self, ref: Any) -> Any:
        try:
            return ray.get(ref, timeout=self.limits.start_s)
        except RayError as gone:
            raise EngineError(f"the pool's adapter board is gone: {_first_lines(gone)}") from gone

    def _await_restart(self, index: int) -> None:
        """Wait until Ray has restarted a lost engine's process and the engine has loaded in it."""
        deadline = time.monotonic() + self.limits.start_s
        while True:
            try:
                self._get(index, self.actors[index].start.remote(), deadline, "start")
                return
            except _EngineLost as lost:
                # "Unavailable" is what Ray says while it restarts the process.
                if not isinstance(lost.__cause__, ActorUnavailableError) or time.monotonic() > deadline:
                    raise
                time.sleep(0.5)


def shard_by_volume(prompts: Sequence[Prompt], shards: int, completion_tokens: int) -> list[list[int]]:
    """Positions of the prompts for each of `shards` engines: whole volumes, about equal numbers of tokens.

    A volume costs its visual tokens once, and each of its questions its own tokens plus `completion_tokens`
    (of all samples together); prompts without a picture share nothing. Largest volume first, each to the engine
    with the least so far (Graham 1969, longest processing time). Within a shard, prompts stay in order and
    volumes together.
    """
    volumes: dict[str, list[int]] = {}
    for position, prompt in enumerate(prompts):
        shared = f"blind {position}" if prompt.features.absent else prompt.features.key
        volumes.setdefault(shared, []).append(position)
    cost = {
        key: len(prompts[members[0]].volume_ids)
        + sum(len(prompts[i].question_ids) + completion_tokens for i in members)
        for key, members in volumes.items()
    }
    result: list[list[int]] = [[] for _ in range(shards)]
    load = [0] * shards
    for key in sorted(volumes, key=lambda key: -cost[key]):  # a stable sort: ties keep the prompts' order
        target = load.index(min(load))
        result[target] += volumes[key]
        load[target] += cost[key]
    return result


def _first_lines(error: BaseException, lines: int = 4) -> str:
    return " ".join(line.strip() for line in str(error).splitlines()[:lines] if line.strip())
