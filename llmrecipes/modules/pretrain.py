"""Pretraining: next-token cross-entropy of a dense or mixture-of-experts decoder."""

from __future__ import annotations

from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llmrecipes.checkpoint import load_initial
from llmrecipes.data.batch import Batch
from llmrecipes.distributed import all_reduce_sum
from llmrecipes.errors import UserError
from llmrecipes.losses import balance_sum, bias_update, linear_cross_entropy
from llmrecipes.models import Decoder, DecoderOutput, ModelConfig, Routing, init_weights
from llmrecipes.models.lora import is_adapter
from llmrecipes.models.router import Router
from llmrecipes.modules.base import StepModule
from llmrecipes.modules.loss_terms import LossTerm
from llmrecipes.modules.routing_stats import StepRouting, expert_counts, routing_figures
from llmrecipes.modules.step_record import StepRecord
from llmrecipes.modules.trainable import frozen_active, set_trainable
from llmrecipes.optim import AdamW, Schedule


class PretrainModule(StepModule):
    """Trains a decoder on packed token shards.

    Args:
        config: the decoder's sizes.
        optimizer: how parameters are updated.
        schedule: the learning rate over the run.
        clip_norm: largest global gradient norm; ``null`` measures without clipping.
        expected_params: refuse to start when the model has another number of parameters; a forgotten size is a lost
            month.
        loss_chunk: rows of the logits that exist at a time.
        init_from: folder or checkpoint whose weights the run begins with, of ``convert from-hf``, ``upcycle``,
            ``consolidate`` or another run; ``null`` = drawn from the seed. Adapters may be missing there.
        compile: fuse what lies between the matrix products of each block (torch.compile; needs a C++ compiler on a
            CPU): a faster step, for half a minute at the start.
        trainable: what is trained: names of groups (``all``, ``gate``, ``lm_head``, ``lora``, ``experts``, ``mlp``,
            ``attention``, ``norms``, ``embeddings``), or regular expressions on our parameter names; ``null`` = all.
        frozen: what of it is not, in the same way.
        seed: of the initial weights and of dropout; linked to the recipe's ``seed``.
    """

    def __init__(
        self,
        config: ModelConfig,
        optimizer: AdamW,
        schedule: Schedule,
        clip_norm: float | None = 1.0,
        expected_params: int | None = None,
        loss_chunk: int = 1024,
        init_from: str | None = None,
        compile: bool = False,
        seed: int = 0,
        trainable: list[str] | None = None,
        frozen: list[str] | None = None,
    ) -> None:
        super().__init__(optimizer, schedule, clip_norm, seed, compile)
        self.config = config
        self.loss_chunk = loss_chunk
        self.init_from = init_from
        self.trainable = ["all"] if trainable is None else trainable
        self.frozen = frozen or []
        if expected_params is not None and not config.is_expected(expected_params):
            raise UserError(f"the model has {config.num_params:,} parameters, expected_params says {expected_params:,}")
        self._routing: StepRouting | None = None

    def build_model(self) -> Decoder:
        model = Decoder(self.config)
        set_trainable(model, self.trainable, self.frozen)
        return model

    def init_model(self) -> None:
        if self.init_from is None:
            init_weights(self.model, self.seed)
            return
        self.fill_initial(self.model)

    def fill_initial(self, model: Decoder) -> None:
        """The weights of `init_from`, and adapters that do nothing yet where it has none."""
        assert self.init_from is not None
        lacking = load_initial(Path(self.init_from), model, self._may_be_new)
        init_weights(model, self.seed, lacking)

    def _may_be_new(self, name: str) -> bool:
        """Adapters begin as nothing wherever they are added; a router does not."""
        return is_adapter(name)

    @property
    def initial_folder(self) -> Path | None:
        return None if self.init_from is None else Path(self.init_from)

    @property
    def keeps_base(self) -> bool:
        return self.trained_params < self.config.num_params

    @cached_property
    def trained_params(self) -> int:
        """Parameters that the run trains."""
        if self.trainable == ["all"] and not self.frozen:
            return self.config.num_params
        with torch.device("meta"):
            return sum(p.numel() for p in self.build_model().parameters() if p.requires_grad)

    def flops_per_token(self, seq_len: int) -> int:
        """Training FLOPs of one token: a frozen weight has no gradient of its own, 2 of the 6 per active weight."""
        return self.config.flops_per_token(seq_len) - 2 * frozen_active(self.model, self.config)

    def _forward(self, batch: Batch) -> DecoderOutput:
        return self.run_model(self.model, batch)

    @staticmethod
    def run_model(model: Any, batch: Batch) -> DecoderOutput:
        """The forward pass of a micro-batch."""
        return model(
            batch.tokens,
            document_lengths=batch.document_lengths,
            document_prefixes=batch.document_prefixes,
            token_mask=batch.token_mask,
        )

    def loss_terms(self, batch: Batch) -> dict[str, LossTerm]:
        output = self._forward(batch)
        loss, _ = linear_cross_entropy(
            output.hidden.flatten(0, 1),
            self.model.head_weight,
            batch.labels.flatten(),
            self.loss_chunk,
            self.config.vocab_size,
        )
        terms = {"loss": LossTerm(loss, "targets")}
        if output.routing and self.training:
            terms |= self._router_terms(output.routing)
        return terms

    def _router_terms(self, routing: list[Routing]) -> dict[str, LossTerm]:
        """Balance loss with f of the whole step, z-loss; both means over layers and real tokens."""
        moe, step = self.config.routing, self._routing
        assert moe is not None
        assert step is not None
        step.add(routing)
        z = torch.stack([r.z_sum for r in routing]).mean()
        terms = {"z_loss": LossTerm(z, "tokens", moe.z_loss_coef)}
        if moe.balance != "loss":
            return terms
        counts, tokens = step.counts_for_loss()
        balance = [balance_sum(r.prob_sum, counts[i], tokens, moe.top_k) for i, r in enumerate(routing)]
        return terms | {"aux_loss": LossTerm(torch.stack(balance).mean(), "tokens", moe.balance_coef)}

    def before_micro_batches(self, micro_batches: list[Batch], counts: dict[str, Tensor]) -> None:
        moe = self.config.routing
        if moe is None:
            return
        self._routing = StepRouting(counts["tokens"], self.config.router_choices)
        if moe.balance == "loss" and moe.balance_counts == "step" and len(micro_batches) > 1:
            self._routing.known = all_reduce_sum(self._count_share(micro_batches))

    @torch.no_grad()
    def _count_share(self, micro_batches: list[Batch]) -> Tensor:
        """Tokens per expert of this rank's share, [experts of all layers], by one more forward with the randomness to
        come: dropout's and that of dropped tokens."""
        total: Tensor | None = None
        for i, batch in enumerate(micro_batches):
            self.seed_micro_batch(self.trainer.global_step, micro_batches[0].first_row // self.micro_batch + i)
            counts = expert_counts(self._forward(batch).routing)
            total = counts if total is None else total + counts
        # Weights that autocast cast here were cast without a graph and must not be found by the forward that needs one.
        torch.clear_autocast_cache()
        assert total is not None
        return total

    def step_sums(self) -> dict[str, Tensor]:
        return self._routing.sums() if self._routing is not None else {}

    def after_step(self, record: StepRecord, sums: dict[str, Tensor], applied: Tensor) -> None:
        moe = self.config.routing
        if moe is None:
            return
        if moe.balance == "bias":
            self._move_routing_bias(sums["counts"], moe.bias_rate, applied)
        record.extra |= routing_figures(sums, self.config.router_choices, moe)

    @torch.no_grad()
    def _move_routing_bias(self, counts: Tensor, rate: float, applied: Tensor) -> None:
        """Once per step, so that neither micro-batches nor recomputation count twice.

        ``counts`` [choices of all routers] are the whole step's; a step that was not ``applied`` moves nothing.
        """
        routers = [module for module in self.model.modules() if isinstance(module, Router)]
        for router, mine in zip(routers, counts.split(self.config.router_choices), strict=True):
            router.bias.add_(bias_update(mine, rate) * applied)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        raise UserError("Lightning's own checkpoints are not written here: the recipe's section checkpoint does it")
