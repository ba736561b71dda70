"""What becomes of a reward function that fails: a stop, lost rows, or another call."""

import math
from contextlib import nullcontext

import pytest
import torch
from torch import tensor

from gspo_lightning.rewards import calls as reward_calls
from gspo_lightning.rewards.terms import RewardError, RewardTerm, count_names, score
from gspo_lightning.rewards.time_limit import TimeLimit
from gspo_lightning.tally import RolloutTally
from support.reward_functions import by_command, digits
from support.tiny_run import outputs_of

NAN, INF = math.nan, math.inf
ROWS = [{"prompt": "a"}, {"prompt": "b"}, {"prompt": "c"}]
TEXTS = ["one", "two", "six"]


@pytest.fixture
def pauses(monkeypatch):
    """Nobody waits; the pauses asked for."""
    asked = []
    monkeypatch.setattr(reward_calls.time, "sleep", asked.append)
    return asked


def raises(rows, texts):
    if "two" in texts:
        raise KeyError("two")
    return [1.0] * len(texts)


def gives(values):
    """A function that gives these values for all texts, and for one of them its own."""
    by_text = dict(zip(TEXTS, values, strict=False))
    return lambda rows, texts: values if len(texts) > 1 else [by_text.get(texts[0], 0.0)]


def wrong_count(rows, texts):
    return [1.0] * (2 if "two" in texts else len(texts))


def always_two(rows, texts):
    return [1.0] * 2


# fault: the function, rows that `skip` loses, what `stop` says
FAULTS = {
    "raises": (raises, [1], r"'x' failed: KeyError: 'two' .*row with prompt 'b', completion 'two'"),
    "gives text": (gives([1.0, "good", 1.0]), [1], "no number: .*for the completion 'two'"),
    "gives a list": (gives([1.0, [2.0], 1.0]), [1], "no number: .*for the completion 'two'"),
    "gives tensors": (gives([1.0, torch.ones(2), 1.0]), [1], "no number: .*completion 'two'"),
    "gives infinity": (gives([1.0, INF, 1.0]), [1], "gave inf for the completion 'two'"),
    "gives too much": (gives([1.0, 1e39, 1.0]), [1], r"gave 1e\+39 for the completion 'two'"),
    "gives a giant": (gives([1.0, 10**400, 1.0]), [1], "no number: int too large"),
    "gives an error": (gives([1.0, OSError("no"), 1.0]), [1], "failed: no; for the compl.* 'two'"),
    "too few": (wrong_count, [1], "'x' gave 2 values for 3 completions; give one for each"),
    "too few for any": (always_two, [0, 1, 2], "'x' gave 2 values for 3 completions"),
    "None for all": (
        lambda r, t: None,
        [0, 1, 2],
        "'x' failed: gave NoneType instead of a list of numbers, one a completion; row",
    ),
    "a text for all": (lambda r, t: "111", [0, 1, 2], "gave str instead of a list of numbers"),
    "a number for all": (
        lambda r, t: 1.0,
        [0, 1, 2],
        "gave float instead of a list of numbers, one a completion; row with",
    ),
    "a dict for all": (lambda r, t: {1: 1.0}, [0, 1, 2], "gave dict instead of a list"),
}
ANSWERS = {
    "NaN": (gives([1.0, NAN, 1.0]), [1]),
    "None": (gives([1.0, None, 1.0]), [1]),
    "numbers of other types": (gives(tensor([1, 0, 1])), []),
    "a generator": (lambda rows, texts: (1.0 for _ in texts), []),
}


@pytest.mark.parametrize("name", FAULTS)
def test_stop_ends_with_a_line_about_the_fault(name):
    fn, _, message = FAULTS[name]
    with pytest.raises(RewardError, match=message) as caught:
        score({"x": RewardTerm(fn)}, ROWS, TEXTS)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", FAULTS)
def test_skip_loses_the_rows_that_fail_and_no_others(name):
    fn, lost, _ = FAULTS[name]
    terms = {"x": RewardTerm(fn, on_error="skip"), "other": RewardTerm(lambda r, t: [1.0] * len(t))}
    with pytest.warns(
        UserWarning, match=f"^{len(lost)} of 3 completions get no reward: reward 'x'"
    ):
        scores = score(terms, ROWS, TEXTS)
    # also where another term gives one: the sum of fewer terms would be compared with whole ones
    assert scores.total.isnan().nonzero().flatten().tolist() == lost
    assert (scores.total[~scores.total.isnan()] == 2.0).all()
    assert scores.counts == {"x_errors": len(lost)}
    score(terms, ROWS, TEXTS)  # warned of once; warnings are errors here


@pytest.mark.parametrize("name", ANSWERS)
@pytest.mark.parametrize("on_error", ["stop", "skip"])
def test_answers_are_no_errors(name, on_error):
    fn, missing = ANSWERS[name]
    scores = score({"x": RewardTerm(fn, on_error=on_error)}, ROWS, TEXTS)
    assert scores.total.isnan().nonzero().flatten().tolist() == missing
    assert scores.counts.get("x_errors", 0) == 0


def test_what_fails_only_together_is_scored_alone():
    def alone(rows, texts):
        if len(texts) > 1:
            raise RuntimeError("one at a time")
        return [float(len(texts[0]))]

    term = RewardTerm(alone, on_error="skip")
    with pytest.warns(UserWarning, match="'x' is called with one completion at a time: .*one at a"):
        scores = score({"x": term}, ROWS, ["a", "bb", "ccc"])
    assert scores.total.tolist() == [1.0, 2.0, 3.0] and scores.counts == {"x_errors": 0}


