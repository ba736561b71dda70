"""One training at a time in a run folder: how a second process is kept out.

A requeued job can start before the one before it has ended; both would write the same files, and
each would remove the other's half-written checkpoint. The lock is the system's: it ends with its
process, however that ends, and children do not inherit it. The locked file names the process; it is
removed at the end, and after a kill the next run takes it over.
"""

import errno
import fcntl
import os
import socket
from pathlib import Path

from lightning.pytorch.utilities import rank_zero_only

from gspo_lightning.run.terminal_log import say

FILE = ".lock"


class RunLock:
    """The right to train in a folder, from ``take`` until ``release``."""

    def __init__(self) -> None:
        self._file: Path | None = None
        self._number = -1  # descriptor of the open file
        self._new: list[Path] = []  # folders made for it, the innermost first

    @rank_zero_only
    def take(self, root: Path) -> None:
        """Take the folder for this process; ValueError names another process that has it."""
        self._new = [folder for folder in (root, *root.parents) if not folder.exists()]
        root.mkdir(parents=True, exist_ok=True)
        file = root / FILE
        while True:
            number = os.open(file, os.O_RDWR | os.O_CREAT, 0o644)
            try:
                lock(root, number)
            except ValueError:
                os.close(number)
                raise
            if is_at(number, file):
                break
            os.close(number)  # removed by its owner since it was opened here
        os.ftruncate(number, 0)
        os.pwrite(number, f"{os.getpid()} on {socket.gethostname()}\n".encode(), 0)
        self._file, self._number = file, number

    @rank_zero_only
    def release(self) -> None:
        """Give the folder back, without a trace where nothing was put into it."""
        if self._file is None:
            return
        if is_at(self._number, self._file):
            self._file.unlink()
        os.close(self._number)
        self._file, self._number = None, -1
        for folder in self._new:
            if folder.is_dir() and not any(folder.iterdir()):
                folder.rmdir()


def check_lock(root: Path) -> None:
    """Raise ValueError, before anything is loaded, if another process has the folder.

    Not for the ranks that rank 0 has the folder for: there is no trainer yet, so the environment
    that they were started with tells.
    """
    ranks = ("RANK", "LOCAL_RANK", "NODE_RANK", "GROUP_RANK", "SLURM_PROCID")
    if any(os.environ.get(name, "0") != "0" for name in ranks) or not (root / FILE).is_file():
        return
    number = os.open(root / FILE, os.O_RDWR)
    try:
        lock(root, number)
    finally:
        os.close(number)  # closing unlocks the file


def lock(root: Path, number: int) -> None:
    """Lock an open file for this process; ValueError if another process has it."""
    try:
        fcntl.lockf(number, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno not in (errno.EACCES, errno.EAGAIN):
            say(f"{root}: the file system has no locks ({error.strerror}): start one run only here")
            return
        owner = os.pread(number, 200, 0).decode(errors="replace").strip()
        raise ValueError(
            f"{root} is being trained in by process {owner or 'unknown'}; wait for its end, or "
            "start in another folder with --trainer.default_root_dir NEW"
        ) from error


def is_at(number: int, file: Path) -> bool:
    """Whether an open file still has its name."""
    try:
        return os.path.samestat(os.fstat(number), file.stat())
    except OSError:
        return False
