"""Where the log-probs of the policy that sampled come from.

Decides between three sources: the first update's own forward pass, the sampler where the noise of
its log-probs is small, and a pass in the batches of the update.
"""

import math
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from gspo_lightning.guards.out_of_memory import MICRO, Sizes
from gspo_lightning.logprobs import samples_logprobs
from gspo_lightning.objectives import Objective, importance_log_ratio
from gspo_lightning.rollout import Samples
from gspo_lightning.sampling import Sampler
from gspo_lightning.step import Step

Source = Literal["auto", "recompute", "sampler"]
FEW = 4  # rows whose log-probs are computed to see the noise of the sampler's
SMALL = 0.01  # of the clip range: below that noise does not matter


class Found(NamedTuple):
    """Old log-probs of a rollout, nats, (B, T), and in which rows they are known, (B,) bool.

    The others are 0: the first update's own forward pass replaces them.
    """

    logprobs: Tensor
    known: Tensor


@dataclass
class OldLogProbs:
    """Finds the old log-probs of a rollout.

    Args:
        policy: The policy, its weights as they were when it sampled.
        sampler: Drew the completions.
        objective: Its clip range says which noise is small.
        sizes: How much is computed at once.
        source: ``recompute``, ``sampler``, or ``auto``: the cheapest that is right.
        num_epochs: Passes over the rollout.
        num_minibatches: Optimizer steps per pass.
        kl_in_reward: Whether rewards need the KL of all rows before the first update.
    """

    policy: Any
    sampler: Sampler
    objective: Objective
    sizes: Sizes
    source: Source
    num_epochs: int
    num_minibatches: int
    kl_in_reward: bool

    def find(self, samples: Samples, step: Step) -> Found:
        """The log-probs under the policy that sampled, in batches that fit into memory."""
        rows = len(samples) // self.num_minibatches
        what, cut = f"{step.name}, old log-probs", samples.micro_batch_indices
        return self.sizes.fit(MICRO, rows, what, lambda: self._find(samples, step), cut)

    @torch.no_grad()
    def _find(self, samples: Samples, step: Step) -> Found:
        with step.clock.timed("old_logprobs", step.clock.device):
            minibatches = step.minibatch_rows(samples, self.num_minibatches, epoch=0)
            # A later epoch needs what the first update's rows had, so do rewards that hold a KL,
            # and in half precision the meter of noise.
            spared = self.source == "auto" and self.num_epochs == 1 and not self.kl_in_reward
            spared = spared and not self._in_half_precision(step)
            if spared and self.num_minibatches == 1:
                return self._recompute(samples, [])
            if step.from_sampler is None:
                step.from_sampler = self._sampler_will_do(samples, minibatches[-1], step)
            if step.from_sampler:
                assert samples.logprobs is not None
                old = samples.logprobs.masked_fill(~samples.mask, 0)
                return Found(old, torch.ones_like(samples.finished))
            return self._recompute(samples, minibatches[1:] if spared else minibatches)

    def _sampler_will_do(self, samples: Samples, rows: Tensor, step: Step) -> bool:
        """Whether the sampler's log-probs are used, by their noise in a few rows of this rollout.

        Args:
            samples: The rollout.
            rows: A mini-batch, of which a few rows are looked at.
            step: The step, whose ranks all get the same answer.
        """
        if self.source == "recompute":
            return False
        if samples.logprobs is None:
            if self.source == "sampler":
                raise ValueError(
                    f"model.old_logprobs is sampler, but {type(self.sampler).__name__} returns no "
                    "log-probs; use auto or recompute"
                )
            step.tally.update("policy/old_from_sampler", 0.0)
            return False
        few = samples.select(rows[:: max(1, len(rows) // FEW)][:FEW])
        again = samples_logprobs(self.policy.model, few, self.sampler.temperature).logprobs
        level = self.objective.ratio
        difference = importance_log_ratio(again, few.logprobs, few.mask, level)  # type: ignore[arg-type]
        # A sequence's ratio stands in each of its columns: one column is enough.
        noise = difference[few.mask] if level == "token" else difference[few.mask.any(1), 0]
        # Spread around 0, not around the mean: a shift of all ratios would do harm, too.
        squares = step.ranks.sum((noise.double() ** 2).sum()).item()
        count = step.ranks.sum(torch.tensor(float(len(noise)))).item()
        deviation = math.sqrt(squares / count) if count else math.inf
        # In half precision a mean over many tokens may look small where a token's noise is not.
        small = deviation < SMALL * self.objective.clip_width and not self._in_half_precision(step)
        chosen = self.source == "sampler" or small
        if math.isfinite(deviation):
            step.tally.update("policy/sampler_noise", deviation)
        step.tally.update("policy/old_from_sampler", float(chosen))
        return chosen

    def _in_half_precision(self, step: Step) -> bool:
        """Whether rounding is as large as what a step does to the ratio."""
        parameter = next(self.policy.model.parameters())
        mixed = torch.is_autocast_enabled(step.clock.device.type)
        return mixed or parameter.dtype.itemsize < 4

    def _recompute(self, samples: Samples, minibatches: list[Tensor]) -> Found:
        """Log-probs in the very batches of the first epoch, unknown in rows of no mini-batch.

        The same rows in the same shapes through the same kernels: what differs from the update's
        forward pass by rounding would look like a ratio that moved.
        """
        old = torch.zeros_like(samples.mask, dtype=torch.float32)
        known = torch.zeros_like(samples.finished)
        for minibatch in minibatches:
            chosen = samples.select(minibatch)
            known[minibatch.to(known.device)] = True
            for rows in self.sizes.pieces(chosen):
                part = chosen.select(rows)
                found = samples_logprobs(self.policy.model, part, self.sampler.temperature).logprobs
                old = old.to(found.dtype)
                old[minibatch[rows].to(old.device)] = found
        return Found(old, known)
