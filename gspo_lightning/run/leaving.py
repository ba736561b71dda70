"""The end of the process, while something of a reward's or a callback's may still be at work.

Decides how long it is waited for. Imports the standard library alone.
"""

import atexit
import multiprocessing
import os
import sys
import threading
import time
from contextlib import suppress
from multiprocessing.process import BaseProcess
from typing import NoReturn

PATIENCE = 5.0  # seconds
SHOWN = 3  # names in the line


def leave(code: int) -> NoReturn:
    """End the process.

    Python waits for threads and processes that are no daemons, for ever if need be: a judge that
    never answers would keep the machine. They get ``PATIENCE`` seconds, and none after a signal.
    """
    threads = [thread for thread in threading.enumerate() if not thread.daemon]
    threads.remove(threading.main_thread())
    children = [child for child in multiprocessing.active_children() if not child.daemon]
    if code > 128:
        for child in children:
            child.kill()
        if threads:
            _exit(code)
    elif threads or children:
        threading.Thread(target=_end_late, args=(threads, children, code), daemon=True).start()
    sys.exit(code)


def _end_late(threads: list[threading.Thread], children: list[BaseProcess], code: int) -> None:
    """Name what is still at work, and end without it."""
    time.sleep(PATIENCE)
    threads = [thread for thread in threads if thread.is_alive()]
    children = [child for child in children if child.is_alive()]
    names = [f"thread {thread.name[:80]!r}" for thread in threads]
    names += [f"process {child.name[:80]!r}" for child in children]
    if not names:  # what ends by itself at exit may still take its time
        return
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    with suppress(Exception):  # nobody may be there to read it
        sys.stderr.write(
            f"ended {PATIENCE:g} seconds late, without {', '.join(names[:SHOWN])}{more}, "
            "still at work: a reward function or callback has to end what it starts\n"
        )
    for child in children:
        child.kill()
    if threads:  # none can be killed: only the end of this process stops it
        atexit._run_exitfuncs()
        _exit(code)


def _exit(code: int) -> NoReturn:
    for stream in (sys.stdout, sys.stderr):
        with suppress(Exception):
            stream.flush()
    os._exit(code)
