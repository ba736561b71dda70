"""Terms about the form of a text, by numbers worked out by hand."""

from collections import Counter

import pytest

from gspo_lightning.rewards.terms import RewardTerm, score
from gspo_lightning.rewards.text_rewards import (
    CosineLength,
    LengthBonus,
    RepetitionPenalty,
    SoftOverlong,
)
from gspo_lightning.rewards.verifiers import LastNumber


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


def given(*verdicts):
    return lambda rows, texts: list(verdicts)


# cos(0) = 1, cos(pi / 3) = 1/2, cos(pi / 2) = 0, cos(2 pi / 3) = -1/2, cos(pi) = -1
@pytest.mark.parametrize(
    ("size", "right", "wrong"),
    [
        (0, 1.0, -1.0),
        (4, 0.875, -0.875),
        (6, 0.75, -0.75),
        (8, 0.625, -0.625),
        (12, 0.5, -0.5),
        (40, 0.5, -0.5),  # and not up again
    ],
)
def test_cosine_length(size, right, wrong):
    texts = ["word " * size] * 2
    assert CosineLength(given(1.0, 0.0), limit=12)([{}] * 2, texts) == pytest.approx([right, wrong])
    characters = CosineLength(given(1, 0), limit=12, unit="characters")
    assert characters([{}] * 2, ["x" * size] * 2) == pytest.approx([right, wrong])


def test_cosine_length_with_the_values_of_the_paper():
    # r_0 and r_L are 2 and 1 for right, -10 and 0 for wrong texts, and r_e is -10
    paper = {"right": (2.0, 1.0), "wrong": (-10.0, 0.0), "exceeded": -10.0}
    for size, values in {0: [2.0, -10.0], 5: [1.5, -5.0], 10: [-10.0] * 2}.items():
        scores = CosineLength(given(1, 0), limit=10, **paper)([{}] * 2, ["word " * size] * 2)
        assert scores == pytest.approx(values)


def test_cosine_length_is_the_reward_of_trl():
    rewards = pytest.importorskip("trl.rewards")
    pytest.importorskip("math_verify")
    theirs = rewards.get_cosine_scaled_reward(max_len=100)
    sizes = [0, 1, 30, 77, 100, 250]
    for text in (r"\boxed{2}", r"\boxed{3}"):
        expected = theirs([[{"content": text}]] * 6, ["2"] * 6, [[1] * size for size in sizes])
        ours = CosineLength(given(*[float("2" in text)] * 6), limit=100)
        assert ours([{}] * 6, ["word " * size for size in sizes]) == pytest.approx(expected)


def test_cosine_length_hands_on_what_is_no_verdict():
    slow = TimeoutError("took too long")
    scores = CosineLength(given(None, slow, 0.5), limit=4)([{}] * 3, ["a b"] * 3)
    assert scores[:2] == [None, slow] and scores[2] == pytest.approx(0.0)
    (wrong,) = CosineLength(given(2.0), limit=4)([{}], ["a"])
    assert str(wrong) == "CosineLength.fn gave 2.0, which is no verdict in [0, 1]"
    around = CosineLength(LastNumber("n"), limit=4)
    with pytest.raises(ValueError, match="holds no number"):
        around.check_row({"n": "none"})
    assert around.column == "n" and around([{"n": 3}], ["it is 3 now"]) == [0.5]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"limit": 0}, r"CosineLength\.limit must be >= 1, got 0"),
        ({"limit": 9, "right": (1.0, float("nan"))}, r"CosineLength\.right must be finite"),
        ({"limit": 9, "exceeded": float("-inf")}, r"CosineLength\.exceeded must be finite"),
    ],
)
def test_cosine_length_names_the_bad_argument(options, message):
    with pytest.raises(ValueError, match=message):
        CosineLength(given(), **options)
