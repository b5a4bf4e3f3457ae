"""Options of ``llmrecipes generate``, ``perplexity``, ``ensemble``. Torch is imported when there is something to do."""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable

MODEL = "run folder, checkpoint, folder written by `llmrecipes convert`, or Hugging Face folder"


class _Parser(argparse.ArgumentParser):
    """An option is written out in full, and a slip ends with exit code 2 as everywhere."""

    def __init__(self, name: str, about: str, example: str) -> None:
        super().__init__(
            prog=f"llmrecipes {name}",
            description=about,
            epilog=example,
            allow_abbrev=False,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )


def generate(words: list[str]) -> int:
    """``llmrecipes generate MODEL ...``.

    Raises:
        UserError: see the messages of :mod:`llmrecipes.inference`.
    """
    parser = _Parser(
        "generate",
        "Continue prompts, or answer them (--chat). Prompts come from --prompt, --prompts or standard input;\n"
        "several are written side by side, and each as it would be alone. One prompt is shown while it is written.",
        "llmrecipes generate runs/moe_pretrain_cpu --prompt '日本の' --temperature 0.7 --top_k 50\n"
        "llmrecipes generate path/to/hf_folder --chat\n",
    )
    add = parser.add_argument
    add("model", help=MODEL)
    add("--prompt", action="append", default=[], metavar="TEXT", help="a prompt; repeat it for more")
    add("--prompts", metavar="FILE", help="one prompt a line, or .jsonl; .gz and .zst are read too")
    add("--field", default="prompt", help="name of the prompt in a JSON line (default: prompt)")
    add("--chat", action="store_true", help="prompts are messages of a user; without any, talk line by line")
    add("--system", metavar="TEXT", help="system message (with --chat)")
    add("--max_new_tokens", type=int, default=128, metavar="N", help="default: 128")
    add("--temperature", type=float, default=0.0, metavar="T", help="0 takes the most likely token (default)")
    add("--top_k", type=int, metavar="K", help="draw among the K most likely tokens")
    add("--top_p", type=float, metavar="P", help="draw among the most likely tokens that hold P of the probability")
    add("--repetition_penalty", type=float, default=1.0, metavar="R", help="above 1: fewer repetitions (default: 1)")
    add("--stop", action="append", default=[], metavar="TEXT", help="end before this text; repeat it for more")
    add("--seed", type=int, default=0, metavar="N", help="prompt number i draws with seed N + i (default: 0)")
    add("--batch_size", type=int, default=8, metavar="N", help="prompts written side by side (default: 8)")
    add("--json", action="store_true", help="one JSON object a prompt")
    _common(parser)
    add("--tokenizer", metavar="DIR", help="folder of the tokenizer, where the model's folder does not say")
    add("--template", metavar="NAME", help="chat template: a jinja file, instruction_ja, alpaca or chatml")
    args = parser.parse_args(words)
    _threads()
    from llmrecipes.inference.generate_command import run

    return _interruptible(run, args)


def perplexity(words: list[str]) -> int:
    """``llmrecipes perplexity MODEL [MODEL] ...``.

    Raises:
        UserError: see the messages of :mod:`llmrecipes.inference`.
    """
    parser = _Parser(
        "perplexity",
        "How well one or two models predict texts: per token, per character, bits per byte (comparable between\n"
        "tokenizers). A text longer than the window is read in overlapping windows; every token is scored once.",
        "llmrecipes perplexity runs/dense runs/moe --input valid.jsonl.gz\n",
    )
    add = parser.add_argument
    add("models", nargs="+", metavar="MODEL", help=MODEL)
    add("--text", action="append", default=[], metavar="TEXT", help="a text; repeat it for more")
    add(
        "--input",
        action="append",
        default=[],
        metavar="FILE",
        help=".txt (one text), .jsonl (one text a line), with .gz or .zst, or a dataset folder; repeat it for more",
    )
    add("--field", default="text", help="name of the text in a JSON line (default: text)")
    add("--max_documents", type=int, metavar="N", help="at most N texts of each input")
    add("--window", type=int, metavar="N", help="tokens read at once (default: as in training, at most 1024)")
    add("--stride", type=int, metavar="N", help="tokens scored by each later window (default: half a window)")
    add("--per_text", action="store_true", help="also each text of --input, not only their sums")
    add("--json", action="store_true", help="one JSON object")
    _common(parser)
    add("--tokenizer", action="append", metavar="DIR", help="folder of the tokenizer, one for each model")
    args = parser.parse_args(words)
    if len(args.models) > 2:
        parser.error("one or two models")
    if args.max_documents is not None and args.max_documents < 1:
        parser.error(f"--max_documents {args.max_documents}: must be 1 or more")
    _threads()
    from llmrecipes.inference.perplexity_command import run

    return _interruptible(run, args)


