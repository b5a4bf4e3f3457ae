"""Our models as lm-evaluation-harness asks them. Needs the extra ``eval``.

Requests become tokens by the rules of the harness's own ``HFLM``, so that a checkpoint and its exported folder get the
same scores; what is computed is ours: documents packed without padding, experts that take every token.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import Any

import torch
from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import handle_stop_sequences, normalize_gen_kwargs
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from tqdm import tqdm

from llmrecipes.inference.generate_command import Request, write
from llmrecipes.inference.opened import Opened
from llmrecipes.inference.perplexity import TOKENS_AT_ONCE
from llmrecipes.inference.prompts import Prompt
from llmrecipes.models import Sampling

LONGEST = 2048  # where nothing says how long a text the model was made for
NEW_TOKENS = 256  # of an answer, where the task does not say: as HFLM
ROWS_AT_ONCE = 512  # of logits
Pair = tuple[Any, list[int], list[int]]  # request (unused), context, continuation


class DecoderLM(TemplateLM):
    """A decoder of ours, dense or with experts, behind the harness's interface.

    Args:
        opened: the model and its tokenizer.
        batch_size: texts written side by side.
        chat: requests are conversations, written by the model's chat template: special pieces stand in them.

    Attributes:
        shortened: requests that lost tokens on the left, because the model was not made for their length.
    """

    def __init__(self, opened: Opened, batch_size: int = 8, chat: bool = False) -> None:
        super().__init__()
        self.opened = opened
        self.chat = chat
        self.batch_size = batch_size
        self.max_length = opened.max_seq_len or LONGEST
        self.shortened = 0

    @property
    def device(self) -> torch.device:
        """That computes."""
        return self.opened.model.head_weight.device

    @property
    def eot_token_id(self) -> int:
        """Ends a text."""
        return self.opened.codec.eos_ids[0]

    @property
    def prefix_token_id(self) -> int:
        """Stands before a text that has nothing before it."""
        begin = self.opened.codec.bos_id
        return self.eot_token_id if begin is None else begin

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        """Ids of a text, with the piece that the tokenizer begins every text with unless told otherwise.

        As HFLM a template's own beginning piece is not doubled.
        """
        if self.chat:
            ids, begin = self.opened.codec.encode_chat(string), self.prefix_token_id
            wanted = self._begins_texts and add_special_tokens is not False
            return [begin, *ids] if wanted and ids[:1] != [begin] else ids
        ids, characters = self.opened.codec.encode_span(string)
        begins = bool(ids) and characters == 0 and ids[0] == self.opened.codec.bos_id
        return ids[1:] if begins and add_special_tokens is False else ids

    @cached_property
    def _begins_texts(self) -> bool:
        """Whether the tokenizer puts its beginning piece before every text by itself."""
        ids, characters = self.opened.codec.encode_span("a")
        return characters == 0 and ids[0] == self.opened.codec.bos_id

    # ---- conversations

    @property
    def tokenizer_name(self) -> str:
        """Names what the harness keeps of requests."""
        return str(self.opened.codec.folder).replace("/", "__")

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        """The model's own; there is one only, so that a name chooses nothing.

        Raises:
            UserError: there is none.
        """
        return self.opened.codec.chat_template if chat_template else None

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """A conversation as text. Without ``add_generation_prompt`` it ends with the last message's words, which the
        model is to go on from (transformers' ``continue_final_message``).
        """
        text = self.opened.codec.chat_text(chat_history, add_generation_prompt)
        if add_generation_prompt:
            return text
        last = chat_history[-1]["content"]
        at = text.rindex(last.strip())
        kept = last.lstrip() if text.startswith(last.lstrip(), at) else last.strip()
        return text[:at] + kept

    # ---- how likely

    def _loglikelihood_tokens(
        self, requests: Sequence[Pair], disable_tqdm: bool = False, **_: Any
    ) -> list[tuple[float, bool]]:
        """For each continuation the sum of its tokens' ln p, and whether each is the likeliest."""
        texts = [self._fit(context, continuation) for _, context, continuation in requests]
        order = sorted(range(len(texts)), key=lambda i: -len(texts[i]))
        found: dict[int, tuple[float, bool]] = {}
        group: list[int] = []
        with tqdm(total=len(texts), disable=disable_tqdm, desc="likelihoods", mininterval=5) as progress:
            for i in [*order, None]:
                if i is None or sum(len(texts[j]) for j in group) + len(texts[i]) > TOKENS_AT_ONCE:
                    lengths = [len(requests[j][2]) for j in group]
                    found |= dict(zip(group, self._score([texts[j] for j in group], lengths), strict=True))
                    progress.update(len(group))
                    group = []
                if i is not None:
                    group.append(i)
        return [found[i] for i in range(len(texts))]

    def _fit(self, context: list[int], continuation: list[int]) -> list[int]:
        """Both in a row, shortened on the left; the last token is predicted only and needs no position."""
        whole = context + continuation
        self.shortened += len(whole) > self.max_length + 1
        return whole[-(self.max_length + 1) :]

    @torch.inference_mode()
    def _score(self, texts: list[list[int]], scored: list[int]) -> list[tuple[float, bool]]:
        if not texts:
            return []
        model, lengths = self.opened.model, [len(text) - 1 for text in texts]
        tokens = torch.tensor([[token for text in texts for token in text[:-1]]], device=self.device)
        hidden = model(tokens, document_lengths=[lengths], dropless=True).hidden[0]
        found = []
        for text, count, part in zip(texts, scored, hidden.split(lengths), strict=True):
            labels = torch.tensor(text[-count:], device=self.device)
            total, greedy = 0.0, True
            for rows, wanted in zip(part[-count:].split(ROWS_AT_ONCE), labels.split(ROWS_AT_ONCE), strict=True):
                scores = model.logits(rows).log_softmax(-1)
                total += float(scores.gather(1, wanted[:, None]).sum())
                greedy = greedy and bool((scores.argmax(-1) == wanted).all())
            found.append((total, greedy))
        return found

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        """ln p of whole texts, read in windows that do not overlap, the first behind the piece that begins a text."""
        windows: list[Pair] = []
        counts = []
        for request in requests:
            pieces = get_rolling_token_windows(
                self.tok_encode(request.args[0]), self.prefix_token_id, self.max_length, context_len=1
            )
            found = [(None, *make_disjoint_window(piece)) for piece in pieces]
            windows += found
            counts.append(len(found))
        scores = iter(self._loglikelihood_tokens(windows, disable_tqdm))
        return [sum(next(scores)[0] for _ in range(count)) for count in counts]

    # ---- text

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """What the model writes after each context, up to a stop string, the end piece or ``max_gen_toks``."""
        encoded = [self.tok_encode(request.args[0]) for request in requests]
        order = sorted(range(len(requests)), key=lambda i: (str(requests[i].args[1]), len(encoded[i])))
        texts: dict[int, str] = {}
        with tqdm(total=len(requests), disable=disable_tqdm, desc="answers", mininterval=5) as progress:
            while order:
                asked = requests[order[0]].args[1]
                group = [i for i in order[: self.batch_size] if requests[i].args[1] == asked]
                order = order[len(group) :]
                texts |= zip(group, self._write([encoded[i] for i in group], asked), strict=True)
                progress.update(len(group))
        return [texts[i] for i in range(len(requests))]

    def _write(self, contexts: list[list[int]], asked: dict[str, Any]) -> list[str]:
        given: dict[str, Any] = dict(normalize_gen_kwargs(asked, NEW_TOKENS))
        new = given["max_gen_toks"]
        room = self.max_length - new
        if room < 1:
            raise ValueError(f"max_gen_toks {new} leaves no room for a context in {self.max_length} positions")
        self.shortened += sum(len(context) > room for context in contexts)
        sampling = Sampling(
            temperature=given.get("temperature") or 0.0, top_k=given.get("top_k"), top_p=given.get("top_p") or 1.0
        )
        stops = handle_stop_sequences(given.get("until"), None)
        contexts = [context[-room:] for context in contexts]
        written = write(self.opened, [Prompt("")] * len(contexts), contexts, Request(new, sampling, stops))
        return [self._text(one.ids, stops) for one in written]

    def _text(self, ids: list[int], stops: list[str]) -> str:
        """Of the new tokens alone, as HFLM decodes them: SentencePiece then drops a space at the beginning."""
        codec = self.opened.codec
        text = codec.decode([i for i in ids if i not in codec.eos_ids])
        for stop in stops:
            text = text.split(stop)[0] if stop else text
        return text
