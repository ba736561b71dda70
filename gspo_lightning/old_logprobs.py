"""The policy's own passes over a rollout before its first update, measured.

Decides where the old log-probs come from: from the first mini-batch's own forward pass, from the
sampler where its noise is small, or from a pass in the batches of the update. Leaves out what they
are needed for (``collect``, ``update``).
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal

import torch
from torch import Tensor
from torch.profiler import record_function

from gspo_lightning.evaluation import EvaluatedModule
from gspo_lightning.frozen.models import FrozenModels
from gspo_lightning.guards.memory import peaks, reset_peaks
from gspo_lightning.guards.out_of_memory import BatchSizes
from gspo_lightning.logprobs import LogProbs, completion_logprobs
from gspo_lightning.objectives import Objective, importance_log_ratio
from gspo_lightning.rollout import Samples, stream_seed
from gspo_lightning.tally import RolloutTally

CPU = torch.device("cpu")
MICRO, SAMPLED, REFERRED = "micro_batch_size", "sampler.batch_size", "reference.batch_size"
OldLogProbs = Literal["auto", "recompute", "sampler"]
FEW = 4  # rows whose log-probs are computed to see the noise of the sampler's
SMALL = 0.01  # of the clip range: below that noise does not matter


class PolicyPasses(EvaluatedModule):
    """The part of ``GSPOModule`` that finds old log-probs; that class documents the settings."""

    frozen: FrozenModels
    tally: RolloutTally
    num_minibatches: int
    num_epochs: int
    micro_batch_size: int | None
    micro_batch_tokens: int | None
    old_logprobs: OldLogProbs
    kl_in_reward: bool
    objective: Objective
    seconds: dict[str, float]
    peak_memory: dict[str, float]  # GiB
    sizes: BatchSizes
    _from_sampler: bool | None = None  # of this rollout, once it is known

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
            # a later epoch needs what the first step had, so do rewards that hold a KL, and in half
            # precision the noise meter
            spared = self.old_logprobs == "auto" and self.num_epochs == 1 and not self.kl_in_reward
            spared = spared and not self._in_half_precision()
            if steps == 1 and spared:
                return torch.zeros_like(samples.mask, dtype=torch.float32)
            if self._from_sampler is None:
                self._from_sampler = self._sampler_will_do(samples, minibatches[-1])
            if self._from_sampler:
                assert samples.logprobs is not None
                return samples.logprobs.masked_fill(~samples.mask, 0)
            return self._recompute(samples, minibatches[1:] if spared else minibatches)

    def _sampler_will_do(self, samples: Samples, rows: Tensor) -> bool:
        """Whether the sampler's log-probs are used, by their noise in a few rows of this rollout.

        Asked once a rollout: the answer is that of all ranks, and one that repeats its pass for
        want of memory must not wait for the others.

        Args:
            samples: The rollout.
            rows: A mini-batch, of which a few rows are looked at.
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
        few = samples.select(rows[:: max(1, len(rows) // FEW)][:FEW])
        again = self._logprobs(few, with_entropy=False).logprobs
        level = self.objective.ratio
        difference = importance_log_ratio(again, few.logprobs, few.mask, level)  # type: ignore[arg-type]
        # a sequence's ratio stands in each of its columns
        noise = difference[few.mask] if level == "token" else difference[few.mask.any(1), 0]
        # around 0, not around their mean: a shift of all ratios would do harm, too; of all ranks
        squares = self._sum_over_ranks((noise.double() ** 2).sum()).item()
        count = self._sum_over_ranks(torch.tensor(float(len(noise)))).item()
        deviation = math.sqrt(squares / count) if count else math.inf
        # a mean over many tokens may look small where each token's noise does not
        small = deviation < SMALL * self.objective.clip_width and not self._in_half_precision()
        chosen = self.old_logprobs == "sampler" or small
        if math.isfinite(deviation):
            self.tally.update("policy/sampler_noise", deviation)
        self.tally.update("policy/old_from_sampler", float(chosen))
        return chosen

    def _in_half_precision(self) -> bool:
        """Whether rounding is as large as what a step does to the ratio."""
        parameter = next(self.policy.model.parameters())  # type: ignore[union-attr]
        return torch.is_autocast_enabled(self.device.type) or parameter.dtype.itemsize < 4

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
