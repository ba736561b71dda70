"""Reward terms that look at the form of a completion, not at what is right.

Decides how length, repetition and language are measured in a text: rules that a person can check by
eye; where no right answer exists, a frozen reward model is the serious way. Lengths are those of
the decoded text; the penalty for coming close to the limit in *tokens* is the module's
``overlong_ramp``.
"""

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
