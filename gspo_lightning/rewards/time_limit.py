"""A time limit around a slow reward function, which then runs in a process of its own.

Decides what the limit is of (one completion), what happens when it is hit (the process is killed
and replaced) and how that is counted. This is no sandbox: the process may do whatever the function
does. Run as a program, the file is that process; it imports nothing but the standard library and
what the function needs.
"""

import math
import os
import pickle
import subprocess
import sys
import threading
import time
import traceback
import warnings
import weakref
from collections.abc import Callable, Sequence
from itertools import islice
from multiprocessing.connection import Connection, Pipe
from types import ModuleType
from typing import Any

# ("value", number or None, counts of the function) or ("error", what happened and where, {})
Answer = tuple[str, Any, dict[str, float]]

PRINTED = 100_000  # characters that a call may print to each stream
UNSPEAKABLE = "its text cannot be made"

PACKAGE = (__package__ or "").partition(".")[0]
START_SECONDS = 300.0  # for the process to start and to import the function
CLOSED_SECONDS = 5.0  # for a process to end after its connection has


class TimeLimit:
    """Run a reward function in a worker process, with a time limit for each completion.

    The function is called with one row and one completion at a time. When a call takes longer than
    ``seconds``, the process is killed and another one started, which then loads the function again
    (not counted as time of a completion). The process is a new Python, not a fork: it shares no
    memory, no CUDA context and no locks with the run; it is reused between calls, starts at the
    first one, and ends with the run. Each rank has its own.

    How many completions hit the limit is logged as ``reward/<term>_timeouts``.

    Args:
        fn: A reward function that another process can import: a function of a module, or an object
            of a class of a module.
        seconds: Longest time for one completion, > 0.
        on_timeout: Reward of a completion that hit the limit, said in a warning the first time;
            ``None`` makes it an error of that completion, and ``on_error`` of the term decides: to
            stop the run, to leave the completion without a reward, or to call again, which waits
            for the limit again.

    Attributes:
        counts: ``timeouts`` of the last call, and what the function itself counts.

    Raises:
        ValueError: If an argument is out of range, or ``fn`` cannot be sent to another process.
    """

    def __init__(
        self,
        fn: Callable[[list[dict], list[str]], Sequence[float | None]],
        seconds: float = 5.0,
        on_timeout: float | None = None,
    ) -> None:
        if not 0 < seconds < math.inf:
            raise ValueError(f"TimeLimit.seconds must be above 0 and finite, got {seconds}")
        if on_timeout is not None and not math.isfinite(on_timeout):
            raise ValueError(f"TimeLimit.on_timeout must be finite or null, got {on_timeout}")
        try:
            self.pickled = pickle.dumps(fn)
        except Exception as error:  # pickle raises many kinds; all mean the same here
            raise ValueError(
                f"TimeLimit.fn must be importable by another process, by the name of its module; "
                f"got {fn!r}: {error}"
            ) from error
        module = str(getattr(fn, "__module__", None))
        if module == "__main__":
            raise ValueError(
                "TimeLimit.fn must lie in a module that another process can import, not in the "
                f"program itself; got {fn!r}"
            )
        self.package = PACKAGE if module.startswith(f"{PACKAGE}.") else None
        self.column = getattr(fn, "column", None)
        self.check_row = getattr(fn, "check_row", None)
        self.seconds = seconds
        self.on_timeout = on_timeout
        self.counts_of_fn: dict[str, float] = dict.fromkeys(getattr(fn, "counts", {}), 0)
        self.counts: dict[str, float] = {"timeouts": 0, **self.counts_of_fn}
        self.worker: Worker | None = None
        self.warned = False

    def __call__(
        self, rows: list[dict], completions: list[str]
    ) -> list[float | TimeoutError | None]:
        """Score B completions, one after the other.

        Returns:
            What the function gives; where it hit the limit ``on_timeout``, or without that the
            error.

        Raises:
            ValueError: If the function raises, gives another number of values than one, or ends its
                process.
        """
        self.counts = {"timeouts": 0, **self.counts_of_fn}
        try:
            values = [self._score(*pair) for pair in zip(rows, completions, strict=True)]
        except ValueError:
            raise  # an error of the function is an answer: the process waits for a question
        except BaseException:
            self.release()  # after Ctrl-C an answer may be on its way that no question awaits
            raise
        if self.counts["timeouts"] and self.on_timeout is not None and not self.warned:
            self.warned = True
            warnings.warn(
                f"{self.counts['timeouts']} of {len(completions)} completions took a reward "
                f"function longer than {self.seconds:g} s and get {self.on_timeout}; further ones "
                "are only counted (reward/<term>_timeouts)",
                stacklevel=2,
            )
        return values

    def release(self) -> None:
        """End the process, if there is one; a further call starts another."""
        if self.worker is not None:
            self.worker.end()
            self.worker = None

    def _score(self, row: dict, completion: str) -> float | TimeoutError | None:
        if self.worker is None:
            self.worker = Worker(self.pickled, self.package)
        answer = self.worker.ask((row, completion), self.seconds)
        if answer is None:
            self.release()
            self.counts["timeouts"] += 1
            if self.on_timeout is None:
                limit = f"{self.seconds:g} s, which on_timeout or on_error can allow"
                return TimeoutError(f"took longer than {limit}")
            return self.on_timeout
        kind, value, counts = answer
        if kind == "error":
            if self.worker.process.poll() is not None:
                self.release()
            raise ValueError(value)
        for name in self.counts_of_fn:
            self.counts[name] += counts.get(name, 0)
        return value

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"worker": None}  # a copy starts a process of its own


