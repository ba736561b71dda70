"""Reward terms that look at the form of a completion, not at what is right.

Decides how length, repetition and language are measured in a text: rules that a person can check by
eye; where no right answer exists, a frozen reward model is the serious way. Lengths are those of
the decoded text; the penalty for coming close to the limit in *tokens* is the module's
``overlong_ramp``.
"""

import math
from collections.abc import Callable, Sequence
from typing import Literal

from gspo_lightning.bounds import check_at_least

Unit = Literal["words", "characters"]


def pieces(text: str, unit: Unit) -> list[str]:
    """Words (separated by white space) or characters; languages without spaces need the latter."""
    return text.split() if unit == "words" else list(text)


class LengthBonus:
    """min(length / target, 1): grows with the length of the text up to a target.

    Args:
        target: Length that earns the whole bonus, in ``unit``, >= 1.
        unit: What is counted.

    >>> LengthBonus(target=4)([{}] * 3, ["", "one two", "a b c d e"])
    [0.0, 0.5, 1.0]
    """

    def __init__(self, target: int, unit: Unit = "words") -> None:
        check_at_least(1, "LengthBonus.", target=target)
        self.target = target
        self.unit = unit

    def __call__(self, rows: list[dict], completions: list[str]) -> list[float | None]:
        return [min(len(pieces(text, self.unit)) / self.target, 1.0) for text in completions]


class SoftOverlong:
    """0 up to ``limit - ramp``, then a straight line down to -1 at ``limit`` and beyond.

    Args:
        limit: Length of the full penalty, in ``unit``.
        ramp: Width of the slope, in ``unit``, 1 <= ramp <= limit.
        unit: What is counted.

    Source:
        DAPO, arXiv:2503.14476, "Overlong Reward Shaping", there in tokens.

    >>> SoftOverlong(limit=4, ramp=2)([{}] * 3, ["a b", "a b c", "a b c d e"])
    [0.0, -0.5, -1.0]
    """

    def __init__(self, limit: int, ramp: int, unit: Unit = "words") -> None:
        if not 1 <= ramp <= limit:
            raise ValueError(f"SoftOverlong.ramp must be in [1, limit = {limit}], got {ramp}")
        self.limit = limit
        self.ramp = ramp
        self.unit = unit

    def __call__(self, rows: list[dict], completions: list[str]) -> list[float | None]:
        # Imported here: the other terms also run in worker processes, which start without torch.
        import torch

        from gspo_lightning.rewards.terms import overlong_penalty

        lengths = torch.tensor([len(pieces(text, self.unit)) for text in completions])
        return overlong_penalty(lengths, self.limit, self.ramp).tolist()


