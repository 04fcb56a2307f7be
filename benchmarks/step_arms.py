"""What the arms of `train_step.py` compute: a volume with its questions, and each arm's step."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from tempfile import mkdtemp
from typing import Any

import torch
import torch.nn.functional as F
from middle_model import IMAGE, TOKENIZER, Volume, build_model, words
from peft import PeftModel

from rl.loss import LossInputs, LossSettings, StepTotals, grpo_loss
from rl.packed import Node, PackedPolicy, pack

QUESTION_TOKENS = 60
SETTINGS = LossSettings(loss_type="grpo")


@dataclass(frozen=True)
class Work:
    """What every arm computes: one volume, `questions` questions about it, G completions of each."""

    visual_tokens: int
    generations: int
    questions: int
    completion_tokens: int = 96

    @property
    def volume(self) -> Volume:
        """The volume all questions are about."""
        return Volume(self.visual_tokens)

    @property
    def volume_ids(self) -> list[int]:
        """Its tokens, one for each row of features."""
        return self.volume.token_ids(self.visual_tokens // len(self.volume.grids))

    def texts(self) -> list[tuple[list[int], list[list[int]], torch.Tensor]]:
        """Question, completions and advantages_G, for each question."""
        generator = torch.Generator().manual_seed(2)
        return [
            (
                words(QUESTION_TOKENS, generator),
                [words(self.completion_tokens, generator) for _ in range(self.generations)],
                torch.randn(self.generations, generator=generator),
            )
            for _ in range(self.questions)
        ]


def features_and_positions(model: PeftModel, work: Work) -> tuple[torch.Tensor, torch.Tensor]:
    """What a cache would hold: features_V_H of the volume, and the rotary positions_3_T of its tokens."""
    inner = model.get_base_model().model
    ids, patches, grids = torch.tensor([work.volume_ids]), work.volume.patches(), work.volume.grids
    with torch.no_grad():
        features = torch.cat(
            inner.get_image_features(patches.to(model.device), grids.to(model.device)).pooler_output
        )
    positions, _ = inner.get_rope_index(ids, (ids == IMAGE).int(), grids)
    return features, positions[:, 0]


Forward = Callable[[], float]
"""All forwards and backwards of a step; returns its loss. Gradients are left on the adapter."""


def tree(model: PeftModel, work: Work) -> tuple[Node, torch.Tensor]:
    """The volume with its questions and their completions, and advantages_N."""
    features, positions = features_and_positions(model, work)
    root, advantages = Node(work.volume_ids, positions, features), []
    for question, completions, advantages_G in work.texts():
        root.children.append(Node(question, children=[Node(ids, scored=True) for ids in completions]))
        advantages.append(advantages_G)
    return root, torch.cat(advantages).to(model.device)


def packed(model: PeftModel, work: Work, attention: str = "sdpa") -> Forward:
    """Ours."""
    root, advantages_N = tree(model, work)
    totals = StepTotals(work.questions * work.generations, 0, 1)

    def step() -> float:
        batch = pack([root], IMAGE).to(model.device)
        # not before the step: arms share the model, which holds the attention's name
        policy = PackedPolicy(model, attention)
        logps_N_T, _ = policy(batch)
        loss, _ = grpo_loss(LossInputs(logps_N_T, advantages_N[:, None], batch.mask_N_T), SETTINGS, totals)
        loss.backward()
        return float(loss.detach())

    return step


def padded(model: PeftModel, work: Work, batch: int) -> Forward:
    """transformers' own forward of whole rows on cached features, `batch` rows at a time."""
    features, volume_positions = features_and_positions(model, work)
    inner, t = model.get_base_model(), work.completion_tokens
    rows, advantages_N = (x.to(model.device) for x in rows_of(work))
    after = torch.arange(rows.shape[1] - volume_positions.shape[1]) + int(volume_positions.max()) + 1
    positions = torch.cat([volume_positions, after.expand(3, -1)], dim=1).to(model.device)
    visual = rows[0] == IMAGE

    def step() -> float:
        total = 0.0
        for part in range(0, len(rows), batch):
            ids, advantages = rows[part : part + batch], advantages_N[part : part + batch, None]
            embeds = inner.get_input_embeddings()(ids).clone()
            embeds[:, visual] = features
            hidden = inner.model.language_model(
                inputs_embeds=embeds,
                position_ids=positions[:, None].expand(-1, len(ids), -1),
                use_cache=False,
            ).last_hidden_state[:, -t - 1 : -1]
            targets = ids[:, -t:]
            logps = F.log_softmax(inner.lm_head(hidden).float(), dim=-1)
            logps_N_T = logps.gather(-1, targets[..., None]).squeeze(-1)
            inputs = LossInputs(logps_N_T, advantages, torch.ones_like(targets, dtype=torch.bool))
            loss, _ = grpo_loss(inputs, SETTINGS, StepTotals(len(rows), 0, 1))
            loss.backward()
            total += float(loss.detach())
        return total

    return step


