"""Texts and pictures for whatever logger a run has, and where a person finds its curves.

Decides which of a logger's own ways takes a table, a page or a picture. Lightning has no common
one: a logger of figures alone gets none, and the run folder holds tables and pictures for every
run. Steps are rollouts done: 1 is the first rollout.
"""

import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers import CometLogger, CSVLogger, MLFlowLogger, TensorBoardLogger

from gspo_lightning.callbacks.report import markdown_table


def log_samples(trainer: Any, samples: Sequence[dict[str, Any]], rollouts: int) -> None:
    """Show completions, as ``report.sample_rows`` gives them, in every logger that takes a table.

    Args:
        trainer: Its loggers are asked.
        samples: One dict per completion, with the same keys.
        rollouts: How many are done.
    """
    if not samples:
        return
    columns = [key for key in samples[0] if key != "rollout"]
    cells = [[str(row[key]) if key == "parts" else row[key] for key in columns] for row in samples]
    for logger in trainer.loggers:
        if isinstance(logger, TensorBoardLogger):
            logger.experiment.add_text("samples", markdown_table([*samples]), rollouts)
        elif isinstance(logger, MLFlowLogger):
            file = f"samples/rollout={rollouts:06d}.md"
            logger.experiment.log_text(logger.run_id, markdown_table([*samples]), file)
        elif isinstance(logger, CometLogger):
            logger.experiment.log_text(markdown_table([*samples]), step=rollouts)
        elif hasattr(logger, "log_table"):  # WandbLogger, and those that are made like it
            logger.log_table("samples", columns=columns, data=cells, step=rollouts)
        elif hasattr(logger, "log_text"):
            logger.log_text("samples", columns=columns, data=cells, step=rollouts)


def log_page(trainer: Any, name: str, text: str, rollouts: int) -> None:
    """Show a page of Markdown in every logger that takes one."""
    for logger in trainer.loggers:
        if isinstance(logger, TensorBoardLogger):
            logger.experiment.add_text(name, text, rollouts)
        elif isinstance(logger, MLFlowLogger):
            logger.experiment.log_text(logger.run_id, text, f"{name}.md")
        elif isinstance(logger, CometLogger):
            logger.experiment.log_text(text, step=rollouts)
        elif hasattr(logger, "log_text"):
            logger.log_text(name, columns=["page"], data=[[text]], step=rollouts)


def log_picture(trainer: Any, name: str, pixels: Any, rollouts: int) -> None:
    """Show a picture, (height, width, 3) uint8, in every logger that takes one."""
    for logger in trainer.loggers:
        if isinstance(logger, TensorBoardLogger):
            # An image of pixels, not add_figure: that imports pyplot and its global state.
            logger.experiment.add_image(name, pixels, rollouts, dataformats="HWC")
        elif isinstance(logger, MLFlowLogger):
            logger.experiment.log_image(logger.run_id, pixels, f"{name}.png")
        elif isinstance(logger, CometLogger):
            logger.experiment.log_image(pixels, name=name, step=rollouts)
        elif hasattr(logger, "log_image"):
            logger.log_image(name, [pixels], step=rollouts)


def places(trainer: Any) -> list[str]:
    """Where each logger's curves are found: a command, a file, an address, or its name."""
    return [place for logger in trainer.loggers if (place := _place(logger))]


def _place(logger: Any) -> str | None:
    if isinstance(logger, TensorBoardLogger):
        folder = Path(logger.log_dir)
        written = any(folder.glob("events.out.tfevents.*"))
        return f"tensorboard --logdir {shlex.quote(str(folder))}" if written else None
    if isinstance(logger, CSVLogger):
        file = Path(logger.log_dir) / "metrics.csv"
        return str(file) if file.exists() else None
    address = getattr(getattr(logger, "experiment", None), "url", None)  # of W&B and Comet
    if isinstance(address, str) and address:
        return address
    parts = type(logger).__name__, logger.name, logger.version
    return " ".join(str(part) for part in parts if part not in (None, ""))
