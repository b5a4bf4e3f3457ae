"""Attention by our own kernel against fp64, by definition; it neither guesses nor hides."""

from __future__ import annotations

import itertools

import pytest
import torch

from llmrecipes.distributed.recompute import recompute_blocks
from llmrecipes.kernels import attention as module
from llmrecipes.kernels.attention import attention, fits_kernel
from llmrecipes.kernels.library import has_kernels, without_kernels
from llmrecipes.models import Decoder, ModelConfig

DTYPES = [
    torch.float32,
    pytest.param(
        torch.bfloat16,
        marks=pytest.mark.skipif(not has_kernels(torch.bfloat16), reason="this processor has no AVX512-BF16"),
    ),
]
# Relative, of the norm. In bf16 probabilities and their gradients are rounded once: torch's kernel is at 5e-3.
ERROR = {torch.float32: 3e-6, torch.bfloat16: 4e-3}
LENGTHS = [
    [64],
    [1, 2, 3, 15, 16, 17, 63, 64, 65],
    [512, 130],
    [127, 0, 129, 1],
    [31],
]
HEADS = [(1, 1), (4, 2), (6, 1), (3, 3)]
WIDTHS = [16, 48, 64, 80, 128, 256]
WINDOWS = [None, 1, 40, 64, 1000]


def operands(dtype, lengths, heads, kv_heads, width, seed=0):
    """Views of one fused projection, as in a model, an upstream gradient, and borders."""
    generator = torch.Generator().manual_seed(seed)
    tokens, sizes = sum(lengths), [heads * width, kv_heads * width, kv_heads * width]
    fused = torch.randn(tokens, sum(sizes), generator=generator).to(dtype)
    parts = [part.view(tokens, -1, width) for part in fused.split(sizes, dim=1)]
    upstream = torch.randn(tokens, heads, width, generator=generator).to(dtype)
    borders = torch.tensor([0, *itertools.accumulate(lengths)])
    return parts, upstream, borders


def ours(parts, upstream, borders, window, scale):
    """Output and three gradients."""
    leaves = [part.detach().requires_grad_() for part in parts]
    mixed = attention(*leaves, borders, window, scale)
    mixed.backward(upstream)
    return [mixed.detach(), *(leaf.grad for leaf in leaves)]


def by_definition(parts, upstream, borders, window, scale):
    """Softmax over what a token sees, in fp64, head by head."""
    query, key, value = (part.detach().double().requires_grad_() for part in parts)
    group = query.shape[1] // key.shape[1]
    outs = []
    for start, end in itertools.pairwise(borders.tolist()):
        place = torch.arange(end - start)
        behind = place[:, None] - place[None, :]
        seen = (behind >= 0) & (behind < (window or end))
        k, v = (x[start:end].repeat_interleave(group, 1) for x in (key, value))
        scores = torch.einsum("qhd,khd->hqk", query[start:end], k) * scale
        outs.append(torch.einsum("hqk,khd->qhd", scores.masked_fill(~seen, -torch.inf).softmax(-1), v))
    mixed = torch.cat(outs)
    mixed.backward(upstream.double())
    return [mixed.detach(), query.grad, key.grad, value.grad]


def worst(dtype, lengths, heads, width, window, scale=0.2):
    """The largest of the four errors, each relative to the norm of all (a gradient may be zero exactly)."""
    parts, upstream, borders = operands(dtype, lengths, *heads, width)
    found = ours(parts, upstream, borders, window, scale)
    exact = by_definition(parts, upstream, borders, window, scale)
    assert [x.dtype for x in found] == [dtype] * 4
    return max(
        ((a.double() - b).norm() / torch.maximum(b.norm(), 0.1 * upstream.double().norm())).item()
        for a, b in zip(found, exact, strict=True)
    )


CASES = [
    *((lengths, heads, 64, None) for lengths in LENGTHS for heads in HEADS),
    *((LENGTHS[1], (4, 2), width, None) for width in WIDTHS),
    *((lengths, (4, 2), 32, window) for lengths in LENGTHS for window in WINDOWS),
]


@pytest.mark.parametrize("dtype", DTYPES)
def test_output_and_gradients_are_those_of_the_definition(dtype):
    errors = {str(case): worst(dtype, *case) for case in CASES}
    assert len(errors) == 20 + 6 + 25 - 1  # one case is in two lists
    assert max(errors.values()) < ERROR[dtype], max(errors, key=errors.get)


