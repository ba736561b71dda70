"""Checkpoints whose tensors lie in parts, a file of each rank, in a folder beside them.

Decides what makes such a checkpoint whole. Parts are written first, into a folder of their own, and
the checkpoint that names them last: a kill before that leaves a folder that nothing names, so a
checkpoint is there with all its parts or not at all.
"""

import shutil
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

KEY = "parts"  # of a checkpoint's entry: its folder, and the last bytes of each part's file


class Parted:
    """A tensor whose rows lie in several files, read when they are asked for.

    Args:
        pieces: Some rows each, in their order.
    """

    def __init__(self, pieces: list[Tensor]) -> None:
        self.pieces = pieces
        rows = sum(len(piece) for piece in pieces)
        self.shape = torch.Size((rows, *pieces[0].shape[1:]))

    def rows(self, first: int, count: int) -> Tensor:
        """Some rows, without the others."""
        found, begin = [], 0
        for piece in self.pieces:
            start, end = max(first - begin, 0), min(first + count - begin, len(piece))
            if start < end:
                found.append(piece[start:end])
            begin += len(piece)
        return torch.cat(found) if found else self.pieces[0][:0]


def tensors_of(checkpoint: dict[str, Any]) -> dict[str, tuple[dict, Any]]:
    """All entries of weights and moments by a name: the dict that holds each, and its key."""
    weights = checkpoint["state_dict"]
    found = {f"weights/{name}": (weights, name) for name in weights}
    for place, optimizer in enumerate(checkpoint.get("optimizer_states", ())):
        for number, entry in optimizer["state"].items():
            found |= {f"moments/{place}/{number}/{name}": (entry, name) for name in entry}
    return found


def free_folder(path: Path) -> Path:
    """A folder for the parts of a checkpoint that is to be written, none of an earlier one's."""
    taken = {folder.name for folder in path.parent.glob("*.parts*")}
    number = next(n for n in range(len(taken) + 1) if f"{path.stem}.parts{n}" not in taken)
    return path.with_name(f"{path.stem}.parts{number}")


def named_parts(path: Path) -> dict[str, Any] | None:
    """The entry of a checkpoint whose tensors lie in parts; None of any other file."""
    try:
        found = torch.load(path, map_location="meta", mmap=True, weights_only=True)
    except Exception:  # said where the file is loaded
        return None
    return found.get(KEY) if isinstance(found, dict) else None


def join(checkpoint: dict[str, Any], folder: Path, whole: bool) -> dict[str, Any]:
    """Put the tensors of parts where a checkpoint names them.

    Args:
        checkpoint: As it was loaded.
        folder: That of the checkpoint's file.
        whole: Whether tensors are wanted whole, or as :class:`Parted`.
    """
    named = checkpoint.pop(KEY)
    files = [folder / named["folder"] / name for name in named["files"]]
    parts = [torch.load(file, map_location="cpu", mmap=True, weights_only=True) for file in files]
    places = tensors_of(checkpoint)
    for name in named["tensors"]:
        holder, key = places[name]
        parted = Parted([part[name] for part in parts])
        holder[key] = parted.rows(0, parted.shape[0]) if whole else parted
    return checkpoint


def remove(path: Path) -> None:
    """Remove a checkpoint, then its parts: the other way a kill would leave a damaged one."""
    path.unlink(missing_ok=True)
    for folder in path.parent.glob(f"{path.stem}.parts*"):
        shutil.rmtree(folder, ignore_errors=True)


def remove_unnamed(folder: Path) -> None:
    """Remove parts that no checkpoint names: left by a kill, or of one that was written again."""
    for parts in folder.glob("*.parts*"):
        named = named_parts(parts.with_name(f"{parts.name.partition('.parts')[0]}.ckpt"))
        if named is None or named["folder"] != parts.name:
            shutil.rmtree(parts, ignore_errors=True)
