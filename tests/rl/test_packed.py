"""The packed forward must be the one-by-one computation, only cheaper."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from copy import deepcopy

import pytest
import torch
import torch.nn.functional as F
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
)
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VLRMSNorm
from transformers.models.qwen3.modeling_qwen3 import Qwen3RMSNorm

from rl.base.model import build_model, build_tokenizer
from rl.packed import Node, PackedPolicy, pack
from rollouts.positions import mrope_positions

GRID = (2, 4, 4)  # 2 x 2 x 2 visual tokens after merging
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def small_model() -> PeftModel:
    """A Qwen2.5-VL with a LoRA adapter whose B is not zero, in float64; the same each time."""
    return adapted(build_model(build_tokenizer([]), seed=0), std=0.05).double()


@pytest.fixture(scope="module")
def policy() -> PackedPolicy:
    return PackedPolicy(small_model())


@pytest.fixture(scope="module")
def plain() -> PeftModel:
    """The policy's model as transformers and PEFT compute it: what `PackedPolicy` changes in a model it has not."""
    return with_exact_norms(small_model(), Qwen2_5_VLRMSNorm)


def adapted(model: PreTrainedModel, std: float) -> PeftModel:
    """The model with an adapter on its language layers, whose B is drawn with that standard deviation."""
    torch.manual_seed(1)  # A is drawn too
    lora = get_peft_model(
        model, LoraConfig(r=4, lora_alpha=8, target_modules=TARGETS, exclude_modules=".*visual.*")
    )
    for name, parameter in lora.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=std)
    return lora


def with_exact_norms(model: PeftModel, kind: type[nn.Module]) -> PeftModel:
    """transformers computes RMSNorm in float32 whatever the input, which would hide errors below 1e-7."""
    for module in model.modules():
        if isinstance(module, kind):
            module.forward = functools.partial(exact_norm, module)
    return model


def exact_norm(norm: nn.Module, x: torch.Tensor) -> torch.Tensor:
    return F.rms_norm(x, x.shape[-1:], norm.weight, norm.variance_epsilon)


def gradients(logps: torch.Tensor, model: PeftModel) -> dict[str, torch.Tensor]:
    """Of the sum of their squares, by the adapter's tensors."""
    learning = {name: p for name, p in model.named_parameters() if p.requires_grad}
    return dict(zip(learning, torch.autograd.grad(logps.pow(2).sum(), learning.values()), strict=True))


def volume_node(policy: PackedPolicy, seed: int) -> Node:
    config = policy.causal_lm.config
    generator = torch.Generator().manual_seed(seed)
    ids = [300, 301, config.vision_start_token_id, *[config.video_token_id] * 8, config.vision_end_token_id]
    positions = mrope_positions(
        ids, GRID, 1.5, video_token_id=config.video_token_id, merge_size=2, tokens_per_second=2
    )
    features = torch.randn(8, config.text_config.hidden_size, generator=generator, dtype=torch.float64)
    return Node(ids, positions, features)


def random_forest(policy: PackedPolicy, shape: list[list[list[int]]]) -> list[Node]:
    """`shape[v][q]` lists the completion lengths of question q about volume v."""
    roots, token = [], 310
    for v, questions in enumerate(shape):
        root = volume_node(policy, seed=v)
        for q, lengths in enumerate(questions):
            question = Node([token + i for i in range(2 + q)])
            token += 7
            for length in lengths:
                question.children.append(Node([token + i for i in range(length)], scored=True))
                token += 3
            root.children.append(question)
        roots.append(root)
    return roots


def paths(nodes: Sequence[Node], before: tuple[Node, ...] = ()) -> Iterator[tuple[Node, ...]]:
    """From root to completion, in the order of `PackedBatch`."""
    yield from ((*before, node) for node in nodes if node.scored)
    for node in nodes:
        yield from paths(node.children, (*before, node))


