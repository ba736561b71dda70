"""Tables from files: JSON lines, Parquet, folders of the datasets library.

Decides which files are read and how a broken one is reported: with the setting, the file and the
line. Leaves out what the columns mean.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

READERS = (
    ".jsonl, .json (one object a line), .parquet, or a folder written by datasets.save_to_disk"
)


def read_rows(key: str, path: str) -> list[dict]:
    """Read a table as a list of rows.

    Args:
        key: The setting that names the file, for messages.
        path: JSON lines, Parquet, or a folder written by ``datasets.Dataset.save_to_disk``.

    Returns:
        One dict per row, never empty.

    Raises:
        ValueError: If the file is missing, empty, of another kind, or has a broken row; the message
            names key, file and line.
    """
    file = Path(path).expanduser()
    if not file.exists():
        raise ValueError(f"{key}: there is no file {path} (looked in {Path.cwd()})")
    if file.is_dir() or file.suffix == ".parquet":
        rows = read_with_datasets(key, file)
    elif file.suffix in (".jsonl", ".json"):
        rows = read_json_lines(key, file)
    else:
        raise ValueError(f"{key}: {path} ends in {file.suffix or 'nothing'}; expected {READERS}")
    if not rows:
        raise ValueError(f"{key}: {path} has no rows")
    return rows


def read_json_lines(key: str, file: Path) -> list[dict]:
    rows = []
    try:
        with file.open(encoding="utf-8-sig") as lines:  # a byte-order mark is no part of the data
            for number, line in enumerate(lines, start=1):
                if not line.strip():
                    continue
                try:
                    row = json.loads(line)
                except json.JSONDecodeError as error:
                    raise ValueError(f"{key}: {file}:{number}: not JSON: {error.msg}") from error
                if not isinstance(row, dict):
                    raise ValueError(
                        f"{key}: {file}:{number}: expected an object like "
                        f'{{"prompt": ...}}, got {type(row).__name__}'
                    )
                rows.append(row)
    except UnicodeDecodeError as error:
        raise ValueError(f"{key}: {file} is not UTF-8 (byte {error.start}); convert it") from error
    return rows


def read_with_datasets(key: str, file: Path) -> list[dict]:
    try:
        import datasets
    except ImportError as error:
        raise ValueError(
            f"{key}: reading {file} needs the datasets package: pip install gspo_lightning[data]"
        ) from error
    try:
        if file.is_dir():
            table = datasets.load_from_disk(str(file))
        else:
            table = datasets.Dataset.from_parquet(str(file), keep_in_memory=True)
    except Exception as error:  # pyarrow and datasets raise a dozen kinds; all mean the same here
        raise ValueError(f"{key}: cannot read {file}: {str(error).splitlines()[0]}") from error
    if isinstance(table, datasets.DatasetDict):
        raise ValueError(
            f"{key}: {file} holds several splits {list(table)}; give one split's folder"
        )
    return list(table)


def column(key: str, path: str, rows: list[dict], name: str, why: str = "") -> list[Any]:
    """One column of all rows; a row without it is an error that names the row and what it has."""
    for number, row in enumerate(rows, start=1):
        if row.get(name) is None:
            raise ValueError(
                f"{key}: {path}: row {number} has no column {name!r}{why}; it has {sorted(row)}"
            )
    return [row[name] for row in rows]
