"""Verifiers of words: the letter of a multiple choice, and words shared with a reference answer.

Decides which letter a text has chosen, and what two answers in words have in common.
"""

import re
import string
import unicodedata
from collections import Counter
from collections.abc import Mapping
from typing import Any, Literal

from gspo_lightning.rewards.text_rewards import Unit, pieces
from gspo_lightning.rewards.verifiers import AnswerVerifier, Missing, Patterns


class ChoiceLetter(AnswerVerifier):
    r"""1 where the completion chooses the answer's letter; see ``chosen``.

    Args:
        column: Column with the right letter: ``B``, ``(b)``, ``B. Rome``.
        letters: The letters that can be chosen.
        missing: ``error`` or ``skip`` for a row without the column.
        pattern: Finds the part that is judged; see ``AnswerVerifier``.

    Raises:
        ValueError: If ``letters`` are not different letters, or an answer begins with none of them.

    >>> texts = ["The answer is (B).", r"\boxed{\text{B}}", "A guess: (B)", "(A) or (B)", "B or C"]
    >>> ChoiceLetter()([{"answer": "B"}] * 5, texts)
    [1.0, 1.0, 1.0, 0.0, 0.0]
    """

    def __init__(
        self,
        column: str = "answer",
        letters: str = "ABCDE",
        missing: Missing = "error",
        pattern: Patterns = None,
    ) -> None:
        super().__init__(column, missing, pattern)
        self.letters = letters.upper()
        if not letters.isalpha() or len(set(self.letters)) < len(letters):
            raise ValueError(f"ChoiceLetter.letters must be different letters, got {letters!r}")

    def right(self, answer: Any) -> str:
        """The letter of the answer; an answer without one is an error."""
        right = re.match(rf"\W*([{self.letters}])(?!\w)", str(super().right(answer)), re.IGNORECASE)
        if right is None:
            raise ValueError(
                f"the answer {answer!r} begins with none of the letters {self.letters}"
            )
        return right[1].upper()

    def equal(self, answer: Any, text: str) -> bool:
        return chosen(text, self.letters) == self.right(answer)


def chosen(text: str, letters: str) -> str | None:
    r"""The letter that a text chooses; None if it chooses none, or hesitates between two.

    The first of these that is there decides, and of several the last one: a letter in ``\boxed``;
    behind "answer", "answer is", "answer:"; alone in the last line; marked, if it is the only one
    so: in brackets or bold, or before a dot or a colon at the start of a line. A letter in running
    text is a word, such as "A".

    >>> [chosen(text, "ABCD") for text in ("B. Rome", "A dog?", "The answer is A or B", "**c**")]
    ['B', None, None, 'C']
    """
    one = f"[{letters}]"
    # Runs are bounded: a policy that writes nothing but spaces must not take minutes to judge.
    before, behind = r"[\s*_(\[$]{0,9}", r"[\s*_)\].:$]{0,9}"
    # "Answer: A dog" chooses nothing, "The answer is A because" does.
    sentence = r"(?<=[AI])\s(?!because|since|as|which|is)[a-z]"
    verb = r"\s(?:is|would\sbe|should\sbe)"
    ways = [
        rf"\\boxed\{{(?:\\\w+\{{)?{before}({one})\s?[).:}}]",
        rf"(?i:\banswer(?:{verb})?|\b(?:option|choice){verb})[\s:*_>]{{0,9}}(?i:option|choice)?"
        rf"{before}(?:({one})(?![\w'])(?!{sentence})|((?i:{one})){behind}$)",
        rf"^{before}((?i:{one})){behind}\Z",
    ]
    text = text.strip()
    for way in ways:
        matches = list(re.finditer(way, text, re.MULTILINE))
        if matches:
            letter = next(filter(None, matches[-1].groups()))
            other = rf"{behind}\s?(?:or|and|/|&|,){before}{one}(?!\w)"
            return None if re.match(other, text[matches[-1].end() :]) else letter.upper()
    marked = rf"(?<![\w.])({one})[*_]{{0,3}}\)|\*\*({one})[.:]?\*\*|^{before}({one})[.:]"
    found = {"".join(groups) for groups in re.findall(marked, text, re.MULTILINE)}
    return found.pop() if len(found) == 1 else None


class WordMatch(AnswerVerifier):
    """How far the words are those of the answer, or of the one of several that fits best.

    Case, punctuation and the articles a, an, the do not count, as in the evaluation of SQuAD.

    Args:
        column: Column with the answer: a text, a list of texts, or an object with a list ``text``,
            as SQuAD has it; an empty list is a question whose right answer is no words at all.
        measure: ``f1``: the harmonic mean of the shares of both texts' words that are shared;
            ``exact``: 1 where all words are the same, in order.
        unit: ``characters`` for languages without spaces.
        missing: ``error`` or ``skip`` for a row without the column.
        pattern: Finds the part that is judged; see ``AnswerVerifier``.

    Source:
        SQuAD, arXiv:1606.05250, section 6.1 ("Exact match", "macro-averaged F1 score").

    >>> WordMatch()([{"answer": "the Eiffel Tower"}] * 3, ["Eiffel tower!", "a tower", "Rome"])
    [1.0, 0.6666666666666666, 0.0]
    """

    def __init__(
        self,
        column: str = "answer",
        measure: Literal["f1", "exact"] = "f1",
        unit: Unit = "words",
        missing: Missing = "error",
        pattern: Patterns = None,
    ) -> None:
        super().__init__(column, missing, pattern)
        self.measure = measure
        self.unit = unit

    def right(self, answer: Any) -> list[str]:
        """The texts of which one is right; an answer that is none is an error."""
        answers = answer.get("text") if isinstance(answer, Mapping) else answer
        answers = answers if isinstance(answers, list | tuple) else [answers]
        if any(isinstance(one, Mapping | list | None) for one in answers):
            raise ValueError(
                f"the answer {str(answer)[:60]!r} is neither a text nor a list of texts"
            )
        return [str(one) for one in answers] or [""]

    def equal(self, answer: Any, text: str) -> float:
        given = plain_words(text, self.unit)
        rights = [plain_words(one, self.unit) for one in self.right(answer)]
        return max(self._agree(right, given) for right in rights)

    def _agree(self, right: list[str], given: list[str]) -> float:
        if self.measure == "exact" or not right or not given:
            return float(right == given)
        shared = (Counter(right) & Counter(given)).total()
        return 2 * shared / (len(right) + len(given))


def plain_words(text: str, unit: Unit) -> list[str]:
    """The words or characters of a text in lower case, without punctuation and articles.

    >>> plain_words("The cat's (red) hat.", "words")
    ['cats', 'red', 'hat']
    """
    kept = (
        char
        for char in text.lower()
        if char not in string.punctuation and not unicodedata.category(char).startswith("P")
    )
    words = re.sub(r"\b(?:a|an|the)\b", " ", "".join(kept)).split()
    return words if unit == "words" else pieces("".join(words), unit)
