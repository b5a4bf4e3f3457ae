"""Texts and a Hugging Face folder for the tests of inference."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

JAPANESE = "日本の首都は東京です。𠮷野家で🍣を食べた。鬱驫麤の字は難しい。"
ENGLISH = "Hello  world, this is a test. The quick brown fox"
TEMPLATE = (
    "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def make_hf_folder(folder: Path, begin: bool = False, template: str | None = TEMPLATE, **options) -> Path:
    """A Llama of random weights and a byte-level BPE of two texts; with ``begin`` it puts <s> before every text."""
    transformers = pytest.importorskip("transformers")
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    special = ["<s>", "</s>", "<|user|>", "<|assistant|>", "<|system|>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    bpe.train_from_iterator(
        [ENGLISH] * 3, trainers.BpeTrainer(vocab_size=290, special_tokens=special, initial_alphabet=alphabet)
    )
    if begin:
        bpe.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=bpe, bos_token="<s>", eos_token="</s>")
    tokenizer.chat_template = template
    tokenizer.save_pretrained(folder)
    sizes = {
        "vocab_size": 300, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "max_position_embeddings": 128, "initializer_range": 0.3, "bos_token_id": 0,
        "eos_token_id": 1,
    }  # fmt: skip
    torch.manual_seed(6)
    transformers.LlamaForCausalLM(transformers.LlamaConfig(**(sizes | options))).save_pretrained(folder)
    return folder
