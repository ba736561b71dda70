"""Compare algorithms on one task.

gspo compare compare/arithmetic

Reads a plan (which overlays, how many updates a rollout, which seeds), runs `gspo fit` for each
of them, several at a time, and writes one CSV, one figure a section and one report. A complete run
is not run again, one that was stopped goes on from its checkpoint: the same command ends the work.
Decides what a run of a comparison is.
"""

import argparse
import csv
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import asdict
from pathlib import Path
from typing import Any

import yaml

from gspo_lightning.compare.plan import RECORD, Arm, Plan, arms, merged, read_plan, settings
from gspo_lightning.compare.report import Run, write_report
from gspo_lightning.run.terminal_log import say
from gspo_lightning.start.typed import program

PLACE = ("section", "algorithm", "updates", "seed")
COLUMNS = {  # of the CSV: the figure of a rollout behind each
    "completions": "completions",
    "reward": "train/reward",
    "entropy": "policy/entropy",
    "clip_fraction_sequences": "train/clip_fraction_sequences",
    "clip_fraction_tokens": "train/clip_fraction_tokens",
    "kl": "train/kl_divergence",
    "length": "train/avg_response_length",
    "token_log_ratio_std": "policy/token_log_ratio_std",
    "sequence_log_ratio_std": "policy/sequence_log_ratio_std",
    "expert_change": "moe/expert_change",
    "expert_change_rollout": "moe/expert_change_rollout",
}
VALIDATED = {"accuracy_greedy": "val/accuracy_greedy", "accuracy_sampled": "val/accuracy_sampled"}


def command(plan: Plan, arm: Arm, folder: Path) -> list[str]:
    """The command line of a run; its last overlay lies beside the run's folder."""
    own = folder.with_suffix(".yaml")
    own.parent.mkdir(parents=True, exist_ok=True)
    text = f"# What the comparison adds to the overlay {arm.algorithm}.\n"
    own.write_text(text + yaml.safe_dump(settings(plan, arm), sort_keys=False))
    return [
        *(sys.executable, "-m", "gspo_lightning", "fit"),
        *(part for file in [*plan.files(arm), str(own)] for part in ("--config", file)),
        *("--seed_everything", str(arm.seed)),
        *("--trainer.default_root_dir", str(folder)),
        *("--trainer.enable_progress_bar", "false", "--ckpt_path", "auto"),
    ]


def run(plan: Plan, arm: Arm, root: Path) -> dict[str, Any]:
    """Make one run, unless it is complete, and give its record.

    Raises:
        RuntimeError: If the run fails; the message has its last line and its log.
    """
    folder = root / arm.name
    mark = [asdict(arm), settings(plan, arm), merged(plan.files(arm))]
    text = json.dumps(mark, sort_keys=True)
    stamp = folder.with_suffix(".arm.json")
    if stamp.exists() and stamp.read_text() != text:
        raise RuntimeError(
            f"{folder} was made for another plan; give another --runs, or remove the folder"
        )
    record, log = folder / RECORD, folder.with_suffix(".log")
    for _ in range(2):
        if record.exists():
            break
        words = command(plan, arm, folder)
        stamp.write_text(text)
        with log.open("w") as out:
            # one thread each: runs side by side are what the cores are for
            environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
            code = subprocess.call(words, stdout=out, stderr=out, env=environment)
        if code:
            said = log.read_text(errors="replace").strip().split("\n")[-1:]
            raise RuntimeError(f"{arm.name} failed: {' '.join(said)} (see {log})")
        if not record.exists():
            shutil.rmtree(folder)  # killed between its last checkpoint and its last evaluation
    return json.loads(record.read_text())


def run_all(plan: Plan, root: Path, jobs: int) -> dict[Arm, dict[str, Any]]:
    """Make every run of the plan, ``jobs`` at a time, saying one line for each."""
    wanted = list(dict.fromkeys(arm for s in plan.sections.values() for arm in arms(s)))
    records: dict[Arm, dict[str, Any]] = {}
    begun = time.monotonic()
    with ThreadPoolExecutor(jobs) as pool:
        futures = {pool.submit(run, plan, arm, root): arm for arm in wanted}
        try:
            for future in as_completed(futures):
                arm = futures[future]
                records[arm] = future.result()
                last = records[arm]["validations"][-1]
                say(
                    f"[{len(records)}/{len(wanted)}, {time.monotonic() - begun:.0f} s] {arm.name}: "
                    f"greedy {last['val/accuracy_greedy']:.3f}, "
                    f"sampled {last['val/accuracy_sampled']:.3f}",
                    sys.stdout,
                )
        except BaseException:
            pool.shutdown(cancel_futures=True)  # those that run go on to their end
            raise
    return records


def csv_lines(plan: Plan, records: dict[Arm, dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """Lines of the CSV: each rollout of each run; nothing that depends on the machine's speed."""
    for name, section in plan.sections.items():
        for arm in arms(section):
            rollouts, validations = (records[arm][key] for key in ("rollouts", "validations"))
            held_out = {int(v["rollouts"]): v for v in validations}
            place = dict(zip(PLACE, (name, arm.algorithm, arm.updates, arm.seed), strict=True))
            for done in range(len(rollouts) + 1):
                line: dict[str, Any] = {}
                if done:
                    line |= {column: rollouts[done - 1].get(key) for column, key in COLUMNS.items()}
                if done in held_out:
                    line |= {column: held_out[done].get(key) for column, key in VALIDATED.items()}
                if line:
                    yield place | {"rollouts": done} | line


def write_csv(path: Path, lines: Iterator[dict[str, Any]]) -> None:
    """Write the CSV; numbers as Python prints them, so that no digit is lost."""
    names = [*PLACE, "rollouts", *COLUMNS, *VALIDATED]
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, names, lineterminator="\n")
        writer.writeheader()
        writer.writerows(lines)


def main(argv: list[str] | None = None) -> int:
    """Run a comparison; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog=f"{program(alone=True)} compare",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("plan", help="YAML file, or compare/arithmetic, the package's")
    parser.add_argument("--out", default="runs/comparison", help="path of the report, no ending")
    parser.add_argument("--runs", default="runs/comparison", help="folder of the runs")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="runs at a time")
    options = parser.parse_args(argv)
    try:
        if options.jobs < 1:
            raise ValueError(f"--jobs must be >= 1, got {options.jobs}")
        plan = read_plan(options.plan)
        records = run_all(plan, Path(options.runs), options.jobs)
    except (ValueError, RuntimeError) as error:
        say(f"error: {error}")
        return 2
    out = Path(options.out)
    out.parent.mkdir(parents=True, exist_ok=True)
    write_csv(out.with_suffix(".csv"), csv_lines(plan, records))
    runs = {
        name: [Run(arm.algorithm, arm.updates, arm.seed, records[arm]) for arm in arms(section)]
        for name, section in plan.sections.items()
    }
    again = f"{program(alone=True)} compare {options.plan} --out {options.out}"
    write_report(out, plan, runs, again)
    say(f"{out}.md, {out}.csv, {out}_SECTION.png", sys.stdout)
    return 0


if __name__ == "__main__":
    sys.exit(main())
