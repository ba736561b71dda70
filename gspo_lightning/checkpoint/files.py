"""The checkpoints of a run folder: their names, and which one to continue from.

Decides what `--ckpt_path` means.
"""

import os
import re
from pathlib import Path

import yaml
from lightning.pytorch.utilities import rank_zero_warn

from gspo_lightning.checkpoint.io import damage, is_sealed

FOLDER = "checkpoints"  # inside the run folder
BEST = "best.yaml"  # beside the checkpoints
_NAME = re.compile(r"rollout=(\d+)\.ckpt")


def checkpoint_number(path: str | Path) -> int | None:
    """Rollouts completed according to a checkpoint's name, None for a foreign name.

    >>> checkpoint_number("runs/a/checkpoints/rollout=000040.ckpt")
    40
    >>> checkpoint_number("last.ckpt") is None
    True
    """
    match = _NAME.fullmatch(Path(path).name)
    return int(match[1]) if match else None


def numbered_files(folder: str | Path) -> list[Path]:
    """Everything with a checkpoint's name, oldest first."""
    numbered = [(checkpoint_number(path), path) for path in Path(folder, FOLDER).glob("*.ckpt")]
    return [path for number, path in sorted((n, p) for n, p in numbered if n is not None)]


def list_checkpoints(folder: str | Path) -> list[Path]:
    """Complete checkpoints of a run folder, oldest first; other and half-copied files are skipped.

    Looks at the end of each file only; `damage` reads a whole one.
    """
    return [path for path in numbered_files(folder) if is_sealed(path)]


def find_checkpoint(folder: str | Path, choice: str | None) -> Path | None:
    """Turn the word given as `--ckpt_path` into a file, whose checksum is right.

    Args:
        folder: The run folder, the one that holds `checkpoints/`.
        choice: `last` (the newest), `auto` (the newest, or none), `best` (by the figure that
            `RolloutCheckpoint` monitors), a path, or None. A newest file that is damaged is named
            in a warning, and the one before it is taken.

    Returns:
        The checkpoint to load, None for a fresh start.

    Raises:
        ValueError: If there is no such checkpoint, with the way out.
    """
    if choice is None:
        return None
    if choice in ("hpc", "registry"):
        raise ValueError(
            f"ckpt_path `{choice}` does not exist here: use last, auto, best or a path"
        )
    if choice in ("last", "auto"):
        newest = _newest(folder)
        if newest is None and choice == "last":
            raise ValueError(
                f"ckpt_path: no checkpoint in {Path(folder, FOLDER)}; leave --ckpt_path out for a "
                "fresh start, or name the run with --trainer.default_root_dir"
            )
        return newest
    path = _best(folder) if choice == "best" else Path(os.path.expanduser(choice)).absolute()
    if not os.path.exists(path):  # Path's own raises for a name that is too long
        raise ValueError(f"ckpt_path: no file {path}; use last, auto, best or an existing path")
    reason = damage(path)
    if reason is not None:
        raise ValueError(f"ckpt_path: {path} {reason}; use last or another file")
    return path


def _newest(folder: str | Path) -> Path | None:
    """The newest checkpoint that is whole; None where there is none, not even a damaged one."""
    damaged: list[str] = []
    for path in reversed(numbered_files(folder)):
        reason = damage(path)
        if reason is None:
            for text in damaged:
                rank_zero_warn(f"{text}; the one before it is used")
            return path
        damaged.append(f"checkpoint {path} {reason}")
    if damaged:  # a fresh start would take the rest of this run away
        raise ValueError(
            f"ckpt_path: {damaged[0]}, and no other is whole; restore one, or start in another "
            "folder with --trainer.default_root_dir NEW"
        )
    return None


def _best(folder: str | Path) -> Path:
    file = Path(folder, FOLDER, BEST)
    if not file.exists():
        raise ValueError(
            f"ckpt_path: best needs {file}, which a RolloutCheckpoint with `monitor` writes at the "
            "first validation; use last, or a path"
        )
    try:
        return file.with_name(yaml.safe_load(file.read_text(encoding="utf-8"))["kept"][0]["file"])
    except (ValueError, TypeError, LookupError, AttributeError, yaml.YAMLError) as error:
        raise ValueError(
            f"ckpt_path: {file} does not say which checkpoint is the best: it is empty or damaged; "
            "use last, or a path"
        ) from error
