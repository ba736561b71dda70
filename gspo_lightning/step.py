"""One training step: what lives while a rollout is collected and learned from, and dies with it.

Decides what is remembered between the two halves of a step, what ranks share, how a step's random
streams are named, and how its seconds and its peak memory are measured.
"""

import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.profiler import record_function

from gspo_lightning.guards.memory import peaks, reset_peaks
from gspo_lightning.loss import LossChoices
from gspo_lightning.rollout import Samples, stream_seed
from gspo_lightning.sharding.whole import Whole
from gspo_lightning.tally import RolloutTally

CPU = torch.device("cpu")


@dataclass(frozen=True)
class Ranks:
    """The processes that train one policy together.

    Attributes:
        rank: This one, from 0.
        count: How many there are.
        sum: Sums a tensor over all of them; every rank must call.
        gather: Stacks the tensors of all of them; every rank must call.
        wait: Measures how long the backward pass of a loss, made within, waits for the others.
        weights: How they hold the policy.
    """

    rank: int
    count: int
    sum: Callable[[Tensor], Tensor]
    gather: Callable[[Tensor], Tensor]
    wait: Callable[[Tensor], AbstractContextManager[Any]] = nullcontext
    weights: Whole = Whole()  # noqa: RUF009 - without state


class Clock:
    """Seconds and peak memory of a step, by phase.

    Args:
        device: Where the policy computes.
        devices: Where memory is looked at, besides.
        on_phase: Called with the name of each phase as it begins.

    Attributes:
        seconds: Of each phase and of each timed part of one.
        peak_memory: Highest memory of each phase, GiB; other devices than the policy's are named.
    """

    def __init__(
        self,
        device: torch.device,
        devices: Iterable[torch.device] = (),
        on_phase: Callable[[str], None] = lambda name: None,
    ) -> None:
        self.device = device
        self.devices = {device, CPU, *devices}
        self.on_phase = on_phase
        self.seconds = dict.fromkeys(("rollout", "score", "optimise"), 0.0)
        self.peak_memory: dict[str, float] = {}

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Measure time and peak memory of a phase."""
        self.on_phase(name)
        reset_peaks(self.devices)
        with self.timed(name, self.device):
            yield
        for device, peak in peaks(self.devices).items():
            other = "" if device == self.device else f"_{str(device).replace(':', '')}"
            key = f"{name}_gib{other}"
            self.peak_memory[key] = max(peak, self.peak_memory.get(key, 0.0))

    @contextmanager
    def timed(self, name: str, device: torch.device = CPU) -> Iterator[None]:
        """Measure the time of a part of a phase on ``device``."""
        start = time.perf_counter()
        with record_function(name):  # the range of that name in a trace
            yield
            if device.type == "cuda":
                torch.cuda.synchronize(device)  # or what comes next would pay for this part
        self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - start


@dataclass
class Step:
    """What one training step knows.

    Attributes:
        index: Rollouts before this one.
        run_seed: What ``seed_everything`` set.
        ranks: The processes that take this step together.
        clock: Measures the step.
        tally: Counts what is logged of it.
        choices: What the loss is made of.
        kl_coef: Coefficient of the KL penalty, in the loss or in the rewards.
        lengths: Tokens of each completion as drawn, (B,) on the CPU; None until they are drawn.
        from_sampler: Whether old log-probs are the sampler's; None until that is known. One answer
            a step: a pass that is repeated for want of memory must not ask other ranks again.
        num_updates: Mini-batches that were begun.
        moved: Whether one of them has moved the weights.
        synced: Whether a backward pass has begun that ranks share.
    """

    index: int
    run_seed: int
    ranks: Ranks
    clock: Clock
    tally: RolloutTally
    choices: LossChoices
    kl_coef: float = 0.0
    lengths: Tensor | None = None
    from_sampler: bool | None = None
    num_updates: int = 0
    moved: bool = False
    synced: bool = False

    @property
    def name(self) -> str:
        """The step in words, for messages."""
        return f"rollout {self.index + 1}"

    def seed(self, purpose: str) -> int:
        """Name a random stream of this step and rank; see ``rollout.stream_seed``."""
        return stream_seed(self.run_seed, self.index, self.ranks.rank, purpose)

    def minibatch_rows(self, samples: Samples, count: int, epoch: int) -> list[Tensor]:
        """The rows of each mini-batch of an epoch, the same whenever they are asked for."""
        generator = torch.Generator().manual_seed(self.seed(f"minibatches/{epoch}"))
        return samples.minibatch_indices(count, generator)
