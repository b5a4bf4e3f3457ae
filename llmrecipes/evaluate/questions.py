"""Questions out of files, one reader for each kind of task. Torch-free."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

from llmrecipes.errors import UserError
from llmrecipes.evaluate.config import CHAT_TOKENS, KINDS, TaskConfig
from llmrecipes.inference.texts import not_text, read_lines, read_text

# Instructions of llm-jp-eval; those of jmmlu and mgsm_ja are worded after its mmlu_ja and mawps.
INSTRUCTIONS = {
    "jcommonsenseqa": "質問と回答の選択肢を入力として受け取り、選択肢から回答を選択してください。"
    "なお、回答は選択肢の番号（例：0）でするものとします。"
    " 回答となる数値をint型で返し、他には何も含めないことを厳守してください。",
    "jsquad": "質問に対する回答を文章から一言で抽出してください。回答は名詞で答えてください。"
    " それ以外には何も含めないことを厳守してください。",
    "jmmlu": "与えられた質問と選択肢から、最も適切な回答を選択してください。なお、回答は"
    "選択肢のアルファベット（例：A）でするものとします。"
    " 回答となるアルファベットのみを返し、他には何も含めないことを厳守してください。",
    "mgsm_ja": "与えられた計算問題の答えを整数または小数で出力してください。"
    "数値以外には何も含めないことを厳守してください。",
    "questions": "質問に答えてください。",
    "jnli": "前提と仮説の関係をentailment、contradiction、neutralの中から回答してください。"
    "それ以外には何も含めないことを厳守してください。\n\n"
    "制約：\n"
    "- 前提から仮説が、論理的知識や常識的知識を用いて導出可能である場合はentailmentと出力\n"
    "- 前提と仮説が両立しえない場合はcontradictionと出力\n"
    "- そのいずれでもない場合はneutralと出力",
}
FORMS = {
    "jnli": "entailment|contradiction|neutral",
    "jcommonsenseqa": "[0-4]",
    "jmmlu": "[A-D]",
    "mgsm_ja": r"-?[0-9]+(\.[0-9]+)?",
}
YES_NO = {True: "yes", False: "no"}


@dataclass(frozen=True)
class Question:
    """What is asked and what counts as right.

    Attributes:
        id: number of its line in the file, from 1.
        text: as it stands after 入力: in the prompt; of a cloze the beginning of the sentence.
        reference: the answer.
        also: other right answers.
        within: the answer should be a piece of this text (jsquad).
        about: what the figures are divided by: subject, language, kind, held out.
    """

    id: int
    text: str
    reference: str
    also: tuple[str, ...] = ()
    within: str | None = None
    about: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Asked:
    """The questions of a task and how to ask them.

    Attributes:
        questions: those to be asked.
        examples: those shown before each.
        instruction: what to do.
        form: regular expression of an obedient answer, or None.
        max_new_tokens: longest answer.
    """

    questions: list[Question]
    examples: list[Question]
    instruction: str
    form: str | None
    max_new_tokens: int


def read_task(task: TaskConfig) -> Asked:
    """The questions of a task.

    Raises:
        UserError: every line that holds no question; too few for the examples.
    """
    own, length = (None, None)
    if task.kind == "llm_jp_eval":
        found, own, length = _llm_jp_eval(Path(task.file))
    else:
        found = _lines(Path(task.file), task)
    examples: list[Question] = []
    if task.few_shot_file is not None:
        if Path(task.few_shot_file).resolve() == Path(task.file).resolve():
            pool, found = found[: task.few_shots], found[task.few_shots :]
        elif task.kind == "llm_jp_eval":
            pool = _llm_jp_eval(Path(task.few_shot_file))[0]
        else:
            pool = _lines(Path(task.few_shot_file), task)
        examples = pool[: task.few_shots]
        if len(examples) < task.few_shots:
            raise UserError(f"{task.few_shot_file}: {len(examples)} examples, but few_shots is {task.few_shots}")
    if task.held_out is not None:
        found = [question for question in found if question.about.get("held_out") == YES_NO[task.held_out]]
    if task.kinds is not None:
        there = {question.about.get("kind", "") for question in found}
        if absent := sorted(set(task.kinds) - there):
            raise UserError(f"{task.file}: no question of kinds {absent}; there are {sorted(there - {''})}")
        found = [question for question in found if question.about.get("kind") in task.kinds]
    found = found[: task.limit]
    if not found:
        raise UserError(f"{task.file}: no question left to ask in task {task.title}")
    longest = task.max_new_tokens or length or KINDS[task.kind][2]
    if task.max_new_tokens is None and task.way == "chat" and task.kind != "questions":
        longest = max(longest, CHAT_TOKENS)
    instruction = task.instruction if task.instruction is not None else own or INSTRUCTIONS[task.kind]
    return Asked(found, examples, instruction, task.form or FORMS.get(task.kind), longest)


def _lines(path: Path, task: TaskConfig) -> list[Question]:
    reader = READERS["cloze" if task.way == "cloze" else task.kind]
    found, problems = [], []
    for where, line in read_lines(path):
        try:
            record = json.loads(line)
            if reason := not_text(json.dumps(record, ensure_ascii=False)):
                raise ValueError(reason)
            found.append(reader(int(where.rpartition(":")[2]), record))
        except json.JSONDecodeError as error:
            problems.append(f"{where}: not JSON ({error.msg}); mend or remove the line")
        except (KeyError, TypeError, IndexError, AttributeError, ValueError) as error:
            what = f"no field {error}" if isinstance(error, KeyError) else str(error)
            problems.append(f"{where}: no question of kind {task.kind}: {what}; see docs/evaluation.md for its fields")
    if problems:
        more = [f"  ... and {len(problems) - 10} more lines"] if len(problems) > 10 else []
        raise UserError(*problems[:10], *more)
    return found


def _jcommonsenseqa(number: int, record: dict[str, Any]) -> Question:
    choices = ",".join(f"{i}.{record[f'choice{i}']}" for i in range(5))
    return Question(number, f"質問：{record['question']}\n選択肢：{choices}", str(int(record["label"])))


def _jsquad(number: int, record: dict[str, Any]) -> Question:
    context = record["context"].split("[SEP]")[-1].strip()
    within = f"{record.get('title', '')}\n{context}"  # some answers stand in the title only
    first, *others = record["answers"]
    return Question(number, f"文章：{context}\n質問：{record['question']}", first, tuple(others), within)


def _jmmlu(number: int, record: dict[str, Any]) -> Question:
    choices = ",".join(f"{letter}.{record['choices'][i]}" for i, letter in enumerate("ABCD"))
    if record["answer"] not in ("A", "B", "C", "D"):
        raise ValueError(f"the answer is {record['answer']!r}, not A, B, C or D")
    about = {"subject": record["subject"]} if "subject" in record else {}
    return Question(number, f"質問：{record['question']}\n選択肢：{choices}", record["answer"], about=about)


NLI = ("entailment", "contradiction", "neutral")  # numbered so in the datasets library's copies


def _jnli(number: int, record: dict[str, Any]) -> Question:
    label = record["label"]
    label = NLI[label] if isinstance(label, int) and 0 <= label < 3 else label
    if label not in NLI:
        raise ValueError(f"the label is {label!r}, not {', '.join(NLI)}")
    return Question(number, f"前提：{record['sentence1']}\n仮説：{record['sentence2']}", label, about={"label": label})


def _mgsm(number: int, record: dict[str, Any]) -> Question:
    return Question(number, f"問題：{record['question']}", str(record["answer"]))


def _asked(number: int, record: dict[str, Any], text: str = "question") -> Question:
    about: dict[str, str] = {key: str(record[key]) for key in ("lang", "kind") if key in record}
    if "held_out" in record:
        about["held_out"] = YES_NO[bool(record["held_out"])]
    return Question(number, record[text], str(record["answer"]), about=about)


READERS: dict[str, Callable[[int, dict[str, Any]], Question]] = {
    "jcommonsenseqa": _jcommonsenseqa,
    "jsquad": _jsquad,
    "jmmlu": _jmmlu,
    "jnli": _jnli,
    "mgsm_ja": _mgsm,
    "questions": _asked,
    "cloze": partial(_asked, text="cloze"),
}


def _llm_jp_eval(path: Path) -> tuple[list[Question], str, int]:
    """A file as llm-jp-eval's own preprocessing writes it: questions, instruction, output_length."""
    try:
        record = json.loads(read_text(path))
        samples = record["samples"]
        found = [Question(i, s["input"], s["output"]) for i, s in enumerate(samples, 1)]
        return found, str(record["instruction"]), int(record["output_length"])
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{path}: no file of llm-jp-eval ({error}); it is one JSON object with instruction, output_length and "
            "samples of input and output"
        ) from None


def prompt(asked: Asked, question: Question, examples: int | None = None) -> str:
    """llm-jp-eval's prompt, with the first ``examples`` examples (None = all)."""
    parts = [
        "以下は、タスクを説明する指示と、文脈のある入力の組み合わせです。要求を適切に満たす応答を書きなさい。\n\n"
        f"### 指示:\n{asked.instruction}"
    ]
    shown: Iterator[Question] = islice(asked.examples, examples)
    parts += [f"### 入力:\n{shot.text}\n\n### 応答:\n{shot.reference}" for shot in shown]
    return "\n\n".join([*parts, f"### 入力:\n{question.text}\n\n### 応答:\n"])


def chat_message(asked: Asked, question: Question, kind: str) -> str:
    """What a user says: questions as they are, tasks with their instruction."""
    return question.text if kind == "questions" else f"{asked.instruction}\n\n{question.text}"
