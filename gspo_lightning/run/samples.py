"""``gspo samples RUN``: the newest groups of a run, their rewards side by side, best first.

Decides how a group looks on a terminal. Reads ``samples.jsonl``, also while the run writes it, and
imports nothing that takes time.
"""

import argparse
import io
import itertools
import json
import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from gspo_lightning.start.layout import columns, fold, head, printable, width
from gspo_lightning.start.typed import program

FILE = "samples.jsonl"
LINES = 3  # of a text that is not shown in full
NARROWEST = 40
Row = dict[str, Any]


def main(argv: Sequence[str] | None = None) -> int:
    """Print groups; returns the exit code, 2 after a mistake of the user's."""
    parser = argparse.ArgumentParser(
        prog=f"{program(alone=True)} samples", description=__doc__.partition("\n")[0]
    )
    parser.add_argument("run", type=Path, help="run folder, or its samples.jsonl")
    parser.add_argument(
        "--rollout", type=int, help="rollout, counted from 1; the newest if left out"
    )
    parser.add_argument("--prompts", type=int, default=4, help="most prompts to show (default: 4)")
    parser.add_argument("--width", type=int, help="columns; those of the terminal if left out")
    parser.add_argument("--full", action="store_true", help="show long texts in full")
    options = parser.parse_args(argv)
    if isinstance(sys.stdout, io.TextIOWrapper):  # a terminal that knows few characters
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        size = columns() if options.width is None else options.width
        for name, value, least in (
            ("--width", size, NARROWEST),
            ("--prompts", options.prompts, 1),
            ("--rollout", 1 if options.rollout is None else options.rollout, 1),
        ):
            if value < least:
                raise ValueError(f"{name} must be at least {least}, got {value}")
        file = find(options.run)
        rows, damaged = read(file, options.rollout)
        for line in page(rows, size, options.prompts, options.full):
            print(line)
    except (ValueError, OSError) as error:
        sys.stderr.write(f"error: {error}\n")
        return 2
    if damaged:
        sys.stderr.write(f"{file}: damaged lines left out: {damaged}\n")
    return 0


def find(run: Path) -> Path:
    """The file with the samples of a run.

    Raises:
        ValueError: If there is none, with the way out.
    """
    run = Path(os.path.expanduser(run))
    if run.is_file():
        return run
    if not run.is_dir():
        raise ValueError(f"{run} is no run folder: there is no such folder")
    if not (run / FILE).is_file():
        raise ValueError(
            f"{run} has no {FILE}: the run has done no rollout yet, or has no "
            "gspo_lightning.SampleTable among trainer.callbacks"
        )
    return run / FILE


def read(file: Path, rollout: int | None = None) -> tuple[list[Row], int]:
    """The rows of a rollout, and how many lines met on the way were no rows.

    Args:
        file: Lines of JSON, rollouts in ascending order; what stands behind the last line end is a
            line that is being written.
        rollout: Counted from 1; ``None`` is the newest.

    Raises:
        ValueError: If there are none of that rollout, naming what there is.
    """
    lines = file.read_bytes().split(b"\n")[:-1]
    first = next((row for line in lines if (row := parsed(line))), None)
    if first is None:
        raise ValueError(f"{file} has no samples yet")
    from_0 = first["rollout"] == 0  # an earlier version wrote the file
    rows: list[Row] = []
    damaged, newest = 0, None
    for line in reversed(lines):
        row = parsed(line)
        if row is None:
            damaged += 1
            continue
        row["rollout"] += from_0
        newest = newest or row["rollout"]
        wanted = rollout or newest
        if row["rollout"] < wanted:
            break
        if row["rollout"] == wanted:
            rows.append(row)
    if not rows:
        raise ValueError(
            f"{file} has nothing of rollout {rollout}; it goes from {first['rollout'] + from_0} "
            f"to {newest}, as often as SampleTable's every_n_rollouts says"
        )
    return rows[::-1], damaged


