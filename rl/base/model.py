"""A small Qwen2.5-VL from configuration, with a tokenizer trained on this project's own texts."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import torch
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import nn
from transformers import (
    PreTrainedTokenizerFast,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2VLImageProcessorPil,
)

SPECIAL_TOKENS = (
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|vision_pad|>",
    "<|image_pad|>",
    "<|video_pad|>",
)
LARGEST_NUMBER = 400
"""Whole numbers up to this one are single tokens: the in-plane grid of the real volumes is 384."""


def build_tokenizer(corpus: Iterable[str], vocab_size: int = 1600) -> PreTrainedTokenizerFast:
    """Byte-level BPE that can encode any text; numbers and fixed phrases become single tokens.

    Phrases (runs of letters and blanks) are kept whole before merging, so that a region's name or a stretch of
    the answer's JSON is one or two tokens and completions stay short enough for a CPU.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(r"\d+"), behavior="isolated"),
            pre_tokenizers.Split(Regex(r"[A-Za-z_%][A-Za-z_% ()/-]*[A-Za-z_%)]"), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[AddedToken(t, special=True, normalized=False) for t in SPECIAL_TOKENS],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    # numbers are repeated so that each of them is merged before rarer phrases
    numbers = [str(n) for n in range(LARGEST_NUMBER + 1)] * 64
    tokenizer.train_from_iterator([*numbers, *corpus], trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        clean_up_tokenization_spaces=False,
    )


def build_model(tokenizer: PreTrainedTokenizerFast, seed: int) -> Qwen2_5_VLForConditionalGeneration:
    """A randomly initialised Qwen2.5-VL of about 3.5 million parameters."""

    def token_id(token: str) -> int:
        return int(tokenizer.convert_tokens_to_ids(token))

    config = Qwen2_5_VLConfig(
        text_config={
            "vocab_size": -(-len(tokenizer) // 64) * 64,
            "hidden_size": 256,
            "intermediate_size": 512,
            "num_hidden_layers": 4,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": 4096,
            "rms_norm_eps": 1e-6,
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 1_000_000.0,
                "mrope_section": [8, 12, 12],
            },
            "bos_token_id": token_id("<|endoftext|>"),
            "eos_token_id": token_id("<|im_end|>"),
            "pad_token_id": token_id("<|endoftext|>"),
            "tie_word_embeddings": True,
        },
        vision_config={
            "depth": 3,
            "hidden_size": 128,
            "intermediate_size": 256,
            "num_heads": 4,
            "patch_size": 8,
            "spatial_merge_size": 2,
            "temporal_patch_size": 2,
            "tokens_per_second": 2,
            "window_size": 96,
            "fullatt_block_indexes": [0, 1, 2],
            "out_hidden_size": 256,
        },
        image_token_id=token_id("<|image_pad|>"),
        video_token_id=token_id("<|video_pad|>"),
        vision_start_token_id=token_id("<|vision_start|>"),
        vision_end_token_id=token_id("<|vision_end|>"),
        tie_word_embeddings=True,
    )
    torch.manual_seed(seed)
    return Qwen2_5_VLForConditionalGeneration(config)


def ease_learning(model: Qwen2_5_VLForConditionalGeneration) -> None:
    """Weights to start from: a layer passes on what it is given, and words are not drowned by visual tokens."""
    nn.init.normal_(model.get_input_embeddings().weight, std=0.06)
    for layer in model.model.language_model.layers:
        nn.init.zeros_(layer.self_attn.o_proj.weight)
        nn.init.zeros_(layer.mlp.down_proj.weight)


def save_base(
    folder: Path,
    model: Qwen2_5_VLForConditionalGeneration,
    tokenizer: PreTrainedTokenizerFast,
    dtype: torch.dtype = torch.float32,
) -> None:
    """Write a folder that transformers and vLLM load like a downloaded checkpoint."""
    folder.mkdir(parents=True, exist_ok=True)
    model.to(dtype).save_pretrained(folder, safe_serialization=True)
    tokenizer.save_pretrained(folder)
    vision = model.config.vision_config
    Qwen2VLImageProcessorPil(
        patch_size=vision.patch_size,
        merge_size=vision.spatial_merge_size,
        temporal_patch_size=vision.temporal_patch_size,
    ).save_pretrained(folder)


def create_base(out_dir: Path, seed: int, corpus: Iterable[str] = ()) -> Path:
    """A random base model with a tokenizer trained on `corpus` (empty: numbers and bytes only)."""
    tokenizer = build_tokenizer(corpus)
    save_base(out_dir, build_model(tokenizer, seed), tokenizer)
    return out_dir
