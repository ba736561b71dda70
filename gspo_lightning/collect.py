"""Collect a rollout: sample groups of completions, score them, compare them within the group.

Decides what runs when, and what beside what. Leaves out where the old log-probs come from
(``old_logprobs``), the update, all settings (``module``), how completions are drawn (``sampling``)
and what rewards mean.
"""

from __future__ import annotations

import math
from dataclasses import fields, replace
from typing import Any, Literal, cast

import torch
from torch import Tensor

from gspo_lightning.advantages import Kind, flat_groups, group_advantages
from gspo_lightning.critic.critic import Critic
from gspo_lightning.frozen.beside import Passes
from gspo_lightning.frozen.models import ReferencePolicy
from gspo_lightning.kl import kl_estimate
from gspo_lightning.masked import masked_mean
from gspo_lightning.old_logprobs import MICRO, REFERRED, SAMPLED, PolicyPasses
from gspo_lightning.rewards.terms import overlong_penalty
from gspo_lightning.rewards.time_limit import TimeLimit
from gspo_lightning.rollout import PromptBatch, Rollout, Samples, join_samples


class CollectingModule(PolicyPasses):
    """The half of ``GSPOModule`` that makes rollouts; that class documents the settings."""

    reference: ReferencePolicy | None
    advantage_kind: Kind | Literal["gae"]
    critic: Critic | None
    kl_coef: float
    truncated: Literal["keep", "mask", "zero_reward"]
    overlong_ramp: int | None
    drop_flat_groups: bool
    max_draws: int

    def collect(self, batch: PromptBatch) -> Rollout:
        """Sample, score and compare: prompts in, a rollout ready for updates out.

        Args:
            batch: P prompts on the policy's device.
        """
        self._from_sampler = None
        samples = self._sample(batch, draw=0)
        scores: tuple[Tensor, dict[str, Tensor]] | None = None
        if self.drop_flat_groups:  # the rewards say which prompts stay, so nothing can go beside
            with self._phase("score"):
                rewards, parts = self._score(samples)
            samples, rewards, parts = self._replace_flat_groups(samples, rewards, parts)
            scores = (rewards, parts)
        self._lengths = samples.mask.sum(1).cpu()
        trained = samples
        if self.truncated == "mask":
            trained = replace(samples, mask=samples.mask & samples.finished[:, None])
        self.sizes.cut = trained.micro_batch_indices  # what the policy's passes are cut from
        with self._phase("score"), Passes() as passes:
            # on other devices, and in other processes, rewards are made while the policy works
            apart = scores is None and self._rewards_apart()
            reward = passes.begin(apart, lambda: scores or self._score(samples))
            reference = None
            if self.reference is not None:
                # moved first: a copy that is asked for later queues up behind the policy's pass
                there = trained.to(self.frozen.devices["model.reference"])
                apart = self.frozen.apart("model.reference")
                reference = passes.begin(apart, self._ref_logprobs, self.reference, there)
            old = self._old_logprobs(trained)
            values = None if self.critic is None else self._old_values(self.critic, trained)
            rewards, parts = reward.result()
            ref = None if reference is None else reference.result().to(old.device)
            estimates = self._estimate(trained, rewards, values, old, ref)
            means = masked_mean(estimates["advantages"], trained.mask, dim=1).cpu()
            self.tally.count_rewards(samples, rewards, parts, means)
        samples = trained
        device = samples.mask.device
        return Rollout(
            **{field.name: getattr(samples, field.name) for field in fields(Samples)},
            old_logprobs=old,
            ref_logprobs=ref,
            rewards=rewards.to(device),
            reward_parts={name: part.to(device) for name, part in parts.items()},
            **estimates,
        )

    def _old_values(self, critic: Critic, samples: Samples) -> Tensor:
        rows = len(samples) // self.num_minibatches

        def work() -> Tensor:
            with self._timed("values", self.device):
                limits = self.micro_batch_size or rows, self.micro_batch_tokens
                return critic.old_values(self.policy.model, samples, *limits)  # type: ignore[union-attr]

        return self.sizes.fit(MICRO, rows, f"{self._rollout}, old values", work)

    def _estimate(
        self,
        samples: Samples,
        rewards: Tensor,
        values: Tensor | None,
        old: Tensor,
        ref: Tensor | None,
    ) -> dict[str, Any]:
        """Advantages per token, (B, T), and a critic's values and returns."""
        if self.critic is None or values is None:
            groups = rewards.view(-1, samples.group_size)
            advantages = group_advantages(groups, cast(Kind, self.advantage_kind)).flatten()
            return {"advantages": advantages.to(old.device)[:, None].expand_as(samples.mask)}
        kl = None if ref is None else kl_estimate(old, ref, "k1")
        estimates = self.critic.estimate(
            rewards.to(old.device), values, kl, samples.mask, self.kl_coef, self._sum_over_ranks
        )
        self.tally.count_values(values, estimates.returns, samples.mask)
        return estimates._asdict()

    def _sample(self, batch: PromptBatch, draw: int) -> Samples:
        seed = self._seed(f"sample/{draw}")

        def work() -> Samples:
            with self._phase("rollout"):
                return self.sampler.sample(self.policy, batch, seed=seed)

        try:
            rows = len(batch) * self.sampler.group_size
            return self.sizes.fit(SAMPLED, rows, f"{self._rollout}, sampling", work)
        except FloatingPointError as error:  # nothing to skip: every further rollout is the same
            raise FloatingPointError(
                f"{self._rollout}: {error}; no completion can be drawn"
            ) from error

    def _score(self, samples: Samples, draw: int = 0) -> tuple[Tensor, dict[str, Tensor]]:
        """Rewards as the group statistics are to see them, and their parts."""
        with self._timed("reward"):
            lengths, finished = samples.mask.sum(1).cpu(), samples.finished.cpu()
            # whitening learns once a rollout: further draws are of prompts chosen by their reward
            rewards, parts, counts = self.score_samples(
                samples, learn=draw == 0, reduce=self._sum_over_ranks
            )
            if self.overlong_ramp is not None:
                limit = self.sampler.max_new_tokens
                parts["overlong"] = overlong_penalty(lengths, limit, self.overlong_ramp)
                rewards = rewards + parts["overlong"]
            self.tally.count_samples(samples, rewards, counts)
            if self.truncated == "zero_reward":
                rewards = torch.where(finished, rewards, 0.0)
            elif self.truncated == "mask":
                rewards = torch.where(finished, rewards, math.nan)
        return rewards, parts

    def _rewards_apart(self) -> bool:
        """Whether rewards come from elsewhere: another device, or the process of a ``TimeLimit``.

        Not where whitening sums over ranks: this thread has sums of its own, and the two would meet
        in another order on each rank.
        """
        if self.trainer.world_size > 1 and any(term.whiten for term in self.rewards.values()):
            return False
        processes = any(isinstance(term.fn, TimeLimit) for term in self.rewards.values())
        places = [d for key, d in self.frozen.devices.items() if key.startswith("model.rewards")]
        # a reward model on the policy's device would want its memory at the same time
        return self.frozen.apart("model.rewards") or (
            processes and self.frozen.policy_device not in places
        )

    def _ref_logprobs(self, reference: ReferencePolicy, samples: Samples) -> Tensor:
        def work() -> Tensor:
            with self._timed("reference", samples.mask.device):
                return reference.logprobs(samples, self.sampler.temperature)

        return self.sizes.fit(REFERRED, len(samples), f"{self._rollout}, the reference", work)

    def _replace_flat_groups(
        self, samples: Samples, rewards: Tensor, parts: dict[str, Tensor]
    ) -> tuple[Samples, Tensor, dict[str, Tensor]]:
        """Draw as many other prompts as there are flat groups, at most ``max_draws`` times.

        This is the dynamic sampling of DAPO, arXiv:2503.14476. Each rank draws what it lacks, and
        moves on in the data by what all ranks draw. What stays flat in the end is trained on.
        """
        size, wanted = samples.group_size, len(samples) // samples.group_size
        for draw in range(1, self.max_draws + 1):
            flat = flat_groups(rewards.view(-1, size))
            missing = wanted - int((~flat).sum())
            gathered: Any = self.all_gather(torch.tensor(missing, device=self.device))
            lacking = gathered.reshape(-1).tolist()
            if not any(lacking):
                break
            batch = self.trainer.datamodule.draw(lacking)  # type: ignore[attr-defined]
            if batch is None:  # this rank has all it wants and waits for the others
                continue
            more = self._sample(batch.to(self.device), draw)
            with self._phase("score"):
                more_rewards, more_parts = self._score(more, draw)
            samples = join_samples([samples, more])
            rewards = torch.cat([rewards, more_rewards])
            parts = {name: torch.cat([part, more_parts[name]]) for name, part in parts.items()}
        # groups with spread first, in the order drawn; flat ones only fill what is missing
        flat = flat_groups(rewards.view(-1, size))
        self.tally.update("rollout/flat_groups_kept", max(0, wanted - int((~flat).sum())), 1)
        groups = torch.sort(flat.int(), stable=True).indices[:wanted].sort().values
        rows = (groups[:, None] * size + torch.arange(size)).flatten()
        chosen = {name: part[rows] for name, part in parts.items()}
        return samples.select(rows), rewards[rows], chosen
