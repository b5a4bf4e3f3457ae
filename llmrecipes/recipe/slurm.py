"""What Slurm starts against what the recipe trains on. Torch-free.

A mismatch otherwise is a silent wait for ranks that nobody starts, or several complete trainings in one folder.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from llmrecipes.recipe.rules.facts import Facts

# Lightning takes jobs of these names for a person at a shell, and each task for a job of its own.
SHELLS = ("bash", "interactive")


@dataclass(frozen=True)
class Shape:
    """Of a job: ``nodes`` machines with ``tasks`` processes each, and a GPU for each where ``gpu``."""

    nodes: int
    tasks: int
    gpu: bool = False

    @property
    def lines(self) -> dict[str, int]:
        """Options of sbatch that give this shape."""
        return {"nodes": self.nodes, "ntasks-per-node": self.tasks} | (
            {"gpus-per-node": self.tasks} if self.gpu else {}
        )


def shape_of(data: dict) -> Shape:
    """What a recipe trains on: one process per device."""
    facts = Facts(data)
    nodes = max(1, facts.integer("trainer", "num_nodes") or 1)
    return Shape(nodes, facts.data_ranks // nodes, facts.get("trainer", "accelerator") in ("gpu", "cuda"))


def corrections(recipe: Shape, asked: Shape) -> Iterator[str]:
    """The lines that make both equal: of the job, or of the recipe."""
    yield "  either the job:"
    yield from (f"    #SBATCH --{option}={count}" for option, count in recipe.lines.items())
    yield "  or the recipe:"
    yield f"    trainer: {{num_nodes: {asked.nodes}, devices: {asked.tasks}}}"


def allocation_problems(environ: Mapping[str, str], recipe: Shape) -> list[str]:
    """What is wrong with how Slurm started this process, and the corrected lines; empty when all is well.

    Args:
        environ: of the process.
        recipe: what it is about to train on.
    """
    tasks = _number(environ, "SLURM_STEP_NUM_TASKS", "SLURM_NTASKS")
    if "SLURM_JOB_ID" not in environ or tasks is None:
        return []
    nodes = _number(environ, "SLURM_STEP_NUM_NODES", "SLURM_NNODES") or 1
    in_step = "SLURM_STEP_ID" in environ
    if "TORCHELASTIC_RUN_ID" in environ:
        return _torchrun(nodes, tasks) if in_step else []
    if environ.get("SLURM_JOB_NAME") in SHELLS:
        return _shell(environ["SLURM_JOB_NAME"], tasks) if in_step else []
    if not in_step and tasks > 1:
        return [f"Slurm gives {tasks} tasks, but only this process runs: the others would be waited for; write", _SRUN]
    if tasks > 1 and "SLURM_NTASKS_PER_NODE" not in environ:
        lines = [f"    #SBATCH --{option}={count}" for option, count in recipe.lines.items()]
        return ["the job says --ntasks, not how many on each node; write instead:", *lines]
    # srun's own words stand in the step's figures, the job's in the other: Lightning goes by both.
    per_node = {-(-tasks // nodes), _number(environ, "SLURM_NTASKS_PER_NODE") or -(-tasks // nodes)}
    if nodes != recipe.nodes or per_node != {recipe.tasks}:
        asked = Shape(nodes, next(iter(per_node - {recipe.tasks}), recipe.tasks), recipe.gpu)
        what = (
            f"Slurm started {asked.nodes} nodes x {asked.tasks} tasks, the recipe trains on {recipe.nodes} nodes x "
            f"{recipe.tasks} devices (trainer.num_nodes, trainer.devices)"
        )
        return [what, *corrections(recipe, asked)]
    return _gpus(environ, recipe)


_SRUN = "    srun llmrecipes fit ..."


def _number(environ: Mapping[str, str], *names: str) -> int | None:
    """The first of these variables that is a number."""
    return next((int(environ[name]) for name in names if environ.get(name, "").isdecimal()), None)


def _torchrun(nodes: int, tasks: int) -> list[str]:
    if tasks == nodes:
        return []
    what = f"torchrun was started {tasks} times on {nodes} nodes, and starts the processes of a node itself; write"
    return [what, "    srun --ntasks-per-node=1 torchrun ...", "  or srun without torchrun, one task per device"]


def _shell(name: str, tasks: int) -> list[str]:
    if tasks == 1:
        return []
    what = f"the job's name is {name}: each of the {tasks} tasks would train by itself in the same folder; write"
    return [what, "    srun --job-name=train llmrecipes fit ..."]


def _gpus(environ: Mapping[str, str], recipe: Shape) -> list[str]:
    if not recipe.gpu:
        return []
    visible = environ.get("CUDA_VISIBLE_DEVICES")
    count = len(visible.split(",")) if visible else _number(environ, "SLURM_GPUS_ON_NODE")
    if count is None or count >= recipe.tasks:
        return []
    what = (
        f"this task sees {count} GPU{'s' if count > 1 else ''} of the {recipe.tasks} that a node's tasks share; write"
    )
    return [what, f"    #SBATCH --gpus-per-node={recipe.tasks}", "  and no --gpus-per-task, no --gpu-bind"]
