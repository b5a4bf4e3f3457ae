"""Conversations to rows: what is trained on, what is refused, and nothing lost between."""

from __future__ import annotations

import gzip
import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import zstandard
from chat_tokenizers import CHATML, LLAMA2, byte_level, pieces

from llmrecipes.data import ChatExamples, PreferencePairs, Tokenizer
from llmrecipes.data.batch import IGNORE
from llmrecipes.data.chat_examples import ChatEncoder, Counts, best_fit
from llmrecipes.data.chat_template import NAMED, find_template
from llmrecipes.data.conversations import messages_of
from llmrecipes.data.preference_data import pair_of
from llmrecipes.errors import UserError

TALK = [
    {"role": "system", "content": "短く。"},
    {"role": "user", "content": "12 + 7 ?"},
    {"role": "assistant", "content": "19"},
    {"role": "user", "content": "はい？"},
    {"role": "assistant", "content": "はい、数字だけ。"},
]


def encoder(folder, named=None, seq_len=512, turns="all"):
    tokenizer = Tokenizer(folder)
    template = find_template(folder, named, tokenizer.piece(tokenizer.eos_id))
    return ChatEncoder(template, tokenizer, seq_len, turns)


def trained_text(example, tokenizer):
    """Runs of trained ids as text, special pieces written out."""
    runs, run = [], []
    for index, wanted in zip(example.ids.tolist(), example.trained.tolist(), strict=True):
        if wanted:
            run.append(index)
        elif run:
            runs, run = [*runs, run], []
    runs = [*runs, run] if run else runs
    specials = {"</s>", "<|im_end|>"}
    shown = []
    for ids in runs:
        last = tokenizer.piece(ids[-1])
        shown.append(tokenizer.decode(ids[:-1]) + last if last in specials else tokenizer.decode(ids))
    return shown


# ---- shapes


@pytest.mark.parametrize(
    "record",
    [
        {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]},
        {"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]},
        {"instruction": "a", "input": "", "output": "b"},
        {"input": "a", "output": "b"},
        {"prompt": "a", "completion": "b"},
        {"prompt": "a", "response": "b"},
        {"question": "a", "answer": "b"},
    ],
)
def test_every_shape_is_the_same_conversation(record):
    assert messages_of(record) == [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]


def test_alpaca_input_follows_the_instruction():
    assert messages_of({"instruction": "a", "input": "c", "output": "b"})[0]["content"] == "a\n\nc"


@pytest.mark.parametrize(
    ("record", "problem"),
    [
        ({"text": "a"}, "no conversation in them"),
        ({}, "fields none"),
        ({"messages": []}, "no list of messages"),
        ({"messages": [{"role": "robot", "content": "a"}]}, "has role 'robot'"),
        ({"messages": [{"role": "user", "content": 3}]}, "content of message 1 is no text"),
        ({"messages": [["user", "a"]]}, "message 1 is not like"),
        ({"conversations": "a"}, "no list of messages"),
        ({"question": None, "answer": "b"}, "content of message 1 is no text"),
    ],
)
def test_what_is_no_conversation_is_said(record, problem):
    with pytest.raises(ValueError, match=problem):
        messages_of(record)


def test_bad_lines_are_named_all_at_once(tmp_path):
    path = tmp_path / "bad.jsonl"
    good = json.dumps({"question": "a", "answer": "b"}).encode()
    path.write_bytes(b"\n".join([good, b"{", b"[1]", b"\xff", b'{"a": 1}', b"", good]))
    with pytest.raises(UserError) as caught:
        data(tmp_path, byte_level(tmp_path / "t"), {str(path): 1.0})
    places = [problem.partition(" ")[0] for problem in caught.value.problems]
    assert places == [f"{path}:{line}:" for line in (2, 3, 4, 5)]


# ---- templates


