"""Reward terms: functions of rows and completions, weighted and summed into one reward a sequence.

Decides what a missing reward is, how a term is shaped (whitened, scaled, clipped) and how terms add
up.
"""

import inspect
import math
import warnings
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from gspo_lightning.rewards import calls
from gspo_lightning.rewards.calls import RewardError
from gspo_lightning.rewards.guest import Guest, RewardFn
from gspo_lightning.rewards.time_limit import TimeLimit, error_text, told
from gspo_lightning.rewards.verifiers import comparable

RowCheck = Callable[[list[dict]], tuple[int, str] | None]
LOGGED = ("missing", "overlong", "group_std")  # as reward/<name>, whatever the terms are
EPSILON = 1e-6  # added to the standard deviation: equal rewards whiten to 0


@dataclass
class RunningStatistics:
    """Mean and standard deviation of every value seen so far, merged batch by batch.

    A checkpoint keeps ``state_dict``. Batches are merged, not values added one at a time, so that
    the result does not depend on how ranks share a rollout.

    Source:
        Welford's method for batches: Chan, Golub and LeVeque, 1979, "Updating Formulae and a
        Pairwise Algorithm for Computing Sample Variances".

    >>> seen = RunningStatistics()
    >>> seen.update(torch.tensor([1.0, 2.0]))
    >>> seen.update(torch.tensor([6.0, float("nan")]))
    >>> seen.count, seen.mean, round(seen.std, 4)
    (3, 3.0, 2.1602)
    """

    count: int = 0
    mean: float = 0.0
    squares: float = 0.0  # sum of squared differences from the mean

    @property
    def std(self) -> float:
        """Standard deviation over all values (divided by their number); 1 before there are two."""
        return math.sqrt(self.squares / self.count) if self.count > 1 else 1.0

    def update(self, values: Tensor, reduce: Callable[[Tensor], Tensor] | None = None) -> None:
        """Take a batch in; NaN is no value.

        Args:
            values: Raw rewards of this rank, (B,).
            reduce: Sums a tensor over ranks; every rank must call. ``None`` for one rank.
        """
        reduce = reduce or (lambda x: x)
        values = values[~values.isnan()].double().cpu()
        size = torch.tensor(float(len(values)), dtype=torch.float64)
        count, total = reduce(torch.stack([size, values.sum()])).tolist()
        if count == 0:
            return
        mean = total / count
        # Squares are taken around the mean of all ranks: a sum of squares minus a squared sum would
        # lose digits.
        squares = reduce(((values - mean) ** 2).sum()).item()
        difference, before = mean - self.mean, self.count
        self.count += int(count)
        self.mean += difference * count / self.count
        self.squares += squares + difference**2 * before * count / self.count

    def whiten(self, values: Tensor) -> Tensor:
        """(value - mean) / std, same shape; unchanged before two values were seen."""
        return values if self.count < 2 else (values - self.mean) / (self.std + EPSILON)

    def state_dict(self) -> dict[str, Any]:
        return asdict(self)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.count, self.mean, self.squares = state["count"], state["mean"], state["squares"]


