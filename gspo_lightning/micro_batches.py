"""Cut the rows of a mini-batch into pieces that fit into memory.

Decides which rows share a forward and backward pass. That never changes a gradient: weights are
made for the whole mini-batch before.
"""

from collections.abc import Sequence


def cut_rows(
    prompts: Sequence[int],
    lengths: Sequence[int],
    group_size: int,
    size: int | None,
    tokens: int | None,
) -> list[list[int]]:
    """Cut rows into pieces of limited size.

    Without a limit on tokens rows stay in order. With one, groups are taken from the longest to the
    shortest, so that rows of similar length meet, and stay whole if they fit.

    Args:
        prompts: Prompt tokens of each row, length B.
        lengths: Completion tokens of each row, length B.
        group_size: Rows g * G to g * G + G - 1 share a prompt.
        size: Rows of a piece at most; ``None`` is no limit.
        tokens: Tokens of a piece at most, a prompt that rows of a group share counted once;
            ``None`` is no limit. A row that is longer than that makes a piece of its own.

    Returns:
        Row numbers of each piece; together every row exactly once.

    Raises:
        ValueError: If a limit is below 1.

    >>> cut_rows([9, 9, 2, 2], [1, 1, 5, 7], group_size=2, size=None, tokens=15)
    [[0, 1], [2, 3]]
    >>> cut_rows([9, 9, 2, 2], [1, 1, 5, 7], group_size=2, size=None, tokens=11)
    [[0, 1], [3], [2]]
    """
    for name, limit in {"size": size, "tokens": tokens}.items():
        if limit is not None and limit < 1:
            raise ValueError(f"micro_batch_{name} must be at least 1, got {limit}")
    rows = range(len(lengths))
    most = size or len(lengths)
    if tokens is None:
        return [list(rows[start : start + most]) for start in range(0, len(rows), most)]
    groups = [rows[start : start + group_size] for start in range(0, len(rows), group_size)]
    groups.sort(key=lambda group: -prompts[group[0]] - max(lengths[row] for row in group))

    pieces: list[list[int]] = []
    used = tokens + 1  # tokens of the last piece: as if full, so that the first rows open a piece

    def open_piece() -> None:
        nonlocal used
        pieces.append([])
        used = 0

    def fits(cost: int, count: int) -> bool:
        return used + cost <= tokens and len(pieces[-1]) + count <= most

    for group in groups:
        prompt = prompts[group[0]]
        cost = prompt + sum(lengths[row] for row in group)
        if (
            cost <= tokens and len(group) <= most
        ):  # the group stays whole, in this piece or the next
            if not pieces or not fits(cost, len(group)):
                open_piece()
            pieces[-1] += group
            used += cost
            continue
        paid = False  # whether the prompt is in the last piece
        for row in sorted(group, key=lambda row: -lengths[row]):
            if not pieces or not fits(lengths[row] + (0 if paid else prompt), 1):
                open_piece()
                paid = False
            pieces[-1].append(row)
            used += lengths[row] + (0 if paid else prompt)
            paid = True
    return pieces
