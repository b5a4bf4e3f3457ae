"""What is compared with what: the cases as data. Adding a row is adding an entry here.

Commands hold ``{ours}`` and ``{peers}`` (the interpreters of the two environments), ``{inputs}``, ``{work}`` (a folder
for what programs write), ``{steps}`` and ``{run}`` (a name that no other run has).
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from benchmarks.inputs import READ_SEQ_LEN, ROWS, SEQ_LEN
from benchmarks.paired import Group, Peer, Program
from llmrecipes.recipe import ModelConfig, MoEConfig, read_recipe

RECIPES = Path(__file__).parent / "recipes"
TITLES = {
    "A": "dense step, 4,096 tokens",
    "B": "mixture-of-experts step, 8 experts, top 2, 4,096 tokens",
    "C": "fine-tuning on conversations, dense model of case A, rows of 1,024 positions, real tokens",
    "D": "DPO, dense model of case A, pairs of answers",
    "E": "from the start of the program to the end of the first step",
    "F": "output layer and cross-entropy, vocabulary 56,320, width 512, 8,192 tokens, forward and backward",
    "G": "reading and tokenizing",
    "H": "what the trainer costs: llmrecipes fit against our own model, loss and optimizer in a bare loop",
}
TOKENS = ROWS * SEQ_LEN
# Large tensors stay with the process instead of going back to the kernel after every use.
MALLOC = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": "17179869184"}
HEAD_VOCAB, HEAD_DIM, HEAD_TOKENS = 56_320, 512, 8_192  # benchmarks.workers.head
BLOCK, BATCH_ROWS = 500, 8  # benchmarks.workers.read_batches
PRECISION = {"bf16": "bf16-mixed", "fp32": "32-true"}
OVERLAYS = {"dense": ("dense",), "moe": ("dense", "moe"), "small": ("dense", "small")}


def ours(model: str, dtype: str, *more: str, **environment: str) -> Program:
    """The program itself on the recipes of this folder."""
    configs = [word for name in OVERLAYS[model] for word in ("--config", str(RECIPES / f"{name}.yaml"))]
    command = (
        "{ours}", "-m", "llmrecipes", "fit", *configs,
        "--name", "{run}", "--run_root", "{work}", "--resume", "never",
        "--trainer.max_steps", "{steps}", "--trainer.precision", PRECISION[dtype],
        "--model.init_args.init_from", "{inputs}/" + f"{model}.ours",
        "--data.init_args.train", '{{"{inputs}/tokens": 1.0}}',
        *more,
    )  # fmt: skip
    return Program("llmrecipes fit", command, environment)


def peer(name: str, worker: str, model: str, dtype: str, *more: str, **environment: str) -> Program:
    """A worker of benchmarks/workers in the peers' environment."""
    command = (
        "{peers}", "-m", f"benchmarks.workers.{worker}",
        "--inputs", "{inputs}", "--model", model, "--dtype", dtype, "--steps", "{steps}", *more,
    )  # fmt: skip
    return Program(name, command, environment)


def flops_per_token(model: str) -> float:
    """Training FLOPs of one token of a recipe's model."""
    values = read_recipe([RECIPES / f"{name}.yaml" for name in OVERLAYS[model]]).data["model"]["init_args"]["config"]
    moe = values.get("moe")
    config = ModelConfig(**{**values, "moe": MoEConfig(**moe) if moe else None})
    return float(config.flops_per_token(SEQ_LEN))


def step_group(case: str, name: str, mine: Program, peers: list[Peer], **more: Any) -> Group:
    """Groups of training steps; ``more`` are fields of `Group`."""
    model = {"A": "dense", "B": "moe"}[case]
    return Group(case, name, mine, tuple(peers), TOKENS, "tokens", flops_per_token(model), **more)


COMPILED = ("--model.init_args.compile", "true")


