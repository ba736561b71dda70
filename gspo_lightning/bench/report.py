"""Tables of benchmark runs.

Decides how runs become figures: medians over repeats; ratios within a repeat, whose engines ran one
after another, then their median and range. A run is the dict that a worker and the script for TRL
print, with ``case``, ``name`` (of the engine) and ``repeat`` added.
"""

from collections.abc import Callable, Sequence
from functools import reduce
from operator import getitem
from statistics import median
from typing import Any

from gspo_lightning.bench.limits import Shape, Work

Run = dict[str, Any]
PHASES = ("total", "rollout", "reward", "old_logprobs", "reference", "optimise", "other")
CLOCKS = {"cpu_seconds": "CPU seconds", "wall_seconds": "seconds"}  # in words


def report(runs: list[Run]) -> str:
    """All tables of a comparison, in Markdown; the first engine is compared with each other one."""
    unit = unit_of(runs)
    parts = [f"{CLOCKS[unit]} per RL step, medians:", seconds_table(runs, unit)]
    parts += ["Tokens, utilisation and memory:", work_table(runs, unit)]
    first = runs[0]["name"]
    if any(run["name"] != first for run in runs):
        parts += [
            f"How many times as fast {first} is, median (range); its memory as a share of theirs:",
            ratio_table(runs, unit),
        ]
    if limited := limit_table(runs, unit):
        parts += ["Distance to the limit:", limited]
    return "\n\n".join(parts)


def unit_of(runs: list[Run]) -> str:
    """CPU seconds, which a busy machine does not stretch, but on a GPU the wall clock."""
    gpu = any(run["options"]["device"] == "cuda" for run in runs)
    return "wall_seconds" if gpu else "cpu_seconds"


def derived(run: Run, before: list[Run]) -> dict[str, Any]:
    """Tokens per second and utilisation of a run; one before may know the sizes and the peak."""
    unit = unit_of([run])
    shares = utilisation([run], [run, *before], unit)
    return {
        "rollout_tokens_per_second": run["tokens"] / run[unit]["rollout"],
        "step_tokens_per_second": run["tokens"] / run[unit]["total"],
        "mfu": shares and dict(zip(("rollout", "optimise", "step"), shares, strict=True)),
    }


def seconds_table(runs: list[Run], unit: str) -> str:
    """Seconds of each phase by work and engine."""
    rows = [["work", "engine", *(name.replace("_", " ") for name in PHASES)]]
    for case, name, group in by_engine(runs):
        rows.append([case, name, *(number(mid(group, unit, phase)) for phase in PHASES)])
    return table(rows)


def work_table(runs: list[Run], unit: str) -> str:
    """What was computed, how fast, with which share of the peak and in how much memory."""
    on_gpu = any(run["device_peak_mib"] for run in runs)
    titles = ["work", "engine", "tokens per rollout", "mean length", "prompt tokens"]
    titles += ["rollout tokens/s", "step tokens/s", "MFU rollout", "MFU optimise", "MFU step"]
    rows = [[*titles, "peak MiB", "above start", *(["GPU peak MiB"] if on_gpu else [])]]
    for case, name, group in by_engine(runs):
        tokens = mid(group, "tokens")
        rates = [tokens / mid(group, unit, phase) for phase in ("rollout", "total")]
        shares = utilisation(group, runs, unit)
        cells = [case, name, f"{tokens:,.0f}", f"{mid(group, 'mean_length'):.1f}"]
        cells += [f"{mid(group, 'prompt_tokens'):,.0f}", *(f"{rate:,.0f}" for rate in rates)]
        cells += [f"{share:.1%}" for share in shares] if shares else ["", "", ""]
        above = median(run["peak_mib"] - run["base_mib"] for run in group)
        cells += [f"{mid(group, 'peak_mib'):,.0f}", f"{above:,.0f}"]
        rows.append([*cells, *([f"{mid(group, 'device_peak_mib'):,.0f}"] if on_gpu else [])])
    return table(rows)


def ratio_table(runs: list[Run], unit: str) -> str:
    """How many times faster the first engine is than each other one, within a repeat."""
    first = runs[0]["name"]

    def seconds(*phases: str) -> Callable[[Run], float]:
        return lambda run: sum(run[unit][phase] for phase in phases)

    measures: dict[str, Callable[[Run], float]] = {
        "whole step": seconds("total"),
        "per generated token": lambda run: run[unit]["total"] / run["tokens"],
        "rollout": seconds("rollout"),
        "log-probs and update": seconds("old_logprobs", "reference", "optimise"),
        "update": seconds("optimise"),
    }
    memory: dict[str, Callable[[Run], float]] = {
        "peak memory": lambda run: run["peak_mib"],
        "above start": lambda run: run["peak_mib"] - run["base_mib"],
    }
    rows = [["work", "against", *measures, *memory]]
    firsts = {(run["case"], run["repeat"]): run for run in runs if run["name"] == first}
    for case, other, group in by_engine(runs):
        same = [(firsts.get((case, run["repeat"])), run) for run in group if other != first]
        if found := [(a, b) for a, b in same if a]:
            cells = [spread([get(b) / get(a) for a, b in found]) for get in measures.values()]
            cells += [f"{median(get(a) / get(b) for a, b in found):.2f}" for get in memory.values()]
            rows.append([case, other, *cells])
    return table(rows)


