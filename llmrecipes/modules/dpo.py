"""Preference training: DPO, IPO, hinge, ORPO on pairs of answers."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor, nn

from llmrecipes.data.batch import IGNORE, Batch
from llmrecipes.data.preference_data import PreferenceBatch, PreferencePairs
from llmrecipes.errors import UserError
from llmrecipes.losses import Answers, PreferenceLoss, label_log_probs, preference_loss
from llmrecipes.models import ModelConfig
from llmrecipes.models.lora import adapters_off, is_adapter
from llmrecipes.modules.loss_terms import LossTerm
from llmrecipes.modules.pretrain import PretrainModule
from llmrecipes.modules.reference import reference_log_probs
from llmrecipes.optim import AdamW, Schedule

Reference = Literal["precomputed", "copy", "lora_off"]


class PreferenceModule(PretrainModule):
    """Trains a decoder on pairs of answers; both answers of all pairs of a micro-batch are one packed forward pass.

    Logged beside the loss: ``rewards/chosen``, ``rewards/rejected``, ``rewards/margins`` (means) and
    ``rewards/accuracies`` (share of pairs whose chosen answer has the higher reward): what changed against the
    reference, so all begin at 0. What the model itself thinks: ``logps/chosen``, ``logps/rejected`` (means of the
    answers' log-probabilities) and ``logps/preferred`` (share of pairs whose chosen answer is the likelier one).

    Args:
        config: the decoder's sizes.
        optimizer: how parameters are updated.
        schedule: the learning rate over the run.
        init_from: folder or checkpoint of the model to begin with, which is also the reference.
        loss: ``sigmoid`` (DPO), ``sigmoid_norm`` (by length), ``hinge``, ``ipo`` or ``orpo`` (needs no reference).
        beta: how closely to stay with the reference; weight of the odds ratio for ``orpo``.
        label_smoothing: share of pairs taken to be labelled the wrong way round.
        reference: ``precomputed`` runs the reference once over all pairs before the first step and forgets it;
            ``copy`` keeps it in memory and runs it at every step; ``lora_off`` runs the trained model with its adapters
            switched off: no second model, nothing worked out beforehand (``config.lora``, adapters that are new).
        clip_norm: largest global gradient norm; ``null`` measures without clipping.
        expected_params: refuse to start when the model has another number of parameters.
        loss_chunk: rows of the logits that exist at a time.
        compile: fuse what lies between the matrix products of each block (torch.compile).
        trainable, frozen: groups or regular expressions of parameters, as in ``PretrainModule``: ``frozen: [experts]``
            leaves the experts as they are.
        seed: of dropout; linked to the recipe's ``seed``.
    """

    measured = (
        "rewards/chosen",
        "rewards/rejected",
        "rewards/margins",
        "rewards/accuracies",
        "logps/chosen",
        "logps/rejected",
        "logps/preferred",
    )

    def __init__(
        self,
        config: ModelConfig,
        optimizer: AdamW,
        schedule: Schedule,
        init_from: str,
        loss: PreferenceLoss = "sigmoid",
        beta: float = 0.1,
        label_smoothing: float = 0.0,
        reference: Reference = "precomputed",
        clip_norm: float | None = 1.0,
        expected_params: int | None = None,
        loss_chunk: int = 1024,
        compile: bool = False,
        seed: int = 0,
        trainable: list[str] | None = None,
        frozen: list[str] | None = None,
    ) -> None:
        super().__init__(
            config,
            optimizer,
            schedule,
            clip_norm,
            expected_params,
            loss_chunk,
            init_from,
            compile,
            seed,
            trainable,
            frozen,
        )
        if beta <= 0:
            raise UserError(f"model.beta: {beta} must be above 0")
        if not 0 <= label_smoothing < 0.5:
            raise UserError(f"model.label_smoothing: {label_smoothing} is not in [0, 0.5)")
        if label_smoothing and loss not in ("sigmoid", "sigmoid_norm"):
            raise UserError(f"model.label_smoothing: has no effect with loss {loss}; leave it out")
        if reference == "lora_off":
            _only_adapters(config, trainable, frozen)
            self.trainable = trainable or ["lora"]
        self.loss_kind: PreferenceLoss = loss
        self.beta = beta
        self.label_smoothing = label_smoothing
        self.reference = reference
        # In a list: the reference is not part of what is trained and saved.
        self._reference_model: list[nn.Module] = []
        self._reference_scores: Tensor | None = None

    def configure_model(self) -> None:
        fresh = not hasattr(self, "model")
        super().configure_model()
        needs_model = self.loss_kind != "orpo" and self.reference != "lora_off"
        if fresh and needs_model and self.trainer.state.fn is not None:
            self._reference_model = [self.make_reference()]

    def fill_initial(self, model: Any) -> None:
        """As every stage; adapters that are to be switched off must begin as nothing, else the reference is another.

        Raises:
            UserError: `init_from` has trained adapters.
        """
        super().fill_initial(model)
        if self.reference == "lora_off" and self.loss_kind != "orpo":
            trained = [name for name, tensor in model.named_parameters() if is_adapter(name) and name.endswith(".b")
                       and _any(tensor)]  # fmt: skip
            if trained:
                raise UserError(
                    f"model.reference: lora_off, but {self.init_from} has trained adapters ({trained[0]} and others): "
                    "without them the reference would be another model; fold them first (llmrecipes merge fold), or "
                    "use reference: precomputed"
                )

    def make_reference(self) -> nn.Module:
        """A frozen model with the weights that training begins with."""
        model = self.make_model(compiled=False)
        assert self.init_from is not None
        self.fill_initial(model)
        return model.requires_grad_(False).eval()

    def setup(self, stage: str) -> None:
        """Refuse data of another kind.

        Raises:
            UserError: the recipe's data are no pairs.
        """
        if not isinstance(self.trainer.datamodule, PreferencePairs):  # type: ignore[attr-defined]
            raise UserError("data.class_path: preference training needs llmrecipes.data.PreferencePairs")

    def on_fit_start(self) -> None:
        super().on_fit_start()
        self._prepare_reference()

    def on_validation_start(self) -> None:
        self._prepare_reference()

    def _prepare_reference(self) -> None:
        """Run the reference over all pairs, if that is still to do, and let it go."""
        if not self._reference_model or self._reference_scores is not None:
            return
        model = self._reference_model[0].to(self.device)
        if self.reference == "copy":
            return
        data: Any = self.trainer.datamodule  # type: ignore[attr-defined]
        self._reference_scores = reference_log_probs(
            data, lambda batch: self._sums(model, batch), self.device, lambda: self.forget_gathered(model)
        )
        self._reference_model = []

    # ---- the loss

    def loss_terms(self, batch: Batch) -> dict[str, LossTerm]:
        assert isinstance(batch, PreferenceBatch)
        reference = self._reference(batch)  # before the policy's forward pass: it may be of the same weights
        output = self._forward(batch)
        sums = self._label_sums(self.model, output.hidden, batch)
        policy = self._answers(sums)
        reference = None if reference is None else Answers(*(scores.to(sums.dtype) for scores in reference))
        lengths = self._answers(torch.tensor(batch.answer_lengths, device=self.device))
        losses, rewards = preference_loss(policy, reference, lengths, self.loss_kind, self.beta, self.label_smoothing)
        margins = rewards.chosen - rewards.rejected
        terms = {"loss": LossTerm(losses.sum(), "pairs")}
        values = (
            rewards.chosen,
            rewards.rejected,
            margins,
            (margins > 0).to(margins.dtype),
            policy.chosen.detach(),
            policy.rejected.detach(),
            (policy.chosen > policy.rejected).to(margins.dtype),
        )
        terms |= {name: LossTerm(value.sum(), "pairs", 0.0) for name, value in zip(self.measured, values, strict=True)}
        if output.routing and self.training:
            terms |= self._router_terms(output.routing)
        return terms

    def _reference(self, batch: PreferenceBatch) -> Answers | None:
        if self.loss_kind == "orpo":
            return None
        if self._reference_scores is not None:
            numbers = torch.tensor(batch.pair_numbers, dtype=torch.int64, device=self.device)
            scores = self._reference_scores.index_select(0, numbers)
            return Answers(scores[:, 0], scores[:, 1])
        if self.reference == "lora_off":
            return self._answers(self._sums_without_adapters(batch))
        return self._answers(self._sums(self._reference_model[0], batch))

    @torch.no_grad()
    def _sums(self, model: nn.Module, batch: PreferenceBatch) -> Tensor:
        """Log-probability of every answer of the batch by ``model``: chosen, rejected, chosen, ..."""
        return self._label_sums(model, self.run_model(model, batch).hidden, batch)

    def _sums_without_adapters(self, batch: PreferenceBatch) -> Tensor:
        training = self.model.training
        try:
            with adapters_off(self.model.eval()):
                return self._sums(self.model, batch)
        finally:
            self.model.train(training)
            # Weights that autocast cast here were cast without a graph and must not be found by the policy's forward.
            torch.clear_autocast_cache()

    def _label_sums(self, model: Any, hidden: Tensor, batch: PreferenceBatch) -> Tensor:
        labels = batch.labels.flatten()
        trained = (labels != IGNORE).nonzero()[:, 0]
        scores = label_log_probs(
            hidden.flatten(0, 1).index_select(0, trained),
            model.head_weight,
            labels.index_select(0, trained),
            self.loss_chunk,
            self.config.vocab_size,
        )
        if not batch.answer_lengths:
            return scores.sum()[None][:0]
        # split and sum, not a scattered addition: the same bits every time
        return torch.stack([part.sum() for part in scores.split(batch.answer_lengths)])

    @staticmethod
    def _answers(both: Tensor) -> Answers:
        return Answers(both[0::2], both[1::2])


def _only_adapters(config: ModelConfig, trainable: list[str] | None, frozen: list[str] | None) -> None:
    """The weights beneath the adapters are the reference: they must stay.

    Raises:
        UserError: there are no adapters of one's own, or other weights are trained.
    """
    if config.lora is None or config.lora.experts is not None:
        raise UserError("model.reference: lora_off needs config.lora without experts: adapters that this run trains")
    if trainable not in (None, ["lora"]) or frozen:
        raise UserError("model.reference: lora_off trains the adapters alone; leave out trainable and frozen")


def _any(tensor: Tensor) -> bool:
    """Whether a parameter, whole or sharded, holds anything but zeros. Collective where it is sharded."""
    whole = tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
    return bool(whole.any())
