"""A line where a rank keeps the others waiting: without it a run that hangs says nothing.

Decides what ranks tell each other beside their work, and when a silence is worth a line.
"""

import json
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from datetime import timedelta
from socket import gethostname
from typing import Any

import torch
import torch.distributed as dist
from lightning.pytorch import Callback
from torch import Tensor
from torch.autograd import Variable

from gspo_lightning.checkpoint.early_stops import agree_to_stop

SECONDS = 60.0  # without a word, or behind the others, before something is said
PERIOD = 5.0  # seconds between two words
PHASES = ("set-up", "rollout", "score", "optimise", "boundary", "validation")  # in their order
WORDS = {"rollout": "sampling", "score": "scoring", "optimise": "update", "boundary": "saving"}


@dataclass
class Word:
    """What was last heard of a rank, and when, by the clock of the rank that hears it."""

    text: str
    heard: float  # when the rank last gave a sign of life
    since: float  # when it came to where it is

    @property
    def place(self) -> tuple[int, int, bool]:
        """Rollout or batch, phase, and whether it waits there: the least one is behind."""
        told = json.loads(self.text)
        return told["number"], told["phase"], told["waits"]

    def __str__(self) -> str:
        """Where the rank is, in words."""
        number, phase, _ = self.place
        name = PHASES[phase]
        unit = json.loads(self.text)["unit"]
        where = f"{unit} {number}, " if number and name != "set-up" else ""
        return f"{where}{WORDS.get(name, name)}"


class Silence:
    """Finds out which ranks keep the others waiting.

    Args:
        rank: This one.
        seconds: After which something is said; then after twice as long, and so on.

    Attributes:
        words: The newest of each rank.
    """

    def __init__(self, rank: int, seconds: float = SECONDS) -> None:
        self.rank, self.seconds = rank, seconds
        self.words: dict[int, Word] = {}
        self._counts: dict[int, int] = {}
        self._said: dict[tuple[int, bool], float] = {}  # rank, whether it is alive: how long

    def hear(self, texts: Mapping[int, str], now: float) -> None:
        """Take in what every rank has told last."""
        for rank, text in texts.items():
            count, before = json.loads(text)["count"], self.words.get(rank)
            if before is None:
                self.words[rank] = Word(text, now, now)
            elif count != self._counts[rank]:
                moved = Word(text, now, now).place != before.place
                self.words[rank] = Word(text, now, now if moved else before.since)
            self._counts[rank] = count

    def lines(self, now: float) -> list[str]:
        """What is to be said now: by the first rank that is alive, once for each silence."""
        alive = [rank for rank, word in self.words.items() if now - word.heard < self.seconds]
        if not alive or min(alive) != self.rank:
            return []
        furthest = max(self.words[rank].place for rank in alive)
        lines = []
        for rank, word in sorted(self.words.items()):
            gone = rank not in alive
            behind = not gone and word.place < furthest
            quiet = now - (word.heard if gone else word.since)
            if not gone:  # what comes back begins anew
                self._said.pop((rank, True), None)
            if not behind:
                self._said.pop((rank, False), None)
            if (gone or behind) and quiet >= max(self.seconds, 2 * self._said.get((rank, gone), 0)):
                self._said[rank, gone] = quiet
                host = json.loads(word.text)["host"]
                name = f"rank {rank} ({host})"
                if gone:
                    lines.append(f"no word from {name} for {quiet:.0f} s, last in {word}")
                else:
                    lines.append(f"{name} keeps the others waiting: {quiet:.0f} s in {word}")
        return lines


def watch_for(trainer: Any) -> list[Callback]:
    """The watch that a run of several ranks needs, if it has none."""
    there = any(isinstance(callback, RankWatch) for callback in trainer.callbacks)
    return [] if there or trainer.world_size == 1 else [RankWatch()]


def tell_phase(trainer: Any, name: str, index: int) -> None:
    """Tell every callback that wants to know which phase a rollout has come to."""
    for callback in trainer.callbacks:
        if on_phase := getattr(callback, "on_phase", None):
            on_phase(name, index)


def _watch_of(trainer: Any) -> "RankWatch | None":
    return next((c for c in trainer.callbacks if isinstance(c, RankWatch)), None)


@contextmanager
def gradient_wait(trainer: Any, clock: Any, loss: Tensor) -> Iterator[None]:
    """Measure, in the backward pass within, what is left of it once this rank's own part is done.

    That is the rest of the mean of gradients over ranks, which DDP sends while it still computes:
    what computing has not hidden, most of it waiting for a slower rank.

    Args:
        trainer: The Trainer; without a :class:`RankWatch` nothing is measured.
        clock: Of the step.
        loss: What the pass begins with.
    """
    watch = _watch_of(trainer)
    if watch is None:
        yield
        return
    waiting, begun = ExitStack(), []

    def wait() -> None:
        begun.append(_now(clock.device))
        waiting.enter_context(watch.wait())

    # What is put into this queue first is done first, behind all that the pass computes; DDP puts
    # its own wait there as the last gradient is ready.
    queue: Any = Variable._execution_engine
    loss.register_hook(lambda _: queue.queue_callback(wait))
    with waiting:
        yield
    key, end = "waiting_gradient", _now(clock.device)
    clock.seconds[key] = clock.seconds.get(key, 0.0) + sum(end - start for start in begun)


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        # Not the whole device: the mean of gradients has a stream of its own.
        torch.cuda.current_stream(device).synchronize()
    return time.perf_counter()


