"""What a person looks at: curves as a figure, samples as a table, metrics as a line.

Decides how they look.
"""

import itertools
import math
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from gspo_lightning.checkpoint.quoted import markdown
from gspo_lightning.metrics import CURVES

# Title and unit of each curve.
PANELS = {
    "policy_loss": ("Policy loss", "loss"),
    "entropy_loss": ("Entropy loss", "−coefficient × nats per token"),
    "kl_loss": ("KL loss", "coefficient × nats per token"),
    "reward": ("Reward", "weighted sum, mean"),
    "relative_advantage": ("Relative advantage", "mean, around 0"),
    "kl_divergence": ("KL divergence to the reference", "nats per token"),
    "kl_coef": ("KL coefficient", "coefficient used"),
    "avg_response_length": ("Response length", "tokens, mean"),
}
LIGHT, DARK, RED = "#8fb4d9", "#1f5a96", "#c8553d"

# Key of a metric, its word, its format; in the order of a line.
ROLLOUT_LINE = (
    ("train/reward", "reward {:6.3f}"),
    ("train/kl_divergence", "kl {:.4f}"),
    ("train/clip_fraction_sequences", "clip {:.2f}"),
    ("train/avg_response_length", "length {:5.1f}"),
    ("time/tokens_per_second", "{:7,.0f} tok/s"),
    ("time/rollout", "rollout {:.2f} s"),
    ("time/score", "score {:.2f} s"),
    ("time/optimise", "optimise {:.2f} s"),
)