@pytest.mark.parametrize("source", [CHATML, LLAMA2, *NAMED.values()])
@pytest.mark.parametrize("reply", [True, False])
def test_templates_render_as_transformers_renders_them(source, reply, tmp_path):
    import transformers

    folder = byte_level(tmp_path / "t", source)
    theirs = transformers.AutoTokenizer.from_pretrained(str(folder))
    messages = TALK[1:3] if reply is False else TALK[1:4]
    want = theirs.apply_chat_template(messages, tokenize=False, add_generation_prompt=reply)
    template = find_template(folder, None)
    assert template.text(messages, reply) == want
    ids = theirs(want, add_special_tokens=False)["input_ids"]
    assert Tokenizer(folder).encode_marked(want) == ids


def test_a_template_file_wins_over_the_configuration(tmp_path):
    folder = byte_level(tmp_path / "t")
    (folder / "chat_template.jinja").write_text("{{ messages[0].content }}{{ eos_token }}")
    assert find_template(folder, None).text(TALK[1:2], True) == "12 + 7 ?<|im_end|>"
    assert find_template(byte_level(tmp_path / "none", None), None) is None


@pytest.mark.parametrize(
    ("source", "problem"),
    [
        ("{{ raise_exception('only one turn') }}", "refuses these messages: only one turn"),
        ("{% for %}", "not a template that can be read"),
        ("{{ messages[0].content.__class__.__mro__ }}", "refuses these messages"),
        ("{{ strftime_now('%d') }}", "asks for the date"),
    ],
)
def test_a_template_that_cannot_be_used_is_refused(source, problem, tmp_path):
    template = find_template(byte_level(tmp_path / "t", source), None)
    with pytest.raises(UserError, match=problem):
        template.text(TALK, True)


# ---- what is trained on


@pytest.mark.parametrize("named", [None, "chatml", "instruction_ja", "alpaca"])
def test_trained_are_the_answers_and_the_piece_that_ends_them(named, tmp_path):
    folder = byte_level(tmp_path / "t")
    example = encoder(folder, named).encode(TALK, Counts())
    stop = "<|im_end|>"
    assert trained_text(example, Tokenizer(folder)) == [f"19{stop}", f"はい、数字だけ。{stop}"]


def test_the_end_is_trained_where_it_is_the_padding_too(tmp_path):
    """Masking labels by ``== pad`` takes the end away wherever the two are one piece."""
    folder = byte_level(tmp_path / "t")
    example = encoder(folder).encode(TALK, Counts())
    eos = Tokenizer(folder).piece_id("<|im_end|>")
    assert example.trained[example.ids == eos].tolist() == [False, False, True, False, True]
    mutant = example.trained & (example.ids != eos)
    assert not mutant[example.ids == eos].any()


def test_pieces_that_sentencepiece_never_reads_from_text_are_ids(tmp_path):
    folder = pieces(tmp_path / "t")
    tokenizer = Tokenizer(folder)
    example = encoder(folder, "instruction_ja").encode(TALK[1:], Counts())
    assert trained_text(example, tokenizer) == ["19</s>", "はい、数字だけ。</s>"]
    assert (example.ids == tokenizer.eos_id).sum() == 2
    assert tokenizer.encode("</s>") != [tokenizer.eos_id]  # what plain encoding makes of it


def test_the_prompt_is_what_generation_computes(tmp_path):
    from llmrecipes.inference.codec import HFCodec

    folder = byte_level(tmp_path / "t")
    example = encoder(folder).encode(TALK, Counts())
    first = int(example.trained.argmax())
    assert HFCodec(folder).chat(TALK[:2]) == example.ids[:first].tolist()


def test_only_the_last_answer(tmp_path):
    folder = byte_level(tmp_path / "t")
    example = encoder(folder, turns="last").encode(TALK, Counts())
    assert trained_text(example, Tokenizer(folder)) == ["はい、数字だけ。<|im_end|>"]


