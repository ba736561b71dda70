"""Update on a rollout: one optimizer step per mini-batch, through micro-batches.

Decides when a step is skipped, what is counted of it, and what is done again when memory is short.
"""

import math
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from gspo_lightning.critic.critic import Critic
from gspo_lightning.critic.gae import ValueLoss
from gspo_lightning.frozen.models import ReferencePolicy
from gspo_lightning.guards.faults import FOLDER, Faults, prompt_texts, write_dump
from gspo_lightning.guards.out_of_memory import MICRO, TOKENS, Sizes
from gspo_lightning.logprobs import LogProbs, samples_logprobs
from gspo_lightning.loss import MicroLoss, micro_loss
from gspo_lightning.mismatch import row_weights
from gspo_lightning.objectives import importance_log_ratio, picked_tokens, token_weights
from gspo_lightning.old_logprobs import OldLogProbs
from gspo_lightning.rollout import Rollout, stream_seed
from gspo_lightning.sampling import Sampler
from gspo_lightning.sharding import whole_tensor
from gspo_lightning.step import Step


class Pass(NamedTuple):
    """What is kept of a micro-batch's pass until its optimizer step is taken; without its graph.

    Attributes:
        rows: The micro-batch's places in the mini-batch, (b,).
        found: Log-probs, and entropies where they were asked for, nats, (b, T).
        loss: The micro-batch's share of the loss.
        log_ratio: Length-normalised log-ratio of each row, nats per token, (b,).
        value: The critic's loss, if there is one.
    """

    rows: Tensor
    found: LogProbs
    loss: MicroLoss
    log_ratio: Tensor
    value: ValueLoss | None


