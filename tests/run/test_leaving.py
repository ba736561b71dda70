"""The end of a process in which something is still at work."""

import subprocess
import sys

import pytest

from support.repository import ROOT

START = """
import atexit, threading, time, multiprocessing, concurrent.futures
from gspo_lightning.run import leaving
leaving.PATIENCE = 0.2
atexit.register(print, "handlers ran", flush=True)
pool = concurrent.futures.ThreadPoolExecutor(1, "judge")
pool.submit(time.sleep, {seconds})
{more}
leaving.leave({code})
"""
PROCESS = "multiprocessing.get_context('fork').Process(target=time.sleep, args=[60]).start()"
LATE = "atexit.register(time.sleep, 0.5)"


@pytest.mark.parametrize(
    ("seconds", "more", "code", "out", "err"),
    [
        (60, "", 0, "handlers ran\n", "late, without thread 'judge_0', still"),
        (60, PROCESS, 2, "handlers ran\n", "thread 'judge_0', process 'ForkProcess-1', still"),
        (0, PROCESS, 0, "handlers ran\n", "without process 'ForkProcess-1', still"),
        (0.01, LATE, 3, "handlers ran\n", ""),  # an idle pool ends by itself, handlers take longer
        (60, PROCESS, 143, "", ""),
    ],
)
def test_a_command_ends_whatever_is_still_at_work(seconds, more, code, out, err):
    program = START.format(seconds=seconds, more=more, code=code)
    found = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=20
    )
    assert (found.returncode, found.stdout) == (code, out)
    assert len(found.stderr.splitlines()) == bool(err) and err in found.stderr, found.stderr
