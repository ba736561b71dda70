"""The episodes of one call of a sampler: asked side by side, answered in the order of their rows.

Decides when an episode ends and why, what is recorded of it, and that an environment which fails,
or takes too long, costs its own row alone.
"""

import copy
import os
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

from gspo_lightning.checkpoint.quoted import printable
from gspo_lightning.environments.episode import Environment, Turn
from gspo_lightning.rollout import stream_seed

AT_ONCE = 64  # calls that run side by side
LONGEST_ERROR = 300  # characters


class Outcome(NamedTuple):
    """What a call gave: a value, or what went wrong and whether it was the time."""

    value: Any
    error: str | None = None
    late: bool = False


class Conversations:
    """The episodes of one call of a sampler.

    Args:
        environment: Begins them.
        rows: Rows of the data, B = P * G.
        group_size: G.
        seed: Of the call.
        max_turns: Turns of the policy at most.
        seconds: Longest time of a call of the environment; ``None`` waits.
        read: The texts of what a row drew in a turn: without and with special tokens.
        render: Tokens of a row's message behind what it drew, up to where the policy's next turn
            begins.

    Attributes:
        records: Of each row, plain values: ``turns``, a list of what the policy and the environment
            said; ``reward``; ``end``: how the episode ended, ``done`` by the environment,
            ``turns`` or ``tokens`` where there were no more of them, ``error`` or ``timeout``;
            ``error``, its text or None; ``tokens``, those of the environment.
        texts: Without special tokens, the turns of each row.
        seconds: Spent on waiting for the environment.
    """

    def __init__(
        self,
        environment: Environment,
        rows: Sequence[dict],
        group_size: int,
        seed: int,
        max_turns: int,
        seconds: float | None,
        read: Callable[[int, list[int]], tuple[str, str]],
        render: Callable[[int, Turn, list[int]], list[int]],
    ) -> None:
        self.max_turns, self.limit = max_turns, seconds
        self.read, self.render = read, render
        self.records: list[dict[str, Any]] = [
            {"turns": [], "reward": 0.0, "end": "tokens", "error": None, "tokens": 0} for _ in rows
        ]
        self.texts: list[list[str]] = [[] for _ in rows]
        self.seconds = 0.0
        seeds = [stream_seed(seed, i // group_size, 0, "environment") for i in range(len(rows))]
        begun = self._ask(
            [partial(environment.begin, copy.deepcopy(row), seeds[i]) for i, row in enumerate(rows)]
        )
        self.episodes = [outcome.value for outcome in begun]
        for i, outcome in enumerate(begun):
            if outcome.error is None and not hasattr(outcome.value, "step"):
                kind = type(outcome.value).__name__
                outcome = Outcome(None, f"begin() must give an object with step(), gave {kind}")
            self._failed(i, outcome)

    def answers(self, asked: Sequence[tuple[int, list[int], int]]) -> list[list[int] | None]:
        """What rows are given behind a turn that ended, ``None`` where that was the last.

        Args:
            asked: Of each, the row, what it drew in this turn, and the tokens it may still have.
        """
        texts = [self._say(row, ids) for row, ids, _ in asked]
        alive = [i for i, (row, *_) in enumerate(asked) if self.records[row]["error"] is None]
        calls = [partial(self.episodes[asked[i][0]].step, texts[i]) for i in alive]
        found: list[list[int] | None] = [None] * len(asked)
        for i, outcome in zip(alive, self._ask(calls), strict=True):
            found[i] = self._answer(*asked[i], outcome)
        return found

    def leave(self, row: int, ids: list[int]) -> None:
        """Record what a row drew in a turn that the limit of tokens cut off."""
        if ids and self.records[row]["error"] is None:
            self._say(row, ids)

    @property
    def finished(self) -> list[bool]:
        """Of each row, whether the environment ended the episode."""
        return [record["end"] == "done" for record in self.records]

    def _say(self, row: int, ids: list[int]) -> str:
        text, special = self.read(row, ids)
        self.texts[row].append(text)
        self.records[row]["turns"].append({"policy": special})
        return special

    def _answer(self, row: int, ids: list[int], room: int, answered: Outcome) -> list[int] | None:
        record = self.records[row]
        if answered.error is None and not isinstance(answered.value, Turn):
            kind = type(answered.value).__name__
            said = f"step() must give a Turn, gave {kind}: {answered.value!r:.60}"
            answered = Outcome(None, said)
        if self._failed(row, answered):
            return None
        turn: Turn = answered.value
        record["reward"] += float(turn.reward)
        if turn.message is None:
            record["end"] = "done"
            return None
        if len(record["turns"]) == self.max_turns:
            record["end"] = "turns"
            return None
        rendered = outcome(partial(self.render, row, turn, ids))
        if self._failed(row, rendered):
            return None
        tokens: list[int] = rendered.value
        if len(tokens) >= room:  # no word of the policy would fit in behind it
            return None
        record["turns"][-1]["environment"] = turn.text
        record["tokens"] += len(tokens)
        return tokens

    def _failed(self, row: int, outcome: Outcome) -> bool:
        if outcome.error is None:
            return False
        self.records[row]["error"] = printable(outcome.error)[:LONGEST_ERROR]
        self.records[row]["end"] = "timeout" if outcome.late else "error"
        return True

    def _ask(self, calls: Sequence[Callable[[], Any]]) -> list[Outcome]:
        start = time.perf_counter()
        found = []
        for first in range(0, len(calls), AT_ONCE):
            found += side_by_side(calls[first : first + AT_ONCE], self.limit)
        self.seconds += time.perf_counter() - start
        return found


def side_by_side(calls: Sequence[Callable[[], Any]], seconds: float | None) -> list[Outcome]:
    """What calls give, each in a thread of its own, in their order and never in that of arrival.

    Args:
        calls: A call that is late stays behind in its thread; what it gives then is not read.
        seconds: Longest time of all of them together; ``None`` waits.
    """
    if len(calls) == 1 and seconds is None:
        return [outcome(calls[0])]
    found: list[list[Outcome]] = [[] for _ in calls]  # a list of each call's own
    threads = [
        threading.Thread(target=lambda i=i: found[i].append(outcome(calls[i])), daemon=True)
        for i in range(len(calls))
    ]
    end = None if seconds is None else time.monotonic() + seconds
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(None if end is None else max(0.0, end - time.monotonic()))
    late = Outcome(None, f"no answer in {seconds} s (sampler.environment_seconds)", late=True)
    return [own[0] if own else late for own in found]


def outcome(call: Callable[[], Any]) -> Outcome:
    """What a call gives, or the error that it raises, in one line."""
    try:
        return Outcome(call())
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # such as SystemExit, or asyncio's CancelledError
        frame = traceback.extract_tb(error.__traceback__, limit=-1)[-1]
        place = f"{os.path.basename(frame.filename)}:{frame.lineno}"
        text = " ".join(str(error).split())[: LONGEST_ERROR - 100]
        return Outcome(None, f"{type(error).__name__}: {text} ({place})")
