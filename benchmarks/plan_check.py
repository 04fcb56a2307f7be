"""How far is `reasonknee plan` from the clock? A training step's seconds, predicted and measured.

    python benchmarks/plan_check.py [--visual 512 2000] [--questions 1 4] [--repeats 3]

A Qwen2.5-VL of 34 million parameters with LoRA, from configuration, on one CPU core in float32; random volumes,
questions and completions (8 of 96 tokens each), one volume a micro-batch, checkpointing as in the recipes; forward,
loss, backward, optimizer step: what GRPO does between two rollouts. The rate of each workload predicts the others.
CPU time, best of several runs: other work on the machine only ever makes a run slower. Exit code 1 when a prediction is
more than 25 % off.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import permutations
from pathlib import Path

import torch
from performance_page import at_least

from rl.config import LoraConfig, load_config
from rl.loss import LossInputs, LossSettings, StepTotals, grpo_loss
from rl.model import trainable
from rl.packed import Node, PackedBatch, PackedPolicy, pack
from rl.plan.estimate import training
from rl.plan.flops import TreeShape
from rl.plan.hardware import described
from rl.plan.sizes import model_sizes
from rl.training import clip_gradients, make_optimizer

TEXT = {
    "vocab_size": 8192,
    "hidden_size": 512,
    "intermediate_size": 1536,
    "num_hidden_layers": 10,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "tie_word_embeddings": True,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [8, 12, 12]},
    **{"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 0},
}
TOWER = {"depth": 4, "hidden_size": 128, "intermediate_size": 256, "num_heads": 4, "out_hidden_size": 512}
VIDEO = 8000
HEADER, QUESTION, COMPLETION, GENERATIONS = 40, 100, 96, 8
LORA = LoraConfig()
TARGET = 0.25


@dataclass(frozen=True)
class Measurement:
    """A workload: its operations and the seconds it took."""

    visual: int
    questions: int
    seconds: float
    flops: float

    def __str__(self) -> str:
        return f"{self.visual:,} visual tokens, {self.questions} question{'s' * (self.questions != 1)}"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--visual", type=at_least(1), nargs="+", default=[512, 2000])
    parser.add_argument("--questions", type=at_least(1), nargs="+", default=[1, 4])
    parser.add_argument("--repeats", type=at_least(1), default=3)
    options = parser.parse_args()
    if len(options.visual) * len(options.questions) < 2:
        parser.error("one workload predicts no other: give two --visual or two --questions")
    torch.manual_seed(0)
    torch.set_num_threads(1)
    policy = make_policy()
    with tempfile.TemporaryDirectory() as folder:
        config_json = json.dumps(policy.causal_lm.config.to_dict())
        (Path(folder) / "config.json").write_text(config_json, encoding="utf-8")
        found = [
            measure(policy, folder, visual, questions, options.repeats)
            for questions in options.questions
            for visual in options.visual
        ]
    worst = worst_prediction(found)
    print(f"at most {worst:.0%} off (target {TARGET:.0%}): {'holds' if worst <= TARGET else 'MISSED'}")
    raise SystemExit(worst > TARGET)


def worst_prediction(found: Sequence[Measurement]) -> float:
    """Largest relative error of a workload's seconds, predicted from the rate at another; prints all."""
    print("predicted from the rate at another workload:")
    errors = []
    for a, b in permutations(found, 2):
        predicted = b.flops * a.seconds / a.flops
        errors.append(predicted / b.seconds - 1)
        print(f"  from {a!s:34} for {b!s:34} {predicted:7.2f} s, {errors[-1]:+.0%}")
    return max(map(abs, errors))


def measure(policy: PackedPolicy, folder: str, visual: int, questions: int, repeats: int) -> Measurement:
    """One volume a step, asked so many questions, in one micro-batch."""
    settings = [
        "volumes_per_step=1",
        f"questions_per_volume={questions}",
        f"max_tokens_per_microbatch={10**9}",
    ]
    given = ["data.root=none", f"model.path={folder}", "model.gradient_checkpointing=true"]
    config = load_config(None, [*given, *(f"grpo.{setting}" for setting in settings)])
    shape = TreeShape(HEADER + visual, QUESTION, COMPLETION, GENERATIONS, "subtree")
    one_flop_a_second = replace(described(config, 1.0, 1.0, 1.0), flops=1.0)
    flops = training(config, model_sizes(folder), shape, one_flop_a_second).ideal_s
    found = Measurement(visual, questions, best(policy, shape, questions, repeats), flops)
    rate = flops / found.seconds / 1e9
    print(f"{found!s:36} {flops / 1e9:7,.0f} GFLOP {found.seconds:7.2f} s {rate:6.1f} GFLOP/s", flush=True)
    return found


def make_policy() -> PackedPolicy:
    """A small Qwen2.5-VL with an adapter on every projection."""
    from peft import LoraConfig as PeftLoraConfig  # not before this project, whose shim torchvision may need
    from peft import get_peft_model
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

    config = Qwen2_5_VLConfig(
        text_config=TEXT, vision_config=TOWER, video_token_id=VIDEO, tie_word_embeddings=True
    )
    names = "|".join(LORA.target_modules)
    adapter = PeftLoraConfig(
        r=LORA.r, lora_alpha=LORA.alpha, target_modules=rf".*language_model.*\.({names})"
    )
    policy = PackedPolicy(get_peft_model(Qwen2_5_VLForConditionalGeneration(config), adapter), "subtree")
    policy.language_model.gradient_checkpointing_enable({"use_reentrant": False})
    return policy.train()


def batch_of(shape: TreeShape, questions: int) -> PackedBatch:
    """A random volume, asked so many questions, answered at random."""

    def text(tokens: int) -> list[int]:
        return torch.randint(10, VIDEO, (tokens,)).tolist()

    visual = shape.volume - HEADER
    root = Node([*text(HEADER), *[VIDEO] * visual], features_V_H=torch.randn(visual, TEXT["hidden_size"]))
    root.positions_3_T = torch.arange(shape.volume).expand(3, -1)
    for _ in range(questions):
        leaves = [Node(text(shape.completion), scored=True) for _ in range(shape.generations)]
        root.children.append(Node(text(shape.question), children=leaves))
    return pack([root], VIDEO)


def best(policy: PackedPolicy, shape: TreeShape, questions: int, repeats: int) -> float:
    """CPU seconds of the fastest of some training steps."""
    optimizer = make_optimizer(trainable(policy), 1e-4, 0.0)
    seconds = []
    for _ in range(repeats):
        batch = batch_of(shape, questions)
        started = time.process_time()
        logps_N_T, _ = policy(batch)
        completions = len(batch.mask_N_T)
        inputs = LossInputs(logps_N_T, torch.randn(completions, 1), batch.mask_N_T)
        totals = StepTotals(completions, int(batch.mask_N_T.sum()), 1)
        loss, _ = grpo_loss(inputs, LossSettings(), totals)
        torch.autograd.backward(loss)
        clip_gradients(trainable(policy), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        seconds.append(time.process_time() - started)
    return min(seconds)


if __name__ == "__main__":
    main()
