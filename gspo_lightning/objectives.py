"""Importance ratios, clipped surrogates, aggregation weights, and the policy loss made of them.

Decides what an algorithm is: a row of choices (``Objective``), no class per paper. All arithmetic
is float32 at least, since 1 + 4e-4 is exactly 1 in bfloat16, and masked before it begins.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor

from gspo_lightning.masked import masked_mean, masked_sum

RatioLevel = Literal["sequence", "sequence_token", "token", "sequence_sum", "geometric"]
Surrogate = Literal["clip", "cispo", "soft", "gamma"]
Aggregation = Literal["sequence_mean", "token_mean", "fixed_length", "token_sum"]
Pick = Literal["high_entropy", "clip_cov", "kl_cov"]

MAX_LOG_RATIO = 10.0  # nats; exp(10) = 22026, far outside any clip range
SMOOTH = {  # numbers of surrogates without a range: the surrogate, and the published value
    **{"tau_pos": ("soft", 1.0), "tau_neg": ("soft", 1.05)},
    **{"k_pos": ("gamma", 2.0), "lambda_pos": ("gamma", 3.0)},
    **{"k_neg": ("gamma", 3.0), "lambda_neg": ("gamma", 2.0)},
}
NUMBERS = {  # that one choice reads: the choice, its words, and what null stands for
    **{name: ("surrogate", (word,), value) for name, (word, value) in SMOOTH.items()},
    "clip_dual": ("surrogate", ("clip",), None),
    "pick_share": ("pick", get_args(Pick), None),
    "cov_low": ("pick", ("clip_cov",), 1.0),
    "cov_high": ("pick", ("clip_cov",), 5.0),
    "cov_kl": ("pick", ("kl_cov",), 1.0),
}


@dataclass(frozen=True)
class Objective:
    """The choices that make an algorithm; the defaults are GSPO as published.

    Numbers that one choice alone reads are null elsewhere; with it, null is the published value.

    Attributes:
        ratio: Importance ratio. ``sequence``: geometric mean over the sequence's tokens (GSPO,
            eq. 7); ``sequence_token``: the same value, with each token's own gradient (eq. 14);
            ``token``: one per token (GRPO, PPO); ``sequence_sum``: product over the tokens, not
            length-normalised; ``geometric``: geometric mean of ratios clipped by token (GMPO,
            arXiv:2507.20673).
        surrogate: ``clip``: PPO's pessimistic minimum; ``cispo``: detached ratio, held within the
            clip range, times the log-prob; ``soft``: a sigmoid of the ratio (SAPO,
            arXiv:2511.20347); ``gamma``: detached w^k exp(lambda (1 - w)) of the ratio w, times the
            log-prob (VESPO, arXiv:2602.10693).
        aggregation: ``sequence_mean``: mean over tokens, then over sequences (GSPO, GRPO);
            ``token_mean``: over all tokens (DAPO); ``fixed_length``: sum over tokens, divided by
            the generation limit (Dr. GRPO); ``token_sum``: sum over tokens, mean over sequences,
            so that long ones count for more (LUSPO, arXiv:2602.05261).
        clip_low: The ratio is clipped below 1 - clip_low, in [0, 1]; 1 is no lower bound.
        clip_high: The ratio is clipped above 1 + clip_high, at least 0.
        clip_dual: Where the advantage is negative, the ratio is clipped above this (dual clip,
            arXiv:1912.09729, eq. 2); null does not.
        tau_pos: How fast ``soft`` falls off where the advantage is positive.
        tau_neg: Where it is negative.
        k_pos: How much less ``gamma`` weighs ratios below 1 where the advantage is positive.
        lambda_pos: How much less it weighs ratios above 1.
        k_neg: As ``k_pos`` where the advantage is negative.
        lambda_neg: As ``lambda_pos`` there.
        off_policy_limit: Completions with a negative advantage whose log-prob has fallen by more
            than this, nats, mean over tokens, are left out (DeepSeek-V3.2, arXiv:2512.02556).
        pick: Tokens to treat apart, by statistics of the whole mini-batch of all ranks, for one
            more forward pass over it. ``high_entropy``: only the least certain train the policy
            (arXiv:2506.01939); ``clip_cov``: a few at random, whose covariance of log-prob and
            advantage is between ``cov_low`` and ``cov_high``, do not; ``kl_cov``: those of largest
            covariance pay ``cov_kl`` times their log-prob's change (both arXiv:2505.22617).
        pick_share: How many that are, as a share of all tokens, in (0, 1).
        cov_low: See ``pick``.
        cov_high: See ``pick``.
        cov_kl: See ``pick``.

    Raises:
        ValueError: If a value is unknown or out of range, or the choices do not go together.

    Source:
        GSPO, arXiv:2507.18071, sections 4 and 5.1 (clip range).

    >>> Objective("token", "soft").tau_neg, Objective().tau_neg
    (1.05, None)
    """

    ratio: RatioLevel = "sequence"
    surrogate: Surrogate = "clip"
    aggregation: Aggregation = "sequence_mean"
    clip_low: float = 3e-4
    clip_high: float = 4e-4
    clip_dual: float | None = None
    tau_pos: float | None = None
    tau_neg: float | None = None
    k_pos: float | None = None
    lambda_pos: float | None = None
    k_neg: float | None = None
    lambda_neg: float | None = None
    off_policy_limit: float | None = None
    pick: Pick | None = None
    pick_share: float | None = None
    cov_low: float | None = None
    cov_high: float | None = None
    cov_kl: float | None = None

    def __post_init__(self) -> None:
        _check_choice("ratio", self.ratio, RatioLevel)
        _check_choice("surrogate", self.surrogate, Surrogate)
        _check_choice("aggregation", self.aggregation, Aggregation)
        if self.pick is not None:
            _check_choice("pick", self.pick, Pick)
        for name, (choice, words, published) in NUMBERS.items():
            value, chosen = getattr(self, name), getattr(self, choice)
            if chosen in words and value is None:
                object.__setattr__(self, name, published)
            elif value is not None and chosen not in words:
                raise ValueError(
                    f"{name} {value} does nothing with {choice} {chosen or 'null'}; set {name} to "
                    f"null, or {choice} to {' or '.join(words)}"
                )
        most, dual = math.expm1(MAX_LOG_RATIO), self.clip_dual
        checks = [
            ("clip_low", 0 <= self.clip_low <= 1, "in [0, 1]"),
            ("clip_high", 0 <= self.clip_high < most, f"in [0, {most:.0f})"),
            ("clip_dual", dual is None or 1 + self.clip_high < dual < most, "above 1 + clip_high"),
            (
                "pick_share",
                self.pick is None or 0 < (self.pick_share or 0) < 1,
                f"in (0, 1) with pick {self.pick}",
            ),
        ]
        for name in (*NUMBERS, "off_policy_limit"):
            value = getattr(self, name)
            checks.append((name, value is None or 0 < value < math.inf, "> 0"))
        for name, fine, wanted in checks:
            if not fine:
                raise ValueError(f"{name} must be {wanted}, got {getattr(self, name)}")
        ratio, surrogate, pick = self.ratio, self.surrogate, self.pick
        ranged, by_token = (self.clip_low, self.clip_high) != (3e-4, 4e-4), ratio == "token"
        # with gamma the loss is a log-prob, whose sum over the tokens is the sequence's
        by_length = surrogate != "gamma" and self.aggregation in ("token_mean", "fixed_length")
        misfits = {
            f"surrogate {surrogate} has no clip range: leave clip_low and clip_high out": (
                ranged and surrogate in ("soft", "gamma")
            ),
            f"surrogate gamma is for ratio sequence_sum, got ratio {ratio}": (
                surrogate == "gamma" and ratio != "sequence_sum"
            ),
            "ratio geometric is clipped token by token before its mean: it goes with surrogate "
            "clip and without clip_dual": ratio == "geometric"
            and (surrogate, dual) != ("clip", None),
            f"pick {pick} is for ratio token, got ratio {ratio}": (
                pick in ("clip_cov", "kl_cov") and not by_token
            ),
            f"cov_low must be below cov_high {self.cov_high}, got {self.cov_low}": (
                pick == "clip_cov" and not self.cov_low < self.cov_high  # type: ignore[operator]
            ),
            f"ratio {ratio} cannot be combined with aggregation {self.aggregation}: one ratio per "
            "sequence would be weighted by the sequence's length, so that long completions "
            "dominate; use sequence_mean, token_sum if that is wanted, or ratio token": (
                by_length and not by_token
            ),
        }
        for reason, broken in misfits.items():
            if broken:
                raise ValueError(reason)

    @property
    def clips(self) -> bool:
        """Whether there is a range outside of which a ratio has no gradient."""
        return self.surrogate == "clip" and self.clip_low < 1

    @property
    def clip_width(self) -> float:
        """How far a ratio is from 1 where it begins to count for less; the narrower side."""
        if self.surrogate == "cispo" and self.clip_low in (0, 1):
            return self.clip_high or 1.0
        smooth = [getattr(self, name) or 0 for name in SMOOTH]
        return 1 / max(smooth) if any(smooth) else min(self.clip_low, self.clip_high)


class PolicyLoss(NamedTuple):
    """What ``policy_loss`` returns.

    Attributes:
        loss: Scalar with a gradient, to be minimised.
        clip_fraction_sequences: Of the given sequences that count, those with a clipped token, ().
        clip_fraction_tokens: Of the given tokens that count, those clipped, ().
        ratio: Importance ratio of each token, detached, (B, T).
    """

    loss: Tensor
    clip_fraction_sequences: Tensor
    clip_fraction_tokens: Tensor
    ratio: Tensor


def importance_log_ratio(
    logprobs: Tensor, old_logprobs: Tensor, mask: Tensor, level: RatioLevel
) -> Tensor:
    """Compute the log of the importance ratio of policy to old policy.

    Args:
        logprobs: Log-probs under the policy, nats, (B, T).
        old_logprobs: Log-probs under the policy that sampled, nats, (B, T).
        mask: True on tokens that count, (B, T) bool.
        level: See ``Objective.ratio``.

    Returns:
        Log-ratio, (B, T), float32 at least. A sequence's ratio stands in each of its columns;
        a row with nothing selected has 0, and so has a token ratio under a False mask.

    Raises:
        ValueError: If ``level`` is unknown.

    Source:
        GSPO, arXiv:2507.18071, eq. 7 (sequence), eq. 13 and 14 (sequence_token).

    >>> log_ratio = importance_log_ratio(
    ...     torch.tensor([[-1.0, -2.0, -9.0]]), torch.tensor([[-1.5, -2.1, 0.0]]),
    ...     torch.tensor([[True, True, False]]), "sequence")
    >>> [round(value, 4) for value in log_ratio[0].tolist()]
    [0.3, 0.3, 0.3]
    """
    _check_choice("level", level, RatioLevel)
    logprobs = _clean(logprobs, mask)
    difference = logprobs - _clean(old_logprobs, mask).detach()
    if level == "token":
        return difference
    if level == "sequence_sum":
        return masked_sum(difference, mask, dim=1)[:, None].expand_as(difference)
    sequence = masked_mean(difference, mask, dim=1)[:, None].expand_as(difference)
    if level in ("sequence", "geometric"):  # policy_loss clips the tokens of the latter first
        return sequence
    # The bracket is exactly 0. Added in another order, its rounding exceeds the clip range.
    return sequence.detach() + (logprobs - logprobs.detach())


def clipped(log_ratio: Tensor, advantages: Tensor, mask: Tensor, objective: Objective) -> Tensor:
    """Find the tokens whose ratio is clipped.

    With surrogate ``clip`` these are the tokens without a gradient: advantage positive and ratio
    above the range, or negative and below, or above ``clip_dual``. With ``cispo``, where the
    gradient stays, they are those whose ratio is held. Other surrogates clip nothing. An advantage
    of 0 never counts.

    Args:
        log_ratio: From ``importance_log_ratio``, (B, T); that of each token with ``geometric``.
        advantages: (B,) or (B, T).
        mask: True on tokens that count, (B, T) bool.
        objective: Surrogate and clip range.

    Returns:
        (B, T) bool, False under a False mask.
    """
    advantages = _per_token(advantages, mask)
    # Logs are compared: around 1 float32 resolves a ratio to 1e-7 only, a log-ratio much finer.
    log_ratio, (low, high) = log_ratio.detach(), _log_range(objective)
    if objective.surrogate in ("soft", "gamma"):
        return torch.zeros_like(mask)
    above, below = log_ratio > high, log_ratio < low
    if objective.surrogate == "cispo":
        return (above | below) & (advantages != 0) & mask
    if objective.clip_dual is not None:
        below = below | (log_ratio > math.log(objective.clip_dual))
    return ((above & (advantages > 0)) | (below & (advantages < 0))) & mask


def token_weights(
    mask: Tensor,
    aggregation: Aggregation,
    max_length: int | None = None,
    reduce: Callable[[Tensor], Tensor] | None = None,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Compute the weight of each token in the loss, once for a whole mini-batch.

    A loss is then ``sum(weights * per-token loss)`` over any cut of the mini-batch into
    micro-batches and ranks: gradients are to be summed, not averaged, over both.

    Args:
        mask: True on tokens that count, (B, T) bool, of all rows of this rank's mini-batch.
        aggregation: See ``Objective.aggregation``.
        max_length: Generation limit in tokens, needed by ``fixed_length`` alone.
        reduce: Sums an int64 tensor over all ranks; None with one rank.
        dtype: Of the result; float64 for a float64 loss.

    Returns:
        Non-negative weights, (B, T), 0 under a False mask; their sum over all ranks is 1 for
        ``sequence_mean`` and ``token_mean``, the mean length in tokens for ``token_sum``.

    Raises:
        ValueError: If ``aggregation`` is unknown, or ``max_length`` is missing or below 1.

    Source:
        ``token_mean``: DAPO, arXiv:2503.14476, "Token-Level Policy Gradient Loss".
        ``fixed_length``: Dr. GRPO, arXiv:2503.20783, section 3.2. ``token_sum``: LUSPO,
        arXiv:2602.05261.

    >>> mask = torch.tensor([[True, True], [True, False]])
    >>> [token_weights(mask, kind).tolist() for kind in ("sequence_mean", "token_sum")]
    [[[0.25, 0.25], [0.5, 0.0]], [[0.5, 0.5], [0.5, 0.0]]]
    """
    _check_choice("aggregation", aggregation, Aggregation)
    if aggregation == "fixed_length" and (max_length is None or max_length < 1):
        raise ValueError(f"fixed_length needs max_length of at least 1 token, got {max_length}")
    lengths = mask.sum(dim=1, keepdim=True)
    counts = torch.stack([(lengths > 0).sum(), lengths.sum()])
    # Ranks add up before the division: a mean of their means would depend on who has which rows.
    num_sequences, num_tokens = (counts if reduce is None else reduce(counts)).clamp(min=1)
    if aggregation == "token_mean":
        return mask.to(dtype) / num_tokens
    if aggregation == "fixed_length":
        return mask.to(dtype) / (num_sequences * max_length)
    if aggregation == "token_sum":
        return mask.to(dtype) / num_sequences
    return mask.to(dtype) / (lengths.clamp(min=1) * num_sequences)