def dense() -> list[Group]:
    """Case A: as programs come, compiled, and compiled with the allocator's setting, equal on both sides."""

    def trainer(dtype: str) -> Program:
        return peer("transformers Trainer", "transformers_trainer", "dense", dtype)

    def litgpt(dtype: str, *more: str) -> Program:
        return peer("litgpt, bare loop", "litgpt_bare", "dense", dtype, *more)

    def titan(dtype: str) -> Program:
        return peer("torchtitan, bare loop, SDPA", "torchtitan_bare", "dense", dtype)

    def without_kernels(dtype: str) -> Program:
        return replace(ours("dense", dtype, LLMRECIPES_CPU_KERNELS="0"), name="llmrecipes fit, torch's operators")

    plain, fast = ours("dense", "bf16"), ours("dense", "bf16", *COMPILED)
    compiled = [Peer(litgpt("bf16", "--compile"), speed=1.15)]
    fp32 = [Peer(program, speed=1.15) for program in (trainer("fp32"), litgpt("fp32"), titan("fp32"))]
    best = replace(ours("dense", "bf16", *COMPILED, **MALLOC), name="llmrecipes fit, compile, malloc")
    return [
        step_group(
            "A", "bf16", plain,
            [Peer(trainer("bf16"), 1.8, 0.55), Peer(litgpt("bf16"), 1.15), Peer(titan("bf16"))],
            short=True,
        ),
        step_group("A", "bf16, ours at its best", best, [Peer(trainer("bf16"), 1.8, 0.55)]),
        step_group("A", "bf16, malloc", plain, [Peer(trainer("bf16")), Peer(litgpt("bf16"), 1.15)], environment=MALLOC),
        step_group("A", "bf16, compile", fast, compiled, warmup=3),
        step_group("A", "bf16, compile, malloc", fast, compiled, environment=MALLOC, warmup=3),
        step_group("A", "fp32", ours("dense", "fp32"), fp32),
        *(
            step_group("A", f"{dtype}, kernels", ours("dense", dtype), [Peer(without_kernels(dtype))])
            for dtype in ("bf16", "fp32")
        ),
    ]  # fmt: skip


def experts() -> list[Group]:
    """Case B: the Trainer's default runs experts by ``grouped_mm``, in fp32 whatever the autocast."""

    def trainer(dtype: str, kind: str = "grouped_mm") -> Program:
        more = () if kind == "grouped_mm" else ("--experts", kind)
        return peer(f"transformers Trainer, {kind}", "transformers_trainer", "moe", dtype, *more)

    def titan(dtype: str, *more: str) -> Program:
        note = " (experts in bf16)" if dtype == "fp32" else ""
        return peer(f"torchtitan, bare loop, SDPA{note}", "torchtitan_bare", "moe", dtype, *more)

    def litgpt(dtype: str) -> Program:
        return peer("litgpt, bare loop", "litgpt_bare", "moe", dtype)

    plain, fast = ours("moe", "bf16"), ours("moe", "bf16", *COMPILED)
    best = replace(ours("moe", "bf16", *COMPILED, **MALLOC), name="llmrecipes fit, compile, malloc")
    default = Peer(trainer("bf16"), 2.2, 0.7)
    fp32 = [Peer(program, speed=1.2) for program in (trainer("fp32"), trainer("fp32", "eager"), litgpt("fp32"))]
    return [
        step_group("B", "bf16", plain, [default, Peer(titan("bf16"), 1.5, 0.7)], short=True),
        step_group("B", "bf16, other peers", plain, [Peer(trainer("bf16", "eager")), Peer(litgpt("bf16"))]),
        step_group("B", "bf16, ours at its best", best, [default]),
        step_group("B", "bf16, malloc", plain, [Peer(titan("bf16"), 1.5, 0.7)], environment=MALLOC),
        step_group(
            "B", "bf16, compile, malloc", fast, [Peer(titan("bf16", "--compile"), 1.5, 0.7)],
            environment=MALLOC, warmup=3,
        ),
        step_group("B", "fp32", ours("moe", "fp32"), [*fp32, Peer(titan("fp32"))]),
    ]  # fmt: skip


