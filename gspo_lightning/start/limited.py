"""Run a Python program in a process with limits of time, memory and output.

Decides what such a program sees, and that it and what it started are killed at its end. This is no
sandbox: a program may read and write whatever its user may, and use the network.
"""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import IO

WORKER = Path(__file__).with_name("one_program.py")
LARGEST_FILE = 4 << 20  # bytes of output, and of each file that a program writes


def run_program(
    folder: Path, given: IO[bytes], seconds: float, memory: int, *, check: bool = False
) -> tuple[str | None, int]:
    """Run ``solution.py`` of a folder, in an empty folder below it.

    Args:
        folder: Holds the program, and what else ``one_program`` reads there.
        given: What it reads on standard input.
        seconds: Longest time, the start of Python (some 0.02 s) included.
        memory: Address space in bytes.
        check: Run ``test.py`` of the folder behind it.

    Returns:
        What it printed, None if it took longer, and its exit code.
    """
    work, output = folder / "work", folder / "output"
    work.mkdir()
    limits = [str(memory), str(int(seconds) + 2), str(LARGEST_FILE)]
    kind = "check" if check else "program"
    with output.open("w+b") as printed:
        process = subprocess.Popen(
            [sys.executable, "-P", "-S", "-B", WORKER, kind, folder, *limits, *packages()],
            stdin=given,
            stdout=printed,  # a file, whose end no process left behind can keep open
            stderr=subprocess.DEVNULL,
            cwd=work,
            env=environment(work),
            start_new_session=True,
        )
        in_time = wait(process, seconds)
        printed.seek(0)  # not by its name: a program may delete the folder
        said = printed.read(LARGEST_FILE + 1).decode(errors="replace")
    return (said if in_time else None), process.returncode


def wait(process: subprocess.Popen, seconds: float) -> bool:
    """Wait for a process, then kill its session; whether it ended by itself in time."""
    end = time.monotonic() + seconds
    pause = 0.002
    ended = None
    try:
        while ended is None and time.monotonic() < end:
            time.sleep(pause)
            pause = min(2 * pause, 0.05)
            # WNOWAIT: until it is waited for, no other process can get the number that is killed
            ended = os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT)
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    return ended is not None


def packages() -> list[str]:
    """Folders of installed packages: all that a program can import beside the standard library."""
    return [path for path in sys.path if path.endswith(("site-packages", "dist-packages"))]


def environment(home: Path) -> dict[str, str]:
    """What a program sees of it: no keys, no tokens, the same order of sets each time."""
    kept = {key: os.environ[key] for key in ("PATH", "LD_LIBRARY_PATH") if key in os.environ}
    threads = {f"{name}_NUM_THREADS": "1" for name in ("OMP", "OPENBLAS", "MKL")}
    fixed = {"LANG": "C.UTF-8", "PYTHONHASHSEED": "0", "HOME": str(home), "TMPDIR": str(home)}
    return kept | threads | fixed
