"""Tables from files: JSON lines, Parquet, folders of the datasets library.

Decides which files are read and how a broken one is reported: with the setting, the file and the
line. A column ``id``, where there is one, must tell the rows apart.
"""

import codecs
import json
import math
import os
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from gspo_lightning.checkpoint.quoted import kind_of_value
from gspo_lightning.start.shipped import find_data

READERS = (
    ".jsonl, .json (one object a line), .parquet, or a folder written by datasets.save_to_disk"
)
SUFFIXES = (".jsonl", ".json", ".parquet")
LONGEST_LINE = 16 << 20  # bytes; a longer line is a file without line ends, not a prompt


def split_key(key: str) -> str:
    """The setting that names the split of a source, by the setting that names the source."""
    return "data.split" if key == "data.path" else "data.val_split"


def read_rows(key: str, path: str, split: str | None = None, name: str | None = None) -> list[dict]:
    """Read a table as a list of rows.

    Args:
        key: The setting that names the file, for messages.
        path: JSON lines, Parquet, or a folder: written by ``save_to_disk`` of the datasets library,
            or a copy of a dataset on the hub.
        split: Which part of a folder that has several.
        name: Which configuration of a copied dataset that has several.

    Returns:
        One dict per row, never empty.

    Raises:
        ValueError: If the file is missing, empty, of another kind, or has a broken row; the message
            names key, file and line.
    """
    file = Path(os.path.expanduser(find_data(path)))
    check_file(key, path)
    if split is not None and file.is_file():
        raise ValueError(f"{split_key(key)}: {path} is a file, it has no splits; leave it out")
    if name is not None and file.is_file() and key == "data.path":
        raise ValueError(f"data.name: {path} is a file, it has no configurations; leave it out")
    if file.is_dir() or file.suffix == ".parquet":
        rows = rows_of_table(key, str(file), _opened, split, name)
    elif file.suffix in (".jsonl", ".json") and file.is_file():
        rows = read_json_lines(key, file)
    else:
        raise ValueError(f"{key}: {path} ends in {file.suffix or 'nothing'}; expected {READERS}")
    if not rows:
        raise ValueError(f"{key}: {path} has no rows; write one object a line")
    check_ids(key, path, rows)
    return rows


def check_file(key: str, path: str) -> None:
    """Raise ValueError, naming the setting ``key``, if there is nothing at ``path``."""
    file = Path(os.path.expanduser(find_data(path)))
    if not file.exists():
        if file.is_symlink():
            raise ValueError(f"{key}: {path} is a link that leads nowhere; mend or replace it")
        raise ValueError(f"{key}: there is no file {path} (looked in {Path.cwd()})")


def check_ids(key: str, path: str, rows: list[dict]) -> None:
    """Refuse a column ``id`` whose values are not all different; rows without one do not count."""
    first: dict[str, int] = {}
    for number, row in enumerate(rows, start=1):
        name = repr(row.get("id"))
        if row.get("id") is not None and first.setdefault(name, number) != number:
            raise ValueError(
                f"{key}: {path}: row {number} has the id {name} of row {first[name]} again; take "
                "one out, or give the column another name"
            )


def read_json_lines(key: str, file: Path) -> list[dict]:
    rows = []
    try:
        lines = file.open("rb")
    except OSError as error:
        text = f"{key}: cannot read {file}: {error.strerror}; ask its owner, or copy it"
        raise ValueError(text) from error
    with lines:
        number = 0
        while line := lines.readline(LONGEST_LINE + 1):
            number += 1
            where = f"{key}: {file}:{number}"
            if len(line) > LONGEST_LINE:
                limit = f"longer than {LONGEST_LINE >> 20} MiB"
                raise ValueError(f"{where}: {limit}; write one object a line")
            if number == 1:
                line = line.removeprefix(codecs.BOM_UTF8)  # no part of the data
                if line.startswith(b"\x1f\x8b"):
                    raise ValueError(f"{where}: packed by gzip; unpack the file")
                if line.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
                    raise ValueError(f"{where}: UTF-16; convert the file to UTF-8")
            if line.strip():
                rows.append(read_object(where, line))
    return rows


