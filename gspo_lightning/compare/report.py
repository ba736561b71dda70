"""What a comparison says: tables with their noise, pictures, which differences exceed the noise.

Decides which test that is: a paired t-test over seeds, as the same seed gives every algorithm the
same prompts in the same order and the same random numbers, with Holm's correction for the number
of comparisons of a table.
"""

import math
import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from itertools import accumulate
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from gspo_lightning.compare.plan import Plan
from gspo_lightning.compare.significance import holm, t_test

LEVEL = 0.05  # of significance, over all comparisons of a table
LATE = 10  # rollouts at the end whose mean stands in the table
COLOURS = ("#1f5a96", "#c8553d", "#3b8c5a", "#8c6bb1", "#d9a441", "#5f6b73", "#b0457b", "#3aa6b9")
STYLES = ("-", "--", ":", "-.")
PANELS = (  # title, key of a rollout or of a validation
    ("Reward", "train/reward"),
    ("Held-out accuracy, sampled", "val/accuracy_sampled"),
    ("Entropy, nats per token", "policy/entropy"),
    ("Clipped sequences, share", "train/clip_fraction_sequences"),
    ("KL to the start, nats per token", "train/kl_divergence"),
    ("Completion length, tokens", "train/avg_response_length"),
)
FIGURES = (  # title, key of a validation or of a rollout, digits
    ("greedy accuracy", "val/accuracy_greedy", 3),
    ("sampled accuracy", "val/accuracy_sampled", 3),
    ("entropy", "policy/entropy", 3),
    ("KL", "train/kl_divergence", 3),
    ("length", "train/avg_response_length", 1),
    ("clipped sequences", "train/clip_fraction_sequences", 3),
    ("clipped tokens", "train/clip_fraction_tokens", 3),
    ("sd of log-ratio, token", "policy/token_log_ratio_std", 4),
    ("sd of log-ratio, sequence", "policy/sequence_log_ratio_std", 4),
    ("experts changed, one update", "moe/expert_change", 4),
    ("experts changed, one rollout", "moe/expert_change_rollout", 4),
)


@dataclass(frozen=True)
class Run:
    """A run and its record (``RunRecord``)."""

    algorithm: str
    updates: int
    seed: int
    record: Mapping[str, Any]

    def figure(self, key: str) -> float:
        """A held-out figure of the last evaluation, or the mean of another over the last rollouts.

        NaN where none of them has it.
        """
        if key.startswith("val/"):
            return self.record["validations"][-1].get(key, math.nan)
        values = [r[key] for r in self.record["rollouts"][-LATE:] if key in r]
        return mean(values) if values else math.nan

    def seconds(self) -> list[float]:
        """Seconds of each rollout: sampling, scoring and updating.

        Without the reference pass where the algorithm has no KL term: it only measures there.
        """
        spent = []
        for figures in self.record["rollouts"]:
            times = [figures.get(f"time/{name}", 0.0) for name in ("rollout", "score", "optimise")]
            measuring = 0.0 if self.record["kl"] else figures.get("time/reference", 0.0)
            spent.append(sum(times) - measuring)
        return spent

    def peak_memory(self) -> float:
        """Highest memory of a phase on any device, GiB."""
        rollouts = self.record["rollouts"]
        return max(v for r in rollouts for key, v in r.items() if key.startswith("memory/"))


def differences(runs: Sequence[Run], baseline: str, key: str) -> list[tuple[str, list[float]]]:
    """Differences to the baseline at the same updates and seed, by what is compared.

    A run without the figure is in no pair.
    """
    final = {(r.algorithm, r.updates, r.seed): r.figure(key) for r in runs}
    found: dict[str, list[float]] = {}
    for (algorithm, updates, seed), value in final.items():
        other = final.get((baseline, updates, seed), math.nan)
        if algorithm != baseline and not math.isnan(value - other):
            name = f"{algorithm} at {updates} update{'s' * (updates > 1)}"
            found.setdefault(name, []).append(value - other)
    return list(found.items())


