"""What is counted of a rollout, and under which name it is logged.

A metric is defined here, by its expression. Means are over sequences (or tokens, where the name
says so) of all mini-batches and ranks.
"""

import math
from collections import Counter
from collections.abc import Iterable, Mapping

from torch import Tensor

from gspo_lightning.advantages import flat_groups, group_advantages
from gspo_lightning.critic.gae import ValueLoss
from gspo_lightning.environments.episode import COLUMN
from gspo_lightning.kl import kl_clamped, kl_estimate
from gspo_lightning.masked import masked_mean
from gspo_lightning.metrics import RolloutMetrics
from gspo_lightning.mismatch import FAR, RowWeights, sampler_log_ratios
from gspo_lightning.objectives import PolicyLoss
from gspo_lightning.rollout import Samples

SPREADS = {  # what is counted, and the name of its standard deviation
    "noise": "policy/ratio_noise",
    "token log-ratio": "policy/token_log_ratio_std",
    "sequence log-ratio": "policy/sequence_log_ratio_std",
    "sampler's token log-ratio": "sampler/log_ratio_std",
    "sampler's sequence log-ratio": "sampler/sequence_log_ratio_std",
}
MEANS = (
    "train/policy_loss",
    "train/entropy_loss",
    "train/kl_loss",
    "train/reward",
    "train/relative_advantage",
    "train/kl_divergence",
    "train/avg_response_length",
    "train/clip_fraction_sequences",
    "train/clip_fraction_tokens",
    "policy/entropy",
    "policy/grad_norm",
    "policy/old_from_sampler",
    "policy/sampler_noise",
    "sampler/noise_after_sync",
    "rollout/truncated_fraction",
    "env/turns",
    "env/tokens",
    "env/out_of_turns",
    "rollout/flat_best_fraction",
    "rollout/flat_worst_fraction",
    "reward/overlong",
    *(f"sampler/{name}" for name in ("log_ratio_mean", "kl", "weight_mean", "capped", "masked")),
    "sampler/version_lag",
    "sampler weight",
    "sampler weight squared",
    "critic/value_loss",
    "critic/value_mean",
    "critic/clip_fraction",
    "critic/grad_norm",
    "critic error",
    "critic error squared",
    "critic return",
    "critic return squared",
    "group variance",
    *(f"{name}{power}" for name in SPREADS for power in ("", " squared")),
)
TOTALS = (
    "reward/missing",
    "rollout/prompts_drawn",
    "rollout/flat_groups_kept",
    "rollout/tokens",
    "env/errors",
    "env/timeouts",
    "optim/skipped_steps",
    "optim/faults",
    "policy/kl_clamped_tokens",
)


