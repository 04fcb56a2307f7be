"""Memory of a training process and of an engine, in bytes.

What autograd keeps of a decoder layer whose weights are frozen, a token (b: bytes of a number in the computation's
format; the adapter is float32, and copied when b is 2):

    inputs of both norms          2 b hidden, and a number for each (`rl.norm`)
    inputs of the adapters        b x their width, but for down_proj's, which is made again from gate and up;
                                  projections that read the same tensor share it
    outputs of their A            b r (`rl.lora`)
    gate, up (`rl.gated`)         2 b intermediate

and queries, keys, values, the result and its log-sum-exp. SDPA per run of siblings keeps copies of them, the path's
keys and values before those of each run; attention by subtrees (`rl.subtree`) has none, and its result is what o_proj
takes. Rotary tables and SDPA's masks are there once for all layers. With checkpointing only the layers' inputs, and all
this for one layer at a time.
"""

from __future__ import annotations

from dataclasses import dataclass

from rl.config import LoraConfig
from rl.microbatch import scored_at_once
from rl.plan.flops import Forest
from rl.plan.sizes import UNREAD, Language

LOGIT_COPIES = 3
"""Float32 tensors of tokens x vocabulary that exist at once in `rl.packed`: log-probabilities, their gradient and that
of the logits."""
ADAPTER_BYTES = 4 + 4 + 8
"""Of a trained weight: itself, its gradient, AdamW's two moments, all float32."""


@dataclass(frozen=True, slots=True)
class TrainerMemory:
    """Peak of a training process, by part."""

    weights: float
    adapter: float
    """With gradients and optimizer, and the frozen reference where there is one."""
    kept: float
    """Activations that wait for the backward of the largest micro-batch, masks and rotary tables among them."""
    layer: float
    """What the backward of one layer needs beyond them."""
    logits: float

    @property
    def resident(self) -> float:
        """Between steps."""
        return self.weights + self.adapter

    @property
    def peak(self) -> float:
        """The logits are gone when the backward of the layers begins, but for their log-probabilities."""
        return self.resident + self.kept + max(self.logits, self.layer)


def trainer_memory(
    language: Language,
    lora: LoraConfig,
    forest: Forest,
    *,
    number_bytes: int,
    checkpointing: bool,
    reference: bool,
) -> TrainerMemory:
    """Memory at the micro-batch `forest`; `reference`: a second, frozen adapter is kept."""
    layer = kept_of_layer(language, lora, forest, number_bytes)
    last = layer - _unread(language, lora, forest, number_bytes)
    inputs = forest.tokens * language.hidden * number_bytes
    # the last layer's inputs are gone when what the one before keeps is made again
    recomputed = max(last, layer - inputs)
    gradients = gradients_of_layer(language, lora, forest, number_bytes)
    masks = sum(s.computed_pairs for s in forest.masked_runs)
    shared = number_bytes * (masks + 2 * forest.tokens * language.head_size)
    adapter = language.layers * language.lora_weights(lora)
    return TrainerMemory(
        weights=language.parameters * number_bytes,
        adapter=adapter * (ADAPTER_BYTES + 4 * reference),
        kept=shared + (language.layers * inputs if checkpointing else (language.layers - 1) * layer + last),
        layer=gradients + (recomputed if checkpointing else 0),
        logits=LOGIT_COPIES
        * 4
        * min(forest.scored, scored_at_once(language.vocabulary))
        * language.vocabulary,
    )


def kept_of_layer(language: Language, lora: LoraConfig, forest: Forest, number_bytes: int) -> float:
    """What autograd keeps of one decoder layer."""
    inputs = language.adapted(lora)
    sources = {"q_proj": "qkv", "k_proj": "qkv", "v_proj": "qkv", "gate_proj": "mlp", "up_proj": "mlp"}
    widths = {sources.get(name, name): rows for name, (rows, _) in inputs.items() if name != "down_proj"}
    a_token = 2 * 4 + number_bytes * (
        2 * language.hidden + sum(widths.values()) + lora.r * len(inputs) + 2 * language.intermediate
    )
    copies = 0 if number_bytes == 4 else number_bytes * language.lora_weights(lora)
    return forest.tokens * a_token + copies + _kept_of_attention(language, lora, forest, number_bytes)


def _unread(language: Language, lora: LoraConfig, forest: Forest, number_bytes: int) -> float:
    """What the last layer keeps less than the others: of tokens from which nothing is read (`rl.packed`)."""
    adapted = [name for name in language.adapted(lora) if name in UNREAD]
    # the inputs of the projections are parts of tensors that are kept whole
    linear = number_bytes * (lora.r * len(adapted) + 2 * language.intermediate)
    keys = language.kv_heads * language.head_size * number_bytes
    attention = number_bytes * language.hidden + 4 * language.heads + 2 * keys  # copies for SDPA's call
    return forest.unread * (linear + (0 if forest.attention == "subtree" else attention))


def _kept_of_attention(language: Language, lora: LoraConfig, forest: Forest, number_bytes: int) -> float:
    keys = 2 * language.kv_heads * language.head_size * number_bytes
    queries = language.hidden * number_bytes
    result = queries + 4 * language.heads
    if forest.attention == "subtree":
        if "o_proj" in language.adapted(lora):
            result -= queries  # counted as the input of its adapter
        return forest.tokens * (queries + keys + result)
    path_and_own = sum(s.path + s.tokens for s in forest.siblings)
    return forest.tokens * (queries + result) + path_and_own * keys


def gradients_of_layer(language: Language, lora: LoraConfig, forest: Forest, number_bytes: int) -> float:
    """The largest set of gradients that exists at once in the backward of a layer."""
    # those of keys and values, one for each head of queries
    attention = 2 * number_bytes * language.hidden * max(s.path + s.tokens for s in forest.siblings)
    wide = 2 if "down_proj" in language.adapted(lora) else 3  # tensors of the MLP's width (`rl.gated`)
    mlp = wide * number_bytes * language.intermediate * forest.tokens
    return max(attention, mlp)


def kv_bytes(language: Language, number_bytes: int) -> int:
    """Keys and values of one token in an engine's cache."""
    return 2 * language.layers * language.kv_heads * language.head_size * number_bytes
