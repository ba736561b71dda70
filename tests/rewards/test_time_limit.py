"""A slow reward function: killed at its limit, replaced, counted, and gone at the end."""

import os
import pickle
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from gspo_lightning.rewards import calls as reward_calls
from gspo_lightning.rewards.terms import RewardError, RewardTerm, score
from gspo_lightning.rewards.time_limit import TimeLimit
from gspo_lightning.rewards.verifiers import ExactMatch, LastNumber
from support.reward_functions import (
    Counting,
    Scaled,
    SlowAtFirst,
    by_command,
    length,
    sleepy_digits,
    two_for_one,
)
from support.tiny_run import outputs_of


@pytest.fixture
def limited():
    """Builds TimeLimits and ends their processes."""
    made = []

    def make(fn=by_command, seconds=20.0, **options):
        made.append(TimeLimit(fn, seconds, **options))
        return made[-1]

    yield make
    for limit in made:
        limit.release()


def children():
    """Processes of this one that are alive or not yet waited for."""
    workers = [p for p in psutil.Process().children() if "time_limit.py" in " ".join(cmdline(p))]
    return [p for p in workers if p.pid not in of_other_tests]


of_other_tests = set()  # a test that has failed on purpose keeps its frames, and they its process


@pytest.fixture(autouse=True)
def _only_own_children():
    of_other_tests.clear()
    of_other_tests.update(p.pid for p in children())


def cmdline(process):
    return ["time_limit.py"] if process.status() == psutil.STATUS_ZOMBIE else process.cmdline()


def pid(limit):
    return int(limit([{}], ["pid"])[0])


def test_values_are_those_of_the_function_and_the_process_is_reused(limited):
    limit = limited()
    values = limit([{"value": 2.0}, {}, {}], ["", "none", ""])
    assert values == [2.0, None, 0.5]
    assert pid(limit) == pid(limit) != os.getpid()
    assert limit.counts == {"timeouts": 0}


@pytest.mark.parametrize("command", ["sleep", "hang"])
def test_a_completion_over_the_limit_is_killed_and_the_others_are_scored(limited, command):
    limit = limited(seconds=0.3, on_timeout=-1.0)
    first = pid(limit)
    start = time.monotonic()
    with pytest.warns(UserWarning, match=r"1 of 3 completions took .* 0.3 s and get -1.0"):
        assert limit([{"value": 1.0}] * 3, ["", command, ""]) == [1.0, -1.0, 1.0]
    assert time.monotonic() - start < 30  # the function itself would take a minute
    assert limit.counts == {"timeouts": 1}
    assert pid(limit) != first and not psutil.pid_exists(first)
    assert limit.counts == {"timeouts": 0}


def test_without_a_stated_value_such_a_completion_ends_the_run_in_one_line(limited):
    limit = limited(seconds=0.3)
    with pytest.raises(RewardError) as caught:
        score({"slow": RewardTerm(limit)}, [{}] * 3, ["", "sleep", ""])
    assert str(caught.value) == (
        "reward 'slow' failed: took longer than 0.3 s, which on_timeout or on_error can allow; for "
        "the completion 'sleep'"
    )
    assert caught.value.row == 1


def test_if_errors_are_skipped_it_has_no_reward_and_later_ones_do_not_warn(limited):
    terms = {"slow": RewardTerm(limited(seconds=0.3), on_error="skip")}
    with pytest.warns(UserWarning, match="1 of 2 completions get no reward: .* longer than 0.3 s"):
        score(terms, [{}] * 2, ["sleep", ""])
    scores = score(terms, [{}] * 2, ["sleep", ""])  # warnings are errors here
    assert scores.total.isnan().tolist() == [True, False]
    assert scores.counts == {"slow_timeouts": 1, "slow_errors": 1}


def test_a_slow_completion_is_tried_again_if_the_term_says_so(limited, monkeypatch, tmp_path):
    monkeypatch.setattr(reward_calls, "PAUSE_SECONDS", 0.0)
    limit = limited(SlowAtFirst(str(tmp_path / "been")), seconds=1.0)
    scores = score({"slow": RewardTerm(limit, on_error="retry 1")}, [{}] * 2, ["a", "bc"])
    assert scores.total.tolist() == [1.0, 2.0]
    assert scores.counts == {"slow_timeouts": 0, "slow_retries": 1}


def test_the_limit_is_for_each_completion(limited):
    values = limited(seconds=0.3)([{}] * 3, ["sleep", "", "sleep"])
    assert [type(value) for value in values] == [TimeoutError, float, TimeoutError]


def test_a_completion_over_the_limit_has_no_reward_even_if_another_term_gives_one(limited):
    # a sum of fewer terms would be compared with whole sums of its group
    limit = limited(seconds=0.3)
    terms = {"slow": RewardTerm(limit, on_error="skip"), "length": RewardTerm(length)}
    with pytest.warns(UserWarning, match="1 of 2"):
        scores = score(terms, [{}] * 2, ["sleep", ""])
    assert scores.total.isnan().tolist() == [True, False]


def test_errors_and_timeouts_of_one_batch_are_both_counted_and_the_process_is_kept(limited):
    limit = limited(seconds=0.5)
    first = pid(limit)
    terms = {"slow": RewardTerm(limit, on_error="skip")}
    with pytest.warns(UserWarning, match="2 of 3 completions get no reward: reward 'slow' failed"):
        scores = score(terms, [{}] * 3, ["raise", "", "raise"])
    assert scores.total.isnan().tolist() == [True, False, True]
    assert scores.counts == {"slow_timeouts": 0, "slow_errors": 2}
    assert pid(limit) == first
    scores = score(terms, [{}] * 4, ["exit", "sleep", "", "raise"])
    assert scores.total.isnan().tolist() == [True, True, False, True]
    assert scores.counts == {"slow_timeouts": 1, "slow_errors": 3}