class RolloutTally(RolloutMetrics):
    """Adds up what is logged of one rollout.

    Args:
        terms: Names of the reward terms.
        counts: Names of what the terms count, such as timeouts.
    """

    def __init__(self, terms: Iterable[str], counts: Iterable[str] = ()) -> None:
        super().__init__(
            (*MEANS, *(f"reward/{name}" for name in terms)),
            (*TOTALS, *(f"reward/{name}" for name in counts)),
            ("policy/ratio",),
        )

    @property
    def names(self) -> set[str]:
        """Full names of all that a rollout can have, of which one that does not apply is absent."""
        names = {name for name in self.places if "/" in name} | {*SPREADS.values()}
        names |= {f"{name}_{end}" for name in self.extremes for end in ("min", "max")}
        return names | {"reward/group_std", "critic/explained_variance", "sampler/ess"}

    def count_samples(
        self, samples: Samples, rewards: Tensor, counts: Mapping[str, float] | None = None
    ) -> None:
        """Count completions as drawn, kept or not, and what the reward terms counted of them."""
        for name, count in (counts or {}).items():
            self.update(f"reward/{name}", count, 1)
        self.update("rollout/prompts_drawn", len(samples) // samples.group_size, 1)
        self.update("rollout/tokens", samples.mask.sum(), 1)
        self.update("reward/missing", rewards.isnan().sum(), 1)
        episodes = [row[COLUMN] for row in samples.rows if COLUMN in row]
        if episodes:
            ends = Counter(episode["end"] for episode in episodes)
            self.update("env/turns", sum(len(e["turns"]) for e in episodes), len(episodes))
            self.update("env/tokens", sum(e["tokens"] for e in episodes), len(episodes))
            self.update("env/out_of_turns", ends["turns"], len(episodes))
            self.update("env/errors", ends["error"], 1)
            self.update("env/timeouts", ends["timeout"], 1)

    def count_rewards(
        self, samples: Samples, rewards: Tensor, parts: dict[str, Tensor], advantages: Tensor
    ) -> None:
        """Count what the update will learn from.

        Args:
            samples: B completions.
            rewards: As the group statistics see them, NaN where missing, (B,).
            parts: Reward terms, raw, (B,) each.
            advantages: (B,).
        """
        valid = ~rewards.isnan()
        self.update("train/reward", rewards[valid])
        self.update("train/relative_advantage", advantages[valid])
        self.update("train/avg_response_length", samples.mask.sum(1))
        self.update("rollout/truncated_fraction", (~samples.finished).float())
        groups = rewards.view(-1, samples.group_size)
        if samples.group_size > 1:  # a single completion has no group to differ from
            spread = group_advantages(groups, "relative").flatten()[valid] ** 2
            self.update("group variance", spread)
        # A flat group at the rollout's best reward is solved, one at its worst reward is hopeless.
        if samples.group_size > 1 and valid.any():
            flat = flat_groups(groups)
            means = masked_mean(groups, ~groups.isnan(), dim=1)
            best, worst = rewards[valid].max(), rewards[valid].min()
            self.update("rollout/flat_best_fraction", (flat & (means >= best - 1e-6)).float())
            self.update("rollout/flat_worst_fraction", (flat & (means <= worst + 1e-6)).float())
        for name, part in parts.items():
            self.update(f"reward/{name}", part[~part.isnan()])

    def count_logprobs(
        self, old: Tensor, entropy: Tensor, ref: Tensor | None, mask: Tensor
    ) -> None:
        """Count entropy and KL of a micro-batch; each a mean per sequence, then over them.

        Args:
            old: Log-probs of the policy that sampled, nats, (B, T).
            entropy: Entropy of the policy as it is updated, nats, (B, T).
            ref: Log-probs of the reference, nats, (B, T), or ``None``.
            mask: Tokens that count, (B, T) bool.
        """
        counted = mask.any(1)
        self._update_finite("policy/entropy", masked_mean(entropy, mask, dim=1)[counted])
        if ref is not None:
            kl = masked_mean(kl_estimate(old, ref, "k3"), mask, dim=1)
            self._update_finite("train/kl_divergence", kl[counted])
            self.update("policy/kl_clamped_tokens", (kl_clamped(old, ref) & mask).sum(), 1)

    def _update_finite(self, name: str, values: Tensor) -> None:
        # A broken row is counted as a fault; as NaN it would hide what the other rows show.
        self.update(name, values[values.isfinite()])

    def count_losses(
        self, policy: PolicyLoss, entropy: Tensor, kl: Tensor, mask: Tensor, share: float
    ) -> None:
        """Count the losses of a micro-batch that is ``share`` of an optimizer step."""
        self.update("train/policy_loss", policy.loss, share)
        self.update("train/entropy_loss", entropy, share)
        self.update("train/kl_loss", kl, share)
        sequences, tokens = mask.any(1).sum(), mask.sum()
        self.update(
            "train/clip_fraction_sequences",
            policy.clip_fraction_sequences.double() * sequences,
            sequences,
        )
        self.update(
            "train/clip_fraction_tokens", policy.clip_fraction_tokens.double() * tokens, tokens
        )
        self.update("policy/ratio", policy.ratio[mask])

    def count_values(self, values: Tensor, returns: Tensor, mask: Tensor) -> None:
        """Count what the critic expected before the updates, and how far off it was, per token.

        Args:
            values: (B, T).
            returns: NaN where the reward is missing, (B, T).
            mask: Tokens that count, (B, T) bool.
        """
        valid = mask & ~returns.isnan()
        values, returns = values[valid].double(), returns[valid].double()
        self.update("critic/value_mean", values)
        for name, x in {"critic error": returns - values, "critic return": returns}.items():
            self.update(name, x)
            self.update(f"{name} squared", x**2)

    def count_value_loss(self, loss: ValueLoss, mask: Tensor, share: float) -> None:
        """Count the value loss of a micro-batch that is ``share`` of an optimizer step."""
        self.update("critic/value_loss", loss.loss, share)
        tokens = mask.sum()
        self.update("critic/clip_fraction", loss.clip_fraction.double() * tokens, tokens)

    def count_noise(self, log_ratio: Tensor) -> None:
        """Count what log-ratios are although no weight has moved: noise, (B,)."""
        self._count_spread("noise", log_ratio)

    def count_log_ratios(self, tokens: Tensor, sequences: Tensor, mask: Tensor) -> None:
        """Count how far the policy is from the one that sampled, before a step.

        Args:
            tokens: Log-ratio of each token, nats, (B, T).
            sequences: Mean of each sequence, nats per token, (B,).
            mask: Tokens that count, (B, T) bool.
        """
        self._count_spread("token log-ratio", tokens[mask])
        self._count_spread("sequence log-ratio", sequences[mask.any(1)])

    def count_sampler(self, old: Tensor, sampled: Tensor, mask: Tensor) -> None:
        """Count how far the policy before its updates is from what drew the tokens, (B, T) each."""
        tokens, sums, means = sampler_log_ratios(old, sampled, mask)
        mask = mask & sums.isfinite()[:, None]  # a broken row is counted as a fault
        self.update("sampler/log_ratio_mean", tokens[mask])
        self._count_spread("sampler's token log-ratio", tokens[mask])
        counted = mask.any(1)
        self._count_spread("sampler's sequence log-ratio", means[counted])
        kl = masked_mean(kl_estimate(sampled, old, "k3"), mask, dim=1)
        self.update("sampler/kl", kl[counted])
        weights = sums[counted].clamp(-FAR, FAR).exp()  # exact ones, whatever the loss has
        self.update("sampler weight", weights)
        self.update("sampler weight squared", weights**2)

    def count_row_weights(self, found: RowWeights, mask: Tensor) -> None:
        """Count how the rows of a mini-batch are weighed."""
        rows = {"weight_mean": found.weights[:, 0], "capped": found.capped, "masked": found.masked}
        for name, values in rows.items():
            self.update(f"sampler/{name}", values[mask.any(1)])

    def _count_spread(self, name: str, values: Tensor) -> None:
        self.update(name, values)
        self.update(f"{name} squared", values.double() ** 2)

    def compute(self) -> dict[str, float]:
        """Every number of the rollout by its full name; one that does not apply is absent."""
        figures = super().compute()
        if "group variance" in figures:
            figures["reward/group_std"] = math.sqrt(figures.pop("group variance"))
        for name, spread in SPREADS.items():
            if name in figures:
                variance = figures.pop(f"{name} squared") - figures.pop(name) ** 2
                figures[spread] = math.sqrt(max(variance, 0.0))
        if "sampler weight" in figures:  # 1: equal ones; 1 / rows: one row has all the weight
            squares = figures.pop("sampler weight squared")
            figures["sampler/ess"] = figures.pop("sampler weight") ** 2 / squares
        if "critic return" in figures:  # 1: it knew every return; 0: no better than their mean
            error, total = (
                figures.pop(f"{name} squared") - figures.pop(name) ** 2
                for name in ("critic error", "critic return")
            )
            if total > 1e-12:
                figures["critic/explained_variance"] = 1 - error / total
        return figures
