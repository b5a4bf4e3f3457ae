"""The one exception for mistakes of the user; our own bugs are asserts."""

from __future__ import annotations


class UserError(Exception):
    """A mistake the user can mend: one or more problems, each saying what, where and what to do.

    The command line prints every problem on its own line and exits with 2, without a traceback.
    """

    def __init__(self, *problems: str) -> None:
        super().__init__("\n".join(problems))
        self.problems = problems


class RankFailure(Exception):
    """A process of the job is missing, dead or hung: one line that names it. The command ends with exit code 1."""
