"""The process that holds the vLLM engine: `rollouts.vllm_engine.VllmEngine` starts it and talks to it.

Requests are served one at a time: `start`, `generate`, `load_adapter`. An exception ends the process
after it was reported, because an engine that raised once may hang at the next request.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import torch

import rollouts
from rollouts.watchdog import Buffer, Header, die_with_parent, receive, send


class Worker:
    """vLLM in this process, without a server and without further processes."""

    def __init__(self, request: Header) -> None:
        from vllm import LLM, ModelRegistry
        from vllm.model_executor.models.qwen2_5_vl import Qwen2_5_VLForConditionalGeneration
        from vllm.platforms import current_platform

        from rollouts import vllm_lora_cpu

        vllm_lora_cpu.install()
        # Registered as a class, vLLM need not inspect it in a subprocess: 10 s less to start.
        ModelRegistry.register_model("Qwen2_5_VLForConditionalGeneration", Qwen2_5_VLForConditionalGeneration)
        self.platform = current_platform.device_type
        if request["device"] not in ("auto", self.platform):
            raise RuntimeError(
                f"device {request['device']!r} was asked for, but the installed vLLM runs on {self.platform!r}; "
                "install the package's extra `cpu` or `gpu` to match"
            )
        options = dict(request["options"])
        if self.platform == "cpu":
            options["kv_cache_memory_bytes"] = int(request["kv_cache_gib"] * 2**30)
            options["enable_sleep_mode"] = False  # there is no GPU memory to free
            options["block_size"] = (
                32  # the smallest; prompts share whole blocks only (default 128: 1.4x slower)
            )
        else:
            options["gpu_memory_utilization"] = request["gpu_memory_utilization"]
        if options["dtype"] == "auto":
            options["dtype"] = "float32" if self.platform == "cpu" else "bfloat16"
        self.sleeps = options["enable_sleep_mode"]
        self.llm = LLM(**options)
        self.tokenizer = self.llm.get_tokenizer()
        self.adapter: Any = None

    def load_adapter(self, request: Header) -> None:
        """Read it now: a new name, number and path each time, or vLLM serves stale weights or KV."""
        from vllm.lora.request import LoRARequest

        version, folder = request["version"], request["folder"]
        self.adapter = LoRARequest(f"adapter-{version}", version, folder) if folder else None
        if self.adapter and not self._sleeping():  # asleep there is no memory to put it into: `generate` will
            self.llm.llm_engine.add_lora(self.adapter)

    def generate(self, request: Header, buffers: list[memoryview]) -> tuple[Header, list[Buffer]]:
        """`n` completions per prompt; token ids and log-probabilities come back as two flat arrays."""
        from vllm import SamplingParams

        if self._sleeping():
            self.llm.wake_up()
        volumes = [_volume(v, b) for v, b in zip(request["volumes"], buffers, strict=True)]
        prompts = [
            {"prompt_token_ids": prompt["ids"]}
            if prompt["volume"] is None
            else {
                "prompt_token_ids": prompt["ids"],
                "multi_modal_data": {"video": volumes[prompt["volume"]]},
                "multi_modal_uuids": {"video": [request["volumes"][prompt["volume"]]["key"]]},
            }
            for prompt in request["prompts"]
        ]
        parameters = [
            SamplingParams(
                **request["sampling"], n=request["n"], seed=prompt["seed"], logprobs=0, detokenize=False
            )
            for prompt in request["prompts"]
        ]
        asked_before, hit_before = self._prefix_cache()
        outputs = self.llm.generate(prompts, parameters, use_tqdm=False, lora_request=self.adapter)
        asked, hit = self._prefix_cache()
        for prompt, output in zip(request["prompts"], outputs, strict=True):
            if len(output.prompt_token_ids) != prompt["length"]:
                raise RuntimeError(
                    f"vLLM saw {len(output.prompt_token_ids)} prompt tokens, not {prompt['length']}"
                )
        if self.sleeps:
            self.llm.sleep(level=1)
        reply, buffers_out = self._reply([completion for output in outputs for completion in output.outputs])
        looked_up = asked - asked_before  # nothing, when the cache is off
        rate = (hit - hit_before) / looked_up if looked_up else None
        return {**reply, "prefix_hit_rate": rate}, buffers_out

    def _sleeping(self) -> bool:
        return bool(self.sleeps and self.llm.llm_engine.is_sleeping())

    def _prefix_cache(self) -> tuple[int, int]:
        """Prompt tokens that were looked up in the prefix cache since the start, and those that it had."""
        from vllm.v1.metrics.reader import Counter

        counters = {m.name: m.value for m in self.llm.get_metrics() if isinstance(m, Counter)}
        return counters["vllm:prefix_cache_queries"], counters["vllm:prefix_cache_hits"]

    def _reply(self, completions: list[Any]) -> tuple[Header, list[Buffer]]:
        tokens = [list(completion.token_ids) for completion in completions]
        logps = [
            at_position[token].logprob
            for completion in completions
            for token, at_position in zip(completion.token_ids, completion.logprobs, strict=True)
        ]
        header = {
            "lengths": [len(ids) for ids in tokens],
            "finish_reasons": [completion.finish_reason for completion in completions],
            "texts": self.tokenizer.batch_decode(tokens, skip_special_tokens=True),
        }
        flat = np.fromiter((token for ids in tokens for token in ids), dtype=np.int32)
        return header, [flat.tobytes(), np.asarray(logps, dtype=np.float32).tobytes()]


def _volume(volume: Header, buffer: memoryview) -> dict[str, torch.Tensor]:
    dtype = getattr(torch, volume["dtype"])
    return {
        "video_embeds": torch.frombuffer(buffer, dtype=dtype).view(volume["shape"]),
        "video_grid_thw": torch.tensor([volume["grid_thw"]]),
        "second_per_grid_ts": torch.tensor([volume["second_per_grid_t"]]),
    }


def _serve(connection: Connection) -> Iterator[tuple[Header, list[Buffer]]]:
    request, _ = receive(connection)
    worker = Worker(request)
    yield {"platform": worker.platform}, []
    while True:
        request, buffers = receive(connection)
        if request["op"] == "load_adapter":
            worker.load_adapter(request)
            yield {}, []
        else:
            yield worker.generate(request, buffers)


def main(connection_fd: str, folder: str) -> None:
    """Serve until killed; called in a fresh process by `WorkerProcess`."""
    if Path(rollouts.__file__).parent != Path(__file__).parent:
        raise ImportError(f"{rollouts.__file__} shadows this package's rollouts in {Path(__file__).parent}")
    parents_death = die_with_parent(int(connection_fd), Path(folder))
    # vLLM leaves a file behind for every engine: here it goes with the folder. Compiled kernels are worth keeping.
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", f"{tempfile.gettempdir()}/torchinductor_{os.getuid()}")
    tempfile.tempdir = folder
    connection = Connection(int(connection_fd))
    try:
        for header, buffers in _serve(connection):
            send(connection, header, buffers)
    except EOFError:
        parents_death.join()
    except Exception as error:
        send(connection, {"error": f"{type(error).__name__}: {error}"})  # its traceback goes to the log
        raise
