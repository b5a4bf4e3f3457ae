"""Meshes: which ranks share what, and what is refused, with the numbers."""

from __future__ import annotations

import itertools

import pytest

from llmrecipes.recipe.mesh import MODES, MeshSizes, mesh_sizes


def test_every_mode_uses_every_process_once():
    seen = 0
    for mode, nodes, per_node in itertools.product(MODES, (1, 2, 3), (1, 2, 8)):
        if mode.startswith("hybrid") and nodes == 1:
            continue
        sizes = mesh_sizes(mode, nodes, per_node)
        assert sizes.replicate * sizes.shard == nodes * per_node
        seen += 1
    assert seen == 5 * 9 + 2 * 6


def test_hybrid_shares_inside_a_node_and_copies_between_them():
    sizes = mesh_sizes("hybrid_shard", 3, 8)
    assert sizes == MeshSizes(replicate=3, shard=8)
    for first in range(0, 24, sizes.shard):
        assert len({rank // 8 for rank in range(first, first + sizes.shard)}) == 1, "one copy, one node"


@pytest.mark.parametrize("mode", ["full_shard", "zero2", "no_shard", "hybrid_shard"])
def test_experts_are_divided_inside_a_node(mode):
    """Ranks in the order of the expert mesh: its last dimension, the groups that exchange tokens, is one node's."""
    nodes, per_node, expert = 3, 8, 4
    sizes = mesh_sizes(mode, nodes, per_node, expert_parallel=expert)
    copies, share, groups = sizes.experts
    assert copies * share * groups == nodes * per_node
    for first in range(0, nodes * per_node, groups):
        assert len({rank // per_node for rank in range(first, first + groups)}) == 1


REFUSED = [
    (("hybrid_shard", 1, 8), {}, "there is one node (1 node x 8 processes = 8)"),
    (("hybrid_shard", 2, 4), {"mesh": [3, 2]}, "mesh 3 x 2 = 6 processes, the job has 2 nodes x 4 processes = 8"),
    (("hybrid_shard_zero2", 2, 4), {"mesh": [1, 8]}, "shard 8 does not divide the 4 processes of a node"),
    (("hybrid_shard", 2, 4), {"mesh": [8]}, "is not [replicate, shard]"),
    (("hybrid_shard", 2, 4), {"mesh": [0, 8]}, "is not [replicate, shard]"),
    (("full_shard", 2, 4), {"mesh": [2, 4]}, "is for hybrid modes only"),
    (("full_shard", 2, 4), {"expert_parallel": 8}, "does not divide the 4 processes of a node"),
    (("full_shard", 2, 4), {"expert_parallel": 0}, "less than 1"),
    (("hybrid_shard", 2, 6), {"mesh": [6, 2], "expert_parallel": 3}, "does not divide the 2 processes that share"),
]


@pytest.mark.parametrize(("job", "options", "words"), REFUSED)
def test_what_does_not_fit_is_refused_with_the_numbers(job, options, words):
    with pytest.raises(ValueError, match=r"mesh|hybrid|expert_parallel") as error:
        mesh_sizes(*job, **options)
    assert words in str(error.value)


SHARDED = "llmrecipes.distributed.ShardedStrategy"
RULES = [
    ("devices: 2", "trainer.strategy is missing: 2 processes must know what they share"),
    ("devices: 2\n  strategy: ddp", "trainer.strategy ddp does not know the one optimizer step and its checkpoints"),
    ("devices: 2\n  strategy: deepspeed_stage_2", "init_args: {mode: shard_grad_op}}"),
    (f"strategy: {{class_path: {SHARDED}, init_args: {{mode: fullshard}}}}", "did you mean 'full_shard'?"),
    (f"strategy: {{class_path: {SHARDED}, init_args: {{mode: hybrid_shard}}}}", "there is one node"),
    (
        f"strategy: {{class_path: {SHARDED}, init_args: {{mode: no_shard, cpu_offload: true}}}}",
        "cpu_offload works with shard_grad_op and full_shard, not with no_shard",
    ),
    (
        f"devices: 6\n  strategy: {{class_path: {SHARDED}, init_args: {{expert_parallel: 3}}}}",
        "expert_parallel 3 does not divide the 8 experts of a layer",
    ),
    (
        f"devices: 4\n  strategy: {{class_path: {SHARDED}, init_args: {{expert_parallel: 4}}}}",
        "expert_parallel 4 does not divide the 6 experts of a layer",
    ),
    (
        f"devices: 3\n  strategy: {{class_path: {SHARDED}, init_args: {{mode: zero3}}}}",
        "3 processes cannot share experts of width 256 in a model of width 128",
    ),
]


@pytest.mark.parametrize(("lines", "words"), RULES, ids=range(len(RULES)))
def test_check_says_it_before_anything_starts(problems_of, lines, words):
    pyramid = ("num_experts: 8", "experts_per_layer: [8, 8, 6, 8]") if "the 6 experts" in words else ("", "")
    count = ("    expected_params: 7_509_120\n", "") if pyramid[0] else ("", "")
    found = problems_of(("trainer:\n", f"trainer:\n  {lines}\n"), pyramid, count)
    assert len(found) == 1, found
    assert words in found[0]