@dataclass
class Updater:
    """A rollout in, optimizer steps out; ``GSPOModule`` documents the settings.

    Args:
        shell: The LightningModule: its optimizer and its backward pass.
        policy: The policy, with its tokenizer.
        critic: Its critic, if there is one.
        sampler: Drew the completions; its limit and its temperature belong to the loss.
        old_logprobs: Finds old log-probs anew when micro-batches become smaller.
        sizes: How much is computed at once.
        faults: Looks for NaN and infinities.
        policy_settings: Of the policy, plain values, for a dump.
        reference: May follow the policy.
    """

    shell: Any
    policy: Any
    critic: Critic | None
    sampler: Sampler
    old_logprobs: OldLogProbs
    sizes: Sizes
    faults: Faults
    policy_settings: dict[str, Any]
    num_epochs: int
    num_minibatches: int
    max_grad_norm: float | None
    reference: ReferencePolicy | None = None

    def learn(self, rollout: Rollout, step: Step) -> tuple[Rollout, Tensor]:
        """Take all optimizer steps of a rollout.

        Returns:
            The rollout, whose old log-probs are others if memory was short, and the ratio of each
            row before its last step, (B,).
        """
        ratios = torch.ones(len(rollout))
        with step.clock.phase("optimise"):
            for epoch in range(self.num_epochs):
                for rows in step.minibatch_rows(rollout, self.num_minibatches, epoch):
                    rollout, ratios[rows] = self.update(rollout, rows, step)
        return rollout, ratios

    def update(self, rollout: Rollout, rows: Tensor, step: Step) -> tuple[Rollout, Tensor]:
        """Take one optimizer step on a mini-batch, through micro-batches.

        Args:
            rollout: The whole rollout.
            rows: Those of the mini-batch.
            step: The step; while no weight has moved in it, the old log-probs of the mini-batch are
                this very forward pass, detached: the ratio is exactly 1.

        Returns:
            The rollout, as :meth:`learn`, and the length-normalised ratio of each row of the
            mini-batch before the step, on the CPU.

        Raises:
            FloatingPointError: If ``max_faults`` steps in a row were not finite.
            OutOfMemory: If memory is short and the step must not be repeated.
        """
        step.num_updates += 1
        minibatch = rollout.select(rows)
        ratios = torch.ones(len(minibatch))
        if not step.ranks.sum(minibatch.mask.sum()):
            self._count_step(step, skipped=True, fault=False)
            return rollout, ratios
        weights = token_weights(
            minibatch.mask,
            step.choices.objective.aggregation,
            self.sampler.max_new_tokens,
            reduce=step.ranks.sum,
            dtype=minibatch.old_logprobs.dtype,
        )
        minibatch = self._weighed(minibatch, step)
        weights = weights * step.ranks.count  # undoes the mean of gradients over ranks
        optimizer = self.shell.optimizers()
        while True:  # until the passes fit into memory
            step.synced = False
            try:
                minibatch = self._with_picks(minibatch, step)
                passes = self._accumulate(minibatch, weights, step)
                break
            except Exception as error:
                # Other ranks may have the half of a gradient that this rank was sending.
                shared = step.ranks.weights.sharded or (step.synced and step.ranks.count > 1)
                self.sizes.check_repeatable(error, self._place(step), step.moved, shared)
            optimizer.zero_grad()
            self.shell.untoggle_optimizer(optimizer)  # the error has left it toggled
            what = f"{self._place(step)}, an update"
            self.sizes.halve(MICRO, len(minibatch), what, rollout.micro_batch_indices)
            # In the batches of the update again, or rounding would look like a ratio that moved.
            old = self.old_logprobs.find(rollout, step)
            rollout = replace(rollout, old_logprobs=old.logprobs, old_known=old.known)
            # Neither asks other ranks again: they do not repeat their passes.
            row, picked = minibatch.mismatch_weights, minibatch.picked
            minibatch = replace(rollout.select(rows), mismatch_weights=row, picked=picked)
        for part in passes if self._first_epoch(step) else ():
            micro = minibatch.select(part.rows)
            if part.found.entropy is not None:
                known = part.found.entropy, micro.ref_logprobs, micro.mask
                step.tally.count_logprobs(part.loss.old, *known)
            # Old log-probs taken from the sampler would say that it is the policy.
            if micro.logprobs is not None and not (step.from_sampler and step.moved):
                step.tally.count_sampler(part.loss.old, micro.logprobs, micro.mask)
        optimizer.step()  # changes nothing after a fault: there is no gradient then
        if self.reference is not None:
            self.reference.follow(self.policy.model, self.shell.trainer.global_step)
        if self.faults.found:
            self._skip(minibatch, weights, step)
            return rollout, ratios
        on_policy = not step.moved
        step.moved = True
        for part in passes:
            self._count(part, minibatch.select(part.rows), on_policy, 1 / len(passes), step)
            ratios[part.rows] = part.log_ratio.exp().float().cpu()
        self._count_step(step, skipped=False, fault=False)
        return rollout, ratios

    def _accumulate(self, minibatch: Rollout, weights: Tensor, step: Step) -> list[Pass]:
        """Make the gradient of a mini-batch, one micro-batch after the other."""
        optimizer = self.shell.optimizers()
        optimizer.zero_grad()
        self.faults.begin(minibatch, with_reference=step.choices.kl_coef > 0)
        minibatch = self._with_own_pass(minibatch, step)
        # Rows that are seen for the first time: their entropy is counted.
        wanted = step.choices.entropy_coef != 0 or self._first_epoch(step)
        passes: list[Pass] = []
        pieces = self.sizes.pieces(minibatch)
        for rows, counts in step.ranks.weights.even(pieces):
            last = len(passes) == len(pieces) - 1
            micro, share = minibatch.select(rows), weights[rows.to(weights.device)] * counts
            micro = micro if counts else replace(micro, mask=torch.zeros_like(micro.mask))
            with optimizer.toggle_model(sync_grad=last):
                found = samples_logprobs(
                    self.policy.model, micro, self.sampler.temperature, with_entropy=wanted
                )
                value = None
                if self.critic is not None:
                    value = self.critic.loss(self.policy.model, micro, share)
                loss = micro_loss(*found, micro, share, step.choices, value and value.loss)
                self.faults.look("logprobs", found.logprobs)
                tokens = found.logprobs.detach(), loss.old, micro.mask
                log_ratio = importance_log_ratio(*tokens, "sequence")[:, 0]
                self.faults.look("ratio", log_ratio.exp())
                self.faults.look("loss", loss.total)
                step.synced = last
                with step.ranks.wait(loss.total) if last else nullcontext():
                    self.shell.manual_backward(loss.total)
            entropy = None if found.entropy is None else found.entropy.detach()
            found = LogProbs(found.logprobs.detach(), entropy)
            value = value and value._replace(loss=value.loss.detach())
            if counts:
                passes.append(Pass(rows, found, loss.detach(), log_ratio, value))
        return passes

    @torch.no_grad()
    def _with_picks(self, minibatch: Rollout, step: Step) -> Rollout:
        """The mini-batch with the tokens that its objective treats apart, if it does.

        Which they are depends on all rows of all ranks as the policy sees them now, so it must be
        known before the first backward pass: by a forward pass of its own over the mini-batch, in
        the same micro-batches. It makes an update longer by about a third.
        """
        objective = step.choices.objective
        if objective.pick is None or minibatch.picked is not None:
            return minibatch
        own = self._with_own_pass(minibatch, step)
        logprobs, entropy = (torch.zeros_like(own.old_logprobs) for _ in range(2))
        for rows, counts in step.ranks.weights.even(self.sizes.pieces(own)):
            micro, temperature = own.select(rows), self.sampler.temperature
            found = samples_logprobs(self.policy.model, micro, temperature, with_entropy=True)
            if counts:
                for kept, new in ((logprobs, found.logprobs), (entropy, found.entropy)):
                    kept[rows] = new.to(kept)  # type: ignore[union-attr]
        old = own.old_logprobs
        if own.old_known is not None:
            old = torch.where(own.old_known[:, None], old, logprobs)
        tokens = logprobs, old, entropy, own.advantages, own.mask
        seed = stream_seed(step.run_seed, step.index, 0, f"pick/{step.num_updates}")
        return replace(minibatch, picked=picked_tokens(*tokens, objective, seed, step.ranks.join))

    def _first_epoch(self, step: Step) -> bool:
        return step.num_updates <= self.num_minibatches

    def _weighed(self, minibatch: Rollout, step: Step) -> Rollout:
        """The mini-batch with its weights against a sampler that is not the policy, if any."""
        mismatch, drawn = step.choices.mismatch, minibatch.logprobs
        if not mismatch.weighs:
            return minibatch
        assert drawn is not None  # or the rollout would have been refused
        found = row_weights(minibatch.old_logprobs, drawn, minibatch.mask, mismatch, step.ranks.sum)
        if self._first_epoch(step):
            step.tally.count_row_weights(found, minibatch.mask)
        return replace(minibatch, mismatch_weights=found.weights)

    def _with_own_pass(self, minibatch: Rollout, step: Step) -> Rollout:
        """The mini-batch as its loss sees it: before any weight moved no old log-prob is known."""
        if step.moved:
            return minibatch
        return replace(minibatch, old_known=torch.zeros_like(minibatch.finished))

    def _count(self, part: Pass, micro: Rollout, on_policy: bool, share: float, step: Step) -> None:
        """Count a micro-batch that is ``share`` of an optimizer step that was taken."""
        mask, tally = micro.mask, step.tally
        tally.count_losses(part.loss.clip, part.loss.parts.entropy, part.loss.parts.kl, mask, share)
        tally.count_log_ratios(part.found.logprobs - part.loss.old, part.log_ratio, mask)
        if on_policy:  # old log-probs that are known all the same differ by rounding alone
            known = mask.any(1) if micro.old_known is None else mask.any(1) & micro.old_known
            tokens = part.found.logprobs, micro.old_logprobs, mask
            tally.count_noise(importance_log_ratio(*tokens, "sequence")[known, 0])
        if part.value is not None:
            tally.count_value_loss(part.value, mask, share)

    def _place(self, step: Step) -> str:
        return f"{step.name}, optimizer step {step.num_updates}"

    def _count_step(self, step: Step, skipped: bool, fault: bool) -> None:
        # Rank 0 counts for all: totals are summed over ranks, which take or skip a step together.
        first = step.ranks.rank == 0
        step.tally.update("optim/skipped_steps", float(skipped and first))
        step.tally.update("optim/faults", float(fault and first))

    def _skip(self, minibatch: Rollout, weights: Tensor, step: Step) -> None:
        """Count a step at fault and write it down; the optimizer has found no gradient."""
        self._count_step(step, skipped=True, fault=True)
        dump, state = None, step.ranks.weights.state(self.policy, self.faults.own)
        if self.faults.own:
            rank, trainer = step.ranks.rank, self.shell.trainer
            name = f"rollout={step.index + 1:06d}-step={step.num_updates:03d}-rank{rank}.pt"
            dump = write_dump(
                Path(trainer.default_root_dir, FOLDER, name),
                self._with_own_pass(minibatch, step),
                state,
                weights=weights,
                found=self.faults.found,
                prompts=prompt_texts(minibatch, self.policy.tokenizer),
                choices=asdict(step.choices),
                settings={
                    "policy": self.policy_settings,
                    "temperature": self.sampler.temperature,
                    MICRO: self.sizes.now[MICRO] or len(minibatch),
                    TOKENS: self.sizes.now[TOKENS],
                    "critic": self.critic is not None,
                    "precision": str(trainer.precision),
                    "device": step.clock.device.type,
                },
            )
        self.faults.tell(self._place(step), dump)

    def settle_gradient(self, optimizer: Any, step: Step) -> None:
        """Measure the gradient, scale it down to ``max_grad_norm``, drop it if it is at fault."""
        limit = math.inf if self.max_grad_norm is None else self.max_grad_norm
        norm = whole_tensor(nn.utils.clip_grad_norm_(self.policy.parameters(), limit))
        norms = {"policy/grad_norm": norm}
        if self.critic is not None:
            norms["critic/grad_norm"] = self.critic.clip_gradient(self.max_grad_norm)
            norm = norm + norms["critic/grad_norm"]
        if self.faults.settle(norm, step.ranks.sum):
            for group in optimizer.param_groups:
                for parameter in group["params"]:
                    parameter.grad = None  # which every optimizer leaves alone, with its state
        else:
            for name, value in norms.items():
                step.tally.update(name, value)