def flaky(times):
    """Fails some times, then scores."""
    calls = []

    def fn(rows, texts):
        calls.append(len(texts))
        if len(calls) <= times:
            raise ConnectionError("busy")
        return [1.0] * len(texts)

    fn.calls = calls
    return fn


def test_retry_calls_again_after_growing_pauses(pauses):
    fn = flaky(2)
    scores = score({"x": RewardTerm(fn, on_error="retry 3")}, ROWS, TEXTS)
    assert scores.total.tolist() == [1.0] * 3 and scores.counts == {"x_retries": 2}
    assert fn.calls == [3, 3, 3] and pauses == [1.0, 2.0]


def test_retry_also_repeats_a_call_that_gave_the_wrong_count(pauses):
    answers = [[1.0], [1.0, 2.0, INF], [1.0, 2.0, 3.0]]
    term = RewardTerm(lambda rows, texts: answers.pop(0), on_error="retry 2")
    assert score({"x": term}, ROWS, TEXTS).total.tolist() == [1.0, 2.0, 3.0]


def test_retries_that_are_used_up_stop_and_say_how_often_it_was_called(pauses):
    with pytest.raises(RewardError, match=r"failed: KeyError: 'two' .*; called 3 times"):
        score({"x": RewardTerm(raises, on_error="retry 2")}, ROWS, TEXTS)
    assert pauses == [1.0, 2.0]


def test_retries_that_are_used_up_may_skip(pauses):
    term = RewardTerm(raises, on_error="retry 1, then skip")
    with pytest.warns(UserWarning, match="1 of 3 completions get no reward"):
        scores = score({"x": term}, ROWS, TEXTS)
    assert scores.counts == {"x_errors": 1, "x_retries": 1} and pauses == [1.0]
    assert scores.total.isnan().tolist() == [False, True, False]


@pytest.mark.parametrize("text", ["skp", "retry", "retry 0", "retry -1", "retry 2, then stop", ""])
def test_an_unknown_policy_is_refused(text):
    with pytest.raises(ValueError, match="on_error must be stop, skip, `retry N` or"):
        RewardTerm(raises, on_error=text)


def test_every_count_has_a_place_in_the_tally():
    terms = {
        policy: RewardTerm(raises, on_error=policy)
        for policy in ("stop", "skip", "retry 1", "retry 1, then skip")
    }
    names = ["skip_errors", "retry 1_retries", "retry 1, then skip_errors"]
    assert count_names(terms) == [*names, "retry 1, then skip_retries"]
    assert f"reward/{names[0]}" in RolloutTally(terms, count_names(terms)).totals


def test_a_sum_that_is_too_large_names_the_term_that_makes_it_so():
    terms = {"small": RewardTerm(lambda r, t: [1.0] * 3)}
    terms["big"] = RewardTerm(lambda r, t: [1e30] * 3, weight=1e30)
    with pytest.raises(RewardError, match="no longer finite") as caught:
        score(terms, ROWS, TEXTS)
    assert caught.value.term == "big"


# --- in a run ------------------------------------------------------------------------------------


def no_odd(rows, texts):
    """Fails on texts that begin with an odd digit."""
    if any(text[:1] in {"1", "3", "5", "7", "9"} for text in texts):
        raise ValueError("odd")
    return digits(rows, texts)


def test_lost_rows_teach_nothing_and_are_counted(tmp_path, model_dir):
    rewards = {"no_odd": RewardTerm(no_odd, on_error="skip"), "digits": RewardTerm(digits)}
    with pytest.warns(UserWarning, match="of 16 completions get no reward: reward 'no_odd' failed"):
        (outputs,) = outputs_of(tmp_path, model_dir, rewards=rewards)
    odd = [text[:1] in {"1", "3", "5", "7", "9"} for text in outputs["rollout"].texts]
    assert 0 < sum(odd) < 16
    assert outputs["rollout"].rewards.isnan().tolist() == odd
    assert (outputs["rollout"].advantages[odd] == 0).all()
    assert outputs["metrics"]["reward/missing"] == sum(odd)
    assert outputs["metrics"]["reward/no_odd_errors"] == sum(odd)
    assert "reward/digits_errors" not in outputs["metrics"]


def nothing(rows, texts):
    raise ValueError("down")


def test_a_rollout_whose_rewards_are_all_lost_moves_no_figure_to_nan(tmp_path, model_dir):
    rewards = {"down": RewardTerm(nothing, on_error="skip")}
    with pytest.warns(UserWarning, match="16 of 16 completions get no reward"):
        (outputs,) = outputs_of(tmp_path, model_dir, rewards=rewards)
    assert outputs["metrics"]["reward/missing"] == 16
    assert all(math.isfinite(value) for value in outputs["metrics"].values())


@pytest.mark.parametrize(
    ("command", "missing", "errors"),
    [
        ("raise", True, 1),
        ("exit", True, 1),
        ("sleep", True, 1),  # and counted as a timeout
        ("none", True, 0),
        ("", False, 0),
    ],
)
def test_under_a_time_limit_each_way_to_fail_costs_its_own_row(command, missing, errors):
    limit = TimeLimit(by_command, 0.5)
    try:
        with pytest.warns(UserWarning) if missing and command != "none" else nullcontext():
            terms = {"x": RewardTerm(limit, on_error="skip")}
            scores = score(terms, [{}] * 3, ["", command, ""])
    finally:
        limit.release()
    assert scores.total.isnan().tolist() == [False, missing, False]
    assert scores.counts == {"x_timeouts": int(command == "sleep"), "x_errors": errors}
