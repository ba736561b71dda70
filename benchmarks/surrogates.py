"""The picture of docs/algorithms.md: each surrogate and its gradient over the ratio.

python benchmarks/surrogates.py

Writes docs/images/surrogates.png, from ``policy_loss`` itself with rows of configs/algorithm: one
token, its old log-prob -1, advantage 1 and -1. Of surrogates whose loss is a weighted log-prob the
gradient alone means something.
"""

from pathlib import Path

import torch
import yaml
from matplotlib.figure import Figure

from gspo_lightning.objectives import Objective, policy_loss

ROOT = Path(__file__).parents[1]
ROWS = {  # the overlay, and how it is called in the picture
    "gspo": "GSPO: clip at 3e-4, 4e-4",
    "grpo": "GRPO, PPO: clip at 0.2",
    "dual_clip": "dual clip: and at 3",
    "gmpo": "GMPO: clip at exp(0.4)",
    "sapo": "SAPO: soft",
    "cispo": "CISPO: held at 5",
    "vespo": "VESPO: gamma",
    "gpg": "GPG: none",
}
COLOURS = ("#1f5a96", "#c8553d", "#3b8c5a", "#8c6bb1", "#d9a441", "#5f6b73", "#b0457b", "#3aa6b9")
RATIOS = torch.linspace(0.02, 4.5, 900, dtype=torch.float64)


def curves(objective: Objective, advantage: float) -> tuple[list[float], list[float]]:
    """Minus the loss of each ratio, and its slope over the log-prob."""
    logprobs = (RATIOS.log() - 1)[:, None].requires_grad_()
    old, mask = torch.full_like(logprobs, -1), torch.ones(len(RATIOS), 1, dtype=torch.bool)
    advantages = torch.full((len(RATIOS),), advantage, dtype=torch.float64)
    gains = []
    for row in range(len(RATIOS)):  # row by row: the loss is a sum
        weights = torch.zeros_like(logprobs)
        weights[row] = 1
        gains.append(-policy_loss(logprobs, old, advantages, mask, weights, objective).loss)
    (slopes,) = torch.autograd.grad(torch.stack(gains).sum(), logprobs)
    return [gain.item() for gain in gains], slopes[:, 0].tolist()


def main() -> None:
    """Draw and write."""
    picture = Figure(figsize=(11, 7), dpi=100, layout="constrained")
    panels = picture.subplots(2, 2, sharex=True)
    for colour, (name, label) in zip(COLOURS, ROWS.items(), strict=True):
        text = (ROOT / "configs" / "algorithm" / f"{name}.yaml").read_text()
        objective = Objective(**yaml.safe_load(text)["model"]["init_args"]["objective"])
        for column, advantage in enumerate((1.0, -1.0)):
            gains, slopes = curves(objective, advantage)
            dashes = "--" if name in ("dual_clip", "cispo") else "-"  # lie on others in part
            style = {"color": colour, "linewidth": 1.6, "label": label, "linestyle": dashes}
            if objective.surrogate in ("clip", "soft"):
                panels[0, column].plot(RATIOS, gains, **style)
            panels[1, column].plot(RATIOS, slopes, **style)
    for row, what in enumerate(("surrogate", "its gradient over the log-prob")):
        for column, sign in enumerate(("1", "-1")):
            axes = panels[row, column]
            axes.set_title(f"A = {sign}: {what}", loc="left", fontsize=10, fontweight="bold")
            axes.axvline(1, color="0.8", linewidth=0.8)
            axes.spines[["top", "right"]].set_visible(False)
            axes.tick_params(labelsize=8, colors="0.35")
            axes.set_ylim((-0.2, 5.2) if column == 0 else (-5.2, 0.2))
            if row:
                axes.set_xlabel("ratio", fontsize=9, color="0.35")
    handles, labels = panels[1, 0].get_legend_handles_labels()
    picture.legend(handles, labels, loc="outside upper center", ncols=4, frameon=False, fontsize=9)
    picture.savefig(ROOT / "docs" / "images" / "surrogates.png", format="png")


if __name__ == "__main__":
    main()
