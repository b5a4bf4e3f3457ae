"""Preference training and fine-tuning as whole steps."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path

import lightning.pytorch as L
import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "data"))

from chat_tokenizers import byte_level
from ranks import run_ranks

from llmrecipes.checkpoint import load_initial
from llmrecipes.data import ChatExamples, PreferencePairs, Tokenizer
from llmrecipes.distributed import ShardedStrategy
from llmrecipes.errors import UserError
from llmrecipes.models import ModelConfig, init_weights
from llmrecipes.models.lora import adapters_off
from llmrecipes.modules import PreferenceModule, SFTModule, pretrain
from llmrecipes.modules.sft import noise_width
from llmrecipes.optim import AdamW, Constant
from llmrecipes.recipe.lora_config import LoraConfig
from llmrecipes.run.fit import quiet_lightning


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A tokenizer, pairs and conversations."""
    folder = tmp_path_factory.mktemp("preference")
    byte_level(folder / "tokenizer")
    pairs = [
        {"prompt": f"{n} + 1 ?", "chosen": "はい" * (1 + n % 4), "rejected": "いいえ" * (1 + n % 3)} for n in range(40)
    ]
    (folder / "pairs.jsonl").write_text("\n".join(map(json.dumps, pairs)))
    talks = [{"question": pair["prompt"], "answer": pair["chosen"]} for pair in pairs]
    (folder / "talks.jsonl").write_text("\n".join(map(json.dumps, talks)))
    return folder


def config(folder, lora=None):
    vocabulary = Tokenizer(folder / "tokenizer").vocab_size
    return ModelConfig(vocab_size=vocabulary, dim=32, num_layers=2, num_heads=4, num_kv_heads=2, ffn_dim=48, lora=lora)


def load_random(folder, model, may_be_new=None):
    """Stands for a folder of weights: the same numbers for whoever asks."""
    init_weights(model, 11)
    return []


class Double(PreferenceModule):
    """In fp64, where differences are mistakes and not rounding."""

    def build_model(self):
        return super().build_model().double()


class DoubleSFT(SFTModule):
    def build_model(self):
        return super().build_model().double()


def train(
    folder,
    module_class=Double,
    data_class=PreferencePairs,
    steps=3,
    mode=None,
    micro_batch=2,
    more=None,
    lora=None,
    **options,
):
    """Records, validation and parameters of some steps; ``more`` goes to the data."""
    quiet_lightning()
    pretrain.load_initial = load_random
    try:
        module = module_class(config(folder, lora), AdamW(lr=0.01), Constant(), init_from="x", seed=3, **options)
        file = folder / ("pairs.jsonl" if data_class is PreferencePairs else "talks.jsonl")
        data = data_class(
            train={str(file): 1.0}, tokenizer=str(folder / "tokenizer"), seq_len=160, micro_batch=micro_batch,
            global_batch=4, split="80,20", cache=str(folder / "cache"),
            **(more or {}),
        )  # fmt: skip
        records = []

        class Keep(L.Callback):
            def on_train_batch_end(self, trainer, pl_module, *args):
                records.append(pl_module.last_step.as_json())

        trainer = L.Trainer(
            max_steps=steps, max_epochs=-1, accelerator="cpu", devices=1 if mode is None else 2, logger=False,
            strategy="auto" if mode is None else ShardedStrategy(mode=mode, timeout=60), enable_checkpointing=False,
            enable_progress_bar=False, enable_model_summary=False, use_distributed_sampler=False,
            num_sanity_val_steps=0, check_val_every_n_epoch=None, val_check_interval=steps, callbacks=[Keep()],
        )  # fmt: skip
        trainer.fit(module, datamodule=data)
    finally:
        pretrain.load_initial = load_initial
    parameters = {name: p.full_tensor() if mode else p for name, p in module.model.named_parameters()}
    return records, module.validation_metrics, {name: p.detach().clone() for name, p in parameters.items()}


def worst(a, b):
    """The largest difference of any logged figure or parameter.

    Without the share of pairs with a margin above 0 at the first step: all margins are 0 there, but for rounding.
    """
    for records, _, _ in (a, b):
        records[0].pop("rewards/accuracies", None)
    gaps = [abs(x[k] - y[k]) for x, y in zip(a[0], b[0], strict=True) for k in x if isinstance(x[k], float)]
    gaps += [abs(a[1][k] - b[1][k]) for k in a[1]]
    gaps += [float((a[2][k] - b[2][k]).abs().max()) for k in a[2]]
    assert len(gaps) > 20 and a[1].keys() == b[1].keys()
    return max(gaps)


