"""Examines what the clip range would clip: the spread of log s after a trial update.

Decides how a rollout's optimizer steps are tried and undone, and which range is proposed. The steps
are AdamW's, at the peak learning rate, on the completions at hand with their rewards; every weight
is as it was afterwards.
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from gspo_lightning.advantages import group_advantages
from gspo_lightning.doctor import numbers
from gspo_lightning.doctor.findings import Finding
from gspo_lightning.optim import build_optimizer
from gspo_lightning.rollout import Rollout, Samples

FAR = 1.0  # spread of log s, beyond which most ratios lie outside of any clip range that is in use
PAPER = 0.15  # of the tokens are clipped with GSPO: arXiv:2507.18071, section 5.3
LOW, HIGH = 3.0, 4.0  # how the published range is shaped: 3e-4 below 1, 4e-4 above
MOST = 0.8  # of the sequences: the trial clips none, so its steps go further than those of a run
OPEN = {"clip_low": 0.999, "clip_high": 1000.0}  # clips nothing: what would be clipped is asked


@dataclass(frozen=True)
class Trial:
    """What a rollout's steps did, by completion; those of the first mini-batch have log s = 0.

    Attributes:
        log_s: Length-normalised log-ratio before the step on that completion, nats, (B,).
        advantages: (B,).
        lengths: Tokens, (B,).
    """

    log_s: Tensor
    advantages: Tensor
    lengths: Tensor

    def clipped(self, low: float, high: float) -> Tensor:
        """Completions that a range clips, (B,) bool."""
        above = (self.advantages > 0) & (self.log_s > math.log1p(high))
        return above | ((self.advantages < 0) & (self.log_s < math.log1p(-low)))

    def share(self, low: float, high: float) -> float:
        """Share of tokens that a range clips; a sequence's ratio is that of all its tokens."""
        return (self.clipped(low, high) * self.lengths).sum().item() / self.lengths.sum().item()

    def range(self, share: float = PAPER) -> tuple[float, float] | None:
        """The range, shaped as the published one, that clips a share of the tokens.

        None if fewer of them move in the direction that is clipped at all.

        >>> trial = Trial(torch.tensor([0.0, 0.01, -0.06]), torch.tensor([1.0, 1.0, -1.0]),
        ...               torch.tensor([10, 10, 10]))
        >>> [round(bound, 4) for bound in trial.range(0.4)]  # one of three goes beyond
        [0.0075, 0.01]
        """
        unit = torch.where(self.advantages > 0, self.log_s / HIGH, -self.log_s / LOW)
        unit, order = unit.where(self.advantages != 0, -math.inf).sort(descending=True)
        beyond = self.lengths[order].cumsum(0) > share * self.lengths.sum()
        found = unit[beyond][0].item()
        return (LOW * found, HIGH * found) if found > 0 else None


@contextmanager
def undone(parameters: list[Tensor]) -> Iterator[None]:
    """Give the parameters their values back in the end; the copies take no memory of a card."""
    own = [numbers.own_part(p.detach()) for p in parameters]
    kept = [part.to("cpu", copy=True) for part in own]
    try:
        yield
    finally:
        for part, value in zip(own, kept, strict=True):
            part.copy_(value)


