"""Reward functions are guests: what they do to the process, their arguments and themselves."""

import asyncio
import gc
import io
import locale
import logging
import os
import random
import resource
import signal
import sys
import threading
import traceback
import warnings
from itertools import count
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from gspo_lightning.data.prompts import PromptData
from gspo_lightning.rewards import awaited, guest, time_limit
from gspo_lightning.rewards.terms import RewardError, RewardTerm, row_checks, score
from gspo_lightning.rewards.time_limit import TimeLimit
from gspo_lightning.run.ending import report
from gspo_lightning.run.one_line import OneLineParser
from support.reward_functions import by_command, digits, slow_judge
from support.tiny_run import make_module, make_trainer, outputs_of, write_prompts

ROWS = [{"prompt": "a", "tags": ["x"]}, {"prompt": "b", "tags": []}, {"prompt": "c", "tags": []}]
TEXTS = ["one", "two", "six"]
LASTING: list = []  # what a function enters and never leaves
MOST_FILES = resource.getrlimit(resource.RLIMIT_NOFILE)[1]


def doing(act, when=None):
    """A reward function that does something first, for the completions that say so."""

    def fn(rows, texts):
        if when is None or when in texts:
            act()
        return [1.0] * len(texts)

    return fn


def scored(fn, **options):
    return score({"x": RewardTerm(fn, **options)}, ROWS, TEXTS).total.tolist()


# ---- the process stays as it was ----------------------------------------------------------------


def wrap_stdout():
    """What people write for UTF-8: it closes the buffer below once nobody holds it."""
    sys.stdout = io.TextIOWrapper(sys.stdout.buffer, encoding="utf-8")


def deaf(number, frame):
    pass


# what it does, what is said, how to look at it
CHANGES = {
    "folder": (lambda: os.chdir("/"), "the working directory", os.getcwd),
    "dtype": (
        lambda: torch.set_default_dtype(torch.float64),
        "torch's default dtype",
        torch.get_default_dtype,
    ),
    "device": (
        lambda: torch.set_default_device("meta"),
        "torch's default device",
        torch.get_default_device,
    ),
    "grad": (lambda: torch.set_grad_enabled(False), "torch's grad mode", torch.is_grad_enabled),
    "threads": (lambda: torch.set_num_threads(2), "number of threads", torch.get_num_threads),
    "products": (
        lambda: torch.set_float32_matmul_precision("medium"),
        "precision of products",
        torch.get_float32_matmul_precision,
    ),
    "deterministic": (
        lambda: torch.use_deterministic_algorithms(True),
        "deterministic algorithms",
        torch.are_deterministic_algorithms_enabled,
    ),
    "autocast": (
        lambda: torch.autocast("cpu", torch.bfloat16).__enter__(),
        "torch's autocast",
        guest._autocast,
    ),
    "inference": (
        lambda: LASTING.append(torch.inference_mode()) or LASTING[-1].__enter__(),
        "torch's inference mode",
        lambda: (torch.is_inference_mode_enabled(), torch.is_grad_enabled()),
    ),
    "anomalies": (
        lambda: torch.autograd.set_detect_anomaly(True),
        "torch's search for anomalies",
        torch.is_anomaly_enabled,
    ),
    "cudnn": (
        lambda: setattr(torch.backends.cudnn, "deterministic", True),
        "cuDNN's flags",
        lambda: torch.backends.cudnn.deterministic,
    ),
    "locale": (
        lambda: locale.setlocale(locale.LC_ALL, "C.UTF-8"),
        "the locale",
        lambda: locale.setlocale(locale.LC_ALL),
    ),
    "files": (
        lambda: resource.setrlimit(resource.RLIMIT_NOFILE, (64, MOST_FILES)),
        "limits of the process",
        lambda: resource.getrlimit(resource.RLIMIT_NOFILE),
    ),
    "umask": (lambda: os.umask(0o777), "the umask", guest._umask),
    "recursion": (
        lambda: sys.setrecursionlimit(10**6),
        "the recursion limit",
        sys.getrecursionlimit,
    ),
    "blocked": (
        lambda: signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM}),
        "the mask of signals",
        lambda: signal.pthread_sigmask(signal.SIG_BLOCK, ()),
    ),
    "pipe": (
        lambda: signal.signal(signal.SIGPIPE, signal.SIG_DFL),
        "the handler of SIGPIPE",
        lambda: signal.getsignal(signal.SIGPIPE),
    ),
    "collection": (gc.disable, "garbage collection", gc.isenabled),
    "interrupt": (
        lambda: signal.signal(signal.SIGINT, deaf),
        "the handler of SIGINT",
        lambda: signal.getsignal(signal.SIGINT),
    ),
    "terminate": (
        lambda: signal.signal(signal.SIGTERM, signal.SIG_IGN),
        "the handler of SIGTERM",
        lambda: signal.getsignal(signal.SIGTERM),
    ),
    "alarm": (
        lambda: signal.alarm(600),
        "leaves an alarm clock running",
        lambda: signal.getitimer(signal.ITIMER_REAL),
    ),
    "closing": (lambda: sys.stdout.close(), "closes or replaces sys.stdout", lambda: sys.stdout),
    "wrapping": (wrap_stdout, "closes or replaces sys.stdout", lambda: sys.stdout.closed),
    "errors": (
        lambda: setattr(sys, "stderr", None),
        "closes or replaces sys.stderr",
        lambda: sys.stderr,
    ),
}