def limit_table(runs: list[Run], unit: str) -> str:
    """Seconds of the matrix products alone (CPU) or of the data sheet (GPU), and the distance."""
    rows = [["work", "engine", "rollout", "limit", "times", "optimise", "limit", "times", "FLOP/s"]]
    for case, name, group in by_engine(runs):
        if "limits" not in group[0]:
            continue
        cells = [case, name]
        for phase in ("rollout", "optimise"):
            spent, least = mid(group, unit, phase), mid(group, "limits", phase)
            cells += [number(spent), number(least), f"{spent / least:.1f}"]
        rows.append([*cells, f"{peak_flops(group):.3g}"])
    return table(rows) if len(rows) > 1 else ""


def utilisation(group: list[Run], runs: list[Run], unit: str) -> tuple[float, float, float] | None:
    """Model FLOPs over peak FLOPs of the rollout, the update and the whole step.

    None where no run of the same work has measured the model's sizes and the peak.
    """
    known = [run for run in runs if run["case"] == group[0]["case"] and "limits" in run]
    if not known:
        return None
    sizes = known[0]["limits"]
    shape = Shape(*(sizes[name] for name in Shape.__dataclass_fields__))
    shares = []
    for run in group:
        works = [Work(tuple(r["prompts"]), tuple(r["lengths"])) for r in run["rollouts"]]
        forward = sum(work.forward_flops(shape) for work in works) / len(works)
        passes = 5 if run["options"]["kl_coef"] else 4  # sampling, forward, backward, reference
        needed = {"rollout": forward, "optimise": 3 * forward, "total": passes * forward}
        shares.append([flops / run[unit][phase] for phase, flops in needed.items()])
    peak = peak_flops(known)
    rollout, optimise, total = (median(values) / peak for values in zip(*shares, strict=True))
    return rollout, optimise, total


def peak_flops(runs: list[Run]) -> float:
    """FLOP/s of the data sheet, else the measured ones."""
    return runs[0]["limits"].get("sheet_flops") or mid(runs, "limits", "measured_flops")


def by_engine(runs: list[Run]) -> list[tuple[str, str, list[Run]]]:
    """Case, engine and their runs, in the order in which they first appear."""
    groups: dict[str, dict[str, list[Run]]] = {}
    for run in runs:
        groups.setdefault(run["case"], {}).setdefault(run["name"], []).append(run)
    return [(case, *engine) for case, engines in groups.items() for engine in engines.items()]


def mid(group: list[Run], *keys: str) -> float:
    """Median over runs of a value that lies under ``keys``."""
    values: list[Any] = [reduce(getitem, keys, run) for run in group]
    return median(values)


def spread(values: Sequence[float]) -> str:
    """Median and, where there are several, the range.

    >>> spread([2.0]), spread([2.0, 3.0, 2.5])
    ('2.00', '2.50 (2.00-3.00)')
    """
    text = f"{median(values):.2f}"
    return text if len(values) == 1 else f"{text} ({min(values):.2f}-{max(values):.2f})"


def number(seconds: float) -> str:
    """Three digits that matter.

    >>> number(1234.5), number(12.345), number(0.012345), number(0)
    ('1,234', '12.3', '0.0123', '0')
    """
    return f"{seconds:,.0f}" if seconds >= 100 else f"{seconds:.3g}"


def table(rows: list[list[str]]) -> str:
    """Markdown whose columns also line up as plain text; the first row is the header.

    >>> print(table([["work", "s"], ["a", "1.5"]]))
    | work |   s |
    | ---- | --: |
    | a    | 1.5 |
    """
    columns = []
    for title, *cells in zip(*rows, strict=True):
        width = max(3, *map(len, (title, *cells)))
        if any(cell[:1].isdigit() for cell in cells):
            rule, fit = "-" * (width - 1) + ":", str.rjust
        else:
            rule, fit = "-" * width, str.ljust
        columns.append([fit(cell, width) for cell in (title, rule, *cells)])
    return "\n".join(f"| {' | '.join(line)} |" for line in zip(*columns, strict=True))
