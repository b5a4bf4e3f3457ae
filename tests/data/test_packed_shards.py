"""The DataModule: the same global step for any number of ranks, all mistakes at once, constant time at any size."""

from __future__ import annotations

import json
import resource
import struct
import time
from pathlib import Path
from types import SimpleNamespace

import lightning.pytorch as L
import numpy as np
import pytest
import torch

from llmrecipes.data import PackedShards
from llmrecipes.data.batch import IGNORE, Batch
from llmrecipes.errors import UserError


def ranked(data: PackedShards, rank: int, ranks: int) -> PackedShards:
    strategy = SimpleNamespace(distributed_sampler_kwargs={"rank": rank, "num_replicas": ranks})
    data.trainer = SimpleNamespace(strategy=strategy, max_steps=10)  # type: ignore[assignment]
    data.prepare_data()
    data.setup("fit")
    return data


@pytest.fixture
def two(make_shard) -> dict[str, float]:
    return {make_shard("ja", documents=900, seed=1)[0]: 0.7, make_shard("en", documents=900, seed=2)[0]: 0.3}


def module(train: dict[str, float], **changes) -> PackedShards:
    options = {"seq_len": 16, "micro_batch": 2, "global_batch": 8, "split": "8,1,1"} | changes
    return PackedShards(train, **options)


@pytest.mark.parametrize("mask", [True, False])
def test_any_number_of_ranks_sees_the_same_step(two, mask):
    whole = ranked(module(two, document_mask=mask), 0, 1)
    seen = 0
    for step in (0, 1, 50, 10**6):
        batch = whole.step_batch(step)
        for ranks in (2, 4):
            parts = [ranked(module(two, document_mask=mask), r, ranks).step_batch(step) for r in range(ranks)]
            assert torch.equal(torch.cat([p.tokens for p in parts]), batch.tokens)
            assert torch.equal(torch.cat([p.labels for p in parts]), batch.labels)
            lengths = [p.document_lengths for p in parts]
            assert (sum(lengths, []) if mask else None) == batch.document_lengths  # noqa: RUF017
            seen += 1
        mutant = ranked(module(two, document_mask=mask, seed=1), 0, 1).step_batch(step)
        assert not torch.equal(mutant.tokens, batch.tokens)
    assert seen == 8


def test_stream_resumes_where_it_was(two):
    data = ranked(module(two), 0, 1)
    stream = iter(data.train_dataloader())
    digests = [next(stream).digest() for _ in range(20)]
    assert len(set(digests)) == 20
    for start in (0, 7, 19):
        again = ranked(module(two), 0, 1)
        again.start_step = start
        stream = iter(again.train_dataloader())
        assert [next(stream).digest() for _ in range(start, 20)] == digests[start:]


def test_kept_batches_are_not_overwritten(two):
    """Buffers are used again only when nobody holds the batch, nor a view of it."""
    data = ranked(module(two), 0, 1)
    kept = [data.step_batch(s) for s in range(12)]
    views = [data.step_batch(s).rows(1, 3).labels for s in range(12)]
    for s in range(12):
        fresh = ranked(module(two), 0, 1).step_batch(s)
        assert kept[s].digest() == fresh.digest() and torch.equal(views[s], fresh.labels[1:3])
    del kept, views
    first = data.step_batch(0).tokens.data_ptr()
    assert data.step_batch(1).tokens.data_ptr() == first