class Worker:
    """A Python process that answers one question at a time.

    Args:
        pickled: The reward function.
        package: The package of this project if the function belongs to it; its files are then
            imported without the faces above them, which take seconds, at each start.
    """

    def __init__(self, pickled: bytes, package: str | None) -> None:
        self.connection, theirs = Pipe()
        # -P: the folder of this file must not become a place to import from
        command = [sys.executable, "-P", __file__, str(theirs.fileno()), str(os.getpid())]
        self.process = subprocess.Popen(
            command, pass_fds=[theirs.fileno()], stdin=subprocess.DEVNULL
        )
        theirs.close()  # or the end of the process would not be seen here
        # also where the owner is dropped, or the interpreter ends, without release
        self.end = weakref.finalize(self, end_process, self.process, self.connection)
        ready = self.ask((list(sys.path), pickled, package), START_SECONDS)
        if ready is None or ready[0] == "error":
            self.end()
            text = f"not ready after {START_SECONDS:g} s" if ready is None else ready[1]
            raise ValueError(f"the process of a TimeLimit cannot load its function: {text}")

    def ask(self, question: Any, seconds: float) -> Answer | None:
        """Send a question; the answer, or None after ``seconds``."""
        try:
            self.connection.send(question)
            return self.connection.recv() if self.connection.poll(seconds) else None
        except (EOFError, BrokenPipeError, ConnectionResetError):
            try:
                code = self.process.wait(CLOSED_SECONDS)
            except subprocess.TimeoutExpired:  # it lives on without the connection
                self.process.kill()
                self.process.wait()
                return "error", "the function closed the files of its process", {}
            return "error", f"the function ended its process, exit code {code}", {}


def end_process(process: subprocess.Popen, connection: Connection) -> None:
    """Kill a process and collect its exit code, so that no zombie stays."""
    connection.close()
    process.kill()
    process.wait()


class GuestStream:
    """A standard stream as a reward function has it: it stays open, and shows so much of a call.

    One object serves all calls: who has found it in ``sys``, such as logging, keeps it.
    """

    def __init__(self) -> None:
        self.stream: Any = None

    def open(self, stream: Any, free: int | None = None) -> None:
        """Begin a call; what the thread ``free`` prints is not counted."""
        self.stream, self.free = stream, free
        self.count, self.limit, self.closed_by_guest = 0, PRINTED, False

    def write(self, text: str) -> int:
        if threading.get_ident() != self.free:
            left = max(0, self.limit - self.count)
            self.count += len(text)
            if len(text) > left:
                if left:  # a line end, or the run's next line would hang on this one
                    self.stream.write(text[:left].removesuffix("\n") + "\n")
                return len(text)
        return self.stream.write(text)

    def writelines(self, lines: list[str]) -> None:
        for line in lines:
            self.write(line)

    def close(self) -> None:
        self.closed_by_guest = True

    def detach(self) -> Any:
        self.closed_by_guest = True
        return self.stream.buffer

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)


