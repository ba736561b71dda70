"""How the figures of a run reach its loggers.

Decides the step that they stand at, rollouts done, and what TensorBoard gets besides: a first
screen, descriptions, and a layout of charts.
"""

from collections.abc import Mapping
from typing import Any

from lightning.pytorch.loggers import TensorBoardLogger

from gspo_lightning.curves.table import LAYOUT, description, first_screen


class FigureLog:
    """Hands the figures of a run to every logger.

    TensorBoard gets what only it has a place for: the first screen, a description with the first
    point of each figure (it reads none that comes later), and a layout of its custom scalars.
    """

    def __init__(self) -> None:
        self.described: set[str] = set()  # in the files that this process writes

    def begin(self, trainer: Any) -> None:
        """Begin the files of a run."""
        self.described.clear()
        layout = {
            title: {chart: ["Multiline", tags] for chart, tags in charts.items()}
            for title, charts in LAYOUT.items()
        }
        for logger in trainer.loggers:
            if _shows_descriptions(trainer, logger):
                logger.experiment.add_custom_scalars(layout)

    def log(self, trainer: Any, figures: Mapping[str, float], rollouts: int) -> None:
        """Log figures.

        Args:
            trainer: Its loggers are asked.
            figures: Numbers by name.
            rollouts: How many are done.
        """
        shown = {**first_screen(figures), **figures}
        for logger in trainer.loggers:
            if not _shows_descriptions(trainer, logger):
                logger.log_metrics(figures, step=rollouts)
                continue
            new = {name: shown[name] for name in shown.keys() - self.described}
            logger.experiment._get_file_writer().add_summary(_described(new), rollouts)
            known = {name: value for name, value in shown.items() if name not in new}
            logger.log_metrics(known, step=rollouts)
        self.described |= shown.keys()


def _shows_descriptions(trainer: Any, logger: Any) -> bool:
    """Whether a logger is TensorBoard's, with names as they are, and this process writes it."""
    plain = isinstance(logger, TensorBoardLogger) and not logger._prefix
    return plain and trainer.is_global_zero and type(logger.experiment).__name__ == "SummaryWriter"


def _described(figures: Mapping[str, float]) -> Any:
    """The first point of figures, as TensorBoard keeps it with a description."""
    from tensorboard.compat.proto.summary_pb2 import DATA_CLASS_SCALAR, Summary, SummaryMetadata

    summary = Summary()
    scalars = SummaryMetadata.PluginData(plugin_name="scalars")
    for name, value in sorted(figures.items()):
        data = SummaryMetadata(plugin_data=scalars, data_class=DATA_CLASS_SCALAR)
        data.summary_description = description(name)
        summary.value.add(tag=name, simple_value=float(value), metadata=data)
    return summary
