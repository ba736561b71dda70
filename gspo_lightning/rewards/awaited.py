"""Waits for what `async` reward functions give, also where an event loop runs already.

Decides that one loop, in a thread of its own, serves the process: a client that a function keeps
between calls belongs to the loop it was first used in, and a notebook's own loop is left alone.
"""

import asyncio
import os
import selectors
import threading
from collections.abc import AsyncIterator, Callable, Coroutine
from concurrent.futures import TimeoutError as NoAnswer
from contextlib import suppress
from inspect import isasyncgen, isawaitable
from typing import Any, NamedTuple, TypeVar

Result = TypeVar("Result")

SECONDS = 600.0  # where a term sets no limit
BLOCKED = 5.0  # seconds without an answer after which a loop counts as blocked


class TooLong(TimeoutError):
    """A limit of this file was hit; a function may raise TimeoutError for reasons of its own."""


class Outcome(NamedTuple):
    """What something awaited gave: a value, or an error."""

    value: Any
    error: BaseException | None = None

    def result(self) -> Any:
        """The value, or the error raised."""
        if self.error is not None:
            raise self.error
        return self.value


class _Selector(selectors.DefaultSelector):
    """Ends a process that a function has forked as soon as its loop goes on.

    It shares what the loop waits for with the run, whose answers it would take away for ever.
    """

    def __init__(self) -> None:
        super().__init__()
        self.process = os.getpid()

    def select(self, timeout: float | None = None) -> Any:
        if os.getpid() != self.process:
            os._exit(0)
        return super().select(timeout)


class _Loop(threading.Thread):
    """A thread that runs an event loop; it ends with the process."""

    def __init__(self) -> None:
        super().__init__(name="rewards that are awaited", daemon=True)
        self.loop = asyncio.SelectorEventLoop(_Selector())
        self.start()

    def run(self) -> None:
        while True:
            # asyncio lets SystemExit of a task out of its loop, and others would wait for ever
            with suppress(BaseException):
                self.loop.run_forever()


_running: _Loop | None = None


def wait(work: Coroutine[Any, Any, Result], seconds: float) -> Result:
    """The result of a coroutine of this file, which limits itself to ``seconds``.

    Raises:
        TooLong: If it does not, as something blocks the loop.
    """
    global _running
    if _running is None or not _running.is_alive():  # a forked process has the object alone
        _running = _Loop()
    future = asyncio.run_coroutine_threadsafe(work, _running.loop)
    try:
        return future.result(seconds + BLOCKED)
    except NoAnswer:
        _running = None  # whatever blocks the loop may do so for ever
        raise TooLong(f"took longer than {seconds:g} s, and blocks its event loop") from None
    finally:
        future.cancel()  # Ctrl-C ends the wait, and must end the work, too


async def outcome(value: Any, seconds: float) -> Outcome:
    """Await something, for so long at most; what needs no waiting comes back as it is."""
    if isasyncgen(value):
        value = _collected(value)
    if not isawaitable(value):
        return Outcome(value)
    task = asyncio.ensure_future(value)
    try:
        done, _ = await asyncio.wait({task}, timeout=seconds)
        if not done:
            return Outcome(None, TooLong(f"took longer than {seconds:g} s (the term's `seconds`)"))
        return Outcome(task.result())
    except BaseException as error:  # a task may also end by SystemExit, or be cancelled
        return Outcome(None, error)
    finally:
        task.cancel()


async def outcomes(values: list[Any], seconds: float) -> list[Outcome]:
    """Await many things at once."""
    return await asyncio.gather(*(outcome(value, seconds) for value in values))


async def called(
    fn: Callable[[list[dict], list[str]], Any], rows: list[dict], texts: list[str], seconds: float
) -> list[Outcome]:
    """Call an ``async`` function with each completion alone, all at once."""

    async def alone(row: dict, text: str) -> Any:
        return (await outcome(fn([row], [text]), seconds)).result()

    pairs = zip(rows, texts, strict=True)
    return await outcomes([alone(row, text) for row, text in pairs], seconds)


async def _collected(values: AsyncIterator[Any]) -> list[Any]:
    return [value async for value in values]
