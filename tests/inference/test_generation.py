"""Several texts side by side come out as each alone: left padding is seen by nobody."""

from __future__ import annotations

import pytest
import torch

from llmrecipes.models import Decoder, KVCache, ModelConfig, MoEConfig, Sampling, generate_batch, init_weights
from llmrecipes.models import context as context_module

SIZES = {
    "vocab_size": 61,
    "dim": 32,
    "num_layers": 2,
    "num_heads": 4,
    "num_kv_heads": 2,
    "ffn_dim": 48,
    "init_std": 0.3,
}
MOE = MoEConfig(num_experts=4, ffn_dim=32)
KINDS = {
    "rope": {},
    "alibi": {"positions": "alibi"},
    "learned": {"positions": "learned", "max_seq_len": 64},
    "none": {"positions": "none"},
    "window": {"sliding_window": 5},
    "some windows": {"sliding_window": 5, "window_layers": [1]},
    "experts": {"moe": MOE, "ffn_dim": None},
    "padded vocabulary": {"vocab_multiple": 16},
}
LENGTHS = (3, 17, 1, 9, 17)


def make(kind, dtype=torch.float32, **more):
    model = Decoder(ModelConfig(**(SIZES | KINDS[kind] | more)))
    init_weights(model, 4)
    torch.nn.init.normal_(model.embed.weight, std=0.5, generator=torch.Generator().manual_seed(1))
    return model.to(dtype).eval()


def prompts(seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(0, 61, (n,), generator=generator).tolist() for n in LENGTHS]


def padded_difference(model, dtype):
    """Largest difference of the logits of padded texts (prompt, then three more tokens) from those of each alone."""
    texts = prompts()
    longest = max(map(len, texts))
    padding = torch.tensor([longest - len(text) for text in texts])
    cache = KVCache(model.config, len(texts), longest + 3, dtype, padding=padding)
    worst = 0.0
    more = torch.randint(0, 61, (len(texts), 3), generator=torch.Generator().manual_seed(9))
    with torch.no_grad():
        rows = torch.tensor([[0] * int(n) + text for n, text in zip(padding, texts, strict=True)])
        outputs = [model(rows, cache=cache).hidden, *(model(more[:, i : i + 1], cache=cache).hidden for i in range(3))]
        together = model.logits(torch.cat(outputs, dim=1))
        for row, text in enumerate(texts):
            alone = model.logits(model(torch.tensor([text + more[row].tolist()])).hidden)[0]
            worst = max(worst, (together[row, int(padding[row]) :] - alone).abs().max().item())
    assert together.isfinite().all()
    return worst


@pytest.mark.parametrize("kind", KINDS)
def test_padded_logits_equal_those_of_each_text_alone(kind):
    assert padded_difference(make(kind), torch.float32) < 1e-5
    assert padded_difference(make(kind, torch.float64), torch.float64) < 1e-12


def test_mutants_of_padding_fail(monkeypatch):
    real = context_module.padded_positions
    monkeypatch.setattr(
        context_module, "padded_positions", lambda padding, start, length: real(padding * 0, start, length)
    )
    assert padded_difference(make("learned"), torch.float32) > 1e-3  # positions that count the padding
    monkeypatch.undo()
    visible = context_module.visible_keys
    monkeypatch.setattr(
        context_module, "visible_keys", lambda padding, start, length: visible(padding * 0, start, length)
    )
    for kind in ("rope", "alibi", "window"):
        assert padded_difference(make(kind), torch.float32) > 1e-3, kind  # padding that is seen


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "sampling",
    [Sampling(), Sampling(temperature=0.9, top_k=20, top_p=0.95, repetition_penalty=1.2)],
    ids=["greedy", "drawn"],
)
def test_batch_equals_single_and_cache_equals_no_cache(kind, sampling):
    model, texts = make(kind), prompts()

    # Generators first differ, so that equal prompts may differ, as in the command.
    def sources(numbers):
        return [torch.Generator().manual_seed(100 + n) for n in numbers]

    whole = generate_batch(model, texts, 24, sampling=sampling, generators=sources(range(5)), eos_ids=(7,))
    again = generate_batch(
        model, texts, 24, sampling=sampling, generators=sources(range(5)), eos_ids=(7,), use_cache=False
    )
    assert whole == again
    for number, text in enumerate(texts):
        alone = generate_batch(model, [text], 24, sampling=sampling, generators=sources([number]), eos_ids=(7,))
        assert alone == [whole[number]], number
    assert all(1 <= len(one.ids) <= 24 for one in whole)
    assert all((one.finish == "eos") == (one.ids[-1] == 7) for one in whole)


