"""Try the settings of docs/choosing_settings.md on the embedded task, and print its table.

python -m gspo_lightning.compare.settings

Each line is one run of `train.py fit` with base.yaml, task/arithmetic.yaml, hardware/cpu.yaml and
what the line says, one seed, on one thread. Decides which settings are tried. A run that is
complete is not made again.
"""

import argparse
import json
import os
import shlex
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

import yaml

from gspo_lightning.compare.plan import RECORD
from gspo_lightning.run.terminal_log import say

STACK = ("configs/base.yaml", "configs/task/arithmetic.yaml", "configs/hardware/cpu.yaml")
GROUP, PROMPTS = 8, 16
LAST = 5  # rollouts whose mean stands in the table
RATE, LOW, HIGH = (f"--model.{n}" for n in ("optimizer.learning_rate", "objective.clip_low",
                                            "objective.clip_high"))  # fmt: skip
WIDE = f"{LOW} 4e-3 {HIGH} 5e-3"  # what the doctor proposes at a rate of 2e-4
LORA = "--model.policy.lora.rank 8 --model.policy.lora.alpha 16"
HALF = "--trainer.precision bf16-mixed"
TRIED = {  # the line in words, and its options
    "full, 2e-5": f"{RATE} 2e-5",
    "full, 2e-4": f"{RATE} 2e-4",
    "full, 2e-3": f"{RATE} 2e-3",
    "full, 2e-5, range 4e-3 / 5e-3": f"{RATE} 2e-5 {WIDE}",
    "full, 2e-4, range 4e-3 / 5e-3": f"{RATE} 2e-4 {WIDE}",
    "LoRA, 2e-4": f"{LORA} {RATE} 2e-4",
    "LoRA, 2e-3": f"{LORA} {RATE} 2e-3",
    "LoRA, 2e-2": f"{LORA} {RATE} 2e-2",
    "LoRA, 2e-3, range 4e-3 / 5e-3": f"{LORA} {RATE} 2e-3 {WIDE}",
    "full, 2e-4, bf16-mixed": f"{RATE} 2e-4 {HALF}",
    "full, 2e-4, bf16-mixed, range 4e-3 / 5e-3": f"{RATE} 2e-4 {HALF} {WIDE}",
    "full, 2e-4, KL target 0.05": "--config configs/kl/adaptive.yaml",
    "full, 2e-4, limit 12, keep": "--model.sampler.max_new_tokens 12 --model.truncated keep",
    "full, 2e-4, limit 12, zero_reward": "--model.sampler.max_new_tokens 12",
    "full, 2e-4, limit 12, mask": "--model.sampler.max_new_tokens 12 --model.truncated mask",
}
COLUMNS = {  # of the table: a figure of the last rollouts
    "tokens": ("train/avg_response_length", "{:.1f}"),
    "tokens clipped": ("train/clip_fraction_tokens", "{:.0%}"),
    "spread of log s": ("policy/sequence_log_ratio_std", "{:.1e}"),
    "noise": ("policy/sampler_noise", "{:.0e}"),
    "KL": ("train/kl_divergence", "{:.3f}"),
    "cut": ("rollout/truncated_fraction", "{:.0%}"),
}


def command(name: str, folder: Path, rollouts: int) -> list[str]:
    """The command line of a run."""
    record = {
        "class_path": "gspo_lightning.compare.experiment.RunRecord",
        "init_args": {"completions": GROUP * PROMPTS * rollouts},
    }
    own = folder.with_suffix(".yaml")
    own.parent.mkdir(parents=True, exist_ok=True)
    overlay = {  # a reference, so that the KL is measured where the loss has none, too
        "trainer": {"callbacks+": [record]},
        "model": {"init_args": {"reference": {}}},
    }
    own.write_text(yaml.safe_dump(overlay))
    files = [part for file in (*STACK, str(own)) for part in ("--config", file)]
    return [
        *(sys.executable, "train.py", "fit", *files, *shlex.split(TRIED[name])),
        *("--data.num_rollouts", str(rollouts), "--trainer.val_check_interval", str(rollouts)),
        *("--trainer.default_root_dir", str(folder), "--trainer.enable_progress_bar", "false"),
    ]


def run(name: str, root: Path, rollouts: int) -> dict[str, Any]:
    """Make a run unless it is there; returns its record.

    Raises:
        RuntimeError: If it fails.
    """
    folder = root / "".join(c if c.isalnum() or c in "-." else "_" for c in name)
    record, log = folder / RECORD, folder.with_suffix(".log")
    if not record.exists():
        words = command(name, folder, rollouts)
        with log.open("w") as out:
            environment = os.environ | {"OMP_NUM_THREADS": "1"}
            code = subprocess.call(words, stdout=out, stderr=out, env=environment)
        if code:
            raise RuntimeError(f"{name} failed, see {log}")
    return json.loads(record.read_text())


def line(name: str, record: dict[str, Any]) -> list[str]:
    """A line of the table: accuracies held out, figures as means of the last rollouts."""
    held_out = record["validations"][-1]
    cells = [name, f"{held_out['val/accuracy_greedy']:.3f}"]
    cells.append(f"{held_out['val/accuracy_sampled']:.3f}")
    for figure, shape in COLUMNS.values():
        values = [r[figure] for r in record["rollouts"][-LAST:] if r.get(figure) is not None]
        cells.append(shape.format(statistics.mean(values)) if values else "")
    return cells


def main(argv: list[str] | None = None) -> int:
    """Run all and print the table; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m gspo_lightning.compare.settings")
    parser.add_argument("--runs", type=Path, default=Path("runs/settings"), help="their folder")
    parser.add_argument("--rollouts", type=int, default=30, help="of each run")
    options = parser.parse_args(argv)
    head = ["settings", "greedy", "sampled", *COLUMNS]
    lines = ["| " + " | ".join(head) + " |", "|---|" + "---:|" * (len(head) - 1)]
    try:
        for done, name in enumerate(TRIED, start=1):
            cells = line(name, run(name, options.runs, options.rollouts))
            say(f"[{done}/{len(TRIED)}] {' | '.join(cells)}")
            lines.append("| " + " | ".join(cells) + " |")
    except RuntimeError as error:
        say(f"error: {error}")
        return 2
    print("\n".join(lines))
    return 0


if __name__ == "__main__":
    sys.exit(main())
