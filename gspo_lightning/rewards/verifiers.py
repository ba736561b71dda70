"""Verifiers: reward functions that compare a completion with the answer in its row, or its form.

Decides what counts as equal, and which part of a completion is judged. Every verifier gives 1 or 0
(``TagCount`` a share), and None where it does not apply. Words, letters of a choice and programs
are judged in ``words`` and ``code_tests``; ``numbers`` reads numbers out of a text.
"""

import json
import logging
import math
import re
from collections.abc import Sequence
from decimal import Decimal
from typing import Any, Literal

from gspo_lightning.rewards.numbers import last_number, read_answer, read_result

Missing = Literal["error", "skip"]
Patterns = str | list[str] | None


def comparable(answer: Any, column: str) -> Any:
    """The answer in a column, if a text can equal it.

    >>> comparable("3", "answer")
    '3'
    >>> comparable(["3"], "answer")
    Traceback (most recent call last):
    ValueError: column 'answer' is the list ['3'], no text and no number
    """
    if isinstance(answer, list | dict):
        kind, shown = type(answer).__name__, str(answer)[:60]
        raise ValueError(f"column {column!r} is the {kind} {shown}, no text and no number")
    if isinstance(answer, float) and not math.isfinite(answer):
        raise ValueError(f"column {column!r} is {answer}, no number")
    return answer


class AnswerVerifier:
    """What verifiers have in common that compare with a column of the data.

    Args:
        column: Column with the right answer.
        missing: What a row without that column is: an ``error``, found before training, or a row to
            which the verifier does not apply (``skip``).
        pattern: Regular expression (``.`` matches line ends, too) that finds what is judged: group
            1 of its last match, or the whole match if it has no group; no match gives 0. Of
            several, the first one that matches decides. ``None`` judges the whole completion.

    Raises:
        ValueError: If ``pattern`` is no regular expression, or an empty list.
    """

    def __init__(
        self, column: str = "answer", missing: Missing = "error", pattern: Patterns = None
    ) -> None:
        # ``column`` is what a term declares: rows are checked for it before training
        self.column = column if missing == "error" else None
        self.answer_column = column
        self.patterns = compile_patterns(type(self).__name__, pattern)

    def __call__(self, rows: list[dict], completions: list[str]) -> list[float | None]:
        """1 or 0 for each of B completions, None where there is nothing to compare with."""
        return [self._judge(row, text) for row, text in zip(rows, completions, strict=True)]

    def equal(self, answer: Any, text: str) -> float | None:
        """How far ``text`` gives the answer, in [0, 1]; None if the answer cannot be judged."""
        raise NotImplementedError

    def check_row(self, row: dict) -> None:
        """Refuse a row, before training, whose answer no text can be compared with."""
        answer = row.get(self.answer_column)
        if answer is not None:
            self.right(answer)

    def right(self, answer: Any) -> Any:
        """The answer as this verifier compares it; one that it cannot compare is a ValueError."""
        return comparable(answer, self.answer_column)

    def _judge(self, row: dict, text: str) -> float | None:
        answer = row.get(self.answer_column)
        if answer is None:
            if self.column is None:
                return None
            raise ValueError(f"there is no column {self.answer_column!r}, only {sorted(row)}")
        part = self.judged(text)
        if part is None:
            return 0.0
        verdict = self.equal(answer, part)
        return None if verdict is None else float(verdict)

    def judged(self, text: str) -> str | None:
        """The part of a completion that is judged; None if no pattern finds one."""
        if self.patterns is None:
            return text
        for pattern in self.patterns:
            matches = list(pattern.finditer(text))
            part = matches[-1][min(pattern.groups, 1)] if matches else None
            if part is not None:  # the last match may be one in which the group took no part
                return part
        return None


class ExactMatch(AnswerVerifier):
    """1 where the text is the answer, white space at both ends aside.

    Args:
        column: Column with the right answer.
        ignore_case: Whether upper and lower case are the same.
        missing: ``error`` or ``skip`` for a row without the column.
        pattern: Finds the part that is judged; see ``AnswerVerifier``.

    >>> ExactMatch(pattern=r"<a>(.*?)</a>")([{"answer": "Rome"}] * 2, ["<a> Rome </a>", "Rome"])
    [1.0, 0.0]
    """

    def __init__(
        self,
        column: str = "answer",
        ignore_case: bool = False,
        missing: Missing = "error",
        pattern: Patterns = None,
    ) -> None:
        super().__init__(column, missing, pattern)
        self.ignore_case = ignore_case

    def equal(self, answer: Any, text: str) -> bool:
        left, right = str(answer).strip(), text.strip()
        return left.casefold() == right.casefold() if self.ignore_case else left == right