def together(trainer: Any, clock: Any, collective: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """The same function of all ranks, its seconds measured by phase: most of them are waiting.

    Args:
        trainer: The Trainer; without a :class:`RankWatch` nothing is measured.
        clock: Of the step.
        collective: What all ranks do together.
    """
    watch = _watch_of(trainer)
    if watch is None:
        return collective

    def measured(value: Any) -> Any:
        with clock.timed(f"waiting_{watch.phase}", clock.device), watch.wait():
            return collective(value)

    return measured


class RankWatch(Callback):
    """Says when a rank has not answered for a minute, or is where the others no longer are.

    Each rank tells the others every few seconds where it is, through the store by which they have
    found each other; no collective of the training is touched. Two threads do it: one may get stuck
    in a question to a store whose machine is gone.

    Args:
        seconds: Without a word before a line is written; in doubled steps from there on.
    """

    def __init__(self, seconds: float = SECONDS) -> None:
        self.seconds = seconds
        self._place = {"number": 0, "phase": 0, "waits": False}
        self._unit = "rollout"  # what a batch of the module is
        self._ended = threading.Event()
        self._asked: float | None = None  # since when the store has not answered
        self._threads: list[threading.Thread] = []

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        if not (dist.is_available() and dist.is_initialized()) or self._threads:
            return
        shared: Any = dist.distributed_c10d._get_default_store()
        store = shared.clone()  # a connection of its own: on one, calls take turns
        store.set_timeout(timedelta(seconds=self.seconds))
        silence = Silence(dist.get_rank(), self.seconds)
        self._tell(store, dist.get_rank(), 0)
        # Every rank has told something: nobody waits for a key that is not there.
        trainer.strategy.barrier("words")
        self._ended.clear()
        for work in (self._exchange, self._watch):
            thread = threading.Thread(target=work, args=(store, silence), daemon=True)
            thread.start()
            self._threads.append(thread)

    def _tell(self, store: Any, rank: int, count: int) -> None:
        text = json.dumps(self._place | {"unit": self._unit, "count": count, "host": gethostname()})
        store.set(f"gspo_lightning/word/{rank}", text)

    def _exchange(self, store: Any, silence: Silence) -> None:
        ranks, count = range(dist.get_world_size()), 0
        period = min(PERIOD, self.seconds / 4)
        while not self._ended.wait(period):
            count += 1
            self._asked = time.monotonic()
            try:
                self._tell(store, silence.rank, count)
                found = store.multi_get([f"gspo_lightning/word/{rank}" for rank in ranks])
            except RuntimeError:  # the store is gone, and with it the run
                return
            texts = {rank: text.decode() for rank, text in zip(ranks, found, strict=True)}
            silence.hear(texts, time.monotonic())
            self._asked = None

    def _watch(self, store: Any, silence: Silence) -> None:
        while not self._ended.wait(min(PERIOD, self.seconds / 4)):
            now = time.monotonic()
            if self._asked is not None and now - self._asked > PERIOD and silence.rank > 0:
                # Nothing is known of the others: the rank that keeps the store is the silent one.
                words = {r: w for r, w in silence.words.items() if r in (0, silence.rank)}
                words[silence.rank].heard = now
                silence.words = words
            for line in silence.lines(now):
                print(line, file=sys.stderr, flush=True)

    def on_phase(self, name: str, index: int) -> None:
        """Note that a rollout, or a batch of another module, has come to its next phase.

        Args:
            name: One of ``PHASES``.
            index: Rollouts before this one.
        """
        self._place = {"number": index + 1, "phase": PHASES.index(name), "waits": False}

    @property
    def phase(self) -> str:
        """Where this rank is: one of ``PHASES``."""
        return PHASES[self._place["phase"]]

    @contextmanager
    def wait(self) -> Iterator[None]:
        """While this rank waits for others in its phase."""
        self._place = self._place | {"waits": True}
        yield  # an error ends the run
        self._place = self._place | {"waits": False}

    def on_train_batch_start(self, trainer: Any, pl_module: Any, *_: Any) -> None:
        if pl_module.automatic_optimization:  # others tell their phases by themselves
            self._unit = "batch"
            self.on_phase("optimise", trainer.fit_loop.total_batch_idx)

    def on_validation_start(self, trainer: Any, pl_module: Any) -> None:
        self.on_phase("validation", trainer.fit_loop.total_batch_idx)

    def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
        """Note where the rank is, and have all of them stop if one is to."""
        self.on_phase("boundary", trainer.fit_loop.total_batch_idx)
        agree_to_stop(trainer)

    def on_validation_end(self, trainer: Any, pl_module: Any) -> None:
        """Have all ranks stop if one is to: nobody would meet the others any more."""
        agree_to_stop(trainer)

    def teardown(self, trainer: Any, pl_module: Any, stage: str) -> None:
        self._ended.set()
        self._threads.clear()

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        self.teardown(trainer, pl_module, "")
