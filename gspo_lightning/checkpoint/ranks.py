"""Ranks of one run: what each of them is about to train with is compared before anything is.

Decides what must be alike and how a difference is told. Ranks that differ would not fail by
themselves: machines with folders of their own go on from different checkpoints, train on, and end
with exit code 0.
"""

import inspect
import json
import os
import platform
import re
import socket
from collections.abc import Mapping, Sequence
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch.distributed as dist

import gspo_lightning
from gspo_lightning.checkpoint.fingerprints import (
    digest,
    flat,
    source_digest,
    sources,
    tokenizer_fingerprint,
)
from gspo_lightning.checkpoint.io import mark_of

# Settings in which machines may differ: where files lie (their content is compared), devices, and
# how much is computed at once.
_OWN = re.compile(
    r".*\.(?:path|val_path|test_path|predict_path|device|frozen_device|batch_size|dirpath|save_dir"
    r"|micro_batch_size|micro_batch_tokens|default_root_dir|devices|enable_progress_bar)"
    r"|trainer\.(?:logger|profiler|plugins|strategy)(?:\..*)?"
)
_COMPARED = ("model.", "data.", "trainer.", "seed_everything")
_LIMITS = ("max_epochs", "max_steps", "limit_train_batches", "limit_val_batches", "precision")
_LIBRARIES = ("torch", "transformers", "lightning")
CHECKPOINT = "ckpt_path"
MOST = 3  # differences that are told; the rest is counted


class RanksDiffer(ValueError):
    """Ranks that cannot train together; raised on each of them alike."""


def check_alike(marks: Mapping[str, Any]) -> None:
    """Raise RanksDiffer on every rank unless all of them have the same marks.

    Every rank must call. With one rank nothing is done.

    Args:
        marks: Plain values by name.
    """
    if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
        return
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, (socket.gethostname(), dict(marks)))
    hosts, found = zip(*everyone, strict=True)
    if lines := differing(found, hosts):
        more = f"; and {len(lines) - MOST} more" if len(lines) > MOST else ""
        way_out = "start each of them with the same command, files and versions"
        if any(line.startswith(f"{CHECKPOINT} ") for line in lines):
            way_out = (
                "trainer.default_root_dir must be one folder on a file system that all machines "
                "share"
            )
        raise RanksDiffer(
            f"the ranks differ, so none of them trains: {'; '.join(lines[:MOST])}{more}; {way_out}"
        )


def differing(found: Sequence[Mapping[str, Any]], hosts: Sequence[str]) -> list[str]:
    """What is not the same in all marks, one text each, the checkpoint first.

    >>> differing([{"seed": 1}, {"seed": 1}, {"seed": 2}], ["a", "a", "b"])
    ['seed is 1 on ranks 0-1 (a), 2 on rank 2 (b)']
    """
    lines = []
    keys = {key for marks in found for key in marks}
    for key in sorted(keys, key=lambda key: (key != CHECKPOINT, key)):
        values: dict[str, list[int]] = {}
        for rank, marks in enumerate(found):
            values.setdefault(_shown(marks.get(key)), []).append(rank)
        if len(values) > 1:
            parts = (f"{value} on {_named(ranks, hosts)}" for value, ranks in values.items())
            lines.append(f"{key} is {', '.join(parts)}")
    return lines


def _shown(value: Any) -> str:
    text = json.dumps(value, sort_keys=True, default=lambda x: type(x).__qualname__)
    # a long value by its beginning and a mark, or two that differ at the end would look alike
    return text if len(text) <= 60 else f"{text[:40]}... ({digest([text])})"


def _named(ranks: Sequence[int], hosts: Sequence[str]) -> str:
    spans: list[list[int]] = []
    for rank in ranks:
        if spans and spans[-1][1] == rank - 1:
            spans[-1][1] = rank
        else:
            spans.append([rank, rank])
    texts = [str(first) if first == last else f"{first}-{last}" for first, last in spans]
    names = sorted({hosts[rank] for rank in ranks})
    where = ", ".join(names) if len(names) < 3 else f"{len(names)} machines"
    return f"rank{'s' if len(ranks) > 1 else ''} {', '.join(texts)} ({where})"


def check_start(trainer: Any) -> None:
    """Raise RanksDiffer if ranks would not begin alike; call it before any rank reads data.

    What is read differently leads to other collectives, so this must be the first one.
    """
    if trainer.world_size > 1:
        check_alike(start_marks(trainer))


def start_marks(trainer: Any) -> dict[str, Any]:
    """What is known of a run before data and models are read: checkpoint, settings, code."""
    module = trainer.lightning_module
    marks: dict[str, Any] = {"version of python": platform.python_version()}
    marks |= {f"version of {name}": version(name) for name in _LIBRARIES}
    marks |= {"number of ranks": trainer.world_size, "code of gspo_lightning": _code()}
    marks |= {f"trainer.{name}": getattr(trainer, name, None) for name in _LIMITS}
    marks["seed_everything"] = int(os.environ.get("PL_GLOBAL_SEED", 0))
    if getattr(module, "tokenizer", None) is not None:
        marks["tokenizer"] = tokenizer_fingerprint(module.tokenizer)
    for name, term in getattr(module, "rewards", {}).items():
        marks[f"code of model.rewards.{name}"] = code_of(term.fn)
    given: dict[str, Any] = {}
    for callback in trainer.callbacks:
        if hasattr(callback, "flat_config"):  # what a command was told
            given |= callback.flat_config()
            marks |= checkpoint_mark(callback.checkpoint)
    if not given:  # a program: what its objects were made with
        owners = {"model": module, "data": trainer.datamodule}
        given = flat({k: dict(getattr(o, "hparams_initial", {})) for k, o in owners.items()})
    marks |= {key: value for key, value in given.items() if key.startswith(_COMPARED)}
    return {key: value for key, value in marks.items() if not _OWN.fullmatch(key)}


def checkpoint_mark(path: Any) -> dict[str, str | None]:
    """The name of the checkpoint from which a rank goes on, and its checksum; None without one."""
    return {CHECKPOINT: None if path is None else f"{Path(path).name} ({mark_of(path)})"}


def code_of(function: Any) -> str | None:
    """A mark of the file that defines a reward; None of one that has no file."""
    kind = function if inspect.isroutine(function) else type(function)
    try:
        return digest([inspect.getsource(inspect.getmodule(kind))])  # type: ignore[arg-type]
    except (OSError, TypeError):
        return None


@cache
def _code() -> str:
    return source_digest(sources(Path(gspo_lightning.__path__[0])))