@pytest.mark.parametrize("name", CHANGES)
def test_a_change_of_the_process_is_put_back_and_named_once(name):
    act, said, look = CHANGES[name]
    before = look()
    term = RewardTerm(doing(act))
    with pytest.warns(UserWarning, match=f"^reward 'x' .*{said}.*: ") as caught:
        score({"x": term}, ROWS, TEXTS)
    assert len(caught) == 1 and look() == before
    score({"x": term}, ROWS, TEXTS)  # warnings are errors here
    assert look() == before
    print("still open", flush=True)


def test_it_is_put_back_after_an_error_too():
    def fn(rows, texts):
        torch.set_default_dtype(torch.float64)
        raise ValueError("no")

    with (
        pytest.warns(UserWarning, match="torch's default dtype"),
        pytest.raises(RewardError, match="no"),
    ):
        scored(fn)
    assert torch.get_default_dtype() == torch.float32


def test_a_folder_that_is_gone_is_said(tmp_path, monkeypatch):
    folder = tmp_path / "here"
    folder.mkdir()
    monkeypatch.chdir(folder)

    def act():
        os.chdir(tmp_path)
        folder.rmdir()

    with pytest.warns(UserWarning, match="working directory, which cannot be put back: .*here"):
        scored(doing(act))


def test_environment_and_filters_are_the_functions_own(monkeypatch):
    monkeypatch.setenv("PL_GLOBAL_SEED", "0")
    filters = list(warnings.filters)
    seen = []

    def fn(rows, texts):
        if not seen:
            os.environ["PL_GLOBAL_SEED"] = "42"  # as seed_everything does
            os.environ["MY_TOKEN"] = "secret"
            warnings.filterwarnings("ignore", "mine")
        warnings.warn("mine", stacklevel=1)  # an error, without its filter
        seen.append((os.environ["PL_GLOBAL_SEED"], os.environ["MY_TOKEN"]))
        return [1.0] * len(texts)

    term = RewardTerm(fn)
    for _ in range(2):
        score({"x": term}, ROWS, TEXTS)
        assert os.environ["PL_GLOBAL_SEED"] == "0" and "MY_TOKEN" not in os.environ
        assert list(warnings.filters) == filters
    assert seen == [("42", "secret")] * 2  # what it has set up once is there again


def draw(rows, texts):
    draws = random.random() + np.random.rand() + torch.rand(()).item()
    return [draws] * len(texts)


def test_random_streams_are_the_functions_own():
    def global_state():
        return random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()

    before = global_state()
    terms = {"a": RewardTerm(draw), "b": RewardTerm(draw)}
    first, again, other = (score(terms, ROWS, TEXTS, seed=s).parts for s in (1, 1, 2))
    assert first["a"].tolist() == again["a"].tolist() != other["a"].tolist()
    assert first["a"].tolist() != first["b"].tolist()

    def reseeds(rows, texts):
        random.seed(0), np.random.seed(0), torch.manual_seed(0)
        return draw(rows, texts)

    score({"a": RewardTerm(reseeds)}, ROWS, TEXTS, seed=1)
    assert global_state() == before


