"""Where rows come from: what a program has in its hands, a file, a dataset of the hub.

Decides what is taken as data, which split of it is read, and the words that stand for rows in
memory, in messages and in checkpoints, which never hold them.
"""

import os
import sys
from collections.abc import Iterable, Mapping, Sequence
from datetime import date, time, timedelta
from numbers import Number
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gspo_lightning.data.tables import (
    READERS,
    SUFFIXES,
    check_file,
    check_ids,
    read_rows,
    rows_of_table,
    split_key,
)
from gspo_lightning.policy.folder import HUB_NAME, hub_trouble
from gspo_lightning.start.shipped import find_data

if TYPE_CHECKING:  # what a program may give; on the command line a source is a text
    Given = str | Path | Sequence[str | Sequence[Mapping[str, Any]] | Mapping[str, Any]] | Any
else:
    Given = str

TAKEN = (
    "a file, a folder, a dataset's name on the hub, a list (of texts, of chats or of rows), or a "
    "datasets.Dataset"
)
PLAIN = (str, bytes, Number, date, time, timedelta, type(None))


def in_words(source: Given) -> Any:
    """A source as messages and checkpoints have it; a path as it is.

    >>> in_words("a.jsonl"), in_words(["1+2=", "3+4="])
    ('a.jsonl', 'a list of 2 rows in memory')
    """
    if source is None or isinstance(source, str | Path):
        return source
    kind = "list" if isinstance(source, list | tuple) else type(source).__name__
    return f"a {kind} of {len(source)} rows in memory"


def check_source(
    key: str, source: Given, split: str | None = None, name: str | None = None
) -> None:
    """Refuse, before anything is read, what is no source of rows.

    Args:
        key: The setting, for messages.
        source: See ``TAKEN``.
        split: Which part of a dataset that has several.
        name: Which of a dataset's configurations.

    Raises:
        ValueError: Naming the setting and what is taken.
    """
    if not isinstance(source, str | Path):
        if not isinstance(source, list | tuple) and _kind(source) not in ("Dataset", "DatasetDict"):
            more = "; take(n) of it, as a list" if _kind(source).startswith("Iterable") else ""
            if isinstance(source, Mapping):
                more = "; a row is a dict, and a list of them is data"
            elif not more and isinstance(source, Iterable):
                more = "; give list(...) of it"
            got = f"{type(source).__name__}{more}"
            raise ValueError(f"{key}: expected {TAKEN}; got {got}")
        if split is not None and _kind(source) != "DatasetDict":
            raise ValueError(f"{split_key(key)}: {in_words(source)} has no splits; leave it out")
    elif is_on_hub(str(source), split, name):
        _check_hub(key, str(source))
    else:
        try:
            check_file(key, str(source))
        except ValueError as error:
            if Path(source).suffix in SUFFIXES or Path(source).is_symlink():
                raise
            hub = "a dataset of the hub is named like openai/gsm8k"
            raise ValueError(f"{error}; {hub}") from error


def read_source(
    key: str,
    source: Given,
    split: str | None = None,
    name: str | None = None,
    prompt_column: str = "prompt",
) -> list[dict]:
    """All rows of a source; see ``check_source``.

    Args:
        prompt_column: The column that texts and chats of a list are put into.

    Raises:
        ValueError: If the source cannot be read, or has no rows.
    """
    if isinstance(source, str | Path):
        path = str(source)
        if not is_on_hub(path, split, name):
            return read_rows(key, path, split, name)
        rows = rows_of_table(key, path, _fetched, split, name)
    elif isinstance(source, list | tuple):
        rows = [_row(key, number, each, prompt_column) for number, each in enumerate(source, 1)]
    else:
        rows = rows_of_table(key, in_words(source), lambda *_: source, split, name)
    if not rows:
        raise ValueError(f"{key}: {in_words(source)}: there are no rows; give at least one")
    check_ids(key, in_words(source), rows)
    return rows


def is_on_hub(path: str, split: str | None = None, name: str | None = None) -> bool:
    """Whether a path that leads to nothing here is a dataset's name on the hub.

    >>> is_on_hub("openai/gsm8k"), is_on_hub("prompts.jsonl"), is_on_hub("squad", split="train")
    (True, False, True)
    """
    file = Path(os.path.expanduser(find_data(path)))
    if file.exists() or file.is_symlink() or file.suffix in SUFFIXES:
        return False
    if not HUB_NAME.fullmatch(path):
        return False
    # "data/x" could be a name on the hub, but where there is a folder "data" a path was meant
    return not file.parent.is_dir() if "/" in path else bool(split or name)


def _kind(source: Any) -> str:
    """The name of a class of the datasets library; nothing for other objects."""
    datasets = sys.modules.get("datasets")  # who has such an object has imported it
    names = ("Dataset", "DatasetDict", "IterableDataset", "IterableDatasetDict")
    return next((n for n in names if datasets and isinstance(source, getattr(datasets, n))), "")


def _check_hub(key: str, path: str) -> None:
    """Raise ValueError at once for a dataset that is neither here nor within reach."""
    try:
        from datasets import config
    except ImportError:
        return  # said where it is read
    kept = Path(config.HF_DATASETS_CACHE) / path.replace("/", "___")
    if not kept.is_dir() and (trouble := hub_trouble()):
        raise ValueError(
            f"{key}: {path} is no file and no folder, and of the hub not even the address is found "
            f"({trouble}); go online, or name one of {READERS}"
        )


def _fetched(datasets: Any, path: str, name: str | None, split: str | None) -> Any:
    return datasets.load_dataset(path, name, split=split)


def _row(key: str, number: int, given: Any, prompt_column: str) -> dict:
    """A row from an item of a list."""
    where = f"{key}: row {number} of the list"
    if isinstance(given, str | list | tuple):
        given = {prompt_column: given if isinstance(given, str) else list(given)}
    if not isinstance(given, Mapping):
        wanted = "a prompt (a text, or a list of chat messages) or a mapping of columns"
        raise ValueError(f"{where}: expected {wanted}, got {type(given).__name__}")
    for name, value in given.items():
        if not isinstance(name, str):
            raise ValueError(f"{where}: a column is named by a text, got {name!r}")
        if (bad := _not_plain(value)) is not None:
            raise ValueError(
                f"{where}: column {name!r} holds a {type(bad).__name__}; a column holds texts, "
                "numbers, and lists and mappings of them, by which a checkpoint tells the rows"
            )
    return dict(given)


def _not_plain(value: Any) -> Any:
    """The first part of a value that has no text which is the same in every process, or None."""
    if isinstance(value, Mapping):
        value = [*value.keys(), *value.values()]
    if isinstance(value, list | tuple):
        return next((bad for item in value if (bad := _not_plain(item)) is not None), None)
    return None if isinstance(value, PLAIN) else value