class LastNumber(AnswerVerifier):
    """1 where the last number of the text is the last number of the answer; see ``last_number``.

    Args:
        column: Column with the right answer: a number, or a text that ends in it.
        tolerance: Largest absolute difference that counts as equal.
        missing: ``error`` or ``skip`` for a row without the column.
        pattern: Finds the part that is judged; see ``AnswerVerifier``.

    Raises:
        ValueError: If ``tolerance`` is below 0, or an answer holds no number.

    >>> LastNumber()([{"answer": 1234.5}] * 2, ["The total is 1,234.50 dollars.", "1,234"])
    [1.0, 0.0]
    """

    def __init__(
        self,
        column: str = "answer",
        tolerance: float = 0.0,
        missing: Missing = "error",
        pattern: Patterns = None,
    ) -> None:
        super().__init__(column, missing, pattern)
        if not tolerance >= 0:
            raise ValueError(f"LastNumber.tolerance must be >= 0, got {tolerance}")
        self.tolerance = tolerance

    def right(self, answer: Any) -> Decimal:
        """The number of the answer; an answer without one is an error."""
        right = last_number(str(super().right(answer)))
        if right is None:
            raise ValueError(f"the answer {str(answer)[:60]!r} holds no number")
        return right

    def equal(self, answer: Any, text: str) -> bool:
        """Whether both numbers are equal, as decimals, or within the tolerance."""
        right, found = self.right(answer), last_number(text)
        if found is None:
            return False
        return found == right or abs(float(found) - float(right)) <= self.tolerance > 0


class MathVerify(AnswerVerifier):
    r"""1 where math-verify finds the completion's result equal to the answer, as mathematics.

    Reads LaTeX and plain expressions (``\boxed{\frac{1}{2}}`` equals ``0.5``; ``50%`` is 0.5 here).
    Words are never read as products of their letters: of ``72 dollars`` the number counts, and what
    stands between ``$`` or in ``\boxed`` and is words alone is compared as text. A completion
    without a readable result gives 0. An answer that cannot be read (``silent``) gives None, and is
    counted as ``reward/<term>_unreadable_answers``. Some expressions take very long: its own time
    limit works in a program's main thread only, so it is off; put a ``TimeLimit`` around.

    Args:
        column: Column with the right answer; LaTeX with or without its ``$``.
        missing: ``error`` or ``skip`` for a row without the column.
        pattern: Finds the part that is judged; see ``AnswerVerifier``.

    Raises:
        ValueError: If the package is not installed.
    """

    def __init__(
        self, column: str = "answer", missing: Missing = "error", pattern: Patterns = None
    ) -> None:
        super().__init__(column, missing, pattern)
        self.counts = {"unreadable_answers": 0}
        try:
            import math_verify  # noqa: F401
        except ImportError as error:
            raise ValueError(
                "MathVerify needs the math-verify package: pip install gspo_lightning[math]"
            ) from error

    def __call__(self, rows: list[dict], completions: list[str]) -> list[float | None]:
        """1 or 0 for each of B completions, None where the answer is missing or unreadable."""
        self.counts = {"unreadable_answers": 0}
        # math-verify warns in every process that it has no time limit of its own
        logging.getLogger("math_verify").setLevel(logging.ERROR)
        return super().__call__(rows, completions)

    def equal(self, answer: Any, text: str) -> bool | None:
        from math_verify import verify

        right = read_answer(str(answer))
        if not right:
            self.counts["unreadable_answers"] += 1
            return None
        found = read_result(text)
        return bool(found) and verify(right, found, timeout_seconds=None)


class RegexMatch:
    r"""1 where a regular expression matches, for a format of one's own.

    Args:
        pattern: Regular expression; ``.`` matches line ends, too.
        where: ``full``: the whole completion, white space at both ends aside; ``search``: anywhere.

    Raises:
        ValueError: If ``pattern`` is no regular expression.

    >>> RegexMatch(r"\d+ apples")([{}] * 2, [" 3 apples\n", "3 apples and a pear"])
    [1.0, 0.0]
    """

    def __init__(self, pattern: str, where: Literal["full", "search"] = "full") -> None:
        self.pattern = compile_pattern("RegexMatch", pattern)
        self.where = where

    def __call__(self, rows: list[dict], completions: list[str]) -> list[float | None]:
        match = self.pattern.fullmatch if self.where == "full" else self.pattern.search
        texts = (text.strip() if self.where == "full" else text for text in completions)
        return [float(match(text) is not None) for text in texts]


