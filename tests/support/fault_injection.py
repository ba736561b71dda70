"""Break one number of chosen optimizer steps of a run, at the place where it is computed."""

import math
from dataclasses import replace

import torch
from lightning.pytorch import Callback

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

    def on_train_start(self, trainer, module):
        self.module, self.trainer = module, trainer
        update, forward, losses = module.update, module._logprobs, module.losses
        head = module.policy.model.get_output_embeddings()

        def broken_update(minibatch, *args, **options):
            place = trainer.fit_loop.total_batch_idx, module.steps + 1
            self.kind, self.value = self.at.get(place, (None, None))
            if self.kind is None:
                return update(minibatch, *args, **options)
            self.tried += 1
            if self.kind == "left out":
                self.kind = None
                module.steps += 1
                return torch.ones(len(minibatch))
            if self.kind in ("advantages", "old_logprobs", "ref_logprobs"):
                tensor = getattr(minibatch, self.kind).clone()
                tensor[1, 0] = self.value
                minibatch = replace(minibatch, **{self.kind: tensor})
            ratios = update(minibatch, *args, **options)
            self.kind = None
            return ratios

        def broken_forward(samples, with_entropy):
            found = forward(samples, with_entropy)
            if self.kind == "logprobs":
                shift = torch.zeros_like(found.logprobs)
                shift[0, 0] = self.value
                return found._replace(logprobs=found.logprobs + shift)
            return found

        def broken_losses(*args):
            found = losses(*args)
            if self.kind == "loss":
                return found._replace(total=found.total * self.value)
            if self.kind == "ratio":
                return found._replace(log_ratio=found.log_ratio + self.value)
            return found

        def broken_head(_, __, logits):
            if self.kind == "logits":
                return logits + torch.full_like(logits, self.value)
            return logits

        module.update, module._logprobs = broken_update, broken_forward
        module.losses = broken_losses
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