def test_texts_end_one_by_one():
    model, texts = make("rope"), prompts()
    free = generate_batch(model, texts, 12)
    told = []

    def listen(number, token):
        told.append((number, token))
        return number == 2 and sum(n == 2 for n, _ in told) == 4

    ends = free[0].ids[6]
    found = generate_batch(model, texts, 12, eos_ids=(ends,), listener=listen)
    for number, one in enumerate(found):
        assert one.ids == free[number].ids[: len(one.ids)]
        assert [token for n, token in told if n == number] == one.ids
    assert (found[2].finish == "stop" and len(found[2].ids) == 4) or found[2].ids[-1] == ends
    assert found[0].finish == "eos" and found[0].ids.index(ends) == len(found[0].ids) - 1


def test_learned_positions_end_each_text_at_its_own_last_place():
    model = make("learned", max_seq_len=20)
    texts = [[1] * 20, [2] * 18, [3] * 4, [4] * 25]
    found = generate_batch(model, texts, 10)
    assert [(one.finish, len(one.ids)) for one in found] == [
        ("positions", 0), ("positions", 2), ("length", 10), ("positions", 0),
    ]  # fmt: skip
    assert generate_batch(model, [texts[2]], 40)[0].finish == "positions"
    assert len(generate_batch(model, [texts[2]], 40)[0].ids) == 16


def test_rows_that_pad_the_vocabulary_never_win():
    model = make("rope")
    with torch.no_grad():
        model.head.weight[50:] = 100 * model.head.weight[:11]
    free = generate_batch(model, prompts(), 16)
    assert any(token >= 50 for one in free for token in one.ids)
    for sampling in (Sampling(), Sampling(temperature=2.0)):
        bound = generate_batch(model, prompts(), 16, vocab_size=50, sampling=sampling)
        assert all(token < 50 for one in bound for token in one.ids)


def test_nothing_to_do():
    model = make("rope").train()
    assert generate_batch(model, [], 5) == []
    assert generate_batch(model, [[1]], 0)[0].ids == []
    assert model.training


@pytest.mark.oracle
def test_greedy_and_penalized_tokens_equal_transformers():
    transformers = pytest.importorskip("transformers")
    from llmrecipes.convert import config_from_hf, from_hf_state_dict

    compared = 0
    for seed in range(4):
        torch.manual_seed(seed)
        config = transformers.LlamaConfig(
            vocab_size=97, hidden_size=48, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2, max_position_embeddings=128, initializer_range=0.4, bos_token_id=1, eos_token_id=2,
        )  # fmt: skip
        peer = transformers.LlamaForCausalLM(config).eval()
        decoder = Decoder(config_from_hf(config.to_dict())).eval()
        decoder.load_state_dict(from_hf_state_dict(decoder.config, peer.state_dict()))
        texts = [[t % 97 for t in text] for text in prompts(seed)]
        longest = max(map(len, texts))
        rows = torch.tensor([[0] * (longest - len(text)) + text for text in texts])
        mask = torch.tensor([[0] * (longest - len(text)) + [1] * len(text) for text in texts])
        for penalty in (1.0, 1.3):
            ours = generate_batch(decoder, texts, 20, sampling=Sampling(repetition_penalty=penalty), eos_ids=(2,))
            for number, text in enumerate(texts):  # one by one: transformers penalizes padding, too
                theirs = peer.generate(
                    torch.tensor([text]), attention_mask=torch.ones(1, len(text)), max_new_tokens=20, do_sample=False,
                    repetition_penalty=penalty, eos_token_id=2, pad_token_id=0,
                )[0, len(text) :].tolist()  # fmt: skip
                assert ours[number].ids == theirs
                compared += 1
        together = peer.generate(
            rows, attention_mask=mask, max_new_tokens=20, do_sample=False, eos_token_id=2, pad_token_id=0
        )[:, longest:]
        plain = generate_batch(decoder, texts, 20, eos_ids=(2,))
        assert all(row[: len(one.ids)].tolist() == one.ids for row, one in zip(together, plain, strict=True))
    assert compared == 4 * 2 * len(LENGTHS)