def test_validation_is_the_same_for_any_number_of_ranks(two):
    results = []
    for ranks in (1, 2, 3, 4):
        per_set: dict[str, list] = {}
        for rank in range(ranks):
            data = ranked(module(two, valid_batches=4, global_batch=24), rank, ranks)
            assert data.valid_names == ["ja", "en"]
            for name, valid in zip(data.valid_names, data.val_dataloader(), strict=True):
                batches = list(valid)
                assert len(batches) == len(valid) == -(-8 // ranks // 2)
                rows = [tuple(r.tolist()) for b in batches for r in b.labels if (r != IGNORE).any()]
                per_set.setdefault(name, []).extend(rows)
        results.append(per_set)
    assert all(r == results[0] for r in results) and [len(v) for v in results[0].values()] == [8, 8]


def test_validation_tokens_are_never_trained(make_shard):
    prefix, _ = make_shard(documents=400)
    data = ranked(module({prefix: 1.0}, valid_batches=1000), 0, 1)
    train, valid = data._train_sources[0], data._valid_sources["ja"]
    assert train.stop == valid.start and valid.stop < data._shards[prefix].num_tokens
    assert sum(b.num_rows for b in data.val_dataloader()[0]) == len(valid)


def test_named_validation_sets(two, make_shard):
    other = make_shard("novel", documents=50, seed=5)[0]
    data = ranked(module(two, valid={"novels": other}), 0, 1)
    assert data.valid_names == ["novels"] and len(data.val_dataloader()[0]) > 0
    assert ranked(module(two, split="1"), 0, 1).val_dataloader() == []


def test_domains_that_are_not_trained_on_are_validated_on(two):
    """On the very windows that a run of all domains holds out, and its steps are those of the one domain alone."""
    ja, en = two
    everything, alone = ranked(module(two), 0, 1), ranked(module({ja: 1.0}), 0, 1)
    data = ranked(module({ja: 1.0}, valid_from=[ja, en]), 0, 1)
    assert data.valid_names == everything.valid_names == ["ja", "en"] and alone.valid_names == ["ja"]
    for mine, theirs in zip(data.val_dataloader(), everything.val_dataloader(), strict=True):
        assert all(torch.equal(a.tokens, b.tokens) for a, b in zip(mine, theirs, strict=True)) and len(mine) > 2
    assert torch.equal(data.step_batch(3).tokens, alone.step_batch(3).tokens)
    assert data.fingerprint() == alone.fingerprint()
    with pytest.raises(UserError, match=r"valid_from: has no effect beside data\.valid"):
        module({ja: 1.0}, valid_from=[en], valid={"en": en}).setup("fit")
    with pytest.raises(UserError, match="leaves no validation part"):
        module({ja: 1.0}, valid_from=[en], split="1").setup("fit")
    with pytest.raises(UserError, match="nowhere"):
        module({ja: 1.0}, valid_from=["nowhere"]).setup("fit")


def test_facts(two):
    data = ranked(module(two), 0, 1)
    assert (data.tokens_per_step, data.vocab_size, data.eos_id) == (128, 1000, 2)
    ja, en = json.loads(json.dumps(data.fingerprint()))["train"]
    assert (ja["name"], ja["weight"]) == ("ja", 0.7) and ja["checksum"] != en["checksum"]
    assert (
        len(data.describe()) == 4 and "share 70.0%" in data.describe()[0] and "epochs in 10 steps" in data.describe()[0]
    )


def test_all_problems_at_once(make_shard, tmp_path):
    a, b = make_shard("a")[0], make_shard("b", vocab=900, tokenizer="b" * 64)[0]
    with pytest.raises(UserError) as error:
        module({a: 1.0, b: -1.0, f"{tmp_path}/none": 1.0}, seq_len=0, split="x").setup("fit")
    assert len(error.value.problems) == 4
    with pytest.raises(UserError) as error:
        module({a: 1.0, b: 1.0}, vocab_size=950).setup("fit")
    text = str(error.value)
    assert "b: written with tokenizer unigram (bbbbbbbbbbbb)" in text and "vocab_size is 900" in text
    assert "a: its tokenizer has 1000 ids, data.vocab_size is 950" in text
    with pytest.raises(UserError) as error:
        module({a: 1.0, make_shard("c", seed=3)[0]: 1.0}, seq_len=100_000).setup("fit")
    assert len(error.value.problems) == 4  # both sources, both parts
    damaged = [Path(f"{make_shard(name, seed=4)[0]}.bin") for name in ("d", "e")]
    for path in damaged:
        path.write_bytes(path.read_bytes()[:-2] + b"\x03\x00")
    with pytest.raises(UserError) as error:
        module({str(path.with_suffix("")): 1.0 for path in damaged}).prepare_data()
    assert [p.split(": wrong checksum")[0] for p in error.value.problems] == [str(p) for p in damaged]


def test_batch_must_divide(two):
    with pytest.raises(UserError, match=r"8 is not divisible by micro_batch x data ranks = 2 x 3 = 6"):
        ranked(module(two), 0, 3)


def test_without_manifest(make_shard):
    prefix, _ = make_shard()
    Path(f"{prefix}.json").unlink()
    with pytest.raises(UserError, match=r"give data.vocab_size or data.tokenizer"):
        module({prefix: 1.0}).setup("fit")
    data = ranked(module({prefix: 1.0}, vocab_size=1000), 0, 1)
    assert data.notes == [f"{prefix}: no manifest: tokenizer and checksums not verified"] and data.eos_id is None
    with pytest.raises(UserError, match=r"ja\.bin: id \d+ .* vocabulary size 900"):
        ranked(module({prefix: 1.0}, vocab_size=900), 0, 1)
    unchecked = module({prefix: 1.0}, vocab_size=500)
    unchecked.setup("fit")  # without prepare_data no id is scanned: the batch still refuses
    with pytest.raises(UserError, match=r"ja\.bin: id \d+ in windows \["):
        unchecked.step_batch(0)


def test_a_trillion_tokens(tmp_path):
    """2 TB of (sparse) ids in a million documents: first batch under a second, nothing grows."""
    documents, length = 10**6, 10**6
    prefix = tmp_path / "huge"
    try:
        with open(f"{prefix}.bin", "wb") as file:
            file.truncate(2 * documents * length)
    except OSError as error:
        pytest.skip(f"this file system has no sparse file of 2 TB: {error}")
    with open(f"{prefix}.idx", "wb") as file:
        file.write(b"MMIDIDX\x00\x00" + struct.pack("<QBQQ", 1, 8, documents, documents + 1))
        np.full(documents, length, "<i4").tofile(file)
        (np.arange(documents, dtype="<i8") * 2 * length).tofile(file)
        np.arange(documents + 1, dtype="<i8").tofile(file)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    start = time.perf_counter()
    data = PackedShards({str(prefix): 1.0}, seq_len=2048, micro_batch=8, global_batch=64, vocab_size=100)
    data.prepare_data()
    assert data.step_batch(0).tokens.shape == (64, 2048)
    first = time.perf_counter() - start
    for step in (10**6, 10**6 + 1, 7 * 10**6, 10**9):  # the last is in a later epoch
        data.step_batch(step)
    assert first < 1.0
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 60_000  # KB; a shuffle index would take 4 GB
    assert data._order is not None and data._order.lengths[0] > 4 * 10**8


class Counting(L.LightningModule):
    """Collects what the Trainer hands over."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.weight = torch.nn.Parameter(torch.zeros(1))
        self.digests: list[str] = []
        self.validated: list[int] = []

    def training_step(self, batch: Batch, batch_idx: int) -> None:
        self.digests.append(batch.digest())
        optimizer = self.optimizers()
        optimizer.zero_grad()
        self.manual_backward(self.weight.sum() * batch.num_targets)
        optimizer.step()

    def validation_step(self, batch: Batch, batch_idx: int, dataloader_idx: int = 0) -> None:
        self.validated.append(dataloader_idx)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def test_in_a_real_trainer(two, tmp_path):
    def run(start: int, steps: int) -> Counting:
        data, model = module(two, valid_batches=2), Counting()
        data.start_step = start
        trainer = L.Trainer(
            max_steps=steps, max_epochs=-1, val_check_interval=3, check_val_every_n_epoch=None, accelerator="cpu",
            devices=1, use_distributed_sampler=False, logger=False, enable_checkpointing=False,
            enable_progress_bar=False, enable_model_summary=False, num_sanity_val_steps=0, default_root_dir=tmp_path,
        )  # fmt: skip
        trainer.fit(model, data)
        assert trainer.global_step == steps
        return model

    whole = run(0, 8)
    assert len(whole.digests) == 8 and whole.validated == [0, 0, 1, 1] * 2
    assert run(5, 3).digests == whole.digests[5:]
