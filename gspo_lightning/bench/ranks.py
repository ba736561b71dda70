"""Weak scaling: seconds of a rollout with one rank and with several, and what of them is waiting.

Decides what is run: the demo, with the same work for each rank, so that a perfect scaling would
take the same seconds with any number of them.
"""

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import yaml
from lightning.pytorch import Callback

from gspo_lightning.bench.cases import heading, output_of, positive
from gspo_lightning.bench.report import table
from gspo_lightning.run.terminal_log import say

FILE = "seconds.rank{}.jsonl"
PHASES = ("rollout", "score", "optimise")


class Seconds(Callback):
    """Writes down the seconds of each rollout on this rank, as JSON lines in the run folder."""

    def __init__(self) -> None:
        self.begun = 0.0

    def on_train_batch_start(self, *_: Any) -> None:
        self.begun = time.perf_counter()

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, *_: Any) -> None:
        found = outputs["metrics"]
        times = {name: found[f"time/{name}"] for name in PHASES}
        times["waiting"] = sum(s for name, s in found.items() if name.startswith("time/waiting_"))
        times["all"] = time.perf_counter() - self.begun
        path = Path(trainer.default_root_dir, FILE.format(trainer.global_rank))
        with path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(times) + "\n")


def add_arguments(part: argparse.ArgumentParser) -> None:
    part.add_argument("--ranks", type=positive, nargs="+", default=[1, 2])
    part.add_argument("--rollouts", type=positive, default=10, help="timed, after 3 that are not")
    part.add_argument("--repeats", type=positive, default=3)
    part.add_argument("--threads", type=positive, default=1)


def ranks(options: argparse.Namespace) -> int:
    """Time all numbers of ranks in turn and print the medians."""
    times: dict[int, list[dict[str, float]]] = {count: [] for count in options.ranks}
    for repeat in range(1, options.repeats + 1):
        for count in options.ranks:
            times[count] += timed(count, options)
            say(f"[{repeat}/{options.repeats}] {count} rank(s)")
    print(heading(options, []))
    print(table(rows(times)))
    return 0


def timed(count: int, options: argparse.Namespace) -> list[dict[str, float]]:
    """Seconds of each timed rollout, each a mean over the ranks of one run."""
    with tempfile.TemporaryDirectory(dir=".") as folder:  # not /tmp, often memory
        root, own = Path(folder, "run"), Path(folder, "overlay.yaml")
        own.write_text(yaml.safe_dump(overlay(count, root, options.rollouts + 3)), encoding="utf-8")
        configs = ["--config", "arithmetic", "--config", str(own)]
        output_of(["-m", "gspo_lightning", "fit", *configs], options.threads)
        texts = [(root / FILE.format(rank)).read_text() for rank in range(count)]
    runs = [[json.loads(line) for line in text.splitlines()[3:]] for text in texts]
    return [
        {name: statistics.fmean(one[name] for one in same) for name in same[0]}
        for same in zip(*runs, strict=True)
    ]


def overlay(count: int, root: Path, rollouts: int) -> dict[str, Any]:
    """What the run changes in the demo: nothing is validated, saved or learned."""
    return {
        "trainer": {
            "default_root_dir": str(root),
            "strategy": "ddp",
            "devices": count,
            "limit_val_batches": 0,
            "num_sanity_val_steps": 0,
            "logger": False,
            "enable_checkpointing": False,
            "enable_progress_bar": False,
            "callbacks": [{"class_path": "gspo_lightning.bench.ranks.Seconds"}],
        },
        "model": {"init_args": {"optimizer": {"learning_rate": 1e-12}}},  # completions stay alike
        "data": {"init_args": {"num_rollouts": rollouts, "val_path": None}},
    }


def rows(times: dict[int, list[dict[str, float]]]) -> list[list[str]]:
    """Rows of a table, one for each number of ranks; speeds are compared with the first one's."""
    names = ("all", *PHASES, "waiting")
    found = [["ranks", "s per rollout", *PHASES, "waiting", "share", "speed a rank"]]
    first: float | None = None
    for count, runs in times.items():
        middle = {name: statistics.median(run[name] for run in runs) for name in names}
        first = first or middle["all"]
        seconds = [f"{middle[name]:.3f}" for name in names]
        share, speed = middle["waiting"] / middle["all"], first / middle["all"]
        found.append([str(count), *seconds, f"{share:.0%}", f"{speed:.0%}"])
    return found