def read_object(where: str, line: bytes) -> dict:
    if b"\0" in line:
        raise ValueError(f"{where}: holds a NUL byte; write the file again as UTF-8 text")
    try:
        row = json.loads(
            line.decode(), object_pairs_hook=columns, parse_constant=refuse, parse_float=finite
        )
        if b"\\ud" in line or b"\\uD" in line:  # half a character passes json, no tokenizer
            json.dumps(row, ensure_ascii=False).encode()
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{where}: {why_unreadable(error)}") from error
    if not isinstance(row, dict):
        wrong = f'expected an object like {{"prompt": ...}}, got {kind_of_value(row)}'
        raise ValueError(f"{where}: {wrong}; write one object a line")
    return row


def why_unreadable(error: Exception) -> str:
    """What is wrong with a line, and what to do."""
    match error:
        case UnicodeDecodeError():
            return f"not UTF-8 (byte {error.start} of the line); convert the file"
        case UnicodeEncodeError():
            surrogate = error.object[error.start]
            return f"a lone surrogate {surrogate!r}, which is no character; take it out"
        case json.JSONDecodeError():
            return f"not JSON: {error.msg} at character {error.pos + 1}; write one object a line"
        case RecursionError():
            return "nested too deeply; write one flat object a line"
    reason = str(error).partition("; use sys.")[0]  # of a number with more than 4,300 digits
    return f"cannot be read: {reason}; mend the line"


