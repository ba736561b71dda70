"""How a mini-batch is cut: every row once, no limit passed, prompts paid once."""

import random

import pytest

from gspo_lightning.micro_batches import cut_rows

PROMPTS = [10, 10, 10, 4, 4, 4, 7, 7, 7]
LENGTHS = [5, 3, 1, 9, 2, 5, 8, 8, 8]


def cost(piece, group_size=3):
    """Tokens of a piece: each of its groups' prompts once."""
    groups = {row // group_size for row in piece}
    prompts = sum(PROMPTS[group * group_size] for group in groups)
    return prompts + sum(LENGTHS[row] for row in piece)


def test_without_a_token_limit_rows_stay_in_order():
    assert cut_rows(PROMPTS, LENGTHS, 3, 4, None) == [[0, 1, 2, 3], [4, 5, 6, 7], [8]]
    assert cut_rows(PROMPTS, LENGTHS, 3, None, None) == [[*range(9)]]


def test_groups_stay_whole_where_they_fit():
    # by hand: the groups cost 19, 20 and 31; the longest text is of group 0 and 2, 15 tokens
    assert cut_rows(PROMPTS, LENGTHS, 3, None, 50) == [[0, 1, 2, 6, 7, 8], [3, 4, 5]]
    assert cut_rows(PROMPTS, LENGTHS, 3, None, 31) == [[0, 1, 2], [6, 7, 8], [3, 4, 5]]
    # no room for 31: its rows are cut, and its prompt is paid again
    assert cut_rows(PROMPTS, LENGTHS, 3, None, 25) == [[0, 1, 2], [6, 7], [8], [3, 4, 5]]


def test_both_limits_hold():
    assert cut_rows(PROMPTS, LENGTHS, 3, 3, 50) == [[0, 1, 2], [6, 7, 8], [3, 4, 5]]
    assert [len(piece) for piece in cut_rows(PROMPTS, LENGTHS, 3, 2, 50)] == [2, 2, 2, 2, 1]


@pytest.mark.parametrize("tokens", [1, 12, 20, 33, 40, 100])
@pytest.mark.parametrize("size", [None, 1, 2, 5])
def test_every_row_is_there_once_and_only_single_rows_pass_the_limit(size, tokens):
    pieces = cut_rows(PROMPTS, LENGTHS, 3, size, tokens)
    assert sorted(row for piece in pieces for row in piece) == [*range(9)]
    assert all(piece and len(piece) <= (size or 9) for piece in pieces)
    assert all(cost(piece) <= tokens or len(piece) == 1 for piece in pieces)


def test_texts_of_similar_length_meet():
    """Where rows are padded, that is the padding."""
    lengths = [*range(1, 33)]
    random.Random(0).shuffle(lengths)
    pieces = cut_rows([3] * 32, lengths, 1, None, 64)
    padding = sum(max(lengths[i] for i in p) * len(p) - sum(lengths[i] for i in p) for p in pieces)
    assert padding < 0.1 * sum(lengths)


@pytest.mark.parametrize(("size", "tokens", "name"), [(0, None, "size"), (None, 0, "tokens")])
def test_a_limit_below_one_is_named(size, tokens, name):
    with pytest.raises(ValueError, match=f"micro_batch_{name} must be at least 1, got 0"):
        cut_rows(PROMPTS, LENGTHS, 3, size, tokens)
