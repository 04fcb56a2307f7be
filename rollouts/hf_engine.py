"""A plain sampler on transformers, for tests and for platforms without vLLM: one prompt at a time, no tricks.

The prompt is run once; its KV is repeated for the n completions, which are decoded together.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import torch

from rollouts.adapters import check_adapter, linear_shapes
from rollouts.positions import mrope_positions
from rollouts.requests import ModelFacts, check_request, group_seed
from rollouts.types import EngineError, Group, Prompt, Rollout, Sampling


class HfEngine:
    """transformers behind the `Engine` protocol. Sample i of a prompt depends on its seed and i alone.

    Args:
        dtype: auto (bfloat16 on GPU, float32 on CPU) | float32 | bfloat16.
        device: auto | cpu | cuda.
        max_model_len: longest prompt plus completion in tokens, visual tokens included.
    Raises:
        EngineError: the model is no Qwen2.5-VL.
    """

    def __init__(
        self,
        model_path: str | Path,
        *,
        dtype: str = "auto",
        device: str = "auto",
        max_model_len: int = 1024,
        max_lora_rank: int = 16,
    ) -> None:
        from transformers import AutoTokenizer, Qwen2_5_VLForConditionalGeneration

        self._facts = ModelFacts.of(str(model_path))
        self._max_model_len = max_model_len
        self._max_lora_rank = max_lora_rank
        if device == "auto":
            device = "cuda" if torch.cuda.is_available() else "cpu"
        if dtype == "auto":
            dtype = "float32" if device == "cpu" else "bfloat16"
        model = Qwen2_5_VLForConditionalGeneration.from_pretrained(model_path, dtype=getattr(torch, dtype))
        self._base: Any = model.to(device).eval()
        self._model: Any = self._base  # with the adapter around it, once there is one
        self._linears = linear_shapes(model)
        self._tokenizer = AutoTokenizer.from_pretrained(model_path)
        stop = model.generation_config.eos_token_id
        stops = stop if isinstance(stop, list) else [stop]
        self._stop_ids = {int(i) for i in (*stops, self._tokenizer.eos_token_id) if i is not None}
        self._version = 0
        self._last_version = 0

    def generate(self, prompts: list[Prompt], n: int, sampling: Sampling, seeds: list[int]) -> list[Group]:
        """`n` completions of each prompt. Raises EngineError when the request must not be served."""
        if self._base is None:
            raise EngineError("the engine was closed; make a new one")
        check_request(prompts, n, sampling, seeds, self._facts, self._max_model_len)
        with torch.inference_mode(), self._serving():
            return [
                self._complete(p, n, sampling, group_seed(s)) for p, s in zip(prompts, seeds, strict=True)
            ]

    def load_adapter(self, folder: Path | None) -> int:
        """Serve this PEFT adapter from now on (None: the base). Raises AdapterError when it does not fit."""
        if folder is None:
            self._version = 0
            return 0
        check_adapter(Path(folder), self._linears, self._max_lora_rank)
        self._last_version += 1
        name = f"v{self._last_version}"
        if self._model is self._base:
            from peft import PeftModel

            self._model = PeftModel.from_pretrained(self._base, folder, adapter_name=name)
        else:
            replaced = self._model.active_adapter
            self._model.load_adapter(folder, adapter_name=name)
            self._model.set_adapter(name)
            self._model.delete_adapter(replaced)
        self._model.eval()
        self._version = self._last_version
        return self._version

    def close(self) -> None:
        """Free the model. Idempotent."""
        self._base = self._model = None

    @contextmanager
    def _serving(self) -> Iterator[None]:
        if self._version == 0 and self._model is not self._base:
            with self._model.disable_adapter():
                yield
        else:
            yield

    def _complete(self, prompt: Prompt, n: int, sampling: Sampling, seed: int) -> Group:
        generators = [torch.Generator().manual_seed(seed + i) for i in range(n)]
        logits_V, cache, next_position = self._prefill(prompt)
        logits_G_V = logits_V.expand(n, -1)
        cache.batch_repeat_interleave(n)
        tokens: list[list[int]] = [[] for _ in range(n)]
        logps: list[list[float]] = [[] for _ in range(n)]
        running = set(range(n))
        for step in range(sampling.max_tokens):
            chosen_G, logps_G = _sample(logits_G_V, sampling, generators)
            for i in sorted(running):
                tokens[i].append(int(chosen_G[i]))
                logps[i].append(float(logps_G[i]))
            running -= {i for i in running if tokens[i][-1] in self._stop_ids}
            if not running or step + 1 == sampling.max_tokens:
                break
            embeds = self._base.get_input_embeddings()(chosen_G[:, None].to(self._base.device))
            logits_G_V = self._forward(embeds, torch.full((3, n, 1), next_position + step), cache)
        rollouts = tuple(self._rollout(ids, values) for ids, values in zip(tokens, logps, strict=True))
        return Group(prompt, rollouts)

    def _prefill(self, prompt: Prompt) -> tuple[torch.Tensor, Any, int]:
        """Logits [1, vocabulary] after the prompt, its KV cache, and the position of the next token."""
        from transformers import DynamicCache

        facts, features = self._facts, prompt.features
        ids = torch.tensor([prompt.token_ids], device=self._base.device)
        embeds = self._base.get_input_embeddings()(ids)
        if not features.absent:
            embeds[ids == facts.video_token_id] = features.embeds_V_H.to(embeds)
        positions_3_L = mrope_positions(
            prompt.token_ids,
            None if features.absent else features.grid_thw,
            features.second_per_grid_t,
            video_token_id=facts.video_token_id,
            merge_size=facts.merge_size,
            tokens_per_second=facts.tokens_per_second,
        )
        cache = DynamicCache(config=self._base.config.text_config)
        logits_1_V = self._forward(embeds, positions_3_L[:, None], cache)
        return logits_1_V, cache, int(positions_3_L.max()) + 1

    def _forward(self, embeds_B_L_H: torch.Tensor, positions_3_B_L: torch.Tensor, cache: Any) -> torch.Tensor:
        """Logits [B, vocabulary] of the last position, in float32."""
        output = self._base.model.language_model(
            inputs_embeds=embeds_B_L_H,
            position_ids=positions_3_B_L.to(embeds_B_L_H.device),
            past_key_values=cache,
            use_cache=True,
        )
        return cast(torch.Tensor, self._base.lm_head(output.last_hidden_state[:, -1]).float().cpu())

    def _rollout(self, ids: list[int], logps: list[float]) -> Rollout:
        text = self._tokenizer.decode(ids, skip_special_tokens=True)
        reason = "stop" if ids[-1] in self._stop_ids else "length"
        return Rollout(tuple(ids), tuple(logps), text, reason, self._version)  # type: ignore[arg-type]


def _sample(
    logits_G_V: torch.Tensor, sampling: Sampling, generators: list[torch.Generator]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Next tokens [G] and their log-probabilities [G] under the distribution drawn from."""
    if sampling.temperature == 0:
        logps_G, chosen_G = logits_G_V.log_softmax(-1).max(-1)
        return chosen_G, logps_G
    logps_G_V = (logits_G_V / sampling.temperature).log_softmax(-1)
    if sampling.top_p < 1:
        sorted_G_V, order_G_V = logps_G_V.sort(-1, descending=True)
        # the nucleus (Holtzman et al. 2020): tokens until their mass reaches top_p, the first one always
        outside_G_V = sorted_G_V.exp().cumsum(-1) - sorted_G_V.exp() >= sampling.top_p
        sorted_G_V = sorted_G_V.masked_fill(outside_G_V, float("-inf"))
        logps_G_V = torch.empty_like(logps_G_V).scatter_(-1, order_G_V, sorted_G_V).log_softmax(-1)
    rows = zip(logps_G_V.exp(), generators, strict=True)
    chosen_G = torch.cat([torch.multinomial(row, 1, generator=generator) for row, generator in rows])
    return chosen_G, logps_G_V.gather(-1, chosen_G[:, None])[:, 0]
