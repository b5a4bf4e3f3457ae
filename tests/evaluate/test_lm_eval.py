"""lm-evaluation-harness on our checkpoint and, by its own class, on the exported folder: identical scores."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path

import pytest
import torch
import yaml
from helpers import cli
from lm_eval_peer import __file__ as PEER
from peers import peer_packages, run_with_peer

from llmrecipes.errors import UserError
from llmrecipes.evaluate.config import TaskConfig
from llmrecipes.evaluate.harness import check_harness
from llmrecipes.models import Decoder, init_weights

sys.path.insert(0, str(Path(__file__).parents[1] / "data"))

# What the harness needs beside the project's own packages; HFLM needs accelerate.
PACKAGES = [
    "lm_eval==0.4.13", "evaluate==0.4.6", "more_itertools==11.2.1", "pytablewriter==1.2.1",
    "dataproperty==1.1.1", "mbstrdecoder==1.1.5", "typepy==1.3.5", "tabledata==1.3.5",
    "pathvalidate==3.3.1", "tcolorpy==0.1.7", "rouge_score==0.1.2", "absl_py==2.5.1",
    "nltk==3.10.4", "sacrebleu==2.6.0", "portalocker==4.4.2", "tabulate==0.10.0",
    "colorama==0.4.6", "lxml==6.1.3", "sqlitedict==2.1.0", "word2number==1.1",
    "chardet==7.7.0", "accelerate==1.15.0",
]  # fmt: skip
SIZES = {"dim": 32, "num_layers": 2, "num_heads": 4, "num_kv_heads": 2, "ffn_dim": 48, "init_std": 0.3}


def make_run(folder: Path, tokenizer: Path, state=None, **options) -> Path:
    """A run folder with one checkpoint."""
    from llmrecipes.checkpoint import TrainingState, write_checkpoint
    from llmrecipes.data import Tokenizer
    from llmrecipes.recipe.rules.model import build_config

    config = SIZES | {"vocab_size": Tokenizer(tokenizer).vocab_size} | options
    model = Decoder(build_config(config))
    init_weights(model, 5)
    if state is not None:
        model.load_state_dict(state, strict=False)
    # Random weights would write bytes that are no text, which SentencePiece and transformers show differently.
    pieces = Tokenizer(tokenizer)
    single = [i for i in range(pieces.vocab_size) if pieces.piece(i).startswith("<0x")]
    model.head_weight.data[single] = 0.0
    data = {"class_path": "llmrecipes.data.PackedShards", "init_args": {"seq_len": 128, "tokenizer": str(tokenizer)}}
    init = {"class_path": "llmrecipes.modules.PretrainModule", "init_args": {"config": config}}
    folder.mkdir()
    (folder / "recipe.yaml").write_text(yaml.safe_dump({"name": folder.name, "model": init, "data": data}))
    info = {"progress": {"trajectory": {"model": {"config": config}, "data": {"seq_len": 128}}}}
    write_checkpoint(folder / "checkpoints", TrainingState(3, model.state_dict(), {}, {"x": torch.zeros(1)}, info))
    return folder


def make_tasks(folder: Path) -> Path:
    """One task of each kind: choices, written answers, whole texts longer than the model reads at once."""
    folder.mkdir()
    words = ["river", "town", "long", "cold", "bridge", "川", "町", "長い", "橋", "12", "7"]
    rows = [
        {
            "q": f"{words[i % 11]} {words[i * 3 % 11]} is",
            "c": [f" {words[(i + k) % 11]} {words[(i + 2 * k) % 11]}" for k in range(4)],
            "a": i % 4,
            "text": " ".join(words[(i * k) % 11] for k in range(1, 120)),
        }
        for i in range(12)
    ]
    (folder / "rows.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    base = {"dataset_path": "json", "dataset_kwargs": {"data_files": {"test": str(folder / "rows.jsonl")}}}
    base |= {"test_split": "test", "metadata": {"version": 1.0}}
    tasks = {
        "choices": {
            "output_type": "multiple_choice",
            "doc_to_text": "{{q}}",
            "doc_to_choice": "{{c}}",
            "doc_to_target": "a",
            "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}],
        },
        "written": {
            "output_type": "generate_until",
            "doc_to_text": "{{q}}",
            "doc_to_target": "{{c[0]}}",
            "generation_kwargs": {"until": ["\n", "e"], "do_sample": False, "max_gen_toks": 12},
            "metric_list": [{"metric": "exact_match"}],
        },
        "texts": {
            "output_type": "loglikelihood_rolling",
            "doc_to_text": "",
            "doc_to_target": "{{text}}",
            "metric_list": [{"metric": "bits_per_byte"}, {"metric": "word_perplexity"}],
        },
    }
    for name, task in tasks.items():
        (folder / f"{name}.yaml").write_text(yaml.safe_dump({"task": name} | base | task, allow_unicode=True))
    return folder


@pytest.fixture(scope="module")
def compared(tmp_path_factory):
    """A dense run, a run of experts, one of experts of adapters that do nothing yet, and what they export."""
    from chat_tokenizers import byte_level

    from data_prep.demo_corpus import demo
    from data_prep.tokenizer import train_tokenizer

    packages = peer_packages(tmp_path_factory, *PACKAGES)
    folder = tmp_path_factory.mktemp("lm_eval")
    byte_level(folder / "bytes", None)
    demo(str(folder / "corpus"), documents=100, seed=3)
    train_tokenizer([str(folder / "corpus" / "en_towns.jsonl")], str(folder / "pieces"), vocab_size=360, num_threads=1)
    moe = {"num_experts": 4, "top_k": 2, "ffn_dim": 24}
    dense = make_run(folder / "dense", folder / "bytes")
    experts = make_run(folder / "moe", folder / "pieces", moe=moe, ffn_dim=None)
    from llmrecipes.convert.folder import read_model

    state = read_model(dense).model.state_dict()
    lora = {"rank": 4, "alpha": 8, "experts": {"num_experts": 3, "top_k": 2}}
    adapters = make_run(folder / "lora_moe", folder / "bytes", state, lora=lora)
    byte_level(folder / "talks")  # the same with a chat template
    talks = make_run(folder / "talking", folder / "talks")
    for run in (dense, experts, talks):
        assert cli("convert", "to-hf", run, folder / f"{run.name}_hf") == 0
    tasks = make_tasks(folder / "tasks")
    models = [f"ours:{dense}", f"hf:{folder / 'dense_hf'}", f"ours:{experts}", f"hf:{folder / 'moe_hf'}"]
    models += [f"ours:{adapters}", f"ours:{folder / 'moe_hf'}"]
    models += [
        f"{kind}-chat:{place}" for kind, place in (("ours", talks), ("hf", f"{talks}_hf"), ("ours", f"{talks}_hf"))
    ]
    models += [f"ours:{talks}", f"recipe:{talks}", f"recipe:{dense}"]
    printed = run_with_peer(packages, PEER, tasks, *models)
    found = json.loads(next(line for line in printed.splitlines() if line.startswith("RESULT "))[7:])
    return [found[name] for name in models]


def same(a, b, tasks=("choices", "written", "texts")):
    """Scores are equal, and behind them every answer and likelihood (to rounding)."""
    assert a["scores"].keys() == b["scores"].keys() == set(tasks)
    seen = 0
    for task in a["scores"]:
        for metric, value in a["scores"][task].items():
            assert value == pytest.approx(b["scores"][task][metric], rel=1e-5), (task, metric)
            seen += 1
    assert seen >= 2 * len(tasks) - 1
    assert a["prompts"] == b["prompts"]
    assert a["answers"]["written"] == b["answers"]["written"]
    for ours, theirs in zip(a["answers"]["choices"], b["answers"]["choices"], strict=True):
        for (x, greedy), (y, likewise) in zip(ours, theirs, strict=True):
            assert float(x) == pytest.approx(float(y), rel=1e-4) and greedy == likewise


@pytest.mark.oracle
def test_our_checkpoint_scores_as_their_class_does_on_the_exported_folder(compared):
    dense, dense_hf, moe, moe_hf, *_ = compared
    same(dense, dense_hf)
    same(moe, moe_hf)
    assert {len(set(map(str, one["answers"]["written"]))) > 6 for one in (dense, moe)} == {True}  # they say something


@pytest.mark.oracle
def test_adapters_and_folders(compared):
    dense, _, moe, moe_hf, adapters, ours_of_theirs, *_ = compared
    same(adapters, dense)  # experts of adapters whose second half is zero are the base
    same(ours_of_theirs, moe_hf)
    with pytest.raises(AssertionError):  # the mutant: other weights have other scores
        same(moe, dense)


@pytest.mark.oracle
def test_conversations_by_the_chat_template(compared):
    """Examples are turns, special pieces are one id, and a checkpoint's scores are those of the exported folder."""
    chat, chat_hf, ours_of_theirs, plain, _, _ = compared[6:]
    same(chat, chat_hf, ("choices", "written"))
    same(chat, ours_of_theirs, ("choices", "written"))
    prompts = [prompt for rows in chat["prompts"].values() for prompt in rows]
    assert len(prompts) == 24
    for prompt in prompts:
        assert prompt.count("<|im_start|>user\n") == 3 and prompt.count("<|im_start|>assistant\n") == 3
        assert prompt.endswith("<|im_start|>assistant\n")
    for task in ("choices", "written"):  # the mutant: without the template other text is asked, and answered otherwise
        assert plain["prompts"][task] != chat["prompts"][task] and plain["answers"][task] != chat["answers"][task]


@pytest.mark.oracle
def test_a_recipe_asks_by_the_chat_template(compared):
    done, refused = compared[-2:]
    assert done["result"]["ask"] == "lm_eval choices, chat" and done["result"]["n"] == len(done["rows"]) == 3
    assert [row["question"] for row in done["rows"]] == compared[6]["prompts"]["choices"][:3]
    assert refused["error"][0].endswith("with --tokenizer") and "has no chat template" in refused["error"][0]


def test_a_task_without_the_harness_is_one_sentence(tmp_path):
    if importlib.util.find_spec("lm_eval") is not None:
        pytest.skip("lm_eval is installed here")
    (tmp_path / "t.yaml").write_text("task: x\n")
    with pytest.raises(UserError, match=r"pip install 'llmrecipes\[eval\]'"):
        check_harness(TaskConfig(kind="lm_eval", file=str(tmp_path / "t.yaml")))
