"""Checkpoint files: written whole or not at all, sealed with a checksum, loaded without code.

Decides the way onto the disk and back, and what counts as damage.

A file is what `torch.save` writes, a zip archive, with a seal in the archive's comment: the CRC-32
of every byte before it. `torch.load` and `unzip -t` take it as it is. Zip's own checksums cover the
records but not the index, and torch's reader does not look at them.
"""

import errno
import functools
import os
import re
import shutil
import zlib
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from pickle import UnpicklingError
from typing import Any, BinaryIO

import torch
from lightning.fabric.plugins import CheckpointIO

from gspo_lightning.checkpoint.parts import KEY, join, named_parts, remove

_SEAL = re.compile(rb"gspo_lightning crc32 ([0-9a-f]{8})")
_SEAL_BYTES = 29
_CHUNK = 2**22  # bytes read at a time
_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
# what `torch.load` makes without running code, beside tensors; subclasses of them are code
_PLAIN = (type(None), bool, int, float, complex, str, bytes, torch.dtype, torch.device, torch.Size)
_DISK_FAULTS = (*_NO_ROOM, errno.EIO, errno.EROFS)
# Of a path in the run folder these, too, are no error of the program's.
_FOLDER_FAULTS = (
    *(errno.EACCES, errno.EPERM, errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.EEXIST),
    *(errno.ELOOP, errno.ENXIO, errno.ENAMETOOLONG, errno.ESTALE),
)


class CheckpointError(Exception):
    """A checkpoint could not be written; the message says which, why and what is left."""


class AtomicCheckpointIO(CheckpointIO):
    """Write checkpoints so that a kill at any instant leaves the old file or the new one.

    Lightning's own writer goes through `$TMPDIR`, which may lie on another file system, where the
    final move is a copy and a kill truncates a good file; it does not fsync, and it builds the
    whole file in memory first.
    """

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None
    ) -> None:
        """Write to a file beside `path`, force it to disk, rename it.

        Raises:
            CheckpointError: If the disk is full or refuses; what was there before is untouched.
        """
        if storage_options is not None:
            raise TypeError("storage_options are for remote file systems: not supported")
        path = Path(path)
        try:
            new_folder = not path.parent.exists()
            path.parent.mkdir(parents=True, exist_ok=True)
            with replacing(path, durable=True) as file:
                _write(checkpoint, file)
            if new_folder:
                _sync_folder(path.parent.parent)
        except OSError as error:
            raise CheckpointError(
                f"checkpoint {path} was not written: {describe(error, path)}; those written before "
                "it are intact"
            ) from error

    def load_checkpoint(
        self,
        path: str | Path,
        map_location: Any = None,
        weights_only: bool | None = None,
        whole: bool = True,
    ) -> dict[str, Any]:
        """Read plain values and tensors onto the CPU; a file that holds code is refused.

        Tensors that lie in parts are put together, or where not ``whole``, come as ``Parted``.

        Raises:
            ValueError: If the file is damaged.
        """
        reason = damage(path)
        if reason is not None:
            raise ValueError(f"ckpt_path: {path} {reason}")
        # mapped: a rank that wants its part of a tensor reads no other
        place: Any = map_location or "cpu"
        found = torch.load(path, map_location=place, weights_only=True, mmap=not whole)
        return join(found, Path(path).parent, whole) if KEY in found else found

    def remove_checkpoint(self, path: str | Path) -> None:
        remove(Path(path))


def beyond_plain(value: Any, place: str = "") -> str | None:
    """Where a value stands that :meth:`load_checkpoint` would refuse, and its type, if anywhere.

    >>> beyond_plain({"best": [1.0, Path("a.ckpt")]}), beyond_plain({"best": [1.0, "a.ckpt"]})
    ("['best'][1] is a PosixPath", None)
    """
    if isinstance(value, torch.Tensor) or type(value) in _PLAIN:
        return None
    if type(value) not in (dict, OrderedDict, list, tuple, set):
        return f"{place or 'it'} is a {type(value).__name__}"
    mapping = isinstance(value, dict)
    inside = [(key, f"{place} key {key!r}") for key in value] if mapping else []
    parts = value.items() if mapping else enumerate(value)
    inside += [(part, f"{place}[{key!r}]") for key, part in parts]
    return next(filter(None, (beyond_plain(part, where) for part, where in inside)), None)