def draw_curves(
    points: dict[str, list[list[float]]], kl_target: float | None, has_reference: bool
) -> Any:
    """Draw the eight curves in four rows of two.

    Args:
        points: For each name in CURVES its ``[rollout index, value]`` pairs.
        kl_target: KL divergence that AdaptiveKL aims at, nats per token; drawn as a line.
        has_reference: Whether KL was measured at all; an empty KL panel says so.

    Returns:
        A matplotlib ``Figure`` on an Agg canvas, free of pyplot's global state.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # only who draws pays the import
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    layout = ConstrainedLayoutEngine(h_pad=0.12, w_pad=0.08)  # inches, so that titles keep apart
    figure = Figure(figsize=(10, 12), dpi=100, layout=layout)
    FigureCanvasAgg(figure)
    last = max((series[-1][0] for series in points.values() if series), default=0)
    for axes, name in zip(figure.subplots(4, 2).flat, CURVES, strict=True):
        title, unit = PANELS[name]
        axes.set_title(title, loc="left", fontsize=11, fontweight="bold")
        axes.spines[["top", "right"]].set_visible(False)
        axes.spines[["left", "bottom"]].set_color("0.75")
        if not points[name]:
            no_kl = name.startswith("kl_") and not has_reference
            reason = "no reference policy" if no_kl else "nothing measured"
            axes.set(xticks=[], yticks=[])
            axes.text(0.5, 0.5, reason, ha="center", va="center", color="0.5", fontsize=11)
            continue
        axes.set_ylabel(unit, fontsize=9, color="0.35")
        axes.set_xlabel("rollout", fontsize=9, color="0.35")
        axes.tick_params(labelsize=8, colors="0.35")
        axes.grid(color="0.92", linewidth=0.8)
        axes.set_axisbelow(True)
        x = [index + 1 for index, _ in points[name]]  # people count rollouts from 1
        y = [value for _, value in points[name]]
        axes.set_xlim(0.5, last + 1.5)
        axes.xaxis.get_major_locator().set_params(integer=True)
        if name == "kl_coef":  # set, not measured: there is no noise to smooth
            axes.plot(x, y, color=DARK, linewidth=1.8, drawstyle="steps-mid")
            continue
        axes.plot(x, y, "o", color=LIGHT, markersize=3, markeredgewidth=0)
        axes.plot(x, running_mean(y, width=len(y) // 10), color=DARK, linewidth=1.8)
        if name == "relative_advantage":  # a mean of 1e-8 is rounding, and must look like 0
            axes.set_ylim(min(axes.get_ylim()[0], -0.05), max(axes.get_ylim()[1], 0.05))
        if name == "kl_divergence" and kl_target is not None:
            axes.axhline(kl_target, color=RED, linewidth=1.2, linestyle="--")
            low_half = kl_target < sum(axes.get_ylim()) / 2  # the label goes where there is room
            axes.annotate(
                f"target {kl_target:g}",
                (0.005, kl_target),
                xycoords=("axes fraction", "data"),
                xytext=(2, 3 if low_half else -3),
                textcoords="offset points",
                va="bottom" if low_half else "top",
                fontsize=8,
                color=RED,
            )
    return figure


def running_mean(values: list[float], width: int) -> list[float]:
    """Mean over up to ``width`` neighbours on each side, NaN where fewer than half of them exist.

    Always as many on the left as on the right: a rising curve would otherwise seem to start higher
    than it did.

    >>> running_mean([0.0, 3.0, 6.0, 0.0], width=1)
    [nan, 3.0, 3.0, nan]
    """
    sums = [*itertools.accumulate(values, initial=0.0)]
    means = []
    for i in range(len(values)):
        reach = min(width, i, len(values) - 1 - i)
        mean = (sums[i + reach + 1] - sums[i - reach]) / (2 * reach + 1)
        means.append(mean if reach >= width / 2 else math.nan)
    return means


def sample_rows(outputs: dict[str, Any], tokenizer: Any, count: int) -> list[dict[str, Any]]:
    """The first ``count`` sequences of a rollout as plain values."""
    rollout = outputs["rollout"]
    rows = [
        {
            "rollout": outputs["index"],
            "prompt": tokenizer.decode(rollout.prompt_ids[i][rollout.prompt_mask[i]].tolist()),
            "completion": rollout.texts[i],
            "reward": rollout.rewards[i],
            "parts": {name: part[i] for name, part in rollout.reward_parts.items()},
            "advantage": rollout.advantages[i, 0],
            "length": int(outputs["lengths"][i]),
            "truncated": not bool(rollout.finished[i]),
            "ratio": outputs["ratios"][i],
        }
        for i in range(min(count, len(rollout.texts)))
    ]
    return rounded(rows)


def rounded(value: Any) -> Any:
    """Numbers as JSON can hold them: six digits after the point, None for NaN and infinities.

    >>> rounded({"reward": 0.1 + 0.2, "parts": [float("nan"), 3, True]})
    {'reward': 0.3, 'parts': [None, 3, True]}
    """
    if isinstance(value, dict):
        return {name: rounded(part) for name, part in value.items()}
    if isinstance(value, (list, tuple)):
        return [rounded(part) for part in value]
    if isinstance(value, (float, Tensor)):
        number = float(value)
        return round(number, 6) if math.isfinite(number) else None
    return value


def markdown_table(samples: list[dict[str, Any]], longest: int = 400) -> str:
    """The samples as a Markdown table; texts are escaped, and ``longest`` characters at most."""
    numbers = ["reward", *samples[0]["parts"], "advantage", "length", "truncated", "ratio"]
    table = [["prompt", "completion", *map(markdown, numbers)]]
    for sample in samples:
        texts = [sample["prompt"], sample["completion"]]
        texts = [markdown(shortened(text, longest)) for text in texts]
        values = {**sample, **sample["parts"]}
        cells = [f"{v:.4g}" if isinstance(v, float) else str(v) for v in map(values.get, numbers)]
        table.append([*texts, *cells])
    head, *lines = ("| " + " | ".join(cells) + " |" for cells in table)
    return "\n".join([head, "|" + " --- |" * len(table[0]), *lines])


def shortened(text: str, longest: int) -> str:
    """Head and tail of a longer text: a chat prompt ends with the question and the answer's header.

    >>> shortened("0123456789", 9), shortened("012345678", 9)
    ('012 … 789', '012345678')
    """
    if len(text) <= longest:
        return text
    half = (longest - 3) // 2
    return f"{text[:half]} … {text[-half:]}"


def rollout_figures(metrics: Mapping[str, Any]) -> list[str]:
    """The metrics of a rollout that a person follows, as far as they exist.

    >>> rollout_figures({"train/reward": 0.5, "time/score": 0.25})
    ['reward  0.500', 'score 0.25 s']
    """
    return [text.format(metrics[key]) for key, text in ROLLOUT_LINE if key in metrics]


def figures(metrics: Mapping[str, Any], stage: str = "val") -> dict[str, float]:
    """The results of an evaluation under short words, accuracies first.

    Left out is what says nothing new: single reward terms, and pass@1, the sampled accuracy.

    >>> figures({"val/reward": 0.4, "val/accuracy_greedy": 0.5, "val/pass_at_4": 1, "train/x": 2})
    {'greedy': 0.5, 'pass@4': 1.0, 'reward': 0.4}
    """
    values = {}
    for key, value in metrics.items():
        group, _, name = key.partition("/")
        if group == stage and not name.startswith("reward_") and name != "pass_at_1":
            values[name] = float(value)
    order = sorted(values, key=lambda name: not name.startswith(("accuracy_", "pass_at_")))
    return {word(name): values[name] for name in order}


def word(name: str) -> str:
    """What people call a metric.

    >>> word("accuracy_greedy"), word("truncated_fraction")
    ('greedy', 'truncated')
    """
    name = name.replace("pass_at_", "pass@")
    for part in ("accuracy_", "response_", "_fraction"):
        name = name.replace(part, "")
    return name


def figure_texts(values: Mapping[str, float]) -> list[str]:
    return [f"{name} {value:.3f}" for name, value in values.items()] or ["no figures"]