def picked_tokens(
    logprobs: Tensor,
    old_logprobs: Tensor,
    entropy: Tensor,
    advantages: Tensor,
    mask: Tensor,
    objective: Objective,
    seed: int,
    join: Callable[[Tensor], tuple[Tensor, slice]] | None = None,
) -> Tensor:
    """Pick tokens of a whole mini-batch; see ``Objective.pick``.

    Args:
        logprobs: Log-probs under the policy, nats, (B, T).
        old_logprobs: Log-probs under the policy that sampled, nats, (B, T).
        entropy: Entropy of the policy, nats, (B, T).
        advantages: (B,) or (B, T).
        mask: True on tokens that count, (B, T) bool, of all rows of this rank's mini-batch.
        objective: What is picked, and how many.
        seed: Of what ``clip_cov`` draws, the same on all ranks.
        join: Puts the rows of all ranks under one another and says which are this rank's.

    Returns:
        (B, T) bool, False under a False mask; ties with the last one are in, by their entropy.

    Covariances here are 3, 0.5, 0.5 and 0:

    >>> logprobs, mask = torch.tensor([[-3.0, -1, -1, -1]]), torch.ones(1, 4, dtype=torch.bool)
    >>> entropy, advantages = torch.tensor([[0.1, 0.9, 0.2, 0.9]]), torch.tensor([[-2.0, 1, 1, 0]])
    >>> for pick in get_args(Pick):
    ...     row = Objective("token", pick=pick, pick_share=0.3)
    ...     given = logprobs, logprobs, entropy, advantages, mask, row
    ...     print(pick, picked_tokens(*given, seed=0).int().tolist())
    high_entropy [[0, 1, 0, 1]]
    clip_cov [[1, 0, 0, 0]]
    kl_cov [[1, 0, 0, 0]]
    """
    advantages = _per_token(advantages, mask)
    log_ratio = importance_log_ratio(logprobs, old_logprobs, mask, "token")
    free = ~clipped(log_ratio, advantages, mask, objective)
    columns = [_clean(logprobs, mask), advantages, _clean(entropy, mask), free]
    tokens = torch.stack([column.detach().double() for column in columns], dim=2)[mask]
    tokens, own = (tokens, slice(None)) if join is None else join(tokens)
    logprob, advantage, uncertainty, is_free = tokens.unbind(1)
    covariance = (logprob - logprob.mean()) * (advantage - advantage.mean())
    share, count = objective.pick_share or 0.0, len(tokens)
    few = max(1, int(share * count))
    if objective.pick == "high_entropy":
        place = math.ceil((count - 1) * (1 - share) - 1e-9)
        chosen = uncertainty >= uncertainty.sort().values[place]
    else:
        if objective.pick == "kl_cov":
            index = covariance.topk(few).indices
        else:
            inside = (covariance > objective.cov_low) & (covariance < objective.cov_high)  # type: ignore[operator]
            index = (inside & is_free.bool()).nonzero()[:, 0]
            order = torch.randperm(len(index), generator=torch.Generator().manual_seed(seed))
            index = index[order[:few].to(index.device)]
        chosen = torch.zeros_like(uncertainty, dtype=torch.bool).index_fill(0, index, True)
    return torch.zeros_like(mask).masked_scatter(mask, chosen[own])