def test_another_attempt_draws_on(monkeypatch):
    monkeypatch.setattr("gspo_lightning.rewards.calls.PAUSE_SECONDS", 0.0)
    drawn = []

    def fn(rows, texts):
        drawn.append(random.random())
        if len(drawn) < 3:
            raise ValueError("unlucky")
        return [1.0] * len(texts)

    score({"x": RewardTerm(fn, on_error="retry 2")}, ROWS, TEXTS, seed=0)
    assert len(set(drawn)) == 3


def test_what_it_prints_is_shown_up_to_a_limit(capsys, monkeypatch):
    monkeypatch.setattr(time_limit, "PRINTED", 10)
    logger = logging.getLogger("of a reward")
    monkeypatch.setattr(logger, "propagate", False)

    def fn(rows, texts):
        if not logger.handlers:
            logger.addHandler(logging.StreamHandler())  # keeps the stream that it finds
        logger.warning("judged")
        print("x" * 8)
        for _ in range(1000):
            print("y" * 1000)
        return [1.0] * len(texts)

    term = RewardTerm(fn)
    with pytest.warns(UserWarning, match="'x' prints very much to sys.stdout: the first 10 char"):
        score({"x": term}, ROWS, TEXTS)
    score({"x": term}, ROWS, TEXTS)
    out, err = capsys.readouterr()
    assert out == ("x" * 8 + "\ny\n") * 2 and err == "judged\n" * 2


# ---- its arguments ------------------------------------------------------------------------------


def scribble(rows, texts):
    texts[1] = "EVIL"
    rows[0]["tags"].append("seen")
    rows[1]["answer"] = "EVIL"
    del rows[2]["prompt"]
    return [1.0] * 3


def test_arguments_are_copies_and_who_writes_into_them_is_named():
    rows, texts, seen = [{**row, "tags": [*row["tags"]]} for row in ROWS], [*TEXTS], []

    def after(rows, texts):
        seen.append((rows, texts))
        return [1.0] * 3

    terms = {"first": RewardTerm(scribble), "second": RewardTerm(after)}
    with pytest.warns(UserWarning, match="'first' changes its") as caught:
        score(terms, rows, texts)
    said = {str(warning.message) for warning in caught}
    assert {line.partition(":")[0] for line in said} == {
        "reward 'first' changes its completions",
        *(f"reward 'first' changes its rows ('{key}')" for key in ("tags", "answer", "prompt")),
    }
    assert (rows, texts) == (ROWS, TEXTS) and seen == [(ROWS, TEXTS)]


@pytest.mark.parametrize("value", [np.ones(2), threading.Lock(), torch.ones(2), object()])
def test_rows_may_hold_anything(value):
    def fn(rows, texts):
        assert type(rows[0]["value"]) is type(value)
        return [1.0]

    score({"x": RewardTerm(fn)}, [{"value": value}], ["a"])


# ---- what it raises and gives -------------------------------------------------------------------


class Mute(Exception):
    def __str__(self):
        raise RuntimeError("no text")


class MuteRuntime(RuntimeError):
    __str__ = Mute.__str__


class Nameless(type):
    def __getattribute__(cls, name):
        if name in ("__name__", "__qualname__"):
            raise RuntimeError("no name")
        return super().__getattribute__(name)


class Own(BaseException):
    pass


class Hidden(Exception, metaclass=Nameless):
    pass


class Answer(metaclass=Nameless):
    pass


def throws(make):
    def act():
        raise make()

    return doing(act, when="two")


async def async_exit(rows, texts):
    async def one(text):
        await asyncio.sleep(0)
        if text == "two":
            sys.exit(3)
        return 1.0

    return await asyncio.gather(*map(one, texts))


def endless(rows, texts):
    return (1.0 for _ in count()) if "two" in texts else [1.0] * len(texts)


def answers_alone(rows, texts):
    return Answer() if "two" in texts else [1.0] * len(texts)


def instead(value):
    return lambda rows, texts: [value if text == "two" else 1.0 for text in texts]