def parsed(line: bytes) -> Row | None:
    """A row of samples; None if the line is none."""
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        return None
    if not isinstance(row, dict) or type(row.get("rollout")) is not int:
        return None
    parts = row.setdefault("parts", {})
    texts = all(isinstance(row.get(key), str) for key in ("prompt", "completion"))
    if not texts or not isinstance(parts, dict):
        return None
    values = [row.setdefault(key, None) for key in ("reward", "advantage")]
    numbers = all(isinstance(v, float | int | None) for v in [*values, *parts.values()])
    return row if numbers else None


def page(rows: list[Row], size: int, prompts: int, full: bool = False) -> Iterator[str]:
    """The lines of a rollout.

    Args:
        rows: As ``SampleTable`` writes them; completions of a prompt are neighbours.
        size: Columns.
        prompts: Groups at most.
        full: Whether long texts are shown in full.
    """
    groups = [list(group) for _, group in itertools.groupby(rows, key=lambda row: row["prompt"])]
    shown = groups[:prompts]
    title = [f"rollout {rows[0]['rollout']}"]
    if len(shown) < len(groups):
        title.append(f"{len(shown)} of {len(groups)} prompts")
    if any(row.get("truncated") for group in shown for row in group):
        title.append("+ behind tokens: cut at the limit")
    yield ", ".join(title)
    for group in shown:
        yield ""
        yield from group_lines(group, size, full)


def group_lines(group: list[Row], size: int, full: bool = False) -> Iterator[str]:
    """A prompt, and below it one row for each completion, the best first."""
    yield from text_lines(group[0]["prompt"], "prompt    ", size, full)
    best_first = sorted(group, key=lambda row: row["reward"] or 0.0, reverse=True)
    ranked = sorted(best_first, key=lambda row: row["reward"] is None)
    names = list(dict.fromkeys(name for row in group for name in row["parts"]))
    names = [] if len(names) == 1 else names  # a single part is the reward, or a multiple of it
    table = [["reward", *(shortened(name, 10) for name in names), "advantage", "tokens"]]
    for row in ranked:
        values = [row["reward"], *(row["parts"].get(name) for name in names)]
        tokens = f"{row.get('length', '')}{'+' if row.get('truncated') else ''}"
        table.append([*map(figure, values), figure(row["advantage"], "+.2f"), tokens])
    while names and sum(column_widths(table)) > 3 * size // 5:  # of many parts the first ones
        names.pop()
        table = [[*cells[:-3], *cells[-2:]] for cells in table]
    widths = column_widths(table)
    texts = ["completion", *(row["completion"] for row in ranked)]
    for cells, text in zip(table, texts, strict=True):
        start = "".join(" " * (w - width(c)) + c for c, w in zip(cells, widths, strict=True))
        yield from text_lines(text, f"{start}  ", size, full)


def column_widths(table: list[list[str]]) -> list[int]:
    """Columns that each column of cells takes, with the gap before it."""
    return [max(map(width, cells)) + 2 for cells in zip(*table, strict=True)]


def text_lines(text: str, start: str, size: int, full: bool) -> Iterator[str]:
    """A text behind ``start``, further lines of it below its first; the middle of a long one out.

    Head and tail are shown: a chat prompt ends with the question, a completion with its answer.
    """
    room = max(size - width(start), NARROWEST // 4)
    text = printable(text)
    longest = LINES * room
    lines = fold(text if full else shortened(text, longest), room)
    while not full and len(lines) > LINES:  # broken at spaces it takes more lines
        longest -= room // 8 + 1
        lines = fold(shortened(text, longest), room)
    yield (start + lines[0]).rstrip()
    for line in lines[1:]:
        yield " " * width(start) + line


def shortened(text: str, size: int) -> str:
    """Head and tail of a text in at most ``size`` columns."""
    if width(text) <= size:
        return text
    half = (size - 1) // 2
    return f"{head(text, half)}…{head(text[::-1], half)[::-1]}"


def figure(value: float | None, form: str = ".3f") -> str:
    """A number in a cell; a dash where a reward gave none."""
    return "–" if value is None else format(value, form)