class CosineLength:
    """A verifier's verdict, moved by the length of the text along half a cosine.

    ``limit_value + (short_value - limit_value) * (1 + cos(pi * length / limit)) / 2``, with the two
    values of ``right`` or of ``wrong``. A right text is worth most when it is short; a wrong one
    costs least when it is long, which leaves room to think. A verdict between 0 and 1 lies as far
    between both curves.

    Args:
        fn: The verifier, with verdicts in [0, 1]; where it gives ``None``, so does this.
        limit: Length at which the curves end, in ``unit``, >= 1.
        unit: What is counted.
        right: Values of a right text without length and at ``limit``.
        wrong: Values of a wrong text without length and at ``limit``.
        exceeded: Value of a text of ``limit`` or longer, right or wrong; ``None`` stays at the end
            of the curve.

    Source:
        "Demystifying Long Chain-of-Thought Reasoning in LLMs", arXiv:2502.03373, the cosine reward
        (r_0, r_L and r_e are the two values and ``exceeded``), there in tokens.

    >>> ten_words = "ten words of which no one knows whether they matter"
    >>> CosineLength(lambda rows, texts: [1.0, 0.0], limit=20)([{}] * 2, [ten_words] * 2)
    [0.75, -0.75]
    """

    def __init__(
        self,
        fn: Callable[[list[dict], list[str]], Sequence[float | None]],
        limit: int,
        unit: Unit = "words",
        right: tuple[float, float] = (1.0, 0.5),
        wrong: tuple[float, float] = (-1.0, -0.5),
        exceeded: float | None = None,
    ) -> None:
        check_at_least(1, "CosineLength.", limit=limit)
        values = {"right": right, "wrong": wrong, "exceeded": (exceeded or 0.0,)}
        for name, numbers in values.items():
            if not all(map(math.isfinite, numbers)):
                raise ValueError(f"CosineLength.{name} must be finite, got {numbers}")
        self.fn = fn
        self.limit = limit
        self.unit = unit
        self.right = right
        self.wrong = wrong
        self.exceeded = exceeded
        self.column = getattr(fn, "column", None)
        self.check_row = getattr(fn, "check_row", None)

    @property
    def counts(self) -> dict[str, float]:
        """What the verifier counts."""
        return getattr(self.fn, "counts", {})

    def __call__(self, rows: list[dict], completions: list[str]) -> list[float | Exception | None]:
        verdicts = self.fn(rows, completions)
        return [self._value(*pair) for pair in zip(verdicts, completions, strict=True)]

    def _value(self, verdict: float | Exception | None, text: str) -> float | Exception | None:
        if verdict is None or isinstance(verdict, Exception):
            return verdict
        if not 0 <= verdict <= 1:
            return ValueError(f"CosineLength.fn gave {verdict}, which is no verdict in [0, 1]")
        length = len(pieces(text, self.unit))
        if self.exceeded is not None and length >= self.limit:
            return self.exceeded
        cosine = (1 + math.cos(math.pi * min(length / self.limit, 1.0))) / 2
        right, wrong = (end + (short - end) * cosine for short, end in (self.right, self.wrong))
        return verdict * right + (1 - verdict) * wrong


class RepetitionPenalty:
    """-(1 - distinct / all) over the n-grams of the text: minus the share that came before.

    0 where no n-gram occurs twice and where there are fewer than two of them; near -1 for a text
    that repeats itself without end. Case is ignored.

    Args:
        n: Pieces per n-gram, >= 1.
        unit: What is counted.

    Source:
        One minus distinct-n, arXiv:1510.03055, with n-grams instead of words below the line.

    >>> RepetitionPenalty(n=2)([{}] * 2, ["a b c a b", "no no no no no"])
    [-0.25, -0.75]
    """

    def __init__(self, n: int = 3, unit: Unit = "words") -> None:
        check_at_least(1, "RepetitionPenalty.", n=n)
        self.n = n
        self.unit = unit

    def __call__(self, rows: list[dict], completions: list[str]) -> list[float | None]:
        return [self._penalty(pieces(text.lower(), self.unit)) for text in completions]

    def _penalty(self, parts: list[str]) -> float:
        grams = [tuple(parts[i : i + self.n]) for i in range(len(parts) - self.n + 1)]
        return len(set(grams)) / len(grams) - 1.0 if grams else 0.0


def same_language(rows: list[dict], completions: list[str]) -> list[float | None]:
    """Share of a completion's letters that belong to the language of its prompt.

    Args:
        rows: Rows with a column ``language``, ``zh`` or ``en``; another language gives ``None``.

    Returns:
        Shares in [0, 1]; 0 for a text without letters.

    >>> same_language([{"language": "zh"}] * 2, ["你好ab", "hello"])
    [0.5, 0.0]
    """
    scores: list[float | None] = []
    for row, text in zip(rows, completions, strict=True):
        chinese = sum("\u4e00" <= char <= "\u9fff" for char in text)
        latin = sum(char.isascii() and char.isalpha() for char in text)
        counts = {"zh": chinese, "en": latin}
        letters = max(chinese + latin, 1)
        language = row.get("language")
        scores.append(counts[language] / letters if language in counts else None)
    return scores


def variety(rows: list[dict], completions: list[str]) -> list[float | None]:
    """Share of a completion's runs of three characters that are different from one another.

    Returns:
        Shares in (0, 1], 1 if nothing is repeated; 0 for fewer than three characters.

    >>> variety([{}] * 2, ["abcabc", "no"])
    [0.75, 0.0]
    """
    runs = [[text[i : i + 3] for i in range(len(text) - 2)] for text in completions]
    return [len(set(found)) / len(found) if found else 0.0 for found in runs]
