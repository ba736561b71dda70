"""Signals: the first one ends a run at the next rollout's end, a second one at once.

Decides what SIGTERM, SIGINT, SIGHUP and, under SLURM, SIGUSR1 do, the exit codes (128 plus the
number), and what is said of a rank that is gone.

Lightning's own handlers will not do: after SIGTERM its exit code is 0, with several ranks it hangs
in a collective inside the handler, and its requeueing saves in the middle of a rollout.
"""

import contextlib
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from types import FrameType
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.plugins.environments import SLURMEnvironment, TorchElasticEnvironment
from lightning.pytorch.utilities.exceptions import SIGTERMException

from gspo_lightning.checkpoint.ranks import RanksDiffer

_PEER_IS_GONE = re.compile(
    r"closed by peer|reset by peer|Broken pipe|was likely closed|ncclRemoteError"
)
_SECONDS_TO_HEAR = 5.0  # for Python to come back from a library and hear of a signal
_SECONDS_TO_END = 60  # for a process to report and end by itself, once another rank is gone


class StopSignals(Callback):
    """Finish the rollout on the first signal, stop at once on a second one.

    Put it before the callbacks that save. All ranks stop together, whichever of them got the
    signal. Outside training nothing is worth finishing, so the first signal stops at once.

    Attributes:
        number: The signal that ended the run, on every rank; None if none did.
        on_lost_rank: Told which rank is gone and how, where this process cannot go on without it
            and does not notice; called in a thread, just before the process ends.
    """

    def __init__(self) -> None:
        self.number: int | None = None
        self._heard = 0
        self._received: list[int] = []
        self._training = False
        self._trainer: Trainer | None = None
        self._before: dict[int, Any] = {}
        self._wake: tuple[socket.socket, int] | None = None  # ours, and what was there before
        self._failed = False
        self.on_lost_rank: Callable[[str], None] = lambda text: None

    def install(self) -> None:
        """Take the signals over, in the main thread; again after someone else took them."""
        if threading.current_thread() is not threading.main_thread():
            return  # Python allows handlers nowhere else
        numbers = [signal.SIGTERM, signal.SIGINT]
        if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:  # as under nohup
            numbers.append(signal.SIGHUP)
        if SLURMEnvironment.detect():
            numbers.append(signal.SIGUSR1)  # sbatch --signal=USR1@300; alone it would kill
        for number in numbers:
            current = signal.getsignal(number)
            if current != self._handle:
                self._before.setdefault(number, current)
                signal.signal(number, self._handle)
        if self._wake is None:
            ends, ours = socket.socketpair()
            ours.setblocking(False)
            self._wake = ours, signal.set_wakeup_fd(ours.fileno(), warn_on_full_buffer=False)
            threading.Thread(target=self._listen, args=(ends,), daemon=True).start()

    def _listen(self, signals: socket.socket) -> None:
        """End the process where a library keeps Python from hearing that it is to end at once.

        A wait for ranks that never come takes half an hour, one for a rank that hangs longer.
        """
        seen = 0
        while number := signals.recv(1):  # empty once the other end is closed
            if number[0] not in self._before:
                continue
            seen += 1
            time.sleep(_SECONDS_TO_HEAR)
            if self._heard < seen and (seen > 1 or not self._training):
                _write(
                    f"{signal.Signals(number[0]).name}: stopped at once, in the middle of a wait"
                )
                self._kill_other_ranks()
                os._exit(128 + number[0])
        signals.close()

    def restore(self) -> None:
        """Give the signals back to who had them."""
        for number, handler in self._before.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
        self._before.clear()
        if self._wake is not None:
            ours, before = self._wake
            signal.set_wakeup_fd(before)
            ours.close()
            self._wake = None

    @property
    def exit_code(self) -> int:
        """0, or 128 plus the number of the signal that ended the run."""
        return 0 if self.number is None else 128 + self.number

    @property
    def stopping(self) -> bool:
        """Whether the run is ending because of a signal, on every rank alike."""
        return self.number is not None

    def _handle(self, number: int, frame: FrameType | None) -> None:
        self._heard += 1
        if number == signal.SIGHUP and number in self._received:
            return  # a terminal that closes sends one, and its shell another
        self._received.append(number)
        count = len(self._received)
        if self._training and count == 1:
            name = signal.Signals(number).name
            # no print: a signal may come while the very stream is being written to
            _write(f"{name}: finishing this rollout, then saving; once more stops at once")
            return
        self.number = number
        self._kill_other_ranks()
        if count > 2:  # something swallowed the exception
            os._exit(128 + number)
        raise KeyboardInterrupt if number == signal.SIGINT else SIGTERMException

    def _kill_other_ranks(self) -> None:
        launcher = self._trainer and self._trainer.strategy.launcher
        if launcher is not None and hasattr(launcher, "kill"):
            launcher.kill(signal.SIGKILL)  # other ranks would wait for this one for ever
            # Lightning watches this list, and kills this process once one of them has been killed
            getattr(launcher, "procs", []).clear()

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._trainer = trainer
        for thread in threading.enumerate():
            # Lightning's thread sees that a rank has ended, says nothing, and kills this process.
            if thread.name == "child-process-observer":
                thread._terminate_all = self._end_without_ranks  # type: ignore[attr-defined]

    def _end_without_ranks(self) -> None:
        if self._failed:
            time.sleep(_SECONDS_TO_END)
        else:
            self.on_lost_rank(self.lost_ranks())
        self._kill_other_ranks()
        os._exit(1)

    def lost_ranks(self) -> str:
        """Which of the ranks that this process started is gone, and how."""
        launcher = self._trainer and self._trainer.strategy.launcher
        processes: list[subprocess.Popen] = getattr(launcher, "procs", [])
        until = time.monotonic() + 2  # a connection is closed a moment before its process is gone
        while processes and all(process.poll() is None for process in processes):
            if time.monotonic() > until:
                break
            time.sleep(0.05)
        first = 0 if self._trainer is None else self._trainer.global_rank
        found = [
            f"rank {first + number} (process {process.pid}) {how_it_ended(process.returncode)}"
            for number, process in enumerate(processes, 1)
            if process.poll()
        ]
        return "; ".join(found) or (
            "another rank is gone; if no line above says why, it was killed, perhaps for want of "
            "memory"
        )

    def on_sanity_check_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Take the signals back: Lightning has taken them just before."""
        self.install()

    on_validation_start = on_test_start = on_predict_start = on_sanity_check_start

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._training = True
        self.install()

    def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
        self._stop_if_asked(trainer)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Stop here rather than after one more rollout."""
        if self._training and not trainer.sanity_checking:
            self._stop_if_asked(trainer)

    def on_exception(self, trainer: Trainer, pl_module: Any, exception: BaseException) -> None:
        """End the ranks that this process has started: each would only say that it is gone."""
        self._training, self._failed = False, True
        # Another rank may not have said yet why it ended, or in what all of them differ.
        if not (is_of_another_rank(exception) or isinstance(exception, RanksDiffer)):
            self._kill_other_ranks()

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Note a signal after the last rollout: all is done, but its sender wants to hear of it."""
        if self.number is None and self._received:
            self.number = self._received[0]
        self._training, self._trainer = False, None

    def _stop_if_asked(self, trainer: Trainer) -> None:
        if self.number is None:
            for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1):
                # every rank asks for each in this order, or they would answer different questions
                if trainer.strategy.reduce_boolean_decision(number in self._received, all=False):
                    self.number = number
                    break
        if self.number is not None:
            trainer.should_stop = True
            trainer.fit_loop.min_epochs = 0  # a minimum would outlast the request to stop
            trainer.fit_loop.epoch_loop.min_steps = None


def _write(line: str) -> None:
    """Write to the standard error of the process, which may be gone together with its terminal."""
    with contextlib.suppress(OSError):
        os.write(sys.__stderr__.fileno() if sys.__stderr__ else 2, f"{line}\n".encode())


def how_it_ended(code: int) -> str:
    """What the exit code of a process tells.

    >>> how_it_ended(-signal.SIGSEGV), how_it_ended(2)
    ('was killed by SIGSEGV', 'failed with exit code 2; see its line above')
    """
    if code >= 0:
        return f"failed with exit code {code}; see its line above"
    with contextlib.suppress(ValueError):  # a real-time signal has no name
        reason = ", perhaps for want of memory" if -code == signal.SIGKILL else ""
        return f"was killed by {signal.Signals(-code).name}{reason}"
    return f"was killed by signal {-code}"


def is_of_another_rank(error: BaseException) -> bool:
    """Whether an error says no more than that another rank is gone.

    >>> is_of_another_rank(RuntimeError("[gloo/pair.cc:525] Connection closed by peer [127.0.0.1]"))
    True
    >>> is_of_another_rank(RuntimeError("the reward function broke"))
    False
    """
    text = str(error)
    ours = isinstance(error, torch.distributed.DistError)  # of NCCL and of the store; gloo has none
    of_gloo = isinstance(error, RuntimeError) and "gloo" in text
    return (ours or of_gloo) and _PEER_IS_GONE.search(text) is not None


def is_late(error: BaseException) -> bool:
    """Whether an error says that another rank has not answered within the time-out.

    >>> is_late(RuntimeError("[gloo/unbound_buffer.cc:78] Timed out waiting 5ms for recv"))
    True
    """
    text = str(error)
    of_ranks = isinstance(error, torch.distributed.DistError) or "gloo" in text
    return of_ranks and "timed out" in text.lower()


def forbid_requeueing(plugins: list[Any]) -> None:
    """Take care that Lightning does not save in the middle of a rollout, in its signal handler.

    Args:
        plugins: Those of the Trainer; under SLURM one is added.

    Raises:
        ValueError: If one of them asks for it.
    """
    ours = [plugin for plugin in plugins if isinstance(plugin, SLURMEnvironment)]
    # torchrun may run as a task of srun: its ranks are the ones that count then.
    if SLURMEnvironment.detect() and not ours and not TorchElasticEnvironment.detect():
        try:
            plugins.append(SLURMEnvironment(auto_requeue=False))
        except RuntimeError as error:  # variables that do not fit each other
            raise ValueError(f"SLURM: {error}") from error
    if any(plugin.auto_requeue for plugin in ours):
        raise ValueError(
            "trainer.plugins: SLURMEnvironment with auto_requeue saves in the middle of a rollout; "
            "set its init_args.auto_requeue to false"
        )
