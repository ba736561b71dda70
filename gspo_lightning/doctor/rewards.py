"""Examines what sampled completions earn: spread of each term, flat groups, truncation.

Decides when rewards give nothing to learn from, and what another group size would change. Whether
a reward means what was wanted, only reading completions tells.
"""

import math
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from gspo_lightning.advantages import flat_groups, group_advantages
from gspo_lightning.doctor.findings import Finding
from gspo_lightning.guards.health import MORE_TURNS
from gspo_lightning.rewards.terms import RewardError, RewardTerm, Scores, score

MOST = 0.5  # of completions cut, or of rewards missing: what is left does not describe the whole
FLAT = 0.5  # of groups: the batch that teaches is half the batch that is paid for
ENDLESS = (
    "set policy.stop_strings or policy.stop_token_ids (a base model may never end a text), raise "
    "sampler.max_new_tokens, or set model.truncated: keep"
)
SAME = 1e-6  # relative difference of rewards that count as equal, as in ``flat_groups``


def truncation(finished: Tensor, cap: int, limit: int, out_of_turns: float = 0.0) -> Finding:
    """How many completions were cut at ``cap`` tokens, and whether the run would cut as many.

    ``finished`` is (B,) bool; ``limit`` is ``sampler.max_new_tokens``; ``out_of_turns`` is the
    share of completions that had tokens left and no turn.
    """
    if out_of_turns > MOST:
        text = f"{out_of_turns:.0%} of {len(finished)} episodes were cut as they had no turn left"
        return Finding("truncated", "warning", text, MORE_TURNS, {"out_of_turns": out_of_turns})
    share = (~finished).float().mean().item()
    value = {"cut_share": share, "cap": cap, "limit": limit}
    text = f"{share:.0%} of {len(finished)} completions were cut at {cap} tokens"
    remedy = (
        "raise sampler.max_new_tokens, set policy.stop_strings or policy.stop_token_ids for a base "
        "model, or see eos above"
    )
    if cap < limit:
        text += f"; how many would be at the limit of {limit} is not known"
        remedy = f"what rewards say below is not to be trusted; use --max_new_tokens {limit}"
    if share > MOST:
        return Finding("truncated", "warning", text, remedy, value)
    return Finding("truncated", "ok", text, value=value)


def terms(rewards: Mapping[str, RewardTerm], samples: Any) -> tuple[list[Finding], Scores]:
    """A finding for each term, which may say nothing, and the scores of those that could score."""
    working, broken = dict(rewards), []
    while True:  # all completions at once, as in a run: a judge that is asked costs money
        try:
            special = samples.special_texts
            scores = score(working, samples.rows, samples.texts, special=special)
            break
        except RewardError as error:
            check, remedy = f"reward {error.term}", "mend the function, or the rows that it needs"
            broken.append(Finding(check, "error", str(error), remedy))
            del working[error.term]
    spreads = [term_spread(name, term, scores.parts[name]) for name, term in working.items()]
    return broken + spreads, scores


def term_spread(name: str, term: RewardTerm, part: Tensor) -> Finding:
    """Least, mean and greatest value of a term, and how often it gave none."""
    check = f"reward {name}"
    there = part[~part.isnan()]
    missing = 1 - len(there) / len(part)
    if not len(there):
        text = f"gives no reward for any of {len(part)} completions"
        remedy = f"see that it applies to these prompts, or remove model.rewards.{name}"
        return Finding(check, "error", text, remedy, {"missing_share": missing})
    low, mean, high = there.min().item(), there.mean().item(), there.max().item()
    value = {"min": low, "mean": mean, "max": high, "missing_share": missing}
    text = f"{low:.3g} to {high:.3g}, mean {mean:.3g}"
    rest = f", weight {term.weight:g}" + (f", {missing:.0%} missing" if missing else "")
    if _same(low, high):
        text = f"always {low:.3g} for {len(there)} completions{rest}"
        remedy = "a constant teaches nothing: read the completions, then mend the term or prompts"
        return Finding(check, "warning", text, remedy, value)
    text += rest
    if missing > MOST:
        remedy = "rows without a reward are left out of the update; see that the term applies"
        return Finding(check, "warning", text, remedy, value)
    return Finding(check, "ok", text, value=value)