def chat(recipe: str, *more: str) -> Program:
    """The program itself on conversations; what it learns from lies where its recipe says."""
    overlays = {"lora": ("sft", "lora")}.get(recipe, (recipe,))
    configs = [word for name in overlays for word in ("--config", str(RECIPES / f"{name}.yaml"))]
    source = {"dpo": "pairs"}.get(recipe, "talks")
    command = (
        "{ours}", "-m", "llmrecipes", "fit", *configs,
        "--name", "{run}", "--run_root", "{work}", "--resume", "never",
        "--trainer.max_steps", "{steps}", "--trainer.precision", "bf16-mixed",
        "--model.init_args.init_from", "{inputs}/dense.ours",
        "--data.init_args.train", '{{"{inputs}/' + source + '.jsonl": 1.0}}',
        "--data.init_args.tokenizer", "{inputs}/unigram", "--data.init_args.cache", "{inputs}/cache", *more,
    )  # fmt: skip
    return Program("llmrecipes fit", command)


def trl(kind: str, name: str) -> Program:
    """TRL's trainers on our conversations."""
    return peer(f"TRL {name}", "trl_trainers", "dense", "bf16", "--experts", kind)


def fine_tuning() -> list[Group]:
    """Case C: the same conversations in every step, on TRL's side packed or one to a row."""
    mine = chat("sft")
    adapters = replace(chat("lora"), name="llmrecipes fit, LoRA 16 on every map")
    peers = (Peer(trl("packed", "SFT, padding-free"), 3.5, 0.45), Peer(trl("padded", "SFT, padded"), 5.0, 0.45))
    flops = flops_per_token("dense")
    return [
        Group("C", "bf16", mine, peers, 0, "tokens", flops, warmup=1, steps=3, short=True),
        Group("C", "bf16, LoRA", adapters, (Peer(mine, 1.3),), 0, "tokens", None, warmup=1, steps=3, checks=1),
    ]


def preferences() -> list[Group]:
    """Case D: the same pairs in every step; the reference in the loop or computed before."""
    before = replace(chat("dpo"), name="llmrecipes fit, reference precomputed")
    within = replace(chat("dpo", "--model.init_args.reference", "copy"), name="llmrecipes fit, reference in the loop")
    default = Peer(trl("dpo", "DPO, reference in the loop"), 5.0, 0.4)
    same: dict[str, Any] = {"warmup": 1, "steps": 3}
    return [
        Group("D", "bf16", before, (default, Peer(trl("dpo-precomputed", "DPO, reference precomputed"))), 0, "pairs",
              short=True, **same),
        Group("D", "bf16, reference in the loop", within, (default,), 0, "pairs", **same),
    ]  # fmt: skip


def start() -> list[Group]:
    """Case E: the aim of 4.2 CPU seconds where the peers took 5.6 and 5.5."""
    mine = ours("small", "bf16", "--data.init_args.micro_batch", "1", "--data.init_args.global_batch", "1")
    one = ("--rows", "1")
    peers = (
        Peer(peer("transformers Trainer", "transformers_trainer", "small", "bf16", *one), 5.6 / 4.2),
        Peer(peer("litgpt pretrain", "litgpt_pretrain", "small", "bf16", *one, TORCH_COMPILE_DISABLE="1"), 5.5 / 4.2),
    )
    name = "bf16, small model"
    once = {"measure": "first", "warmup": 1, "steps": 1, "checks": 1}
    return [Group("E", name, mine, peers, 1, "first steps", short=True, **once)]


def head() -> list[Group]:
    """Case F; memory is what the way takes beyond its operands."""
    flops = 6.0 * HEAD_VOCAB * HEAD_DIM

    def way(name: str, dtype: str, place: str = "{peers}") -> Program:
        names = {"ours": "llmrecipes", "torch": "torch linear_cross_entropy", "litgpt": "litgpt, chunks of 128"}
        command = (place, "-m", "benchmarks.workers.head", name, "--dtype", dtype, "--steps", "{steps}")
        return Program(names.get(name, name), command)

    found = []
    for dtype in ("bf16", "fp32"):
        peers = (
            Peer(way("transformers", dtype), 1 / 0.55, 0.1),
            Peer(way("litgpt", dtype)),
        )
        mine = way("ours", dtype, "{ours}")
        tokens: dict[str, Any] = {
            "work": HEAD_TOKENS,
            "unit": "tokens",
            "flops": flops,
            "relative": True,
            "warmup": 1,
            "steps": 2,
        }
        found.append(Group("F", dtype, mine, peers, short=dtype == "bf16", **tokens))
        found.append(Group("F", f"{dtype}, torch", mine, (Peer(way("torch", dtype)),), **tokens))
    return found


