"""A reward function is a guest in the process of the run, which stays as it was.

Decides what is put back after each call and named once (what training depends on), what a function
keeps for its own next call (environment, filters of warnings, random streams), how much it may
print, and whose an interrupt is. What ends a process at once (``os._exit``, a crash of native code)
only a process of its own contains: see ``TimeLimit``.
"""

import gc
import locale
import os
import random
import re
import resource
import signal
import sys
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from copy import deepcopy
from functools import partial
from inspect import isasyncgen, isawaitable
from typing import Any, TypeVar

import numpy as np
import torch

from gspo_lightning.rewards.awaited import SECONDS, Outcome, called, outcome, wait
from gspo_lightning.rewards.time_limit import GuestStream
from gspo_lightning.rollout import stream_seed

Result = TypeVar("Result")
# Numbers, an exception in the place of one, None; or something that is awaited and gives them.
RewardFn = Callable[[list[dict], list[str]], Any]

PUT_BACK = "put back after each call"
COPIES = "it has copies, nothing else sees the change"
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2,
           signal.SIGPIPE, signal.SIGCHLD)  # fmt: skip
LIMITS = [getattr(resource, name) for name in dir(resource) if name.startswith("RLIMIT_")]
DEVICES = ("cpu", "cuda")
_inference: list[Any] = []  # modes that have to last


def _folder() -> str | None:
    with suppress(OSError):  # of a folder that somebody has deleted
        return os.getcwd()
    return None


def _umask() -> int | None:
    with suppress(OSError):  # to ask by os.umask would change it for other threads
        with open("/proc/self/status", encoding="utf-8") as status:
            found = re.search(r"(?m)^Umask:\s*(\d+)", status.read())
        return int(found[1], 8) if found else None
    return None


def _limits() -> list[tuple[int, int]]:
    return [resource.getrlimit(which) for which in LIMITS]


def _set_limits(limits: list[tuple[int, int]]) -> None:
    for which, limit in zip(LIMITS, limits, strict=True):
        if resource.getrlimit(which) != limit:
            resource.setrlimit(which, limit)


def _set_device(device: torch.device) -> None:
    # The CPU stands for "none was set": set as a device, it would slow every call of torch down.
    torch.set_default_device(None if device.type == "cpu" else device)


def _cuda_device() -> int | None:
    return torch.cuda.current_device() if torch.cuda.is_initialized() else None


def _autocast() -> tuple[Any, ...]:
    depth = torch.autocast_increment_nesting() - 1
    torch.autocast_decrement_nesting()
    found = ((torch.is_autocast_enabled(d), torch.get_autocast_dtype(d)) for d in DEVICES)
    return depth, torch.is_autocast_cache_enabled(), *found


def _set_autocast(state: tuple[Any, ...]) -> None:
    depth, cached, *found = state
    for device, (on, dtype) in zip(DEVICES, found, strict=True):
        torch.set_autocast_enabled(device, on)
        torch.set_autocast_dtype(device, dtype)
    torch.set_autocast_cache_enabled(cached)
    # At one level too many no cache is emptied: weights cast before a step would serve after it.
    for _ in range(_autocast()[0] - depth):
        torch.autocast_decrement_nesting()
    torch.clear_autocast_cache()


def _set_inference_mode(on: bool) -> None:
    mode = torch.inference_mode(on)
    mode.__enter__()
    _inference.append(mode)  # its end would bring the function's mode back


def _anomaly() -> tuple[bool, bool]:
    return torch.is_anomaly_enabled(), torch.is_anomaly_check_nan_enabled()


def _cudnn() -> tuple[bool, bool]:
    return torch.backends.cudnn.benchmark, torch.backends.cudnn.deterministic


def _set_cudnn(flags: tuple[bool, bool]) -> None:
    torch.backends.cudnn.benchmark, torch.backends.cudnn.deterministic = flags


# What training depends on: how it is read and how it is put back; None cannot be put back.
STATE: dict[str, tuple[Callable[[], Any], Callable[[Any], Any]]] = {
    "the working directory": (_folder, os.chdir),
    "torch's default dtype": (torch.get_default_dtype, torch.set_default_dtype),
    "torch's default device": (torch.get_default_device, _set_device),
    "torch's CUDA device": (_cuda_device, torch.cuda.set_device),
    # before the grad mode, which it changes
    "torch's inference mode": (torch.is_inference_mode_enabled, _set_inference_mode),
    "torch's grad mode": (torch.is_grad_enabled, torch.set_grad_enabled),
    "torch's number of threads": (torch.get_num_threads, torch.set_num_threads),
    "torch's precision of products": (
        torch.get_float32_matmul_precision,
        torch.set_float32_matmul_precision,
    ),
    "torch's choice of deterministic algorithms": (
        torch.get_deterministic_debug_mode,
        torch.set_deterministic_debug_mode,
    ),
    "torch's autocast": (_autocast, _set_autocast),
    "torch's search for anomalies": (
        _anomaly,
        lambda found: torch.autograd.set_detect_anomaly(*found),
    ),
    "cuDNN's flags": (_cudnn, _set_cudnn),
    "the locale": (
        partial(locale.setlocale, locale.LC_ALL),
        partial(locale.setlocale, locale.LC_ALL),
    ),
    "limits of the process": (_limits, _set_limits),
    "the umask": (_umask, os.umask),
    "the recursion limit": (sys.getrecursionlimit, sys.setrecursionlimit),
    "the mask of signals": (
        partial(signal.pthread_sigmask, signal.SIG_BLOCK, ()),
        partial(signal.pthread_sigmask, signal.SIG_SETMASK),
    ),
    "garbage collection": (gc.isenabled, lambda on: gc.enable() if on else gc.disable()),
}


