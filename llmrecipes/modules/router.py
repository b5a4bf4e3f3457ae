"""Training of the routers of a merged model, the experts frozen."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from llmrecipes.data.batch import Batch
from llmrecipes.distributed import packed_sum
from llmrecipes.errors import UserError
from llmrecipes.models import DecoderOutput, ModelConfig
from llmrecipes.models.router import Router
from llmrecipes.modules.pretrain import PretrainModule
from llmrecipes.optim import AdamW, Schedule
from llmrecipes.recipe import Duration


class RouterModule(PretrainModule):
    """Trains the routers of a mixture, by default nothing else, and shows which domain goes to which expert.

    Args:
        config: the decoder's sizes, with ``moe`` or ``lora.experts``.
        optimizer: how parameters are updated.
        schedule: the learning rate over the run.
        init_from: the merged model: a folder of ``merge``, or another run. It must stay, unchanged, for as long as the
            checkpoints are to be of use.
        trainable: what is trained, as in `PretrainModule`; ``null`` = [gate]. [gate, lm_head] and [all] are the others
            that the source document tried.
        clip_norm: largest global gradient norm; ``null`` measures without clipping.
        expected_params: refuse to start when the model, with or without adapters, has another number of parameters.
        loss_chunk: rows of the logits that exist at a time.
        token_budget: tokens of the run: ``trainer.max_steps`` must come to as many.
        seed: of dropout; linked to the recipe's ``seed``.

    Attributes:
        validation_routing: per validation set the share of each expert, [routers, choices], after a validation.
    """

    def __init__(
        self,
        config: ModelConfig,
        optimizer: AdamW,
        schedule: Schedule,
        init_from: str | None = None,
        trainable: list[str] | None = None,
        clip_norm: float | None = 1.0,
        expected_params: int | None = None,
        loss_chunk: int = 1024,
        token_budget: Duration | None = None,
        seed: int = 0,
    ) -> None:
        if config.routing is None:
            raise UserError("model.init_args.config: RouterModule needs experts: moe, or lora with experts")
        if len(set(config.router_choices)) > 1:
            raise UserError("model.init_args.config: RouterModule needs as many experts in each layer as in the others")
        super().__init__(
            config,
            optimizer,
            schedule,
            clip_norm,
            expected_params,
            loss_chunk,
            init_from,
            seed=seed,
            trainable=trainable or ["gate"],
        )
        self.token_budget = token_budget  # looked at by llmrecipes check, before anything starts
        self.validation_routing: dict[str, Tensor] = {}
        self._validation_set = 0
        self._routed: dict[int, Tensor] = {}

    def _may_be_new(self, name: str) -> bool:
        return False  # adapters that do nothing are not worth a router

    def on_validation_epoch_start(self) -> None:
        super().on_validation_epoch_start()
        self._routed = {}

    def validation_step(self, batch: Batch, batch_idx: int, dataloader_idx: int = 0) -> None:
        self._validation_set = dataloader_idx
        super().validation_step(batch, batch_idx, dataloader_idx)

    def _forward(self, batch: Batch) -> DecoderOutput:
        output = super()._forward(batch)
        if not self.training:
            counts = torch.stack([routing.counts for routing in output.routing])
            before = self._routed.get(self._validation_set)
            self._routed[self._validation_set] = counts if before is None else before + counts
        return output

    def on_validation_epoch_end(self) -> None:
        """Also the routing per validation set, over all ranks; a rank that saw nothing of a set adds zeros."""
        super().on_validation_epoch_end()
        names: list[str] = self.trainer.datamodule.valid_names  # type: ignore[attr-defined]
        choices = self.config.router_choices
        nothing = torch.zeros(len(choices), choices[0], dtype=torch.int64, device=self.device)
        counts = packed_sum({name: self._routed.get(i, nothing) for i, name in enumerate(names)}, self.device)
        self.validation_routing = {
            name: (count.double() / count.sum(-1, keepdim=True).clamp_min(1)).cpu() for name, count in counts.items()
        }

    @property
    def router_names(self) -> list[str]:
        """One per router, in the order of the forward pass: ``layer.map`` or ``layer``."""
        names = [name for name, module in self.model.named_modules() if isinstance(module, Router)]
        return [short_name(name) for name in names]

    @property
    def expert_names(self) -> list[str]:
        """One per choice; the null expert is the seed."""
        assert self.config.routing is not None
        experts = None if self.config.lora is None else self.config.lora.experts
        names: list[Any] = list(range(self.config.router_choices[0]))
        if experts is not None and experts.null_expert:
            names[-1] = "seed"
        return [str(name) for name in names]


def short_name(module: str) -> str:
    """``layers.0.mlp.gate_up.lora.up.router`` -> ``0.up``; ``layers.0.mlp.gate`` -> ``0``."""
    parts = module.split(".")
    inner = {"lora", "experts"} & set(parts)
    return f"{parts[1]}.{parts[-2].removesuffix('_proj')}" if inner else parts[1]
