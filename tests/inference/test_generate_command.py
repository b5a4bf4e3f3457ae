"""``llmrecipes generate`` as users type it: from a run of ours and from a Hugging Face folder."""

from __future__ import annotations

import io
import json
import shutil
import subprocess
import sys

import pytest
from helpers import REPOSITORY, cli
from model_folders import ENGLISH, JAPANESE, make_hf_folder

from llmrecipes.inference.opened import open_model


@pytest.fixture
def stdin(monkeypatch):
    def give(text):
        monkeypatch.setattr("sys.stdin", io.StringIO(text))

    return give


def objects(capsys):
    return [json.loads(line) for line in capsys.readouterr().out.splitlines() if line.startswith("{")]


@pytest.mark.parametrize("which", ["run_folder", "hf_folder"])
def test_several_prompts_come_out_as_each_alone(which, request, capsys):
    folder = request.getfixturevalue(which)
    prompts = [JAPANESE, "x", ENGLISH, "東京"]
    given = [word for prompt in prompts for word in ("--prompt", prompt)]
    for more in ([], ["--temperature", 0.8, "--top_k", 30, "--top_p", 0.95, "--repetition_penalty", 1.1]):
        words = ["generate", folder, "--json", "--max_new_tokens", 12, *more]
        assert cli(*words, *given) == 0
        together = objects(capsys)
        assert cli(*words, *given, "--batch_size", 1) == 0
        assert objects(capsys) == together and [o["prompt"] for o in together] == prompts
        for number, prompt in enumerate(prompts):
            assert cli(*words, "--prompt", prompt, "--seed", number) == 0
            assert objects(capsys) == [together[number]]
        assert all(1 <= o["new_tokens"] == len(o["ids"]) <= 12 for o in together)
    assert cli(*words, *given, "--seed", 99) == 0
    assert objects(capsys) != together


def test_one_prompt_is_shown_as_it_comes_and_equals_json(run_folder, capsys):
    words = ["generate", run_folder, "--prompt", JAPANESE, "--max_new_tokens", 40, "--temperature", 1, "--seed", 3]
    assert cli(*words) == 0
    shown = capsys.readouterr().out
    assert cli(*words, "--json") == 0
    told = objects(capsys)[0]
    assert shown == told["text"] + "\n"
    stop = told["text"][5:8]
    assert cli(*words, "--json", "--stop", stop) == 0
    stopped = objects(capsys)[0]
    assert stopped["finish"] == "stop" and stopped["text"] == told["text"][: told["text"].index(stop)]
    assert stopped["ids"] == told["ids"][: stopped["new_tokens"]]


@pytest.mark.parametrize("where", ["run", "checkpoints", "checkpoint"])
def test_any_part_of_a_run_is_the_same_model(run_folder, where, capsys):
    folder = {"run": run_folder, "checkpoints": run_folder / "checkpoints"}.get(
        where, run_folder / "checkpoints" / "step=000003"
    )
    found = []
    for path in (run_folder, folder):
        assert cli("generate", path, "--prompt", JAPANESE, "--json", "--max_new_tokens", 8) == 0
        found.append(objects(capsys))
    assert found[0] == found[1]


def test_prompts_from_files_and_standard_input(run_folder, jsonl, tmp_path, capsys, stdin):
    lines = jsonl("p.jsonl", [{"prompt": JAPANESE}, {"prompt": "x\ny"}])
    text = tmp_path / "p.txt"
    text.write_text(f"{JAPANESE}\n\nsecond\r\n", encoding="utf-8")
    words = ["generate", run_folder, "--json", "--max_new_tokens", 3]
    assert cli(*words, "--prompts", lines, "--prompt", "first") == 0
    assert [o["prompt"] for o in objects(capsys)] == ["first", JAPANESE, "x\ny"]
    assert cli(*words, "--prompts", text) == 0
    assert [o["prompt"] for o in objects(capsys)] == [JAPANESE, "second"]
    stdin("line one\nline two\n")
    assert cli(*words) == 0
    assert [o["prompt"] for o in objects(capsys)] == ["line one\nline two"]
    assert cli("generate", run_folder, "--max_new_tokens", 3, "--prompts", text) == 0
    assert "--- 1: 日本の" in (shown := capsys.readouterr().out) and "--- 2: second" in shown


