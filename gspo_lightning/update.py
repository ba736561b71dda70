"""Update on a rollout: one optimizer step per mini-batch, through micro-batches.

Decides the loss of a micro-batch, when a step is skipped, and what is done again when memory is
short. Leaves out the settings (``module``) and the maths (``objectives``, ``kl``).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from gspo_lightning.collect import CollectingModule
from gspo_lightning.critic.gae import ValueLoss
from gspo_lightning.guards.faults import FOLDER, Faults, prompt_texts, settings_of, write_dump
from gspo_lightning.guards.out_of_memory import TOKENS, OutOfMemory, is_out_of_memory
from gspo_lightning.kl import kl_estimate
from gspo_lightning.objectives import (
    Objective,
    PolicyLoss,
    importance_log_ratio,
    policy_loss,
    token_weights,
)
from gspo_lightning.old_logprobs import MICRO
from gspo_lightning.policy.policy import PolicyConfig
from gspo_lightning.rollout import Rollout


class StepLosses(NamedTuple):
    """The loss of a micro-batch: its parts, () each, and what they were computed from.

    ``old`` are the log-probs that the ratio is taken to, and ``entropies`` those of the tokens, or
    None where nobody asked, (b, T) each.
    ``total`` is attached to the graph. ``log_ratio`` is the length-normalised one, (b,), and
    ``token_log_ratio`` that of each token, (b, T); ``noise`` is what the first is by rounding
    alone, or None where the weights have moved, ``value`` the critic's loss, if there is one.
    """

    total: Tensor
    policy: PolicyLoss
    entropy: Tensor
    kl: Tensor
    logprobs: Tensor
    log_ratio: Tensor
    token_log_ratio: Tensor
    noise: Tensor | None
    value: ValueLoss | None
    old: Tensor
    entropies: Tensor | None


class UpdatingModule(CollectingModule):
    """The half of ``GSPOModule`` that learns from rollouts; that class documents the settings."""

    policy_config: PolicyConfig
    objective: Objective
    kl_coef: float
    kl_estimator: Literal["k2", "k3"]
    entropy_coef: float
    max_grad_norm: float | None
    kl_in_reward: bool
    num_epochs: int
    faults: Faults
    steps: int = 0  # mini-batches of this rollout so far
    moved: bool = False  # whether one of them has moved the weights
    synced: bool = False  # whether a backward pass has begun that ranks share

    def learn(self, rollout: Rollout) -> tuple[Rollout, Tensor]:
        """Take all optimizer steps of a rollout.

        Returns:
            The rollout, whose old log-probs are others if memory was short, and the ratio of each
            row before its last step, (B,).
        """
        ratios = torch.ones(len(rollout))
        self.steps, self.moved = 0, False

        def smaller(rows: Tensor) -> Rollout:
            # in the batches of the update again, or rounding would look like a ratio that moved
            nonlocal rollout
            rollout = replace(rollout, old_logprobs=self._old_logprobs(rollout))
            return rollout.select(rows)

        for epoch in range(self.num_epochs):
            for rows in self._minibatch_rows(rollout, epoch):
                again = partial(smaller, rows)
                ratios[rows] = self.update(rollout.select(rows), not self.moved, again)
        return rollout, ratios

    def update(
        self,
        minibatch: Rollout,
        on_policy: bool = False,
        smaller: Callable[[], Rollout] | None = None,
    ) -> Tensor:
        """Take one optimizer step on a mini-batch, through micro-batches.

        Args:
            minibatch: Rows of a rollout.
            on_policy: The weights are still those that sampled, so the old log-probs are this very
                forward pass, detached: the ratio is exactly 1.
            smaller: The same rows with old log-probs from smaller micro-batches; None where a step
                is not to be repeated.

        Returns:
            Length-normalised sequence ratios before the step, (B,) on the CPU.

        Raises:
            FloatingPointError: If ``max_faults`` steps in a row were not finite.
            OutOfMemory: If memory is short and the step must not be repeated.
        """
        self.steps += 1
        if not self._sum_over_ranks(minibatch.mask.sum()):
            self._count_step(skipped=True, fault=False)
            return torch.ones(len(minibatch))
        weights = token_weights(
            minibatch.mask,
            self.objective.aggregation,
            self.sampler.max_new_tokens,
            reduce=self._sum_over_ranks,
            dtype=minibatch.old_logprobs.dtype,
        )
        weights = weights * self.trainer.world_size  # the mean of gradients over ranks, undone
        optimizer: Any = self.optimizers()
        parts = None
        while parts is None:
            try:
                parts = self._accumulate(minibatch, weights, on_policy)
            except Exception as error:
                self._check_repeatable(error, smaller)
            if parts is None and smaller is not None:
                optimizer.zero_grad()
                self.untoggle_optimizer(optimizer)  # which the error has left toggled
                self.sizes.halve(MICRO, len(minibatch), f"{self._place}, an update")
                minibatch = smaller()
        pieces = self._pieces(minibatch)
        for rows, part in zip(pieces, parts, strict=True):
            if part.entropies is not None and self.steps <= self.num_minibatches:
                ref = None if minibatch.ref_logprobs is None else minibatch.ref_logprobs[rows]
                self.tally.count_logprobs(part.old, part.entropies, ref, minibatch.mask[rows])
        optimizer.step()  # changes nothing after a fault: there is no gradient then
        if self.faults.found:
            self._skip(minibatch, weights, on_policy)
            return torch.ones(len(minibatch))
        self.moved = True
        ratios = torch.ones(len(minibatch))
        for rows, part in zip(pieces, parts, strict=True):
            mask = minibatch.mask[rows]
            ratios[rows] = part.log_ratio.exp().float().cpu()
            self.tally.count_losses(part.policy, part.entropy, part.kl, mask, 1 / len(parts))
            self.tally.count_log_ratios(part.token_log_ratio, part.log_ratio, mask)
            if part.noise is not None:
                self.tally.count_noise(part.noise)
            if part.value is not None:
                self.tally.count_value_loss(part.value, mask, 1 / len(parts))
        self._count_step(skipped=False, fault=False)
        return ratios

    def _accumulate(self, minibatch: Rollout, weights: Tensor, on_policy: bool) -> list[StepLosses]:
        """Make the gradient of a mini-batch, one micro-batch after the other."""
        optimizer: Any = self.optimizers()
        optimizer.zero_grad()
        self.faults.begin(minibatch, with_reference=self.kl_coef > 0 and not self.kl_in_reward)
        self.synced = False
        parts: list[StepLosses] = []
        pieces = self._pieces(minibatch)
        for rows in pieces:
            last = len(parts) == len(pieces) - 1
            micro, micro_weights = minibatch.select(rows), weights[rows.to(weights.device)]
            with optimizer.toggle_model(sync_grad=last):
                parts.append(self._backward(micro, micro_weights, on_policy, last))
        return parts

    def _pieces(self, minibatch: Rollout) -> list[Tensor]:
        return minibatch.micro_batch_indices(self.micro_batch_size, self.micro_batch_tokens)

    def _rows(self, minibatch: Rollout) -> int:
        return self.micro_batch_size or len(minibatch)

    @property
    def _place(self) -> str:
        return f"rollout {self.trainer.fit_loop.total_batch_idx}, optimizer step {self.steps}"

    def _check_repeatable(self, error: Exception, smaller: Any) -> None:
        """Raise an error again unless memory was short and the step can be done from its start."""
        if not is_out_of_memory(error) or isinstance(error, OutOfMemory):
            raise error
        key = MICRO if self.micro_batch_tokens is None else TOKENS
        size = getattr(self, key)
        if self.moved:
            raise OutOfMemory(
                f"out of memory in {self._place} ({key} {size}), after the first step of the "
                "rollout, which cannot be repeated; continue from the last checkpoint with a "
                f"smaller model.init_args.{key}"
            ) from error
        if smaller is None or (self.synced and self.trainer.world_size > 1):
            # other ranks may have the half of a gradient that this one was sending
            raise OutOfMemory(
                f"out of memory in {self._place} ({key} {size}), in a pass that other ranks "
                f"share; continue with a smaller model.init_args.{key}"
            ) from error

    def losses(self, micro: Rollout, weights: Tensor, on_policy: bool) -> StepLosses:
        """The forward pass of a micro-batch: its share of the loss of a mini-batch."""
        mask, old = micro.mask, micro.old_logprobs
        # rows that are seen for the first time: their entropy is counted
        wanted = self.entropy_coef != 0 or self.steps <= self.num_minibatches
        logprobs, entropy = self._logprobs(micro, with_entropy=wanted)
        noise = None
        if on_policy:
            if old.any():  # or they were not computed, as these here stand in for them
                counted = mask.any(1)
                noise = importance_log_ratio(logprobs.detach(), old, mask, "sequence")[counted, 0]
            old = logprobs.detach()
        policy = policy_loss(logprobs, old, micro.advantages, mask, weights, self.objective)
        entropy_loss = kl_loss = policy.loss.new_zeros(())
        if entropy is not None and self.entropy_coef != 0:
            entropy_loss = -self.entropy_coef * (weights * entropy).sum()
        if micro.ref_logprobs is not None and self.kl_coef > 0 and not self.kl_in_reward:
            kl = kl_estimate(logprobs, micro.ref_logprobs, self.kl_estimator)
            kl_loss = self.kl_coef * (weights * kl).sum()
        log_ratio = importance_log_ratio(logprobs.detach(), old, mask, "sequence")[:, 0]
        tokens = logprobs.detach() - old
        total, value = policy.loss + entropy_loss + kl_loss, None
        if self.critic is not None:
            value = self.critic.loss(self.policy.model, micro, weights)  # type: ignore[union-attr]
            total = total + value.loss
        return StepLosses(
            *(total, policy, entropy_loss, kl_loss, logprobs, log_ratio, tokens, noise, value),
            *(old, entropy),
        )

    def _backward(self, micro: Rollout, weights: Tensor, on_policy: bool, last: bool) -> StepLosses:
        """Add the gradient of a micro-batch; what comes back has no graph."""
        part = self.losses(micro, weights, on_policy)
        self.faults.look("logprobs", part.logprobs)
        self.faults.look("ratio", part.log_ratio.exp())
        self.faults.look("loss", part.total)
        self.synced = last
        self.manual_backward(part.total)
        return StepLosses(
            part.total.detach(),
            part.policy._replace(loss=part.policy.loss.detach()),
            part.entropy.detach(),
            part.kl.detach(),
            part.logprobs.detach(),
            part.log_ratio,
            part.token_log_ratio,
            part.noise,
            part.value and part.value._replace(loss=part.value.loss.detach()),
            part.old,
            None if part.entropies is None else part.entropies.detach(),
        )

    def _count_step(self, skipped: bool, fault: bool) -> None:
        # by one rank: totals are summed over ranks, and all take or skip a step together
        first = self.global_rank == 0
        self.tally.update("optim/skipped_steps", float(skipped and first))
        self.tally.update("optim/faults", float(fault and first))

    def _skip(self, minibatch: Rollout, weights: Tensor, on_policy: bool) -> None:
        """Count a step at fault and write it down; the optimizer has found no gradient."""
        self._count_step(skipped=True, fault=True)
        index = self.trainer.fit_loop.total_batch_idx
        dump = None
        if self.faults.own:
            name = f"rollout={index:06d}-step={self.steps:03d}-rank{self.global_rank}.pt"
            dump = write_dump(
                Path(self.trainer.default_root_dir, FOLDER, name),
                minibatch,
                self.policy,
                weights=weights,
                on_policy=on_policy,
                found=self.faults.found,
                prompts=prompt_texts(minibatch, self.tokenizer),
                settings=settings_of(self, self._rows(minibatch)),
            )
        self.faults.tell(self._place, dump)

    def on_before_optimizer_step(self, optimizer: Any) -> None:
        """Measure the gradient, scale it down to ``max_grad_norm``, drop it if it is at fault."""
        norm = torch.nn.utils.clip_grad_norm_(
            self.policy.parameters(),  # type: ignore[union-attr]
            math.inf if self.max_grad_norm is None else self.max_grad_norm,
        )
        critic_norm = None
        if self.critic is not None:
            critic_norm = self.critic.clip_gradient(self.max_grad_norm)
        total = norm if critic_norm is None else norm + critic_norm
        if self.faults.settle(total, self._sum_over_ranks):
            for group in optimizer.param_groups:
                for parameter in group["params"]:
                    parameter.grad = None  # which every optimizer leaves alone, with its state
        else:
            self.tally.update("policy/grad_norm", norm)
            if critic_norm is not None:
                self.tally.update("critic/grad_norm", critic_norm)
