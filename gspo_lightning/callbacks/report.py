"""What a person looks at: curves as a figure, samples as a table, metrics as a line.

Decides how they look.
"""

import itertools
import math
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from gspo_lightning.checkpoint.quoted import markdown
from gspo_lightning.curves import curve
from gspo_lightning.environments.episode import shown

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
    """Draw curves in rows of two, to be read at a width of 300 pixels, too.

    Args:
        points: By the name of each figure its ``[index, value]`` pairs: the index is that of the
            newest rollout, and -1 is before the first one.
        kl_target: KL divergence that AdaptiveKL aims at, nats per token; drawn as a line.
        has_reference: Whether KL was measured at all; an empty KL panel says so.

    Returns:
        A matplotlib ``Figure`` on an Agg canvas, free of pyplot's global state.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # only who draws pays the import
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    layout = ConstrainedLayoutEngine(h_pad=0.12, w_pad=0.12)  # inches, so that titles keep apart
    rows = max(1, math.ceil(len(points) / 2))
    figure = Figure(figsize=(10, 3.3 * rows), dpi=100, layout=layout)
    FigureCanvasAgg(figure)
    last = max((series[-1][0] for series in points.values() if series), default=0)
    panels = [*figure.subplots(rows, 2, squeeze=False).flat]
    for axes in panels[len(points) :]:
        axes.set_visible(False)
    for axes, (name, series) in zip(panels, points.items(), strict=False):
        title, unit, _ = curve(name) or (name, "", "")
        axes.set_title(title, loc="left", fontsize=21, fontweight="bold")
        axes.spines[["top", "right"]].set_visible(False)
        axes.spines[["left", "bottom"]].set_color("0.6")
        if not series:
            no_kl = name.startswith("train/kl_") and not has_reference
            reason = "no reference policy" if no_kl else "nothing measured"
            axes.set(xticks=[], yticks=[])
            axes.text(0.5, 0.5, reason, ha="center", va="center", color="0.5", fontsize=18)
            continue
        axes.set_ylabel(unit, fontsize=14, color="0.35")
        axes.tick_params(labelsize=16, colors="0.35")
        axes.locator_params(nbins=4)
        axes.grid(color="0.9", linewidth=1)
        axes.set_axisbelow(True)
        x = [index + 1 for index, _ in series]  # people count rollouts from 1
        y = [value for _, value in series]
        axes.set_xlim(-0.02 * last, 1.02 * last + 1.5)
        axes.xaxis.get_major_locator().set_params(integer=True)
        if name == "train/kl_coef":  # set, not measured: there is no noise to smooth
            axes.plot(x, y, color=DARK, linewidth=4, drawstyle="steps-mid")
        elif name.startswith("val/"):
            axes.plot(x, y, "o-", color=DARK, linewidth=4, markersize=9)
        else:
            axes.plot(x, y, "o", color=LIGHT, markersize=5, markeredgewidth=0)
            axes.plot(x, running_mean(y, width=len(y) // 10), color=DARK, linewidth=4)
        if name == "train/relative_advantage":  # a mean of 1e-8 is rounding: it must look like 0
            axes.set_ylim(min(axes.get_ylim()[0], -0.05), max(axes.get_ylim()[1], 0.05))
        if name == "train/kl_divergence" and kl_target is not None:
            axes.axhline(kl_target, color=RED, linewidth=2.5, linestyle="--")
            low_half = kl_target < sum(axes.get_ylim()) / 2  # the label goes where there is room
            axes.annotate(
                f"target {kl_target:g}",
                (0.02, kl_target),
                xycoords=("axes fraction", "data"),
                xytext=(2, 4 if low_half else -4),
                textcoords="offset points",
                va="bottom" if low_half else "top",
                fontsize=16,
                color=RED,
            )
    for axes in panels[max(0, len(points) - 2) : len(points)]:
        axes.set_xlabel("rollouts", fontsize=16, color="0.35")
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


def chosen_rows(rewards: Tensor, group_size: int, num_samples: int, num_prompts: int) -> list[int]:
    """Rows of a rollout that teach a reader most: of the groups that differ most, best to worst.

    Args:
        rewards: (B,), NaN where missing.
        group_size: Completions per prompt.
        num_samples: Rows wanted.
        num_prompts: Groups that they are taken from; more where groups are too small for that.

    >>> import torch
    >>> chosen_rows(torch.tensor([1.0, 1, 1, 0, 2, 1]), group_size=3, num_samples=4, num_prompts=2)
    [4, 3, 0, 2]
    """
    groups = rewards.double().view(-1, group_size)
    variance = (groups - groups.nanmean(1, keepdim=True)).square().nanmean(1).nan_to_num(0.0)
    num_prompts = min(num_prompts, len(groups), max(1, num_samples // 2))  # a pair of each at least
    each = min(group_size, math.ceil(num_samples / num_prompts))
    ranks = [round(i * (group_size - 1) / max(1, each - 1)) for i in range(each)]
    places = variance.sort(descending=True, stable=True).indices[: math.ceil(num_samples / each)]
    best = groups.nan_to_num(-math.inf).sort(dim=1, descending=True, stable=True).indices
    rows = (places[:, None] * group_size + best[places][:, ranks]).flatten()
    return rows[:num_samples].tolist()


def sample_rows(
    outputs: dict[str, Any], tokenizer: Any, num_samples: int, num_prompts: int
) -> list[dict[str, Any]]:
    """Some sequences of a rollout as plain values; see :func:`chosen_rows` for which."""
    rollout = outputs["rollout"]
    size = rollout.group_size
    rows = [
        {
            "rollout": outputs["index"] + 1,
            "group": i // size + 1,
            "prompt": tokenizer.decode(rollout.prompt_ids[i][rollout.prompt_mask[i]].tolist()),
            "completion": shown(rollout.rows[i], rollout.texts[i]),
            "reward": rollout.rewards[i],
            "parts": {name: part[i] for name, part in rollout.reward_parts.items()},
            "advantage": rollout.advantages[i, 0],
            "length": int(outputs["lengths"][i]),
            "truncated": not bool(rollout.finished[i]),
            "ratio": outputs["ratios"][i],
        }
        for i in chosen_rows(rollout.rewards, size, num_samples, num_prompts)
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
    """The samples as a Markdown table; texts are escaped, and ``longest`` characters at most.

    The prompt of a group stands in its first line alone.
    """
    numbers = ["reward", *samples[0]["parts"], "advantage", "length", "truncated", "ratio"]
    numbers = [name for i, name in enumerate(numbers) if name not in numbers[:i]]
    table = [["prompt", "completion", *map(markdown, numbers)]]
    above = None
    for sample in samples:
        prompt = "" if sample["group"] == above else shortened(sample["prompt"], longest)
        above = sample["group"]
        texts = [markdown(text) for text in (prompt, shortened(sample["completion"], longest))]
        values = {**sample["parts"], **sample}
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
