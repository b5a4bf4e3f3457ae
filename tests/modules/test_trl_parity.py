"""Losses and gradients of fine-tuning and DPO against TRL's: golden files, and an oracle that runs TRL."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from peers import peer_packages, run_with_peer
from safetensors.torch import load_file

sys.path.insert(0, str(Path(__file__).parents[1] / "data"))

from chat_tokenizers import byte_level

from llmrecipes.convert.folder import read_model
from llmrecipes.convert.names import parts
from llmrecipes.data import ChatExamples, PreferencePairs
from llmrecipes.modules import PreferenceModule, SFTModule
from llmrecipes.optim import AdamW, Constant

GOLDEN = Path(__file__).parents[1] / "golden" / "trl"
TEMPLATE = (
    "{% for m in messages %}{% if m.role == 'user' %}{{ '<|im_start|>' + m.content + '\n' }}"
    "{% else %}{{ m.content + '<|im_end|>' }}{% endif %}{% endfor %}"
)
PAIRS = [
    {"prompt": f"{n} + {n % 3} ?", "chosen": "はい" * (1 + n % 4) + str(n), "rejected": "いいえ" * (1 + n % 3)}
    for n in range(6)
]


def prepare(folder):
    """What both sides read."""
    byte_level(folder / "tokenizer", TEMPLATE)
    (folder / "pairs.jsonl").write_text("\n".join(map(json.dumps, PAIRS)))
    talks = [{"question": pair["prompt"], "answer": pair["chosen"]} for pair in PAIRS]
    (folder / "talks.jsonl").write_text("\n".join(map(json.dumps, talks)))
    return folder


def batch_of(folder, kind, file, cache, **options):
    """All examples as one batch."""
    data = kind(
        train={str(folder / file): 1.0}, tokenizer=str(folder / "tokenizer"), seq_len=128, micro_batch=1,
        global_batch=1, split="100", cache=str(cache), **options,
    )  # fmt: skip
    alone = {"num_replicas": 1, "rank": 0}
    data.trainer = SimpleNamespace(strategy=SimpleNamespace(distributed_sampler_kwargs=alone), max_steps=1)
    data.setup("fit")
    (rows,) = data._train_sources
    return data._collate([rows], np.zeros(len(rows), np.int64), np.arange(len(rows)))


def ours(folder, cache, loss, mutant=lambda batch: None, **options):
    """Loss and gradients by their names."""
    policy = read_model(folder / "policy")
    values = {"optimizer": AdamW(lr=0.1), "schedule": Constant(), "init_from": "unused", "loss_chunk": 7}
    if loss == "sft":
        module = SFTModule(policy.config, **values)
        batch = batch_of(folder, ChatExamples, "talks.jsonl", cache)
    else:
        kind = loss.removeprefix("dpo_")
        module = PreferenceModule(policy.config, loss=kind, beta=0.3, reference="copy", **values)
        module._reference_model = [read_model(folder / "reference").model]
        batch = batch_of(folder, PreferencePairs, "pairs.jsonl", cache, **options)
    mutant(batch)
    module.model = policy.model.requires_grad_(True).train()
    term = module.loss_terms(batch)["loss"]
    mean = term.sum / batch.counts()[term.per]
    mean.backward()
    grads = {name: p.grad for name, p in module.model.named_parameters()}
    found = {part.theirs: part.to_theirs(part.rows_of(grads[part.ours])) for part in parts(policy.config)}
    return mean.item(), found


def furthest(folder, cache, loss, **options):
    """The largest difference of the loss and of any gradient, and how many gradients were compared."""
    theirs = load_file(folder / "trl.safetensors")
    mean, grads = ours(folder, cache, loss, **options)
    gaps = [abs(mean - theirs[f"{loss}/loss"].item())]
    names = [name.removeprefix(f"{loss}/") for name in theirs if name.startswith(f"{loss}/") and name != f"{loss}/loss"]
    gaps += [float((grads[name] - theirs[f"{loss}/{name}"]).abs().max()) for name in names]
    return max(gaps), len(names)


LOSSES = ("sft", "dpo_sigmoid", "dpo_hinge", "dpo_ipo")


@pytest.mark.parametrize("loss", LOSSES)
def test_losses_and_gradients_are_those_of_trl(loss, tmp_path):
    folder = shutil.copytree(GOLDEN, tmp_path / "golden")
    prepare(folder)
    difference, compared = furthest(folder, tmp_path / "cache", loss)
    assert compared == 11
    assert difference < 1e-5
    if loss != "sft":
        assert furthest(folder, tmp_path / "cache", loss, share_prompts=False)[0] < 1e-5


def without_the_end(batch):
    """Mutant: the piece that ends an answer is not trained on."""
    ends = batch.labels == 2  # <|im_end|>, the third special piece of the tokenizer
    assert ends.sum() == len(PAIRS)
    batch.labels[ends] = -100


def with_the_prompt(batch):
    """Mutant: prompts are trained on."""
    real = batch.token_mask[:, 1:] & (batch.labels[:, :-1] == -100)
    batch.labels[:, :-1][real] = batch.tokens[:, 1:][real]


@pytest.mark.parametrize("mutant", [without_the_end, with_the_prompt])
def test_mutant_masks_are_noticed(mutant, tmp_path):
    folder = prepare(shutil.copytree(GOLDEN, tmp_path / "golden"))
    assert furthest(folder, tmp_path / "cache", "sft", mutant=mutant)[0] > 1e-3


@pytest.mark.oracle
def test_the_golden_file_is_what_trl_computes(tmp_path, tmp_path_factory):
    packages = peer_packages(tmp_path_factory, "trl==1.16.0", "accelerate==1.15.0", "peft==0.21.2", "psutil")
    folder = prepare(tmp_path)
    run_with_peer(packages, Path(__file__).with_name("trl_peer.py"), folder)
    golden, fresh = (load_file(place / "trl.safetensors") for place in (GOLDEN, folder))
    assert golden.keys() == fresh.keys()
    for name, values in golden.items():
        torch.testing.assert_close(fresh[name], values, rtol=0, atol=1e-6)
