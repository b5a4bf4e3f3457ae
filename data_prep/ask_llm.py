"""The share of yes that a language model gives to a question about a text (Ask-LLM, arXiv:2402.09668), batch by batch.

A score depends on its own text only: prompts of a batch are filled up on the left, with positions and a mask that skip
the filling, so the last position is each prompt's own. (A source system filled up on the right and read the last
position: scores depended on the batch.)
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from llmrecipes.errors import UserError

TEMPLATES = {
    "document_en": (
        "###\n{text}\n###\n\nDoes the previous paragraph demarcated within ### and ### contain informative signal for "
        "pre-training a large-language model? An informative datapoint should be well-formatted, contain some usable "
        "knowledge of the world, and strictly NOT have any harmful, racist, sexist, etc. content.\n\nOPTIONS:\n- yes\n"
        "- no\n\nANSWER:"
    ),
    "document_ja": (
        "###\n{text}\n###\n\n上の###で囲まれた文章は、大規模言語モデルの事前学習に役立つ情報を含んでいますか。文章として整い、"
        "世の中の知識を含み、有害な内容がないものを役立つとします。\n\n選択肢:\n- はい\n- いいえ\n\n答え:"
    ),
    "conversation_en": (
        "###\n{text}\n###\n\nIs the assistant's last answer in the previous conversation demarcated within ### and ### "
        "correct, helpful, and fit to train an assistant on?\n\nOPTIONS:\n- yes\n- no\n\nANSWER:"
    ),
    "conversation_ja": (
        "###\n{text}\n###\n\n上の###で囲まれた会話の最後の答えは、正しく、役に立ち、対話モデルの学習に適していますか。\n\n選択肢:\n"
        "- はい\n- いいえ\n\n答え:"
    ),
}
YES = {"en": ["yes", "Yes", " yes", " Yes"], "ja": ["はい", " はい"]}


class Scorer:
    """Scores prompts with a causal language model of a Hugging Face folder (as `convert to-hf` writes them too).

    Args:
        folder: model and tokenizer.
        template: text with {text} in it.
        yes: answers that count as yes; those that are one token are used.
        max_tokens: of a prompt; the text is cut so that the question stays whole.
        device: such as cpu or cuda.

    Raises:
        UserError: no model there, the template has no {text}, or no answer is one token.
    """

    def __init__(self, folder: str, template: str, yes: Sequence[str], max_tokens: int, device: str = "cpu") -> None:
        import torch
        from transformers import AutoModelForCausalLM, AutoTokenizer

        if not (Path(folder) / "config.json").is_file():
            raise UserError(f"{folder}: no config.json in it; name a Hugging Face folder (llmrecipes convert to-hf)")
        self._tokenizer = AutoTokenizer.from_pretrained(folder)
        dtype = torch.float32 if device == "cpu" else torch.bfloat16
        model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
        self._model = model.to(device).eval()
        self._device = device
        before, mark, after = template.partition("{text}")
        if not mark:
            raise UserError("template: holds no {text}; say where the document goes")
        self._before = self._ids(before)
        self._after = self._ids(after)
        self._room = max_tokens - len(self._before) - len(self._after) - 1
        if self._room < 1:
            raise UserError(
                f"max_tokens {max_tokens}: the question alone has {max_tokens - self._room - 1}; allow more"
            )
        single = [ids[0] for ids in map(self._ids, yes) if len(ids) == 1]
        # "は" may be all that "はい" begins with: only whole answers count.
        self._yes = sorted(set(single) - {self._tokenizer.unk_token_id})
        if not self._yes:
            raise UserError(f"yes: none of {', '.join(map(repr, yes))} is one token of {folder}; name other answers")

    def _ids(self, text: str) -> list[int]:
        return list(self._tokenizer(text, add_special_tokens=False)["input_ids"])

    def prompt(self, text: str) -> list[int]:
        """Ids of the question about a text; ### in it would end the quotation, and is left out."""
        body = self._ids(text.replace("###", ""))[: self._room]
        begin = [] if self._tokenizer.bos_token_id is None else [self._tokenizer.bos_token_id]
        return [*begin, *self._before, *body, *self._after]

    def scores(self, texts: Sequence[str], batch_size: int) -> np.ndarray:
        """P(yes) of each text [N], float64; texts of one length are scored together to waste little filling."""
        prompts = [self.prompt(text) for text in texts]
        order = sorted(range(len(prompts)), key=lambda place: len(prompts[place]))
        found = np.zeros(len(prompts))
        for start in range(0, len(order), batch_size):
            chosen = order[start : start + batch_size]
            found[chosen] = self._batch([prompts[place] for place in chosen])
        return found

    def _batch(self, prompts: list[list[int]]) -> np.ndarray:
        import torch

        longest = max(map(len, prompts))
        ids = torch.zeros((len(prompts), longest), dtype=torch.long)
        mask = torch.zeros_like(ids)
        for row, prompt in enumerate(prompts):
            ids[row, longest - len(prompt) :] = torch.tensor(prompt)
            mask[row, longest - len(prompt) :] = 1
        positions = (mask.cumsum(1) - 1).clamp(min=0)
        device = self._device
        with torch.inference_mode():
            logits = self._model(
                input_ids=ids.to(device),
                attention_mask=mask.to(device),
                position_ids=positions.to(device),
                logits_to_keep=1,
                use_cache=False,
            ).logits[:, -1]
        return logits.double().softmax(-1)[:, self._yes].sum(-1).cpu().numpy()
