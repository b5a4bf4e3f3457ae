"""Folders in and out: from-hf, to-hf, and what is refused."""

from __future__ import annotations

import contextlib
import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from llmrecipes.convert.commands import main
from llmrecipes.convert.folder import read_model
from llmrecipes.errors import UserError

transformers = pytest.importorskip("transformers")
from hf_models import FAMILIES, peer, tokens_for  # noqa: E402

pytestmark = pytest.mark.oracle


def tensors(folder):
    return {name: t for path in sorted(folder.glob("*.safetensors")) for name, t in load_file(path).items()}


def logits(folder):
    model = read_model(folder).model
    with torch.no_grad():
        return model.logits(model(tokens_for(model.config)).hidden)


@pytest.mark.parametrize("family", FAMILIES)
def test_there_and_back_is_bit_exact(family, tmp_path, capsys):
    """Through files: sharded in, sharded out; transformers loads what we write, with nothing missing or left over."""
    index = {"qwen3_moe": 3, "mixtral": 1, "gpt_neox": 5}.get(family, 2)
    model = peer(family, index)
    source, ours, back = tmp_path / "hf", tmp_path / "ours", tmp_path / "back"
    model.save_pretrained(source, max_shard_size="30KB")
    assert len(list(source.glob("*.safetensors"))) > 1
    assert main(["from-hf", str(source), str(ours), "--vocab_multiple", "64", "--max_shard_gb", "4e-5"]) == 0
    assert len(list(ours.glob("*.safetensors"))) > 1
    assert main(["to-hf", str(ours), str(back)]) == 0
    printed = capsys.readouterr().out
    assert printed.count("logits equal transformers' to") == 2
    theirs, again = tensors(source), tensors(back)
    if model.config.tie_word_embeddings:
        theirs.pop("lm_head.weight", None)
    assert again.keys() == theirs.keys()
    assert all(torch.equal(again[name], theirs[name]) for name in theirs)
    loaded, report = transformers.AutoModelForCausalLM.from_pretrained(back, output_loading_info=True)
    assert not any(report[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    with torch.no_grad():
        expected = model(tokens_for(model)).logits
        assert (logits(ours) - expected).abs().max() < 1e-5
        assert (loaded(tokens_for(model)).logits - expected).abs().max() < 1e-5
    generation = json.loads((back / "generation_config.json").read_text())
    assert (generation["bos_token_id"], generation["eos_token_id"]) == (1, 2)
    assert not [p for p in tmp_path.iterdir() if p.name.startswith(".tmp")]


def test_qwen1_comes_in_and_goes_out_as_qwen2(tmp_path, capsys):
    from safetensors.torch import save_file
    from test_transformers_parity import QWEN1, qwen1_files

    from llmrecipes.convert import config_from_hf
    from llmrecipes.models import Decoder, init_weights

    config = config_from_hf(QWEN1)
    decoder = Decoder(config)
    init_weights(decoder, 5)
    (tmp_path / "qwen1").mkdir()
    (tmp_path / "qwen1" / "config.json").write_text(json.dumps(QWEN1))
    files = {name: tensor.clone() for name, tensor in qwen1_files(decoder).items()}
    save_file(files, tmp_path / "qwen1" / "model.safetensors")
    main(["from-hf", str(tmp_path / "qwen1"), str(tmp_path / "ours")])
    assert "NOT compared with transformers" in capsys.readouterr().out
    ours = tensors(tmp_path / "ours")
    assert all(torch.equal(ours[name], tensor) for name, tensor in decoder.state_dict().items())
    main(["to-hf", str(tmp_path / "ours"), str(tmp_path / "qwen2")])
    assert json.loads((tmp_path / "qwen2" / "config.json").read_text())["model_type"] == "qwen2"


def a_folder(tmp_path, family="llama", index=0, name="hf"):
    source = tmp_path / name
    peer(family, index).save_pretrained(source)
    return source


def words_tokenizer(folder, words):
    """A tokenizer of as many ids as words, in the files that transformers reads."""
    import tokenizers

    vocabulary = {word: i for i, word in enumerate(words)}
    backend = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="<unk>"))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    fast = transformers.PreTrainedTokenizerFast(
        tokenizer_object=backend, unk_token="<unk>", bos_token="<s>", eos_token="</s>", chat_template="{{ messages }}"
    )
    fast.save_pretrained(folder)
    return folder


