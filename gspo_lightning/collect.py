"""Collect a rollout: sample groups of completions, score them, compare them within the group.

Decides what runs when, and where the old log-probs come from. Leaves out the update
and all settings (``module``), how completions are drawn (``sampling``) and what rewards mean.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import fields, replace
from typing import Any, Literal, cast

import torch
from torch import Tensor
from torch.profiler import record_function

from gspo_lightning.advantages import Kind, flat_groups, group_advantages
from gspo_lightning.critic import Critic
from gspo_lightning.evaluation import EvaluatedModule
from gspo_lightning.frozen import FrozenModels, ReferencePolicy
from gspo_lightning.kl import kl_estimate
from gspo_lightning.logprobs import LogProbs, completion_logprobs
from gspo_lightning.masked import masked_mean
from gspo_lightning.memory import peaks, reset_peaks
from gspo_lightning.objectives import importance_log_ratio
from gspo_lightning.out_of_memory import BatchSizes
from gspo_lightning.overlap import Passes
from gspo_lightning.rewards import overlong_penalty
from gspo_lightning.rollout import PromptBatch, Rollout, Samples, join_samples, stream_seed
from gspo_lightning.tally import RolloutTally

CPU = torch.device("cpu")
MICRO, SAMPLED, REFERRED = "micro_batch_size", "sampler.batch_size", "reference.batch_size"
OldLogProbs = Literal["auto", "recompute", "sampler"]
FEW = 4  # rows whose log-probs are computed to see the noise of the sampler's
SMALL = 0.01  # of the clip range: below that noise does not matter


class CollectingModule(EvaluatedModule):
    """The half of ``GSPOModule`` that makes rollouts; that class documents the settings."""

    reference: ReferencePolicy | None
    frozen: FrozenModels
    tally: RolloutTally
    advantage_kind: Kind | Literal["gae"]
    critic: Critic | None
    kl_coef: float
    truncated: Literal["keep", "mask", "zero_reward"]
    overlong_ramp: int | None
    num_minibatches: int
    num_epochs: int
    micro_batch_size: int | None
    micro_batch_tokens: int | None
    old_logprobs: OldLogProbs
    clip_width: float
    drop_flat_groups: bool
    max_draws: int
    seconds: dict[str, float]
    peak_memory: dict[str, float]  # GiB
    sizes: BatchSizes

    def collect(self, batch: PromptBatch) -> Rollout:
        """Sample, score and compare: prompts in, a rollout ready for updates out.

        Args:
            batch: P prompts on the policy's device.
        """
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
        with self._phase("score"), Passes() as passes:
            # on other devices the frozen models work while the policy does
            apart = scores is None and self.frozen.apart("model.rewards")
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
                size = self.micro_batch_size or rows
                return critic.old_values(self.policy.model, samples, size)  # type: ignore[union-attr]

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

    def _old_logprobs(self, samples: Samples) -> Tensor:
        """Log-probs under the policy that sampled, in batches that fit into memory."""
        rows = len(samples) // self.num_minibatches
        what = f"{self._rollout}, old log-probs"
        return self.sizes.fit(MICRO, rows, what, lambda: self._least_old_logprobs(samples))

    @torch.no_grad()
    def _least_old_logprobs(self, samples: Samples) -> Tensor:
        """Log-probs under the policy that sampled, (B, T), at the least expense that is right.

        The first optimizer step takes its own forward pass for them. The others may take the
        sampler's, if these are as good as a recomputation.
        """
        with self._timed("old_logprobs", self.device):
            minibatches = self._minibatch_rows(samples, epoch=0)
            steps = self.num_epochs * self.num_minibatches
            # a later epoch needs what the first step had, and so do rewards that hold a KL
            spared = self.old_logprobs == "auto" and self.num_epochs == 1 and not self.kl_in_reward
            if steps == 1 and spared:
                return torch.zeros_like(samples.mask, dtype=torch.float32)
            if self._sampler_will_do(samples, minibatches[-1]):
                assert samples.logprobs is not None
                return samples.logprobs.masked_fill(~samples.mask, 0)
            return self._recompute(samples, minibatches[1:] if spared else minibatches)

    def _sampler_will_do(self, samples: Samples, rows: Tensor) -> bool:
        """Whether the sampler's log-probs are used, by their noise in a few rows of this rollout.

        Args:
            samples: The rollout.
            rows: A mini-batch; the few rows are its first ones.
        """
        if self.old_logprobs == "recompute":
            return False
        if samples.logprobs is None:
            if self.old_logprobs == "sampler":
                raise ValueError(
                    f"model.old_logprobs is sampler, but {type(self.sampler).__name__} returns no "
                    "log-probs; use auto or recompute"
                )
            self.tally.update("policy/old_from_sampler", 0.0)
            return False
        few = samples.select(rows[:FEW])
        again = self._logprobs(few, with_entropy=False).logprobs
        difference = importance_log_ratio(again, few.logprobs, few.mask, "sequence")  # type: ignore[arg-type]
        noise = difference[few.mask.any(1), 0].double()
        # around 0, not around their mean: a shift of all ratios would do harm, too; of all ranks
        squares = self._sum_over_ranks((noise**2).sum()).item()
        count = self._sum_over_ranks(torch.tensor(float(len(noise)))).item()
        deviation = math.sqrt(squares / count) if count else math.inf
        chosen = self.old_logprobs == "sampler" or deviation < SMALL * self.clip_width
        if math.isfinite(deviation):
            self.tally.update("policy/sampler_noise", deviation)
        self.tally.update("policy/old_from_sampler", float(chosen))
        return chosen

    def _recompute(self, samples: Samples, minibatches: list[Tensor]) -> Tensor:
        """Log-probs in the very batches of the first epoch, 0 in rows of no mini-batch.

        The same rows in the same shapes through the same kernels: what differs from the update's
        forward pass by rounding would look like a ratio that moved.
        """
        old = torch.zeros_like(samples.mask, dtype=torch.float32)
        for minibatch in minibatches:
            chosen = samples.select(minibatch)
            for rows in chosen.micro_batch_indices(self.micro_batch_size, self.micro_batch_tokens):
                found = self._logprobs(chosen.select(rows), with_entropy=False).logprobs
                old = old.to(found.dtype)
                old[minibatch[rows].to(old.device)] = found
        return old

    def _logprobs(self, samples: Samples, with_entropy: bool, packed: bool = True) -> LogProbs:
        return completion_logprobs(
            self.policy.model,  # type: ignore[union-attr]
            samples.prompt_ids,
            samples.prompt_mask,
            samples.completion_ids,
            samples.mask,
            temperature=self.sampler.temperature,
            group_size=samples.group_size,
            with_entropy=with_entropy,
            packed=packed,
        )

    def _minibatch_rows(self, samples: Samples, epoch: int) -> list[Tensor]:
        generator = torch.Generator().manual_seed(self._seed(f"minibatches/{epoch}"))
        return samples.minibatch_indices(self.num_minibatches, generator)

    @property
    def _rollout(self) -> str:
        return f"rollout {self.trainer.fit_loop.total_batch_idx}"

    def _seed(self, purpose: str) -> int:
        index = self.trainer.fit_loop.total_batch_idx
        return stream_seed(self.seed, index, self.global_rank, purpose)

    def _sum_over_ranks(self, x: Tensor) -> Tensor:
        # the device's backend sums, so that a tensor made on the CPU goes there first
        return self.trainer.strategy.reduce(x.to(self.device), reduce_op="sum")

    @contextmanager
    def _phase(self, name: str) -> Iterator[None]:
        """Measure time and peak memory of a phase, and tell the progress bar, if it listens."""
        on_phase = getattr(self.trainer.progress_bar_callback, "on_phase", None)
        if on_phase is not None:
            on_phase(name, self.trainer.fit_loop.total_batch_idx)
        devices = {self.device, CPU, *self.frozen.devices.values()}
        reset_peaks(devices)
        with self._timed(name, self.device):
            yield
        for device, peak in peaks(devices).items():
            other = "" if device == self.device else f"_{str(device).replace(':', '')}"
            key = f"{name}_gib{other}"
            self.peak_memory[key] = max(peak, self.peak_memory.get(key, 0.0))

    @contextmanager
    def _timed(self, name: str, device: torch.device = CPU) -> Iterator[None]:
        start = time.perf_counter()
        with record_function(name):  # the range of that name in a trace
            yield
            if device.type == "cuda":
                torch.cuda.synchronize(device)  # or what comes next would pay for this
        self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - start
