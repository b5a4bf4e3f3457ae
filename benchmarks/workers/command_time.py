"""CPU seconds of a command from its start to its end: ``... command_time -- llmrecipes --help``.

The command runs in a process of its own. Its children count, what this process takes does not.
"""

from __future__ import annotations

import resource
import subprocess
import sys
import time

from benchmarks.meter import write_record


def main() -> None:
    """One record with one unit; the figure to check is the exit code."""
    command = sys.argv[sys.argv.index("--") + 1 :]
    started = time.perf_counter()
    code = subprocess.run(command, stdout=subprocess.DEVNULL, check=False).returncode
    wall = time.perf_counter() - started
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    unit = {"cpu": used.ru_utime + used.ru_stime, "wall": wall}
    write_record({"units": [unit], "checks": [float(code)], "memory_mib": used.ru_maxrss / 1024})
    sys.exit(code)


if __name__ == "__main__":
    main()