def policy_loss(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    mask: Tensor,
    weights: Tensor,
    objective: Objective,
    picked: Tensor | None = None,
) -> PolicyLoss:
    """Compute the surrogate loss of some rows of a mini-batch.

    The log-ratio is held within +-10 nats before ``exp``, so that one broken token cannot make
    the loss infinite; its gradient then is that of the bound instead of none, so that a token
    that should become less likely still does.

    Args:
        logprobs: Log-probs under the policy, nats, (B, T).
        old_logprobs: Log-probs under the policy that sampled, nats, (B, T).
        advantages: (B,) or (B, T).
        mask: True on tokens that count, (B, T) bool. What stands elsewhere has no influence.
        weights: From ``token_weights`` of the whole mini-batch, (B, T).
        objective: Ratio, surrogate and clip range.
        picked: From ``picked_tokens`` of the whole mini-batch, (B, T) bool, if anything is picked.

    Returns:
        Loss and clip fractions; with nothing selected all are 0 and the loss keeps its graph.

    Raises:
        ValueError: If the shapes do not fit, or the objective picks tokens and none are given.

    Source:
        GSPO, arXiv:2507.18071, eq. 5. PPO, arXiv:1707.06347, eq. 7. CISPO, arXiv:2506.13585. For
        the others see ``Objective``.

    How strongly two tokens of ratios 2 and 1/2 are pushed up, each a completion or both in one:

    >>> def push(advantage, shape=(2, 1), **choices):
    ...     logprobs = torch.tensor([2.0, 0.5]).log().reshape(shape).requires_grad_()
    ...     ones = torch.ones(shape)
    ...     given = logprobs, 0 * ones, advantage * ones, ones.bool(), ones, Objective(**choices)
    ...     policy_loss(*given).loss.backward()
    ...     return [round(0.0 - slope, 2) for slope in logprobs.grad.flatten().tolist()]
    >>> grpo = {"ratio": "token", "clip_low": 0.2, "clip_high": 0.2}
    >>> push(1, **grpo), push(-1, **grpo), push(-1, **grpo, clip_dual=1.5)  # dual clip
    ([0.0, 0.5], [-2.0, 0.0], [0.0, 0.0])
    >>> push(1, **grpo, surrogate="cispo"), push(1, ratio="token", surrogate="soft")  # CISPO, SAPO
    ([1.2, 0.8], [1.57, 0.47])
    >>> push(1, ratio="sequence_sum", surrogate="gamma")  # VESPO: 4 / e^3 and e^1.5 / 4
    [0.2, 1.12]
    >>> push(1, (1, 2), **grpo | {"ratio": "geometric"})  # GMPO: the root of 1.2 * 0.5
    [0.0, 0.77]
    >>> wide = {"ratio": "token", "clip_low": 1.0}
    >>> push(-1, **wide), push(-1, **wide, off_policy_limit=0.5)  # DeepSeek: ln 2 nats less likely
    ([-2.0, -0.5], [-2.0, 0.0])
    """
    for name, tensor in {"old_logprobs": old_logprobs, "mask": mask, "weights": weights}.items():
        if tensor.shape != logprobs.shape:
            shapes = f"{tuple(logprobs.shape)}, got {tuple(tensor.shape)}"
            raise ValueError(f"{name} must have the shape of logprobs, {shapes}")
    if objective.pick is not None and picked is None:
        raise ValueError(f"pick {objective.pick} needs the tokens of picked_tokens")
    advantages = _per_token(advantages, mask)
    level = "token" if objective.ratio == "geometric" else objective.ratio
    log_ratio = importance_log_ratio(logprobs, old_logprobs, mask, level)
    is_clipped = clipped(log_ratio, advantages, mask, objective)
    if objective.ratio == "geometric":  # a clipped token counts in the mean, without a gradient
        held = torch.where(is_clipped, log_ratio.detach().clamp(*_log_range(objective)), log_ratio)
        log_ratio = masked_mean(held, mask, dim=1)[:, None].expand_as(held)
    bounded = log_ratio.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)
    ratio = (log_ratio + (bounded - log_ratio).detach()).exp()
    gain = _gain(ratio, _clean(logprobs, mask), advantages, is_clipped, objective)

    every = weights
    if objective.off_policy_limit is not None:  # how much less likely the completion has become
        drift = -importance_log_ratio(logprobs, old_logprobs, mask, "sequence").detach()
        weights = weights * ((advantages >= 0) | (drift <= objective.off_policy_limit))
    if objective.pick in ("high_entropy", "clip_cov"):
        weights = weights * (picked if objective.pick == "high_entropy" else ~picked)  # type: ignore[operator]
    loss = -(weights * gain * advantages).sum()
    if objective.pick == "kl_cov":
        change = importance_log_ratio(logprobs, old_logprobs, mask, "token").abs()
        loss = loss + objective.cov_kl * (every * picked * change).sum()  # type: ignore[operator]
    return PolicyLoss(
        loss=loss,
        clip_fraction_sequences=masked_mean(is_clipped.any(dim=1), mask.any(dim=1)),
        clip_fraction_tokens=masked_mean(is_clipped, mask),
        ratio=ratio.detach(),
    )