FAULTS = {
    "exit": (throws(lambda: SystemExit(0)), "failed: SystemExit: 0 .test_guests"),
    "exit()": (doing(lambda: sys.exit("bye"), when="two"), "failed: SystemExit: bye .test_guests"),
    "interrupt": (throws(KeyboardInterrupt), r"failed: KeyboardInterrupt \(test_guests"),
    "generator exit": (throws(GeneratorExit), r"failed: GeneratorExit \("),
    "cancelled": (throws(asyncio.CancelledError), "failed: CancelledError"),
    "of its own": (throws(Own), r"failed: Own \("),
    "no text": (throws(Mute), "failed: Mute: its text cannot be made"),
    "no text, runtime": (throws(MuteRuntime), "failed: MuteRuntime: its text cannot be made"),
    "no name": (throws(Hidden), r"failed: Hidden \(test_guests"),
    "no name given": (answers_alone, "failed: gave Answer instead"),
    "no name in place": (instead(Answer()), "no number: .*Answer"),
    "no name in a row": (instead(Hidden("me")), "failed: me; for the completion 'two'"),
    "50 MB": (throws(lambda: ValueError("x\n" * 25_000_000)), "failed: x x x"),
    "a long name": (throws(type("E" * 5000, (Exception,), {})), "failed: EEEE"),
    "no end": (endless, "failed: gave more than 1 values for 1 completions"),
    "text": (instead("0.5"), "no number: the str '0.5'; for the completion 'two'"),
    "complex": (instead(1j), "no number: .*complex"),
    "async exit": (async_exit, "failed: SystemExit: 3"),
    "an exit in place": (instead(SystemExit(1)), "failed: 1; for the completion 'two'"),
    "mute in place": (instead(Mute()), "failed: its text cannot be made; for the completion 'two'"),
}


@pytest.mark.parametrize("name", FAULTS)
def test_whatever_it_raises_is_the_terms_error(name):
    fn, message = FAULTS[name]
    with pytest.raises(RewardError, match=message) as caught:
        scored(fn)
    line = str(caught.value)
    assert line.startswith("reward 'x' ") and "\n" not in line and len(line) < 400
    assert len(str(caught.value.__cause__)) < 1000
    assert traceback.format_exception(caught.value)  # as GSPO_TRACEBACK=1 shows it
    with pytest.warns(UserWarning, match="1 of 3 completions get no reward: reward 'x'"):
        assert np.isnan(scored(fn, on_error="skip")).tolist() == [False, True, False]


@pytest.mark.parametrize(
    "values",
    [
        np.array([1, 2, 3]),
        np.ones((3, 1)) * [[1], [2], [3]],
        torch.tensor([1.0, 2.0, 3.0], requires_grad=True),
        list(torch.tensor([1.0, 2.0, 3.0], requires_grad=True)),
        (np.float32(i) for i in (1, 2, 3)),
    ],
)
def test_arrays_tensors_and_generators_are_values(values):
    assert scored(lambda rows, texts: values) == [1.0, 2.0, 3.0]


def interrupted(rows, texts):
    signal.raise_signal(signal.SIGINT)
    return [1.0] * len(texts)


def swallows(rows, texts):
    try:
        return interrupted(rows, texts)
    except BaseException:
        return [1.0] * len(texts)


@pytest.mark.parametrize("fn", [interrupted, swallows])
@pytest.mark.parametrize("on_error", ["stop", "skip"])
def test_the_users_ctrl_c_is_no_error_of_a_function(fn, on_error):
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # as in a new process
    try:
        with pytest.raises(KeyboardInterrupt):
            scored(fn, on_error=on_error)
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    finally:
        signal.signal(signal.SIGINT, before)


def test_a_child_that_it_forks_never_comes_back():
    here = os.getpid()

    def fn(rows, texts):
        fn.child = os.fork()
        return [1.0] * 3

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # there are other threads
            scored(fn)
    finally:
        if os.getpid() != here:
            os._exit(9)
    assert os.waitstatus_to_exitcode(os.waitpid(fn.child, 0)[1]) == 0


def test_a_child_that_an_async_function_forks_takes_nothing_of_the_loop():
    async def fn(rows, texts):
        fn.child = os.fork()
        await asyncio.sleep(0)
        return [1.0] * 3

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # there are other threads
        assert scored(fn) == [1.0] * 3
    assert os.waitstatus_to_exitcode(os.waitpid(fn.child, 0)[1]) == 0
    assert scored(Judge(), seconds=5.0) == [3.0] * 3


# ---- async functions ----------------------------------------------------------------------------