MUTANTS = [
    ("sees one token ahead", "behind = key - query, within", "behind = key - query - 1, within"),
    ("a window of one more", "within = behind + window;", "within = behind + window + 1;"),
    ("blocks of keys without a mask", "return query >= key + BLOCK - 1 &&", "return query + BLOCK > key &&"),
    ("no rescaling of earlier blocks", "_mm512_mul_ps(shrink, _mm512_loadu_ps(at))", "_mm512_loadu_ps(at)"),
    (
        "no mean of the gradient",
        "_mm512_sub_ps(_mm512_loadu_ps(d_scores + at), mean)",
        "_mm512_loadu_ps(d_scores + at)",
    ),
    (
        "keys without the scale",
        "std::fill(factor, factor + BLOCK, shape.scale);",
        "std::fill(factor, factor + BLOCK, 1);",
    ),
]


@pytest.mark.parametrize(("right", "wrong"), [m[1:] for m in MUTANTS], ids=[m[0] for m in MUTANTS])
def test_mutants_fail(right, wrong, mutant):
    mutant("attention.cpp", right, wrong)
    errors = [worst(torch.float32, [512, 130], (4, 2), 32, window) for window in (None, 40)]
    assert max(errors) > 100 * ERROR[torch.float32]


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_document_knows_nothing_of_its_neighbours_and_threads(dtype):
    parts, upstream, borders = operands(dtype, [100, 77, 200], 4, 2, 32)
    before = ours(parts, upstream, borders, None, 0.2)
    alone = ours([part[100:177] for part in parts], upstream[100:177], torch.tensor([0, 77]), None, 0.2)
    for whole, one in zip(before, alone, strict=True):
        assert torch.equal(whole[100:177], one)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        after = ours(parts, upstream, borders, None, 0.2)
    finally:
        torch.set_num_threads(threads)
    assert all(map(torch.equal, before, after))


def same_after_garbage(dtype):
    """Whether five more calls give the same bits, with NaN in the memory that was freed before each."""
    parts, upstream, borders = operands(dtype, [1, 130, 7, 63], 4, 2, 48)
    results = [ours(parts, upstream, borders, None, 0.2)]
    for _ in range(5):
        garbage = torch.full((2_000_000,), torch.nan)  # torch's memory and the kernel's come from one heap
        del garbage
        results.append(ours(parts, upstream, borders, None, 0.2))
    return all(torch.equal(a, b) for later in results[1:] for a, b in zip(results[0], later, strict=True))


@pytest.mark.parametrize("dtype", DTYPES)
def test_memory_it_was_given_does_not_matter(dtype):
    assert same_after_garbage(dtype)


@pytest.mark.parametrize("what", ["d_query", "d_key", "d_value"])
def test_mutant_sums_that_do_not_begin_at_zero_are_noticed(what, mutant):
    mutant("attention.cpp", f"std::fill({what}, {what} + padded * shape.width, 0.0f);", "")
    assert not same_after_garbage(torch.float32)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_what_is_no_number_is_seen(dtype, bad):
    """A guard against NaN looks at what comes out: attention must not swallow it."""
    for place in range(3):
        parts, upstream, borders = operands(dtype, [70, 30], 2, 2, 16)
        parts = [part.clone() for part in parts]
        parts[place][65, 1, 3] = bad
        found = ours(parts, upstream, borders, None, 0.2)
        assert not found[0][65:70, 1].isfinite().all()
        assert all(x[70:].isfinite().all() and x[:, 0].isfinite().all() for x in found)


@pytest.mark.parametrize("dtype", DTYPES)
def test_large_scores_neither_overflow_nor_vanish(dtype):
    parts, upstream, borders = operands(dtype, [200], 2, 1, 64)
    parts = [30 * parts[0], 30 * parts[1], parts[2]]
    found = ours(parts, upstream, borders, None, 0.125)
    exact = by_definition(parts, upstream, borders, None, 0.125)
    assert all(x.isfinite().all() for x in found)
    assert (found[0].double() - exact[0]).norm() < 0.02 * exact[0].norm()


