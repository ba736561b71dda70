"""What a comparison says: a table with its noise, a figure, and which differences exceed the noise.

Decides which test that is: a paired t-test over seeds, as the same seed gives every algorithm the
same prompts in the same order and the same random numbers, with Holm's correction for the number
of comparisons of a table. Leaves out the runs (`compare`).
"""

from __future__ import annotations

import math
import platform
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from gspo_lightning.compare.significance import holm, t_test

LEVEL = 0.05  # of significance, over all comparisons of a table
LATE = 10  # rollouts at the end whose mean stands in the table
COLOURS = ("#1f5a96", "#c8553d", "#3b8c5a", "#8c6bb1", "#d9a441", "#5f6b73", "#b0457b", "#3aa6b9")
PANELS = (  # title, key of a rollout or of a validation
    ("Reward", "train/reward"),
    ("Held-out accuracy, sampled", "val/accuracy_sampled"),
    ("Entropy, nats per token", "policy/entropy"),
    ("Clipped sequences, share", "train/clip_fraction_sequences"),
    ("KL to the start, nats per token", "train/kl_divergence"),
    ("Completion length, tokens", "train/avg_response_length"),
)


@dataclass(frozen=True)
class Run:
    """A run and its record (`experiment.RunRecord`)."""

    algorithm: str
    updates: int
    seed: int
    record: Mapping[str, Any]

    def late(self, key: str) -> float:
        """Mean of a figure over the last rollouts that have it."""
        values = [r[key] for r in self.record["rollouts"][-LATE:] if key in r]
        return mean(values) if values else math.nan

    def final(self, key: str) -> float:
        """A figure of the last evaluation on held-out prompts."""
        return self.record["validations"][-1].get(key, math.nan)

    def seconds(self) -> list[float]:
        """Seconds of each rollout: sampling, scoring and updating.

        Without the reference pass where the algorithm has no KL term: it only measures there.
        """
        measured = 0.0 if self.record["kl"] else 1.0
        return [
            sum(r.get(f"time/{name}", 0.0) for name in ("rollout", "score", "optimise"))
            - measured * r.get("time/reference", 0.0)
            for r in self.record["rollouts"]
        ]


# --- statistics -----------------------------------------------------------------------------------


def differences(runs: Sequence[Run], baseline: str, key: str) -> list[tuple[str, list[float]]]:
    """Differences to the baseline at the same updates and seed, by what is compared.

    A run without the figure is in no pair.
    """
    final = {(r.algorithm, r.updates, r.seed): r.final(key) for r in runs}
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
    clear: list[str] = []
    unclear: list[str] = []
    for (name, values), p in zip(pairs, corrected, strict=True):
        (clear if p < LEVEL else unclear).append(f"{name} {mean(values):+.3f} (p {p:.3f})")
    lines = []
    if clear:
        lines.append(f"**Differs from {baseline}**: " + "; ".join(clear) + ".")
    if unclear:
        lines.append(
            f"**No difference from {baseline} that exceeds the noise**: " + "; ".join(unclear) + "."
        )
    return lines


# --- tables ---------------------------------------------------------------------------------------


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


