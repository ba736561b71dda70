"""Real ranks on gloo, forked from the test's process, so that none of them imports anything."""

import multiprocessing
import os
import socket
import time
import traceback

from gspo_lightning.guards.trainer import leave_out_noise


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def _one(number, count, port, answers, function, arguments):
    os.environ |= {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "WORLD_SIZE": str(count),
        "RANK": str(number),
        "LOCAL_RANK": str(number),
        "PL_GLOBAL_SEED": "0",
    }
    leave_out_noise()  # pytest takes filters away that were set as the package was imported
    try:
        answers.put((number, function(number, *arguments)))
    except BaseException as error:  # the test sees what a rank has raised
        traceback.print_exc()
        answers.put((number, f"{type(error).__name__}: {error}"))


def on_ranks(function, *arguments, count=2, seconds=30):
    """What ``function(rank, *arguments)`` returns on each rank: plain values; an error as text."""
    fork = multiprocessing.get_context("fork")
    answers, port = fork.Queue(), free_port()
    common = (count, port, answers, function, arguments)
    ranks = [fork.Process(target=_one, args=(number, *common)) for number in range(count)]
    for rank in ranks:
        rank.start()
    try:
        found = dict(answers.get(timeout=seconds) for _ in ranks)
    finally:
        for rank in ranks:
            rank.kill()
            rank.join()
    return [found[number] for number in range(count)]


def _ended(number, count, port, answers, function, arguments, log):
    with open(log, "w") as file:  # what a killed run says is no news of the test
        for stream in (1, 2):
            os.dup2(file.fileno(), stream)
        _one(number, count, port, answers, function, arguments)
        raise SystemExit(int(isinstance(answers.answer, str)))


class _Kept:
    """Takes the answer of a rank for its exit code."""

    answer = None

    def put(self, pair):
        self.answer = pair[1]


def exit_codes(function, *arguments, logs, count=2, seconds=300):
    """How ``function(rank, *arguments)`` ended on each rank: 0, 1 after an error, or -9 if killed.

    The ranks are a process group of their own; what each says is in ``logs``, ``rank0.txt`` ...
    """
    fork = multiprocessing.get_context("fork")
    common = (count, free_port(), _Kept(), function, arguments)
    ranks = [
        fork.Process(target=_ended, args=(number, *common, logs / f"rank{number}.txt"))
        for number in range(count)
    ]
    end = time.monotonic() + seconds
    for rank in ranks:
        rank.start()
        os.setpgid(rank.pid, ranks[0].pid)
    for rank in ranks:
        rank.join(max(0.0, end - time.monotonic()))
    codes = [rank.exitcode for rank in ranks]
    for rank in ranks:
        rank.kill()
        rank.join()
    assert None not in codes, f"a rank that lost another one did not end: {codes}"
    return codes
