"""Scores of one task YAML: ``python lm_eval_peer.py TASKS ours:FOLDER hf:FOLDER ...``, where lm_eval is installed.

``ours`` is our model class on a checkpoint or a folder of ours; ``hf`` is lm_eval's own HFLM on an exported folder.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path


def model(kind: str, folder: str):
    if kind == "ours":
        from llmrecipes.evaluate.harness_model import DecoderLM
        from llmrecipes.inference.opened import open_model

        return DecoderLM(open_model(folder), batch_size=3)
    from lm_eval.models.huggingface import HFLM

    return HFLM(pretrained=folder, device="cpu", dtype="float32", batch_size=2)


def main(tasks: Path, *models: str) -> dict:
    from lm_eval.evaluator import simple_evaluate
    from lm_eval.tasks import TaskManager

    manager = TaskManager(include_path=str(tasks), include_defaults=False)
    found = {}
    for one in models:
        kind, _, folder = one.partition(":")
        names = sorted(manager.all_tasks)
        done = simple_evaluate(model(kind, folder), tasks=names, task_manager=manager, bootstrap_iters=0)
        scores = {n: {k: v for k, v in r.items() if isinstance(v, float)} for n, r in done["results"].items()}
        answers = {n: [s["filtered_resps"] for s in rows] for n, rows in done["samples"].items()}
        found[one] = {"scores": scores, "answers": answers}
    return found


if __name__ == "__main__":
    print("RESULT " + json.dumps(main(Path(sys.argv[1]), *sys.argv[2:])))