def table(titles: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """A table in Markdown."""
    return [f"| {' | '.join(row)} |" for row in (titles, ["---"] * len(titles), *rows)]


def accuracy_table(groups: Mapping[tuple[str, int], list[Run]], experts: bool) -> list[str]:
    """What was learned: means over seeds with their standard errors."""
    columns: dict[str, Callable[[Run], float]] = {
        "greedy accuracy": lambda r: r.final("val/accuracy_greedy"),
        "sampled accuracy": lambda r: r.final("val/accuracy_sampled"),
        "entropy": lambda r: r.late("policy/entropy"),
        "KL": lambda r: r.late("train/kl_divergence"),
        "length": lambda r: r.late("train/avg_response_length"),
        "clipped sequences": lambda r: r.late("train/clip_fraction_sequences"),
        "clipped tokens": lambda r: r.late("train/clip_fraction_tokens"),
        "sd of log-ratio, token": lambda r: r.late("policy/token_log_ratio_std"),
        "sd of log-ratio, sequence": lambda r: r.late("policy/sequence_log_ratio_std"),
    }
    if experts:
        columns["experts changed, one update"] = lambda r: r.late("moe/expert_change")
        columns["experts changed, one rollout"] = lambda r: r.late("moe/expert_change_rollout")
    digits = {"length": 1, "sd of log-ratio, token": 4, "sd of log-ratio, sequence": 4}
    digits |= {name: 4 for name in columns if name.startswith("experts")}
    rows = [
        [algorithm, str(updates)]
        + [with_error([f(r) for r in runs], digits.get(name, 3)) for name, f in columns.items()]
        for (algorithm, updates), runs in groups.items()
    ]
    return table(["algorithm", "updates", *columns], rows)


def cost_table(groups: Mapping[tuple[str, int], list[Run]]) -> list[str]:
    """What it took."""
    rows = []
    for (algorithm, updates), runs in groups.items():
        record = runs[0].record
        critic = record["trained"] > record["parameters"]
        memory = [
            max(v for r in run.record["rollouts"] for k, v in r.items() if k.startswith("memory/"))
            for run in runs
        ]
        rows.append(
            [
                algorithm,
                str(updates),
                f"{mean(mean(run.seconds()) for run in runs):.2f}",
                f"{mean(memory):.2f}",
                f"{record['trained']:,}",
                str(1 + record["kl"] + critic),
                str(record["group_size"]),
                f"{mean(run.record['rollouts'][-1]['completions'] for run in runs):,.0f}",
                f"{mean(len(run.record['rollouts']) for run in runs):.1f}",
            ]
        )
    titles = [
        "algorithm",
        "updates",
        "seconds per rollout",
        "peak memory, GiB",
        "trained parameters",
    ]
    titles += ["networks", "completions per prompt", "completions", "rollouts"]
    return table(titles, rows)


# --- figure ---------------------------------------------------------------------------------------


def series(run: Run, key: str) -> tuple[list[float], list[float], list[float]]:
    """Rollouts, seconds and values of a figure."""
    spent = [0.0]
    for seconds in run.seconds():
        spent.append(spent[-1] + seconds)
    if key.startswith("val/"):
        points = [(int(v["rollouts"]), v[key]) for v in run.record["validations"] if key in v]
    else:
        rollouts = run.record["rollouts"]
        points = [(i + 1, r[key]) for i, r in enumerate(rollouts) if key in r]
    return [float(x) for x, _ in points], [spent[x] for x, _ in points], [y for _, y in points]


def draw(path: Path, groups: Mapping[tuple[str, int], list[Run]]) -> None:
    """Draw each panel against rollouts and against seconds: mean and standard deviation."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 18), dpi=100, layout="constrained")
    FigureCanvasAgg(figure)
    several = len({updates for _, updates in groups}) > 1
    for row, (title, key) in zip(figure.subplots(len(PANELS), 2), PANELS, strict=True):
        for colour, ((algorithm, updates), runs) in zip(COLOURS, groups.items(), strict=False):
            found = [series(run, key) for run in runs]
            length = min(len(values) for _, _, values in found)
            if not length:
                continue
            values = [[values[i] for _, _, values in found] for i in range(length)]
            middle = [mean(v) for v in values]
            spread = [stdev(v) if len(v) > 1 else 0.0 for v in values]
            label = f"{algorithm}, {updates}" if several else algorithm
            for axes, place in zip(row, (0, 1), strict=True):
                x = [mean(run[place][i] for run in found) for i in range(length)]
                axes.plot(x, middle, color=colour, linewidth=1.6, label=label)
                low = [m - s for m, s in zip(middle, spread, strict=True)]
                high = [m + s for m, s in zip(middle, spread, strict=True)]
                axes.fill_between(x, low, high, color=colour, alpha=0.15, linewidth=0)
        for axes, unit in zip(row, ("rollout", "seconds"), strict=True):
            axes.set_title(title, loc="left", fontsize=11, fontweight="bold")
            axes.set_xlabel(unit, fontsize=9, color="0.35")
            axes.set_xlim(left=0)
            axes.spines[["top", "right"]].set_visible(False)
            axes.tick_params(labelsize=8, colors="0.35")
            axes.grid(color="0.92", linewidth=0.8)
    handles, labels = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=6, frameon=False)
    figure.savefig(path, format="png")


# --- report ---------------------------------------------------------------------------------------


def write_report(out: Path, plan: Any, runs: Mapping[str, list[Run]], command: str) -> None:
    """Write the report and its figures.

    Args:
        out: Path without ending; ``out.md``, and ``out_SECTION.png`` for each section.
        plan: What was compared (`compare.Plan`).
        runs: Runs by section.
        command: What makes this report again.
    """
    versions = ", ".join(f"{name} {version(name)}" for name in ("torch", "transformers"))
    lines = ["# Algorithms side by side", "", *plan.text.strip().splitlines(), ""]
    lines += [
        f"Made by `{command}` with {versions}, Python {platform.python_version()}, one thread a "
        f"run. Every figure of every rollout is in [{out.name}.csv]({out.name}.csv); the command "
        "gives the same file on the same machine, to the last digit. Each run samples "
        f"{plan.completions:,} completions. After ± stands the standard error over seeds; figures "
        f"of rollouts are means over the last {LATE}.",
        "",
    ]
    for name, section in plan.sections.items():
        groups = grouped(runs[name])
        picture = out.with_name(f"{out.name}_{name}.png")
        draw(picture, groups)
        lines += [f"## {section.title}", ""]
        lines += [*section.text.strip().splitlines(), ""] if section.text else []
        lines += [*accuracy_table(groups, section.experts), "", *cost_table(groups), ""]
        seeds = len(section.seeds)
        found = statements(runs[name], section.baseline)
        if found:
            lines += [f"Paired t-test over {seeds} seeds, Holm's correction, level {LEVEL}:", ""]
            lines += [f"- {line}" for line in found] + [""]
        lines += [f"![{section.title}]({picture.name})", ""]
    out.with_suffix(".md").write_text("\n".join(lines).rstrip() + "\n")
