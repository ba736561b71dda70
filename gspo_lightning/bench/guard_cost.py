"""What looking for NaN and short memory costs: ``python -m gspo_lightning.bench.guard_cost``.

Trains the embedded demo with the guards and with their calls taken out, in turn, and prints CPU
seconds per rollout as one JSON line. Guards change no number, so that both do the same work. Run it
from the root of the repository with OMP_NUM_THREADS=1 on a machine that is otherwise idle.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import logging
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

from lightning.pytorch import Callback, Trainer

from gspo_lightning.data.prompts import PromptData
from gspo_lightning.guards.faults import Faults
from gspo_lightning.guards.out_of_memory import BatchSizes
from gspo_lightning.module import GSPOModule
from gspo_lightning.optim import OptimizerConfig
from gspo_lightning.policy.policy import PolicyConfig
from gspo_lightning.rewards.terms import MarkedAnswer, RewardTerm
from gspo_lightning.sampling import GroupSampler

GUARDS = ("begin", "look", "settle")  # of Faults; those of BatchSizes are a `try`


class Stopwatch(Callback):
    """CPU seconds of each rollout but the first, which warms up."""

    def __init__(self) -> None:
        self.seconds: list[float] = []

    def on_train_batch_start(self, *_: Any) -> None:
        self.start = time.process_time()

    def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
        if trainer.fit_loop.total_batch_idx > 0:
            self.seconds.append(time.process_time() - self.start)


def train_demo(rollouts: int) -> float:
    """CPU seconds per rollout of the demo, over ``rollouts`` behind a first one."""
    module = GSPOModule(
        PolicyConfig("data/arithmetic/policy"),
        {"correct": RewardTerm(MarkedAnswer())},
        GroupSampler(group_size=8, max_new_tokens=40),
        optimizer=OptimizerConfig(learning_rate=2e-4),
        truncated="zero_reward",
        num_minibatches=4,
    )
    data = PromptData(
        "data/arithmetic/train.jsonl", prompts_per_rollout=16, num_rollouts=rollouts + 1
    )
    watch = Stopwatch()
    with tempfile.TemporaryDirectory() as folder:
        Trainer(
            default_root_dir=folder,
            accelerator="cpu",
            max_epochs=1,
            callbacks=[watch],
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        ).fit(module, data)
    return statistics.fmean(watch.seconds)


@contextlib.contextmanager
def without_guards() -> Iterator[None]:
    """Take the calls of the guards out; what they guard stays."""

    def work_alone(_: Any, __: str, ___: int, ____: str, work: Callable[[], Any]) -> Any:
        return work()

    with (
        mock.patch.object(Faults, "begin", lambda *_, **__: None),
        mock.patch.object(Faults, "look", lambda *_: None),
        mock.patch.object(Faults, "settle", lambda *_: False),
        mock.patch.object(BatchSizes, "fit", work_alone),
    ):
        yield


@contextlib.contextmanager
def guards_timed(spent: list[float]) -> Iterator[None]:
    """Measure the CPU seconds inside the calls of ``Faults``."""
    inside: list[int] = []

    def timed(call: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any, **options: Any) -> Any:
            outermost = not inside
            inside.append(1)
            start = time.process_time()
            try:
                return call(*args, **options)
            finally:
                inside.pop()
                if outermost:
                    spent.append(time.process_time() - start)

        return run

    with contextlib.ExitStack() as stack:
        for name in GUARDS:
            stack.enter_context(mock.patch.object(Faults, name, timed(getattr(Faults, name))))
        yield


def guard_cost(rounds: int, rollouts: int) -> dict[str, float]:
    """Compare runs with and without guards, A B A B, and look at how long guards take.

    Args:
        rounds: Pairs of runs.
        rollouts: Rollouts of each run that count.

    Returns:
        CPU seconds per rollout, medians over rounds: ``with``, ``without``; ``ratio``, the median
        of with / without of each round; ``share``, the part of a rollout spent inside the guards,
        measured in a run of its own, which is less noisy than a difference of two runs.
    """
    train_demo(1)  # the first run of a process is slower than all others
    pairs = []
    for _ in range(rounds):
        guarded = train_demo(rollouts)
        with without_guards():
            pairs.append((guarded, train_demo(rollouts)))
    spent: list[float] = []
    with guards_timed(spent):
        total = train_demo(rollouts)
    return {
        "with": round(statistics.median(a for a, _ in pairs), 4),
        "without": round(statistics.median(b for _, b in pairs), 4),
        "ratio": round(statistics.median(a / b for a, b in pairs), 4),
        "share": round(sum(spent) / (rollouts + 1) / total, 4),
    }


def main() -> None:
    """Measure and print one JSON line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--rollouts", type=int, default=10)
    arguments = parser.parse_args()
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    os.environ.setdefault("PL_GLOBAL_SEED", "0")
    print(json.dumps({"guard_cost": guard_cost(arguments.rounds, arguments.rollouts)}))


if __name__ == "__main__":
    main()
