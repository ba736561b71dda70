"""Verifiers: reward functions that compare a completion with the answer in its row, or its form.

Decides what counts as equal. Every verifier gives 1 or 0, and None where it does not apply.
"""

import json
import logging
import math
import re
from collections.abc import Sequence
from decimal import Decimal
from typing import Any, Literal

Missing = Literal["error", "skip"]


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
            1 of its last match, or the whole match if it has no group; no match gives 0. ``None``
            judges the whole completion.

    Raises:
        ValueError: If ``pattern`` is no regular expression.
    """

    def __init__(
        self, column: str = "answer", missing: Missing = "error", pattern: str | None = None
    ) -> None:
        # ``column`` is what a term declares: rows are checked for it before training
        self.column = column if missing == "error" else None
        self.answer_column = column
        self.pattern = None if pattern is None else compile_pattern(type(self).__name__, pattern)

    def __call__(self, rows: list[dict], completions: list[str]) -> list[float | None]:
        """1 or 0 for each of B completions, None where there is nothing to compare with."""
        return [self._judge(row, text) for row, text in zip(rows, completions, strict=True)]

    def equal(self, answer: Any, text: str) -> bool | None:
        """Whether ``text`` gives the answer; None if the answer cannot be judged."""
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
        if self.pattern is not None:
            matches = list(self.pattern.finditer(text))
            part = matches[-1][min(self.pattern.groups, 1)] if matches else None
            if part is None:  # no match, or one in which the group took no part
                return 0.0
            text = part
        verdict = self.equal(answer, text)
        return None if verdict is None else float(verdict)


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
        pattern: str | None = None,
    ) -> None:
        super().__init__(column, missing, pattern)
        self.ignore_case = ignore_case

    def equal(self, answer: Any, text: str) -> bool:
        left, right = str(answer).strip(), text.strip()
        return left.casefold() == right.casefold() if self.ignore_case else left == right


# A minus or plus directly behind a letter, a digit or a closing bracket is an operation, no sign.
NUMBER = re.compile(
    r"(?:(?<![\w)\]}])[-+])?"
    r"(?:[0-9]{1,3}(?:,[0-9]{3})+(?![0-9])(?:\.[0-9]+)?|[0-9]+(?:\.[0-9]+)?|\.[0-9]+)"
    r"(?:[eE][-+]?[0-9]{1,3}(?![0-9]))?"
)


def last_number(text: str) -> Decimal | None:
    """The last number of a text; None if there is none.

    ``1,234.5`` is one number (commas before groups of three digits), ``1,2`` are two. A minus is a
    sign unless it follows a letter, a digit or a closing bracket: ``10-7`` ends in 7, ``= -7`` in
    -7. ``50%`` is 50: a percent sign, like any other unit, is not part of the number. ``1/2`` ends
    in 2; fractions are for ``MathVerify``.

    >>> [str(last_number(text)) for text in ("so $1,234.50.", "10-7", "x = -7", "50%", "none")]
    ['1234.50', '7', '-7', '50', 'None']
    """
    numbers = NUMBER.findall(text.replace("\N{MINUS SIGN}", "-"))
    return Decimal(numbers[-1].replace(",", "")) if numbers else None


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
        pattern: str | None = None,
    ) -> None:
        super().__init__(column, missing, pattern)
        if not tolerance >= 0:
            raise ValueError(f"LastNumber.tolerance must be >= 0, got {tolerance}")
        self.tolerance = tolerance

    def equal(self, answer: Any, text: str) -> bool:
        """Whether both numbers are equal, as decimals, or within the tolerance."""
        right, found = last_number(str(answer)), last_number(text)
        if right is None:
            raise ValueError(f"the answer {answer!r} holds no number")
        if found is None:
            return False
        return found == right or abs(float(found) - float(right)) <= self.tolerance > 0


class MathVerify(AnswerVerifier):
    r"""1 where math-verify finds the completion's result equal to the answer, as mathematics.

    Reads LaTeX and plain expressions (``\boxed{\frac{1}{2}}`` equals ``0.5``; ``50%`` is 0.5 here).
    A completion without a readable result gives 0. An answer that cannot be read gives None, and is
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
        self, column: str = "answer", missing: Missing = "error", pattern: str | None = None
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
        from math_verify import parse, verify

        gold = str(answer)
        if "$" not in gold and "\\boxed" not in gold:
            gold = f"${gold}$"  # LaTeX is only read between dollar signs
        right = parse(gold, parsing_timeout=None)
        if not right:
            self.counts["unreadable_answers"] += 1
            return None
        found = parse(text, parsing_timeout=None)
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

    Raises:
        ValueError: If there is no tag, or a name occurs twice.

    >>> text = "<think>7+9=16</think> <answer>16</answer>"
    >>> TagFormat()([{}] * 3, [text, f"well, {text}", f"{text}<answer>17</answer>"])
    [1.0, 0.0, 0.0]
    """

    def __init__(self, tags: Sequence[str] = ("think", "answer")) -> None:
        if not tags or len(set(tags)) < len(tags):
            raise ValueError(f"TagFormat.tags must be different names, at least one, got {tags}")
        self.marks = [mark for tag in tags for mark in (f"<{tag}>", f"</{tag}>")]
        blocks = [re.escape(f"<{tag}>") + ".*" + re.escape(f"</{tag}>") for tag in tags]
        self.form = re.compile(r"\s*" + r"\s*".join(blocks) + r"\s*", re.DOTALL)

    def __call__(self, rows: list[dict], completions: list[str]) -> list[float | None]:
        return [float(self._follows(text)) for text in completions]

    def _follows(self, text: str) -> bool:
        once = all(text.count(mark) == 1 for mark in self.marks)
        return once and self.form.fullmatch(text) is not None


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


def compile_pattern(owner: str, pattern: str) -> re.Pattern[str]:
    """A regular expression, or one line that says whose is broken and why."""
    try:
        return re.compile(pattern, re.DOTALL)
    except re.error as error:
        text = f"{owner}.pattern {pattern!r} is no regular expression: {error}"
        raise ValueError(text) from error
