"""Every moment at which something changes on disk, counted, so that a process can be killed at each of them.

Opening for writing, making, renaming, linking and removing are seen by an audit hook, before they happen; ``fsync``,
the bytes of a checkpoint and the lines of the metrics by functions put in their place. A kill at one of the last two
leaves half of what was to be written.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Callable
from typing import Any

from llmrecipes.callbacks.metrics_file import MetricsFile, as_line
from llmrecipes.checkpoint import durable

PATH_EVENTS = {"os.mkdir": 2, "os.remove": 1, "os.rmdir": 1, "os.symlink": 2}
WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT


class WritePoints:
    """Counts while armed.

    Args:
        folder: whose changes count, absolute or relative to the working directory of the moment.
        thread: name of the only thread that counts; None = all.
        every_piece: each tensor of a file counts, not only the first bytes.
    """

    def __init__(self, folder: str, thread: str | None = None, every_piece: bool = True) -> None:
        self.folder, self.thread, self.every_piece = folder, thread, every_piece
        self.names: list[str] = []
        self.armed = False
        self._die_at = 0
        sys.addaudithook(self._audit)
        self._fsync, os.fsync = os.fsync, self._sync
        self._put, durable.put = durable.put, self._put_piece
        self._append, points = MetricsFile.append, self
        MetricsFile.append = lambda file, record: points._append_line(file, record)

    def arm(self, die_at: int = 0) -> None:
        """Begin to count; be killed at that point (0 = never)."""
        self.names, self._die_at, self.armed = [], die_at, True

    def _point(self, name: str, halfway: Callable[[], Any] = lambda: None) -> None:
        if not self.armed or (self.thread is not None and threading.current_thread().name != self.thread):
            return
        self.names.append(name)
        if len(self.names) == self._die_at:
            self.armed = False
            halfway()
            os.kill(os.getpid(), signal.SIGKILL)

    def _audit(self, event: str, arguments: tuple) -> None:
        if not self.armed:
            return
        if event == "open":
            path, _, flags = arguments
            if isinstance(path, int) or not flags & WRITES or not self._counts(path):
                return
            self._point(f"open {os.path.basename(os.fspath(path))}")
        elif event == "os.rename":
            if self._counts(arguments[1]):
                self._point(f"rename to {os.path.basename(os.fspath(arguments[1]))}")
        elif event in PATH_EVENTS:
            path = arguments[1] if event == "os.symlink" else arguments[0]
            relative_to_descriptor = arguments[PATH_EVENTS[event]] != -1
            if relative_to_descriptor or self._counts(path):
                self._point(f"{event[3:]} {os.path.basename(os.fspath(path))}")

    def _counts(self, path: Any) -> bool:
        return os.path.abspath(os.fsdecode(path)).startswith(os.path.abspath(self.folder) + os.sep)

    def _sync(self, descriptor: int) -> None:
        self._point("fsync")
        self._fsync(descriptor)

    def _put_piece(self, file: Any, piece: Any) -> None:
        data = memoryview(piece).cast("B")

        def half() -> None:
            file.write(data[: len(data) // 2])
            file.flush()

        if self.every_piece or not file.tell():
            self._point(f"write {os.path.basename(file.name)}", half)
        self._put(file, piece)

    def _append_line(self, file: MetricsFile, record: dict) -> None:
        def half() -> None:
            line = as_line(record)
            file._file.write(line[: len(line) // 2])
            file._file.flush()

        self._point("write metrics.jsonl", half)
        self._append(file, record)
