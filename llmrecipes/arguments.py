"""What several commands do with their words before jsonargparse sees them."""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable, Sequence


def join_lists(function: Callable[..., None], args: Sequence[str]) -> list[str]:
    """Lets list options be given as shells expand them: `--input a b` becomes `--input=["a", "b"]` for jsonargparse."""
    lists = {
        f"--{name}": "int" in str(parameter.annotation)
        for name, parameter in inspect.signature(function).parameters.items()
        if "list[" in str(parameter.annotation)
    }
    joined, rest = list[str](), list(args)
    while rest:
        option = rest.pop(0)
        if option not in lists:
            joined.append(option)
            continue
        values = list[str]()
        while rest and not rest[0].startswith("--"):
            values.append(rest.pop(0))
        if len(values) == 1 and values[0].startswith("["):  # already written as a list
            joined += [option, values[0]]
        else:
            joined.append(f"{option}=" + ("[" + ",".join(values) + "]" if lists[option] else json.dumps(values)))
    return joined
