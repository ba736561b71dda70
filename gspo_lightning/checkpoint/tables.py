"""Rows that CSV loggers write: what of them is there when a run goes on.

Decides which rows survive a kill. Lightning's logger deletes the file that it finds, and writes
every hundred rollouts.
"""

import csv
import io
import os
import warnings
from pathlib import Path
from typing import Any

from lightning.pytorch import Trainer
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.utilities import rank_zero_only

from gspo_lightning.checkpoint.io import replacing


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


def save_tables(trainer: Trainer) -> None:
    """Write the rows of a checkpoint: a kill before the logger does so itself would take them."""
    for table in tables(trainer):
        table.save()


def cut_tables(trainer: Trainer, rollouts: int) -> None:
    """Take the rows back to a checkpoint: those behind it will be written again."""
    for table in tables(trainer):
        if (file := Path(table.log_dir, "metrics.csv")).is_file():
            _cut_rows(file, rollouts)


def _cut_rows(file: Path, rollouts: int) -> None:
    """Keep the rows of rollouts that are done, and the validation behind the last of them."""
    with file.open(newline="", encoding="utf-8") as old:
        reader = csv.DictReader(old)
        names, rows = reader.fieldnames or [], [*reader]
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, names)
    writer.writeheader()
    for row in rows:
        figures = {name for name, value in row.items() if value} - {"step"}
        validated = all(name.startswith("val/") for name in figures - {"epoch"})
        # A rollout stands at its number, as a validation does at that of the rollout before it.
        # Counted from 0 is what goes through self.log, which adds the epoch, and supervised steps.
        from_0 = not validated and bool(figures & {"epoch", "train/learning_rate"})
        if int(row["step"]) + from_0 <= rollouts:
            writer.writerow(row)
    with replacing(file) as new:
        new.write(text.getvalue().encode())