@dataclass(frozen=True)
class RewardTerm:
    """One term of the reward.

    The sum takes ``weight * clip(scale * whiten(raw))``; what is logged under the term's own name
    stays raw.

    Args:
        fn: Called with the rows of the data and the completions, both of length B; gives one number
            a completion, ``None`` where the term does not apply, or an exception in the place of a
            number for a completion that alone is at fault. An attribute ``column`` names a
            column that every row must have, which is checked before training; a method
            ``check_row`` is called with each row before training, and raises ``ValueError`` for one
            that cannot be judged; an attribute ``counts``, a dict of numbers by name, is logged as
            ``reward/<term>_<name>`` after each rollout.
        weight: Factor of the term in the sum.
        whiten: Take the mean of all raw values of the run off and divide by their standard
            deviation, so that terms of different units can be added. The values of a rollout are
            taken in before they are whitened.
        scale: Factor before ``clip``.
        clip: Bounds (low, high) of the scaled value.
        on_error: What happens when ``fn`` raises, gives another number of values than there are
            completions, something that is no number, or an infinite number, or takes longer than
            its ``TimeLimit`` (without an ``on_timeout``). ``stop`` ends the run. ``skip`` leaves
            completions that it cannot score without a reward, whatever the other terms say: they
            teach nothing, and are counted as ``reward/missing`` and ``reward/<term>_errors``;
            after an exception ``fn`` is called with one completion at a time to find them.
            ``retry N`` calls again up to N times, after 1, 2, 4, ... seconds
            (``reward/<term>_retries``), and then stops; ``retry N, then skip`` then skips.
        special_tokens: Give ``fn`` the completions with their special tokens in the text, but for
            one that ended them: for markers and channels that the tokenizer holds as such.
        seconds: Longest wait for an ``async`` function, for all completions of a call together;
            ``None`` waits for 600. Beyond it the call is an error, and where errors are skipped
            each completion is asked for alone, all at once. A plain function has its limit from
            ``TimeLimit``.

    Attributes:
        statistics: What ``whiten`` has seen so far.
        policy: ``on_error``, read.

    Raises:
        ValueError: If ``weight`` or ``scale`` is not finite, the bounds are not in order, or
            ``on_error`` is unknown.
    """

    fn: RewardFn
    weight: float = 1.0
    whiten: bool = False
    scale: float = 1.0
    clip: tuple[float, float] | None = None
    on_error: str = "stop"
    special_tokens: bool = False
    seconds: float | None = None
    statistics: RunningStatistics = field(
        default_factory=RunningStatistics, init=False, repr=False, compare=False
    )
    policy: calls.ErrorPolicy = field(init=False, repr=False, compare=False)
    guest: Guest = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        for name in ("weight", "scale"):
            if not math.isfinite(getattr(self, name)):
                raise ValueError(f"a reward {name} must be finite, got {getattr(self, name)}")
        if self.clip is not None and not self.clip[0] < self.clip[1]:
            raise ValueError(f"a reward's clip must be (low, high), low < high, got {self.clip}")
        if self.seconds is not None and not 0 < self.seconds < math.inf:
            raise ValueError(f"a reward's seconds must be above 0 and finite, got {self.seconds}")
        object.__setattr__(self, "policy", calls.error_policy(self.on_error))  # frozen
        object.__setattr__(self, "guest", Guest(self.fn, self.seconds))

    @property
    def waits(self) -> bool:
        """Whether ``fn`` waits for others: the process of a ``TimeLimit``, or what it awaits."""
        ways = self.fn, type(self.fn).__call__
        return isinstance(self.fn, TimeLimit) or any(map(inspect.iscoroutinefunction, ways))

    def texts(self, completions: list[str], special: list[str] | None) -> list[str]:
        """What ``fn`` is called with, of completions without and with special tokens."""
        if not self.special_tokens:
            return completions
        if special is None:
            raise ValueError(
                "a reward has special_tokens: true, but this sampler gives no Samples.special_texts"
            )
        return special

    def shape(self, raw: Tensor) -> Tensor:
        """What ``weight`` is applied to, from raw values; (B,), NaN stays NaN."""
        shaped = self.scale * (self.statistics.whiten(raw) if self.whiten else raw)
        return shaped if self.clip is None else shaped.clamp(*self.clip)


class Scores(NamedTuple):
    """Rewards of B completions.

    ``total`` is the weighted sum of the shaped terms, (B,); ``parts`` has each term raw, (B,); both
    are NaN where missing. ``counts`` has what the terms count, by ``<term>_<name>``.
    """

    total: Tensor
    parts: dict[str, Tensor]
    counts: dict[str, float] = {}  # noqa: RUF012 - a tuple's default, never written into


def score(
    terms: Mapping[str, RewardTerm],
    rows: list[dict],
    completions: list[str],
    *,
    special: list[str] | None = None,
    seed: int | None = None,
    learn: bool = False,
    reduce: Callable[[Tensor], Tensor] | None = None,
) -> Scores:
    """Score completions with every term and add the terms up.

    A term that does not apply to a row (``None``) is left out of that row's sum. A row with a NaN,
    or to which no term applies, has no reward: NaN, for the group statistics to leave out.

    Args:
        terms: Reward terms by name.
        rows: Rows of the data, one per completion.
        completions: Completion texts.
        special: The same with special tokens kept, for terms that ask for them.
        seed: Of the random streams that terms draw from; ``None`` leaves them as they are.
        learn: Whether the statistics of whitening take these values in, once per rollout.
        reduce: Sums a tensor over ranks, for these statistics; ``None`` for one rank.

    Returns:
        Totals and raw parts, (B,) float32 on the CPU.

    Raises:
        RewardError: If a term cannot score and its ``on_error`` is to stop, naming the term, or if
            the sum is too large for float32.

    >>> length = RewardTerm(lambda rows, texts: [float(len(text)) for text in texts], weight=0.5)
    >>> score({"length": length}, [{}, {}], ["ab", "abcd"]).total
    tensor([1., 2.])
    """
    total = torch.zeros(len(completions), dtype=torch.float64)
    applies = torch.zeros(len(completions), dtype=torch.bool)
    parts: dict[str, Tensor] = {}
    counts: dict[str, float] = {}
    for name, term in terms.items():
        texts = term.texts(completions, special)
        term.guest.seed(name, seed)
        called = calls.call(name, term.guest, rows, texts, term.policy)
        _say_once(name, term, called, len(completions))
        values = called.values or []
        numbers = [math.nan if value is None else value for value in values]
        part = torch.tensor(numbers, dtype=torch.float64)
        if learn and term.whiten:
            term.statistics.update(part, reduce)
        present = torch.tensor([value is not None for value in values], dtype=torch.bool)
        total += term.weight * torch.where(present, term.shape(part), 0.0)  # a given NaN stays
        applies |= present
        parts[name] = part.float()
        counts |= {f"{name}_{key}": n for key, n in called.counts.items()}
        counts |= {f"{name}_{key}": getattr(called, key) for key in _own_counts(term)}
    rewards = torch.where(applies, total, math.nan).float()
    if rewards.isinf().any():
        largest = max(parts, key=lambda part: parts[part].nan_to_num(0).abs().max().item())
        raise RewardError("the weighted sum of the rewards is no longer finite", largest)
    return Scores(rewards, parts, counts)


