"""Lines on the terminal, and a copy of them in a file for a run whose terminal is gone.

Decides how a line gets there, and that nothing ends because nobody reads it; of a bar that redraws
itself the copy keeps its last state alone.
"""

import contextlib
import os
import re
import shlex
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, TextIO

from lightning.pytorch.utilities import rank_zero_only
from tqdm import tqdm
from tqdm.contrib import DummyTqdmFile

from gspo_lightning.start import layout
from gspo_lightning.start.layout import printable
from gspo_lightning.start.typed import as_called

_SEQUENCES = re.compile(
    r"\x1b\[[0-9;?]*[A-Za-z]"  # colours and cursor movements
    r"|\x1b\][^\x07\x1b]*(?:\x07|\x1b\\)"  # titles and links
)


_start: list[str] = []  # the folder that a command was started in


def begin_here() -> None:
    """Note the working folder: from now on paths in it are shown as its user would type them."""
    _start.clear()
    with contextlib.suppress(OSError):  # it may have been removed
        _start.append(os.getcwd().rstrip("/"))


def working_folder() -> list[str]:
    """What ``begin_here`` has noted: one folder, or none."""
    return list(filter(None, _start))


def shown(text: str) -> str:
    """Text in which paths below the folder of the command begin there."""
    for folder in working_folder():
        text = re.sub(rf"(?<![^\s'\"`=(,:]){re.escape(folder)}/(?=[^\s/])", "", text)
    return text


@rank_zero_only
def say(text: str, stream: TextIO | None = None) -> None:
    """Print lines above whatever bars are drawn; the one way to the terminal.

    Without a ``stream`` they go to standard error: for what is no part of a result.
    """
    stream = stream or sys.stderr
    tqdm.write(printable(shown(as_called(text)), keep="\n"), file=stream)
    stream.flush()  # who reads a pipe wants the line now


@rank_zero_only
def say_beside(label: str, parts: Iterable[str], gap: str = " ", end: str = "") -> None:
    """Print a label and parts beside it on standard output, as ``layout.beside`` lays them out.

    What is no terminal gets one line, for whoever searches it.
    """
    stream = sys.stdout
    parts = [printable(shown(part)) for part in parts]
    lines = [label + gap.join(parts)]
    if layout.on_terminal(stream):
        lines = layout.beside(label, parts, layout.columns(stream), gap, end)
        lines[0] = layout.styled(label, layout.BOLD, stream) + lines[0][len(label) :]
    tqdm.write("\n".join(lines), file=stream)
    stream.flush()


def lines_above_bars() -> contextlib.ExitStack:
    """Have what anybody prints stand above the bars, which it would otherwise tear; until closed.

    Bars are drawn on what standard output was before.
    """
    stack = contextlib.ExitStack()
    below = sys.stdout
    shares = layout.on_terminal(sys.stderr)  # else its lines go elsewhere, past the bars
    stack.enter_context(contextlib.redirect_stdout(DummyTqdmFile(below)))
    if shares:
        stack.enter_context(contextlib.redirect_stderr(DummyTqdmFile(below)))
    return stack


class TerminalLog:
    """Stands before standard output and standard error, from ``take`` until ``close``.

    Whoever writes there is not told when a reader, a terminal or a device's room is gone. From
    ``open`` on, lines also go into a file.
    """

    def __init__(self) -> None:
        self._file: TextIO | None = None
        self._streams: list[tuple[str, Any, Any]] = []
        self._nowhere: list[TextIO] = []  # in place of streams that were closed from the start

    def take(self) -> None:
        """Step in before both streams."""
        for name in () if self._streams else ("stdout", "stderr"):
            stream = getattr(sys, name)
            if stream is None:
                self._nowhere.append(open(os.devnull, "w", encoding="utf-8"))  # noqa: SIM115
            copy = _Copy(stream or self._nowhere[-1], self)
            setattr(sys, name, copy)
            self._streams.append((name, stream, copy))

    def open(self, path: Path, command: Sequence[str]) -> None:
        """Begin to append to ``path``, with a line that says when and what was started."""
        if self._file is not None:
            return
        self._file = path.open("a", encoding="utf-8", newline="\n")
        self._file.write(f"# {time.strftime('%Y-%m-%d %H:%M:%S')} {shlex.join(command)}\n")
        self.take()

    def keep(self, line: str) -> None:
        """Write a line into the file, if it is open."""
        with contextlib.suppress(OSError):  # a disk that is full must not keep lines from terminals
            if self._file is not None:
                self._file.write(f"{line}\n")
                self._file.flush()  # a kill must not take the last lines, which say why it came

    def lost(self, copy: Any, error: Exception) -> None:
        """Say, where there is a file to look into, that a stream is gone."""
        if self._file is not None:
            name = "output" if copy is sys.stdout else "error"
            why = (getattr(error, "strerror", None) or str(error)).lower()
            where = f"the run goes on, its lines are in {self._file.name}"
            say(f"standard {name} is gone ({why}): {where}")

    def close(self) -> None:
        """Give the streams back."""
        if self._file is not None:
            with contextlib.suppress(OSError):  # a disk that is full refuses the rest once more
                self._file.close()
            self._file = None
        for name, stream, copy in self._streams:
            copy.flush()  # here, and not when Python ends, a loss is of no account
            if getattr(sys, name) is copy:  # someone else may have replaced it since
                setattr(sys, name, stream)
        self._streams.clear()
        while self._nowhere:
            self._nowhere.pop().close()


class _Copy:
    """A stream that cannot be lost, and whose finished lines a log keeps."""

    def __init__(self, stream: Any, log: TerminalLog) -> None:
        self._stream, self._log = stream, log
        self._lost = False
        self._rest = ""

    def write(self, text: str) -> int:
        self._attempt(self._show, text)
        *lines, self._rest = (self._rest + text).split("\n")
        for line in lines:
            last = line.rstrip("\r").rpartition("\r")[2]  # of a bar
            shown = printable(_SEQUENCES.sub("", last).rstrip(), keep="\t")
            if shown:
                self._log.keep(shown)
        return len(text)

    def flush(self) -> None:
        self._attempt(self._stream.flush)

    def _show(self, text: str) -> None:
        try:
            self._stream.write(text)
        except UnicodeEncodeError as error:  # a terminal that knows few characters
            encoded = text.encode(error.encoding, "backslashreplace")
            self._stream.write(encoded.decode(error.encoding))

    def _attempt(self, act: Callable[..., Any], *arguments: Any) -> None:
        if self._lost:
            return
        try:
            act(*arguments)
        except (OSError, ValueError) as error:  # nobody reads, the device is full; or it was closed
            self._lost = True
            with contextlib.suppress(OSError, ValueError):  # a stream that is no file
                # for whoever writes past this object, and for what Python flushes as it ends
                nowhere = os.open(os.devnull, os.O_WRONLY)
                os.dup2(nowhere, self._stream.fileno())
                os.close(nowhere)
            self._log.lost(self, error)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)