WORDS = ["<unk>", "<s>", "</s>", *(f"w{i}" for i in range(90))]


def test_tokenizer_and_chat_template_travel_and_a_wrong_one_is_refused(tmp_path):
    source = words_tokenizer(a_folder(tmp_path), WORDS)
    ours, back = tmp_path / "ours", tmp_path / "back"
    main(["from-hf", str(source), str(ours)])
    assert read_model(ours).tokenizer == ours
    assert read_model(ours).eos_ids == [2]
    main(["to-hf", str(ours), str(back)])
    there, here = (transformers.AutoTokenizer.from_pretrained(f) for f in (back, source))
    assert there.get_vocab() == here.get_vocab()
    assert there.chat_template == here.chat_template == "{{ messages }}"
    wrong = words_tokenizer(tmp_path / "wrong", [*WORDS, *(f"x{i}" for i in range(300))])
    out = tmp_path / "out"
    with pytest.raises(UserError, match=r"wrong: this tokenizer has 393 ids, the model \d+; name the model's own"):
        main(["to-hf", str(ours), str(out), "--tokenizer", str(wrong)])
    words_tokenizer(source, [*WORDS, *(f"x{i}" for i in range(300))])
    with pytest.raises(UserError, match="this tokenizer has 393 ids"):
        main(["from-hf", str(source), str(out)])
    assert not out.exists()


def test_another_tokenizer_than_that_of_the_training_data_is_refused(tmp_path, monkeypatch):
    """Of the right size, but its ids mean other words."""
    from llmrecipes.convert.folder import open_source
    from llmrecipes.convert.tokenizer_files import check_tokenizer
    from llmrecipes.data import ShardWriter
    from llmrecipes.data.tokenizer import Tokenizer

    right, wrong = words_tokenizer(tmp_path / "right", WORDS), words_tokenizer(tmp_path / "wrong", WORDS[::-1])
    with ShardWriter(tmp_path / "s", len(WORDS), eos_id=2, tokenizer_sha256=Tokenizer(right).sha256) as writer:
        writer.add([5, 6, 2])
    source = open_source(a_folder(tmp_path))
    source.shards = [str(tmp_path / "s")]
    check_tokenizer(source, right)
    with pytest.raises(UserError, match="and this is another"):
        check_tokenizer(source, wrong)


def test_bf16_export_rounds_once_and_is_compared_in_fp32(tmp_path, capsys):
    source = a_folder(tmp_path, "mixtral", 1)
    main(["from-hf", str(source), str(tmp_path / "ours")])
    main(["to-hf", str(tmp_path / "ours"), str(tmp_path / "half"), "--dtype", "bfloat16"])
    half, whole = tensors(tmp_path / "half"), tensors(source)
    assert all(torch.equal(half[name], whole[name].bfloat16()) for name in whole)
    assert json.loads((tmp_path / "half" / "config.json").read_text())["dtype"] == "bfloat16"
    main(["from-hf", str(tmp_path / "half"), str(tmp_path / "again")])
    again = tensors(tmp_path / "again")
    assert {t.dtype for n, t in again.items() if not n.endswith("gate.bias")} == {torch.bfloat16}


