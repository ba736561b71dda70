"""Break one number of chosen optimizer steps of a run, at the place where it is computed."""

import math
from contextlib import ExitStack
from dataclasses import replace
from unittest.mock import patch

import torch
from lightning.pytorch import Callback

from gspo_lightning import update as update_file

NAN, INF = math.nan, math.inf


class Inject(Callback):
    """Breaks a number, or leaves a step out altogether, which is what a skipped step should equal.

    Args:
        at: What to break at (rollout, step), step from 1: a key of `PLACES`, or "left out", and
            the value that is put there.
    """

    def __init__(self, at):
        self.at = at
        self.kind = self.value = None
        self.tried = 0
        self.patches = ExitStack()

    def teardown(self, trainer, module, stage):
        self.patches.close()

    def on_exception(self, trainer, module, exception):
        self.patches.close()

    def on_train_start(self, trainer, module):
        self.module, self.trainer = module, trainer
        update, forward = module.updater.update, update_file.samples_logprobs
        loss, log_ratio = update_file.micro_loss, update_file.importance_log_ratio
        head = module.policy.model.get_output_embeddings()

        def broken_update(rollout, rows, step):
            place = step.index, step.num_updates + 1
            self.kind, self.value = self.at.get(place, (None, None))
            if self.kind is None:
                return update(rollout, rows, step)
            self.tried += 1
            if self.kind == "left out":
                self.kind = None
                step.num_updates += 1
                return rollout, torch.ones(len(rows))
            broken = rollout
            if self.kind in ("advantages", "old_logprobs", "ref_logprobs"):
                tensor = getattr(rollout, self.kind).clone()
                tensor[rows[1], 0] = self.value
                broken = replace(rollout, **{self.kind: tensor})
            _, ratios = update(broken, rows, step)
            self.kind = None
            return rollout, ratios

        def broken_forward(*args, **options):
            found = forward(*args, **options)
            if self.kind == "logprobs":
                shift = torch.zeros_like(found.logprobs)
                shift[0, 0] = self.value
                return found._replace(logprobs=found.logprobs + shift)
            return found

        def broken_loss(*args):
            found = loss(*args)
            return found._replace(total=found.total * self.value) if self.kind == "loss" else found

        def broken_ratio(*args):
            return log_ratio(*args) + (self.value if self.kind == "ratio" else 0)

        def broken_head(_, __, logits):
            if self.kind == "logits":
                return logits + torch.full_like(logits, self.value)
            return logits

        module.updater.update = broken_update
        for name, broken in {
            "samples_logprobs": broken_forward,
            "micro_loss": broken_loss,
            "importance_log_ratio": broken_ratio,
        }.items():
            self.patches.enter_context(patch.object(update_file, name, broken))
        head.register_forward_hook(broken_head)

    def on_before_optimizer_step(self, trainer, module, optimizer):
        if self.kind == "gradient":
            parameter = list(module.policy.parameters())[3]
            parameter.grad.view(-1)[0] = self.value


class Later(Callback):
    """Breaks everything from some rollout on, by a name that a config can give.

    Args:
        first: The first rollout that is broken.
        kind: "gradient", "weights" before the rollout, or "moved" weights after its steps.
    """

    def __init__(self, first: int, kind: str):
        self.first, self.kind = first, kind

    def on_train_batch_start(self, trainer, module, batch, batch_idx):
        if self.kind == "weights" and batch_idx == self.first:
            with torch.no_grad():
                next(module.policy.parameters()).fill_(NAN)

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        if self.kind == "moved" and batch_idx == self.first:
            with torch.no_grad():
                next(module.policy.parameters())[-1, -1] = INF

    def on_before_optimizer_step(self, trainer, module, optimizer):
        if self.kind == "gradient" and trainer.fit_loop.total_batch_idx >= self.first:
            next(module.policy.parameters()).grad.fill_(NAN)


class BrokenReward:
    """A reward function whose value for one row is another in chosen rollouts.

    Args:
        fn: The function; called once a rollout.
        at: What is put there, by (rollout, row).
    """

    def __init__(self, fn, at):
        self.fn, self.at = fn, at
        self.rollouts = self.tried = 0

    def __call__(self, rows, completions):
        values = self.fn(rows, completions)
        for (rollout, row), value in self.at.items():
            if rollout == self.rollouts:
                values[row] = value
                self.tried += 1
        self.rollouts += 1
        return values


def every(steps, kind, value=NAN):
    """The same fault at several steps."""
    return Inject(dict.fromkeys(steps, (kind, value)))


PLACES = {
    "advantages": (NAN, INF),
    "old_logprobs": (NAN, -INF),
    "ref_logprobs": (NAN, -INF),
    "logits": (NAN, INF),
    "logprobs": (NAN, -INF),
    "ratio": (NAN, INF),
    "loss": (NAN, INF),
    "gradient": (NAN, INF),
}
# no step is lost by these, but a row, or by `on_error: stop` the run; see `BrokenReward`
REWARDS = (NAN, INF, -INF)