def _say_once(name: str, term: RewardTerm, called: calls.Called, size: int) -> None:
    """Tell of a term's first error that does not end the run; further ones are only counted."""
    if called.cause is not None and "error" not in term.guest.said:
        term.guest.said.add("error")
        lost = f"{called.errors} of {size} completions get no reward"
        alone = f"reward {name!r} is called with one completion at a time"
        warnings.warn(
            f"{lost if called.errors else alone}: {called.cause}; further ones are only counted "
            f"(reward/{name}_errors)",
            stacklevel=3,
        )


def _own_counts(term: RewardTerm) -> list[str]:
    """What is counted where an error does not end the run at once: attributes of ``Called``."""
    return ["errors"] * term.policy.skip + ["retries"] * bool(term.policy.retries)


def count_names(terms: Mapping[str, RewardTerm]) -> list[str]:
    """Names of everything that the terms count, as in ``Scores.counts``."""
    return [
        f"{name}_{key}"
        for name, term in terms.items()
        for key in (*getattr(term.fn, "counts", ()), *_own_counts(term))
    ]


def columns_needed(terms: Mapping[str, RewardTerm]) -> dict[str, str]:
    """Columns that terms declare, by the name of the term."""
    columns = {name: getattr(term.fn, "column", None) for name, term in terms.items()}
    return {name: column for name, column in columns.items() if isinstance(column, str)}


def row_checks(terms: Mapping[str, RewardTerm]) -> dict[str, RowCheck]:
    """How terms look at rows before training, by the name of the term."""
    own = {name: getattr(term.fn, "check_row", None) for name, term in terms.items()}
    return {name: partial(_refused, name, terms[name]) for name, fn in own.items() if callable(fn)}


def _refused(name: str, term: RewardTerm, rows: list[dict]) -> tuple[int, str] | None:
    """The first row that a term cannot judge, counted from 1, and why."""
    number = 0

    def look(*_: Any) -> None:
        nonlocal number
        for row in rows:
            number += 1
            term.fn.check_row(dict(row))  # type: ignore[attr-defined]

    error = term.guest.host(name, [], [], look)[1]
    if error is None:
        return None
    if isinstance(error, ValueError):
        why = error_text(error, 300)
        return number, f"{why}, which reward {name!r} reads; mend the row, or name another column"
    return number, f"reward {name!r} failed to check it: {told(error)}"


def whitening_state(terms: Mapping[str, RewardTerm]) -> dict[str, dict[str, Any]]:
    """The statistics of the whitened terms, as plain values."""
    return {name: term.statistics.state_dict() for name, term in terms.items() if term.whiten}


def load_whitening_state(
    terms: Mapping[str, RewardTerm], state: Mapping[str, dict[str, Any]]
) -> None:
    """Continue from ``whitening_state``; a term that is not in it begins anew."""
    for name, term in terms.items():
        if term.whiten and name in state:
            term.statistics.load_state_dict(state[name])