def test_to_hf_refuses_what_transformers_computes_otherwise(tmp_path, monkeypatch):
    """The check has teeth: a mapping that swaps gate and up is noticed, and nothing is left."""
    from llmrecipes.convert import names

    source = a_folder(tmp_path)
    ours, out = tmp_path / "ours", tmp_path / "out"
    main(["from-hf", str(source), str(ours)])
    linear = names._linear

    def swapped(ours, theirs, *rest, **more):
        yield from linear(ours, theirs[::-1] if "mlp.gate_proj" in theirs[0] else theirs, *rest, **more)

    monkeypatch.setattr(names, "_linear", swapped)
    with pytest.raises(UserError, match="logits differ from transformers' by"):
        main(["to-hf", str(ours), str(out)])
    assert [p.name for p in tmp_path.iterdir() if p.name not in ("hf", "ours")] == []


def test_a_tie_between_experts_is_no_defect_but_a_wrong_expert_is(tmp_path, monkeypatch):
    """Two experts of a layer with router rows that differ by rounding; transformers then takes the other one."""
    from llmrecipes.convert import verify

    source, ours = a_folder(tmp_path, "mixtral", 0), tmp_path / "ours"
    main(["from-hf", str(source), str(ours)])
    real = verify.load_twin

    def other_choice(folder):
        model = real(folder)
        gate = next(m for name, m in model.named_modules() if name.endswith("mlp.gate"))
        assert not torch.equal(gate.weight[0], gate.weight[1])
        gate.weight.data[[0, 1]] = gate.weight.data[[1, 0]]
        return model

    monkeypatch.setattr(verify, "load_twin", other_choice)
    with pytest.raises(UserError, match="logits differ"):
        main(["to-hf", str(ours), str(tmp_path / "wrong")])
    ties = verify.near_ties

    @contextlib.contextmanager
    def all_but_the_first(decoder, tokens):
        """As if every second token of each row were undecided: the first alone is compared, and it may be right."""
        with ties(decoder, tokens) as undecided:
            yield undecided
        undecided[:, 0:] = True

    monkeypatch.setattr(verify, "near_ties", all_but_the_first)
    with pytest.raises(UserError, match="logits differ from transformers' by inf"):
        main(["to-hf", str(ours), str(tmp_path / "wrong")])


def test_a_model_that_fp32_rounds_is_measured_by_that_and_a_defect_still_found(tmp_path, capsys):
    """Scores of hundreds: a last bit moves what is attended to, in transformers as here."""
    from llmrecipes.convert.folder import open_source
    from llmrecipes.convert.verify import verify_logits

    torch.manual_seed(0)
    config = transformers.GemmaConfig(
        vocab_size=120, hidden_size=48, intermediate_size=96, num_hidden_layers=6, num_attention_heads=4,
        num_key_value_heads=2, head_dim=16, initializer_range=1.0,
    )  # fmt: skip
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "hf")
    main(["from-hf", str(tmp_path / "hf"), str(tmp_path / "ours")])
    assert "note: fp32 alone rounds this model's logits by up to " in capsys.readouterr().out
    assert 1e-5 < verify_logits(open_source(tmp_path / "ours"), tmp_path / "hf") < 1e-3
    weights = load_file(tmp_path / "ours" / "model.safetensors")
    weights["layers.5.mlp_norm.weight"] += 0.003  # a slip that is felt in the fourth digit
    save_file(weights, tmp_path / "ours" / "model.safetensors")
    with pytest.raises(UserError, match="This is a defect of the conversion"):
        verify_logits(open_source(tmp_path / "ours"), tmp_path / "hf")


def test_near_ties_are_found_where_they_are():
    from llmrecipes.convert.verify import near_ties
    from llmrecipes.models import Decoder, ModelConfig, MoEConfig

    moe = MoEConfig(num_experts=3, top_k=1, ffn_dim=8, renormalize=False)
    model = Decoder(ModelConfig(vocab_size=9, dim=8, num_layers=1, num_heads=2, moe=moe)).eval()
    router = model.layers[0].mlp.gate
    tokens = tokens_for(model.config, 12)
    with torch.no_grad():
        with near_ties(model, tokens) as undecided:
            model(tokens)
        assert not undecided.any()
        router.weight[1] = router.weight[0] + 1e-7
        with near_ties(model, tokens) as undecided:
            model(tokens)
        assert 0 < undecided.sum() < undecided.numel()  # where the third is best, the tie does not matter
    assert not router._forward_hooks


