"""What the figures of a run are called, what they mean, and how they reach its loggers."""

from gspo_lightning.curves.figure_log import FigureLog
from gspo_lightning.curves.table import PICTURE, TABLE, Curve, curve