def _gain(
    ratio: Tensor, logprobs: Tensor, advantages: Tensor, is_clipped: Tensor, objective: Objective
) -> Tensor:
    """What an advantage is multiplied with: the surrogate, (B, T)."""
    low, high = 1 - objective.clip_low, 1 + objective.clip_high
    if objective.surrogate == "cispo":
        return ratio.detach().clamp(low, high) * logprobs
    negative = advantages < 0

    def by_sign(name: str) -> Tensor:
        low, high = (ratio.new_tensor(getattr(objective, f"{name}_{s}")) for s in ("neg", "pos"))
        return torch.where(negative, low, high)

    if objective.surrogate == "soft":  # at ratio 1 its slope is 1, as that of the ratio itself
        tau = by_sign("tau")
        return 4 / tau * torch.sigmoid(tau * (ratio - 1))
    if objective.surrogate == "gamma":
        w, k, scale = ratio.detach(), by_sign("k"), by_sign("lambda")
        return (k * w.log() + scale * (1 - w)).exp() * logprobs
    if objective.ratio == "geometric":
        return ratio
    # the minimum of PPO, with a gradient that is exactly 0 where it is clipped
    held = ratio.detach().clamp(low, high)
    if objective.clip_dual is not None:
        held = held.masked_fill((ratio > high) & negative, objective.clip_dual)
    return torch.where(is_clipped, held, ratio)


def _log_range(objective: Objective) -> tuple[float, float]:
    """The clip range of a log-ratio."""
    low = math.log1p(-objective.clip_low) if objective.clip_low < 1 else -math.inf
    return low, math.log1p(objective.clip_high)


def _clean(x: Tensor, mask: Tensor) -> Tensor:
    """Return float32 (or float64) values with zeros under a False mask, whatever stood there."""
    return x.to(torch.promote_types(x.dtype, torch.float32)).masked_fill(~mask, 0)


def _per_token(advantages: Tensor, mask: Tensor) -> Tensor:
    """Return clean (B, T) advantages from (B,) or (B, T)."""
    if advantages.shape not in (mask.shape, mask.shape[:1]):
        allowed = f"{tuple(mask.shape[:1])} or {tuple(mask.shape)}"
        raise ValueError(f"advantages must have shape {allowed}, got {tuple(advantages.shape)}")
    if advantages.ndim == 1:
        advantages = advantages[:, None].expand_as(mask)
    return _clean(advantages, mask).detach()


def _check_choice(name: str, value: str, choices: object) -> None:
    if value not in get_args(choices):
        raise ValueError(f"{name} must be one of {', '.join(get_args(choices))}, got {value!r}")
