"""Call a reward function: check what it gives, call it again, or leave out what it cannot score.

Decides what an error of a reward function is (it raises, gives another number of values than there
are completions, something that is no number, an infinite number, or an exception in a number's
place, or it exits; ``None`` and NaN are answers, and a device without memory is nobody's fault) and
what becomes of the run and of the completion.
"""

import math
import re
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Set
from contextlib import suppress
from inspect import isawaitable
from itertools import islice
from typing import Any, NamedTuple

import torch

from gspo_lightning.checkpoint.quoted import printable
from gspo_lightning.guards.out_of_memory import OutOfMemory, is_out_of_memory
from gspo_lightning.rewards.awaited import TooLong, outcomes, wait
from gspo_lightning.rewards.guest import Guest
from gspo_lightning.rewards.time_limit import UNSPEAKABLE, as_number, error_text, kind_of, told

PAUSE_SECONDS = 1.0  # before the first further call; twice as long before each one after it
LARGEST = torch.finfo(torch.float32).max  # rewards become float32
LONG = 10_000  # characters of an error's text that is kept whole


class RewardError(ValueError):
    """A reward term that cannot score: what happened, in one line that names the term.

    Attributes:
        term: Name of the term.
        row: Which completion of the B failed, where that is known.
    """

    def __init__(
        self, message: str, term: str, row: int | None = None, cause: BaseException | None = None
    ) -> None:
        super().__init__(printable(message))  # it may quote a completion, or what a function says
        self.term = term
        self.row = row
        if cause is not None:
            self.__cause__ = cause


class ErrorPolicy(NamedTuple):
    """How often a function is called again, and whether it may then lose completions."""

    retries: int
    skip: bool


def error_policy(text: str) -> ErrorPolicy:
    """Read ``on_error``: ``stop``, ``skip``, ``retry N`` or ``retry N, then skip``.

    Raises:
        ValueError: If it is none of these.

    >>> error_policy("retry 2, then skip")
    ErrorPolicy(retries=2, skip=True)
    """
    match = re.fullmatch(r"(stop)|(skip)|retry ([1-9]\d*)(, then skip)?", text)
    if match is None:
        raise ValueError(
            "a reward's on_error must be stop, skip, `retry N` or `retry N, then skip`, with N of "
            f"at least 1, got {text!r}"
        )
    return ErrorPolicy(int(match[3] or 0), bool(match[2] or match[4]))


class Called(NamedTuple):
    """What a reward function gave.

    ``values`` has B numbers, ``None`` where the term does not apply, NaN where there is no reward
    (and is missing only between ``_attempt`` and ``call``); ``counts`` what the function counts;
    ``errors`` is how many completions it could not score, ``retries`` how often it was called
    again, and ``cause`` the first error of those that did not end the run.
    """

    values: list[float | None] | None
    counts: dict[str, float]
    errors: int = 0
    retries: int = 0
    cause: RewardError | None = None


def call(
    name: str, guest: Guest, rows: list[dict], completions: list[str], policy: ErrorPolicy
) -> Called:
    """Score B completions with one function.

    Where errors are skipped, a function that raises is called with one completion at a time, so
    that only those are lost that it cannot score alone.

    Raises:
        RewardError: If the function cannot score and the policy is to stop.
    """
    retries = 0
    found = _attempt(name, guest, rows, completions)
    while found.cause is not None and retries < policy.retries:
        time.sleep(PAUSE_SECONDS * 2**retries)
        retries += 1
        found = _attempt(name, guest, rows, completions)
    if found.cause is not None and not policy.skip:
        raise _located(found.cause, guest, rows, completions, retries)
    if found.values is None:
        found = _one_by_one(name, guest, rows, completions, found.cause)
    return found._replace(retries=retries)


def _attempt(
    name: str,
    guest: Guest,
    rows: list[dict],
    completions: list[str],
    answer: Callable[[list[dict], list[str]], Any] | None = None,
) -> Called:
    """Call once; values are NaN where they are of no use, and all lost if there is no list.

    Args:
        answer: Called instead of the function, which has answered already.

    Raises:
        OutOfMemory: If a device has no memory left, whatever the policy: no completion is to blame.
    """
    size = len(completions)

    def work(own: list[dict], texts: list[str]) -> Called:
        values = _listed((answer or guest.ask)(own, texts), size, guest)
        if len(values) != size:
            text = f"reward {name!r} gave {len(values)} values for {size} completions"
            return Called(None, {}, size, cause=RewardError(text, name))
        read = [_number(name, value, completions[i], i) for i, value in enumerate(values)]
        errors = [number for number in read if isinstance(number, RewardError)]
        numbers = [math.nan if isinstance(number, RewardError) else number for number in read]
        counts = {key: float(guest.fn.counts[key]) for key in guest.counts}  # type: ignore[attr-defined]
        return Called(numbers, counts, len(errors), cause=errors[0] if errors else None)

    called, error = guest.host(name, rows, completions, work)
    if called is not None and error is None:
        return called
    assert error is not None  # either is there
    text = error_text(error)
    # A MemoryError of Python comes of the text, such as a number too long, not of the machine.
    spoken = text != UNSPEAKABLE and not isinstance(error, MemoryError)
    if spoken and is_out_of_memory(error):
        if isinstance(error, OutOfMemory):
            raise error
        line = str(error).strip().partition("\n")[0][:160]
        raise OutOfMemory(f"out of memory in reward {name!r}: {line}") from error
    if not isinstance(error, TooLong):
        text = told(error, "" if type(error) is ValueError else None)
    text = f"reward {name!r} failed: {text}"
    return Called(None, {}, size, cause=RewardError(text, name, cause=_cause(error)))


