"""How ranks stay together that train one policy.

Decides what a rank may do with the policy alone. A sharded model may only be called by all ranks at
once, and ranks have different work: completions of other lengths, other micro-batches.
"""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from gspo_lightning.engine.padded import unwrapped
from gspo_lightning.sharding.cut import gathered, in_memory, one_token, reshard_all, whole_state
from gspo_lightning.sharding.room import Room
from gspo_lightning.sharding.whole import Whole


class Sharded(Whole):
    """Every rank has a part of the policy.

    A policy that is gathered is whole while ranks are apart. Others are called in step: a rank that
    wants to call one says so, all ranks call that one, and who does not want to calls it on a token
    that nobody reads.

    Args:
        device: Where this rank computes.

    Attributes:
        large: Whether the policy is too large to be held whole in host memory.
    """

    sharded = True
    large = False

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.gathered: list[Any] = []
        self.in_step: list[Any] = []
        self.is_apart = False

    def add(self, model: Any, gather: bool) -> None:
        """Keep a model that was cut whole while ranks are apart, or have it called in step."""
        if gather:
            self.gathered.append(model)
            return
        number = len(self.in_step)
        self.in_step.append(model)
        # before FSDP2's own hook, which waits for the other ranks' parts
        unwrapped(model).register_forward_pre_hook(lambda *_: self._take_turn(number), prepend=True)

    @contextmanager
    def apart(self) -> Iterator[None]:
        with ExitStack() as stack:
            for model in self.gathered:
                stack.enter_context(gathered(model))
            self.is_apart = bool(self.in_step)
            try:
                yield
                self.meet()  # not after an error: that one ends the run
            finally:
                self.is_apart = False
                for model in self.in_step:
                    reshard_all(model)

    def meet(self) -> None:
        while self.is_apart and (called := self._ask(None)) is not None:
            self._keep_company(called)

    def even(self, pieces: list[Tensor]) -> list[tuple[Tensor, bool]]:
        most = torch.tensor(len(pieces), device=self.device)
        dist.all_reduce(most, dist.ReduceOp.MAX)
        company = [(pieces[0][:1], False)] * (int(most) - len(pieces))
        return company + super().even(pieces)

    def state(self, module: nn.Module, wanted: bool = True) -> dict[str, Any]:
        return whole_state(module.state_dict(keep_vars=True), wanted)

    def state_beside(self, module: nn.Module, wanted: bool, path: Path) -> dict[str, Any]:
        """The state dict of a module to be written to ``path``, kept on that disk if it is large.

        Raises:
            OSError: On every rank, if the disk has no room for it.
        """
        state = module.state_dict(keep_vars=True)
        if not self.large:
            return whole_state(state, wanted)
        keep: Callable[[Tensor], Tensor] = in_memory
        reason = None
        try:
            if wanted:
                different = {id(t): t for t in state.values() if isinstance(t, Tensor)}
                keep = Room(path.parent, different.values()).hold
        except OSError as error:  # said by all: ranks that go on would wait for this one
            reason = error
        full = torch.tensor(reason is not None, device=self.device, dtype=torch.long)
        dist.all_reduce(full)
        if full:
            raise reason or OSError("another rank has found no room on the disk")
        return whole_state(state, wanted, keep)

    def _take_turn(self, number: int) -> None:
        """Let a call of a model begin as soon as all ranks call that one."""
        while self.is_apart and (called := self._ask(number)) != number:
            assert called is not None
            self._keep_company(called)

    def _ask(self, number: int | None) -> int | None:
        """The first of the models that any rank wants to call now; this one wants ``number``."""
        wanted = [float(each == number) for each in range(len(self.in_step))]
        votes = torch.tensor(wanted, device=self.device)
        dist.all_reduce(votes)
        return next((each for each, count in enumerate(votes.tolist()) if count), None)

    def _keep_company(self, number: int) -> None:
        self.is_apart = False  # this call asks nobody
        with torch.no_grad():
            one_token(self.in_step[number])
        self.is_apart = True


def weights_of(trainer: Any) -> Whole:
    """How the ranks of a trainer hold the policy."""
    return getattr(trainer and trainer.strategy, "weights", None) or Whole()


def cuts(trainer: Any) -> bool:
    """Whether a trainer's strategy leaves each rank a part of the policy."""
    return hasattr(trainer and trainer.strategy, "share_out")


def mesh_of(trainer: Any) -> Any:
    """The ranks among which a trainer's strategy cuts the policy; None where each has all of it."""
    return trainer.strategy.device_mesh["data_parallel"] if cuts(trainer) else None


def share_out(policy: Any, trainer: Any) -> None:
    """Leave this rank its part of a policy, where the trainer's strategy cuts it."""
    if cuts(trainer):
        trainer.strategy.share_out(policy)