def statements(runs: Sequence[Run], baseline: str) -> list[str]:
    """Which differences to the baseline exceed the noise, and which do not, in words."""
    pairs = [
        (f"{name}, {what}", values)
        for key, what in (("val/accuracy_sampled", "sampled"), ("val/accuracy_greedy", "greedy"))
        for name, values in differences(runs, baseline, key)
        if len(values) > 1
    ]
    corrected = holm([t_test(values) for _, values in pairs])
    titles = {
        True: f"**Differs from {baseline}**",
        False: f"**No difference from {baseline} that exceeds the noise**",
    }
    lines = []
    for clear, title in titles.items():
        found = [
            f"{name} {mean(values):+.3f} (p {p:.3f})"
            for (name, values), p in zip(pairs, corrected, strict=True)
            if (p < LEVEL) == clear
        ]
        if found:
            lines.append(f"{title}: {'; '.join(found)}.")
    return lines


def with_error(values: Sequence[float], digits: int = 3) -> str:
    """Mean and standard error over seeds.

    >>> with_error([0.5, 0.7, 0.6])
    '0.600 ± 0.058'
    """
    if any(map(math.isnan, values)):
        return "–"
    if len(values) == 1:
        return f"{values[0]:.{digits}f}"
    return f"{mean(values):.{digits}f} ± {stdev(values) / math.sqrt(len(values)):.{digits}f}"


def grouped(runs: Sequence[Run]) -> dict[tuple[str, int], list[Run]]:
    """Runs by algorithm and number of updates, in the order of the plan."""
    groups: dict[tuple[str, int], list[Run]] = {}
    for run in runs:
        groups.setdefault((run.algorithm, run.updates), []).append(run)
    return groups


def table(rows: Sequence[Mapping[str, str]]) -> list[str]:
    """A table in Markdown; each row holds its cells by their titles."""
    lines = [list(rows[0]), ["---"] * len(rows[0]), *(row.values() for row in rows)]
    return [f"| {' | '.join(line)} |" for line in lines]


def accuracy_table(groups: Mapping[tuple[str, int], list[Run]], experts: bool) -> list[str]:
    """What was learned: means over seeds with their standard errors."""
    rows = []
    for (algorithm, updates), runs in groups.items():
        row = {"algorithm": algorithm, "updates": str(updates)}
        for title, key, digits in FIGURES:
            if experts or not key.startswith("moe/"):
                row[title] = with_error([run.figure(key) for run in runs], digits)
        rows.append(row)
    return table(rows)


def cost_table(groups: Mapping[tuple[str, int], list[Run]]) -> list[str]:
    """What it took."""
    rows = []
    for (algorithm, updates), runs in groups.items():
        record = runs[0].record
        critic = record["trained"] > record["parameters"]
        completions = mean(run.record["rollouts"][-1]["completions"] for run in runs)
        row = {
            "algorithm": algorithm,
            "updates": str(updates),
            "seconds per rollout": f"{mean(mean(run.seconds()) for run in runs):.2f}",
            "peak memory, GiB": f"{mean(run.peak_memory() for run in runs):.2f}",
            "trained parameters": f"{record['trained']:,}",
            "networks": str(1 + record["kl"] + critic),
            "completions per prompt": str(record["group_size"]),
            "completions": f"{completions:,.0f}",
            "rollouts": f"{mean(len(run.record['rollouts']) for run in runs):.1f}",
        }
        rows.append(row)
    return table(rows)


def series(run: Run, key: str) -> tuple[list[float], list[float], list[float]]:
    """Rollouts, seconds and values of a figure."""
    spent = list(accumulate(run.seconds(), initial=0.0))
    figures = list(enumerate(run.record["rollouts"], start=1))
    if key.startswith("val/"):
        figures = [(int(v["rollouts"]), v) for v in run.record["validations"]]
    points = [(x, found[key]) for x, found in figures if key in found]
    return [float(x) for x, _ in points], [spent[x] for x, _ in points], [y for _, y in points]


