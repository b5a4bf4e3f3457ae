"""What the ranks of a job do together, so that a failure of one is known to all and nobody waits for ever.

Everything here also works in a single process that never heard of torch.distributed.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch.distributed as dist

from llmrecipes.checkpoint.errors import CheckpointError

T = TypeVar("T")


def _distributed() -> bool:
    return dist.is_available() and dist.is_initialized()


def rank(group: dist.ProcessGroup | None = None) -> int:
    """This process's number in ``group`` (None = all)."""
    return dist.get_rank(group) if _distributed() else 0


def ranks(group: dist.ProcessGroup | None = None) -> int:
    """How many processes ``group`` has."""
    return dist.get_world_size(group) if _distributed() else 1


def together(action: Callable[[], T], doing: str, group: dist.ProcessGroup | None = None) -> list[T]:
    """Run ``action`` on every rank, then tell each other how it went. Collective.

    Every exception is exchanged before anybody goes on: either all ranks return or all raise.

    Args:
        action: must not wait for other ranks itself.
        doing: what failed, for messages about exceptions that do not say so: ``writing runs/a failed``.
        group: the processes to talk to; None = all.

    Returns:
        What ``action`` returned on each rank, in the order of ranks; of small, picklable values.

    Raises:
        CheckpointError: ``action`` raised on some rank; the message has the reason and the rank. Where it raised
            anything but an OSError or a CheckpointError, which is our bug, that rank raises it as it is.
    """
    value, failure = None, None
    try:
        value = action()
    except Exception as error:
        failure = error
    outcomes = _gather((value, failure and _reason(failure, doing)), doing, group)
    failed = {number: reason for number, (_, reason) in enumerate(outcomes) if reason}
    if isinstance(failure, Exception) and not isinstance(failure, (OSError, CheckpointError)):
        raise failure
    if failed:
        raise CheckpointError(_summary(failed, len(outcomes))) from failure
    return [value for value, _ in outcomes]


def on_first_rank(action: Callable[[], Any], doing: str, group: dist.ProcessGroup | None = None) -> Any:
    """Run ``action`` on rank 0 alone and give all ranks its (small) result. Collective.

    Raises:
        CheckpointError: it raised; on all ranks.
    """
    return together(lambda: action() if rank(group) == 0 else None, doing, group)[0]


def _reason(error: Exception, doing: str) -> str:
    if isinstance(error, CheckpointError):
        return str(error)
    return f"{doing}: {error}" if isinstance(error, OSError) else f"{doing}: {type(error).__name__}: {error}"


def _summary(failed: dict[int, str], number_of_ranks: int) -> str:
    """The first rank's reason, and who else failed."""
    first, *others = failed
    if number_of_ranks == 1:
        return failed[first]
    also = f", and also on rank{'s' if len(others) > 1 else ''} {', '.join(map(str, others))}" if others else ""
    return f"{failed[first]} (rank {first}{also})"


def _gather(value: Any, doing: str, group: dist.ProcessGroup | None) -> list[Any]:
    if not _distributed():
        return [value]
    gathered: list[Any] = [None] * ranks(group)
    try:
        dist.all_gather_object(gathered, value, group=group)
    except RuntimeError as error:  # gloo and NCCL: the connection to a dead process, or a timeout
        raise CheckpointError(f"{doing}: another process does not answer: {error}") from error
    return gathered