def test_the_first_loss_is_ln_two_and_training_learns_the_preference(place):
    records, validation, _ = train(place, steps=12)
    assert records[0]["loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert records[0]["rewards/margins"] == pytest.approx(0, abs=1e-5)
    assert records[-1]["loss"] < 0.5
    assert records[-1]["rewards/accuracies"] == validation["val_rewards/accuracies"] == 1.0
    assert validation["val_loss"] < 0.6 and validation["val_rewards/margins"] > 0.1
    assert "val_loss/pairs" in validation


@pytest.mark.parametrize("loss", ["sigmoid", "ipo", "orpo"])
def test_micro_batches_and_the_kind_of_reference_make_no_difference(place, loss):
    whole = train(place, micro_batch=4, loss=loss, reference="copy")
    assert worst(whole, train(place, micro_batch=1, loss=loss, reference="copy")) < 1e-12
    assert worst(whole, train(place, micro_batch=2, loss=loss, reference="precomputed")) < 1e-12


def test_sharing_the_prompt_changes_nothing(place):
    """One pair a row, so that both ways have the same pairs in a step."""
    shared, apart = (
        train(place, reference="copy", more={"pack": False, "share_prompts": share}) for share in (True, False)
    )
    for records in (shared[0], apart[0]):
        for record in records:
            record["batch"] = ""  # other rows, of course
    assert worst(shared, apart) < 1e-12


class Cheap(Double):
    """Mutant: the reference follows the policy."""

    def make_reference(self):
        return self.model


def test_mutant_reference_that_moves_is_noticed(place):
    assert worst(train(place, reference="copy"), train(place, Cheap, reference="copy")) > 1e-3


def adapters():
    return LoraConfig(rank=4, alpha=16, targets=".*")


def test_the_reference_with_its_adapters_off_is_a_copy_of_the_beginning(place):
    """Two models or one: the same losses; and the first is ln 2, since B = 0."""
    copy = train(place, reference="copy", lora=adapters(), trainable=["lora"])
    off = train(place, reference="lora_off", lora=adapters())
    assert off[0][0]["loss"] == pytest.approx(math.log(2), abs=1e-12)
    assert off[0][-1]["loss"] < 0.68 and abs(off[0][-1]["rewards/margins"]) > 1e-3
    assert worst(copy, off) < 1e-12
    train(place, reference="lora_off", lora=adapters(), loss="hinge", more={"share_prompts": False})


class AlwaysOn(Double):
    """Mutant: the adapters stay on."""

    def _sums_without_adapters(self, batch):
        return self._sums(self.model, batch)


class StaysOff(Double):
    """Mutant: the policy is without adapters too."""

    def _forward(self, batch):
        with adapters_off(self.model):
            return super()._forward(batch)


def test_mutants_adapters_that_do_not_switch_are_noticed(place):
    off = train(place, reference="lora_off", lora=adapters())
    assert worst(off, train(place, AlwaysOn, reference="lora_off", lora=adapters())) > 1e-3
    with pytest.raises(RuntimeError, match="does not require grad"):  # nothing to train is left
        train(place, StaysOff, reference="lora_off", lora=adapters())


def load_trained(folder, model, may_be_new=None):
    """Stands for a folder whose adapters do something."""
    init_weights(model, 11)
    for name, tensor in model.named_parameters():
        if name.endswith(".lora.down.b"):
            tensor.data.fill_(0.1)
    return []


def test_adapters_off_is_refused_where_it_is_another_model(place):
    for options, problem in (
        ({}, "needs config.lora without experts"),
        ({"lora": adapters(), "trainable": ["all"]}, "trains the adapters alone"),
        ({"lora": adapters(), "frozen": ["norms"]}, "trains the adapters alone"),
    ):
        with pytest.raises(UserError, match=problem):
            train(place, reference="lora_off", **options)
    module = Double(config(place, adapters()), AdamW(lr=0.01), Constant(), init_from="x", reference="lora_off")
    pretrain.load_initial = load_trained
    try:
        with pytest.raises(UserError, match="has trained adapters"):
            module.fill_initial(module.build_model())
    finally:
        pretrain.load_initial = load_initial


LORA_OF = {"copy": None, "precomputed": None, "lora_off": adapters()}


def on_two_ranks(folder, mode, reference):
    return train(folder, mode=mode, micro_batch=1, reference=reference, lora=LORA_OF[reference])


@pytest.mark.parametrize("reference", ["copy", "precomputed", "lora_off"])
def test_two_processes_compute_what_one_does(place, reference):
    for result in run_ranks(2, on_two_ranks, place, "full_shard", reference):
        assert worst(result, train(place, micro_batch=1, reference=reference, lora=LORA_OF[reference])) < 1e-10


def test_what_has_no_effect_or_no_sense_is_refused(place):
    for options, problem in (
        ({"beta": 0.0}, "beta: 0.0 must be above 0"),
        ({"label_smoothing": 0.7}, r"not in \[0, 0.5\)"),
        ({"label_smoothing": 0.1, "loss": "ipo"}, "no effect with loss ipo"),
        ({"data_class": ChatExamples}, "needs llmrecipes.data.PreferencePairs"),
    ):
        with pytest.raises(UserError, match=problem):
            train(place, **options)


# ---- fine-tuning


def test_fine_tuning_learns_to_answer_and_to_stop(place):
    records, validation, _ = train(place, DoubleSFT, ChatExamples, steps=40)
    assert records[0]["loss"] == pytest.approx(math.log(400), rel=0.05)
    assert records[-1]["loss"] < 0.6
    assert validation["val_loss"] < 0.8


def test_noise_on_embeddings_is_of_the_published_size_and_only_in_training(place):
    plain = train(place, DoubleSFT, ChatExamples)
    assert worst(plain, train(place, DoubleSFT, ChatExamples, neftune_alpha=0.0)) == 0
    noisy = train(place, DoubleSFT, ChatExamples, neftune_alpha=5.0)
    assert worst(plain, noisy) > 1e-4
    assert worst(noisy, train(place, DoubleSFT, ChatExamples, neftune_alpha=5.0)) == 0
    from llmrecipes.data.batch import Batch

    tokens = torch.zeros(2, 6, dtype=torch.long)
    width = noise_width(Batch(tokens, tokens, [[4, 2], [6]]), 5.0, 32)
    want = [[4, 4, 4, 4, 2, 2], [6] * 6]
    torch.testing.assert_close(width, 5.0 / (torch.tensor(want) * 32).sqrt())


def test_micro_batches_of_conversations_make_no_difference(place):
    whole = train(place, DoubleSFT, ChatExamples, micro_batch=4)
    assert worst(whole, train(place, DoubleSFT, ChatExamples, micro_batch=1)) < 1e-12
