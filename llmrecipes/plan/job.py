"""What ``plan`` reads out of a recipe. Torch-free."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from llmrecipes.errors import UserError
from llmrecipes.plan.hardware import GPUs
from llmrecipes.plan.layout import Layout
from llmrecipes.recipe import ModelConfig, checked_recipe
from llmrecipes.recipe.mesh import ALIASES, MeshSizes, mesh_sizes
from llmrecipes.recipe.rules.facts import CONFIG, DATA, MODEL, Facts
from llmrecipes.recipe.rules.model import build_config

_STRATEGY = ("trainer", "strategy", "init_args")
_GPUS_PER_NODE = 8
# What stages train unless the recipe says otherwise.
_TRAINED = {"LoraExpertModule": "lora", "RouterModule": "gate"}


@dataclass(frozen=True)
class Job:
    """One training.

    Attributes:
        name: of the recipe.
        config: the model.
        precision: of the Trainer. accelerator: ``cpu`` or ``gpu``.
        nodes, per_node: machines, and processes on each.
        sharded: whether there is a `ShardedStrategy`; the next ones are its arguments.
        mode, recompute, cpu_offload, expert_parallel, mesh, reduce_every: of the strategy.
        micro_batch, global_batch, seq_len, max_steps, loss_chunk: of the recipe.
        preference: log-probabilities of pairs instead of cross-entropy. reference: a second model stays in memory.
        save_every: optimizer steps between checkpoints; None = not given in steps or tokens.
        trainable, frozen: which parameters have a gradient.
        cut: whether a row may hold several documents that do not see each other.
        layout: how documents and labels fill a micro-batch; None = nobody looked.
    """

    name: str
    config: ModelConfig
    precision: str
    accelerator: str
    nodes: int
    per_node: int
    sharded: bool
    mode: str
    recompute: str
    cpu_offload: bool
    expert_parallel: int
    mesh: list[int] | None
    reduce_every: bool
    micro_batch: int
    global_batch: int
    seq_len: int
    max_steps: int
    loss_chunk: int
    preference: bool
    reference: bool
    save_every: int | None
    trainable: tuple[str, ...] = ("all",)
    frozen: tuple[str, ...] = ()
    cut: bool = True
    layout: Layout | None = None

    @property
    def ranks(self) -> int:
        """Processes, one per GPU."""
        return self.nodes * self.per_node

    @property
    def micro_batches(self) -> int:
        """Of one rank in one step."""
        return max(1, self.global_batch // (self.micro_batch * self.ranks))

    @property
    def tokens_per_step(self) -> int:
        """Token slots of one optimizer step."""
        return self.global_batch * self.seq_len

    @property
    def tokens(self) -> int:
        """Token slots of the whole run."""
        return self.tokens_per_step * self.max_steps

    def sizes(self, mode: str | None = None) -> MeshSizes:
        """The mesh of the job, or what it would be in another mode.

        Raises:
            ValueError: the job's sizes do not form one.
        """
        if not self.sharded and mode is None:
            return MeshSizes(1, 1)
        mesh = self.mesh if mode is None or mode == self.mode else None
        return mesh_sizes(mode or self.mode, self.nodes, self.per_node, mesh, self.expert_parallel)


def read_job(paths: Sequence[Path], overrides: Sequence[str] = (), gpus: GPUs | None = None) -> Job:
    """Read and check a recipe; files of data need not be here. ``gpus`` replaces the recipe's processes.

    Raises:
        UserError: mistakes of the recipe, or a number of GPUs that does not suit it.
    """
    facts = Facts(checked_recipe(paths, overrides, files=False).data)
    nodes = facts.integer("trainer", "num_nodes") or 1
    per_node = max(1, facts.data_ranks // nodes)
    if gpus is not None:
        nodes, per_node = _split(gpus.count, per_node)
    sharded = str(facts.get("trainer", "strategy", "class_path") or "").endswith("ShardedStrategy")
    mode = ALIASES.get(facts.get(*_STRATEGY, "mode"), facts.get(*_STRATEGY, "mode")) or "full_shard"
    every = facts.get(*_STRATEGY, "reduce_every_micro_batch")
    kind = str(facts.get("model", "class_path"))
    reference = facts.get(*MODEL, "reference") == "copy" and facts.get(*MODEL, "loss") != "orpo"
    required = {key: facts.integer(*DATA, key) for key in ("micro_batch", "global_batch", "seq_len")}
    missing = [key for key, value in required.items() if not value]
    missing += [] if facts.max_steps else ["trainer.max_steps"]
    if missing:
        raise UserError(f"{paths[0]}: plan needs {', '.join(missing)} as whole numbers above 0")
    job = Job(
        name=str(facts.get("name") or Path(paths[0]).stem),
        config=build_config(facts.mapping(*CONFIG)),
        precision=str(facts.get("trainer", "precision") or "32-true"),
        accelerator="cpu" if facts.get("trainer", "accelerator") == "cpu" and gpus is None else "gpu",
        nodes=nodes,
        per_node=per_node,
        sharded=sharded or nodes * per_node > 1,
        mode=mode,
        recompute=str(facts.get(*_STRATEGY, "activation_checkpointing") or "none"),
        cpu_offload=bool(facts.get(*_STRATEGY, "cpu_offload")),
        expert_parallel=facts.integer(*_STRATEGY, "expert_parallel") or 1,
        mesh=facts.get(*_STRATEGY, "mesh"),
        reduce_every=bool(every) if every is not None else mode != "no_shard",
        micro_batch=required["micro_batch"] or 0,
        global_batch=required["global_batch"] or 0,
        seq_len=required["seq_len"] or 0,
        max_steps=facts.max_steps or 0,
        loss_chunk=facts.integer(*MODEL, "loss_chunk") or 1024,
        preference=kind.endswith("PreferenceModule"),
        reference=reference,
        save_every=facts.steps("checkpoint", "every"),
        trainable=tuple(facts.get(*MODEL, "trainable") or (_TRAINED.get(kind.rpartition(".")[2], "all"),)),
        frozen=tuple(facts.get(*MODEL, "frozen") or ()),
        cut=facts.get(*DATA, "document_mask") is not False,
    )
    _check(job)
    return job


def _split(count: int, per_node: int) -> tuple[int, int]:
    """Nodes and GPUs on each: as many on each as the recipe has, or eight, or all on one node."""
    for size in (per_node, _GPUS_PER_NODE):
        if size > 1 and count > size and count % size == 0:
            return count // size, size
    return (1, count) if count <= _GPUS_PER_NODE else (count, 1)


def _check(job: Job) -> None:
    unit = job.micro_batch * job.ranks
    if job.global_batch % unit:
        near = sorted({max(unit, job.global_batch // unit * unit), (job.global_batch // unit + 1) * unit})
        raise UserError(
            f"global_batch {job.global_batch} is not divisible by micro_batch {job.micro_batch} x {job.ranks} ranks "
            f"= {unit}: add --data.global_batch {near[-1]}, or take another number of GPUs"
        )
    try:
        job.sizes()
    except ValueError as error:
        raise UserError(f"trainer.strategy: {error}") from None
