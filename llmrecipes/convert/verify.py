"""Whether two forms of a model compute the same: logits on random tokens, in fp32, whatever type the weights have."""

from __future__ import annotations

import logging
import math
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llmrecipes.convert.folder import Source, load_decoder
from llmrecipes.errors import UserError
from llmrecipes.models import Decoder
from llmrecipes.models.router import Router
from llmrecipes.recipe.model_config import ModelConfig

# What fp32 sums in another order may differ by; and how close two router logits are that rounding may swap.
TOLERANCE = 1e-5
_TIE = 1e-4
# Two ways of rounding differ by some multiple of what one differs from the exact result; never by this much.
_NOISE, _NEVER_ROUNDING = 4.0, 1e-2
_ROWS, _LONGEST = 4, 256


def verify_logits(ours: Source, hf_folder: Path, dtype: torch.dtype | None = None) -> float:
    """Compare a decoder with its twin in transformers; one is in memory at a time.

    Args:
        ours: where the decoder lies. hf_folder: where the twin does.
        dtype: to which the decoder's weights were rounded for the twin; None = they were not.

    Returns:
        The largest difference of a logit, relative to the largest logit where that is above 1.

    Raises:
        UserError: it is above `tolerance`, or transformers found tensors missing or left over.
    """
    tokens = random_tokens(ours)
    expected, undecided = _our_logits(ours, tokens, dtype, torch.float32)
    with torch.inference_mode():
        model = load_twin(hf_folder)
        with widened(model):
            found = _their_logits(model, tokens, hf_folder)
        del model
    if found.shape != expected.shape:
        raise UserError(f"{hf_folder}: transformers gives logits {list(found.shape)}, not {list(expected.shape)}")
    bound = tolerance(ours.config)
    difference = _largest(found, expected)
    if not difference <= bound:
        # Rounding may send a token to another expert where two score alike; it and all that see it are left out.
        decided = undecided.cumsum(1) == 0
        difference = _largest(found[decided], expected[decided])
        if decided.any() and bound < difference < _NEVER_ROUNDING:
            exact = _our_logits(ours, tokens, dtype, torch.float64)[0]
            bound = max(bound, _NOISE * _largest(expected[decided].double(), exact[decided]))
            if difference <= bound:
                print(
                    f"note: fp32 alone rounds this model's logits by up to {bound / _NOISE:.1e}, so that is the measure"
                )
    if not difference <= bound:
        raise UserError(
            f"{hf_folder}: logits differ from transformers' by {difference:.1e} of the largest, more than "
            f"{bound:.0e}; nothing was kept. This is a defect of the conversion: please report config.json"
        )
    return difference


def _our_logits(ours: Source, tokens: Tensor, dtype: torch.dtype | None, kind: torch.dtype) -> tuple[Tensor, Tensor]:
    """Computed in ``kind``, [B, T, vocab]; and where experts nearly tie, [B, T]."""
    with torch.inference_mode():
        decoder = load_decoder(ours, dtype)
        with widened(decoder, kind), near_ties(decoder, tokens) as undecided:
            hidden = decoder(tokens).hidden
        return F.linear(hidden, decoder.head_weight.to(kind))[..., : ours.config.vocab_size], undecided


def _largest(found: Tensor, expected: Tensor) -> float:
    """The largest difference, relative to the largest logit where that is above 1; infinite for nothing or NaN."""
    if not expected.numel():
        return float("inf")
    difference = float((found - expected).abs().max() / expected.abs().max().clamp_min(1))
    return difference if math.isfinite(difference) else float("inf")


def _their_logits(model: nn.Module, tokens: Tensor, folder: Path) -> Tensor:
    try:
        logits: Tensor = model(tokens, use_cache=False, return_dict=True).logits
    except Exception as error:  # as when loading
        raise UserError(f"{folder}: transformers loads it but fails to compute: {one_line(error)}") from error
    return logits.float()


def one_line(error: Exception) -> str:
    """An error of another library as one line that is not too long."""
    words = " ".join(f"{type(error).__name__}: {error}".split())
    return words if len(words) <= 240 else f"{words[:237]}..."


def tolerance(config: ModelConfig) -> float:
    """Of the largest logit, at least of 1: rounding adds up over layers."""
    return TOLERANCE * max(1.0, config.num_layers / 16)


@contextmanager
def near_ties(decoder: Decoder, tokens: Tensor) -> Iterator[Tensor]:
    """Marks, during a forward pass, tokens for which the best expert not chosen scores like the worst chosen.

    Yields:
        [B, T] bool, filled by the pass.
    """
    undecided = torch.zeros(tokens.shape, dtype=torch.bool)

    def look(router: Router, inputs: Any, _: Any) -> None:
        scores = F.linear(inputs[0].float(), router.weight.float())
        if router.top_k < scores.shape[-1]:
            best = scores.topk(router.top_k + 1, dim=-1).values
            undecided.logical_or_((best[:, -2] - best[:, -1] < _TIE).view(tokens.shape))

    handles = [module.register_forward_hook(look) for module in decoder.modules() if isinstance(module, Router)]
    try:
        yield undecided
    finally:
        for handle in handles:
            handle.remove()


def random_tokens(source: Source) -> Tensor:
    """Ids of every kind, longer than a sliding window where that is short enough, [2, T]."""
    longest = min(source.max_seq_len or _LONGEST, _LONGEST)
    window = source.config.sliding_window or 0
    length = min(longest, max(48, window + 16))
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, source.config.vocab_size, (_ROWS, length), generator=generator)


def load_twin(folder: Path) -> nn.Module:
    """The model as transformers loads it, from the disk only and without any code of the folder's own.

    Raises:
        UserError: tensors are missing or left over, or transformers refuses.
    """
    import transformers

    try:
        with quiet_transformers():
            loaded: Any = transformers.AutoModelForCausalLM.from_pretrained(
                folder, dtype="auto", local_files_only=True, trust_remote_code=False, output_loading_info=True
            )
    except Exception as error:  # on a damaged config.json it raises whatever the first wrong value leads to
        raise UserError(f"{folder}: transformers does not load it: {one_line(error)}") from error
    model, report = loaded
    wrong = [f"{kind.replace('_', ' ')}: {report[kind]}" for kind in _REPORT if report.get(kind)]
    if wrong:
        raise UserError(*(f"{folder}: transformers reports {problem}" for problem in wrong))
    return model.eval()


_REPORT = ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs")


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """Its progress bars and advice say nothing here; what matters is in the report."""
    import transformers

    loggers = transformers.utils.logging
    level, bars = loggers.get_verbosity(), loggers.is_progress_bar_enabled()
    loggers.set_verbosity(logging.ERROR)
    loggers.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        loggers.set_verbosity(level)
        if bars:
            loggers.enable_progress_bar()


@contextmanager
def widened(model: nn.Module, dtype: torch.dtype = torch.float32) -> Iterator[None]:
    """Compute in ``dtype`` with weights of any type: each module's own are widened while it runs, and no longer."""
    handles, kept = [], {}

    def widen(module: nn.Module, _: Any) -> None:
        own = [p for p in module.parameters(recurse=False) if p.dtype.itemsize < dtype.itemsize]
        kept[module] = [(p, p.data) for p in own]
        for p in own:
            p.data = p.data.to(dtype)

    def narrow(module: nn.Module, _: Any, __: Any) -> None:
        for p, data in kept.pop(module, []):
            p.data = data

    for module in model.modules():
        if next(module.parameters(recurse=False), None) is not None:
            handles.append(module.register_forward_pre_hook(widen))
            handles.append(module.register_forward_hook(narrow, always_call=True))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
