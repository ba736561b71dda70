"""A policy that is whole on each rank: what sharded ones are called through, too."""

from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

from torch import Tensor, nn


class Whole:
    """Every rank has the whole policy and calls it as it likes."""

    sharded = False

    def apart(self) -> AbstractContextManager[Any]:
        """Within, ranks call the policy different numbers of times, without gradients."""
        return nullcontext()

    def meet(self) -> None:
        """Wait, within :meth:`apart`, until all ranks are here; then they may do a thing together.

        The strategy's own ways to do so, such as ``reduce``, have waited already.
        """

    def even(self, pieces: list[Tensor]) -> list[tuple[Tensor, bool]]:
        """The micro-batches of a mini-batch, each with whether it counts.

        Those that do not come first. They keep the rank with the most of them company, whose passes
        would wait for ever.
        """
        return [(rows, True) for rows in pieces]

    def state_beside(self, module: nn.Module, wanted: bool, path: Path) -> dict[str, Any] | None:
        """A copy of a module's state dict, to be written to a folder; None where it is whole."""
        return None

    def state(self, module: nn.Module, wanted: bool = True) -> dict[str, Any]:
        """The state dict of a module, to be read where ``wanted``; every rank must call."""
        return module.state_dict()