def trl(model: PeftModel, work: Work, batch: int) -> Forward:
    """The stock trainer's `training_step` on rows of pictures and text, `batch` rows at a time."""
    warnings.filterwarnings("ignore", "TRL currently supports vLLM")  # which has no part in a training step
    from datasets import Dataset
    from trl import GRPOConfig, GRPOTrainer

    t = work.completion_tokens
    arguments = GRPOConfig(
        output_dir=mkdtemp(),
        loss_type="grpo",
        epsilon_high=SETTINGS.epsilon_high,
        per_device_train_batch_size=batch,
        gradient_accumulation_steps=work.generations // batch,
        num_generations=work.generations,
        max_completion_length=t,
        gradient_checkpointing=False,
        use_cpu=True,
        bf16=False,
        report_to=[],
    )
    trainer = GRPOTrainer(
        model,
        reward_funcs=lambda completions, **_: [0.0] * len(completions),
        args=arguments,
        train_dataset=Dataset.from_dict({"prompt": ["-"] * work.generations}),
        processing_class=TOKENIZER,
    )
    trainer._prepare_inputs = lambda inputs: inputs  # the rollouts are here already
    trainer.current_gradient_accumulation_steps = work.generations // batch
    rows, advantages_N = rows_of(work)
    patches, grids = work.volume.patches(), work.volume.grids

    def step() -> float:
        total = torch.zeros(())
        for part in range(0, len(rows), batch):
            ids = rows[part : part + batch]
            inputs = {
                "prompt_ids": ids[:, :-t],
                "prompt_mask": torch.ones_like(ids[:, :-t]),
                "completion_ids": ids[:, -t:],
                "completion_mask": torch.ones_like(ids[:, -t:]),
                "advantages": advantages_N[part : part + batch],
                "pixel_values": patches.repeat(len(ids), 1),
                "image_grid_thw": grids.repeat(len(ids), 1),
                "num_images": [len(grids)] * len(ids),
                "mm_token_type_ids": (ids == IMAGE).int(),
                "num_items_in_batch": torch.tensor(len(rows) * t),
            }
            total += trainer.training_step(trainer.model, inputs, None)
        return float(total)

    return step


def rows_of(work: Work) -> tuple[torch.Tensor, torch.Tensor]:
    """ids_N_L and advantages_N of one question's completions, each as a row of its own."""
    ((question, completions, advantages_G),) = work.texts()
    return torch.tensor([[*work.volume_ids, *question, *ids] for ids in completions]), advantages_G


def tree_flops(model: PeftModel, work: Work) -> float:
    """Floating-point operations of the packed step: what is masked is not counted, nor is anything twice.

    A weight costs 2 forward, 2 for the gradient of its input and, in an adapter, 2 for its own, for each token. Nothing
    needs the gradient of the first layer's input. A pair of attending tokens costs 4 d forward and 8 d backward for
    each head. Of the last layer, the volume's tokens need keys and values alone.
    """
    text = model.get_base_model().config.text_config
    first, last = "layers.0.self_attn.", f"layers.{text.num_hidden_layers - 1}."
    keys = ("k_proj", "v_proj")
    weight = left_out = 0
    for name, p in model.named_parameters():
        if "language_model.layers" in name and p.dim() == 2:
            reads_input = first in name and "o_proj" not in name and "lora_B" not in name
            cost = (2 + 2 * (not reads_input) + 2 * ("lora_" in name)) * p.numel()
            weight += cost
            left_out += cost if last in name and not any(key in name for key in keys) else 0
    volume, q, t = len(work.volume_ids), QUESTION_TOKENS, work.completion_tokens
    n = work.questions * work.generations
    tokens = volume + work.questions * q + n * t
    pairs = _causal(0, volume) + work.questions * _causal(volume, q) + n * _causal(volume + q, t)
    attention = 12 * text.hidden_size * (text.num_hidden_layers * pairs - _causal(0, volume))
    head = 4 * text.hidden_size * text.vocab_size * n * t
    return float(weight * tokens - left_out * volume + attention + head)


def _causal(ancestors: int, own: int) -> int:
    return own * ancestors + own * (own + 1) // 2


ARMS: dict[str, Callable[..., Forward]] = {
    "trl": trl,
    "padded": padded,
    "packed": packed,
    "subtree": partial(packed, attention="subtree"),
    "flex": partial(packed, attention="flex"),
}


def make_step(arm: str, threads: int, *work: Any) -> Callable[[str], Any]:
    """A function that takes the arm's step ("step"), returns its loss and adapter gradients ("gradients"), or tells
    where the time of a step goes ("profile")."""
    torch.set_num_threads(threads)
    return answers(arm, build_model(), *work)


def answers(arm: str, model: PeftModel, *work: Any) -> Callable[[str], Any]:
    """`make_step` on a model that is there already."""
    adapter = {name: p for name, p in model.named_parameters() if p.requires_grad}
    optimizer = torch.optim.AdamW(adapter.values(), lr=1e-4, fused=True)
    forward = ARMS[arm](model, *work)

    def answer(request: str) -> Any:
        if request == "profile":
            return shares_of_time(partial(answer, "step"))
        loss = forward()
        gradients = {name: p.grad.clone() for name, p in adapter.items()} if request == "gradients" else {}
        if request == "step":
            optimizer.step()
        optimizer.zero_grad()
        return loss, gradients

    return answer


KINDS = {
    "matrix products": ("aten::mm", "aten::addmm", "aten::bmm", "aten::baddbmm"),
    "attention": ("aten::_scaled_dot_product",),
    "copies": ("aten::copy_", "aten::cat", "aten::index", "aten::gather", "aten::fill_", "aten::zero_"),
}
"""How the names of torch's operations begin."""


def shares_of_time(step: Callable[[], Any]) -> dict[str, float]:
    """Kind of operation -> its share of the time of all operations of a step, the rest last; on the CPU."""
    with torch.profiler.profile() as profiled:
        step()
    spent = dict.fromkeys([*KINDS, "rest"], 0.0)
    for event in profiled.key_averages():
        if event.key.startswith("aten::"):
            kind = next((kind for kind, names in KINDS.items() if event.key.startswith(names)), "rest")
            spent[kind] += event.self_cpu_time_total
    return {kind: time / sum(spent.values()) for kind, time in spent.items()}
