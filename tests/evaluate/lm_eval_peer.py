"""Scores of one task YAML: ``python lm_eval_peer.py TASKS ours:FOLDER hf:FOLDER ...``, where lm_eval is installed.

``ours`` is our model class on a checkpoint or a folder of ours; ``hf`` is lm_eval's own HFLM on an exported folder.
With ``-chat`` behind either, choices and written answers are asked as conversations, two examples as turns before them.
``recipe`` is a task of an evaluation's recipe with ``ask: chat``.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path


def model(kind: str, folder: str):
    if kind.startswith("ours"):
        from llmrecipes.evaluate.harness_model import DecoderLM
        from llmrecipes.inference.opened import open_model

        return DecoderLM(open_model(folder), batch_size=3, chat=kind.endswith("-chat"))
    from lm_eval.models.huggingface import HFLM

    return HFLM(pretrained=folder, device="cpu", dtype="float32", batch_size=2)


def by_recipe(tasks: Path, folder: str) -> dict:
    from llmrecipes.errors import UserError
    from llmrecipes.evaluate.config import TaskConfig
    from llmrecipes.evaluate.harness import run_harness
    from llmrecipes.inference.opened import open_model

    task = TaskConfig(kind="lm_eval", file=str(tasks / "choices.yaml"), ask="chat", few_shots=2, limit=3)
    assert not list(task.problems())
    try:
        result, rows = run_harness(open_model(folder), task, 2)
    except UserError as error:
        return {"error": error.problems}
    return {"result": result, "rows": rows}


def main(tasks: Path, *models: str) -> dict:
    from lm_eval.evaluator import simple_evaluate
    from lm_eval.tasks import TaskManager

    manager = TaskManager(include_path=str(tasks), include_defaults=False)
    found = {}
    for one in models:
        kind, _, folder = one.partition(":")
        if kind == "recipe":
            found[one] = by_recipe(tasks, folder)
            continue
        chat = kind.endswith("-chat")
        names = [name for name in sorted(manager.all_tasks) if not (chat and name == "texts")]
        asked = {"apply_chat_template": True, "fewshot_as_multiturn": True, "num_fewshot": 2} if chat else {}
        done = simple_evaluate(model(kind, folder), tasks=names, task_manager=manager, bootstrap_iters=0, **asked)
        scores = {n: {k: v for k, v in r.items() if isinstance(v, float)} for n, r in done["results"].items()}
        answers = {n: [s["filtered_resps"] for s in rows] for n, rows in done["samples"].items()}
        prompts = {n: [s["arguments"][0][0] for s in rows] for n, rows in done["samples"].items()}
        found[one] = {"scores": scores, "answers": answers, "prompts": prompts}
    return found


if __name__ == "__main__":
    print("RESULT " + json.dumps(main(Path(sys.argv[1]), *sys.argv[2:])))
