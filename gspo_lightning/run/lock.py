"""One training at a time in a run folder: how a second process is kept out.

A requeued job can start before the one before it has ended; both would write the same files, and
each would remove the other's half-written checkpoint. The lock is the system's: it ends with its
process, however that ends, and children do not inherit it. The locked file names the process; it is
removed at the end, and after a kill the next run takes it over. What is no such file is left as it
is: a link, whose target would be emptied, a pipe, a file of somebody else.
"""

import contextlib
import errno
import fcntl
import os
import re
import socket
import stat
from pathlib import Path

from lightning.pytorch.utilities import rank_zero_only

from gspo_lightning.checkpoint.places import ELSEWHERE, KEY
from gspo_lightning.run.launch import RANKS
from gspo_lightning.run.terminal_log import say

FILE = ".lock"
_CONTENT = re.compile(rb"(\d+ on .*\n?)?")


class RunLock:
    """The right to train in a folder, from ``take`` until ``release``."""

    def __init__(self) -> None:
        self._file: Path | None = None
        self._number = -1  # descriptor of the open file
        self._folder: os.stat_result | None = None
        self._new: list[Path] = []  # folders made for it, the innermost first

    @rank_zero_only
    def take(self, root: Path) -> None:
        """Take the folder for this process; ValueError names another process that has it."""
        self._new = [folder for folder in (root, *root.parents) if not folder.exists()]
        root.mkdir(parents=True, exist_ok=True)
        file = root / FILE
        while True:
            number = open_lock(file, os.O_CREAT)
            try:
                lock(root, number)
            except ValueError:
                os.close(number)
                raise
            if is_at(number, file):
                break
            os.close(number)  # removed by its owner since it was opened here
        self._file, self._number, self._folder = file, number, root.stat()
        os.ftruncate(number, 0)
        os.pwrite(number, f"{os.getpid()} on {socket.gethostname()}\n".encode(), 0)

    @rank_zero_only
    def release(self) -> None:
        """Give the folder back, without a trace where nothing was put into it."""
        if self._file is None:
            return
        file = self._file if is_at(self._number, self._file) else self._moved()
        # A disk that has become read-only keeps a file that means nothing without its process.
        with contextlib.suppress(OSError):
            if file is not None:
                file.unlink()
        os.close(self._number)
        self._file, self._number = None, -1
        for folder in self._new:
            with contextlib.suppress(OSError):  # it is not empty, or not there
                folder.rmdir()

    def lost(self) -> str | None:
        """What has become of the folder if it is no longer where it was; None while it is."""
        if self._file is None or self._folder is None:
            return None
        root = self._file.parent
        with contextlib.suppress(OSError):
            if os.path.samestat(root.stat(), self._folder):
                return None
        if moved := self._moved():
            return (
                f"the run folder {root} was moved to {moved.parent} during the run; go on there "
                f"with --{KEY} {moved.parent} --ckpt_path last"
            )
        return (
            f"the run folder {root} was removed during the run, and nothing is left to go on from"
        )

    def _moved(self) -> Path | None:
        """The open file under the name it has now, as far as the system tells."""
        with contextlib.suppress(OSError):
            file = Path(os.readlink(f"/proc/self/fd/{self._number}"))
            return file if is_at(self._number, file) else None
        return None


def open_lock(file: Path, *flags: int) -> int:
    """Open a lock's file; ValueError for one that is no such file, or that cannot be written."""
    try:
        number = os.open(file, sum(flags, os.O_RDWR | os.O_NOFOLLOW | os.O_NONBLOCK), 0o644)
    except OSError as error:
        if file.is_symlink() or error.errno == errno.ENXIO:
            raise not_a_lock(file) from error
        raise ValueError(f"{KEY}: cannot write {file}: {error.strerror}; {ELSEWHERE}") from error
    facts = os.fstat(number)
    own = stat.S_ISREG(facts.st_mode) and facts.st_nlink < 2
    if not own or not _CONTENT.fullmatch(os.pread(number, 1000, 0)):
        os.close(number)
        raise not_a_lock(file)
    return number


def not_a_lock(file: Path) -> ValueError:
    return ValueError(
        f"{file} was not written by a run, and would be lost; remove it, or {ELSEWHERE}"
    )


def check_lock(root: Path) -> None:
    """Raise ValueError, before anything is loaded, if another process has the folder.

    Not for the ranks that rank 0 has the folder for: there is no trainer yet, so the environment
    that they were started with tells.
    """
    ranks = (*RANKS, "NODE_RANK", "GROUP_RANK")
    if any(os.environ.get(name, "0") != "0" for name in ranks) or not os.path.lexists(root / FILE):
        return
    number = open_lock(root / FILE)
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
            f"{ELSEWHERE}"
        ) from error


def is_at(number: int, file: Path) -> bool:
    """Whether an open file still has its name."""
    try:
        return os.path.samestat(os.fstat(number), file.stat())
    except OSError:
        return False
