"""The vLLM engine: cached features and token ids in, sampled tokens with their log-probabilities out.

The same code drives the CPU and the GPU build. vLLM runs in a process of its own (`rollouts.vllm_worker`), watched:
when it dies or hangs it is killed and started again with the current adapter, and the batch is retried once.

Reproducible: sample i of prompt j is drawn with the seed `group_seed(seeds[j]) + i`, whatever batch it is in. (The
model's floating-point sums do depend on the batch, so that a tie between two tokens may fall differently.)

A volume's features cross to that process once per call of `generate`, in shared memory, however many questions ask
about it. Inside nothing is serialised or copied: all questions refer to the same memory, and vLLM's encoder cache,
which knows the volume by its key, takes it up once. 34 MB (8,192 tokens of 2,048 bfloat16 numbers) cross in 14 ms,
through the socket it would be 50.
"""

from __future__ import annotations

import contextlib
import logging
import os
import shutil
import tempfile
import weakref
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from rollouts.adapters import check_adapter, linear_shapes_of
from rollouts.requests import ModelFacts, check_request, group_seed
from rollouts.types import EngineError, Group, Prompt, Rollout, Sampling
from rollouts.watchdog import Header, WorkerFailure, WorkerProcess

_ADAPTER_FILES = ("adapter_config.json", "adapter_model.safetensors")
_SWAP_SECONDS = 60.0
_log = logging.getLogger(__name__)