# --- the process itself ---------------------------------------------------------------------------


def serve(connection: Connection) -> None:
    """Answer questions until the other side is gone."""
    paths, pickled, package = connection.recv()
    sys.path[:] = paths
    if package is not None:
        room = os.path.dirname(__file__)
        for name, folder in ((package, os.path.dirname(room)), (f"{package}.rewards", room)):
            sys.modules[name] = ModuleType(name)
            sys.modules[name].__path__ = [folder]
    try:
        fn = pickle.loads(pickled)
    except BaseException as error:  # a module may also exit
        connection.send(("error", f"{kind_of(error)}: {error_text(error)}", {}))
        return
    connection.send(("value", None, {}))
    process = os.getpid()
    while True:
        row, completion = connection.recv()
        answer = answer_one(fn, row, completion)
        if os.getpid() != process:
            os._exit(0)  # a second answer, of a forked child, would be taken for the next one's
        connection.send(answer)


def answer_one(fn: Any, row: dict, completion: str) -> Answer:
    """Call the function; whatever comes of it is an answer."""
    sys.stdout = sys.stderr = _printed
    _printed.open(sys.__stderr__)
    try:
        given = fn([row], [completion])
        values = [awaited(value) for value in islice(awaited(given), 2)]
        if len(values) != 1:
            many = len(given) if hasattr(given, "__len__") else len(values)
            return "error", f"gave {many} values for 1 completion", {}
        counts = {name: float(n) for name, n in dict(getattr(fn, "counts", {})).items()}
        return "value", as_number(values[0]), counts
    except BaseException as error:  # also SystemExit: the process can answer further questions
        return "error", told(error), {}


def as_number(value: Any) -> float | None:
    """What a function gave for a completion; texts are refused: `1_0` and `nan` would pass."""
    if isinstance(value, BaseException):
        raise value
    if isinstance(value, str | bytes):
        raise TypeError(f"the {kind_of(value)} {value[:40]!r}")
    if hasattr(value, "detach"):  # torch warns of tensors that have a gradient
        value = value.detach()
    return None if value is None else float(value)


def awaited(given: Any) -> Any:
    """What an ``async`` function gives, in one loop for the life of the process."""
    if not hasattr(given, "__await__"):
        return given
    global _loop
    if _loop is None:
        import asyncio  # takes a while, which most functions need not pay for

        _loop = asyncio.new_event_loop()
    return _loop.run_until_complete(given)


_loop: Any = None
_printed = GuestStream()


def told(error: BaseException, kind: str | None = None) -> str:
    """An error in one line: its kind, its text, and the line that raised it."""
    kind = kind_of(error) if kind is None else kind
    frame = traceback.extract_tb(error.__traceback__, limit=-1)[-1]
    what = ": ".join(filter(None, (kind, error_text(error))))
    return f"{what} ({os.path.basename(frame.filename)}:{frame.lineno})"


def kind_of(value: Any) -> str:
    """The name of a value's class, which a function may have made up."""
    # Of a class whose own class has a `__name__`, that one would answer, or raise.
    return type.__dict__["__name__"].__get__(type(value))[:80]


def error_text(error: BaseException, limit: int = 160) -> str:
    r"""The text of any error in one line, cut.

    >>> error_text(ValueError("no\n  such row"))
    'no such row'
    """
    try:
        text = str(error)[: 10 * limit]
    except BaseException:  # the text is made by whoever made the error
        return UNSPEAKABLE
    return " ".join(text.split())[:limit]


def end_with(parent: int) -> None:
    """End this process when the one that started it is gone, even in the middle of a call."""
    while os.getppid() == parent:
        time.sleep(1)
    os._exit(1)


def main() -> None:
    """Be the worker process of the connection and the parent that the arguments name."""
    import contextlib
    import signal

    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the run, which ends this process
    threading.Thread(target=end_with, args=(int(sys.argv[2]),), daemon=True).start()
    os.dup2(2, 1)  # what the function prints must not end up in the run's output
    with contextlib.suppress(EOFError, BrokenPipeError, ConnectionResetError):
        serve(Connection(int(sys.argv[1])))


if __name__ == "__main__":
    main()
