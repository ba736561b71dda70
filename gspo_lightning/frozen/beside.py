"""Passes of frozen models beside the policy's own, when they run on different devices.

Decides what a pass in another thread takes along from the thread that starts it. Threads are
enough: the work is in kernels, which release the interpreter's lock.
"""

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from typing import Any, TypeVar

import torch

Result = TypeVar("Result")


class Passes(ThreadPoolExecutor):
    """A context in which passes are started; leaving it waits for all of them.

    A signal that stops the run at once does not wait: a pass may be a reward's, and take minutes.

    >>> with Passes() as passes:
    ...     passes.begin(True, max, 3, 4).result()
    4
    """

    def __exit__(self, kind: type[BaseException] | None, *_: Any) -> None:
        """Wait, unless what ends the context is meant to end the process."""
        wait = kind is None or issubclass(kind, Exception)
        self.shutdown(wait=wait, cancel_futures=not wait)

    def begin(
        self, apart: bool, work: Callable[..., Result], *args: Any, **kwargs: Any
    ) -> Future[Result]:
        """Do ``work``, in a thread of its own if ``apart``, at once and here otherwise.

        Args:
            apart: Whether the work is for another device than the one this thread keeps busy.

        Returns:
            The result, or the error, once it is there. An error of work done here is raised now.
        """
        if apart:
            return self.submit(_under_this_autocast(work), *args, **kwargs)
        done: Future[Result] = Future()
        done.set_result(work(*args, **kwargs))
        return done


def _under_this_autocast(work: Callable[..., Result]) -> Callable[..., Result]:
    """Take the caller's autocast along: it belongs to a thread, and the numbers depend on it."""
    states = [
        (kind, torch.get_autocast_dtype(kind))
        for kind in ("cpu", "cuda")
        if torch.is_autocast_enabled(kind)
    ]

    def run(*args: Any, **kwargs: Any) -> Result:
        with ExitStack() as stack:
            for kind, dtype in states:
                stack.enter_context(torch.autocast(kind, dtype=dtype))
            return work(*args, **kwargs)

    return run