def alone(plain: PeftModel, path: tuple[Node, ...], temperature: float = 1.0) -> torch.Tensor:
    """Log-probabilities of one completion as a plain causal row, through transformers' and PEFT's own layers."""
    causal_lm = plain.get_base_model()
    config, model = causal_lm.config, causal_lm.model.language_model
    ids = [t for node in path for t in node.token_ids]
    root = path[0]
    positions = mrope_positions(
        ids, GRID, 1.5, video_token_id=config.video_token_id, merge_size=2, tokens_per_second=2
    )
    embeds = model.embed_tokens(torch.tensor(ids))
    visual = (torch.tensor(ids) == config.video_token_id).nonzero().flatten()
    assert root.features_V_H is not None
    embeds = embeds.index_copy(0, visual, root.features_V_H)
    hidden = model(inputs_embeds=embeds[None], position_ids=positions[:, None], use_cache=False)
    logps = F.log_softmax(causal_lm.lm_head(hidden.last_hidden_state[0]) / temperature, dim=-1)
    n = len(path[-1].token_ids)
    return logps[len(ids) - n - 1 : -1].gather(-1, torch.tensor(ids[len(ids) - n :])[:, None]).squeeze(-1)


attentions = st.sampled_from(["sdpa", "subtree"])
lengths = st.lists(
    st.lists(st.lists(st.integers(0, 5), min_size=1, max_size=3), min_size=1, max_size=3),
    min_size=1,
    max_size=2,
).filter(lambda s: any(n for v in s for q in v for n in q))


@settings(max_examples=25, deadline=None)
@given(shape=lengths, temperature=st.sampled_from([1.0, 0.7]), attention=attentions)
def test_packed_log_probabilities_and_gradients_equal_one_row_per_completion(
    policy: PackedPolicy,
    plain: PeftModel,
    shape: list[list[list[int]]],
    temperature: float,
    attention: str,
) -> None:
    """Random trees, empty completions included, in float64 to 1e-10."""
    policy = PackedPolicy(policy.model, attention)
    roots = random_forest(policy, shape)
    batch = pack(roots, policy.causal_lm.config.video_token_id)
    logps_N_T, _ = policy(batch, temperature)
    got = gradients(logps_N_T, policy.model)
    rows = [alone(plain, path, temperature) for path in paths(roots)]
    expected = gradients(torch.cat(rows), plain)

    for row, logps in zip(rows, logps_N_T, strict=True):
        torch.testing.assert_close(logps[: len(row)], row, rtol=0, atol=1e-10)
        assert not logps[len(row) :].any()
    assert got.keys() == expected.keys()
    for name, gradient in expected.items():
        assert float((got[name] - gradient).norm()) <= 1e-10 * max(1.0, float(gradient.norm())), name


@pytest.mark.parametrize("attention", ["sdpa", "subtree"])
def test_float32_stays_within_the_stated_tolerance(plain: PeftModel, attention: str) -> None:
    """Of rows in float64: log-probabilities to 1e-5, gradients to 1e-4 of their norm."""
    policy = PackedPolicy(small_model().float(), attention)
    roots = random_forest(policy, [[[5, 4], [3]], [[2, 5, 1]]])
    rows = [alone(plain, path) for path in paths(roots)]
    for root in roots:
        root.features_V_H = root.features_V_H.float() if root.features_V_H is not None else None
    rounded, _ = policy(pack(roots, policy.causal_lm.config.video_token_id))
    got = gradients(rounded, policy.model)
    for row, logps in zip(rows, rounded, strict=True):
        assert ((logps[: len(row)] - row).abs() <= 1e-5 * row.abs().clamp(min=1.0)).all()
    for name, gradient in gradients(torch.cat(rows), plain).items():
        assert float((got[name] - gradient).norm()) <= 1e-4 * float(gradient.norm()), name


@torch.no_grad()
def test_flex_attention_gives_the_same_log_probabilities(policy: PackedPolicy) -> None:
    """Two volumes, in float64; `test_flex.py` has trees of any depth, in float32."""
    batch = pack(random_forest(policy, [[[5, 4], [3]], [[2, 0, 1]]]), policy.causal_lm.config.video_token_id)
    flex, _ = PackedPolicy(policy.model, "flex")(batch, 0.7)
    per_level, _ = PackedPolicy(policy.model)(batch, 0.7)
    torch.testing.assert_close(flex, per_level, rtol=0, atol=1e-10)


