"""Episodes: what they are asked, in which order, and what an error or a hang of one costs."""

import asyncio
import threading
import time

import pytest

from gspo_lightning.environments import Conversations, EnvironmentReward, Turn, shown
from gspo_lightning.environments.conversations import side_by_side
from gspo_lightning.rewards.calls import RewardError
from gspo_lightning.rewards.terms import RewardTerm, score
from support.environments import Says, Step


def conversations(answer, count=4, seconds=None, max_turns=8, environment=None):
    """Rows 0, 1, ... in groups of 2; a token is a letter."""

    def read(row, ids):
        text = "".join(map(chr, ids))
        return text, f"<{text}>"

    return Conversations(
        environment or Says(answer),
        [{"i": i} for i in range(count)],
        2,
        0,
        max_turns,
        seconds,
        read,
        lambda row, turn, ids: [*turn.text.encode()],
    )


def asked(*rows, text="hm", room=99):
    return [(row, [*map(ord, text)], room) for row in rows]


def test_an_answer_is_tokens_and_none_ends_the_episode():
    def answer(row, text):
        return Turn(f"{row['i']}{text}", 0.5) if row["i"] else Turn(None, 2)

    talk = conversations(answer)
    assert talk.answers(asked(1, 0)) == [[*map(ord, "1<hm>")], None]
    assert talk.finished == [True, False, False, False]
    assert talk.records[0] == {
        **{"turns": [{"policy": "<hm>"}], "reward": 2.0, "end": "done", "error": None},
        "tokens": 0,
    }
    assert talk.records[1]["turns"] == [{"policy": "<hm>", "environment": "1<hm>"}]
    assert (talk.records[1]["reward"], talk.records[1]["tokens"]) == (0.5, 5)
    talk.leave(1, [*map(ord, "cut")])
    assert talk.texts == [["hm"], ["hm", "cut"], [], []]
    assert shown({"episode": talk.records[1]}, "") == "<hm> [environment: 1<hm>] <cut>"
    assert shown({}, "as it is") == "as it is"


@pytest.mark.parametrize(
    ("options", "room", "end"),
    [({"max_turns": 1}, 99, "turns"), ({}, 5, "tokens"), ({}, 0, "tokens")],
)
def test_what_has_no_turn_or_no_room_behind_it_is_not_said(options, room, end):
    """Of 5 tokens a message needs a room of 6; its reward is earned all the same."""
    talk = conversations(lambda row, text: Turn("12345", 0.25), **options)
    assert talk.answers(asked(0, room=room)) == [None]
    record = talk.records[0]
    assert (record["end"], record["reward"], record["tokens"]) == (end, 0.25, 0)
    assert record["turns"] == [{"policy": "<hm>"}] and not talk.finished[0]
    roomy = conversations(lambda row, text: Turn("12345", 0.25))
    assert len(roomy.answers(asked(0, room=6))[0]) == 5


WRONG = [
    (ZeroDivisionError("by\nzero"), "ZeroDivisionError: by zero (environments.py:"),
    (SystemExit(3), "SystemExit: 3"),
    (asyncio.CancelledError(), "CancelledError: "),
    (Turn("\ud800"), "UnicodeEncodeError: "),  # which no tokenizer takes
    ("higher", "step() must give a Turn, gave str: 'higher'"),
    (None, "step() must give a Turn, gave NoneType"),
]


@pytest.mark.parametrize(("given", "text"), WRONG)
def test_an_error_costs_its_row_alone(given, text):
    talk = conversations(lambda row, _: given if row["i"] == 1 else Turn("go on"))
    found = talk.answers(asked(0, 1, 2))
    assert [ids is None for ids in found] == [False, True, False]
    assert talk.records[1]["error"].startswith(text) and talk.records[1]["end"] == "error"
    assert [record["error"] for record in talk.records[::2]] == [None, None]
    rows = [{"episode": record} for record in talk.records]
    values = EnvironmentReward()(rows, [""] * 4)
    assert values[0] == 0.0 and text in str(values[1])