class Guest:
    """What one reward function has been told of and what it keeps from call to call.

    Args:
        fn: The function.
        seconds: Longest wait for what an ``async`` function gives; ``None`` for that of ``wait``.

    Attributes:
        counts: Names of what the function counts.
        said: What was warned of already.
    """

    def __init__(self, fn: RewardFn, seconds: float | None = None) -> None:
        self.fn = fn
        self.seconds = SECONDS if seconds is None else seconds
        self.counts: tuple[str, ...] = tuple(getattr(fn, "counts", ()))
        self.said: set[str] = set()
        self._awaits = False  # whether the function was seen to be ``async``
        self._environment: dict[str, str | None] = {}  # as it wants it; None is a name removed
        self._filters: list[Any] | None = None
        self._random: int | tuple[Any, ...] | None = None  # a seed, or how far the streams are
        self._printed = {name: GuestStream() for name in ("stdout", "stderr")}

    def __reduce__(self) -> tuple[Any, ...]:
        return Guest, (self.fn, self.seconds)  # a copy begins anew

    def seed(self, name: str, seed: int | None) -> None:
        """Begin random streams of the function's own; ``None`` leaves it those of the process."""
        self._random = None if seed is None else stream_seed(seed, 0, 0, f"reward/{name}")

    def ask(self, rows: list[dict], completions: list[str]) -> Any:
        """Call the function, and wait for what it gives if it is ``async``."""
        given = self.fn(rows, completions)
        if isawaitable(given) or isasyncgen(given):
            self._awaits = True
            return wait(outcome(given, self.seconds), self.seconds).result()
        return given

    def answers(
        self, name: str, rows: list[dict], completions: list[str]
    ) -> list[Callable[..., Any]] | None:
        """What an ``async`` function gives for each completion alone, asked for all at once.

        One after the other, B completions would take B times as long as they may together.
        """
        if not self._awaits:
            return None

        def work(own: list[dict], texts: list[str]) -> list[Outcome]:
            return wait(called(self.fn, own, texts, self.seconds), self.seconds)

        found, error = self.host(name, rows, completions, work)
        given = found or [Outcome(None, error)] * len(completions)
        return [lambda *_, each=each: each.result() for each in given]

    def host(
        self,
        name: str,
        rows: list[dict],
        completions: list[str],
        work: Callable[[list[dict], list[str]], Result],
    ) -> tuple[Result | None, BaseException | None]:
        """Let the function work on copies of its arguments, and put the process back.

        Returns:
            What ``work`` gives, or what it raises, whatever that is.

        Raises:
            BaseException: What the run's own handler of a signal has raised meanwhile, such as
                KeyboardInterrupt, even if the function has caught it.
        """
        notes: list[str] = []
        process, own, texts = os.getpid(), _copied(rows), list(completions)
        result, error = None, None
        with _signals(notes) as raised, self._own(), self._streams(notes), _state(notes):
            try:
                result = work(own, texts)
            except BaseException as caught:
                error = caught
            if os.getpid() != process:
                os._exit(0)  # a child that the function has forked must not train as well
        if raised:
            raise raised[-1]
        notes += [f"changes its completions: {COPIES}"] * (texts != [*completions])
        notes += [f"changes its rows ({key}): {COPIES}" for key in _changed(own, rows)]
        for note in notes:
            self.say_once(name, note)
        return result, error

    def say_once(self, name: str, what: str) -> None:
        """Warn of something that a reward function does."""
        if what not in self.said:
            self.said.add(what)
            warnings.warn(f"reward {name!r} {what}", stacklevel=4)

    @contextmanager
    def _own(self) -> Iterator[None]:
        """Give the function its own environment, filters and random streams for a while."""
        environment = os.environ.copy()
        # Filters are the process's: a thread beside the policy's would undo what that one does.
        filters = list(warnings.filters) if _is_main() else None
        streams = None if self._random is None else _random_state()
        if self._environment:
            _set_environment(self._environment)
        if self._filters is not None and filters is not None:
            _set_filters(self._filters)
        if isinstance(self._random, int):
            _seed_random(self._random)
        elif self._random is not None:
            _set_random(self._random)
        try:
            yield
        finally:
            if streams is not None:
                self._random = _random_state()
                _set_random(streams)
            if filters is not None and filters != list(warnings.filters):
                self._filters = list(warnings.filters)
                _set_filters(filters)
            after = os.environ.copy()
            self._environment = {}
            if after != environment:
                names = {n for n in environment | after if environment.get(n) != after.get(n)}
                self._environment = {name: after.get(name) for name in names}
                _set_environment({name: environment.get(name) for name in names})

    @contextmanager
    def _streams(self, notes: list[str]) -> Iterator[None]:
        """Put streams before the process's that cannot be closed and take only so much."""
        before = {name: getattr(sys, name) for name in self._printed}
        for name, stream in self._printed.items():
            # A reward beside the policy's pass does not pay for what the main thread prints.
            stream.open(before[name], None if _is_main() else threading.main_thread().ident)
            setattr(sys, name, stream)
        try:
            yield
        finally:
            for name, stream in self._printed.items():
                found = getattr(sys, name)
                setattr(sys, name, before[name])
                if stream.closed_by_guest or found is not stream:
                    notes.append(f"closes or replaces sys.{name}: {PUT_BACK}")
                if found is not stream:
                    _release(found, before[name])
                if stream.count > stream.limit:
                    kept = f"the first {stream.limit:,} characters of each call are shown"
                    notes.append(f"prints very much to sys.{name}: {kept}")


