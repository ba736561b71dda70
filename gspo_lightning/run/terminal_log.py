"""Lines on the terminal, and a copy of them in a file for a run whose terminal is gone.

Decides how a line gets there; of a bar that redraws itself the copy keeps its last state alone.
"""

import contextlib
import os
import re
import shlex
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TextIO

from lightning.pytorch.utilities import rank_zero_only
from tqdm import tqdm

_CONTROL = re.compile(
    r"\x1b\[[0-9;?]*[A-Za-z]"  # colours and cursor movements
    r"|\x1b\][^\x07\x1b]*(?:\x07|\x1b\\)"  # titles and links
    r"|[\x00-\x08\x0b-\x1f\x7f-\x9f]"  # all other control characters: the log is plain text
)


_start: list[str] = []  # the folder that a command was started in


def begin_here() -> None:
    """Note the working folder: from now on paths in it are shown as its user would type them."""
    _start.clear()
    with contextlib.suppress(OSError):  # it may have been removed
        _start.append(os.getcwd().rstrip("/"))


def shown(text: str) -> str:
    """Text in which paths below the folder of the command begin there."""
    for folder in filter(None, _start):
        text = re.sub(rf"(?<![^\s'\"`=(,:]){re.escape(folder)}/(?=[^\s/])", "", text)
    return text


@rank_zero_only
def say(text: str, stream: TextIO | None = None) -> None:
    """Print a line above whatever bars are drawn; the one way to the terminal.

    Without a ``stream`` it goes to standard error: for what is no part of a result.
    """
    stream = stream or sys.stderr
    tqdm.write(shown(text), file=stream)
    stream.flush()  # who reads a pipe wants the line now


class TerminalLog:
    """Copies standard output and standard error into a file, from ``open`` until ``close``."""

    def __init__(self) -> None:
        self._file: TextIO | None = None
        self._streams: list[tuple[str, Any, Any]] = []

    def open(self, path: Path, command: Sequence[str]) -> None:
        """Begin to append to ``path``, with a line that says when and what was started."""
        if self._file is not None:
            return
        self._file = path.open("a", encoding="utf-8", newline="\n")
        self._file.write(f"# {time.strftime('%Y-%m-%d %H:%M:%S')} {shlex.join(command)}\n")
        for name in ("stdout", "stderr"):
            stream = getattr(sys, name)
            setattr(sys, name, copy := _Copy(stream, self._file))
            self._streams.append((name, stream, copy))

    def close(self) -> None:
        """Give the streams back."""
        for name, stream, copy in self._streams:
            if getattr(sys, name) is copy:  # someone else may have replaced it since
                setattr(sys, name, stream)
        self._streams.clear()
        if self._file is not None:
            with contextlib.suppress(OSError):  # a disk that is full refuses the rest once more
                self._file.close()
            self._file = None


class _Copy:
    """A stream that also writes its finished lines to a file."""

    def __init__(self, stream: Any, file: TextIO) -> None:
        self._stream, self._file = stream, file
        self._rest = ""

    def write(self, text: str) -> int:
        written = self._stream.write(text)
        *lines, self._rest = (self._rest + text).split("\n")
        clean = (_CONTROL.sub("", line.rstrip("\r").rpartition("\r")[2]).rstrip() for line in lines)
        with contextlib.suppress(OSError):  # a disk that is full must not keep lines from terminals
            if not self._file.closed:
                self._file.write("".join(f"{line}\n" for line in clean if line))
                self._file.flush()  # a kill must not take the last lines, which say why it came
        return written

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)
