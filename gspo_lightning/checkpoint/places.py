"""Places in a run folder: where the folder may lie, and which names in it are a run's own.

Decides what is refused before training: a folder that is not on a disk or not the same for all
ranks, and a name under which a file of the run would be lost.
"""

import os
import re
import time
import uuid
from fnmatch import fnmatch
from pathlib import Path, PurePath
from typing import Any

from gspo_lightning.checkpoint.ranks import RanksDiffer

KEY = "trainer.default_root_dir"
ELSEWHERE = f"start in another folder with --{KEY} NEW"
# Patterns of what a run writes directly in its folder, beside what its callbacks are told to.
EVENTS = "events.out.tfevents.*"
FILES = (
    "config.yaml",
    "config.resume-*.yaml",
    "versions.yaml",
    "versions.resume-*.yaml",
    "uncommitted.diff",
    "uncommitted.resume-*.diff",
    "hparams.yaml",
    "log.txt",
    "samples.jsonl",
    "failed_rollout*.jsonl",
    "finished",
)
FOLDERS = ("checkpoints", "faults", "profile", "source", "source.resume-*", "earlier-*")
TOKEN_SECONDS = 5.0  # for a new file to be seen through a network file system
MOUNTS = Path("/proc/self/mountinfo")
_OF_THIS_MACHINE = {"ext2", "ext3", "ext4", "xfs", "btrfs", "zfs", "f2fs", "tmpfs", "overlay"}


def local_folder(path: str | Path | None, key: str = KEY) -> Path:
    """The absolute path of a run folder, which no later change of the working folder moves.

    ``~`` and environment variables are replaced, as TensorBoard does for its own folder.

    Raises:
        ValueError: If it is no path on a local disk, or a variable in it is not set.
    """
    if path is None or not str(path):
        raise ValueError(f"{key} is empty; name a folder for the run")
    text = os.path.expandvars(os.path.expanduser(str(path)))
    if re.match(r"[A-Za-z][\w+.-]+://?", text):
        raise ValueError(
            f"{key}: {path} is an address, and a run needs a folder: its checkpoints are forced to "
            "a disk and renamed there; name a local or mounted folder, and copy it from there"
        )
    if "\0" in text:
        raise ValueError(f"{key}: a path cannot hold a NUL character, got {text!r}")
    if not _fits(text, 255):
        raise ValueError(
            f"{key}: a name in it is no UTF-8 text of at most 255 bytes: {text[:80]!r}"
        )
    if variable := re.search(r"\$(?:\w+|\{\w+\})", text):
        raise ValueError(f"{key}: {path}: the environment variable {variable[0]} is not set")
    return Path(os.path.abspath(text))


def check_name(path: str) -> None:
    """Raise ValueError unless ``path`` names something inside the run folder that is still free."""
    parts = PurePath(path).parts
    if not _fits(path, 200):  # so that a temporary file beside it has a name, too
        raise ValueError(f"path must be UTF-8 text of at most 200 bytes a name, got {path[:80]!r}")
    if not parts or PurePath(path).is_absolute() or ".." in parts or "\0" in path:
        raise ValueError(f"path must be a name inside the run folder, got {path!r}")
    own = any(fnmatch(parts[0], pattern) for pattern in (*FILES, *FOLDERS, EVENTS))
    if own or parts[0].startswith("."):
        raise ValueError(
            f"path {path!r} is a name of the run's own files, or hidden; give another one, such as "
            f"{'my_' + parts[-1].lstrip('.')}"
        )


def check_place(root: Path, path: str, folder: bool) -> None:
    """Raise ValueError if something in the run folder stands where a callback will write.

    Args:
        root: The run folder.
        path: Where in it.
        folder: Whether the callback writes a folder there, not a file.
    """
    place = root / path
    for parent in place.parents[: len(PurePath(path).parts) - 1]:
        if os.path.lexists(parent) and not parent.is_dir():
            raise ValueError(f"path {path!r}: {parent} is no folder; {_remove(parent)}")
    if os.path.lexists(place) and folder != place.is_dir():
        raise ValueError(f"path {path!r}: {place} is {_kind(place)}; {_remove(place)}")


def check_kinds(root: Path) -> None:
    """Raise ValueError if a link, a pipe or the like has the name of a run's own file or folder.

    Its target would be written to, or a pipe waited for. A folder may be a link to a folder.
    """
    for path in sorted(root.iterdir()) if root.is_dir() else []:
        if any(fnmatch(path.name, pattern) for pattern in FILES):
            good = path.is_file() and not path.is_symlink()
        else:
            own = any(fnmatch(path.name, pattern) for pattern in FOLDERS)
            good = path.is_dir() or not own
        if not good:
            raise ValueError(
                f"{path} is {_kind(path)}, and a run writes its own there; {_remove(path)}"
            )


def check_shared(trainer: Any, root: Path) -> None:
    """Raise ValueError on every rank unless all of them see the run folder of rank 0.

    With folders of their own, machines would go on from different checkpoints later, and train on
    as if nothing were wrong.
    """
    if trainer.world_size == 1:
        return
    token = root / f".token-{trainer.strategy.broadcast(uuid.uuid4().hex)}"
    new = not root.exists()
    if trainer.is_global_zero:
        root.mkdir(parents=True, exist_ok=True)
        token.touch()
    trainer.strategy.barrier("run folder")
    end = time.monotonic() + (0 if is_local(root) else TOKEN_SECONDS)
    # A new name is asked for at once: a network file system may list the folder from its memory.
    seen = token.exists()
    while not (seen := seen or _holds(root, token.name)) and time.monotonic() < end:
        time.sleep(0.2)
    shared = trainer.strategy.reduce_boolean_decision(seen, all=True)
    if trainer.is_global_zero:
        token.unlink(missing_ok=True)
        if new and not shared:
            root.rmdir()
    if not shared:
        raise RanksDiffer(
            f"{KEY}: {root} is not one folder for all {trainer.world_size} ranks: what rank 0 "
            f"writes there is {'' if seen else 'not '}seen by rank {trainer.global_rank}; name one "
            "on a file system that all machines share"
        )


def is_local(path: Path) -> bool:
    """Whether a path is on a disk of this machine, where a new file is seen at once or never.

    False where the system does not tell.
    """
    try:
        lines = MOUNTS.read_text(encoding="utf-8").splitlines()
    except OSError:
        return False
    mounts = [line.partition(" - ") for line in lines]
    kinds = {left.split()[4]: right.split()[0] for left, _, right in mounts}
    path = path.resolve()
    nearest = next((str(p) for p in (path, *path.parents) if str(p) in kinds), "")
    return kinds.get(nearest) in _OF_THIS_MACHINE


def _fits(path: str, longest: int) -> bool:
    try:
        return max(map(len, path.encode().split(b"/"))) <= longest
    except UnicodeEncodeError:
        return False


def _holds(folder: Path, name: str) -> bool:
    # List the folder: a network file system answers a question about one name from its memory.
    try:
        return name in os.listdir(folder)
    except FileNotFoundError:
        return False


def _kind(path: Path) -> str:
    if path.is_symlink():
        return "a link"
    return "a folder" if path.is_dir() else "a file" if path.is_file() else "no ordinary file"


def _remove(path: Path) -> str:
    return f"remove {path.name}, or {ELSEWHERE}"
