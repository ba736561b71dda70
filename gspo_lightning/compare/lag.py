"""What sampling one rollout ahead does to learning: the demo with and without, some seeds each.

python -m gspo_lightning.compare.lag

Trains configs/arithmetic.yaml, prints a table and writes a picture. Decides which ways to correct
are tried. A run that is complete is not made again. What learning costs does not depend on what
runs beside what, so that completions are drawn in this process, where the engine would begin.
"""

import argparse
import json
import math
import statistics
import sys
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import yaml

from gspo_lightning.compare.plan import RECORD
from gspo_lightning.compare.settings import train
from gspo_lightning.rollout import PromptBatch, Samples
from gspo_lightning.run.terminal_log import say
from gspo_lightning.sampling import GroupSampler

DRAWN = {"group_size": 8, "max_new_tokens": 40, "temperature": 1.0}
TRIED: dict[str, tuple[int, dict[str, Any]]] = {  # lag and correction of each line
    "lag 0": (0, {}),
    "lag 1, none": (1, {}),
    "lag 1, sequence": (1, {"correction": "sequence"}),
}
GOAL = 0.8  # a reward that all lines reach
WINDOW = 5  # rollouts that a curve is smoothed over
HEAD = (
    "settings",
    "held-out accuracy",
    f"rollouts to a reward of {GOAL}",
    "mean reward",
    "largest KL of sampler and policy",
    "least effective size",
)


class AtOnce(GroupSampler):
    """Draws completions where an engine of its own would begin to, with the same weights."""

    apart = True

    def begin(self, policy: Any, batch: PromptBatch, *, seed: int) -> Future[Samples]:
        """The completions, as ``AsyncSampler`` asks for them."""
        done: Future[Samples] = Future()
        done.set_result(self.sample(policy, batch, seed=seed))
        return done


def run(name: str, seed: int, root: Path, rollouts: int) -> dict[str, Any]:
    """Make a run unless it is there, and give its record.

    Raises:
        RuntimeError: If it fails, naming it and its log.
    """
    lag, mismatch = TRIED[name]
    folder = root / f"{name.replace(', ', '-').replace(' ', '')}-seed{seed}"
    inner = {"class_path": f"{__spec__.name}.AtOnce", "init_args": DRAWN}
    sampler = {"class_path": "gspo_lightning.AsyncSampler", "init_args": {"inner": inner}}
    sampler["init_args"]["lag"] = lag  # type: ignore[index]
    record = {
        "class_path": "gspo_lightning.compare.experiment.RunRecord",
        "init_args": {"completions": 16 * DRAWN["group_size"] * rollouts},
    }
    overlay = {
        "trainer": {"callbacks+": [record]},
        "model": {"init_args": {"sampler": sampler, "mismatch": mismatch}},
        "data": {"init_args": {"num_rollouts": rollouts}},
    }
    own = folder.with_suffix(".yaml")
    own.parent.mkdir(parents=True, exist_ok=True)
    own.write_text(yaml.safe_dump(overlay))
    if not (folder / RECORD).exists():
        words = ["fit", "--config", "configs/arithmetic.yaml", "--config", str(own)]
        words += ["--seed_everything", str(seed), "--trainer.default_root_dir", str(folder)]
        words += ["--trainer.enable_progress_bar", "false", "--ckpt_path", "auto"]
        train(folder.name, words, folder.with_suffix(".log"))
    return json.loads((folder / RECORD).read_text())


def plus_minus(values: list[float], shape: str) -> str:
    """Mean and standard error over seeds.

    >>> plus_minus([0.5, 0.6, 0.7], "{:.2f}")
    '0.60 ± 0.06'
    """
    mean = shape.format(statistics.mean(values))
    if len(values) == 1:
        return mean
    return f"{mean} ± {shape.format(statistics.stdev(values) / len(values) ** 0.5)}"


def smooth(values: list[float]) -> list[float]:
    """The mean of each value and those just before it.

    >>> smooth([1.0, 2.0, 3.0])
    [1.0, 1.5, 2.0]
    """
    return [statistics.mean(values[max(0, i + 1 - WINDOW) : i + 1]) for i in range(len(values))]


def line(name: str, records: list[dict[str, Any]]) -> list[str]:
    """A line of the table."""

    def curves(figure: str) -> list[list[float]]:
        return [[rollout[figure] for rollout in record["rollouts"]] for record in records]

    greedy = [record["validations"][-1]["val/accuracy_greedy"] for record in records]
    rewards = curves("train/reward")
    until = [
        next((i for i, reward in enumerate(smooth(curve), start=1) if reward >= GOAL), math.inf)
        for curve in rewards
    ]
    return [
        name,
        plus_minus(greedy, "{:.3f}"),
        plus_minus(until, "{:.1f}"),
        plus_minus([statistics.mean(curve) for curve in rewards], "{:.3f}"),
        f"{max(map(max, curves('sampler/kl'))):.1e}",
        f"{min(map(min, curves('sampler/ess'))):.3f}",
    ]


def draw(found: dict[str, list[dict[str, Any]]], path: Path) -> None:
    """Reward by rollout, the mean over seeds of each line, smoothed."""
    from matplotlib.figure import Figure  # slow to import

    axes = (figure := Figure(figsize=(7, 4), layout="constrained")).subplots()
    for name, records in found.items():
        curves = [[r["train/reward"] for r in record["rollouts"]] for record in records]
        means = smooth([statistics.mean(values) for values in zip(*curves, strict=True)])
        axes.plot(range(1, len(means) + 1), means, label=name)
    axes.set(xlabel="rollout", ylabel=f"reward, mean of {WINDOW} rollouts and all seeds")
    axes.legend()
    figure.savefig(path, dpi=110)


def main(argv: list[str] | None = None) -> int:
    """Run all and print the table; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m gspo_lightning.compare.lag")
    parser.add_argument("--runs", type=Path, default=Path("runs/lag"), help="their folder")
    parser.add_argument("--rollouts", type=int, default=60, help="of each run")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--picture", type=Path, default=Path("docs/images/lag.png"))
    options = parser.parse_args(argv)
    found: dict[str, list[dict[str, Any]]] = {name: [] for name in TRIED}
    try:
        for seed in options.seeds:
            for name, records in found.items():
                records.append(run(name, seed, options.runs, options.rollouts))
                say(f"seed {seed}: {' | '.join(line(name, records[-1:]))}")
    except RuntimeError as error:
        say(f"error: {error}")
        return 2
    print("| " + " | ".join(HEAD) + " |", "|---|" + "---:|" * (len(HEAD) - 1), sep="\n")
    for name, records in found.items():
        print("| " + " | ".join(line(name, records)) + " |")
    draw(found, options.picture)
    return 0


if __name__ == "__main__":
    sys.exit(main())
