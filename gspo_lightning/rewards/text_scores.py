"""Simple scores of a text, for prompts that have no right answer.

Rules that a person can check by eye; a frozen reward model is the serious way.
"""


def same_language(rows: list[dict], completions: list[str]) -> list[float | None]:
    """Share of a completion's letters that belong to the language of its prompt.

    Args:
        rows: Rows with a column ``language``, ``zh`` or ``en``; another language gives ``None``.
        completions: Completion texts.

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

    Args:
        rows: Not looked at.
        completions: Completion texts.

    Returns:
        Shares in (0, 1], 1 if nothing is repeated; 0 for fewer than three characters.

    >>> variety([{}] * 2, ["abcabc", "no"])
    [0.75, 0.0]
    """
    scores: list[float | None] = []
    for text in completions:
        runs = [text[i : i + 3] for i in range(len(text) - 2)]
        scores.append(len(set(runs)) / len(runs) if runs else 0.0)
    return scores
