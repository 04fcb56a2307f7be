"""What the speed benchmarks run on: Qwen2.5-VL with random weights, and volumes for it.

By its weights, the model of 35 million parameters spends 1.25 times as much on a visual token in its vision tower as in
its language model; the 3B model .92 times.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

import rl  # noqa: F401  isort: skip  (before peft imports torchvision)
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

from rl.base.model import build_tokenizer

TOKENIZER = build_tokenizer([])
IMAGE, VIDEO, VISION_START, VISION_END, END = TOKENIZER.convert_tokens_to_ids(
    ["<|image_pad|>", "<|video_pad|>", "<|vision_start|>", "<|vision_end|>", "<|im_end|>"]
)
WORDS = range(400, 1500)
"""Ids of ordinary tokens."""
PIXELS_PER_TOKEN = 28
SLICES_AND_SIDE = {32: (2, 4), 512: (8, 8), 2000: (20, 10), 8192: (32, 16)}
"""Visual tokens -> slices, and tokens along a slice's sides."""
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


@dataclass(frozen=True)
class Volume:
    """Slices as pictures."""

    visual_tokens: int
    seed: int = 1

    @property
    def grids(self) -> torch.Tensor:
        """[slices, 3], patches of each slice in time, height and width."""
        slices, side = SLICES_AND_SIDE[self.visual_tokens]
        return torch.tensor([[1, 2 * side, 2 * side]] * slices)

    def token_ids(self, pads_per_slice: int) -> list[int]:
        """A few words, then every slice between its two marks."""
        slices, _ = SLICES_AND_SIDE[self.visual_tokens]
        return [*WORDS[:8], *([VISION_START, *[IMAGE] * pads_per_slice, VISION_END] * slices)]

    def patches(self) -> torch.Tensor:
        """[patches, channels x frames x height x width], what an image processor makes of the pictures."""
        generator = torch.Generator().manual_seed(self.seed)
        return torch.randn(int(self.grids.prod(1).sum()), 3 * 2 * 14 * 14, generator=generator)


def words(n: int, generator: torch.Generator) -> list[int]:
    """Random text."""
    return torch.randint(WORDS.start, WORDS.stop, (n,), generator=generator).tolist()


LANGUAGE = {
    "35M": {
        "vocab_size": 8192,
        "hidden_size": 512,
        "intermediate_size": 1408,
        "num_hidden_layers": 8,
        "num_attention_heads": 8,
        "num_key_value_heads": 2,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [8, 12, 12]},
    },
    "3B": {
        "vocab_size": 151_936,
        "hidden_size": 2048,
        "intermediate_size": 11_008,
        "num_hidden_layers": 36,
        "num_attention_heads": 16,
        "num_key_value_heads": 2,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [16, 24, 24]},
    },
}
"""Sizes of language models; "3B" is Qwen2.5-VL-3B's."""
VISION = {
    "35M": {
        "depth": 8,
        "hidden_size": 256,
        "intermediate_size": 688,
        "num_heads": 4,
        "fullatt_block_indexes": [3, 7],
    },
    "3B": {
        "depth": 1,
        "hidden_size": 1280,
        "intermediate_size": 3420,
        "num_heads": 16,
        "fullatt_block_indexes": [0],
    },
}
"""Their towers; that of the large model only makes features of the right width, once."""


def build_model(size: str = "35M", device: str = "cpu") -> PeftModel:
    """The model with an adapter (r = 16) whose B is not zero; the same in every process. bfloat16 on a GPU."""
    torch.manual_seed(0)
    text = LANGUAGE[size] | {
        "max_position_embeddings": 16384,
        **dict.fromkeys(["bos_token_id", "eos_token_id", "pad_token_id"], END),
        "tie_word_embeddings": True,
    }
    config = Qwen2_5_VLConfig(
        text_config=text,
        vision_config=VISION[size] | {"out_hidden_size": text["hidden_size"], "tokens_per_second": 2},
        image_token_id=IMAGE,
        video_token_id=VIDEO,
        vision_start_token_id=VISION_START,
        vision_end_token_id=VISION_END,
        tie_word_embeddings=True,
        dtype=torch.float32 if device == "cpu" else torch.bfloat16,
    )
    with torch.device(device):
        base = Qwen2_5_VLForConditionalGeneration._from_config(config)
        lora = LoraConfig(r=16, lora_alpha=32, target_modules=TARGETS, exclude_modules=".*visual.*")
        model = get_peft_model(base, lora)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.02)
    return model