class VllmEngine:
    """vLLM behind the `Engine` protocol. Starting takes 10-20 s; the constructor returns at once and they overlap.

    Args:
        model_path: Hugging Face id or folder of a Qwen2.5-VL.
        dtype: auto (bfloat16 on GPU, float32 on CPU) | float32 | bfloat16.
        device: auto (whatever the installed vLLM was built for) | cpu | cuda.
        max_lora_rank: room for adapters of up to this rank.
        max_model_len: longest prompt plus completion in tokens, visual tokens included.
        max_num_seqs: sequences decoded at once.
        kv_cache_gib: KV cache in GiB (CPU). gpu_memory_utilization: share of memory for everything (GPU).
        enforce_eager: skip compilation and CUDA graphs (the CPU build never compiles when it serves LoRA).
        sleep: free the GPU's memory between calls of `generate`.
        threads: CPU threads; 0 for OMP_NUM_THREADS, or every core this process may use.
        start_timeout_s, generate_timeout_s: seconds before the watchdog ends the worker.
    Raises:
        EngineError: the model is no Qwen2.5-VL, or (at the first use) the engine does not start.
    """

    def __init__(
        self,
        model_path: str | Path,
        *,
        dtype: str = "auto",
        device: str = "auto",
        max_lora_rank: int = 16,
        max_model_len: int = 1024,
        max_num_seqs: int = 256,
        kv_cache_gib: float = 1.0,
        gpu_memory_utilization: float = 0.5,
        enforce_eager: bool = True,
        sleep: bool = False,
        seed: int = 0,
        threads: int = 0,
        start_timeout_s: float = 600.0,
        generate_timeout_s: float = 600.0,
    ) -> None:
        self._model_path = str(model_path)
        self._max_model_len = max_model_len
        self._max_lora_rank = max_lora_rank
        self._start_timeout_s = start_timeout_s
        self._generate_timeout_s = generate_timeout_s
        self._environment = _environment(threads)
        self._start_request = {
            "device": device,
            "kv_cache_gib": kv_cache_gib,
            "gpu_memory_utilization": gpu_memory_utilization,
            "options": {
                "model": self._model_path,
                "dtype": dtype,
                "seed": seed,
                "max_model_len": max_model_len,
                "max_num_seqs": max_num_seqs,
                "enforce_eager": enforce_eager,
                "enable_sleep_mode": sleep,
                "enable_lora": True,
                "max_loras": 1,
                "max_lora_rank": _room_for_rank(max_lora_rank),
                **_FIXED_OPTIONS,
                # a prompt is prefilled whole: chunks of a seeded multimodal prompt crash the CPU build
                "enable_chunked_prefill": False,
                "max_num_batched_tokens": max(max_model_len, _BATCHED_TOKENS),
            },
        }
        self._facts = ModelFacts.of(self._model_path)
        self._version = 0  # of the adapter being served; 0 is the base model
        self._last_version = 0
        self._folder = Path(tempfile.mkdtemp(prefix="reasonknee-engine-"))  # adapters and the worker's log
        self._remove_folder = weakref.finalize(self, shutil.rmtree, self._folder, ignore_errors=True)
        self._closed = False
        self._worker: WorkerProcess | None = None
        self._ready = False
        self._launch()

    def generate(self, prompts: list[Prompt], n: int, sampling: Sampling, seeds: list[int]) -> list[Group]:
        """`n` completions of each prompt, in the prompts' order. `seeds[i]` is the seed of prompt i's group.

        Raises:
            EngineError: the request must not be served (the engine goes on), or the engine failed twice in a row.
        """
        self._refuse_if_closed()
        check_request(prompts, n, sampling, seeds, self._facts, self._max_model_len)
        if not prompts:
            return []
        order = _volume_major(prompts)
        header, buffers = _request(
            [prompts[i] for i in order], n, sampling, [seeds[i] for i in order], self._facts.video_token_id
        )
        try:
            reply, arrays = self._generate_once(header, buffers)
        except WorkerFailure as first:
            self._refuse_if_closed()
            _log.warning("generating failed and is tried again by a new engine process: %s", first)
            try:
                reply, arrays = self._generate_once(header, buffers)
            except WorkerFailure as second:
                raise EngineError(
                    f"generating failed twice; the second time {second}\nthe first time {first}"
                ) from first
        groups = _groups([prompts[i] for i in order], n, reply, arrays, self._version)
        return [group for _, group in sorted(zip(order, groups, strict=True), key=lambda pair: pair[0])]

    def load_adapter(self, folder: Path | None) -> int:
        """Serve this PEFT adapter from now on (None: the bare base model). Returns its version, never reused.

        The files are copied, so that the folder may change afterwards: an engine that is asleep or must be started
        anew reads them later. vLLM keeps serving old weights or old KV under a name, number or path it has seen before.

        Raises:
            AdapterError: the adapter does not fit the base; the previous one stays in service.
        """
        self._refuse_if_closed()
        replaced, version = self._version, 0
        if folder is not None:
            check_adapter(Path(folder), linear_shapes_of(self._model_path), self._max_lora_rank)
            self._last_version = version = self._last_version + 1
            copy = self._folder / f"v{version}"
            copy.mkdir()
            for name in _ADAPTER_FILES:
                shutil.copyfile(Path(folder) / name, copy / name)
        self._version = version
        if self._ready and self._worker is not None and self._worker.alive:
            # one that fails here is started anew by the next `generate`, with this adapter
            with contextlib.suppress(WorkerFailure):
                self._worker.request(self._adapter_request(), timeout_s=_SWAP_SECONDS)
        shutil.rmtree(self._folder / f"v{replaced}", ignore_errors=True)
        return self._version

    def wait_until_ready(self) -> None:
        """Return when the engine has started. Raises EngineError when it does not."""
        self._started()

    def close(self) -> None:
        """Free the engine's memory and processes. Idempotent."""
        self._closed = True
        if self._worker is not None:
            self._worker.kill()  # it holds nothing that needs saving, and vLLM takes seconds to end by itself
        self._remove_folder()

    def _generate_once(
        self, header: Header, buffers: Sequence[memoryview]
    ) -> tuple[Header, list[memoryview]]:
        return self._started().request(header, buffers, timeout_s=self._generate_timeout_s)

    def _launch(self) -> WorkerProcess:
        self._ready = False
        self._worker = WorkerProcess("rollouts.vllm_worker", self._environment, self._folder)
        self._worker.send(self._start_request)
        return self._worker

    def _started(self) -> WorkerProcess:
        """The running worker; a new one when the last was killed, but not by `close` in another thread."""
        self._refuse_if_closed()
        worker = self._worker
        if worker is None or not worker.alive:
            worker = self._launch()
        if not self._ready:
            try:
                worker.receive(self._start_timeout_s)
                worker.request(self._adapter_request(), timeout_s=_SWAP_SECONDS)
            except WorkerFailure as error:
                raise EngineError(f"vLLM did not start for {self._model_path}: {error}") from error
            self._ready = True
        return worker

    def _adapter_request(self) -> Header:
        folder = str(self._folder / f"v{self._version}") if self._version else None
        return {"op": "load_adapter", "version": self._version, "folder": folder}

    def _refuse_if_closed(self) -> None:
        if self._closed:
            raise EngineError("the engine was closed; make a new one")


_BATCHED_TOKENS = 8192
_VLLM_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)
_FIXED_OPTIONS: dict[str, Any] = {
    "enable_mm_embeds": True,
    # counts pixels, of which there are none: the vision tower is not loaded, and features still are taken
    "limit_mm_per_prompt": {"image": 0, "video": 0},
    "enable_prefix_caching": True,
    # log-probabilities of the distribution that was sampled from, temperature included
    "logprobs_mode": "processed_logprobs",
    "disable_log_stats": False,  # they count what the prefix cache saves
}


