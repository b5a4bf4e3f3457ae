"""Whatever a recipe holds, checking it answers with problems, never with an exception."""

from __future__ import annotations

import copy
import random
from pathlib import Path

import yaml
from good_recipe import GOOD

from llmrecipes.recipe import Problem, Recipe, check, diff, fingerprint
from llmrecipes.recipe.signatures import Sources

VALUES = [
    None, True, 0, -1, 1, 10**30, 0.5, float("nan"), float("inf"), -1e300, "", "x", "0 steps", "1e400 tokens",
    "2 tokens", [], [[]], [1, "a"], {}, {"a": 1}, {"class_path": "x"}, {"class_path": 3}, "\x00", "a" * 5000,
    {"class_path": "os.path.join"}, {"class_path": "llmrecipes.optim.AdamW", "init_args": 3},
    "llmrecipes.data.PackedShards",
]  # fmt: skip


def _paths(value: object, path: tuple = ()) -> list[tuple]:
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [p for key, inner in items for p in [(*path, key), *_paths(inner, (*path, key))]]


def _mutate(data: dict, rng: random.Random) -> None:
    path = rng.choice(_paths(data))
    holder = data
    for key in path[:-1]:
        holder = holder[key]
    action = rng.randrange(3) if isinstance(holder, dict) else 2
    if action == 0:
        del holder[path[-1]]
    elif action == 1:
        name = list(path[-1])
        rng.shuffle(name)
        holder["".join(name) or "x"] = holder.pop(path[-1])
    else:
        holder[path[-1]] = copy.deepcopy(rng.choice(VALUES))


def test_mutated_values(folder, stride):
    rng, sources, seen, with_problems = random.Random(0), Sources(), 0, 0
    cases = 300 // stride(3)
    for case in range(cases):
        data = yaml.safe_load(GOOD)
        for _ in range(rng.randint(1, 4)):
            if data:
                _mutate(data, rng)
        Path("r.yaml").write_text(yaml.safe_dump(data, allow_unicode=True))
        before = Path("r.yaml").read_text()
        found = check(Path("r.yaml")) if case % 10 == 0 else check(Recipe(data), sources=sources)
        assert all(isinstance(p, Problem) and "\n" not in str(p) for p in found)
        assert Path("r.yaml").read_text() == before
        fingerprint(data)
        diff(data, {})
        seen, with_problems = seen + 1, with_problems + bool(found)
    assert seen == cases
    assert with_problems > cases * 2 / 3


def test_mutated_bytes(folder, stride):
    rng, seen = random.Random(1), 0
    cases = 150 // stride(3)
    for _ in range(cases):
        text = bytearray(GOOD.encode())
        for _ in range(rng.randint(1, 6)):
            start = rng.randrange(len(text))
            if rng.random() < 0.5:
                text[start : start + rng.randrange(4)] = rng.randbytes(rng.randrange(3))
            else:
                text[start] = ord(rng.choice("{}[]:-#&*!|>'\"%@`,? \t\n"))
        Path("r.yaml").write_bytes(bytes(text))
        found = check(Path("r.yaml"))
        assert all("\n" not in str(p) for p in found)
        seen += 1
    assert seen == cases
