r"""Text on a terminal: what is shown of it, how wide it is, where it breaks, what has colours.

A policy may write anything: terminal sequences, marks that turn the direction of text. So may
prompts and the messages of what reward functions raise: all of it passes ``printable`` first.
Imports the standard library alone.
"""

import contextlib
import os
import shutil
import sys
import unicodedata
from collections.abc import Iterable
from typing import Any

BOLD, DIM, RED, YELLOW = "1", "2", "31", "33"  # of the SGR sequence; every terminal has them


def is_shown(char: str) -> bool:
    """Whether a character is seen where it stands, or is a space.

    Others are control characters (C0, C1), line ends, marks of direction, of zero width or of a
    language, halves of a character, and what no font has.
    """
    return char.isprintable() or unicodedata.category(char) == "Zs"


def printable(text: str, keep: str = "") -> str:
    r"""Text for a terminal: what is not seen becomes an escape of Python, but for ``keep``.

    >>> printable("reward 'a' failed: \x1b]0;title\x07\n\u202e\u200b")
    "reward 'a' failed: \\x1b]0;title\\x07\\n\\u202e\\u200b"
    >>> printable("é 日本\u3000語 \n", keep="\n")
    'é 日本\u3000語 \n'
    """
    if text.isprintable():
        return text
    return "".join(c if is_shown(c) or c in keep else repr(c)[1:-1] for c in text)


def on_terminal(stream: Any = None) -> bool:
    """Whether a stream, standard output if none is given, is a terminal that can redraw a line."""
    stream = stream or sys.stdout
    try:
        # 0 columns in some containers
        shown = stream.isatty() and os.get_terminal_size(stream.fileno()).columns > 0
    except (OSError, ValueError):  # the terminal is gone, or the stream is closed or no file
        return False
    return shown and os.environ.get("TERM") != "dumb"


def columns(stream: Any = None) -> int:
    """Columns of the terminal that a stream is, else what COLUMNS says, else 80."""
    stream = stream or sys.stdout
    with contextlib.suppress(OSError, ValueError):  # it is no terminal, or no file
        if (found := os.get_terminal_size(stream.fileno()).columns) > 0:
            return found
    return shutil.get_terminal_size((80, 24)).columns


def styled(text: str, style: str, stream: Any) -> str:
    """Text in a style, if the stream is a terminal that may have colours (https://no-color.org)."""
    if not text or os.environ.get("NO_COLOR") or not on_terminal(stream):
        return text
    return f"\x1b[{style}m{text}\x1b[0m"


def width(text: str) -> int:
    r"""Columns that printable text takes: two for a wide character, none for a combining one.

    >>> width("abc"), width("日本"), width("e\u0301")
    (3, 4, 1)
    """
    if text.isascii():
        return len(text)
    seen = (c for c in text if unicodedata.category(c) not in ("Mn", "Me"))
    return sum(2 if unicodedata.east_asian_width(c) in "WF" else 1 for c in seen)


def head(text: str, size: int) -> str:
    """As many of the first characters as fit in ``size`` columns; at least one.

    >>> head("日本語", 5), head("abc", 5), head("日本", 1)
    ('日本', 'abc', '日')
    """
    taken = 0
    for place, char in enumerate(text):
        taken += width(char)
        if taken > size and place:
            return text[:place]
    return text


def fold(text: str, size: int, indent: str = "") -> list[str]:
    """Lines of at most ``size`` columns, broken at spaces where there are any.

    Args:
        text: Without line ends.
        size: Columns of a line.
        indent: Stands before every line but the first.

    >>> fold("reward 0.5, length 12 tokens", 14, indent="  ")
    ['reward 0.5,', '  length 12', '  tokens']
    >>> fold("日本語日本語", 8)
    ['日本語日', '本語']
    """
    lines: list[str] = []
    before = ""
    while width(before) + width(text) > size:
        whole = head(text, max(size - width(before), 1))
        following = text[len(whole)] if len(whole) < len(text) else " "
        end = len(whole) if following == " " else whole.rfind(" ") + 1
        # one long word may be the rest of the line: break within it, not far before it
        end = end if end > len(whole) // 2 else len(whole)
        lines.append(before + text[:end].rstrip(" "))
        text, before = text[end:].lstrip(" "), indent
        if not text:
            return lines
    return [*lines, before + text]


def rows(parts: Iterable[str], size: int, gap: str = "  ") -> list[str]:
    """All parts side by side, in as many lines of ``size`` columns as they need.

    >>> rows(["greedy 0.5", "pass@4 0.9", "length 12"], 24)
    ['greedy 0.5  pass@4 0.9', 'length 12']
    """
    lines: list[str] = []
    for part in parts:
        if lines and width(lines[-1]) + width(gap) + width(part) <= size:
            lines[-1] += gap + part
        else:
            lines.append(part)
    return lines


def beside(label: str, parts: Iterable[str], size: int, gap: str = " ", end: str = "") -> list[str]:
    r"""A label and what stands beside it, below each other where one line is too short.

    Args:
        label: Stands before the first line, and as many spaces before the others.
        parts: What no line end may cut.
        size: Columns.
        gap: Between two parts.
        end: Behind every line but the last, such as the mark with which a command goes on.

    >>> print("\n".join(beside("plan  ", "60 rollouts of 8".split(), 16)))
    plan  60
          rollouts
          of 8
    """
    lines = rows(parts, size - width(label) - width(end), gap) or [""]
    starts = [label, *[" " * width(label)] * (len(lines) - 1)]
    ends = [*[end] * (len(lines) - 1), ""]
    return [a + line + b for a, line, b in zip(starts, lines, ends, strict=True)]
