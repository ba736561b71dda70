"""TensorBoard files of a run: how they were at a checkpoint, and taking them back to it.

Decides which logged points survive a kill, and which files are the run's: those with a mark near
their beginning. What others put beside them is left alone.
"""

import warnings
import zlib
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

from lightning.pytorch import Trainer
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger

from gspo_lightning.checkpoint.io import replacing
from gspo_lightning.checkpoint.places import EVENTS

MARK = "gspo_lightning"
HEAD = 2**20  # bytes in which the mark is looked for; loggers write settings before


def tensorboards(trainer: Trainer) -> list[TensorBoardLogger]:
    """The TensorBoard loggers of a run; their writers do nothing on ranks other than 0."""
    return [logger for logger in trainer.loggers if isinstance(logger, TensorBoardLogger)]


def mark_event_files(trainer: Trainer) -> None:
    """Write into each file that this process has opened that it is a run's."""
    for logger in tensorboards(trainer) if trainer.is_global_zero else []:
        writer = _writer(logger)
        writer.flush()
        if not _is_marked(_current(writer)):
            writer.add_event(_mark())
            writer.flush()


def drop_unused(trainer: Trainer) -> None:
    """Remove what loggers have opened and nothing was logged in, of a fit that was refused.

    Lightning opens loggers before anything is checked.
    """
    for logger in trainer.loggers if trainer.is_global_zero else []:
        experiment = getattr(logger, "_experiment", None)  # the public name would open it
        if experiment is None or not isinstance(logger, TensorBoardLogger | CSVLogger):
            continue
        folder, top = Path(logger.log_dir), Path(logger.save_dir)
        with suppress(OSError):  # the disk may be what ended the run
            # Without a writer, an earlier fit has closed the file and this one has not opened one.
            if isinstance(logger, TensorBoardLogger) and experiment.file_writer is not None:
                experiment.flush()
                path = _current(experiment.file_writer)
                with path.open("rb") as file:
                    if any(event.HasField("summary") for *_, event in _records(file.read(HEAD))):
                        continue
                logger.finalize("failed")  # an open writer would write the file anew
                path.unlink()
            for place in (folder, folder.parent):
                if top in place.parents and not any(place.iterdir()):
                    place.rmdir()
                    logger._experiment = None  # the next fit opens it anew


def own_event_files(folder: str | Path) -> list[Path]:
    """The TensorBoard files in a folder that a run wrote."""
    return [path for path in Path(folder).glob(EVENTS) if _is_marked(path)]


def event_file_sizes(trainer: Trainer) -> dict[str, list[int]]:
    """Size in bytes and CRC-32 of each TensorBoard file, with everything logged so far in it."""
    facts = {}
    for logger in tensorboards(trainer) if trainer.is_global_zero else []:
        logger.experiment.flush()
        for file in own_event_files(logger.log_dir):
            data = file.read_bytes()
            facts[file.name] = [len(data), zlib.crc32(data)]
    return facts


def cut_event_files(trainer: Trainer, files: dict[str, Any], rollouts: int) -> None:
    """Take the curves back to the checkpoint: what was logged after it will be logged again.

    TensorBoard's own remedy, dropping everything from a step on, cannot tell the validation after n
    rollouts, which is in the checkpoint, from the rollout with index n, which is not.

    A damaged file is mended: TensorBoard would read it up to the damage. What is lost is said.
    """
    from tensorboard.compat.proto.event_pb2 import Event, SessionLog

    # Lightning's own numbers give each start a folder of its own, so that nothing is gone there.
    numbered = any(isinstance(logger.version, int) for logger in tensorboards(trainer))
    missing = set(files) if goes_on_in_place(trainer) and not numbered else set()
    for logger in tensorboards(trainer):
        writer = _writer(logger)
        current = _current(writer).name
        for path in Path(logger.log_dir).glob(EVENTS):
            if path.name in files and path.is_file():
                missing.discard(path.name)
                _cut(path, files[path.name], rollouts)
            elif path.name != current and _is_marked(path):
                path.unlink()
        # A TensorBoard that is running has read the points already: tell it to drop what it can.
        start = SessionLog(status=SessionLog.START)
        writer.add_event(Event(step=rollouts + 1, session_log=start))
    for name in sorted(missing) if tensorboards(trainer) else []:
        _warn(f"{name} is gone", rollouts)


def goes_on_in_place(trainer: Any) -> bool:
    """Whether the checkpoint that a run goes on from lies in the run's own folder."""
    folder = Path(trainer.ckpt_path).resolve().parents[1]
    return folder == Path(trainer.default_root_dir).resolve()


def _cut(path: Path, facts: Any, rollouts: int) -> None:
    """Keep what was there at the checkpoint and, of what follows, the points of finished rollouts.

    Lightning logs what a step gave to `self.log` just after the checkpoint.
    """
    size, checksum = facts if isinstance(facts, list) else (facts, None)  # once without checksum
    data = path.read_bytes()
    whole = len(data) >= size and checksum in (None, zlib.crc32(memoryview(data)[:size]))
    with replacing(path) as new:
        if whole:
            new.write(memoryview(data)[:size])
        for place, raw, event in _records(data, size if whole else 0):
            # Where bytes have vanished, later rollouts have moved to before the size.
            if event.step < rollouts or (place < size and event.step == rollouts):
                new.write(raw)
    if not whole:
        _warn(f"{path} was damaged and is mended", rollouts)


def _warn(what: str, rollouts: int) -> None:
    warnings.warn(
        f"{what}: in TensorBoard points up to rollout {rollouts} may be missing; a CurvePlot has "
        "those of its own from the checkpoint",
        stacklevel=3,
    )


def _writer(logger: TensorBoardLogger) -> Any:
    """What writes the curves; anew where an earlier fit of the same Trainer has closed it."""
    return logger.experiment._get_file_writer()


def _current(writer: Any) -> Path:
    """The file that this process has opened."""
    return Path(writer.event_writer._file_name)


def _mark() -> Any:
    """A note in the log, without a status, which TensorBoard would act on."""
    from tensorboard.compat.proto.event_pb2 import Event, SessionLog

    return Event(session_log=SessionLog(msg=MARK))


def _is_marked(path: Path) -> bool:
    if not path.is_file() or path.is_symlink():
        return False
    with path.open("rb") as file:  # the bytes alone: the checksums of a large record take a while
        return _mark().SerializeToString() in file.read(HEAD)


def _records(data: bytes, start: int = 0) -> Iterator[tuple[int, bytes, Any]]:
    """Place, bytes and content of each record of an event file; what is broken is passed over."""
    from google.protobuf.message import DecodeError
    from tensorboard.compat.proto.event_pb2 import Event
    from tensorboard.summary.writer.record_writer import masked_crc32c

    def right(begin: int, end: int) -> bool:
        return masked_crc32c(data[begin:end]) == int.from_bytes(data[end : end + 4], "little")

    while start + 16 <= len(data):  # length of the event, its checksum; the event, its checksum
        size = int.from_bytes(data[start : start + 8], "little")
        body, end = start + 12, start + 12 + size
        if end + 4 <= len(data) and right(start, start + 8) and right(body, end):
            try:
                event = Event.FromString(data[body:end])
            except DecodeError:
                event = None
            if event is not None:
                yield start, data[start : end + 4], event
            start = end + 4
        else:
            start += 1