def ensemble(words: list[str]) -> int:
    """``llmrecipes ensemble MODEL MODEL ... --domains DIR``.

    Raises:
        UserError: see the messages of :mod:`llmrecipes.inference`.
    """
    parser = _Parser(
        "ensemble",
        "Several experts as one model (c-BTM): each token's probability is the weighted sum of theirs, by how near\n"
        "the text before it is to each one's domain. Texts (--text, --input) are scored; prompts are continued.",
        "llmrecipes ensemble runs/cbtm_0 runs/cbtm_1 --domains data/domains --input valid.jsonl\n"
        "llmrecipes ensemble runs/cbtm_0 runs/cbtm_1 --domains data/domains --prompt '日本の'\n",
    )
    add = parser.add_argument
    add("models", nargs="+", metavar="MODEL", help=f"one for each domain, in their order: {MODEL}")
    add("--domains", required=True, metavar="DIR", help="folder that `llmrecipes data domains` wrote")
    add("--distance_temperature", type=float, default=0.1, metavar="T", help="of softmax(-d^2 / T) (default: 0.1)")
    add("--top_experts", type=int, metavar="K", help="only the K nearest (default: all)")
    add("--text", action="append", default=[], metavar="TEXT", help="a text to score; repeat it for more")
    add("--input", action="append", default=[], metavar="FILE", help="texts to score, as llmrecipes perplexity reads")
    add("--field", default="text", help="name of the text in a JSON line (default: text)")
    add("--max_documents", type=int, metavar="N", help="at most N texts of each input")
    add("--window", type=int, metavar="N", help="tokens read at once (default: as in training, at most 1024)")
    add("--stride", type=int, metavar="N", help="tokens scored by each later window (default: half a window)")
    add("--prompt", action="append", default=[], metavar="TEXT", help="a prompt to continue; repeat it for more")
    add("--max_new_tokens", type=int, default=128, metavar="N", help="default: 128")
    add("--temperature", type=float, default=0.0, metavar="T", help="0 takes the most likely token (default)")
    add("--seed", type=int, default=0, metavar="N", help="prompt number i draws with seed N + i (default: 0)")
    add("--json", action="store_true", help="one JSON object")
    _common(parser)
    args = parser.parse_args(words)
    if bool(args.prompt) == bool(args.text or args.input):
        parser.error("texts to score (--text, --input), or prompts to continue (--prompt)")
    if args.max_documents is not None and args.max_documents < 1:
        parser.error(f"--max_documents {args.max_documents}: must be 1 or more")
    if args.max_new_tokens < 1 or args.temperature < 0:
        parser.error("--max_new_tokens is 1 or more, --temperature 0 or more")
    _threads()
    from llmrecipes.inference.ensemble_command import run

    return _interruptible(run, args)


def _interruptible(run: Callable[[argparse.Namespace], int], args: argparse.Namespace) -> int:
    """Ctrl-C is a way to end a text that is long enough: no traceback, the shell's code for it."""
    try:
        return run(args)
    except KeyboardInterrupt:
        print()
        return 130


def _common(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--dtype", choices=("fp32", "bf16"), default="fp32", help="of weights and arithmetic")


def _threads() -> None:
    os.environ.setdefault("GOMP_SPINCOUNT", "2000")  # before torch loads its threads; see docs/decisions.md
