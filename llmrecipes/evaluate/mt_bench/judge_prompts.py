"""What a judge is asked. Torch-free.

The English prompts are those of FastChat's MT-Bench (Zheng et al. 2023, arXiv:2306.05685; Apache-2.0), the Japanese
ones say the same. A file of FastChat's kind takes their place with ``prompts:``.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from llmrecipes.errors import UserError
from llmrecipes.evaluate.mt_bench.questions import Conversation
from llmrecipes.inference.texts import read_lines

NAMES = ("single-v1", "single-math-v1", "single-v1-multi-turn", "single-math-v1-multi-turn")

_EN_SYSTEM = "You are a helpful assistant."
_EN_RATE = (
    "Be as objective as possible. After providing your explanation, you must rate the response on a scale of 1 to 10 "
    'by strictly following this format: "[[rating]]", for example: "Rating: [[5]]".'
)
_EN_QUALITY = (
    "Please act as an impartial judge and evaluate the quality of the response provided by an AI assistant to the user "
    "question displayed below. "
)
_EN_FACTORS = (
    "Your evaluation should consider factors such as the helpfulness, relevance, accuracy, depth, creativity, and "
    "level of detail of the response. "
)
_EN_REFERENCE = (
    "Your evaluation should consider correctness and helpfulness. You will be given a reference answer and the "
    "assistant's answer. "
)
_EN_SECOND = "You evaluation should focus on the assistant's answer to the second user question. "  # as published
_JA_SYSTEM = "あなたは公平な審査員です。"
_JA_RATE = (
    "できるだけ客観的に判断してください。説明の後に、必ず次の形式に厳密に従って1から10の整数で評価を付けてください："
    '"[[評価]]"、例えば："評価：[[5]]"。'
)
_JA_QUALITY = "公平な審査員として、以下のユーザーの質問に対するAIアシスタントの回答の質を評価してください。"
_JA_FACTORS = (
    "回答の有用性、関連性、正確さ、深さ、創造性、詳しさを考慮してください。"
    "回答の言語がユーザーの言語と異なる場合は減点してください。"
)
_JA_REFERENCE = "正確さと有用性を考慮してください。参考回答とアシスタントの回答が与えられます。"
_JA_SECOND = "2番目の質問に対するアシスタントの回答を中心に評価してください。"


@dataclass(frozen=True)
class JudgePrompt:
    """One of the four: for the first or second turn, with or without a reference.

    Attributes:
        system: the system message.
        template: the user's message, with the places ``{question}``, ``{answer}`` and their numbered kin.
    """

    system: str
    template: str

    def fill(self, places: dict[str, str]) -> str:
        """The message; braces in questions and answers stay as they are."""
        text = self.template
        parts = []
        while text:
            before, opening, rest = text.partition("{")
            name, closing, after = rest.partition("}")
            known = bool(closing) and name in places
            parts += [before, places[name]] if known else [before, opening]
            text = after if known else rest
        return "".join(parts)


def _english() -> dict[str, JudgePrompt]:
    begin = "Begin your evaluation by providing a short explanation. "
    compare = (
        "Begin your evaluation by comparing the assistant's answer with the reference answer. Identify and correct any "
        "mistakes. "
    )
    single = "\n\n[The Start of Assistant's Answer]\n{answer}\n[The End of Assistant's Answer]"
    turns = (
        "<|The Start of Assistant A's Conversation with User|>\n\n### User:\n{question_1}\n\n"
        "### Assistant A:\n{answer_1}\n\n### User:\n{question_2}\n\n### Assistant A:\n{answer_2}\n\n"
        "<|The End of Assistant A's Conversation with User|>"
    )
    references = (
        "<|The Start of Reference Answer|>\n\n### User:\n{question_1}\n\n### Reference answer:\n{ref_answer_1}\n\n"
        "### User:\n{question_2}\n\n### Reference answer:\n{ref_answer_2}\n\n<|The End of Reference Answer|>\n\n\n"
    )
    head = "[Instruction]\n" + _EN_QUALITY
    texts = (
        head + _EN_FACTORS + begin + _EN_RATE + "\n\n[Question]\n{question}" + single,
        head + _EN_REFERENCE + compare + _EN_RATE + "\n\n[Question]\n{question}\n\n[The Start of Reference Answer]\n"
        "{ref_answer_1}\n[The End of Reference Answer]" + single,
        turns,
        references + turns,
    )
    second = (
        _EN_QUALITY + _EN_FACTORS + _EN_SECOND + begin + _EN_RATE,
        _EN_QUALITY + _EN_REFERENCE + _EN_SECOND + compare + _EN_RATE,
    )
    systems = (_EN_SYSTEM, _EN_SYSTEM, *second)
    return {name: JudgePrompt(system, text) for name, system, text in zip(NAMES, systems, texts, strict=True)}


def _japanese() -> dict[str, JudgePrompt]:
    begin = "評価は短い説明から始めてください。"
    compare = "アシスタントの回答と参考回答を比べることから始め、誤りがあれば指摘して訂正してください。"
    single = "\n\n[アシスタントの回答の開始]\n{answer}\n[アシスタントの回答の終了]"
    turns = (
        "<|アシスタントAとユーザーの会話の開始|>\n\n### ユーザー:\n{question_1}\n\n### アシスタントA:\n{answer_1}"
        "\n\n### ユーザー:\n{question_2}\n\n### アシスタントA:\n{answer_2}\n\n<|アシスタントAとユーザーの会話の終了|>"
    )
    references = (
        "<|参考回答の開始|>\n\n### ユーザー:\n{question_1}\n\n### 参考回答:\n{ref_answer_1}\n\n"
        "### ユーザー:\n{question_2}\n\n### 参考回答:\n{ref_answer_2}\n\n<|参考回答の終了|>\n\n\n"
    )
    head = "[指示]\n" + _JA_QUALITY
    texts = (
        head + _JA_FACTORS + begin + _JA_RATE + "\n\n[質問]\n{question}" + single,
        head + _JA_REFERENCE + compare + _JA_RATE + "\n\n[質問]\n{question}\n\n[参考回答の開始]\n{ref_answer_1}\n"
        "[参考回答の終了]" + single,
        turns,
        references + turns,
    )
    second = (
        _JA_QUALITY + _JA_FACTORS + _JA_SECOND + begin + _JA_RATE,
        _JA_QUALITY + _JA_REFERENCE + _JA_SECOND + compare + _JA_RATE,
    )
    systems = (_JA_SYSTEM, _JA_SYSTEM, *second)
    return {name: JudgePrompt(system, text) for name, system, text in zip(NAMES, systems, texts, strict=True)}


def judge_prompts(file: str | None, language: str) -> dict[str, JudgePrompt]:
    """The judge prompts by name.

    Raises:
        UserError: the file lacks one.
    """
    if file is None:
        return _japanese() if language == "ja" else _english()
    found = {}
    for where, line in read_lines(Path(file)):
        try:
            record = json.loads(line)
            found[record["name"]] = JudgePrompt(record["system_prompt"], record["prompt_template"])
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(f"{where}: no judge prompt (name, system_prompt, prompt_template): {error}") from None
    if missing := [name for name in NAMES[:2] if name not in found]:
        raise UserError(f"{file}: no judge prompt called {' or '.join(missing)}")
    return found


def ask(
    prompts: dict[str, JudgePrompt], one: Conversation, answers: list[str], turn: int, with_reference: bool
) -> tuple[str, list[dict[str, str]]]:
    """What the judge is asked about a turn.

    Args:
        prompts: by name.
        one: the conversation.
        answers: of the model, those of the earlier turns first.
        turn: 1 or 2.
        with_reference: whether the reference is shown.

    Returns:
        The prompt's name and the messages.

    Raises:
        UserError: there is no prompt for a second turn.
    """
    name = ("single-math-v1" if with_reference else "single-v1") + ("-multi-turn" if turn == 2 else "")
    if name not in prompts:
        raise UserError(f"judge prompts: none is called {name}, and the questions have a second turn")
    places = {"question": one.turns[turn - 1], "answer": answers[turn - 1]}
    for number, (question, answer) in enumerate(zip(one.turns, answers, strict=False), 1):
        places |= {f"question_{number}": question, f"answer_{number}": answer}
    if with_reference:
        places |= {f"ref_answer_{number}": text for number, text in enumerate(one.reference, 1)}
    prompt = prompts[name]
    return name, [{"role": "system", "content": prompt.system}, {"role": "user", "content": prompt.fill(places)}]