class MarkedAnswer:
    """1 where the text behind the last marker equals the row's answer, else 0.

    Args:
        marker: Text before the answer; empty compares the whole completion.
        column: Column of the data with the right answer.

    >>> MarkedAnswer("answer: ")([{"answer": "7"}] * 3, ["3+4=7, answer: 7", "answer: 71", "7"])
    [1.0, 0.0, 0.0]
    """

    def __init__(self, marker: str = "answer: ", column: str = "answer") -> None:
        self.marker = marker
        self.column = column

    def check_row(self, row: dict) -> None:
        """Refuse a row, before training, whose answer cannot be compared with a text."""
        comparable(row.get(self.column), self.column)

    def __call__(self, rows: list[dict], completions: list[str]) -> list[float | None]:
        """Score B completions; a row without the column is a ``ValueError`` that names it."""
        return [self._judge(row, text) for row, text in zip(rows, completions, strict=True)]

    def _judge(self, row: dict, text: str) -> float:
        if self.column not in row:
            raise ValueError(
                f"the row with prompt {str(row.get('prompt'))[:60]!r} has no column "
                f"{self.column!r} to compare with; it has {str(sorted(row))[:300]}"
            )
        if self.marker not in text:
            return 0.0
        answer = text.rpartition(self.marker)[2] if self.marker else text
        return float(answer.strip() == str(row[self.column]).strip())


def overlong_penalty(lengths: Tensor, max_length: int, ramp: int) -> Tensor:
    """Penalise completions that run close to the generation limit.

    Zero while ``max_length - ramp`` tokens or fewer were used, then a straight line down to -1 at
    ``max_length``.

    Args:
        lengths: Completion lengths in tokens, (B,) int.
        max_length: Generation limit in tokens.
        ramp: Width of the slope in tokens, 1 <= ramp <= max_length.

    Returns:
        Penalty in [-1, 0], (B,) float32. Add it to the rewards.

    Raises:
        ValueError: If ``ramp`` is out of range.

    Source:
        DAPO, arXiv:2503.14476, "Overlong Reward Shaping" (L_cache is ``ramp``).

    >>> overlong_penalty(torch.tensor([5, 8, 12]), max_length=10, ramp=4)
    tensor([ 0.0000, -0.5000, -1.0000])
    """
    if not 1 <= ramp <= max_length:
        raise ValueError(f"overlong_ramp must be in [1, {max_length}] tokens, got {ramp}")
    excess = lengths.float() - (max_length - ramp)  # tokens past the free zone
    return 0.0 - (excess / ramp).clamp(0, 1)


def ramp_tokens(ramp: float | None, max_length: int) -> int | None:
    """The width of an overlong ramp in tokens, also where it is given as a share of the limit.

    Raises:
        ValueError: If it is neither a number of tokens within the limit nor a share below 1.

    >>> ramp_tokens(0.2, max_length=1024), ramp_tokens(4, max_length=10)
    (205, 4)
    """
    if ramp is None:
        return None
    if not 0 < ramp <= max_length or (ramp > 1 and ramp != int(ramp)):
        raise ValueError(
            f"overlong_ramp must be in [1, {max_length}] tokens, or a share of them below 1, got "
            f"{ramp}"
        )
    return max(1, round(ramp * max_length)) if ramp < 1 else int(ramp)


def check_terms(terms: Mapping[str, RewardTerm], truncated: str) -> None:
    """Refuse rewards that are none, or do not go with what ``truncated`` makes of completions."""
    if not terms:
        raise ValueError("model.rewards is empty; name at least one reward term")
    whitened = [name for name, term in terms.items() if term.whiten]
    if truncated == "zero_reward" and whitened:
        raise ValueError(
            f"truncated: zero_reward gives 0, which is an average reward where {whitened[0]!r} "
            "is whitened; use keep or mask"
        )
    logged = Counter([*terms, *LOGGED, *count_names(terms)])
    for name in (name for name, times in logged.items() if times > 1):
        raise ValueError(
            f"model.rewards: reward/{name} would be logged twice, for the term or count of that "
            "name and for what is counted anyway; give the term another name"
        )


def check_signatures(terms: Mapping[str, RewardTerm]) -> None:
    """Refuse a reward function that cannot be called with rows and completions.

    Raises:
        ValueError: Naming the setting, before anything is sampled.
    """
    for name, term in terms.items():
        try:
            signature = inspect.signature(term.fn)
        except (TypeError, ValueError):
            continue  # written in C: seen when it is called
        names = list(signature.parameters)
        if names[:1] == ["completions"] or names[:2] == ["prompts", "completions"]:
            raise ValueError(
                f"model.rewards.{name}.fn takes {signature}, as TRL's reward functions do; wrap it "
                "in gspo_lightning.rewards.TRLReward (here they take rows and completions)"
            )
        try:
            signature.bind([], [])
        except TypeError as error:
            raise ValueError(
                f"model.rewards.{name}.fn: a reward function takes (rows, completions), this one "
                f"takes {signature}"
            ) from error
