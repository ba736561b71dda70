"""Whether a long run holds on to memory, files or threads: the demo in small, looked at on its way.

Decides what such a run does, which is all that a run can leave behind: pictures, samples, text and
curves for TensorBoard, validations, checkpoints and exports, by the command that users give.
"""

import argparse
import json
import os
import tempfile
from pathlib import Path
from typing import Any

import yaml
from lightning.pytorch import Callback

from gspo_lightning.bench.cases import heading, output_of, positive, resident
from gspo_lightning.bench.parts import DEMO
from gspo_lightning.bench.report import table

LOOKS = "looks.jsonl"
STRETCHES = 10  # lines of the table
# Often, so that many of each are made; the demo's own periods are longer.
PERIODS: dict[str, dict[str, Any]] = {
    "AdaptiveKL": {"initial": 0.05},
    "RolloutCheckpoint": {"every_n_rollouts": 5, "keep_last": 2},
    "SampleTable": {"text_every_n_rollouts": 5},
    "CurvePlot": {"every_n_rollouts": 5},
    "HFExport": {"every_n_rollouts": 25},
    "bench.memory.Looks": {},
}


class Looks(Callback):
    """Writes down after each rollout what the process holds, as JSON lines in the run folder."""

    def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
        look = {
            "rollout": trainer.fit_loop.total_batch_idx + 1,
            "resident": resident(),  # MiB
            "files": len(os.listdir("/proc/self/fd")),
            "threads": len(os.listdir("/proc/self/task")),
        }
        with Path(trainer.default_root_dir, LOOKS).open("a", encoding="utf-8") as file:
            file.write(json.dumps(look) + "\n")


def add_arguments(part: argparse.ArgumentParser) -> None:
    part.add_argument("--rollouts", type=positive, default=500)
    part.add_argument("--model", default=str(DEMO / "policy"))
    part.add_argument("--prompts", default=str(DEMO / "train.jsonl"))
    part.add_argument("--threads", type=positive, default=1)


def overlay(options: argparse.Namespace, root: Path) -> dict[str, Any]:
    """What the run changes in the demo: small and many rollouts, everything often."""
    callbacks = [
        {"class_path": f"gspo_lightning.{name}", "init_args": settings}
        for name, settings in PERIODS.items()
    ]
    sampler = {"group_size": 4, "max_new_tokens": 8}
    data = {"path": options.prompts, "val_path": options.prompts, "val_batch_size": 16}
    data |= {"num_rollouts": options.rollouts, "prompts_per_rollout": 4}
    return {
        "trainer": {
            "default_root_dir": str(root),
            "val_check_interval": 25,
            "limit_val_batches": 1,
            "num_sanity_val_steps": 0,
            "enable_progress_bar": False,
            "callbacks": callbacks,
        },
        "model": {
            "init_args": {
                "policy": {"path": options.model},
                "sampler": {"init_args": sampler},
                "evaluation": {"num_samples": 1, "ks": [1]},
            }
        },
        "data": {"init_args": data},
    }


def memory(options: argparse.Namespace) -> int:
    """Make the run and print what its process held on its way."""
    with tempfile.TemporaryDirectory(dir=".") as folder:  # not /tmp, often memory
        root = Path(folder, "run")
        own = Path(folder, "overlay.yaml")
        own.write_text(yaml.safe_dump(overlay(options, root)), encoding="utf-8")
        configs = ["--config", "arithmetic", "--config", str(own)]
        output_of(["-m", "gspo_lightning", "fit", *configs], options.threads)
        looks = [json.loads(line) for line in (root / LOOKS).read_text().splitlines()]
    print(heading(options, []))
    print(table(rows(looks)))
    return 0


def rows(looks: list[dict[str, float]]) -> list[list[str]]:
    """Rows of a table, one for each of up to ``STRETCHES`` stretches of the run.

    Least and most resident memory, as it rises and falls from one rollout to the next; of files and
    threads the most.
    """
    length = -(-len(looks) // STRETCHES)
    found = [["rollouts", "least MiB", "most MiB", "open files", "threads"]]
    for part in (looks[start : start + length] for start in range(0, len(looks), length)):
        held = [look["resident"] for look in part]
        most = (max(look[name] for look in part) for name in ("files", "threads"))
        stretch = f"{part[0]['rollout']} to {part[-1]['rollout']}"
        found.append([stretch, f"{min(held):.1f}", f"{max(held):.1f}", *map(str, most)])
    return found
