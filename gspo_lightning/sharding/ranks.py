"""How ranks stay together that train one policy.

Decides what a rank may do with the policy alone. A sharded policy may only be called by all ranks
at once, and ranks have different work: completions of other lengths, other micro-batches.
"""

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from gspo_lightning.sharding.cut import gathered, whole_state


class Whole:
    """Every rank has the whole policy and calls it as it likes."""

    sharded = False

    def apart(self) -> AbstractContextManager[Any]:
        """Within, ranks call the policy different numbers of times, without gradients."""
        return nullcontext()

    def even(self, pieces: list[Tensor]) -> list[tuple[Tensor, bool]]:
        """The micro-batches of a mini-batch, each with whether it counts.

        Those that do not come first. They keep the rank with the most of them company, whose passes
        would wait for ever.
        """
        return [(rows, True) for rows in pieces]

    def state(self, module: nn.Module, wanted: bool = True) -> dict[str, Any]:
        """The state dict of a module, to be read where ``wanted``; every rank must call."""
        return module.state_dict()

    def meet(self) -> None:
        """Wait until no rank calls the policy any more, before ranks do something else together."""


class Sharded(Whole):
    """Every rank has a part of the policy.

    Args:
        device: Where this rank computes.
    """

    sharded = True

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.model: Any = None

    def apart(self) -> AbstractContextManager[Any]:
        return gathered(self.model)

    def even(self, pieces: list[Tensor]) -> list[tuple[Tensor, bool]]:
        most = torch.tensor(len(pieces), device=self.device)
        dist.all_reduce(most, dist.ReduceOp.MAX)
        company = [(pieces[0][:1], False)] * (int(most) - len(pieces))
        return company + super().even(pieces)

    def state(self, module: nn.Module, wanted: bool = True) -> dict[str, Any]:
        return whole_state(module.state_dict(keep_vars=True), wanted)


def weights_of(trainer: Any) -> Whole:
    """How the ranks of a trainer hold the policy."""
    return getattr(trainer and trainer.strategy, "weights", None) or Whole()


def share_out(policy: Any, trainer: Any) -> None:
    """Leave this rank its part of a policy, where the trainer's strategy cuts it."""
    if hasattr(trainer and trainer.strategy, "share_out"):
        trainer.strategy.share_out(policy)