def read() -> list[Group]:
    """Case G, reading: rates, the first batch, and our memory on a tenth of the corpus."""

    def way(name: str, corpus: str = "corpus", place: str = "{peers}") -> Program:
        command = (place, "-m", "benchmarks.workers.read_batches", name, "--corpus", "{inputs}/" + corpus)
        return Program("llmrecipes" if name == "ours" else name, (*command, "--steps", "{steps}"))

    tokens = BLOCK * BATCH_ROWS * READ_SEQ_LEN
    mine, tenth = way("ours", place="{ours}"), way("ours", "corpus_tenth", "{ours}")
    peers = (Peer(way("litdata"), 3.0), Peer(way("datasets")), Peer(way("datatrove")))
    same: dict[str, Any] = {"warmup": 2, "checks": 1, "tolerance": 0.01, "relative": True}
    return [
        Group("G", "read", mine, peers, tokens, "tokens", steps=6, short=True, **same),
        Group("G", "read, first batch", mine, peers, 1, "first batches", measure="first", steps=1, **same),
        Group("G", "read, a tenth of the corpus", tenth, (), tokens, "tokens", steps=6, **same),
    ]


def tokenize() -> list[Group]:
    """Case G, tokenizing: MB of text to ids on disk."""

    def way(name: str, tokenizer: str, place: str = "{peers}") -> Program:
        command = (
            place, "-m", "benchmarks.workers.tokenize_texts", name,
            "--input", "{inputs}/texts.jsonl", "--tokenizer", "{inputs}/" + tokenizer, "--output", "{work}/{run}.ids",
        )  # fmt: skip
        return Program("llmrecipes data tokenize" if name == "ours" else name, command)

    same: dict[str, Any] = {"warmup": 0, "steps": 1, "checks": 1, "tolerance": 0.0, "measure": "first"}
    unigram = (Peer(way("bare", "unigram")),)
    bpe = (Peer(way("bare", "bpe"), 1.0), Peer(way("datasets", "bpe")))
    return [
        Group("G", "tokenize, unigram", way("ours", "unigram", "{ours}"), unigram, 1, "MB", short=True, **same),
        Group("G", "tokenize, BPE", way("ours", "bpe", "{ours}"), bpe, 1, "MB", **same),
    ]


def overhead() -> list[Group]:
    """Case H: the same steps without Lightning and run folder; the start of both; commands that start nothing."""

    def bare(model: str, dtype: str, *more: str) -> Program:
        found = peer("bare loop", "bare_ours", model, dtype, *more)
        return replace(found, command=("{ours}", *found.command[1:]))

    def against_bare(model: str, dtype: str, **more: Any) -> Group:
        flops = flops_per_token(model)
        peers = (Peer(bare(model, dtype), speed=0.97),)
        return Group("H", f"{dtype}, {model} model", ours(model, dtype), peers, TOKENS, "tokens", flops, **more)

    def command(*words: str, limit: float) -> Group:
        timed = ("{ours}", "-m", "benchmarks.workers.command_time", "--", "{ours}", "-m", "llmrecipes", *words)
        told = Program(f"llmrecipes {words[0]}", timed)
        return Group("H", words[0], told, (), 1, "commands", measure="first", warmup=0, limit=limit)

    one_row = ("--data.init_args.micro_batch", "1", "--data.init_args.global_batch", "1")
    first: dict[str, Any] = {"measure": "first", "warmup": 1, "steps": 1, "checks": 1}
    start_of_both = (Peer(bare("small", "bf16", "--rows", "1"), speed=1 / 1.3),)
    return [
        against_bare("dense", "bf16", short=True),
        against_bare("dense", "fp32"),
        against_bare("small", "bf16", steps=20),
        Group("H", "start to first step", ours("small", "bf16", *one_row), start_of_both, 1, "first steps", **first),
        command("--help", limit=0.5),
        command(
            "check", str(Path(__file__).parents[1] / "recipes" / "moe_pretrain.yaml"), "--without_files", limit=3.0
        ),
    ]


def groups() -> list[Group]:
    """Every row, in the order of the table."""
    steps = [*dense(), *experts(), *fine_tuning(), *preferences()]
    return [*steps, *start(), *head(), *read(), *tokenize(), *overhead()]