@pytest.mark.parametrize("dtype", DTYPES)
def test_any_strides(dtype):
    parts, upstream, borders = operands(dtype, [40, 25], 4, 2, 32)
    expected = ours([part.contiguous() for part in parts], upstream, borders, None, 0.2)
    turned = [part.transpose(0, 1).contiguous().transpose(0, 1) for part in parts]
    odd = [torch.nn.functional.pad(part, (1, 2))[..., 1:-2] for part in parts]  # heads begin within a word of 32 bits
    wide = [part.transpose(1, 2).contiguous().transpose(1, 2) for part in parts]
    for strided in (parts, turned, odd, wide):
        assert all(map(torch.equal, expected, ours(strided, upstream, borders, None, 0.2)))
    flat = upstream[:1, :1, :1].expand_as(upstream)
    expected = ours(parts, flat.contiguous(), borders, None, 0.2)
    assert all(map(torch.equal, expected, ours(parts, flat, borders, None, 0.2)))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda x: x | {"borders": torch.tensor([0, 5])}, "documents of 5 tokens in all, and 9 tokens"),
        (lambda x: x | {"borders": torch.tensor([0, 7, 4, 9])}, "ends before it begins"),
        (lambda x: x | {"borders": torch.tensor([1, 9])}, "begins at 0"),
        (lambda x: x | {"borders": torch.tensor([0, 9]).int()}, "int64"),
        (lambda x: x | {"key": x["key"][:8]}, "do not fit"),
        (lambda x: x | {"query": x["query"][:, :3]}, "3 heads of queries do not divide into 2"),
        (lambda x: x | {"value": x["value"].bfloat16()}, "differ in type"),
    ],
)
def test_wrong_operands_are_refused(change, said):
    """Wrong borders would read memory that is not ours."""
    (query, key, value), _, borders = operands(torch.float32, [9], 4, 2, 16)
    changed = change({"query": query, "key": key, "value": value, "borders": borders})
    with pytest.raises(AssertionError, match=said):
        attention(*changed.values(), None, 0.2)


def test_it_is_a_good_operator():
    parts, _, borders = operands(torch.float32, [20, 13], 4, 2, 16)
    leaves = [part.detach().requires_grad_() for part in parts]
    done = torch.library.opcheck(module.OPERATOR, (*leaves, borders, 1 << 40, 0.2))
    assert set(done.values()) == {"SUCCESS"}
    assert len(done) == 4


def test_what_it_fits():
    assert fits_kernel(torch.float32, 64)
    assert not fits_kernel(torch.float32, 24)
    assert not fits_kernel(torch.float64, 64)
    assert not fits_kernel(torch.float16, 64)
    with without_kernels():
        assert not fits_kernel(torch.float32, 64)


DOCUMENTS = [[96], [20, 76], [1, 95]]
PREFIXES = [[0], [0, 12], [0, 1]]


def trained(kind, documents, prefixes, half, how="none", compiled=False):
    """Hidden states and gradients of a small decoder."""
    torch.manual_seed(0)
    model = Decoder(ModelConfig(vocab_size=64, dim=64, num_layers=2, num_heads=4, ffn_dim=96, **kind)).train()
    recompute_blocks(model, how)
    if compiled:
        for block in model.layers:
            block.compile()
    tokens = torch.randint(0, 64, (3, 96), generator=torch.Generator().manual_seed(1))
    with torch.autocast("cpu", torch.bfloat16, enabled=half):
        hidden = model(tokens, document_lengths=documents, document_prefixes=prefixes).hidden.float()
    hidden.mul(torch.linspace(-1, 1, hidden.numel()).view(hidden.shape)).sum().backward()
    return [hidden.detach(), *(p.grad for p in model.parameters() if p.grad is not None)]


KINDS = {"grouped": {"num_kv_heads": 2}, "window": {"sliding_window": 17}, "scaled": {"attention_scale": 0.5}}


@pytest.mark.parametrize("how", ["none", "selective", "full"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_decoder_is_the_same_with_it_and_without(kind, how):
    for documents, prefixes in ((None, None), (DOCUMENTS, None), (DOCUMENTS, PREFIXES)):
        found = trained(KINDS[kind], documents, prefixes, half=False, how=how)
        with without_kernels():
            expected = trained(KINDS[kind], documents, prefixes, half=False, how=how)
        assert len(found) == len(expected) > 10
        for a, b in zip(found, expected, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4 * b.abs().max().item())
        assert not all(map(torch.equal, found, expected)), "the kernel was not used"


@pytest.mark.skipif(not has_kernels(torch.bfloat16), reason="this processor has no AVX512-BF16")
def test_under_autocast_it_is_as_near_to_fp32_as_torch():
    exact = trained({}, DOCUMENTS, None, half=False)
    found = trained({}, DOCUMENTS, None, half=True)
    with without_kernels():
        torchs = trained({}, DOCUMENTS, None, half=True)

    def error(some):
        return sum(((a - b).norm() / b.norm()).item() for a, b in zip(some, exact, strict=True)) / len(exact)

    assert error(found) < 1.1 * error(torchs)


@pytest.mark.parametrize("documents", [None, DOCUMENTS], ids=["rows", "documents"])
def test_compiled_blocks_use_it(documents):
    found = trained({}, documents, None, half=False, compiled=True)
    plain = trained({}, documents, None, half=False)
    for a, b in zip(found, plain, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4 * b.abs().max().item())
