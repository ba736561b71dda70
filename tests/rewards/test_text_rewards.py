"""Terms about the form of a text, by numbers worked out by hand."""

from collections import Counter

import pytest

from gspo_lightning.rewards.terms import RewardTerm, score
from gspo_lightning.rewards.text_rewards import LengthBonus, RepetitionPenalty, SoftOverlong


def one(fn, text):
    (value,) = fn([{}], [text])
    return value


@pytest.mark.parametrize(
    ("unit", "text", "expected"),
    [
        ("words", "", 0.0),
        ("words", "one", 0.25),
        ("words", "one  two\nthree", 0.75),
        ("words", "a b c d e f", 1.0),
        ("characters", "abc", 0.75),
        ("characters", "你好", 0.5),
        ("words", "你好", 0.25),
    ],
)
def test_length_bonus(unit, text, expected):
    assert one(LengthBonus(4, unit), text) == expected


@pytest.mark.parametrize(
    ("size", "expected"), [(0, 0.0), (6, 0.0), (7, -0.25), (9, -0.75), (10, -1.0), (99, -1.0)]
)
def test_soft_overlong_is_a_ramp(size, expected):
    assert one(SoftOverlong(limit=10, ramp=4), "word " * size) == expected
    assert one(SoftOverlong(limit=10, ramp=4, unit="characters"), "x" * size) == expected


@pytest.mark.parametrize(
    ("n", "text", "expected"),
    [
        (1, "a a a a", -0.75),
        (2, "a b a b a", -0.5),  # ab ba ab ba
        (2, "A b a B", -1 / 3),  # case is ignored: ab ba ab
        (2, "a b c d", 0.0),
        (3, "a b", 0.0),  # no n-gram at all
        (3, "", 0.0),
    ],
)
def test_repetition_penalty(n, text, expected):
    assert one(RepetitionPenalty(n), text) == pytest.approx(expected)


def test_repetition_penalty_is_minus_the_share_of_ngrams_that_came_before():
    text = "the cat sat on the mat and the cat sat on the hat"
    counts = Counter(text[i : i + 5] for i in range(len(text) - 4))
    repeated = sum(count - 1 for count in counts.values())
    expected = -repeated / sum(counts.values())
    assert one(RepetitionPenalty(5, "characters"), text) == pytest.approx(expected) != 0


def test_they_are_terms_of_a_sum():
    terms = {
        "long": RewardTerm(LengthBonus(2), weight=3.0),
        "again": RewardTerm(RepetitionPenalty(1), weight=2.0),
    }
    assert score(terms, [{}] * 2, ["no no", "yes"]).total.tolist() == [2.0, 1.5]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: LengthBonus(0), "LengthBonus.target must be >= 1, got 0"),
        (lambda: SoftOverlong(4, 5), r"SoftOverlong.ramp must be in \[1, limit = 4\], got 5"),
        (lambda: SoftOverlong(4, 0), "SoftOverlong.ramp must be in"),
        (lambda: RepetitionPenalty(0), "RepetitionPenalty.n must be >= 1, got 0"),
    ],
)
def test_a_bad_argument_is_named(make, message):
    with pytest.raises(ValueError, match=message):
        make()
