"""Files of a run's curves: how long they are at a checkpoint, and cutting them back to it.

Decides which logged points survive a kill.
"""

import csv
import io
import os
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from lightning.pytorch import Trainer
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from lightning.pytorch.utilities import rank_zero_only

from gspo_lightning.checkpoint.io import replacing


def tensorboards(trainer: Trainer) -> list[TensorBoardLogger]:
    """The TensorBoard loggers of a run; their writers do nothing on ranks other than 0."""
    return [logger for logger in trainer.loggers if isinstance(logger, TensorBoardLogger)]


def tables(trainer: Trainer) -> list[CSVLogger]:
    """The CSV loggers of a run."""
    return [logger for logger in trainer.loggers if isinstance(logger, CSVLogger)]


@rank_zero_only
def open_tables(trainer: Trainer, goes_on: bool) -> None:
    """Have CSV loggers begin now: on its start one deletes the file it finds, and says so.

    A run that goes on keeps its file. Nothing is said where there is none: the run folder of a
    fresh start is not empty, as this run has locked it.
    """
    for logger in tables(trainer):
        file = Path(logger.log_dir, "metrics.csv")
        if not file.is_file():
            _open(logger)
        elif goes_on:
            aside = file.with_name(f".{file.name}.kept")
            os.replace(file, aside)
            try:
                writer = _open(logger)
            finally:
                os.replace(aside, file)
            with file.open(newline="", encoding="utf-8") as rows:
                writer.metrics_keys = next(csv.reader(rows), [])


def _open(logger: CSVLogger) -> Any:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Experiment logs directory")
        return logger.experiment


def event_file_sizes(trainer: Trainer) -> dict[str, int]:
    """Size in bytes of each TensorBoard file, with everything logged so far written out."""
    sizes = {}
    for table in tables(trainer):
        table.save()  # by itself it writes every hundred rollouts, and a kill would take the rest
    for logger in tensorboards(trainer) if trainer.is_global_zero else []:
        logger.experiment.flush()
        for file in Path(logger.log_dir).glob("events.out.tfevents.*"):
            sizes[file.name] = file.stat().st_size
    return sizes


def cut_event_files(trainer: Trainer, sizes: dict[str, int], rollouts: int) -> None:
    """Take the curves back to the checkpoint: what was logged after it will be logged again.

    TensorBoard's own remedy, dropping everything from a step on, cannot tell the validation after n
    rollouts, which is in the checkpoint, from the rollout with index n, which is not.
    """
    from tensorboard.compat.proto.event_pb2 import Event, SessionLog

    for table in tables(trainer):
        if (file := Path(table.log_dir, "metrics.csv")).is_file():
            _cut_rows(file, rollouts)
    for logger in tensorboards(trainer):
        writer = logger.experiment.file_writer
        current = Path(writer.event_writer._file_name).name  # just opened, by this process
        for path in Path(logger.log_dir).glob("events.out.tfevents.*"):
            if path.name in sizes:
                _cut(path, sizes[path.name], rollouts)
            elif path.name != current:
                path.unlink()
        # A TensorBoard that is running has read the points already: tell it to drop what it can.
        start = SessionLog(status=SessionLog.START)
        writer.add_event(Event(step=rollouts + 1, session_log=start))


def _cut_rows(file: Path, rollouts: int) -> None:
    """Keep the rows of rollouts that are done, and the validation behind the last of them."""
    with file.open(newline="", encoding="utf-8") as old:
        reader = csv.DictReader(old)
        names, rows = reader.fieldnames or [], [*reader]
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, names)
    writer.writeheader()
    for row in rows:
        figures = {name for name, value in row.items() if value} - {"step", "epoch"}
        validated = all(name.startswith("val/") for name in figures)
        if int(row["step"]) < rollouts + validated:
            writer.writerow(row)
    with replacing(file) as new:
        new.write(text.getvalue().encode())


def _cut(path: Path, size: int, rollouts: int) -> None:
    """Keep the first bytes and, of what follows, the points of rollouts that are done."""
    with path.open("rb") as old, replacing(path) as new:
        while size > 0 and (data := old.read(min(size, 2**20))):
            new.write(data)
            size -= len(data)
        # Lightning logs what a step gave to `self.log` just after the checkpoint.
        new.writelines(raw for raw, step in _records(old) if step < rollouts)


def _records(file: BinaryIO) -> Iterator[tuple[bytes, int]]:
    """Each remaining record of an event file with its step, up to a torn or spoilt one."""
    from tensorboard.compat.proto.event_pb2 import Event
    from tensorboard.summary.writer.record_writer import masked_crc32c

    while len(header := file.read(12)) == 12:  # length of the event, checksum of the length
        if masked_crc32c(header[:8]) != int.from_bytes(header[8:], "little"):
            return
        size = int.from_bytes(header[:8], "little")
        body, checksum = file.read(size), file.read(4)
        if len(checksum) < 4 or masked_crc32c(body) != int.from_bytes(checksum, "little"):
            return
        yield header + body + checksum, Event.FromString(body).step