def test_whole_turns_are_cut_off(tmp_path):
    folder = byte_level(tmp_path / "t")
    whole = encoder(folder).encode(TALK, Counts())
    counts = Counts()
    cut = encoder(folder, seq_len=len(whole.ids) - 2).encode(TALK, counts)
    assert trained_text(cut, Tokenizer(folder)) == ["19<|im_end|>"]
    assert counts.notes == {"cut after the last turn that fits": 1}
    assert encoder(folder, seq_len=len(whole.ids) - 1).encode(TALK, Counts()).ids.tolist() == whole.ids.tolist()
    assert encoder(folder, seq_len=3).encode(TALK, counts) is None
    assert list(counts.dropped) == ["its first trained answer ends beyond seq_len 3"]


def test_nothing_to_train_on_is_dropped_and_counted(tmp_path):
    make, counts = encoder(byte_level(tmp_path / "t")), Counts()
    assert make.encode(TALK[:2], counts) is None
    assert make.encode([*TALK[:2], {"role": "assistant", "content": " "}], counts) is None
    assert counts.dropped == {"no assistant turn": 1, "an empty answer": 1}


@pytest.mark.parametrize(
    ("source", "problem"),
    [
        (CHATML.replace("'<|im_end|>' + ", "'' + "), "does not end an answer .* the model would never learn to stop"),
        ("<s>" + LLAMA2, "twice the same piece"),
        (
            "{% for m in messages %}{{ loop.length }}{{ m.content }}{{ eos_token }}{% endfor %}",
            "writes the text before an answer differently",
        ),
        (
            "{% for m in messages %}{% if m.role == 'user' or loop.last %}{{ m.content }}{{ eos_token }}"
            "{% endif %}{% endfor %}",
            "rewrites earlier turns",
        ),
    ],
)
def test_a_template_that_trains_the_wrong_thing_is_refused(source, problem, tmp_path):
    with pytest.raises(UserError, match=problem):
        encoder(byte_level(tmp_path / "t", source)).encode(TALK[1:], Counts())


# ---- packing


def test_best_fit_places_every_example_once_and_wastes_little():
    lengths = np.random.default_rng(0).integers(1, 200, 500)
    rows = best_fit(lengths, 256)
    assert sorted(n for row in rows for n in row) == list(range(500))
    assert max(lengths[row].sum() for row in rows) <= 256
    assert len(rows) <= 1.02 * np.ceil(lengths.sum() / 256)
    assert best_fit(lengths, 256) == rows
    assert best_fit(np.array([3, 5, 2]), 5) == [[1], [0, 2]]


def data(tmp_path, folder, train, kind=ChatExamples, ranks=1, rank=0, **options):
    values = {"seq_len": 64, "micro_batch": 2, "global_batch": 4, "cache": str(tmp_path / "cache")} | options
    made = kind(train=train, tokenizer=str(folder), **values)
    kwargs = {"num_replicas": ranks, "rank": rank}
    made.trainer = SimpleNamespace(strategy=SimpleNamespace(distributed_sampler_kwargs=kwargs), max_steps=10)
    made.setup("fit")
    return made


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "talks.jsonl"
    rng = np.random.default_rng(1)
    lines = [{"question": f"{n} + {n} ?", "answer": "はい" * rng.integers(1, 6)} for n in range(60)]
    path.write_text("\n".join(map(json.dumps, lines)))
    return path


def documents(batch):
    """(tokens, labels) of every real document of a batch."""
    for row, lengths in enumerate(batch.document_lengths):
        parts = [part.split(lengths) for part in (batch.tokens[row], batch.labels[row], batch.token_mask[row])]
        yield from ((t.tolist(), y.tolist()) for t, y, real in zip(*parts, strict=True) if real.all())


