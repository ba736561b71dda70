"""How long a command takes to begin: its help, its first line, and the demo's first rollout.

Decides what is timed, from the start of the process: seconds on the clock, and those of the CPU,
which a busy machine does not stretch as much. Several checkouts are timed in turn (A B A B).
"""

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from gspo_lightning.bench.cases import BenchError, heading, positive
from gspo_lightning.bench.report import table
from gspo_lightning.run.terminal_log import say

DEMO = ["fit", "--config", "configs/arithmetic.yaml"]
COLUMNS = ("help", "first line", "first rollout", "CPU s to it")


def add_arguments(part: argparse.ArgumentParser) -> None:
    part.add_argument("--against", type=Path, nargs="*", default=[], help="other checkouts")
    part.add_argument("--repeats", type=positive, default=5)
    part.add_argument("--threads", type=positive, default=1)


def start(options: argparse.Namespace) -> int:
    """Time all checkouts in turn and print the medians."""
    places = {"this": Path(__file__).parents[2]}
    places |= {str(path): path.resolve() for path in options.against}
    times: dict[str, list[list[float]]] = {name: [] for name in places}
    for repeat in range(options.repeats + 1):
        for name, place in places.items():
            found = timed(place, options.threads)
            if repeat:  # before the first one the files had to come from the disk
                times[name].append(found)
                say(f"[{repeat}/{options.repeats}] {name}: {found[2]:.1f} s to the first rollout")
    rows = [["checkout", *COLUMNS]]
    for name, runs in times.items():
        of_column = [sorted(column) for column in zip(*runs, strict=True)]
        rows.append([name, *(f"{statistics.median(c):.2f} ({c[0]:.2f})" for c in of_column)])
    print(heading(options, []))
    print("Seconds: median (least)\n")
    print(table(rows))
    return 0


def timed(place: Path, threads: int) -> list[float]:
    """Seconds of one start of the command of a checkout, by ``COLUMNS``."""
    environment = os.environ | {"OMP_NUM_THREADS": str(threads), "PYTHONPATH": str(place)}
    environment["PYTHONUNBUFFERED"] = "1"
    command = [sys.executable, str(place / "train.py")]
    begun = time.perf_counter()
    subprocess.run([*command, "--help"], check=True, capture_output=True, env=environment)
    times = [time.perf_counter() - begun]
    with tempfile.TemporaryDirectory() as folder:
        options = ["--trainer.default_root_dir", f"{folder}/run"]
        begun = time.perf_counter()
        process = subprocess.Popen(
            [*command, *DEMO, *options],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env=environment,
            cwd=place,
        )
        assert process.stdout is not None
        for line in process.stdout:
            if len(times) == 1:
                times.append(time.perf_counter() - begun)
            if line.startswith("rollout"):
                times += [time.perf_counter() - begun, cpu_seconds(process.pid)]
                break
        process.kill()
        process.communicate()
    if len(times) != len(COLUMNS):
        raise BenchError(f"{place}: the demo does not come to its first rollout")
    return times


def cpu_seconds(pid: int) -> float:
    """Seconds that a process has computed so far."""
    fields = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