class TagFormat:
    """1 where the completion is these tags, each once and in this order, and nothing outside them.

    White space may stand between and around the tags; what they enclose is free, but holds none of
    the tags itself.

    Args:
        tags: Names of the tags, without brackets.
        text_after: Whether any text may follow the last tag: an answer without tags of its own.
        opened: Whether the prompt ends in the first tag already, as some chat templates have it.

    Raises:
        ValueError: If there is no tag, or a name occurs twice.

    >>> text = "<think>7+9=16</think> <answer>16</answer>"
    >>> TagFormat()([{}] * 3, [text, f"well, {text}", f"{text}<answer>17</answer>"])
    [1.0, 0.0, 0.0]
    >>> TagFormat(["think"], text_after=True, opened=True)([{}] * 2, ["7+9</think> 16", "16"])
    [1.0, 0.0]
    """

    def __init__(
        self,
        tags: Sequence[str] = ("think", "answer"),
        text_after: bool = False,
        opened: bool = False,
    ) -> None:
        self.marks = tag_marks(type(self).__name__, tags)
        blocks = [re.escape(f"<{tag}>") + ".*" + re.escape(f"</{tag}>") for tag in tags]
        rest = ".*" if text_after else r"\s*"
        self.form = re.compile(r"\s*" + r"\s*".join(blocks) + rest, re.DOTALL)
        self.given = self.marks[0] if opened else ""

    def __call__(self, rows: list[dict], completions: list[str]) -> list[float | None]:
        return [float(self._follows(self.given + text)) for text in completions]

    def _follows(self, text: str) -> bool:
        once = all(text.count(mark) == 1 for mark in self.marks)
        return once and self.form.fullmatch(text) is not None


class TagCount:
    """Share of the opening and closing tags that stand in the completion exactly once.

    The soft way to ``TagFormat``: a policy that has never kept the format gets something for each
    tag, wherever it stands.

    Args:
        tags: Names of the tags, without brackets.
        opened: Whether the prompt ends in the first tag already, as some chat templates have it.

    Raises:
        ValueError: If there is no tag, or a name occurs twice.

    >>> TagCount()([{}] * 2, ["<think>7+9</think> 16", "</think></think><answer>16</answer>"])
    [0.5, 0.5]
    """

    def __init__(self, tags: Sequence[str] = ("think", "answer"), opened: bool = False) -> None:
        self.marks = tag_marks(type(self).__name__, tags)
        self.given = self.marks[0] if opened else ""

    def __call__(self, rows: list[dict], completions: list[str]) -> list[float | None]:
        return [self._share(self.given + text) for text in completions]

    def _share(self, text: str) -> float:
        return sum(text.count(mark) == 1 for mark in self.marks) / len(self.marks)


def tag_marks(owner: str, tags: Sequence[str]) -> list[str]:
    """Opening and closing mark of each tag, in order."""
    if isinstance(tags, str) or not tags or len(set(tags)) < len(tags):
        raise ValueError(f"{owner}.tags must be different names, at least one, got {tags!r}")
    return [mark for tag in tags for mark in (f"<{tag}>", f"</{tag}>")]


class ValidJSON:
    """1 where the completion is JSON and, if keys are asked for, an object that has them.

    Strict JSON: no comments, no NaN, no text around it, no code fence; white space aside.

    Args:
        required: Keys that the object must have.

    >>> ValidJSON(required=["city"])([{}] * 3, ['{"city": "Rome"}', '{"town": "Rome"}', "Rome"])
    [1.0, 0.0, 0.0]
    """

    def __init__(self, required: Sequence[str] = ()) -> None:
        self.required = set(required)

    def __call__(self, rows: list[dict], completions: list[str]) -> list[float | None]:
        return [float(self._valid(text)) for text in completions]

    def _valid(self, text: str) -> bool:
        try:
            value = json.loads(text, parse_constant=refuse_constant)
        except (ValueError, RecursionError):  # a policy may well open ten thousand brackets
            return False
        return not self.required or (isinstance(value, dict) and value.keys() >= self.required)


def refuse_constant(name: str) -> None:
    """NaN and Infinity are no JSON, though Python reads them."""
    raise ValueError(f"{name} is no JSON")


def compile_patterns(owner: str, pattern: Patterns) -> list[re.Pattern[str]] | None:
    """The expressions of a verifier, in their order; None for none."""
    if pattern is None:
        return None
    texts = [pattern] if isinstance(pattern, str) else pattern
    if not texts:
        raise ValueError(f"{owner}.pattern is an empty list; null judges the whole completion")
    return [compile_pattern(owner, text) for text in texts]


def compile_pattern(owner: str, pattern: str) -> re.Pattern[str]:
    """A regular expression, or one line that says whose is broken and why."""
    try:
        return re.compile(pattern, re.DOTALL)
    except re.error as error:
        text = f"{owner}.pattern {pattern!r} is no regular expression: {error}"
        raise ValueError(text) from error
