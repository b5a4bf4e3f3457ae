"""One expert: low-rank adapters trained on one domain, the model beneath them frozen."""

from __future__ import annotations

from llmrecipes.errors import UserError
from llmrecipes.models import ModelConfig
from llmrecipes.modules.pretrain import PretrainModule
from llmrecipes.optim import AdamW, Schedule
from llmrecipes.recipe import Duration


class LoraExpertModule(PretrainModule):
    """Trains the adapters of ``config.lora`` and nothing else; checkpoints hold them alone.

    Args:
        config: the decoder's sizes, with ``lora``.
        optimizer: how parameters are updated.
        schedule: the learning rate over the run.
        init_from: the model to adapt: a folder of ``convert from-hf``, ``upcycle`` or ``consolidate``, or another run.
            It must stay, unchanged, for as long as the checkpoints are to be of use.
        clip_norm: largest global gradient norm; ``null`` measures without clipping.
        expected_params: refuse to start when the model, with or without adapters, has another number of parameters.
        loss_chunk: rows of the logits that exist at a time.
        trainable: what is trained, as in `PretrainModule`; ``null`` = the adapters.
        token_budget: tokens of the run: ``trainer.max_steps`` must come to as many.
        seed: of the adapters and of dropout; linked to the recipe's ``seed``.
    """

    def __init__(
        self,
        config: ModelConfig,
        optimizer: AdamW,
        schedule: Schedule,
        init_from: str | None = None,
        clip_norm: float | None = 1.0,
        expected_params: int | None = None,
        loss_chunk: int = 1024,
        trainable: list[str] | None = None,
        token_budget: Duration | None = None,
        seed: int = 0,
    ) -> None:
        if config.lora is None:
            raise UserError("model.init_args.config: LoraExpertModule needs lora, for example {rank: 16, alpha: 32}")
        super().__init__(
            config,
            optimizer,
            schedule,
            clip_norm,
            expected_params,
            loss_chunk,
            init_from,
            seed=seed,
            trainable=trainable or ["lora"],
        )
        self.token_budget = token_budget  # looked at by llmrecipes check, before anything starts