def total(rewards: Tensor, group_size: int, cut: float = 0.0) -> Finding:
    """Spread of the rewards as groups see them: (B,), NaN where missing.

    ``cut`` is the share of completions whose reward ``model.truncated`` took away.
    """
    valid = ~rewards.isnan()
    why = f": {cut:.0%} hit the limit, and model.truncated took their reward" if cut > MOST else ""
    if not valid.any():
        text = f"no completion has a reward{why}"
        return Finding("rewards", "error", text, ENDLESS if why else "see the reward terms above")
    groups = rewards.view(-1, group_size)
    relative = group_advantages(groups, "relative").flatten()[valid]
    spread = math.sqrt((relative**2).mean().item())
    low, high = rewards[valid].min().item(), rewards[valid].max().item()
    value = {"min": low, "mean": rewards[valid].mean().item(), "max": high, "group_std": spread}
    text = f"{low:.3g} to {high:.3g}, standard deviation within groups {spread:.3g}"
    if _same(low, high):
        text = f"every completion earns {low:.3g}, so no update has a direction{why}"
        remedy = "mend the reward terms, or use prompts of another difficulty, or a warm start"
        return Finding("rewards", "error", text, ENDLESS if why else remedy, value)
    return Finding("rewards", "ok", text, value=value)


def flat_share(successes: Tensor, drawn: Tensor, group_size: int) -> float:
    """Expected share of flat groups of a reward with two values, unbiased.

    A prompt that earns the better value with probability p gives a flat group with probability
    p^G + (1 - p)^G. Putting the observed share in for p would overrate that (it is convex in p, and
    1 for prompts that were only lucky); the chance that G completions drawn without replacement
    from the n observed ones are all alike, [C(c, G) + C(n - c, G)] / C(n, G), has exactly that mean
    for any n >= G.

    Args:
        successes: Completions with the better value, c, (P,) int.
        drawn: Completions drawn, n, (P,) int.
        group_size: G.

    Returns:
        Mean over the prompts with n >= G, in [0, 1]; NaN if there are none.

    >>> import torch
    >>> share = flat_share(torch.tensor([1, 2]), torch.tensor([4, 4]), group_size=2)
    >>> round(share, 4)  # (3/6 + 2/6) / 2
    0.4167
    """
    shares = []
    for c, n in zip(successes.tolist(), drawn.tolist(), strict=True):
        if n >= group_size:
            alike = math.comb(c, group_size) + math.comb(n - c, group_size)
            shares.append(alike / math.comb(n, group_size))
    return sum(shares) / len(shares) if shares else math.nan


def flat(rewards: Tensor, group_size: int, draws: int) -> Finding:
    """Share of flat groups: measured, and for rewards with two values expected for other sizes.

    Args:
        rewards: (P * draws * G,): the groups of a prompt follow one another.
        group_size: G.
        draws: Groups per prompt; with two of them, n = 2 G completions speak for each prompt.
    """
    groups = rewards.view(-1, group_size)
    measured = flat_groups(groups).float().mean().item()
    valid = rewards[~rewards.isnan()]
    value: dict[str, Any] = {"measured": measured, "groups": len(groups), "expected": {}}
    text = f"{measured:.0%} of {len(groups)} groups"
    remedy = "raise sampler.group_size, or set drop_flat_groups: true"
    low, high = (valid.min().item(), valid.max().item()) if len(valid) else (0.0, 0.0)
    if not _same(low, high):
        best, least = ((rewards - v).abs() <= SAME * max(1.0, abs(v)) for v in (high, low))
        if bool((best | least | rewards.isnan()).all()):
            per_prompt = (len(groups) // draws, draws * group_size)
            won = best.view(per_prompt).sum(1)
            drawn = (~rewards.isnan()).view(per_prompt).sum(1)
            sizes = sorted({max(2, group_size // 2), group_size, draws * group_size})
            value["expected"] = {g: flat_share(won, drawn, g) for g in sizes}
            text += "; expected with group_size " + ", ".join(
                f"{g}: {share:.0%}" for g, share in value["expected"].items()
            )
            remedy = _advice(value["expected"], group_size, (won.sum() / drawn.sum()).item())
        else:
            text += " (measured only: the reward has more than two values)"
    share = value["expected"].get(group_size, math.nan)
    share = measured if math.isnan(share) else share
    if share > FLAT:
        return Finding("flat groups", "warning", text, remedy, value)
    return Finding("flat groups", "ok", text, value=value)


def _advice(expected: dict[int, float], group_size: int, success: float) -> str:
    """What to do where most groups are flat."""
    prompts = "easier prompts or a warm start" if success < 0.5 else "harder prompts"
    larger = max(expected)
    if expected[group_size] - expected[larger] > 0.15:
        return f"raise sampler.group_size to {larger}, or use {prompts}"
    return f"use {prompts}: {success:.0%} earn the better reward, a larger group changes little"


def _same(low: float, high: float) -> bool:
    return high - low <= SAME * max(1.0, abs(high))