def test_logits_in_parts_give_the_same_log_probabilities_entropies_and_gradients(
    policy: PackedPolicy, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What keeps the logits of a real vocabulary out of memory."""
    batch = pack(random_forest(policy, [[[5, 4], [3]], [[2, 0, 1]]]), policy.causal_lm.config.video_token_id)

    def outcome() -> list[torch.Tensor]:
        logps_N_T, entropies_N_T = policy(batch, 0.7)
        return [logps_N_T, entropies_N_T, *gradients(logps_N_T, policy.model).values()]

    whole, seen = outcome(), []
    score = policy._score
    monkeypatch.setattr(
        policy, "_score", lambda hidden, *rest: seen.append(len(hidden)) or score(hidden, *rest)
    )
    monkeypatch.setattr("rl.microbatch.LOGITS_AT_ONCE", 4 * policy.causal_lm.lm_head.out_features)
    parts = outcome()
    assert seen[:4] == [4, 4, 4, 3]
    assert len(seen) == 8  # once more in the backward pass
    for a, b in zip(parts, whole, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-12)


@pytest.fixture(scope="module")
def text_policy(qwen3: Qwen3ForCausalLM) -> PackedPolicy:
    """A second architecture, without pictures, its adapter's B not zero."""
    return PackedPolicy(adapted(deepcopy(qwen3), std=0.2))


@pytest.fixture(scope="module")
def plain_text(qwen3: Qwen3ForCausalLM) -> PeftModel:
    """The same as transformers and PEFT compute it."""
    return with_exact_norms(adapted(deepcopy(qwen3), std=0.2), Qwen3RMSNorm)


Shape = int | tuple[int, list]
"""Tokens of a completion, or of an inner node and what continues it."""
subtrees = st.recursive(
    st.integers(0, 4),
    lambda below: st.tuples(st.integers(1, 4), st.lists(below, min_size=1, max_size=3)),
    max_leaves=8,
)
forests = st.lists(
    st.tuples(st.integers(1, 4), st.lists(subtrees, min_size=1, max_size=3)), min_size=1, max_size=3
)


def grown(shape: Shape, first: int = 1) -> Node:
    """A text tree; siblings differ in their tokens."""
    length, below = (shape, []) if isinstance(shape, int) else shape
    ids = [1 + (first + i) % 60 for i in range(length)]
    children = [grown(child, first + 7 * (i + 1)) for i, child in enumerate(below)]
    return Node(ids, children=children, scored=isinstance(shape, int))


def text_alone(causal_lm: PreTrainedModel, path: tuple[Node, ...]) -> torch.Tensor:
    """Log-probabilities of one completion of a text tree as a plain causal row."""
    ids, n = torch.tensor([t for node in path for t in node.token_ids]), len(path[-1].token_ids)
    scores = F.log_softmax(causal_lm(input_ids=ids[None], use_cache=False).logits[0], dim=-1)
    return scores[len(ids) - n - 1 : -1].gather(-1, ids[len(ids) - n :, None]).squeeze(-1)


@settings(max_examples=25, deadline=None)
@given(forest=forests, dtype=st.sampled_from([torch.float64, torch.float32]), attention=attentions)
@example(forest=[(1, [1])], dtype=torch.float32, attention="sdpa")
def test_text_trees_of_any_depth_pack_the_same_way_in_a_second_architecture(
    text_policy: PackedPolicy,
    plain_text: PeftModel,
    forest: list[Shape],
    dtype: torch.dtype,
    attention: str,
) -> None:
    """To 1e-10 in float64; in float32 within 1e-5 of a log-probability and 1e-4 of a gradient's norm."""
    off_logp, off_gradient = (1e-10, 1e-10) if dtype == torch.float64 else (1e-5, 1e-4)
    policy = PackedPolicy(text_policy.to(dtype).model, attention)
    roots = [grown(shape) for shape in forest]
    rows = list(paths(roots))
    assume(any(path[-1].token_ids for path in rows))
    logps_N_T, _ = policy(pack(roots, visual_token_id=-1))
    got = gradients(logps_N_T, policy.model)

    expected = [text_alone(plain_text.to(dtype).get_base_model(), path) for path in rows]
    for row, logps in zip(expected, logps_N_T, strict=True):
        assert ((logps[: len(row)] - row).abs() <= off_logp * row.abs().clamp(min=1)).all()
        assert not logps[len(row) :].any()
    by_name = gradients(torch.cat(expected), plain_text)
    whole = float(torch.stack([gradient.norm() for gradient in by_name.values()]).norm())
    for name, gradient in by_name.items():
        # one that is 0, as of queries that see a single token, is left with the rounding of what cancels in it
        floor = 1e-3 if dtype == torch.float64 else 1e-2 * whole
        allowed = off_gradient * max(floor, float(gradient.norm()))
        assert float((got[name] - gradient).norm()) <= allowed, name


@pytest.mark.parametrize("attention", ["sdpa", "subtree", "flex"])
def test_a_decoder_that_always_makes_its_own_mask_packs_too_beside_another_of_the_same_config(
    attention: str,
) -> None:
    """As Llama's does, and Qwen3-VL's. Models that are built from one config share it."""
    sizes = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 16, "num_attention_heads": 4}
    config = LlamaConfig(**sizes, num_key_value_heads=2, num_hidden_layers=2, initializer_range=0.3)
    torch.manual_seed(0)
    packed, plain = LlamaForCausalLM(config), LlamaForCausalLM(config)
    plain.load_state_dict(packed.state_dict())
    roots = [grown((3, [(2, [3, 1]), 4]))]
    with torch.no_grad():
        logps_N_T, _ = PackedPolicy(packed, attention)(pack(roots, visual_token_id=-1))
        for logps, path in zip(logps_N_T, paths(roots), strict=True):
            expected = text_alone(plain, path)
            torch.testing.assert_close(logps[: len(expected)], expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", ["flex", "subtree"])
def test_a_model_with_attention_dropout_is_refused(qwen3: Qwen3ForCausalLM, name: str) -> None:
    policy = PackedPolicy(deepcopy(qwen3), name).train()
    for layer in policy.language_model.layers:
        layer.self_attn.attention_dropout = 0.1
    refusal = rf"model\.attention '{name}' cannot: use 'sdpa'"
    with torch.no_grad(), pytest.raises(ValueError, match=refusal):
        policy(pack([grown((3, [2]))], visual_token_id=-1))


def test_features_that_do_not_match_the_visual_tokens_are_refused(policy: PackedPolicy) -> None:
    root = volume_node(policy, seed=0)
    assert root.features_V_H is not None
    root.features_V_H = root.features_V_H[:-1]
    root.children = [Node([310], children=[Node([311], scored=True)])]
    with pytest.raises(ValueError, match="8 visual tokens and 7 feature rows"):
        pack([root], policy.causal_lm.config.video_token_id)


def test_a_completion_without_a_prompt_is_refused() -> None:
    with pytest.raises(ValueError, match="needs a prompt"):
        pack([Node([1, 2], scored=True)], visual_token_id=-1)


def test_a_completion_that_goes_on_or_holds_a_volume_is_refused(policy: PackedPolicy) -> None:
    for completion in (
        Node([3], children=[Node([4], scored=True)], scored=True),
        Node([3], positions_3_T=torch.zeros(3, 1, dtype=torch.long), scored=True),
    ):
        with pytest.raises(ValueError, match="a completion is text and nothing continues it"):
            pack([Node([1, 2], children=[completion])], visual_token_id=-1)


def test_models_that_the_tree_would_get_wrong_are_refused() -> None:
    sizes = {"vocab_size": 8, "hidden_size": 8, "intermediate_size": 8, "num_attention_heads": 1}
    sizes |= {"num_key_value_heads": 1, "num_hidden_layers": 2, "head_dim": 8}
    windowed = Qwen3Config(**sizes, use_sliding_window=True, sliding_window=4, max_window_layers=1)
    with pytest.raises(ValueError, match="qwen3 has layers that see a window"):
        PackedPolicy(Qwen3ForCausalLM(windowed))
    tower = {"depth": 1, "hidden_size": 8, "intermediate_size": 8, "num_heads": 1, "out_hidden_size": 8}
    rope = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 1, 1]}
    deep = Qwen3VLConfig(
        text_config={**sizes, "rope_parameters": rope},
        vision_config={**tower, "deepstack_visual_indexes": [0]},
    )
    with pytest.raises(ValueError, match="qwen3_vl adds visual features in further layers"):
        PackedPolicy(Qwen3VLForConditionalGeneration(deep))


def test_a_visual_token_that_the_model_said_is_text(policy: PackedPolicy) -> None:
    """Nothing keeps a model from sampling one; the engine embeds it like any other token."""
    pad = policy.causal_lm.config.video_token_id
    root = volume_node(policy, seed=0)
    root.children = [Node([310], children=[Node([311, pad, 312], scored=True)])]
    batch = pack([root], pad)
    assert len(batch.visual_V) == 8
    logps, _ = policy(batch)
    assert (logps < 0).all()