class Judge:
    """Asks for all completions at once, with a client that belongs to one event loop."""

    def __init__(self, slow=()):
        self.slow, self.most, self.now, self.client = slow, 0, 0, None
        self.calls, self.most_calls = 0, 0

    async def ask(self, text):
        self.now += 1
        self.most = max(self.most, self.now)
        await asyncio.sleep(60 if text in self.slow else 0.01)
        self.now -= 1
        return float(len(text))

    async def __call__(self, rows, texts):
        self.client = self.client or asyncio.get_running_loop()
        assert self.client is asyncio.get_running_loop()
        self.calls += 1
        self.most_calls = max(self.most_calls, self.calls)
        try:
            return await asyncio.gather(*map(self.ask, texts))
        finally:
            self.calls -= 1


def test_an_async_function_is_awaited_for_all_completions_at_once():
    judge = Judge()
    term = RewardTerm(judge)
    for _ in range(2):
        assert score({"x": term}, ROWS, ["a", "bb", "ccc"]).total.tolist() == [1.0, 2.0, 3.0]
    assert judge.most == 3 and term.waits


def test_it_works_where_an_event_loop_runs_already():
    async def notebook():
        return scored(Judge())

    assert asyncio.run(notebook()) == [3.0] * 3


def test_coroutines_in_place_of_numbers_and_async_generators_are_awaited_too():
    judge = Judge()

    async def one_by_one(rows, texts):
        for text in texts:
            yield await judge.ask(text)

    assert scored(lambda rows, texts: [judge.ask(text) for text in texts]) == [3.0] * 3
    assert scored(one_by_one) == [3.0] * 3


def test_beyond_its_limit_an_async_function_loses_the_slow_completions_alone():
    with pytest.raises(RewardError, match=r"'x' failed: took longer than 0.2 s \(the term's"):
        scored(Judge({"two"}), seconds=0.2)
    judge = Judge({"two"})
    with pytest.warns(UserWarning, match=r"1 of 3 completions get no reward: .*than 0.2 s"):
        values = scored(judge, seconds=0.2, on_error="skip")
    assert np.isnan(values).tolist() == [False, True, False]
    assert judge.most_calls == 3  # or B completions would take B times as long


def test_what_blocks_the_event_loop_does_not_block_the_run(monkeypatch):
    monkeypatch.setattr(awaited, "BLOCKED", 0.1)
    free = threading.Event()

    async def blocks(rows, texts):
        free.wait(60)

    with pytest.raises(RewardError, match=r"longer than 0.1 s, and blocks its event loop"):
        scored(blocks, seconds=0.1)
    assert scored(Judge(), seconds=5.0) == [3.0] * 3
    free.set()


@pytest.mark.parametrize("seconds", [0.0, -1.0, float("inf"), float("nan")])
def test_a_limit_that_is_none_is_refused(seconds):
    with pytest.raises(ValueError, match="a reward's seconds must be above 0 and finite"):
        RewardTerm(digits, seconds=seconds)


# ---- in the process of a TimeLimit --------------------------------------------------------------


def test_the_process_of_a_time_limit_contains_all_of_it(capfd):
    limit = TimeLimit(by_command, 20)
    worker = limit([{}], ["pid"])
    try:
        for command, message in {
            "sys.exit": "SystemExit: 4",
            "interrupt": "KeyboardInterrupt",
            "mute": "Mute: its text cannot be made",
            "50 MB": "ValueError: xxxx",
            "text": "TypeError: the str '0.5'",
        }.items():
            with pytest.raises(ValueError, match=message) as caught:
                limit([{}], [command])
            assert len(str(caught.value)) < 300
        assert limit([{"value": 2.0}] * 4, ["fork", "print"] * 2) == [0.0, 2.0] * 2
        assert limit([{}], ["pid"]) == worker  # none of them costs a new process
        for command, message in {"exit": "exit code 7", "close": "closed the files of its"}.items():
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr("gspo_lightning.rewards.time_limit.CLOSED_SECONDS", 0.5)
                with pytest.raises(ValueError, match=message):
                    limit([{}], [command])
        assert limit([{"value": 2.0}] * 2, ["flood", "print"]) == [2.0] * 2
        assert len(capfd.readouterr().err) == 100_001 + 3 * len("printed by a reward function\n")
    finally:
        limit.release()