def draw(path: Path, groups: Mapping[tuple[str, int], list[Run]]) -> None:
    """Draw each panel against rollouts and against seconds: mean and standard deviation."""
    from matplotlib.figure import Figure

    picture = Figure(figsize=(12, 18), dpi=100, layout="constrained")
    algorithms = list(dict.fromkeys(algorithm for algorithm, _ in groups))
    steps = list(dict.fromkeys(updates for _, updates in groups))
    for row, (title, key) in zip(picture.subplots(len(PANELS), 2), PANELS, strict=True):
        for (algorithm, updates), runs in groups.items():
            # an algorithm has a colour, its number of updates a style
            again, colour = divmod(algorithms.index(algorithm), len(COLOURS))
            style = STYLES[(again * len(steps) + steps.index(updates)) % len(STYLES)]
            found = [series(run, key) for run in runs]
            # as far as the shortest run of the group goes
            values = list(zip(*(of_run for _, _, of_run in found), strict=False))
            if not values:
                continue
            middle = [mean(v) for v in values]
            spread = [stdev(v) if len(v) > 1 else 0.0 for v in values]
            low = [m - s for m, s in zip(middle, spread, strict=True)]
            high = [m + s for m, s in zip(middle, spread, strict=True)]
            label = f"{algorithm}, {updates}" if len(steps) > 1 else algorithm
            for place, axes in enumerate(row):
                x = [mean(v) for v in zip(*(run[place] for run in found), strict=False)]
                axes.plot(x, middle, style, color=COLOURS[colour], linewidth=1.6, label=label)
                axes.fill_between(x, low, high, color=COLOURS[colour], alpha=0.15, linewidth=0)
        for axes, unit in zip(row, ("rollout", "seconds"), strict=True):
            axes.set_title(title, loc="left", fontsize=11, fontweight="bold")
            axes.set_xlabel(unit, fontsize=9, color="0.35")
            axes.set_xlim(left=0)
            axes.spines[["top", "right"]].set_visible(False)
            axes.tick_params(labelsize=8, colors="0.35")
            axes.grid(color="0.92", linewidth=0.8)
    handles, labels = picture.axes[0].get_legend_handles_labels()
    picture.legend(handles, labels, loc="outside upper center", ncols=6, frameon=False)
    picture.savefig(path, format="png")


def write_report(out: Path, plan: Plan, runs: Mapping[str, list[Run]], command: str) -> None:
    """Write the report ``out.md`` and ``out_SECTION.png`` for each section.

    ``runs`` are by section; ``command`` makes this report again.
    """
    versions = ", ".join(f"{name} {version(name)}" for name in ("torch", "transformers"))
    lines = ["# Algorithms side by side", "", *plan.text.strip().splitlines(), ""]
    lines += [
        f"Made by `{command}` with {versions}, Python {platform.python_version()}, one thread a "
        f"run. Every figure of every rollout is in [{out.name}.csv]({out.name}.csv); the command "
        "gives the same file on the same machine, to the last digit. Each run samples at least "
        f"{plan.completions:,} completions, in whole rollouts. After ± stands the standard error "
        f"over seeds; figures of rollouts are means over the last {LATE}.",
        "",
    ]
    for name, section in plan.sections.items():
        groups = grouped(runs[name])
        picture = out.with_name(f"{out.name}_{name}.png")
        draw(picture, groups)
        lines += [f"## {section.title}", ""]
        lines += [*section.text.strip().splitlines(), ""] if section.text else []
        lines += [*accuracy_table(groups, section.experts), "", *cost_table(groups), ""]
        if found := statements(runs[name], section.baseline):
            seeds = len(section.seeds)
            test = f"Paired t-test over {seeds} seeds, Holm's correction, level {LEVEL}:"
            lines += [test, "", *(f"- {line}" for line in found), ""]
        lines += [f"![{section.title}]({picture.name})", ""]
    out.with_suffix(".md").write_text("\n".join(lines).rstrip() + "\n")