def read_without_tensors(key: str, path: str | Path, way_out: str = "give another") -> dict:
    """What a checkpoint of a training run holds, no tensor read: they are on the meta device.

    Args:
        key: What names the file, for messages.
        path: The file.
        way_out: What to do about a file that is none.

    Raises:
        ValueError: If the file is no such checkpoint, is damaged, or holds code.
    """
    if not Path(path).is_file():
        raise ValueError(f"{key}: there is no file {path}; {way_out}")
    if is_sealed(path) and (reason := damage(path)):
        raise ValueError(f"{key}: {path} {reason}; {way_out}")
    try:
        found = torch.load(path, map_location="meta", mmap=True, weights_only=True)
    except UnpicklingError as error:
        raise ValueError(
            f"{key}: {path} holds more than plain values and tensors, such as code, so it is not "
            f"loaded; {way_out}"
        ) from error
    except Exception as error:  # any, from a file that is made to break its reader
        line = (str(error).splitlines() or [type(error).__name__])[0][:200]
        raise ValueError(f"{key}: cannot read {path}: {line}; {way_out}") from error
    whole = isinstance(found, dict) and {"state_dict", "loops"} <= found.keys()
    if not whole or not all(isinstance(found[part], dict) for part in ("state_dict", "loops")):
        raise ValueError(f"{key}: {path} is no checkpoint of a training run; {way_out}")
    for name, value in found["state_dict"].items():
        if not isinstance(value, torch.Tensor) and not str(name).endswith("_extra_state"):
            raise ValueError(f"{key}: {path}: {name} of its weights is no tensor; {way_out}")
    return found


def is_sealed(path: str | Path) -> bool:
    """Whether a file ends as a checkpoint does: the cheap half of :func:`damage`."""
    return seal_of(path) is not None


def seal_of(path: str | Path) -> str | None:
    """The checksum at the end of a file, not compared with its bytes; None if there is none."""
    path = Path(path)
    if not path.is_file() or path.stat().st_size < _SEAL_BYTES:
        return None
    with path.open("rb") as file:
        file.seek(-_SEAL_BYTES, os.SEEK_END)
        seal = _SEAL.fullmatch(file.read())
    return None if seal is None else seal[1].decode()


def damage(path: str | Path) -> str | None:
    """What is wrong with a checkpoint file, as the rest of a sentence; None if it is whole.

    Reads the whole file, once for as long as it does not change.
    """
    path = Path(path)
    if not path.is_file():
        return "is not a file"
    if not is_sealed(path):
        return "is cut off or no checkpoint of this trainer: it has no checksum at its end"
    facts = path.stat()
    reason = _damage(path, facts.st_size, facts.st_mtime_ns, facts.st_ino)
    if reason is not None or path.suffix != ".ckpt" or (named := named_parts(path)) is None:
        return reason
    for name, seal in named["files"].items():
        part = path.parent / named["folder"] / name
        if (reason := damage(part)) is not None:
            return f"is damaged: its part {part} {reason}"
        if seal_of(part) != seal:
            return f"is damaged: {part} is of another checkpoint"
    return None


def mark_of(path: str | Path) -> str:
    """The checksum of a checkpoint's bytes, in words; of a folder that of its names and sizes."""
    path = Path(path)
    if path.is_dir():
        files = sorted(file for file in path.rglob("*") if file.is_file())
        names = (f"{file.relative_to(path)} {file.stat().st_size}" for file in files)
        return f"crc32 {zlib.crc32(chr(10).join(names).encode()):08x}"
    with path.open("rb") as file:
        if is_sealed(path):
            file.seek(-_SEAL_BYTES, os.SEEK_END)
            return file.read().decode().removeprefix("gspo_lightning ")
        crc = 0
        while chunk := file.read(_CHUNK):
            crc = zlib.crc32(chunk, crc)
    return f"crc32 {crc:08x}"


@functools.lru_cache(maxsize=64)  # the file that was chosen is looked at again when it is loaded
def _damage(path: Path, size: int, changed: int, inode: int) -> str | None:
    crc, rest = 0, size - _SEAL_BYTES
    with path.open("rb") as file:
        while rest:
            if not (chunk := file.read(min(_CHUNK, rest))):
                return "shrank while it was read"
            crc = zlib.crc32(chunk, crc)
            rest -= len(chunk)
        seal = _SEAL.fullmatch(file.read())
    if seal is None or int(seal[1], 16) != crc:
        return "is damaged: its bytes do not give the checksum at its end"
    return None


def _write(checkpoint: dict[str, Any], file: BinaryIO) -> None:
    sealed = _Sealed(file)
    try:
        torch.save(checkpoint, sealed)  # type: ignore[arg-type]  # it needs to be written to, no more
    except BaseException:
        # torch closes its archive on the way out, which fails in turn and would hide the reason
        if sealed.error is not None:
            raise sealed.error from None
        raise
    sealed.finish()


