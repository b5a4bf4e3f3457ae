"""The one strategy: how many processes share a model, chosen by name in the recipe."""

from __future__ import annotations

from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any, Literal

import torch
import torch.distributed as dist
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule

from llmrecipes.distributed.compiled import compile_blocks
from llmrecipes.distributed.expert_parallel import divide_experts
from llmrecipes.distributed.launcher import RankLauncher
from llmrecipes.distributed.rank_status import RankStatus
from llmrecipes.distributed.recompute import Recompute, recompute_blocks
from llmrecipes.distributed.rendezvous import Rendezvous, Report
from llmrecipes.distributed.sharding import Sharding, prepare_micro_batch, shard_model
from llmrecipes.distributed.watchdog import Watchdog
from llmrecipes.errors import UserError
from llmrecipes.recipe.mesh import ALIASES, KEEPS_GATHERED, OFFLOADABLE, MeshSizes, Mode, mesh_sizes


class ShardedStrategy(ModelParallelStrategy):
    """Data parallelism with shared parameters, gradients and optimizer state (FSDP2), on GPUs and CPUs.

    | mode | each process keeps | copies |
    |---|---|---|
    | ``no_shard`` | everything | one per process |
    | ``shard_grad_op`` (``zero2``) | a share; parameters stay gathered between forward and backward | one |
    | ``full_shard`` (``zero3``) | a share; parameters are gathered block by block, twice | one |
    | ``hybrid_shard`` | as ``full_shard`` inside a node | one per node |
    | ``hybrid_shard_zero2`` | as ``shard_grad_op`` inside a node | one per node |

    Args:
        mode: what is shared.
        cpu_offload: keep parameters, gradients and optimizer state in host memory (``shard_grad_op``, ``full_shard``).
        activation_checkpointing: recompute activations in the backward pass: ``full`` keeps a block's input only,
            ``selective`` the results of matrix products and attention too.
        expert_parallel: processes of a node among which the experts of a layer are divided; tokens travel instead of
            weights.
        mesh: ``[replicate, shard]`` for hybrid modes; ``null`` = a copy per node, shared by its processes.
        reduce_every_micro_batch: share out gradients after every micro-batch, which needs no room for whole gradients,
            or once per step, which needs less traffic; ``null`` = once for ``no_shard``, else every time.
        timeout: seconds without progress on any rank after which the job ends, naming the rank that hangs; a rank
            that is dead or stopped is found within a minute, or sooner if this is less.
        start_timeout: seconds to wait for all ranks at the start; those that are missing are named.
    """

    def __init__(
        self,
        mode: Mode = "full_shard",
        cpu_offload: bool = False,
        activation_checkpointing: Recompute = "none",
        expert_parallel: int = 1,
        mesh: list[int] | None = None,
        reduce_every_micro_batch: bool | None = None,
        timeout: float = 600.0,
        start_timeout: float = 120.0,
        process_group_backend: Literal["gloo", "nccl"] | None = None,
    ) -> None:
        super().__init__(
            data_parallel_size=1,
            tensor_parallel_size=1,
            process_group_backend=process_group_backend,
            # Torch's own, which names nobody, is the last resort.
            timeout=timedelta(seconds=max(2 * timeout, timeout + 60)),
        )
        self.mode = ALIASES.get(mode, mode)
        if cpu_offload and self.mode not in OFFLOADABLE:
            raise UserError(f"trainer.strategy: cpu_offload works with {' and '.join(OFFLOADABLE)}, not with {mode}")
        self.cpu_offload = cpu_offload
        self.activation_checkpointing = activation_checkpointing
        self.expert_parallel = expert_parallel
        self.mesh_asked = mesh
        self.timeout = timeout
        self.start_timeout = start_timeout
        self.watched = False
        self.watchdog: Watchdog | None = None
        self.advice: Callable[[], str] = lambda: ""
        self.status_file: Path | None = None  # where rank 0 writes what all ranks do
        every = self.mode != "no_shard" if reduce_every_micro_batch is None else reduce_every_micro_batch
        self.reduce_every_micro_batch = every
        self.sizes: MeshSizes | None = None

    # ---- the mesh

    def setup_environment(self) -> None:
        """Join the process group and build the mesh; refuses sizes that do not fit, with the numbers."""
        self.sizes = self.plan_mesh()
        reports = self._meet()
        self._setup_distributed()
        if reports and self.watched:
            self._watch(*reports)
        assert self.lightning_module is not None
        self._device_mesh = self._dense_mesh(self.sizes)
        self._expert_mesh = self._make_expert_mesh(self.sizes)
        self.lightning_module._device_mesh = self._device_mesh

    def _configure_launcher(self) -> None:
        assert self.cluster_environment is not None
        self._launcher = RankLauncher(self.cluster_environment, self.num_processes, self.num_nodes)

    @property
    def launch_command(self) -> list[str] | None:
        """What starts the other processes of this machine; None = what started this one."""
        return self._launcher.command if isinstance(self._launcher, RankLauncher) else None

    @launch_command.setter
    def launch_command(self, command: list[str]) -> None:
        assert isinstance(self._launcher, RankLauncher)
        self._launcher.command = command

    def _meet(self) -> tuple[Rendezvous, list[Report]] | None:
        """Wait for all ranks and know them, once per process; None where there is nobody to meet."""
        if self.world_size == self.num_nodes * self.num_processes == 1 or dist.is_initialized():
            return None
        assert self.cluster_environment is not None
        me = Report.of_this_process(self.global_rank, self.world_size, self.num_nodes, self.num_processes)
        address, port = self.cluster_environment.main_address, self.cluster_environment.main_port
        rendezvous = Rendezvous(me, address, port, self.start_timeout)
        return rendezvous, rendezvous.meet()

    def _watch(self, rendezvous: Rendezvous, reports: list[Report]) -> None:
        watchdog = Watchdog(rendezvous, reports, self.timeout, self.advice)
        if self.status_file is not None:
            watchdog.observe = RankStatus(self.status_file)
        watchdog.start()
        self.watchdog = watchdog
        if isinstance(self._launcher, RankLauncher):
            self._launcher.on_death = watchdog.report_death

    @property
    def meshes(self) -> list[DeviceMesh]:
        """All meshes of the job, for the self-check."""
        return [mesh for mesh in (self._device_mesh, self._expert_mesh) if mesh is not None]

    def plan_mesh(self) -> MeshSizes:
        """The mesh that this job's nodes and processes form.

        Raises:
            UserError: it does not fit.
        """
        try:
            return mesh_sizes(self.mode, self.num_nodes, self.num_processes, self.mesh_asked, self.expert_parallel)
        except ValueError as error:
            raise UserError(f"trainer.strategy: {error}") from None

    def _dense_mesh(self, sizes: MeshSizes) -> DeviceMesh:
        device = self.root_device.type
        if sizes.replicate == 1:
            return init_device_mesh(device, (sizes.shard,), mesh_dim_names=("shard",))
        return init_device_mesh(device, (sizes.replicate, sizes.shard), mesh_dim_names=("replicate", "shard"))

    def _make_expert_mesh(self, sizes: MeshSizes) -> DeviceMesh | None:
        if sizes.expert == 1:
            return None
        return init_device_mesh(
            self.root_device.type, sizes.experts, mesh_dim_names=("expert_replicate", "expert_shard", "expert")
        )

    @property
    def distributed_sampler_kwargs(self) -> dict[str, Any]:
        """Every process has its own share of each step; known before the processes have met."""
        return {"num_replicas": self.world_size, "rank": self.global_rank}

    def describe(self) -> str:
        """The mesh in words, for the log."""
        assert self.sizes is not None
        parts = [f"{self.mode}: {self.sizes.replicate} x {self.sizes.shard} (copies x processes that share one)"]
        if self.sizes.expert > 1:
            parts.append(f"experts divided among {self.sizes.expert}")
        if self.cpu_offload:
            parts.append("parameters offloaded to the host")
        if self.activation_checkpointing != "none":
            parts.append(f"{self.activation_checkpointing} activation checkpointing")
        return ", ".join(parts)

    # ---- the model

    def parallelize(self, model: nn.Module, compiled: bool = False) -> None:
        """Divide experts, recompute activations, compile, share parameters: block by block, in this order, in place.

        Args:
            model: on the meta device or not; a decoder with ``layers``.
            compiled: fuse each block by torch.compile.
        """
        if self._expert_mesh is not None:
            divide_experts(model, self._expert_mesh["expert"])
        recompute_blocks(model, self.activation_checkpointing, compiled)
        if compiled:
            compile_blocks(model)
        half = getattr(self.precision_plugin, "precision", None) == "bf16-mixed"
        sharding = Sharding(
            mesh=self.device_mesh,
            expert_mesh=None if self._expert_mesh is None else self._expert_mesh["expert_replicate", "expert_shard"],
            compute_dtype=torch.bfloat16 if half else None,
            reshard_after_forward=self.mode not in KEEPS_GATHERED,
            cpu_offload=self.cpu_offload,
            pin_memory=self.root_device.type == "cuda",
        )
        shard_model(model, sharding)

    def prepare_micro_batch(self, model: nn.Module, is_last: bool) -> None:
        """Tell the blocks whether the coming backward pass ends the step."""
        if self.watchdog is not None:
            self.watchdog.tick()
        prepare_micro_batch(model, is_last, self.reduce_every_micro_batch, keeps_gathered=self.mode in KEEPS_GATHERED)

    @staticmethod
    def reshard(model: nn.Module) -> None:
        """Drop whatever is gathered: a forward pass without a backward pass leaves the root's parameters whole."""
        for module in model.modules():
            if isinstance(module, FSDPModule):
                module.reshard()

    @property
    def parameter_device(self) -> torch.device:
        """Where parameters live between steps."""
        return torch.device("cpu") if self.cpu_offload else self.root_device

    def model_to_device(self) -> None:
        """Parameters are in place already; with offload they must not follow the buffers to the device."""
        if not self.cpu_offload:
            super().model_to_device()
            return
        assert self.model is not None
        for module in self.model.modules():
            for name, buffer in module.named_buffers(recurse=False):
                setattr(module, name, buffer.to(self.root_device))