def test_chat_follows_the_template_and_remembers(hf_folder, jsonl, capsys, stdin):
    opened = open_model(str(hf_folder))
    messages = [{"role": "system", "content": "Be short."}, {"role": "user", "content": "東京?"}]
    ids = opened.codec.chat(messages)
    assert opened.codec._tokenizer.decode(ids) == "<|system|>Be short.\n<|user|>東京?\n<|assistant|>"
    words = ["generate", hf_folder, "--chat", "--max_new_tokens", 6]
    assert cli(*words, "--json", "--system", "Be short.", "--prompt", "東京?") == 0
    asked = objects(capsys)[0]
    assert asked["messages"] == messages and asked["prompt_tokens"] == len(ids)
    file = jsonl("m.jsonl", [{"messages": messages}, {"prompt": "Hello"}])
    assert cli(*words, "--json", "--prompts", file) == 0
    answers = objects(capsys)
    assert answers[0]["ids"] == asked["ids"] and answers[1]["messages"] == [{"role": "user", "content": "Hello"}]
    # Line by line: the second answer is that to the whole conversation.
    stdin("Hello\n\nand then?\n")
    assert cli(*words) == 0
    first, second = capsys.readouterr().out.split("\n")[:2]
    talk = [
        {"role": "user", "content": "Hello"}, {"role": "assistant", "content": first},
        {"role": "user", "content": "and then?"},
    ]  # fmt: skip
    file = jsonl("talk.jsonl", [{"messages": talk[:1]}, {"messages": talk}])
    assert cli(*words, "--json", "--prompts", file) == 0
    assert [o["text"].split("\n")[0] for o in objects(capsys)] == [first, second]


def test_texts_end_where_the_model_says(tmp_path, capsys):
    folder = make_hf_folder(tmp_path / "ends")
    words = ["generate", folder, "--prompt", JAPANESE, "--json", "--max_new_tokens", 10]
    assert cli(*words) == 0
    free = objects(capsys)[0]
    third = free["ids"][2]
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [299, third]}))
    assert cli(*words) == 0
    ended = objects(capsys)[0]
    assert ended["finish"] == "eos" and ended["ids"] == free["ids"][: free["ids"].index(third) + 1]
    assert free["text"].startswith(ended["text"])


def test_half_precision_and_another_tokenizer(run_folder, sentencepiece_folder, tmp_path, capsys):
    words = ["generate", run_folder, "--prompt", JAPANESE, "--json", "--max_new_tokens", 5]
    assert cli(*words) == 0
    plain = objects(capsys)
    assert cli(*words, "--tokenizer", sentencepiece_folder) == 0
    assert objects(capsys) == plain  # the same pieces through transformers
    assert cli(*words, "--dtype", "bf16") == 0
    assert len(objects(capsys)[0]["ids"]) >= 1