def _is_main() -> bool:
    return threading.current_thread() is threading.main_thread()


@contextmanager
def _state(notes: list[str]) -> Iterator[None]:
    """Put back what ``STATE`` lists."""
    before = {what: read() for what, (read, _) in STATE.items()}
    try:
        yield
    finally:
        for what, (read, put) in STATE.items():
            if before[what] is not None and read() != before[what]:
                try:
                    put(before[what])
                    notes.append(f"changes {what}: {PUT_BACK}")
                except Exception as error:  # such as a folder that it has deleted
                    notes.append(f"changes {what}, which cannot be put back: {error}")


@contextmanager
def _signals(notes: list[str]) -> Iterator[list[BaseException]]:
    """Keep the run's handlers; yields a list of what they raise meanwhile."""
    raised: list[BaseException] = []
    if not _is_main():  # signals are handled, and handlers changed, in the main thread alone
        yield raised
        return
    before = {number: signal.getsignal(number) for number in SIGNALS}
    alarm = signal.getitimer(signal.ITIMER_REAL)[0]

    def handle(number: int, frame: Any) -> None:
        try:
            before[signal.Signals(number)](number, frame)  # type: ignore[operator, misc]
        except BaseException as error:
            raised.append(error)
            raise

    installed: dict[signal.Signals, Any] = {
        number: handle if callable(handler) else handler for number, handler in before.items()
    }
    for number, handler in installed.items():
        if handler is handle:
            signal.signal(number, handle)
    try:
        yield raised
    finally:
        for number, handler in before.items():
            changed = signal.getsignal(number) is not installed[number]
            if changed:
                notes.append(f"changes the handler of {number.name}: {PUT_BACK}")
            if handler is not None and (changed or installed[number] is handle):
                signal.signal(number, handler)
        if not alarm and signal.getitimer(signal.ITIMER_REAL)[0]:
            signal.setitimer(signal.ITIMER_REAL, 0)  # it would end the run, later
            notes.append("leaves an alarm clock running: it is switched off")


def _copied(rows: list[dict]) -> list[dict]:
    """Rows that may be written into; those of one prompt stay one."""
    try:
        return deepcopy(rows)
    except Exception:  # a value that cannot be copied, such as an open file
        return [dict(row) for row in rows]


def _changed(own: list[dict], rows: list[dict]) -> list[str]:
    """What was written into copies of rows: names of columns, at most three."""
    try:
        if own == rows:
            return []
    except Exception:  # arrays have no one answer: look at each column
        pass
    if len(own) != len(rows):
        return ["their number"]
    names: dict[str, None] = {}
    for mine, row in zip(own, rows, strict=True):
        for key in mine.keys() | row.keys():
            plain = isinstance(row.get(key), str | int | float | list | dict | None)
            with suppress(Exception):  # what cannot be compared is not said to be changed
                if (key in mine) != (key in row) or (plain and bool(mine[key] != row[key])):
                    names[repr(key)] = None
    return list(names)[:3]


def _set_environment(values: dict[str, str | None]) -> None:
    for name, value in values.items():
        if value is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = value


def _set_filters(filters: list[Any]) -> None:
    warnings.resetwarnings()  # tells Python that its filters are others
    warnings.filters[:] = filters  # type: ignore[index]


def _release(stream: Any, before: Any) -> None:
    """Take the process's buffer out of a stream put around it, which would close it at its end."""
    with suppress(Exception):
        if stream.buffer is before.buffer:
            stream.flush()
            stream.detach()


def _random_state() -> tuple[Any, ...]:
    return random.getstate(), np.random.get_state(), torch.get_rng_state()


def _set_random(state: tuple[Any, ...]) -> None:
    random.setstate(state[0])
    np.random.set_state(state[1])
    torch.set_rng_state(state[2])


def _seed_random(seed: int) -> None:
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.default_generator.manual_seed(seed)  # CUDA's streams stay: nothing draws from them