def trial(module: Any, rollout: Rollout, size: int, most: int) -> Trial:
    """Take a rollout's optimizer steps and undo them.

    AdamW's first steps are as long as the learning rate allows, later ones shorter by half and
    more: steps at learning rate 0 come first, so that its moments have seen other mini-batches.

    Args:
        module: The module.
        rollout: Completions with old log-probs and advantages.
        size: Completions per forward and backward pass.
        most: Mini-batches at most; fewer of them than in the run take longer steps.
    """
    steps = module.num_epochs * module.num_minibatches
    count = min(steps, most, len(rollout))
    pieces = [rollout.select(torch.arange(i, len(rollout), count)) for i in range(count)]
    choices = replace(module.choices, objective=replace(module.objective, **OPEN), kl_coef=0.0)
    parameters = [p for p in module.policy.parameters() if p.requires_grad]
    optimizer = build_optimizer(module.policy, module.optimizer_config)
    rate = module.optimizer_config.learning_rate * (steps - 1) / (count - 1)
    log_s: list[Tensor] = []
    with undone(parameters):
        for index in [*range(1, count), *range(count)]:
            begun = bool(log_s) or index == 0
            last = begun and index == count - 1
            with torch.set_grad_enabled(not last):  # no step follows: log s is all that is wanted
                cut = numbers.gradient(module, pieces[index], size, choices)
            if begun:
                log_s.append(cut.log_ratios)
            if last:
                break
            for group in optimizer.param_groups:
                group["lr"] = rate if begun else 0.0
            for parameter, value in zip(parameters, cut.gradients, strict=True):
                parameter.grad = value
            optimizer.step()
            optimizer.zero_grad()
    whole = [(p.advantages[:, 0].float().cpu(), p.mask.sum(1).cpu()) for p in pieces]
    advantages, lengths = (torch.cat(values) for values in zip(*whole, strict=True))
    return Trial(torch.cat(log_s), advantages, lengths)


def clipping(
    module: Any, data: Any, samples: Samples, totals: list[Tensor], rows: int
) -> list[Finding]:
    """What the clip range would clip, and the range that would clip the paper's share.

    Args:
        module: The module.
        data: Its data.
        samples: Completions.
        totals: Their rewards as the group statistics see them, (B,); empty where a term failed.
        rows: Completions that are tried at most.
    """
    objective = module.objective
    rewards = totals[0] if totals else torch.zeros(len(samples))
    single = module.num_epochs * module.num_minibatches == 1
    if objective.ratio not in ("sequence", "sequence_token") or single or samples.group_size == 1:
        return []  # clips per token are no question of the length; one step is never clipped
    size = samples.group_size
    advantages = group_advantages(rewards.view(-1, size), "normalized")
    flat = (advantages == 0).all(1)  # they come last: without a gradient nothing moves
    groups = torch.cat([(~flat).nonzero()[:, 0], flat.nonzero()[:, 0]])[: max(1, rows // size)]
    chosen = numbers.rows_of(groups, size)[:rows]
    advantages = advantages.flatten()[chosen]
    note = ""
    if not (advantages != 0).any():
        advantages = torch.linspace(-1, 1, len(chosen))
        note = ", rewards made up, as they are all equal"
    rollout = numbers.as_rollout(module, samples.select(chosen), advantages, with_ref=False)
    rollout = replace(rollout, old_known=torch.ones_like(rollout.finished))
    done = trial(module, rollout, numbers.configured_size(module, data), 4 if rows > 16 else 2)
    low, high = objective.clip_low, objective.clip_high
    share = done.share(low, high)
    sequences = done.clipped(low, high).float().mean().item()
    deviation = done.log_s.square().mean().sqrt().item()
    wanted = done.range()
    value = {
        "log_s_std": deviation,
        "tokens": done.lengths.float().mean().item(),
        "clipped_tokens": share,
        "clipped_sequences": sequences,
        "proposed": wanted,
    }
    rate = module.optimizer_config.learning_rate
    text = (
        f"a trial rollout at learning rate {rate:g} spreads log s by {deviation:.1e} at "
        f"{value['tokens']:.0f} tokens{note}; [1 - {low:g}, 1 + {high:g}] would clip {share:.0%} "
        "of the tokens"
    )
    if not deviation <= FAR:
        remedy = "no clip range mends steps that far: lower optimizer.learning_rate"
        return [Finding("clipping", "warning", text, remedy, value | {"proposed": None})]
    proposal = ""
    if wanted is not None:
        proposal = f"objective.clip_low {wanted[0]:.1g} and clip_high {wanted[1]:.1g}"
        text += f", {proposal} the paper's {PAPER:.0%}"
    if sequences > MOST or (share == 0 and wanted is not None):
        what = "lower" if share else "raise"
        remedy = f"set {proposal}, or {what} optimizer.learning_rate"
        return [Finding("clipping", "warning", text, remedy, value)]
    return [Finding("clipping", "ok", text, value=value)]
