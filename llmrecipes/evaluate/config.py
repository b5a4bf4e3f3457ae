"""The recipe of an evaluation. Torch-free."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from data_prep.frame.config import Finding
from llmrecipes.evaluate.average import CATEGORIES
from llmrecipes.evaluate.metrics import METRICS, OVER_ALL
from llmrecipes.evaluate.mt_bench.config import MTBenchConfig

# Kind of task: category, metric of the average, most new tokens (llm-jp-eval's output_length where it has the task).
KINDS: dict[str, tuple[str | None, str, int]] = {
    "jcommonsenseqa": ("MC", "exact_match", 1),
    "jsquad": ("RC", "char_f1", 25),
    "jmmlu": ("HE", "exact_match", 1),
    "mgsm_ja": ("MR", "exact_match", 10),
    "jnli": ("NLI", "exact_match", 3),
    "llm_jp_eval": (None, "exact_match", 0),
    "questions": (None, "contains", 32),
    "perplexity": (None, "bits_per_byte", 0),
    "mt_bench": (None, "score", 1024),
    "lm_eval": (None, "", 0),
}
CHAT_TOKENS = 128  # of a chat model that reasons before it answers
Kind = Literal[
    "jcommonsenseqa",
    "jsquad",
    "jmmlu",
    "mgsm_ja",
    "jnli",
    "llm_jp_eval",
    "questions",
    "perplexity",
    "mt_bench",
    "lm_eval",
]
Ask = Literal["instruction", "chat", "cloze"]


@dataclass(frozen=True, kw_only=True)
class TaskConfig:
    """One task.

    Args:
        kind: what the file holds and how it is scored; see docs/evaluation.md.
        file: its questions, JSON lines (of llm_jp_eval one JSON object; of perplexity texts; of lm_eval a task YAML of lm-evaluation-harness, or the name of one of its own tasks).
        name: of its folder and row; null = the kind.
        ask: "instruction" (llm-jp-eval's prompt with examples), "chat" (the chat template), "cloze" (questions only: the beginning of the answering sentence); null = instruction, for questions chat. Of lm_eval only "chat": the task's prompts, examples as turns before them, through the chat template; null = as they are.
        few_shot_file: where the examples come from; the same as file: its first questions, which are then not asked.
        few_shots: examples before each question.
        limit: ask only the first so many; null = all.
        held_out: of questions: only those that stand in no document (true), only those that do (false); null = all.
        kinds: of questions: only those whose field `kind` is one of these; null = all.
        max_new_tokens: longest answer; null = llm-jp-eval's output_length of the task, 32 for questions.
        instruction: other words than the kind's.
        cut: where an answer ends: "blank_line" (llm-jp-eval), "line", "none"; null = blank_line, for cloze line.
        metric: of llm_jp_eval files: exact_match, exact_match_figure, last_number, char_f1, set_f1, pearson, spearman, contains or begins_with; null = the kind's.
        category: of llm_jp_eval files: NLI, QA, RC, MC, HE, EL, FA, MR or MT; null = in no average.
        form: a regular expression that a whole answer obeys; null = the kind's.
        field: of perplexity: name of the text in a JSON line.
        mt_bench: of mt_bench: the judge and the rest; see below.
    """  # noqa: E501 - one line an argument is what the help shows

    kind: Kind
    file: str
    name: str | None = None
    ask: Ask | None = None
    few_shot_file: str | None = None
    few_shots: int = 0
    limit: int | None = None
    held_out: bool | None = None
    kinds: list[str] | None = None
    max_new_tokens: int | None = None
    instruction: str | None = None
    cut: Literal["blank_line", "line", "none"] | None = None
    metric: str | None = None
    category: str | None = None
    form: str | None = None
    field: str = "text"
    mt_bench: MTBenchConfig | None = None

    @property
    def title(self) -> str:
        """Name of the task."""
        return self.name or self.kind

    @property
    def way(self) -> Ask:
        """How it is asked."""
        return self.ask or ("chat" if self.kind in ("questions", "mt_bench") else "instruction")

    @property
    def end(self) -> str:
        """Where an answer is cut."""
        return self.cut or ("line" if self.way == "cloze" else "blank_line")

    @property
    def main_metric(self) -> str:
        """The figure that stands for the task."""
        if self.kind == "questions" and self.metric is None and self.way == "cloze":
            return "begins_with"
        return self.metric or KINDS[self.kind][1]

    @property
    def group(self) -> str | None:
        """Its category in the average."""
        return self.category or KINDS[self.kind][0]

    def problems(self) -> Iterator[Finding]:
        """What is wrong with the task."""
        if Path(self.title).name != self.title or self.title.startswith("."):
            yield ("name",), f"name: {self.title!r} is no name of a folder", "use letters, digits, - and _"
        if self.few_shots < 0 or (self.limit is not None and self.limit < 1):
            yield ("few_shots",), "few_shots is 0 or more, limit 1 or more", "correct them"
        if self.max_new_tokens is not None and self.max_new_tokens < 1:
            yield ("max_new_tokens",), f"max_new_tokens: {self.max_new_tokens} leaves no answer", "write 1 or more"
        if self.few_shots > 0 and self.few_shot_file is None and self.kind != "lm_eval":
            yield ("few_shots",), "few_shots: there is no file to take examples from", "name it in few_shot_file"
        if self.few_shots == 0 and self.few_shot_file is not None:
            yield ("few_shot_file",), "few_shot_file: without few_shots it has no effect", "add few_shots: 4"
        if self.ask == "cloze" and self.kind != "questions":
            yield ("ask",), f"ask: cloze is for questions, not for {self.kind}", "write instruction or chat"
        if self.held_out is not None and self.kind != "questions":
            yield ("held_out",), f"held_out: {self.kind} does not tell", "leave it out"
        if self.kinds is not None and self.kind != "questions":
            yield ("kinds",), f"kinds: {self.kind} does not tell", "leave it out"
        prompts = self.kind == "lm_eval" or (self.way == "instruction" and self.kind not in ("questions", "perplexity"))
        if self.few_shots and not prompts:
            yield ("few_shots",), "few_shots: examples stand in llm-jp-eval's prompt only", "use ask: instruction"
        yield from self._problems_of_kind()
        if self.kind != "lm_eval" and self.metric is not None and self.metric not in (*METRICS, *OVER_ALL):
            yield ("metric",), f"metric: there is no {self.metric!r}", f"one of {', '.join([*METRICS, *OVER_ALL])}"
        if self.category is not None and self.category not in CATEGORIES:
            yield ("category",), f"category: there is no {self.category!r}", f"one of {', '.join(CATEGORIES)}"

    def _problems_of_kind(self) -> Iterator[Finding]:
        """Keys that belong to one kind only."""
        if (self.mt_bench is None) != (self.kind != "mt_bench"):
            what = (
                "belongs to kind mt_bench" if self.mt_bench is not None else "is missing: kind mt_bench needs a judge"
            )
            yield ("mt_bench",), f"mt_bench: {what}", "see docs/evaluation.md"
        if self.mt_bench is not None:
            for path, what, hint in self.mt_bench.problems():
                yield ("mt_bench", *path), what, hint
        if self.kind == "mt_bench" and self.way != "chat":
            yield ("ask",), f"ask: {self.ask} is not for mt_bench, which is a conversation", "leave it out"
        if self.kind == "lm_eval":
            if self.ask not in (None, "chat"):
                yield ("ask",), f"ask: {self.ask} has no effect on kind lm_eval", "its task YAML says it, or chat"
            set_here = ("max_new_tokens", "instruction", "cut", "form", "few_shot_file")
            for key in (key for key in set_here if getattr(self, key) is not None):
                yield (key,), f"{key}: has no effect on kind lm_eval", "its task YAML says it"

    def missing(self) -> Iterator[Finding]:
        """Files that are not there."""
        for key in ("file", "few_shot_file"):
            name = getattr(self, key)
            own = self.kind == "lm_eval" and key == "file" and Path(name).suffix not in (".yaml", ".yml")
            if name is not None and not own and not Path(name).exists():
                yield (key,), f"{key}: {name}: no such file", "correct the path, or make the file"
        if self.mt_bench is not None:
            for path, what, hint in self.mt_bench.missing():
                yield ("mt_bench", *path), what, hint


@dataclass(frozen=True, kw_only=True)
class EvaluateConfig:
    """What is measured of one model.

    Args:
        model: run folder, checkpoint, folder written by convert, or Hugging Face folder.
        tasks: see docs/evaluation.md.
        output: folder for answers and scores; null = MODEL/evaluation/RECIPE, for models that are run folders.
        tokenizer: folder of another tokenizer than the model's own.
        template: chat template: a jinja file, instruction_ja, alpaca or chatml; null = the model's own.
        dtype: of weights and arithmetic.
        device: "auto" takes a GPU if there is one.
        batch_size: questions answered side by side.
        strict: a category that no task measures counts 0 in the average, as in llm-jp-eval.
        overwrite: measure again what was measured of another model or by another recipe.
        checkpoints: of a run folder: "newest", or "each" whole checkpoint that was not measured yet, each once, into OUTPUT@STEP.
        wait: with "each": seconds between two looks for new checkpoints, until the run is done; 0 = measure what is there.
    """  # noqa: E501 - one line an argument is what the help shows

    model: str
    tasks: list[TaskConfig]
    output: str | None = None
    tokenizer: str | None = None
    template: str | None = None
    dtype: Literal["fp32", "bf16"] = "fp32"
    device: Literal["auto", "cpu", "cuda"] = "auto"
    batch_size: int = 8
    strict: bool = False
    overwrite: bool = False
    checkpoints: Literal["newest", "each"] = "newest"
    wait: float = 0.0

    def problems(self) -> Iterator[Finding]:
        """What is wrong, of each task too."""
        if self.wait < 0 or (self.wait and self.checkpoints == "newest"):
            yield ("wait",), "wait: has an effect with checkpoints: each, and is 0 or more", "correct it"
        if self.batch_size < 1:
            yield ("batch_size",), f"batch_size: {self.batch_size} answers nothing", "write 1 or more"
        if not self.tasks:
            yield ("tasks",), "tasks: the list is empty", "name what to measure; see docs/evaluation.md"
        titles = [task.title for task in self.tasks]
        for number, task in enumerate(self.tasks):
            if task.title in titles[:number]:
                what = f"tasks: two are called {task.title}"
                yield ("tasks", number), what, "give one another name: their answers would share a folder"
            for path, what, hint in task.problems():
                yield ("tasks", number, *path), what, hint

    def missing(self) -> Iterator[Finding]:
        """Files and folders that are not there."""
        if not Path(self.model).exists() and not self.wait:  # a run that is waited for may not have begun
            yield ("model",), f"model: {self.model}: no such folder", "train it first, or correct the path"
        yield from self.missing_of_tasks()

    def missing_of_tasks(self) -> Iterator[Finding]:
        """The same, without the model."""
        for number, task in enumerate(self.tasks):
            for path, what, hint in task.missing():
                yield ("tasks", number, *path), what, hint
