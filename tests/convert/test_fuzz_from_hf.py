"""Damaged Hugging Face folders: every one is read right or refused in clear sentences, and nothing is left behind."""

from __future__ import annotations

import contextlib
import json
import random
import shutil

import pytest
import torch

from llmrecipes.cli import main
from llmrecipes.convert import config_from_hf, config_to_hf
from llmrecipes.errors import UserError

transformers = pytest.importorskip("transformers")
from hf_models import FAMILIES as ALL_FAMILIES  # noqa: E402
from hf_models import random_config  # noqa: E402

pytestmark = pytest.mark.oracle

CASES = 300
FAMILIES = ("llama", "mixtral", "gpt2", "gpt_neox", "phi3", "gemma3_text", "qwen2", "granite")
ODD = (
    None, -1, 0, 1, 3, 64, 2**40, 10**30, 1.5, -0.5, 1e308, float("nan"), float("inf"), "", "x", "64", True, False, [],
    [1], [None], ["sliding_attention"], {}, {"a": 1}, {"rope_type": "yarn"}, {"type": "longrope", "short_factor": 3},
    "gelu", "float16",
)  # fmt: skip


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """One little model of each family, in two files with an index."""
    made = {}
    for family in FAMILIES:
        config = random_config(family, 1)
        torch.manual_seed(0)
        made[family] = tmp_path_factory.mktemp("hf") / family
        model = transformers.AutoModelForCausalLM.from_config(config)
        size = sum(p.numel() for p in model.parameters()) * 4
        model.save_pretrained(made[family], max_shard_size=size * 2 // 3)
        assert (made[family] / "model.safetensors.index.json").exists()
    return made


def odd_key(draw, path):
    """Another value, or none, for a key of config.json, or of a mapping or list in it."""
    hf = json.loads((path / "config.json").read_text())
    holder = hf
    key = draw.choice([*hf, "unknown_key", "rope_scaling", "layer_types", "head_dim", "sliding_window"])
    if isinstance(hf.get(key), dict) and hf[key] and draw.random() < 0.7:
        holder, key = hf[key], draw.choice([*hf[key], "factor", "rope_type"])
    if draw.random() < 0.15:
        holder.pop(key, None)
    else:
        holder[key] = draw.choice(ODD)
    (path / "config.json").write_text(json.dumps(hf))


def two_odd_keys(draw, path):
    odd_key(draw, path)
    odd_key(draw, path)


def other_family(draw, path):
    hf = json.loads((path / "config.json").read_text())
    hf["model_type"] = draw.choice([*FAMILIES, "olmoe", "bloom", "qwen3", "mistral", "", 5, None, ["llama"], {}])
    (path / "config.json").write_text(json.dumps(hf))


def broken_text(draw, path):
    """A file of JSON that is none, or not a mapping."""
    file = path / draw.choice(["config.json", "model.safetensors.index.json", "generation_config.json"])
    data = file.read_bytes() if file.exists() else b"{}"
    cut = draw.randrange(len(data))
    kinds = [data[:cut], data[:cut] + b"\xff" + data[cut:], b"", b"[]", b"3", b"null", b"[" * 100_000, b'"text"', b"{}"]
    file.write_bytes(draw.choice(kinds))


def odd_index(draw, path):
    index = path / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    places = content["weight_map"]
    name = draw.choice(list(places))
    places[name] = draw.choice(
        [None, 3, "", "absent.safetensors", "../other.safetensors", "/etc/hostname", ["x"], {}, "."]
    )
    if draw.random() < 0.3:
        content["weight_map"] = draw.choice([None, [], 3, {}, "x"])
    index.write_text(json.dumps(content))


def odd_ids(draw, path):
    """generation_config.json with ids that are none."""
    ids = {key: draw.choice(ODD) for key in ("bos_token_id", "eos_token_id", "pad_token_id")}
    (path / "generation_config.json").write_text(json.dumps(ids))


def odd_tokenizer(draw, path):
    texts = ["", "{}", "[]", "{", '{"model": 3}', '{"model": {"type": "BPE", "vocab": {}, "merges": []}}', "\x00" * 40]
    (path / draw.choice(["tokenizer.json", "tokenizer.model"])).write_text(draw.choice(texts))


def broken_tensors(draw, path):
    """A file of tensors that ends early, or whose head was changed."""
    file = draw.choice(sorted(path.glob("*.safetensors")))
    data = bytearray(file.read_bytes())
    head = int.from_bytes(data[:8], "little")
    kind = draw.randrange(5)
    if kind == 0:
        data = data[: draw.randrange(len(data))]
    elif kind == 1:
        data[:8] = draw.choice([0, 1, head - 3, head + 9, 2**40, 2**63, 2**64 - 1]).to_bytes(8, "little")
    elif kind == 2:
        for _ in range(draw.randrange(1, 6)):
            data[8 + draw.randrange(head)] = draw.randrange(256)
    elif kind == 3:
        file.unlink()
        return
    else:
        entries = json.loads(data[8 : 8 + head])
        entry = entries[draw.choice([n for n in entries if n != "__metadata__"])]
        entry[draw.choice(["dtype", "shape", "data_offsets"])] = draw.choice(
            [
                "F32",
                "I64",
                "X",
                None,
                3,
                [],
                [-1, 4],
                [2**40, 2**40],
                ["a"],
                [0, 0],
                [4, 0],
                [1.5, 2],
                [10**25, 10**26],
                {},
            ]
        )
        text = json.dumps(entries).encode()
        data = len(text).to_bytes(8, "little") + text + data[8 + head :]
    file.write_bytes(bytes(data))


DAMAGES = (odd_key, odd_key, odd_key, odd_key, two_odd_keys, other_family, broken_text, odd_index, odd_ids,
           odd_tokenizer, broken_tensors, broken_tensors)  # fmt: skip


def damaged(folders, index, path):
    draw = random.Random(index)
    family, damage = FAMILIES[index % len(FAMILIES)], DAMAGES[draw.randrange(len(DAMAGES))]
    shutil.copytree(folders[family], path)
    damage(draw, path)
    return f"case {index}: {damage.__name__} of {family}"


SENTENCES = [
    ({"num_hidden_layers": 9_999}, "config.json: 9,999 layers, but the files hold 20 tensors only"),
    ({"num_hidden_layers": 10**7}, "num_hidden_layers 10000000: more than 10,000 is surely a mistake"),
    ({"hidden_size": 2**40}, "hidden_size 1099511627776: more than 1,048,576 is surely a mistake"),
    ({"hidden_size": "64"}, "hidden_size '64': a whole number above 0 is needed"),
    ({"rms_norm_eps": float("nan")}, "rms_norm_eps nan: a number above 0 is needed"),
    ({"tie_word_embeddings": "yes"}, "tie_word_embeddings 'yes': true or false is needed"),
    ({"layer_types": 3}, "layer_types 3: "),
    ({"vocab_size": None}, "vocab_size None: a whole number above 0 is needed"),
    ({"torch_dtype": "float12", "dtype": None}, "transformers does not load it: "),
]


@pytest.mark.parametrize(("change", "sentence"), SENTENCES, ids=lambda value: str(value)[:40])
def test_sentences(folders, tmp_path, capsys, change, sentence):
    shutil.copytree(folders["llama"], tmp_path / "hf")
    hf = json.loads((tmp_path / "hf" / "config.json").read_text()) | change
    (tmp_path / "hf" / "config.json").write_text(json.dumps(hf))
    assert main(["convert", "from-hf", str(tmp_path / "hf"), str(tmp_path / "ours")]) == 2
    assert sentence in capsys.readouterr().err
    assert [p.name for p in tmp_path.iterdir()] == ["hf"]


def test_thousands_of_missing_tensors_are_not_all_listed(folders, tmp_path, capsys):
    shutil.copytree(folders["mixtral"], tmp_path / "hf")
    hf = json.loads((tmp_path / "hf" / "config.json").read_text()) | {"num_local_experts": 25}
    (tmp_path / "hf" / "config.json").write_text(json.dumps(hf))
    assert main(["convert", "from-hf", str(tmp_path / "hf"), str(tmp_path / "ours")]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 21 and lines[-1].endswith("more like these")


def test_damaged_folders_are_read_right_or_refused(folders, tmp_path, capsys):
    codes = {0: 0, 2: 0}
    for index in range(CASES):
        source = tmp_path / "hf"
        what = damaged(folders, index, source)
        try:
            code = main(["convert", "from-hf", str(source), str(tmp_path / "ours")])
        except BaseException as error:
            raise AssertionError(what) from error
        said = capsys.readouterr()
        codes[code] += 1
        left = sorted(p.name for p in tmp_path.iterdir())
        if code == 0:
            assert "logits equal transformers' to" in said.out and left == ["hf", "ours"], what
            shutil.rmtree(tmp_path / "ours")
        else:
            lines = said.err.strip().splitlines()
            assert lines and left == ["hf"] and "Traceback" not in said.err, what
            assert all(line.startswith("error: ") and len(line) > 20 for line in lines), (what, lines)
        shutil.rmtree(source)
    assert sum(codes.values()) == CASES
    assert codes[2] > CASES / 2 and codes[0] > CASES / 15, codes  # both happen


def test_every_key_of_every_family_with_every_odd_value():
    """Of config.json alone: a configuration that can be written again, or sentences."""
    read = refused = 0
    for family in ALL_FAMILIES:
        hf = random_config(family, 1).to_dict()
        inside = [("rope_parameters", key) for key in hf.get("rope_parameters") or {}]
        for place in [*((key,) for key in hf), *inside, ("rope_scaling",), ("surprise",)]:
            for value in ODD:
                changed = json.loads(json.dumps(hf))
                holder = changed if len(place) == 1 else changed[place[0]]
                holder[place[-1]] = value
                try:
                    config = config_from_hf(changed)
                except UserError as error:
                    refused += 1
                    assert all(p.startswith("config.json: ") and len(p) > 25 for p in error.problems), (
                        family,
                        place,
                        value,
                    )
                    continue
                except Exception as error:
                    raise AssertionError(f"{family}: {'.'.join(place)} = {value!r}") from error
                read += 1
                with contextlib.suppress(UserError):  # what its twin cannot have, such as a head_dim of its own
                    config_to_hf(config, 64)
    assert len(ALL_FAMILIES) == 19 and read > 2000 and refused > 6000, (read, refused)
