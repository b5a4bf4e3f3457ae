"""Little tokenizers with chat templates, made in a moment."""

from __future__ import annotations

import json
from pathlib import Path

TEXT = [
    "質問に答えてください。数字だけ。",
    "What is 12 + 7 ? The answer is 19.",
    "回答（数値）：はい、いいえ\n\n### 指示:\n### 応答:\n",
]
CHATML = (
    "{% for message in messages %}{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + "
    "'\n'}}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
LLAMA2 = (
    "{% for m in messages %}{% if m['role'] == 'user' %}{{ bos_token + '[INST] ' + m['content'] + ' [/INST]' }}"
    "{% elif m['role'] == 'assistant' %}{{ ' ' + m['content'] + ' ' + eos_token }}{% endif %}{% endfor %}"
)


def byte_level(folder: Path, template: str | None = CHATML, eos: str = "<|im_end|>") -> Path:
    """A byte-level BPE as SmolLM2's, in Hugging Face's files; EOS is also the padding."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<s>", "</s>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=400, special_tokens=special, initial_alphabet=alphabet)
    tokenizer.train_from_iterator(TEXT, trainer)
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<s>",
        "eos_token": eos,
        "pad_token": eos,
    }
    if template is not None:
        config["chat_template"] = template
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


def pieces(folder: Path) -> Path:
    """A SentencePiece model as this project trains them."""
    import sentencepiece

    folder.mkdir(parents=True, exist_ok=True)
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(TEXT * 4), model_prefix=str(folder / "tokenizer"), vocab_size=340, model_type="unigram",
        byte_fallback=True, add_dummy_prefix=False, remove_extra_whitespaces=False, hard_vocab_limit=False,
        normalization_rule_name="identity", user_defined_symbols=["\n"], minloglevel=2,
    )  # fmt: skip
    return folder