class _Sealed:
    """What `torch.save` writes into: passes bytes on as they come and sums them up."""

    def __init__(self, file: BinaryIO) -> None:
        self.file = file
        self.crc = 0
        self.held = b""  # the archive's last two bytes are the length of its comment
        self.error: BaseException | None = None

    def write(self, data: Any) -> int:
        """Pass bytes on; a tensor arrives as a view of its memory, not as a copy."""
        view = memoryview(data).cast("B")
        try:
            if len(view) >= 2:
                self._pass(self.held)
                self._pass(view[:-2])
                self.held = bytes(view[-2:])
            else:
                self.held += bytes(view)
                self._pass(self.held[:-2])
                self.held = self.held[-2:]
        except BaseException as error:
            self.error = error
            raise
        return len(view)

    def flush(self) -> None:
        """Do nothing: torch calls it, and the file beneath is flushed at the end."""

    def finish(self) -> None:
        """Replace the empty comment by the seal."""
        assert self.held == b"\0\0", "torch.save no longer ends with an empty zip comment"
        self._pass(_SEAL_BYTES.to_bytes(2, "little"))
        self.file.write(b"gspo_lightning crc32 %08x" % self.crc)

    def _pass(self, data: bytes | memoryview) -> None:
        self.crc = zlib.crc32(data, self.crc)
        self.file.write(data)


@contextmanager
def replacing(path: Path, durable: bool = False) -> Iterator[BinaryIO]:
    """Write a file so that a kill at any instant leaves the old one or the new one.

    Args:
        path: The file; its folder is there.
        durable: Force the new one to disk, so that a power cut leaves one of them, too.

    Yields:
        A hidden file beside `path`, which takes its place unless the block raises.
    """
    # The leftover of a kill: the next run removes that of a checkpoint, the next write others.
    ending = f"{os.getpid()}.tmp" if durable else "partial"
    hidden = path.name.replace("tfevents", "events")  # TensorBoard must not take both for curves
    beside = path.with_name(f".{hidden}.{ending}")
    beside.unlink(missing_ok=True)
    try:
        with beside.open("xb", buffering=2**20) as file:  # x: follows no link
            yield file
            if durable:
                file.flush()
                os.fsync(file.fileno())
        os.replace(beside, path)
    finally:
        beside.unlink(missing_ok=True)  # still there only when something above raised
    if durable:
        # The rename lives in the folder: without this a power cut may bring the old entry back.
        _sync_folder(path.parent)


def _sync_folder(path: Path) -> None:
    folder = os.open(path, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def describe(error: OSError, path: Path) -> str:
    """Why the system refused, with the room that is left where that is the reason."""
    text = (error.strerror or str(error)).lower()
    if error.errno not in _NO_ROOM:
        return text
    try:
        usage = shutil.disk_usage(path.parent)
    except OSError:
        return text
    return f"{text} ({usage.free / 2**30:.1f} of {usage.total / 2**30:.1f} GiB free)"


def disk_fault(error: BaseException, root: Path | None = None) -> str | None:
    """The line for an error that comes of a full or broken disk, None for any other.

    Libraries wrap what the system said, each in its own way, so causes are looked through.

    Args:
        error: What ended a run.
        root: The run folder: in it, missing rights and files are faults of the disk, too.

    >>> disk_fault(OSError(errno.ENOSPC, "No space left on device", "runs/a/samples.jsonl"))
    'no space left on device: runs/a/samples.jsonl; the checkpoints written before are intact'
    >>> disk_fault(OSError(errno.ENOENT, "No such file or directory")) is None
    True
    >>> disk_fault(OSError(errno.EACCES, "Permission denied", "/r/a.png"), Path("/r"))
    'permission denied: /r/a.png; the checkpoints written before are intact'
    >>> disk_fault(OSError(errno.EACCES, "Permission denied", "/s/data"), Path("/r")) is None
    True
    """
    intact = "the checkpoints written before are intact"
    for cause in _causes(error):
        if isinstance(cause, CheckpointError):
            return str(cause)
        inside = isinstance(cause, OSError) and root is not None and _is_in(cause.filename, root)
        faults = (*_DISK_FAULTS, *_FOLDER_FAULTS) if inside else _DISK_FAULTS
        if isinstance(cause, OSError) and cause.errno in faults:
            where = f": {cause.filename}" if cause.filename else ""
            return f"{(cause.strerror or str(cause)).lower()}{where}; {intact}"
        # safetensors, tokenizers: "... Os { code: 28, kind: StorageFull, message: ..."
        match = re.search(r"\b(?:code: |os error )(\d+)\b", str(cause))
        if match and int(match[1]) in _DISK_FAULTS:
            return f"{os.strerror(int(match[1])).lower()}; {intact}"
    return None


def _is_in(path: Any, folder: Path) -> bool:
    named = isinstance(path, str | bytes | Path)
    return named and Path(os.fsdecode(path)).absolute().is_relative_to(folder)


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        yield error
        error = error.__cause__ or error.__context__