def test_async_functions_work_in_the_process_of_a_time_limit():
    limit = TimeLimit(slow_judge, 0.5)
    try:
        values = limit([{}] * 3, ["abc", "slow", "ab"])
    finally:
        limit.release()
    assert values[0] == 3.0 and isinstance(values[1], TimeoutError) and values[2] == 2.0


# ---- in a run -----------------------------------------------------------------------------------


def rude(rows, texts):
    """What no run may notice."""
    values = digits(rows, texts)
    os.chdir("/")
    random.seed(len(texts)), torch.manual_seed(0), np.random.seed(0)
    os.environ["PL_GLOBAL_SEED"] = "7"
    torch.set_default_dtype(torch.float64)
    torch.set_grad_enabled(False)
    texts[:] = ["EVIL"] * len(texts)
    for row in rows:
        row["prompt"] = "EVIL"
    return values


async def rude_later(rows, texts):
    """The same beside the policy's pass, in threads whose grad mode is their own."""
    await asyncio.sleep(0.01)
    return rude(rows, texts)


def test_a_rude_reward_changes_nothing_in_a_run(tmp_path, model_dir):
    runs = []
    for name, fn, said_lines in (("polite", digits, 0), ("rude", rude, 5), ("late", rude_later, 4)):
        (tmp_path / name).mkdir()
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            runs.append(
                outputs_of(
                    tmp_path / name, model_dir, num_rollouts=2, rewards={"digits": RewardTerm(fn)}
                )
            )
        lines = {str(line.message) for line in said if str(line.message).startswith("reward")}
        assert len(lines) == said_lines, lines
    for polite, *others in zip(*runs, strict=True):
        for other in others:
            assert other["rollout"].texts == polite["rollout"].texts
            assert other["rollout"].rows == polite["rollout"].rows
            assert torch.equal(other["rollout"].old_logprobs, polite["rollout"].old_logprobs)


class Checks:
    def __init__(self, error):
        self.error = error

    def __call__(self, rows, texts):
        return [1.0] * len(texts)

    def check_row(self, row):
        row["prompt"] = "EVIL"
        raise self.error


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (SystemExit(0), "row 1: reward 'x' failed to check it: SystemExit: 0"),
        (KeyError("abc"), "row 1: reward 'x' failed to check it: KeyError: 'abc'"),
        (ValueError("no number"), "row 1: no number, which reward 'x' reads; mend the row"),
    ],
)
def test_a_check_of_rows_is_a_guest_too(tmp_path, model_dir, error, line):
    module = make_module(model_dir, rewards={"x": RewardTerm(Checks(error))})
    data = PromptData(str(write_prompts(tmp_path / "prompts.jsonl")), prompts_per_rollout=4)
    with pytest.raises(ValueError, match=line):
        make_trainer(tmp_path).fit(module, data)
    rows = [{"prompt": "1"}]
    assert row_checks({"x": RewardTerm(Checks(error))})["x"](rows) and rows == [{"prompt": "1"}]


def test_a_file_that_a_reward_misses_is_no_fault_of_the_run_folder(tmp_path, capsys):
    def fn(rows, texts):
        return os.listdir(tmp_path / "cache")

    with pytest.raises(RewardError) as caught:
        scored(fn)
    lock = SimpleNamespace(lost=lambda: None)
    assert report(caught.value, SimpleNamespace(begun=True, root=tmp_path, lock=lock), str) == 2
    assert capsys.readouterr().err.startswith("error: reward 'x' failed: FileNotFoundError: ")


@pytest.mark.parametrize("code", ["import sys; sys.exit(0)", "exit()", "raise SystemExit('bye')"])
def test_a_module_that_exits_is_one_line_and_no_success(code, capsys):
    watch = SimpleNamespace(begun=False, refuse=lambda: None)
    with pytest.raises(SystemExit) as caught:
        exec(compile(code, "my_rewards.py", "exec"), {"__name__": "my_rewards"})
    assert report(caught.value, watch, lambda _: "") == 2
    assert capsys.readouterr().err == "error: my_rewards.py:1 exits while the run is set up\n"


def test_the_parsers_exit_is_its_own(capsys):
    with pytest.raises(SystemExit) as caught:
        OneLineParser().parse_args(["--nothing"])
    capsys.readouterr()
    assert report(caught.value, SimpleNamespace(begun=False), lambda _: "") == 2
    assert capsys.readouterr().err == ""
