"""TensorBoard files of a run: how long they are at a checkpoint, and cutting them back to it.

Decides which logged points survive a kill. Leaves out what is logged, and all other files of a run.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from lightning.pytorch import Trainer
from lightning.pytorch.loggers import TensorBoardLogger


def _tensorboards(trainer: Trainer) -> list[TensorBoardLogger]:
    return [logger for logger in trainer.loggers if isinstance(logger, TensorBoardLogger)]


def event_file_sizes(trainer: Trainer) -> dict[str, int]:
    """Size in bytes of each TensorBoard file, with everything logged so far written out."""
    sizes = {}
    for logger in _tensorboards(trainer) if trainer.is_global_zero else []:
        logger.experiment.flush()
        for file in Path(logger.log_dir).glob("events.out.tfevents.*"):
            sizes[file.name] = file.stat().st_size
    return sizes


def cut_event_files(trainer: Trainer, sizes: dict[str, int], rollouts: int) -> None:
    """Take the curves back to where they were at the checkpoint.

    What a killed run logged after its last checkpoint is logged again. TensorBoard's own remedy,
    dropping everything from a step on, cannot tell the validation after n rollouts, which is in the
    checkpoint, from the rollout with index n, which is not: both stand at n.
    """
    from tensorboard.compat.proto.event_pb2 import Event, SessionLog

    for logger in _tensorboards(trainer):
        writer = logger.experiment.file_writer
        current = Path(writer.event_writer._file_name).name  # just opened, by this process
        for path in Path(logger.log_dir).glob("events.out.tfevents.*"):
            if path.name in sizes:
                with path.open("r+b") as file:
                    file.seek(min(sizes[path.name], path.stat().st_size))
                    end = file.tell()
                    # Lightning logs what a step gave to `self.log` just after the checkpoint.
                    kept = [raw for raw, step in _records(file) if step < rollouts]
                    file.seek(end)
                    file.write(b"".join(kept))
                    file.truncate()
            elif path.name != current:
                path.unlink()
        # A TensorBoard that is running has read the points already: tell it to drop what it can.
        start = SessionLog(status=SessionLog.START)
        writer.add_event(Event(step=rollouts + 1, session_log=start))


def _records(file: BinaryIO) -> Iterator[tuple[bytes, int]]:
    """Each remaining record of an event file with its step; a torn one at the end is left out."""
    from tensorboard.compat.proto.event_pb2 import Event

    while len(header := file.read(12)) == 12:  # length of the event, checksum of the length
        size = int.from_bytes(header[:8], "little")
        body = file.read(size + 4)  # the event, its checksum
        if len(body) < size + 4:
            return
        yield header + body, Event.FromString(body[:size]).step
