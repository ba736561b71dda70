import math

import pytest
import torch

from gspo_lightning.rewards import MarkedAnswer, RewardTerm, overlong_penalty, score


def term(values, weight=1.0):
    return RewardTerm(lambda rows, texts: values, weight)


def test_total_is_the_weighted_sum_and_parts_stay_raw():
    # fact 32
    scores = score({"a": term([1.0, 0.0], 2.0), "b": term([0.5, 3.0], -1.0)}, [{}] * 2, ["x", "y"])
    assert scores.total.tolist() == [1.5, -3.0]
    assert scores.parts["a"].tolist() == [1.0, 0.0] and scores.parts["b"].tolist() == [0.5, 3.0]


def test_a_term_that_does_not_apply_is_left_out_of_the_sum():
    scores = score({"a": term([None, 1.0]), "b": term([2.0, 2.0])}, [{}] * 2, ["x", "y"])
    assert scores.total.tolist() == [2.0, 3.0]
    assert scores.parts["a"].isnan().tolist() == [True, False]


def test_a_row_without_any_term_or_with_nan_has_no_reward():
    # fact 30
    scores = score({"a": term([None, math.nan, 1.0]), "b": term([None, 1.0, 1.0])}, [{}] * 3, "xyz")
    assert scores.total.isnan().tolist() == [True, True, False]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ([1.0], "reward 'speed' gave 1 values for 2 completions"),
        ([1.0, math.inf], "reward 'speed' gave inf for the completion 'second'"),
        ([1.0, "much"], "reward 'speed' gave something that is no number"),
    ],
)
def test_a_broken_term_is_named(values, message):
    with pytest.raises(ValueError, match=message):
        score({"speed": term(values)}, [{}] * 2, ["first", "second"])


def test_a_weight_must_be_finite():
    with pytest.raises(ValueError, match="weight must be finite, got nan"):
        term([1.0], math.nan)


@pytest.mark.parametrize(
    ("completion", "reward"),
    [
        ("answer: 12", 1.0),
        ("5+7=12, answer: 12", 1.0),
        ("answer: 12 ", 1.0),
        ("answer: 3, answer: 12", 1.0),  # the last one counts
        ("answer: 12, answer: 3", 0.0),
        ("answer: 123", 0.0),
        ("12", 0.0),
        ("", 0.0),
    ],
)
def test_marked_answer(completion, reward):
    assert MarkedAnswer("answer: ")([{"answer": 12}], [completion]) == [reward]


def test_marked_answer_names_a_row_without_answer():
    with pytest.raises(ValueError, match="prompt '1\\+1=' has no column 'answer'"):
        MarkedAnswer()([{"prompt": "1+1="}], ["answer: 2"])


@pytest.mark.parametrize(("length", "expected"), [(6, 0.0), (7, -0.25), (10, -1), (99, -1)])
def test_overlong_penalty_is_a_ramp(length, expected):
    assert overlong_penalty(torch.tensor([length]), max_length=10, ramp=4).item() == expected


def test_overlong_penalty_never_rewards_length():
    penalty = overlong_penalty(torch.arange(50), max_length=40, ramp=7)
    assert (penalty.diff() <= 0).all()


def test_overlong_penalty_names_the_bad_argument():
    with pytest.raises(ValueError, match="ramp must be in"):
        overlong_penalty(torch.tensor([1]), max_length=10, ramp=0)
