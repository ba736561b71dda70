"""Programs under test: what passes, what does not, and that nothing outlives its limits."""

import os
import time
import warnings

import pytest

from gspo_lightning.rewards import CodeTests

ADD = "def add(a, b):\n    return a + b\n"
CHECK = ["assert add(1, 2) == 3"]


def one(text, tests=CHECK, **options):
    verifier = CodeTests(**{"seconds": 30.0} | options)
    (score,) = verifier([{"tests": tests}], [text])
    return score, verifier.counts["timeouts"]


@pytest.mark.parametrize(
    "text",
    [
        ADD,
        f"First:\n```python\n1/0\n```\nBetter:\n```py\n{ADD}```\nDone.",
        f"```Python\r\n{ADD}```\nRun it:\n```bash\npython a.py\n```\nIt prints\n```\n3\n```",
        f"```\n1/0\n```\nor\n```\n{ADD}```",
        f"import shutil\nshutil.rmtree('..', ignore_errors=True)\n{ADD}",
        f"import numpy\n{ADD}",  # installed packages are there
        f"from dataclasses import dataclass\n@dataclass\nclass P:\n    x: 'int' = 1\n{ADD}",
        f"{ADD}if __name__ == '__main__':\n    raise SystemExit(1)",  # not run as a program
        f"import sys\nsys.stdout.close()\n{ADD}",
        f"import sys\nassert sys.stdin.read() == ''\n{ADD}",
        f"import os\nassert 'SECRET' not in os.environ and os.listdir() == []\n{ADD}",
        f"import threading\nt = threading.Thread(target=print)\nt.start(), t.join()\n{ADD}",
    ],
)
def test_a_right_program_passes(text, monkeypatch):
    monkeypatch.setenv("SECRET", "token")
    assert one(text) == (1.0, 0)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "Sorry, I cannot.",
        ADD.replace("+", "-"),
        f"```python\n{ADD}",  # without its end
        f"{ADD}raise SystemExit(0)",
        "import os\nos._exit(0)",
        "print('passed')\nexit()",
        "open('../test.py', 'w').write('')",
        f"x = [0] * 10**10\n{ADD}",
        f"x = bytearray(2 << 30)\n{ADD}",
        "while True: print('x' * 1000)",
        f"open('file', 'wb').write(b'x' * (5 << 20))\n{ADD}",
        "def add(a, b): return add(a, b)",
        "import os, signal\nos.kill(os.getpid(), signal.SIGKILL)",
        f"\ud800{ADD}",
        f"\0{ADD}",
        "import support.repository",  # the run's own folders are no place to import from
    ],
)
def test_a_wrong_program_fails_and_does_no_harm(text):
    assert one(text) == (0.0, 0)


def test_a_test_may_hold_what_python_warns_of():
    with warnings.catch_warnings(record=True, action="always") as seen:
        CodeTests().check_row({"tests": [r"assert '\d'"]})
    assert seen == []


def test_open_files_of_the_run_are_closed_to_the_program(tmp_path):
    descriptor = os.open(tmp_path / "secret", os.O_CREAT | os.O_RDWR)
    os.set_inheritable(descriptor, True)
    seen = (
        "import os\nassert {os.readlink(f'/proc/self/fd/{n}') for n in os.listdir('/proc/self/fd')"
    )
    seen += (
        f" if os.path.exists(f'/proc/self/fd/{{n}}')}}.isdisjoint({{'{tmp_path}/secret'}})\n{ADD}"
    )
    assert one(seen) == (1.0, 0)
    os.close(descriptor)


@pytest.mark.parametrize(
    "text",
    [
        "while True: pass",
        "import signal, time\nsignal.signal(signal.SIGTERM, signal.SIG_IGN)\ntime.sleep(60)",
        "import subprocess\nsubprocess.run(['sleep', '60'])",
    ],
)
def test_the_limit_of_time_holds_and_is_counted(text):
    start = time.monotonic()
    assert one(text, seconds=0.4) == (0.0, 1)
    assert time.monotonic() - start < 20


def test_what_a_program_starts_ends_with_it(tmp_path):
    mark = tmp_path / "alive"
    child = f"import time; time.sleep(1); open({str(mark)!r}, 'w')"
    text = f"import subprocess, sys\nsubprocess.Popen([sys.executable, '-c', {child!r}])\n{ADD}"
    start = time.monotonic()
    assert one(text) == (1.0, 0)
    assert time.monotonic() - start < 20  # its open output is not waited for
    time.sleep(1.2)
    assert not mark.exists()


def test_what_is_read_and_printed():
    tests = [{"input": "1 2\n", "output": "3"}, {"input": "5 6\n", "output": "11\n"}]
    add = "def main():\n    print(sum(map(int, input().split())), end='  \\n\\n')\n"
    add += "if __name__ == '__main__':\n    main()"
    assert one(add, tests) == (1.0, 0)
    assert one("print(3)", tests) == (0.0, 0)
    assert one("print(3)", tests, score="share") == (0.5, 0)
    assert one("print(3)\nraise SystemExit(1)", tests[:1]) == (0.0, 0)
    assert one("print(' 3')", tests[:1]) == (0.0, 0)


def test_the_share_of_the_tests_that_pass():
    tests = ["assert f(1)", "assert f(0)", "f()", "assert not f(0)"]
    assert one("def f(x): return x", tests, score="share") == (0.5, 0)
    assert one("def f(x): return x", tests) == (0.0, 0)
    assert one("def f(x): return x", "assert f(1)\nassert not f(0)") == (1.0, 0)


def test_completions_of_one_call_do_not_know_of_each_other():
    texts = [ADD, "x = 1", ADD.replace("+", "-"), ADD]
    verifier = CodeTests(workers=2)
    assert verifier([{"tests": CHECK}] * 4, texts) == [1.0, 0.0, 0.0, 1.0]
    skipping = CodeTests(missing="skip")
    assert skipping([{}, {"tests": CHECK}], texts[:2]) == [None, 0.0]


@pytest.mark.parametrize(
    ("tests", "message"),
    [
        ([], "the row has an empty list of tests"),
        (["assert add(1"], r"test 1 is no Python: .* was never closed"),
        (
            [*CHECK, 3],
            "test 2 must be Python as a text, or an object with input and output, got '3'",
        ),
        ([{"input": "3"}], "test 1 must be Python as a text"),
        (7, "test 1 must be Python as a text"),
        (None, "there is no column 'tests'"),
    ],
)
def test_tests_that_are_none_are_an_error(tests, message):
    with pytest.raises(ValueError, match=message):
        one(ADD, tests)
    if tests is not None:  # found by its column
        with pytest.raises(ValueError, match=message):
            CodeTests().check_row({"tests": tests})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"seconds": 0}, r"CodeTests\.seconds must be above 0, got 0"),
        ({"workers": 0}, r"CodeTests\.workers must be >= 1, got 0"),
        ({"memory_mib": 8}, r"CodeTests\.memory_mib must be >= 64, got 8"),
        ({"pattern": "("}, r"CodeTests\.pattern '\(' is no regular expression"),
    ],
)
def test_a_bad_argument_is_named(options, message):
    with pytest.raises(ValueError, match=message):
        CodeTests(**options)
