"""Tensors that lie on a disk: what is gathered of a policy that no host can hold.

Decides that such tensors are memory of a file: the system writes it out and takes it back as it
needs room. The file has no name, so nothing is left of it however the process ends.
"""

import mmap
import os
import tempfile
from collections.abc import Iterable
from pathlib import Path

import torch
from torch import Tensor


class Room:
    """Room for copies of some tensors.

    Args:
        folder: Where the file is made, for a moment.
        tensors: What there must be room for.

    Raises:
        OSError: If the disk has less.
    """

    def __init__(self, folder: Path, tensors: Iterable[Tensor]) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.used = 0
        self._file = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115 - open as long as this
        size = sum(map(_pages, tensors))
        self._file.truncate(size)
        if hasattr(os, "posix_fallocate") and size:  # else a full disk would kill the process later
            os.posix_fallocate(self._file.fileno(), 0, size)

    def hold(self, tensor: Tensor) -> Tensor:
        """A copy, with memory of its own: libraries take tensors that share some for tied ones."""
        if not tensor.numel():
            return tensor.cpu()
        pages = mmap.mmap(self._file.fileno(), _pages(tensor), offset=self.used)
        self.used += _pages(tensor)
        copy = torch.frombuffer(pages, dtype=tensor.dtype, count=tensor.numel()).view(tensor.shape)
        return copy.copy_(tensor)


def _pages(tensor: Tensor) -> int:
    """Bytes of a tensor, filled up so that the next one may begin behind it."""
    return -(-tensor.nbytes // mmap.ALLOCATIONGRANULARITY) * mmap.ALLOCATIONGRANULARITY
