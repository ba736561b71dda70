"""Try the settings of docs/choosing_settings.md on the embedded task, and print its tables.

python -m gspo_lightning.compare.settings

Each line is one run of `gspo fit` with base.yaml, task/arithmetic.yaml, hardware/cpu.yaml and
what the line says, one seed, on one thread. Decides which settings are tried. The lines "chat" and
"base" train two models that are made first. A run that is complete is not made again.
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

from gspo_lightning.compare import made_models
from gspo_lightning.compare.plan import RECORD
from gspo_lightning.run.one_line import quiet
from gspo_lightning.run.terminal_log import say

STACK = ("configs/base.yaml", "configs/task/arithmetic.yaml", "configs/hardware/cpu.yaml")
GROUP, PROMPTS = 8, 16
MADE = "made"  # folder of the models that are made, beside the runs
LAST = 5  # rollouts whose mean stands in the table
RATE, LOW, HIGH = (f"--model.{n}" for n in ("optimizer.learning_rate", "objective.clip_low",
                                            "objective.clip_high"))  # fmt: skip
WIDE = f"{LOW} 4e-3 {HIGH} 5e-3"  # what the doctor proposes at a rate of 2e-4
LORA = "--model.policy.lora.rank 8 --model.policy.lora.alpha 16"
HALF = "--trainer.precision bf16-mixed"
# {made}: where made_models writes; 8 completions at a time are a group, as base.yaml has it
CHAT = f"--data.chat_template true --model.policy.path {{made}}/chat/policy {RATE} 2e-4"
CHAT += " --model.micro_batch_size 8"
CHAT_WIDE = f"{LOW} 1e-2 {HIGH} 2e-2"  # the doctor's for the chat model, and for the base model:
BASE_WIDE = f"{LOW} 7e-3 {HIGH} 9e-3"
BASE = "--config configs/sampler/few_shot.yaml --model.policy.path {made}/base/policy"
BASE += " --data.path {made}/base/train.jsonl --data.val_path {made}/base/heldout.jsonl"
BASE += f" --data.max_prompt_tokens 64 --model.micro_batch_size 8 {RATE} 2e-4"
ENDLESS = "--model.policy.stop_strings []"
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
    "chat": CHAT,
    "chat, range 1e-2 / 2e-2": f"{CHAT} {CHAT_WIDE}",
    "chat, bf16-mixed": f"{CHAT} {HALF}",
    "chat, bf16-mixed, range 1e-2 / 2e-2": f"{CHAT} {HALF} {CHAT_WIDE}",
    "chat, a mini-batch at once": f"{CHAT} --model.micro_batch_size null",
    "chat, end of turn unknown": f"{CHAT} --model.policy.path {{made}}/chat/open",
    "base": BASE,
    "base, range 7e-3 / 9e-3": f"{BASE} {BASE_WIDE}",
    "base, keep": f"{BASE} --model.truncated keep",
    "base, no stop strings": f"{BASE} {ENDLESS}",
    "base, no stop strings, keep": f"{BASE} {ENDLESS} --model.truncated keep",
}
COLUMNS = {  # of the table: a figure of the last rollouts
    "tokens": ("train/avg_response_length", "{:.1f}"),
    "tokens clipped": ("train/clip_fraction_tokens", "{:.0%}"),
    "spread of log s": ("policy/sequence_log_ratio_std", "{:.1e}"),
    "noise": ("policy/sampler_noise", "{:.0e}"),
    "KL": ("train/kl_divergence", "{:.3f}"),
    "cut": ("rollout/truncated_fraction", "{:.0%}"),
}
MADE_COLUMNS = {
    "reward": ("train/reward", "{:.2f}")
} | COLUMNS  # held-out scores know no truncation


def command(name: str, folder: Path, rollouts: int) -> list[str]:
    """The words of ``gspo`` for a run."""
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
        *("fit", *files, *shlex.split(TRIED[name].replace("{made}", str(folder.parent / MADE)))),
        *("--data.num_rollouts", str(rollouts), "--trainer.val_check_interval", str(rollouts)),
        *("--trainer.default_root_dir", str(folder), "--trainer.enable_progress_bar", "false"),
    ]


def train(what: str, words: list[str], log: Path) -> None:
    """Run ``gspo`` on one thread, its output in ``log``.

    Raises:
        RuntimeError: If it fails, naming what and the log.
    """
    with log.open("w", encoding="utf-8") as out:
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        command = [sys.executable, "-m", "gspo_lightning", *words]
        code = subprocess.call(command, stdout=out, stderr=out, env=environment)
    if code:
        raise RuntimeError(f"{what} failed, see {log}")


def make(kind: str, root: Path) -> None:
    """Make a model unless it is there; raises as :func:`train` does."""
    folder = root / MADE / kind
    if not (folder / "policy").exists():
        with quiet():
            tokenizer = made_models.prepare(kind, folder)
        train(f"the {kind} model", made_models.training(kind, folder), folder / "sft.log")
        made_models.finish(kind, folder, tokenizer)


def run(name: str, root: Path, rollouts: int) -> dict[str, Any]:
    """Make a run unless it is there; returns its record; raises as :func:`train` does."""
    folder = root / "".join(c if c.isalnum() or c in "-." else "_" for c in name)
    record = folder / RECORD
    if not record.exists():
        train(name, command(name, folder, rollouts), folder.with_suffix(".log"))
    return json.loads(record.read_text())


def columns(name: str) -> dict[str, tuple[str, str]]:
    """Of the table in which a line stands: that of the shipped policy, or of the models made."""
    return MADE_COLUMNS if "{made}" in TRIED[name] else COLUMNS


def line(name: str, record: dict[str, Any]) -> list[str]:
    """A line of the table: accuracies held out, figures as means of the last rollouts."""
    held_out = record["validations"][-1]
    cells = [name, f"{held_out['val/accuracy_greedy']:.3f}"]
    cells.append(f"{held_out['val/accuracy_sampled']:.3f}")
    for figure, shape in columns(name).values():
        values = [r[figure] for r in record["rollouts"][-LAST:] if r.get(figure) is not None]
        cells.append(shape.format(statistics.mean(values)) if values else "")
    return cells


def main(argv: list[str] | None = None) -> int:
    """Run all and print the table; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m gspo_lightning.compare.settings")
    parser.add_argument("--runs", type=Path, default=Path("runs/settings"), help="their folder")
    parser.add_argument("--rollouts", type=int, default=30, help="of each run")
    options = parser.parse_args(argv)
    tables: dict[tuple[str, ...], list[str]] = {}  # lines by heads
    try:
        for kind in made_models.KINDS:
            make(kind, options.runs)
        for done, name in enumerate(TRIED, start=1):
            cells = line(name, run(name, options.runs, options.rollouts))
            say(f"[{done}/{len(TRIED)}] {' | '.join(cells)}")
            head = ("settings", "greedy", "sampled", *columns(name))
            tables.setdefault(head, []).append("| " + " | ".join(cells) + " |")
    except RuntimeError as error:
        say(f"error: {error}")
        return 2
    for head, lines in tables.items():
        print("", "| " + " | ".join(head) + " |", "|---|" + "---:|" * (len(head) - 1), sep="\n")
        print("\n".join(lines))
    return 0


if __name__ == "__main__":
    sys.exit(main())