def test_no_process_is_left_behind(limited):
    limit = limited(seconds=0.3)
    limit([{}] * 2, ["sleep", ""])
    assert len(children()) == 1
    limit.release()
    assert children() == []
    assert limit([{"value": 3.0}], [""]) == [3.0]  # it can be used again
    dropped = TimeLimit(length)
    dropped([{}], ["abc"])
    assert len(children()) == 2
    del dropped
    assert len(children()) == 1


def test_a_worker_ends_with_the_run_even_if_the_run_is_killed(tmp_path):
    program = (
        "import os, signal, threading, time\n"
        "from support.reward_functions import by_command\n"
        "from gspo_lightning.rewards.time_limit import TimeLimit\n"
        "limit = TimeLimit(by_command, 60)\n"
        "print(int(limit([{}], ['pid'])[0]), flush=True)\n"
        "threading.Timer(0.5, os.kill, (os.getpid(), signal.SIGKILL)).start()\n"
        "limit([{}], ['sleep'])\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    worker = int(done.stdout)
    for _ in range(50):
        if not psutil.pid_exists(worker):
            break
        time.sleep(0.1)
    assert not psutil.pid_exists(worker)


def test_an_error_of_the_function_is_one_line_that_names_term_and_row(limited):
    terms = {"strict": RewardTerm(limited())}
    rows = [{"prompt": "1+1="}, {"prompt": "2+2="}]
    with pytest.raises(ValueError, match="strict") as error:
        score(terms, rows, ["", "raise"])
    text = str(error.value)
    assert "\n" not in text and "KeyError: 'no such thing' (reward_functions.py:" in text
    assert "prompt '2+2='" in text and error.value.row == 1


def test_a_function_that_ends_its_process_is_an_error_not_a_timeout(limited):
    with pytest.raises(ValueError, match="ended its process, exit code 7"):
        limited()([{}], ["exit"])


def test_a_wrong_number_of_values_is_an_error(limited):
    with pytest.raises(ValueError, match="gave 2 values for 1 completion"):
        limited(two_for_one)([{}], [""])


def test_what_the_function_prints_stays_out_of_the_output(limited, capfd):
    limited()([{}], ["print"])
    out, err = capfd.readouterr()
    assert (out, err) == ("", "printed by a reward function\n")


def test_objects_with_arguments_work_and_copies_have_processes_of_their_own(limited):
    limit = limited(Scaled(0.5))
    assert limit([{}], ["abcd"]) == [2.0]
    copy = pickle.loads(pickle.dumps(limit))
    assert copy.worker is None and copy([{}], ["abc"]) == [1.5]
    copy.release()


def test_what_the_function_declares_and_counts_is_passed_on(limited):
    assert limited(ExactMatch("solution")).column == "solution"
    assert limited(length).column is None


def test_counts_of_the_function_are_added_up_over_completions(limited):
    limit = limited(Counting())
    for _ in range(2):
        limit([{}] * 3, ["aa", "", "a"])
        assert limit.counts == {"timeouts": 0, "letters": 3}


def test_a_verifier_of_the_package_starts_without_the_whole_package(limited):
    limit = limited(LastNumber())
    assert limit([{"answer": 3}], ["so 3"]) == [1.0]
    maps = Path(f"/proc/{limit.worker.process.pid}/maps").read_text()
    assert "python" in maps and "torch" not in maps


@pytest.mark.parametrize(
    ("fn", "options", "message"),
    [
        (length, {"seconds": 0.0}, "TimeLimit.seconds must be above 0 and finite, got 0.0"),
        (length, {"seconds": float("inf")}, "TimeLimit.seconds must be above 0 and finite"),
        (length, {"on_timeout": float("nan")}, "TimeLimit.on_timeout must be finite or null"),
        (lambda rows, texts: [0.0], {}, "TimeLimit.fn must be importable by another process"),
    ],
)
def test_a_bad_argument_is_named(fn, options, message):
    with pytest.raises(ValueError, match=message):
        TimeLimit(fn, **options)


def test_a_function_of_the_program_itself_is_refused(monkeypatch):
    monkeypatch.setattr(length, "__module__", "__main__")
    monkeypatch.setattr(sys.modules["__main__"], "length", length, raising=False)
    with pytest.raises(ValueError, match="not in the program itself"):
        TimeLimit(length)


def test_a_run_counts_timeouts_goes_on_and_leaves_no_process(tmp_path, model_dir):
    limit = TimeLimit(sleepy_digits, 0.2)
    terms = {"slow": RewardTerm(limit, on_error="skip")}
    with pytest.warns(UserWarning, match=r"completions get no reward: .* longer than 0.2 s"):
        (outputs,) = outputs_of(tmp_path, model_dir, rewards=terms)
    even = [text[:1] in {"0", "2", "4", "6", "8"} for text in outputs["rollout"].texts]
    assert 0 < sum(even) < 16
    assert outputs["metrics"]["reward/slow_timeouts"] == sum(even)
    assert outputs["metrics"]["reward/slow_errors"] == sum(even)
    assert outputs["metrics"]["reward/missing"] == sum(even)
    assert outputs["rollout"].rewards.isnan().tolist() == even
    assert limit.worker is None and children() == []