def test_rows_hold_the_examples_and_labels_are_the_next_ids(tmp_path, file):
    folder = byte_level(tmp_path / "t")
    made = data(tmp_path, folder, {str(file): 1.0}, split="100")
    make, seen = encoder(folder), []
    for step in range(len(made._train_sources[0]) // 4 + 1):
        batch = made.step_batch(step)
        assert all(sum(lengths) == 64 for lengths in batch.document_lengths)
        assert (batch.labels[~batch.token_mask] == IGNORE).all()
        seen += list(documents(batch))
    want = []
    for line in file.read_text().splitlines():
        ids, trained = make.encode(messages_of(json.loads(line)), Counts())
        want.append((ids[:-1].tolist(), np.where(trained[1:], ids[1:], IGNORE).tolist()))
    assert len(want) == 60
    assert all(example in seen for example in want)
    assert all(example in want for example in seen)


def test_ranks_share_the_step_of_one_process(tmp_path, file):
    folder = byte_level(tmp_path / "t")
    whole = data(tmp_path, folder, {str(file): 1.0}).step_batch(5)
    parts = [data(tmp_path, folder, {str(file): 1.0}, ranks=2, rank=rank).step_batch(5) for rank in (0, 1)]
    assert torch.equal(torch.cat([part.tokens for part in parts]), whole.tokens)
    assert sum(part.digest() for part in parts) == whole.digest()


def test_the_cache_is_used_and_follows_what_it_depends_on(tmp_path, file, monkeypatch):
    folder = byte_level(tmp_path / "t")
    first = data(tmp_path, folder, {str(file): 1.0}, seq_len=160)
    assert len(list((tmp_path / "cache").iterdir())) == 1
    with monkeypatch.context() as patch:
        patch.setattr(ChatEncoder, "encode", None)  # not called again
        again = data(tmp_path, folder, {str(file): 1.0}, seq_len=160)
    assert torch.equal(again.step_batch(3).tokens, first.step_batch(3).tokens)
    assert again.fingerprint() == first.fingerprint()
    for other in ({"seq_len": 180}, {"turns": "last"}, {"template": "alpaca"}):
        changed = data(tmp_path, folder, {str(file): 1.0}, **({"seq_len": 160} | other))
        assert changed.fingerprint() != first.fingerprint()
    assert len(list((tmp_path / "cache").iterdir())) == 4
    file.write_text(file.read_text().replace("59 + 59", "1 + 2"))
    assert data(tmp_path, folder, {str(file): 1.0}, seq_len=160).fingerprint() != first.fingerprint()


def test_compressed_files_and_messages_for_people(tmp_path, file):
    folder = byte_level(tmp_path / "t")
    packed = tmp_path / "talks2.jsonl.gz"
    packed.write_bytes(gzip.compress(file.read_bytes() + b'\n{"messages": [{"role": "user", "content": "a"}]}'))
    made = data(tmp_path, folder, {str(file): 3.0, str(packed): 1.0})
    text = "\n".join(made.describe(10))
    assert "1 of 61 dropped: no assistant turn" in text
    assert "share 75.0%" in text and "% full" in text and "epochs in 10 steps" in text
    for ending, compress in ((".gz", gzip.compress), (".zst", zstandard.ZstdCompressor().compress)):
        broken = tmp_path / f"cut.jsonl{ending}"
        broken.write_bytes(compress(file.read_bytes())[:-20])
        with pytest.raises(UserError, match="broken archive"):
            data(tmp_path, folder, {str(broken): 1.0})
    with pytest.raises(UserError, match="No such file"):
        data(tmp_path, folder, {str(tmp_path / "absent.jsonl"): 1.0})
    with pytest.raises(UserError, match="no chat template beside the tokenizer"):
        data(tmp_path, pieces(tmp_path / "p"), {str(file): 1.0})


# ---- pairs


def pairs_file(tmp_path, number=40):
    path = tmp_path / "pairs.jsonl"
    lines = [
        {"prompt": f"{n} + 1 ?", "chosen": f"はい、{n + 1}", "rejected": "いいえ" * (1 + n % 3)} for n in range(number)
    ]
    path.write_text("\n".join(map(json.dumps, lines)))
    return path


def test_pairs_lie_side_by_side_chosen_first(tmp_path):
    folder = byte_level(tmp_path / "t")
    path = pairs_file(tmp_path)
    made = data(tmp_path, folder, {str(path): 1.0}, PreferencePairs, seq_len=160, split="100", share_prompts=False)
    lines, make = path.read_text().splitlines(), encoder(folder, turns="last", seq_len=160)
    batch = made.step_batch(0)
    assert int(batch.counts()["pairs"]) == len(batch.pair_numbers) > 4
    found = list(documents(batch))
    for place, number in enumerate(batch.pair_numbers):
        for side, conversation in enumerate(pair_of(json.loads(lines[number]))):
            ids, trained = make.encode(conversation, Counts())
            assert found[2 * place + side][0] == ids[:-1].tolist()
            assert batch.answer_lengths[2 * place + side] == trained.sum()
    halves = batch.split(2)
    assert [n for half in halves for n in half.pair_numbers] == batch.pair_numbers
    numbers = {n for source, row in made.all_rows() for n in made.batch_of([(source, row)]).pair_numbers}
    assert numbers == set(range(40))


def test_the_prompt_of_a_pair_stands_there_once(tmp_path):
    folder = byte_level(tmp_path / "t")
    path = pairs_file(tmp_path)
    made = data(tmp_path, folder, {str(path): 1.0}, PreferencePairs, seq_len=160, split="100", pack=False)
    lines, make = path.read_text().splitlines(), encoder(folder, turns="last", seq_len=160)
    batch = made.step_batch(0)
    found = list(documents(batch))
    prefixes = [prefix for row in batch.document_prefixes for prefix in row]
    assert len(found) == 8 and max(prefixes) > 10
    for place, number in enumerate(batch.pair_numbers):
        (chosen, mark), (rejected, _) = (make.encode(side, Counts()) for side in pair_of(json.loads(lines[number])))
        prefix = batch.document_prefixes[place][1]
        assert prefix == mark.argmax() - 1
        assert found[2 * place][0] == chosen[:-1].tolist()
        assert found[2 * place + 1][0] == rejected[prefix:-1].tolist()
        assert (chosen[: prefix + 1] == rejected[: prefix + 1]).all()
    apart = data(tmp_path, folder, {str(path): 1.0}, PreferencePairs, seq_len=160, split="100", share_prompts=False)
    assert made._train_sources[0].num_positions < apart._train_sources[0].num_positions
    assert made.fingerprint() != apart.fingerprint()


@pytest.mark.parametrize(
    ("record", "problem"),
    [
        ({"prompt": "a", "chosen": "b"}, "no field 'rejected'"),
        ({"chosen": "b", "rejected": "c"}, "an answer without a prompt"),
        ({"prompt": "a", "chosen": [{"role": "user", "content": "b"}], "rejected": "c"}, "does not end with what"),
        (
            {
                "chosen": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}],
                "rejected": [{"role": "user", "content": "x"}, {"role": "assistant", "content": "c"}],
            },
            "answer different prompts",
        ),
        ({"prompt": 3, "chosen": "b", "rejected": "c"}, "prompt: no list of messages"),
    ],
)
def test_what_is_no_pair_is_said(record, problem):
    with pytest.raises(ValueError, match=problem):
        pair_of(record)


def test_equal_and_long_pairs_are_dropped_and_counted(tmp_path):
    path = pairs_file(tmp_path, 8)
    same, long = {"prompt": "a", "chosen": "b", "rejected": "b"}, {"prompt": "a", "chosen": "b", "rejected": "c" * 200}
    path.write_text(path.read_text() + "\n" + json.dumps(same) + "\n" + json.dumps(long))
    made = data(tmp_path, byte_level(tmp_path / "t"), {str(path): 1.0}, PreferencePairs, seq_len=160)
    text = "\n".join(made.describe(10))
    assert "1 of 10 dropped: chosen and rejected are the same" in text
    assert "1 of 10 dropped: its first trained answer ends beyond seq_len 160" in text