def _listed(given: Any, size: int, guest: Guest) -> list[Any]:
    """What a function gave as a list, of ``size`` + 1 values at most where it could be endless."""
    single = not hasattr(given, "__iter__") and not hasattr(given, "__getitem__")
    if single or isinstance(given, str | bytes | Mapping | Set):
        raise TypeError(f"gave {kind_of(given)} instead of a list of numbers")
    if hasattr(given, "tolist") and hasattr(given, "shape"):  # a tensor, an array: one copy
        given = given.reshape(-1).tolist() if tuple(given.shape) == (size, 1) else given.tolist()
    values = list(given if hasattr(given, "__len__") else islice(given, size + 1))
    if len(values) > size and not hasattr(given, "__len__"):
        raise ValueError(f"gave more than {size} values for {size} completions")
    if any(isawaitable(value) for value in values if type(value) is not float):
        waited = wait(outcomes(values, guest.seconds), guest.seconds)
        values = [each.value if each.error is None else each.error for each in waited]
    return values


def _number(name: str, value: Any, completion: str, row: int) -> float | RewardError | None:
    """A value as a number, or what is wrong with it."""
    if type(value) is float and abs(value) <= LARGEST:
        return value  # what most functions give, and NaN is not
    place = f"for the completion {completion[:80]!r}"
    if isinstance(value, BaseException):  # what happened to this completion alone
        text = f"reward {name!r} failed: {error_text(value)}; {place}"
        return RewardError(text, name, row, _cause(value))
    try:
        number = as_number(value)
    except Exception as error:  # float() of tensors and arrays raises many kinds
        text = f"reward {name!r} gave something that is no number: {error_text(error)}; {place}"
        return RewardError(text, name, row, _cause(error))
    if number is not None and abs(number) > LARGEST:
        text = f"reward {name!r} gave {number} {place}; a reward must be finite, or None where "
        return RewardError(text + "there is none", name, row)
    return number


def _cause(error: BaseException) -> Exception:
    """The error, or one in its place that can be shown and does not mean to end the process."""
    text = error_text(error)
    if isinstance(error, Exception) and text != UNSPEAKABLE and len(str(error)) < LONG:
        with suppress(BaseException):  # of a class that raises where its name is asked for
            traceback.format_exception(error)
            return error
    return RuntimeError(f"{kind_of(error)}: {text}").with_traceback(error.__traceback__)


def _alone(name: str, guest: Guest, rows: list[dict], completions: list[str]) -> Iterator[Called]:
    """Score one completion after the other; an error names the completion that it is of."""
    answers = guest.answers(name, rows, completions)
    for i, (row, completion) in enumerate(zip(rows, completions, strict=True)):
        called = _attempt(name, guest, [row], [completion], answers[i] if answers else None)
        if called.cause is not None:
            text, cause = str(called.cause), called.cause.__cause__
            if called.cause.row is None:  # else the error is about a value, and names its text
                text += f"; row with prompt {str(row.get('prompt'))[:60]!r}, "
                text += f"completion {completion[:60]!r}"
            called = called._replace(cause=RewardError(text, name, i, cause))
        yield called


def _one_by_one(
    name: str, guest: Guest, rows: list[dict], completions: list[str], together: RewardError | None
) -> Called:
    """Score what can be scored alone; ``together`` is what happened to all at once."""
    values: list[float | None] = []
    counts: dict[str, float] = dict.fromkeys(guest.counts, 0)
    errors, first = 0, None
    for alone in _alone(name, guest, rows, completions):
        values += [math.nan] if alone.values is None else alone.values
        errors += alone.errors
        counts = {key: n + alone.counts.get(key, 0) for key, n in counts.items()}
        first = first or alone.cause
    return Called(values, counts, errors, cause=first or together)


def _located(
    error: RewardError, guest: Guest, rows: list[dict], completions: list[str], retries: int
) -> RewardError:
    """The error with the completion that causes it, if one does, and how often it was tried."""
    late = isinstance(error.__cause__, TooLong)  # to ask each alone would take as long again
    if error.row is None and error.__cause__ is not None and not late:
        causes = (alone.cause for alone in _alone(error.term, guest, rows, completions))
        # completions that fail together need not fail alone
        error = next((cause for cause in causes if cause is not None), error)
    if not retries:
        return error
    text = f"{error}; called {retries + 1} times"
    return RewardError(text, error.term, error.row, error.__cause__)
