"""FlexAttention over the packed row sees what each token's path holds, and gives what SDPA per level gives."""

from __future__ import annotations

from copy import deepcopy

import pytest
import torch
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st
from torch.nn.attention.flex_attention import create_block_mask, create_mask, flex_attention
from transformers import Qwen3ForCausalLM

from rl.flex import _compiled, tree_mask
from rl.packed import Layout, Node, PackedPolicy, pack

CPU = torch.device("cpu")


def grown(lengths: tuple[int, list]) -> Node:
    """A tree of nested `(tokens, subtrees)`, whose leaves are completions."""
    tokens, subtrees = lengths
    children = [grown(subtree) for subtree in subtrees]
    return Node([1 + i % 60 for i in range(tokens)], children=children, scored=not subtrees)


tokens = st.integers(1, 4)
leaves = st.tuples(st.integers(0, 4), st.just([]))
roots = st.tuples(
    tokens,
    st.lists(
        st.recursive(
            leaves, lambda below: st.tuples(tokens, st.lists(below, min_size=1, max_size=3)), max_leaves=8
        ),
        min_size=1,
        max_size=3,
    ),
)
forests = st.lists(roots, min_size=1, max_size=3)


def on_the_path(layout: Layout) -> torch.Tensor:
    """[L, L]: the key's node is the query's own or one that its set of siblings names as its path."""
    paths = {child: {*s.path, child} for s in layout.siblings for child in s.children}
    nodes = [n for n, length in enumerate(layout.lengths) for _ in range(length)]
    return torch.tensor([[key in paths[query] for key in nodes] for query in nodes])


@settings(max_examples=25)
@given(forest=forests)
def test_a_token_sees_its_own_past_and_its_ancestors_and_nothing_else(
    forest: list[tuple[int, list]],
) -> None:
    layout = pack([grown(tree) for tree in forest], visual_token_id=-1).layout
    expected = on_the_path(layout).tril()
    length = len(expected)
    mask = tree_mask(layout.lengths, layout.parents, CPU)
    assert torch.equal(create_mask(mask.mask_mod, 1, 1, length, length, "cpu")[0, 0], expected)


def test_blocks_that_no_token_may_see_are_left_out() -> None:
    """A volume of two blocks, two questions of one, a completion of the first question that fills one."""
    mask = tree_mask([256, 128, 128, 128], [-1, 0, 0, 1], CPU)
    assert mask.full_kv_num_blocks is not None
    assert mask.full_kv_num_blocks.flatten().tolist() == [0, 1, 2, 2, 3]
    assert mask.kv_num_blocks.flatten().tolist() == [1, 1, 1, 1, 1]  # only there the mask is looked at
    assert mask.kv_indices[0, 0, :, 0].tolist() == [0, 1, 2, 3, 4]


@pytest.mark.slow
@torch.no_grad()
@settings(max_examples=50)
@given(forest=forests)
@example(forest=[(150, [(70, [(9, []), (5, [])]), (60, [(33, []), (0, [])])]), (3, [(2, [])])])
def test_log_probabilities_equal_those_of_sdpa_per_level(
    qwen3: Qwen3ForCausalLM, forest: list[tuple[int, list]]
) -> None:
    """Trees of any depth, in float32; the example crosses the edges of blocks."""
    batch = pack([grown(tree) for tree in forest], visual_token_id=-1)
    assume(batch.mask_N_T.any())
    expected, got = (PackedPolicy(deepcopy(qwen3), attention)(batch) for attention in ("sdpa", "flex"))
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


@pytest.mark.slow
@torch.no_grad()
def test_what_is_compiled_on_a_gpu_is_compiled_once_for_all_lengths() -> None:
    """Traced as there, and carried out here operation by operation."""
    create, attend = _compiled(create_block_mask), _compiled(flex_attention)
    trees = [
        ([200, 60, 9], [-1, 0, 0]),
        ([100, 50, 4, 5], [-1, 0, 1, 1]),
        ([256, 128], [-1, 0]),
        ([700], [-1]),
    ]
    for lengths, parents in trees:
        expected_mask, length = tree_mask(lengths, parents, CPU), sum(lengths)
        query, key, value = (torch.randn(1, heads, length, 8) for heads in (4, 2, 2))
        with (
            torch.compiler.set_stance(force_backend="eager"),
            torch._dynamo.config.patch(error_on_recompile=True),
        ):
            mask = create(expected_mask.mask_mod, None, None, length, length, device=CPU)
            attended = attend(query, key, value, block_mask=mask, scale=0.3, enable_gqa=True)
        expected = flex_attention(query, key, value, block_mask=expected_mask, scale=0.3, enable_gqa=True)
        assert torch.equal(mask.to_dense(), expected_mask.to_dense())
        torch.testing.assert_close(attended, expected)