@pytest.mark.parametrize("given", [ValueError("no level"), "an episode"])
def test_an_episode_that_cannot_begin_is_asked_nothing(given):
    class Broken(Says):
        def begin(self, row, seed):
            if row["i"] == 2:
                if isinstance(given, Exception):
                    raise given
                return given
            return super().begin(row, seed)

    talk = conversations(None, environment=Broken(lambda row, text: Turn("x")))
    assert talk.answers(asked(2, 3)) == [None, [ord("x")]]
    assert "no level" in talk.records[2]["error"] or "begin() must" in talk.records[2]["error"]


@pytest.mark.parametrize(("on_error", "values"), [("skip", [1.0, None]), ("stop", None)])
def test_the_term_s_on_error_decides_what_becomes_of_it(on_error, values):
    answer = lambda row, text: Turn(None, 1) if row["i"] == 0 else OSError("no server")  # noqa: E731
    talk = conversations(answer, count=2)
    talk.answers(asked(0, 1))
    rows = [{"episode": record} for record in talk.records]
    term = {"earned": RewardTerm(EnvironmentReward(), on_error=on_error)}
    if values is None:
        with pytest.raises(RewardError, match="environment failed: OSError: no server"):
            score(term, rows, ["", ""])
    else:
        with pytest.warns(UserWarning, match="1 of 2 completions get no reward.*no server"):
            scores = score(term, rows, ["", ""])
        assert scores.total[0] == 1 and scores.total[1].isnan()
        assert scores.counts == {"earned_errors": 1}


def test_a_late_answer_is_an_error_of_its_row_and_never_arrives():
    """The call goes on in its thread: what it gives then is of no row any more."""
    go, gone = threading.Event(), threading.Event()

    def answer(row, text):
        if row["i"] == 1 and text == "<hm>":
            go.wait(5)
            gone.set()
            return Turn(None, 9)
        return Turn("ok")

    talk = conversations(answer, seconds=0.05)
    found = talk.answers(asked(0, 1, 2))
    assert [ids is None for ids in found] == [False, True, False]
    assert talk.records[1]["end"] == "timeout"
    assert talk.records[1]["error"] == "no answer in 0.05 s (sampler.environment_seconds)"
    go.set()
    assert gone.wait(5)
    time.sleep(0.01)
    assert talk.records[1]["reward"] == 0 and not talk.finished[1]
    assert talk.seconds < 1


def test_answers_come_in_the_order_of_the_rows_and_wait_for_each_other_s_time_only_once():
    def answer(row, text):
        time.sleep(0.05 - 0.012 * row["i"])  # the last row is the first to answer
        return Turn(str(row["i"]))

    talk = conversations(answer)
    start = time.perf_counter()
    assert talk.answers(asked(2, 0, 3, 1)) == [[ord(i)] for i in "2031"]
    assert time.perf_counter() - start < 0.12  # one after the other: 0.13 at least
    assert side_by_side([], 1.0) == []


def test_hundreds_of_calls_do_not_run_at_once():
    running, most, lock = [0], [0], threading.Lock()

    def call():
        with lock:
            running[0] += 1
            most[0] = max(most[0], running[0])
        time.sleep(0.001)
        with lock:
            running[0] -= 1
        return Turn("x")

    talk = conversations(lambda row, text: call(), count=200)
    assert len(talk.answers(asked(*range(200)))) == 200
    assert most[0] <= 64


@pytest.mark.parametrize(
    ("arguments", "error", "text"),
    [
        ((3,), TypeError, "a text, chat messages or None, got int"),
        (([],), TypeError, "got list"),
        (([{"role": "robot", "content": "x"}],), ValueError, "a role of"),
        (([{"role": "tool"}],), ValueError, "must have a content"),
        (("x", float("nan")), ValueError, "finite number, got nan"),
        (("x", "1"), ValueError, "finite number, got '1'"),
    ],
)
def test_a_turn_is_checked_where_it_is_made(arguments, error, text):
    with pytest.raises(error, match=text):
        Turn(*arguments)


def test_a_reward_without_an_episode_says_why():
    (value,) = EnvironmentReward()([{}], ["x"])
    assert "the sampler has no environment" in str(value)
    assert Step(lambda text: Turn(None)).step("") == Turn(None)
