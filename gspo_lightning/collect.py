"""Collect a rollout: sample groups of completions, score them, compare them within the group.

Decides what runs when, what runs beside what, and which prompts are replaced.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, Literal, cast

import torch
from torch import Tensor

from gspo_lightning.advantages import WHITENED, Kind, flat_groups, group_advantages
from gspo_lightning.critic.critic import Critic
from gspo_lightning.critic.gae import whiten
from gspo_lightning.frozen.beside import Passes
from gspo_lightning.frozen.models import FrozenModels, ReferencePolicy
from gspo_lightning.guards.out_of_memory import MICRO, REFERRED, SAMPLED, Sizes
from gspo_lightning.kl import kl_estimate
from gspo_lightning.masked import masked_mean
from gspo_lightning.old_logprobs import OldLogProbs
from gspo_lightning.rewards.failed import score_or_keep
from gspo_lightning.rewards.terms import RewardTerm, overlong_penalty
from gspo_lightning.rollout import PromptBatch, Rollout, Samples, join_samples
from gspo_lightning.sampling import Sampler
from gspo_lightning.step import Step
from gspo_lightning.vllm.ahead import AsyncSampler


@dataclass
class Collector:
    """Prompts in, a scored rollout out; ``GSPOModule`` documents the settings.

    Args:
        policy: The policy, with its tokenizer.
        critic: Its critic, if there is one.
        sampler: Draws the completions.
        rewards: Reward terms by name.
        reference: Frozen policy of the KL penalty, or ``None``.
        frozen: Where reference and reward models are.
        old_logprobs: Finds the log-probs of the policy that sampled.
        sizes: How much is computed at once.
        draw: Draws further prompts, given how many each rank lacks; ``None`` where this rank lacks
            none and waits for the others.
        ahead: Gives the prompts of the next rollout; ``None`` unless the sampler is ahead.
        failed: File that keeps completions that could not be scored.
    """

    policy: Any
    critic: Critic | None
    sampler: Sampler
    rewards: dict[str, RewardTerm]
    reference: ReferencePolicy | None
    frozen: FrozenModels
    old_logprobs: OldLogProbs
    sizes: Sizes
    draw: Callable[[list[int]], PromptBatch | None]
    ahead: Callable[[], PromptBatch] | None
    failed: Path
    num_minibatches: int
    advantages: Kind | Literal["gae"]
    truncated: Literal["keep", "mask", "zero_reward"]
    overlong_ramp: int | None
    drop_flat_groups: bool
    max_draws: int
    kl_in_reward: bool = False

    def collect(self, batch: PromptBatch, step: Step) -> Rollout:
        """Sample, score and compare: prompts in, a rollout ready for updates out.

        Args:
            batch: P prompts on the policy's device.
            step: The step that this is a half of.
        """
        samples = self.sample(batch, step)
        if step.choices.mismatch.weighs and samples.logprobs is None:
            told = f"and {type(self.sampler).__name__} returns none; leave model.mismatch out"
            raise ValueError(f"model.mismatch needs the sampler's log-probs, {told}")
        if self.ahead is not None:  # before the weights move
            sampler, prompts = cast(AsyncSampler, self.sampler), self.ahead().to(step.clock.device)
            with step.clock.timed("sync"):
                sampler.begin(self.policy, prompts, seed=step.seed("sample/0", ahead=1))
        scores: tuple[Tensor, dict[str, Tensor]] | None = None
        if self.drop_flat_groups:  # the rewards say which prompts stay, so nothing can go beside
            with step.clock.phase("score"):
                rewards, parts = self.score(samples, step)
            samples, rewards, parts = self.replace_flat_groups(samples, rewards, parts, step)
            scores = rewards, parts
        step.lengths = samples.mask.sum(1).cpu()
        # Copied before the policy's pass: rewards would wait behind it for their lengths.
        drawn = samples.to("cpu")
        if self.truncated == "mask":
            samples = replace(samples, mask=samples.mask & samples.finished[:, None])
        with step.clock.phase("score"), Passes() as passes:
            # Rewards of other devices and processes are made while the policy computes.
            apart = scores is None and self.rewards_apart(step)
            reward = passes.begin(apart, lambda: scores or self.score(drawn, step))
            reference = None
            if self.reference is not None:
                # Samples move first: a copy asked for later queues up behind the policy's pass.
                there = samples.to(self.frozen.devices["model.reference"])
                apart = self.frozen.apart("model.reference")
                reference = passes.begin(apart, self._ref_logprobs, self.reference, there, step)
            old = self.old_logprobs.find(samples, step)
            device = old.logprobs.device
            values = None if self.critic is None else self._old_values(self.critic, samples, step)
            rewards, parts = reward.result()
            ref = None if reference is None else reference.result().to(device)
            estimates = self.estimate(samples, rewards, values, old.logprobs, ref, step)
            means = masked_mean(estimates["advantages"], samples.mask, dim=1).cpu()
            step.tally.count_rewards(drawn, rewards, parts, means)
        return Rollout(
            **{field.name: getattr(samples, field.name) for field in fields(Samples)},
            old_logprobs=old.logprobs,
            old_known=old.known,
            ref_logprobs=ref,
            rewards=rewards.to(device),
            reward_parts={name: part.to(device) for name, part in parts.items()},
            **estimates,
        )

    def sample(self, batch: PromptBatch, step: Step, draw: int = 0) -> Samples:
        """Complete every prompt G times; ``draw`` tells the draws of a step apart."""
        seed = step.seed(f"sample/{draw}")

        def work() -> Samples:
            if SAMPLED in self.sizes.now:
                self.sampler.batch_size = self.sizes.now[SAMPLED]  # type: ignore[attr-defined]
            with step.clock.phase("rollout"):
                samples = self.sampler.sample(self.policy, batch, seed=seed)
            for name, value in getattr(self.sampler, "figures", {}).items():
                step.tally.update(name, value)
            return samples

        try:
            rows = len(batch) * self.sampler.group_size
            samples = self.sizes.fit(SAMPLED, rows, f"{step.name}, sampling", work)
        except FloatingPointError as error:  # every further rollout would be the same
            raise FloatingPointError(f"{step.name}: {error}; no completion can be drawn") from error
        if samples.waited is not None:
            seconds = step.clock.seconds
            seconds["environment"] = seconds.get("environment", 0.0) + samples.waited
        return samples

    def score(
        self, samples: Samples, step: Step, draw: int = 0
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Rewards as the group statistics are to see them, and their parts, (B,) each."""
        with step.clock.timed("reward"):
            lengths, finished = samples.lengths.cpu(), samples.finished.cpu()
            # Whitening learns from the first draw alone: later prompts were chosen by their reward.
            seed, learn = step.seed(f"reward/{draw}"), draw == 0
            rewards, parts, counts = score_or_keep(
                self.rewards, samples, self.failed, seed=seed, learn=learn, reduce=step.ranks.sum
            )
            if self.overlong_ramp is not None:
                limit = self.sampler.max_new_tokens
                parts["overlong"] = overlong_penalty(lengths, limit, self.overlong_ramp)
                rewards = rewards + parts["overlong"]
            step.tally.count_samples(samples, rewards, counts)
            if self.truncated == "zero_reward":
                rewards = torch.where(finished, rewards, 0.0)
            elif self.truncated == "mask":
                rewards = torch.where(finished, rewards, math.nan)
        return rewards, parts

    def rewards_apart(self, step: Step) -> bool:
        """Whether rewards come from elsewhere: another device or process, or over the network.

        Not where whitening sums over ranks: this thread has sums of its own, and the two would meet
        in another order on each rank.
        """
        if step.ranks.count > 1 and any(term.whiten for term in self.rewards.values()):
            return False
        elsewhere = any(term.waits for term in self.rewards.values())
        places = [d for key, d in self.frozen.devices.items() if key.startswith("model.rewards")]
        # A reward model on the policy's device would want memory while the policy does.
        return self.frozen.apart("model.rewards") or (
            elsewhere and self.frozen.policy_device not in places
        )

    def estimate(
        self,
        samples: Samples,
        rewards: Tensor,
        values: Tensor | None,
        old: Tensor,
        ref: Tensor | None,
        step: Step,
    ) -> dict[str, Any]:
        """Advantages per token, (B, T), and a critic's values and returns."""
        kl = None if ref is None else kl_estimate(old, ref, "k1")
        if self.critic is None or values is None:
            kl = kl.masked_fill(~samples.mask, 0) * step.kl_coef if self.kl_in_reward else None  # type: ignore[union-attr]
            return {"advantages": self.compare(samples, rewards.to(old.device), kl, step)}
        estimates = self.critic.estimate(
            rewards.to(old.device), values, kl, samples.mask, step.kl_coef, step.ranks.sum
        )
        step.tally.count_values(values, estimates.returns, samples.mask)
        return estimates._asdict()

    def compare(self, samples: Samples, rewards: Tensor, kl: Tensor | None, step: Step) -> Tensor:
        """Advantages without a critic, (B, T).

        The KL penalty of each token, (B, T), if there is one, is taken off the reward of the whole
        completion, or, as in REINFORCE++, off what is still to come of it.
        """
        kind, mask = cast(Kind, self.advantages), samples.mask
        to_come = kl is not None and kind == "reinforce_plus_plus"
        if kl is not None and not to_come:
            rewards = rewards - kl.sum(1)
        groups, lengths = (x.view(-1, samples.group_size) for x in (rewards, mask.sum(1)))
        per_row = group_advantages(groups, kind, lengths=lengths, reduce=step.ranks.sum).flatten()
        advantages = per_row[:, None].expand_as(mask)
        if kl is not None and to_come:
            advantages = advantages - kl.flip(1).cumsum(1).flip(1)
        if kind in WHITENED:  # over all ranks; a missing reward teaches nothing
            advantages = whiten(advantages, mask & ~rewards.isnan()[:, None], step.ranks.sum)
        return advantages

    def _old_values(self, critic: Critic, samples: Samples, step: Step) -> Tensor:
        rows = len(samples) // self.num_minibatches

        def work() -> Tensor:
            with step.clock.timed("values", step.clock.device):
                pieces = self.sizes.pieces(samples, rows)
                return critic.old_values(self.policy.model, samples, pieces)

        what, cut = f"{step.name}, old values", samples.micro_batch_indices
        return self.sizes.fit(MICRO, rows, what, work, cut)

    def _ref_logprobs(self, reference: ReferencePolicy, samples: Samples, step: Step) -> Tensor:
        def work() -> Tensor:
            with step.clock.timed("reference", samples.mask.device):
                temperature, size = self.sampler.temperature, self.sizes.now[REFERRED]
                return reference.logprobs(samples, temperature, size)

        return self.sizes.fit(REFERRED, len(samples), f"{step.name}, the reference", work)

    def replace_flat_groups(
        self, samples: Samples, rewards: Tensor, parts: dict[str, Tensor], step: Step
    ) -> tuple[Samples, Tensor, dict[str, Tensor]]:
        """Draw as many other prompts as there are flat groups, at most ``max_draws`` times.

        Each rank draws what it lacks, and moves on in the data by what all ranks draw. What stays
        flat in the end is trained on.

        Source:
            Dynamic sampling of DAPO, arXiv:2503.14476.
        """
        size, wanted = samples.group_size, len(samples) // samples.group_size
        for draw in range(1, self.max_draws + 1):
            flat = flat_groups(rewards.view(-1, size))
            missing = wanted - int((~flat).sum())
            lacking = step.ranks.gather(torch.tensor(missing)).reshape(-1).tolist()
            if not any(lacking):
                break
            batch = self.draw(lacking)
            if batch is None:  # this rank has all it wants and waits for the others
                continue
            more = self.sample(batch.to(step.clock.device), step, draw)
            with step.clock.phase("score"):
                more_rewards, more_parts = self.score(more, step, draw)
            samples = join_samples([samples, more])
            rewards = torch.cat([rewards, more_rewards])
            parts = {name: torch.cat([part, more_parts[name]]) for name, part in parts.items()}
        # Groups with spread come first, in the order drawn; flat ones only fill what is missing.
        flat = flat_groups(rewards.view(-1, size))
        step.tally.update("rollout/flat_groups_kept", max(0, wanted - int((~flat).sum())), 1)
        groups = torch.sort(flat.int(), stable=True).indices[:wanted].sort().values
        rows = (groups[:, None] * size + torch.arange(size)).flatten()
        chosen = {name: part[rows] for name, part in parts.items()}
        return samples.select(rows), rewards[rows], chosen
