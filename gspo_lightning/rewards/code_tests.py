"""A verifier that runs a completion's program against tests, each in a process with limits.

Decides what a test is, when it is passed, and what ends it. This is no sandbox: a program may read
and write whatever its user may, and use the network. Run what you do not trust in a container.
"""

import ast
import secrets
import tempfile
import threading
import warnings
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Literal, NamedTuple

from gspo_lightning.bounds import check_at_least, check_positive
from gspo_lightning.rewards.verifiers import AnswerVerifier, Missing, Patterns
from gspo_lightning.start.limited import run_program

# Behind a program many a model shows how to start it and what it prints, in blocks of their own: a
# block that says Python counts before all others.
PYTHON_BLOCK = r"```[ \t]{0,9}(?i:python3?|py)\b[^\n]{0,99}\n(.*?)```"
BLOCK = r"```[ \t]{0,9}\r?\n(.*?)```"
PARSING = threading.Lock()  # filters of warnings are those of all threads


class CodeTest(NamedTuple):
    """One test: Python that runs behind the program, or what the program reads and must print."""

    code: str = ""
    given: str = ""
    expected: str | None = None


class CodeTests(AnswerVerifier):
    r"""1 where the program in the completion passes the tests of its row.

    A test is Python that runs behind the program and passes where it comes to its end (``assert
    add(1, 2) == 3``), or an object with ``input`` and ``output``: what the program reads on
    standard input, and must print (white space at the ends of lines aside) and end without error.

    Each test runs in a Python of its own: new session, empty folder, hardly any environment, no
    open files of the run. It and what it started are killed at its end, at the latest after
    ``seconds``; memory, processor time, and the size of its output and files are limited. **This is
    no sandbox**: a program may read and write whatever its user may, and use the network; processes
    that leave the session live on. Tests over the limit of time are logged as
    ``reward/<term>_timeouts``.

    Args:
        column: Column with the tests: Python as a text or as a list of texts, or a list of
            ``{input, output}``. One text with all assertions runs in one process.
        seconds: Longest time for one test, the start of Python (some 0.02 s) included.
        memory_mib: Address space of a test, in MiB; Python with numpy needs some 200.
        score: ``all``: 1 where all tests are passed, 0 at the first that is not; ``share``: the
            share of tests that are passed.
        workers: Completions that are tested at a time.
        missing: ``error`` or ``skip`` for a row without the column.
        pattern: Finds the program; see ``AnswerVerifier``. As it stands: the last fenced block
            of Python, else the last block without a language, else the whole completion.

    Raises:
        ValueError: If a limit is out of range, or a row's tests are none, or no Python.

    >>> code = "```python\ndef add(a, b):\n    return a + b\n```"
    >>> CodeTests()([{"tests": ["assert add(1, 2) == 3", "assert add(0, 0) == 0"]}], [code])
    [1.0]
    """

    def __init__(
        self,
        column: str = "tests",
        seconds: float = 5.0,
        memory_mib: int = 1024,
        score: Literal["all", "share"] = "all",
        workers: int = 4,
        missing: Missing = "error",
        pattern: Patterns = [PYTHON_BLOCK, BLOCK, ".+"],  # noqa: B006 - never written into
    ) -> None:
        super().__init__(column, missing, pattern)
        check_positive("CodeTests.", seconds=seconds)
        check_at_least(1, "CodeTests.", workers=workers)
        check_at_least(64, "CodeTests.", memory_mib=memory_mib)
        self.seconds = seconds
        self.memory_mib = memory_mib
        self.score = score
        self.workers = workers
        self.counts = {"timeouts": 0}
        self.timed_out: list[CodeTest] = []

    def __call__(self, rows: list[dict], completions: list[str]) -> list[float | None]:
        """The score for each of B completions, None where there are no tests."""
        self.timed_out = []
        with ThreadPoolExecutor(self.workers) as pool:
            try:
                scores = list(pool.map(self._judge, rows, completions))
            finally:  # after an error, or Ctrl-C, the tests that wait need not run
                pool.shutdown(wait=False, cancel_futures=True)
        self.counts = {"timeouts": len(self.timed_out)}
        return scores

    def right(self, answer: Any) -> list[CodeTest]:
        """The tests; an answer that is none is an error."""
        return read_tests(answer)

    def equal(self, answer: Any, text: str) -> float:
        tests = self.right(answer)
        if self.score == "share":
            return sum(self._passes(text, test) for test in tests) / len(tests)
        return float(all(self._passes(text, test) for test in tests))

    def _passes(self, program: str, test: CodeTest) -> bool:
        with tempfile.TemporaryDirectory(prefix="code-test-", ignore_cleanup_errors=True) as folder:
            passed = run_test(program, test, Path(folder), self.seconds, self.memory_mib << 20)
        if passed is None:
            self.timed_out.append(test)
        return bool(passed)


def read_tests(answer: Any) -> list[CodeTest]:
    """The tests of a row.

    Raises:
        ValueError: If there are none, or one is no test.
    """
    tests = []
    given = answer if isinstance(answer, list | tuple) else [answer]
    for number, one in enumerate(given, start=1):
        if isinstance(one, Mapping) and one.keys() >= {"input", "output"}:
            tests.append(CodeTest(given=str(one["input"]), expected=str(one["output"])))
        elif isinstance(one, str):
            try:
                with PARSING, warnings.catch_warnings(action="ignore"):  # "\d" in a test's string
                    ast.parse(one)
            except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
                raise ValueError(
                    f"test {number} is no Python: {error}; got {one[:60]!r}"
                ) from error
            tests.append(CodeTest(code=one))
        else:
            raise ValueError(
                f"test {number} must be Python as a text, or an object with input and output, got "
                f"{str(one)[:60]!r}"
            )
    if not tests:
        raise ValueError("the row has an empty list of tests")
    return tests


def run_test(
    program: str, test: CodeTest, folder: Path, seconds: float, memory: int
) -> bool | None:
    """Run one test in an empty folder; None if it took longer than ``seconds``."""
    (folder / "solution.py").write_text(program, encoding="utf-8", errors="replace")
    (folder / "test.py").write_text(test.code, encoding="utf-8", errors="replace")
    # What stands in front of the tests must not pass them by ending early, so that they say a word
    # at their end that the program was not told.
    word = secrets.token_hex(16)
    given_text = word if test.expected is None else test.given
    (folder / "input").write_text(given_text, encoding="utf-8", errors="replace")
    with (folder / "input").open("rb") as given:
        said, code = run_program(folder, given, seconds, memory, check=test.expected is None)
    if said is None:
        return None
    if test.expected is None:
        return word in said
    return code == 0 and lines(said) == lines(test.expected)


def lines(text: str) -> list[str]:
    """Lines without the white space at their ends, and without empty ones at the end of all."""
    return [line.rstrip() for line in text.rstrip().splitlines()]