def _room_for_rank(rank: int) -> int:
    """The smallest rank vLLM makes room for that is enough."""
    for room in _VLLM_RANKS:
        if rank <= room:
            return room
    raise EngineError(f"LoRA rank {rank} is more than vLLM serves ({_VLLM_RANKS[-1]})")


# Decoding has a parallel region every few dozen microseconds. Threads that sleep in between cost it 15 % of its time;
# those that stay awake for long, as is the default, make a machine with other work on it several times slower. So they
# stay awake for 10,000 turns, some tenths of a millisecond, unless the user has decided.
_WAITING = {"OMP_WAIT_POLICY": "PASSIVE", "GOMP_SPINCOUNT": "10000"}


def _environment(threads: int) -> dict[str, str]:
    cpu_only = not torch.cuda.is_available()
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    chosen = str(threads) if threads else os.environ.get("OMP_NUM_THREADS", str(cores))
    return {
        "OMP_NUM_THREADS": chosen,
        **({} if _WAITING.keys() & os.environ else _WAITING),
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_LOGGING_LEVEL": os.environ.get("VLLM_LOGGING_LEVEL", "ERROR"),
        "VLLM_NO_USAGE_STATS": "1",
        "DO_NOT_TRACK": "1",
        "TOKENIZERS_PARALLELISM": "false",
        # the CPU build would compile one tiny sampling kernel at first use: seconds, and a C++ compiler, for nothing
        **({"TORCHDYNAMO_DISABLE": "1"} if cpu_only else {}),
    }


def _volume_major(prompts: Sequence[Prompt]) -> list[int]:
    """Indices that bring the questions about a volume together, so that its prefix is prefilled once."""
    first_seen: dict[str, int] = {}
    for i, prompt in enumerate(prompts):
        first_seen.setdefault(prompt.features.key, i)
    return sorted(range(len(prompts)), key=lambda i: first_seen[prompts[i].features.key])


def _one_video_token(prompt: Prompt, video_token_id: int) -> list[int]:
    """The prompt with a single video token: vLLM puts as many in its place as the volume has visual tokens.

    Given all of them, it would expand the first and leave the others in the prompt, without an error.
    """
    if prompt.features.absent:
        return prompt.token_ids
    first = prompt.volume_ids.index(video_token_id)
    return [t for i, t in enumerate(prompt.token_ids) if t != video_token_id or i == first]


def _request(
    prompts: Sequence[Prompt], n: int, sampling: Sampling, seeds: Sequence[int], video_token_id: int
) -> tuple[Header, list[memoryview]]:
    features = {prompt.features.key: prompt.features for prompt in prompts if not prompt.features.absent}
    number = {key: i for i, key in enumerate(features)}
    header: Header = {
        "op": "generate",
        "n": n,
        "sampling": {
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            "max_tokens": sampling.max_tokens,
        },
        "volumes": [
            {
                "key": f.key,
                "shape": list(f.embeds_V_H.shape),
                "dtype": str(f.embeds_V_H.dtype).removeprefix("torch."),
                "grid_thw": f.grid_thw,
                "second_per_grid_t": f.second_per_grid_t,
            }
            for f in features.values()
        ],
        "prompts": [
            {
                "ids": _one_video_token(p, video_token_id),
                "length": len(p.token_ids),
                "volume": number.get(p.features.key),  # None: no picture
                "seed": group_seed(s),
            }
            for p, s in zip(prompts, seeds, strict=True)
        ],
    }
    rows = [f.embeds_V_H.detach().cpu().contiguous().view(torch.uint8) for f in features.values()]
    return header, [row.numpy().data.cast("B") for row in rows]


def _groups(
    prompts: Sequence[Prompt], n: int, reply: Header, arrays: Sequence[memoryview], version: int
) -> list[Group]:
    ends = np.cumsum(reply["lengths"])[:-1]
    tokens = np.split(np.frombuffer(arrays[0], dtype=np.int32), ends)
    logps = np.split(np.frombuffer(arrays[1], dtype=np.float32), ends)
    rollouts = [
        Rollout(tuple(ids.tolist()), tuple(values.tolist()), text, reason, version, reply["prefix_hit_rate"])
        for ids, values, text, reason in zip(
            tokens, logps, reply["texts"], reply["finish_reasons"], strict=True
        )
    ]
    return [Group(prompt, tuple(rollouts[i * n : (i + 1) * n])) for i, prompt in enumerate(prompts)]
