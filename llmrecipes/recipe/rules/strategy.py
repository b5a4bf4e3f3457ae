"""How processes share a model: the mesh must fit the job, and the experts the mesh."""

from __future__ import annotations

from collections.abc import Iterator

from llmrecipes.recipe.mesh import ALIASES, MODES, OFFLOADABLE, MeshSizes, mesh_sizes
from llmrecipes.recipe.rules.facts import CONFIG, Facts, Finding

STRATEGY = ("trainer", "strategy")
INIT = (*STRATEGY, "init_args")
CLASS = "llmrecipes.distributed.ShardedStrategy"
# What other strategies' users look for.
_TWINS = {
    "ddp": "no_shard",
    "fsdp": "full_shard",
    "fsdp2": "full_shard",
    "deepspeed": "full_shard",
    "deepspeed_stage_1": "shard_grad_op",
    "deepspeed_stage_2": "shard_grad_op",
    "deepspeed_stage_3": "full_shard",
    "hsdp": "hybrid_shard",
}


def strategy_problems(facts: Facts) -> Iterator[Finding]:
    """A strategy for more than one process, of ours, with sizes that fit."""
    strategy = facts.get(*STRATEGY)
    name = strategy.get("class_path") if isinstance(strategy, dict) else strategy
    if isinstance(name, str) and name.rpartition(".")[2] == CLASS.rpartition(".")[2]:
        yield from _sharded(facts)
    elif facts.data_ranks > 1 or name not in (None, "auto", "single_device"):
        yield from _other(facts, name)


def _other(facts: Facts, name: object) -> Iterator[Finding]:
    wanted = f"write strategy: {{class_path: {CLASS}, init_args: {{mode: %s}}}}"
    if name in (None, "auto"):
        what = f"trainer.strategy is missing: {facts.data_ranks} processes must know what they share"
        yield Finding(("trainer", "devices"), what, wanted % "full_shard")
    else:
        twin = _TWINS.get(str(name).lower().removesuffix("strategy").rpartition(".")[2], "full_shard")
        what = f"trainer.strategy {name} does not know the one optimizer step and its checkpoints"
        yield Finding(STRATEGY, what, wanted % twin)


def _sharded(facts: Facts) -> Iterator[Finding]:
    mode = facts.get(*INIT, "mode") if facts.has(*INIT, "mode") else "full_shard"
    if mode not in MODES:
        return  # reported where types are checked
    if facts.get(*INIT, "cpu_offload") is True and ALIASES.get(mode, mode) not in OFFLOADABLE:
        what = f"trainer.strategy: cpu_offload works with {' and '.join(OFFLOADABLE)}, not with {mode}"
        yield Finding((*INIT, "cpu_offload"), what)
    if facts.get("trainer", "precision") in ("64-true", "64", 64):
        yield Finding(("trainer", "precision"), "trainer.precision 64-true is for one process without a strategy")
    nodes, expert = facts.integer("trainer", "num_nodes") or 1, facts.integer(*INIT, "expert_parallel") or 1
    mesh = facts.get(*INIT, "mesh")
    if mesh is not None and not (isinstance(mesh, list) and all(type(n) is int for n in mesh)):
        return
    try:
        sizes = mesh_sizes(mode, nodes, facts.data_ranks // nodes, mesh, expert)
    except ValueError as error:
        yield Finding((*INIT, "mesh") if mesh is not None else STRATEGY, f"trainer.strategy: {error}")
        return
    yield from _experts(facts, sizes)


def _experts(facts: Facts, sizes: MeshSizes) -> Iterator[Finding]:
    moe = (*CONFIG, "moe")
    path = (*INIT, "expert_parallel")
    if sizes.expert > 1 and facts.get(*CONFIG) is not None and not facts.mapping(*moe):
        yield Finding(path, f"trainer.strategy: expert_parallel {sizes.expert}, but the model has no experts")
        return
    width, dim = facts.integer(*moe, "ffn_dim"), facts.integer(*CONFIG, "dim")
    listed = facts.get(*moe, "experts_per_layer")
    counts = [n for n in listed if type(n) is int] if isinstance(listed, list) else [facts.integer(*moe, "num_experts")]
    uneven = [n for n in counts if n and n % sizes.expert]
    if uneven:
        what = f"trainer.strategy: expert_parallel {sizes.expert} does not divide the {uneven[0]} experts of a layer"
        yield Finding(path, what)
    share = sizes.experts[1] if sizes.expert > 1 else sizes.shard
    if width and dim and (width % share and dim % share):
        what = f"{share} processes cannot share experts of width {width} in a model of width {dim}"
        yield Finding((*moe, "ffn_dim"), what, "choose widths that are multiples of the number")