def test_slips_are_named(run_folder, hf_folder, tmp_path, jsonl, capsys, stdin):
    stdin("")
    bare = tmp_path / "bare"
    shutil.copytree(hf_folder, bare)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (bare / name).unlink()
    mute = make_hf_folder(tmp_path / "mute", template=None)
    (tmp_path / "empty").mkdir()
    table = make_hf_folder(tmp_path / "small_vocabulary", vocab_size=100)
    bad = jsonl("bad.jsonl", [{"text": "x"}, {"prompt": ""}, {"messages": [{"role": "user"}]}])
    half = jsonl("half.jsonl", [{"prompt": "x"}])
    half.write_text('{"prompt": "half \\ud83d"}\n')
    x = ["--prompt", "x"]
    cases = [
        ([run_folder], "standard input is empty"),
        ([run_folder, "--prompt", ""], "--prompt (number 1): empty"),
        ([run_folder, "--prompts", tmp_path / "none"], "no such file"),
        ([run_folder, "--prompts", bad], "bad.jsonl:1: no field 'prompt' (fields here: text)"),
        ([run_folder, "--prompts", bad], "bad.jsonl:2: field 'prompt' is no text"),
        ([run_folder, "--prompt", "caf\udce9"], "--prompt (number 1): not valid UTF-8 at character 3"),
        ([run_folder, "--prompts", half], "half.jsonl:1: not valid UTF-8"),
        ([hf_folder, "--chat", "--prompts", bad], "bad.jsonl:3: every message is"),
        ([tmp_path / "empty", *x], str(tmp_path / "empty")),
        ([tmp_path / "nowhere", *x], "no such folder"),
        ([bare, *x], "--tokenizer"),
        ([run_folder, *x, "--tokenizer", tmp_path / "nowhere"], "no such folder"),
        ([table, *x], "this is not the tokenizer it was trained with"),
        ([mute, *x, "--chat"], "has no chat template"),
        ([run_folder, *x, "--chat"], "has no chat template"),
        ([run_folder, *x, "--system", "y"], "--system has no effect without --chat"),
        ([run_folder, *x, "--top_k", 5], "--top_k has no effect with --temperature 0"),
        ([run_folder, *x, "--temperature", 1, "--top_p", 1.5], "--top_p 1.5: must be"),
        ([run_folder, *x, "--max_new_tokens", 0], "--max_new_tokens 0: must be 1 or more"),
        ([run_folder, *x, "--stop", ""], "--stop ''"),
        ([run_folder, *x, "--batch_size", 0], "--batch_size 0"),
    ]
    for words, message in cases:
        assert cli("generate", *words) == 2, words
        assert message in capsys.readouterr().err, words


def test_prompts_longer_than_the_positions(tmp_path, run_folder, hf_folder, capsys):
    transformers = pytest.importorskip("transformers")
    folder = tmp_path / "gpt2"
    shutil.copytree(hf_folder, folder)
    config = transformers.GPT2Config(vocab_size=300, n_positions=16, n_embd=32, n_layer=1, n_head=2)
    transformers.GPT2LMHeadModel(config).save_pretrained(folder)
    words = ["generate", folder, "--json", "--max_new_tokens", 30]
    assert cli(*words, "--prompt", JAPANESE, "--prompt", "x", "--prompt", ENGLISH * 3) == 2
    told = capsys.readouterr().err
    assert told.count("positions for 16") == 2 and "'日本の" in told
    assert cli(*words, "--prompt", "x") == 0
    written = objects(capsys)[0]
    assert written["finish"] in ("positions", "eos") and written["prompt_tokens"] + written["new_tokens"] <= 16
    # Rotary positions go on beyond the length of the training, with a word about it.
    assert cli("generate", run_folder, "--prompt", ENGLISH * 3, "--max_new_tokens", 30) == 0
    assert "was made for 64" in capsys.readouterr().err


def test_interrupting_ends_without_a_traceback(run_folder, monkeypatch):
    from llmrecipes.inference import generate_command

    def interrupted(*args, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr(generate_command, "generate_batch", interrupted)
    assert cli("generate", run_folder, "--prompt", "x") == 130


def test_input_that_is_not_utf8(run_folder, capsys, monkeypatch):
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"caf\xe9"), encoding="utf-8"))
    assert cli("generate", run_folder) == 2
    assert "standard input is not valid UTF-8" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["generate", "perplexity"])
def test_help_imports_nothing_heavy(name):
    code = (
        "import sys; from llmrecipes.cli import main\n"
        f"try:\n    main([{name!r}, '--help'])\nexcept SystemExit:\n    pass\n"
        "print(sorted({'torch', 'transformers', 'numpy'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=REPOSITORY)
    assert done.stdout.splitlines()[-1] == "[]", done.stdout + done.stderr
