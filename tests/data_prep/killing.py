"""A stage that kills its process once: in the middle of the file 2, unless `<output>.died` exists."""

import os
from pathlib import Path

from data_prep.frame.map import Verdict


def make(config, shard):
    died = Path(f"{config.output}.died")

    def judge(documents):
        if shard.name == "2" and not died.exists():
            died.touch()
            os.kill(os.getpid(), 9)
        return [Verdict(document.text) for document in documents]

    return judge