def test_mistakes_are_told(tmp_path):
    source = a_folder(tmp_path)
    ours, out = tmp_path / "ours", tmp_path / "out"
    main(["from-hf", str(source), str(ours)])
    out.mkdir()
    for words, problem in (
        (["from-hf", str(source), str(out)], "exists already"),
        (["to-hf", str(ours), str(out)], "exists already"),
        (["to-hf", str(source), str(tmp_path / "x")], "is a Hugging Face folder already"),
        (["from-hf", str(ours), str(tmp_path / "x")], "no Hugging Face folder"),
        (["from-hf", str(tmp_path / "absent"), str(tmp_path / "x")], "no such folder"),
        (["from-hf", str(source), str(tmp_path / "x"), "--vocab_multiple", "0"], "must be 1 or more"),
        (["from-hf", str(source), str(tmp_path / "x"), "--max_shard_gb", "0"], "must be larger than 0"),
    ):
        with pytest.raises(UserError, match=problem):
            main(words)
    (source / "model.safetensors").rename(source / "pytorch_model.bin")
    with pytest.raises(UserError, match=r"pytorch_model.bin may hold code and is not read"):
        main(["from-hf", str(source), str(tmp_path / "x")])
    shutil.copy(ours / "model.safetensors", source)
    with pytest.raises(UserError, match=r"lacks model\.embed_tokens\.weight"):
        main(["from-hf", str(source), str(tmp_path / "x")])
    (source / "model.safetensors").write_bytes((ours / "model.safetensors").read_bytes()[:3000])
    with pytest.raises(UserError, match="not a readable safetensors file"):
        main(["from-hf", str(source), str(tmp_path / "x")])
    assert not (tmp_path / "x").exists()


def test_no_two_copies_of_the_model_in_memory(tmp_path):
    """Peak of a conversion, above what loading the libraries takes, against the size of the model.

    Anonymous memory: pages of a mapped file are counted as resident too, but the system takes them back at will.
    """
    import subprocess
    import sys

    config = transformers.LlamaConfig(
        vocab_size=8000, hidden_size=1024, intermediate_size=4096, num_hidden_layers=6, num_attention_heads=8,
        max_position_embeddings=64,
    )  # fmt: skip
    model = transformers.AutoModelForCausalLM.from_config(config)
    model.save_pretrained(tmp_path / "hf", max_shard_size="50MB")
    size = sum(p.numel() for p in model.parameters()) * 4
    code = (
        "import threading, transformers, torch\n"
        "from transformers import LlamaForCausalLM\n"
        "from llmrecipes.convert.from_hf import from_hf\n"
        "from llmrecipes.convert.to_hf import to_hf\n"
        "def anonymous():\n"
        "    with open('/proc/self/status') as f:\n"
        "        lines = dict(line.split(':', 1) for line in f)\n"
        "    return int(lines['RssAnon'].split()[0]) * 1024\n"
        "before, most, over = anonymous(), 0, threading.Event()\n"
        "def watch():\n"
        "    global most\n"
        "    while not over.wait(0.002):\n"
        "        most = max(most, anonymous() - before)\n"
        "watcher = threading.Thread(target=watch, daemon=True)\n"
        "watcher.start()\n"
        f"from_hf({str(tmp_path / 'hf')!r}, {str(tmp_path / 'ours')!r})\n"
        f"to_hf({str(tmp_path / 'ours')!r}, {str(tmp_path / 'back')!r})\n"
        "over.set()\n"
        "watcher.join()\n"
        "print(most)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    peak = int(done.stdout.splitlines()[-1])
    print(f"model {size / 1e6:.0f} MB, peak {peak / 1e6:.0f} MB")
    assert 0.9 * size < peak < 1.3 * size
