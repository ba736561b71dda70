"""Curves of time and memory over group size, prompt length, completion length and batch.

Decides the points: one factor moves, the others stay at the base.
"""

import argparse
from copy import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

from gspo_lightning.bench.cases import ENGINES, Case, check, heading, keep, one_run
from gspo_lightning.bench.report import CLOCKS, Run, number, table, unit_of
from gspo_lightning.run.terminal_log import say

BASE = Case.parse("S/32/64/8")
FACTORS = {  # in the order of the panels: the field of the case that moves, and its values
    "group size": ("group", (4, 8, 16, 32)),
    "longest prompt, tokens": ("prompt", (32, 64, 128, 256)),
    "completion tokens": ("limit", (16, 32, 64, 128)),
    "prompts per rollout": (None, (4, 8, 16, 32)),
}
COLOURS = dict(
    zip(ENGINES, ("#1b5e8a", "#3d3d8f", "#5aa0a8", "#c9622b", "#6a8f3c", "#8a6a9c"), strict=True)
)
LINES = {"total": ("-", 2.0), "rollout": ("--", 1.2), "optimise": (":", 1.4)}


def add_arguments(part: argparse.ArgumentParser) -> None:
    part.add_argument("--engines", nargs="+", choices=ENGINES, default=["gspo_lightning"])
    part.add_argument("--picture", type=Path, default=Path("docs/scaling.png"))


def scaling(options: argparse.Namespace) -> int:
    """Measure every point once and draw the picture."""
    places = [(factor, value) for factor, (_, values) in FACTORS.items() for value in values]
    check(options, [point(*place, options.prompts_per_rollout) for place in places])
    wanted = [(*place, engine) for place in places for engine in options.engines]
    done: dict[tuple[Case, int, str], Run] = {}
    runs: list[Run] = []
    for count, (factor, value, name) in enumerate(wanted, start=1):
        case, prompts = point(factor, value, options.prompts_per_rollout)
        if (case, prompts, name) not in done:  # the base is on every curve, and measured once
            changed = copy(options)
            changed.prompts_per_rollout = prompts
            done[case, prompts, name] = one_run(case, name, changed)
        run = {"factor": factor, "value": value, "case": str(case), "name": name}
        run |= done[case, prompts, name]
        keep(run, runs, f"[{count}/{len(wanted)}] {factor} {value} {name}", options.out)
    options.picture.parent.mkdir(parents=True, exist_ok=True)
    draw(runs).savefig(options.picture)
    print(heading(options, runs))
    print(scaling_table(runs))
    say(f"drawn: {options.picture}")
    return 0


def point(factor: str, value: int, prompts_per_rollout: int) -> tuple[Case, int]:
    """The case and the prompts per rollout where one factor has this value.

    >>> point("group size", 16, 8)[0].group
    16
    >>> point("prompts per rollout", 2, 8)[1]
    2
    """
    field, _ = FACTORS[factor]
    if field is None:
        return BASE, value
    return replace(BASE, **{field: value}), prompts_per_rollout  # type: ignore[arg-type]


def memory(run: Run) -> float:
    """Peak above what was held before the first rollout, MiB; on a GPU the peak of its tensors."""
    return run["device_peak_mib"] or run["peak_mib"] - run["base_mib"]


def scaling_table(runs: list[Run]) -> str:
    """The points as Markdown."""
    unit = unit_of(runs)
    rows = [["factor", "value", "engine", *LINES, "memory MiB", "tokens"]]
    for run in runs:
        cells = [run["factor"], str(run["value"]), run["name"]]
        cells += [number(run[unit][phase]) for phase in LINES]
        rows.append([*cells, f"{memory(run):,.0f}", f"{run['tokens']:,.0f}"])
    return table(rows)


def draw(runs: list[Run]) -> Any:
    """A matplotlib ``Figure``, free of pyplot's global state: one column for each factor."""
    from matplotlib.figure import Figure  # only who draws pays the import
    from matplotlib.ticker import NullFormatter, StrMethodFormatter

    unit = unit_of(runs)
    figure = Figure(figsize=(12, 6.2), dpi=110, layout="constrained")
    panels = figure.subplots(2, len(FACTORS), sharey="row")
    for column, factor in enumerate(FACTORS):
        points = [run for run in runs if run["factor"] == factor]
        values = sorted({run["value"] for run in points})
        for name in dict.fromkeys(run["name"] for run in points):
            mine = sorted((r for r in points if r["name"] == name), key=lambda r: r["value"])
            x = [run["value"] for run in mine]
            look = {"color": COLOURS[name], "marker": "o", "markersize": 3}
            for phase, (line, width) in LINES.items():
                y = [run[unit][phase] for run in mine]
                label = f"{name}, {'whole step' if phase == 'total' else phase}"
                panels[0][column].plot(x, y, line, linewidth=width, label=label, **look)
            y = [memory(run) for run in mine]
            panels[1][column].plot(x, y, linewidth=2, **look)
        for axes in panels[:, column]:
            axes.set_xscale("log", base=2)
            axes.set_xticks(values, map(str, values))
            axes.set_xticks([], minor=True)
            axes.set_yscale("log", base=2)
            axes.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
            axes.yaxis.set_minor_formatter(NullFormatter())
            axes.spines[["top", "right"]].set_visible(False)
            axes.spines[["left", "bottom"]].set_color("0.75")
            axes.tick_params(labelsize=9, colors="0.35")
            axes.grid(color="0.92", linewidth=0.8)
            axes.set_axisbelow(True)
        panels[1][column].set_xlabel(factor, fontsize=10)
    panels[0][0].set_ylabel(f"{CLOCKS[unit]} per RL step", fontsize=10)
    panels[1][0].set_ylabel("peak memory above start, MiB", fontsize=10)
    items = panels[0][0].get_legend_handles_labels()
    figure.legend(*items, loc="outside upper center", ncols=len(LINES), frameon=False, fontsize=10)
    return figure
