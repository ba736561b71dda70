"""The figure that a callback watches.

Decides how its value is found, and what is said of one that is never logged.
"""

import difflib
import itertools
from collections.abc import Iterable, Mapping
from typing import Any


def monitored_name(callback: Any) -> str | None:
    """The figure that a callback watches, None for one that watches none."""
    monitor = getattr(callback, "monitor", None)
    return monitor if isinstance(monitor, str) else None


def monitored(callback: Any, figures: Mapping[str, Any]) -> float:
    """The value that a callback watches.

    Raises:
        UnloggedFigure: If it is none of the figures, naming the callback and what there is.
    """
    if callback.monitor not in figures:
        raise UnloggedFigure(callback, figures)
    return float(figures[callback.monitor])


class UnloggedFigure(ValueError):
    """A callback watches what is never logged; says what is, those of a validation first.

    Args:
        callback: Its ``monitor`` is the figure.
        names: What is logged.

    >>> class Stop:
    ...     monitor = "val/rewart"
    >>> print(UnloggedFigure(Stop(), ["train/loss", "train/x", "val/reward"]))
    Stop.monitor 'val/rewart' is never logged, did you mean val/reward? there are val/{reward}, \
train/{loss, x}
    """

    def __init__(self, callback: Any, names: Iterable[str]) -> None:
        names = sorted(names, key=lambda name: (_rank(name), name))
        close = difflib.get_close_matches(callback.monitor, names, n=1)
        groups = itertools.groupby(names, key=lambda name: name.rpartition("/")[0])
        parts = {top: ", ".join(n.rpartition("/")[2] for n in part) for top, part in groups}
        there = ", ".join(f"{top}/{{{part}}}" for top, part in parts.items())
        super().__init__(
            f"{type(callback).__name__}.monitor {callback.monitor!r} is never logged"
            f"{f', did you mean {close[0]}?' if close else ';'} there are {there or 'no figures'}"
        )


def _rank(name: str) -> tuple[int, str]:
    group = name.partition("/")[0]
    return {"val": 0, "train": 1}.get(group, 2), group