def columns(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object, if no key stands in it twice."""
    row = dict(pairs)
    if len(row) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"column {twice!r} stands twice")
    return row


def refuse(constant: str) -> None:
    """NaN and infinities are no JSON, and no reward can compare with them."""
    raise ValueError(f"{constant} is no JSON, write null for it")


def finite(number: str) -> float:
    """A JSON number as Python has it, unless that would be infinite, which no answer is."""
    value = float(number)
    if math.isinf(value):
        raise ValueError(f"{number[:20]} is too large for a number, write it as a text, or null")
    return value


def rows_of_table(
    key: str,
    path: str,
    read: Callable[[Any, str, str | None, str | None], Any],
    split: str | None,
    name: str | None,
) -> list[dict]:
    """Rows that the datasets library reads.

    Args:
        key: The setting that names the source, for messages.
        path: The source.
        read: Gives a table, or several by their split; called with the library, ``path``, ``name``
            and ``split``.
        split: Which table of several; one alone needs no name.
        name: Which configuration.
    """
    try:
        import datasets
    except ImportError as error:
        raise ValueError(
            f"{key}: reading {path} needs the datasets package: pip install gspo_lightning[data]"
        ) from error
    with _silence(datasets):
        try:
            table = read(datasets, path, name, split)
        except Exception as error:  # pyarrow and datasets raise a dozen kinds; all mean the same
            raise ValueError(_why_not_read(key, path, name, split, error)) from error
    if isinstance(table, datasets.DatasetDict):
        which = split_key(key)
        if split is not None and split not in table:
            raise ValueError(f"{which}: {path} has no split {split!r}; it has {list(table)}")
        if split is None and len(table) > 1:
            raise ValueError(f"{key}: {path} holds several splits {list(table)}; set {which}")
        table = table[split] if split is not None else next(iter(table.values()))
    return list(table)


def _opened(datasets: Any, path: str, name: str | None, split: str | None) -> Any:
    """A Parquet file, or a folder: one that the library has saved, or a copy from the hub."""
    if not Path(path).is_dir():
        return datasets.Dataset.from_parquet(path, keep_in_memory=True)
    saved = ("dataset_dict.json", "dataset_info.json", "state.json")
    if any(Path(path, file).exists() for file in saved):
        return datasets.load_from_disk(path)
    return datasets.load_dataset(path, name, split=split)


@contextmanager
def _silence(datasets: Any) -> Iterator[None]:
    """Hide what the datasets library shows: an error of its would be logged and raised."""
    level, bars = datasets.logging.get_verbosity(), datasets.is_progress_bar_enabled()
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        datasets.logging.set_verbosity(level)
        if bars:
            datasets.enable_progress_bars()


def _why_not_read(
    key: str, path: str, name: str | None, split: str | None, error: Exception
) -> str:
    """One line for what the datasets library raises, with the setting to change."""
    text = str(error)
    lines = text.splitlines() or [type(error).__name__]
    listed = re.search(r"(?:Should be one of|Available:|available configs:) (\[.*?\])", text)
    there = f"; it has {listed[1]}" if listed else ""
    if text.startswith(("Unknown split", "Unrecognized instruction")):
        return f"{split_key(key)}: {path} has no split {split!r}{there}"
    if text.startswith("BuilderConfig"):
        return f"data.name: {path} has no configuration {name!r}{there}"
    if text.startswith("Config name is missing"):
        return f"{key}: {path} has several configurations; set data.name{there}"
    if Path(path).exists():
        return f"{key}: cannot read {path}: {lines[0].rstrip('.')}; expected {READERS}"
    return (
        f"{key}: {path} is no file and no folder, and as a dataset of the hub it cannot be read: "
        f"{lines[0].rstrip('.')}; mend the name, go online, or name a file"
    )


def column(
    key: str, path: str, rows: list[dict], name: str, why: str = "", setting: str = ""
) -> list[Any]:
    """One column of all rows; a row without it is an error that names the row and what it has.

    Args:
        why: Who needs the column, for the message.
        setting: The setting that names the column, if one does, for the message.
    """
    for number, row in enumerate(rows, start=1):
        if row.get(name) is None:
            null = f", where {name!r} is null" if name in row else ""
            there = str(sorted(row))[:300]
            raise ValueError(
                f"{key}: {path}: row {number} has no column {name!r}{why}; it has {there}{null}"
                f"; mend the row, or {_other(setting)}"
            )
    return [row[name] for row in rows]


def _other(setting: str) -> str:
    return f"set {setting}" if setting else "name another column"


def extract(key: str, path: str, rows: list[dict], patterns: Mapping[str, str]) -> list[dict]:
    r"""Rows in which a pattern has taken the part that is needed out of a column's text.

    Args:
        key: The setting that names the file, for messages.
        path: The file, for messages.
        rows: Rows of the file; they stay as they are.
        patterns: Regular expressions by column (``.`` matches line ends, too): group 1 of the last
            match becomes the column, or the whole match if there is no group, without white space
            at its ends.

    Raises:
        ValueError: For a row without the column, or in which the pattern finds nothing.

    >>> extract("data.path", "x", [{"answer": "6*12=72\n#### 72"}], {"answer": r"####(.+)"})
    [{'answer': '72'}]
    """
    for name, pattern in patterns.items():
        form = re.compile(pattern, re.DOTALL)
        parts = []
        for number, text in enumerate(text_column(key, path, rows, name), start=1):
            matches = list(form.finditer(text))
            part = (matches[-1][min(form.groups, 1)] or "").strip() if matches else ""
            if not part:
                raise ValueError(
                    f"{key}: {path}: row {number}: data.extract finds no {pattern!r} in column "
                    f"{name!r}, which ends in {text[-60:]!r}; mend the row or the pattern"
                )
            parts.append(part)
        rows = [row | {name: part} for row, part in zip(rows, parts, strict=True)]
    return rows


def check_patterns(patterns: Mapping[str, str]) -> None:
    """Refuse what is no regular expression, naming the column."""
    for name, pattern in patterns.items():
        try:
            re.compile(pattern)
        except re.error as error:
            raise ValueError(
                f"data.extract.{name} {pattern!r} is no regular expression: {error}"
            ) from error


def text_column(key: str, path: str, rows: list[dict], name: str, setting: str = "") -> list[str]:
    """A column of texts; anything else in it, or an empty one, is an error that names the row."""
    values = column(key, path, rows, name, setting=setting)
    for number, value in enumerate(values, start=1):
        where = f"{key}: {path}: row {number}: column {name!r}"
        if not isinstance(value, str):
            raise ValueError(
                f"{where} is {kind_of_value(value)}, not a text; write a text, or {_other(setting)}"
            )
        if not value:
            raise ValueError(f"{where} is empty; write a text, or take the row out")
    return values
