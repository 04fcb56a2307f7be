"""The reward suite inside a stock `trl.GRPOTrainer`: two steps of real training on a tiny text model."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from datasets import Dataset
from transformers import Qwen2Config, Qwen2ForCausalLM
from trl import GRPOConfig, GRPOTrainer

from rewards import (
    QUESTIONS,
    Box3D,
    Component,
    Example,
    RewardSuite,
    Truth,
    VolumeRef,
    example_to_dict,
    reward,
)
from rl.base.model import build_tokenizer

pytestmark = pytest.mark.slow


@pytest.mark.usefixtures("own_registry")
def test_a_stock_trl_trainer_learns_from_the_suite(tmp_path: Path) -> None:
    @reward
    def different_characters(completion: str) -> float:
        """Random text earns nothing else."""
        return len(set(completion)) % 5 / 4

    suite = RewardSuite(
        [Component("output_format", 0.2), Component("moaks_accuracy"), Component("different_characters")]
    )
    tokenizer = build_tokenizer(["reading a knee"])
    config = Qwen2Config(
        vocab_size=-(-len(tokenizer) // 64) * 64,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    torch.manual_seed(0)
    model = Qwen2ForCausalLM(config)
    before = model.model.layers[0].self_attn.q_proj.weight.detach().clone()
    volume = VolumeRef("knee", "", None, (16, 96, 96), (6.5, 1.5, 1.5))
    examples = [
        Example(
            f"knee_{i}",
            volume,
            QUESTIONS[i],
            Truth({"grade": 1}, Box3D(0, 1, 0, 1, 0, 1)),
            "p",
            "00M",
            "right",
        )
        for i in (31, 32, 42, 43)
    ]
    dataset = Dataset.from_list(
        [{"prompt": f"Grade the {e.question.entity}.", "example": example_to_dict(e)} for e in examples]
    )
    trainer = GRPOTrainer(
        model=model,
        processing_class=tokenizer,
        reward_funcs=suite.trl_reward,
        train_dataset=dataset,
        args=GRPOConfig(
            output_dir=str(tmp_path),
            max_steps=2,
            per_device_train_batch_size=8,
            num_generations=4,
            max_completion_length=8,
            learning_rate=1e-2,
            logging_steps=1,
            save_strategy="no",
            report_to="none",
            use_cpu=True,
            bf16=False,
        ),
    )
    trainer.train()
    logged = [record for record in trainer.state.log_history if "reward" in record]
    assert len(logged) == 2
    assert any(0 < record["reward"] < 1 for record in logged)
    assert any(record["reward_std"] > 0 for record in logged)
    assert not torch.equal(before, model.model.layers[0].self_attn.q_proj.weight)
