"""SIGUSR1 at random instants, on a random rank: the same step everywhere, saved, exit code 75, as if nothing was."""

from __future__ import annotations

import os
import random
import re
import signal
import time

import pytest
from broken_runs import STOPPED, assert_same, fit, last_step, launched
from helpers import write_recipe
from report import Case

SIGNALS, STEPS_PER_SIGNAL = 20, 10


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [1, 2])
def test_sigusr1_at_random_instants(tmp_path, little, ranks, stride):
    signals = SIGNALS // stride(4)
    steps = signals * STEPS_PER_SIGNAL
    case = Case(6, "SIGUSR1 at a random instant on a random rank", ranks)
    recipe = little(ranks, steps=steps)
    recipe["checkpoint"]["every"] = "20 steps"
    recipe["trainer"]["val_check_interval"] = 10
    for name in ("whole", "broken"):
        (tmp_path / name).mkdir()
        write_recipe(tmp_path / name, recipe)
    run, chance, stops = tmp_path / "broken" / "run", random.Random(ranks), []
    for number in range(signals):
        with launched(tmp_path / "broken", ranks=ranks) as job:
            before = last_step(run)
            if number % 4:
                job.until_step(run, before + 1)  # in a step, or between two
            time.sleep(chance.uniform(0, 0.02 if number % 4 else 0.3))  # else while it starts and reads the checkpoint
            os.kill(job.pids[chance.randrange(ranks)], signal.SIGUSR1)
            text = job.expect(STOPPED)
        (said,) = re.findall(r"stopped after step (\d+)", text)  # of rank 0; the others are silent
        assert last_step(run) == int(said) >= before
        stops.append(int(said))
        case.add(lost=last_step(run) - int(said))
    assert stops[-1] < steps
    assert len(set(stops)) > signals / 2
    for name in ("broken", "whole"):
        fit(tmp_path / name, ranks=ranks)
    assert_same(run, tmp_path / "whole" / "run", ranks)
    case.write()
