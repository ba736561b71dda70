"""One training step without a Trainer, and the passes of the policy inside of a run."""

from types import SimpleNamespace

import torch

from gspo_lightning import logprobs
from gspo_lightning.loss import LossChoices
from gspo_lightning.step import Clock, Ranks, Step
from gspo_lightning.tally import RolloutTally


def one_rank(**options):
    """A rank that has nobody to share with."""
    alone = {"rank": 0, "count": 1, "sum": lambda x: x, "gather": lambda x: x[None]}
    return Ranks(**alone | options)


def make_step(choices=None, index=0, ranks=None, terms=()):
    """The step of one rank on the CPU, with nothing done yet."""
    clock = Clock(torch.device("cpu"))
    choices = choices or LossChoices()
    return Step(index, 0, ranks or one_rank(), clock, RolloutTally(terms), choices, choices.kl_coef)


def replace_policy_passes(monkeypatch, make):
    """Let the policy's log-probs in a run come from ``make(plain)``; frozen models keep theirs."""
    plain = logprobs.completion_logprobs
    own = make(plain)

    def chosen(model, *args, **options):
        return (own if model.training else plain)(model, *args, **options)

    monkeypatch.setattr(logprobs, "completion_logprobs", chosen)


def replace_model(policy, model):
    """What samplers read of a policy, with another model."""
    names = ("tokenizer", "eos_ids", "ends", "pad_id")
    return SimpleNamespace(model=model, **{name: getattr(policy, name) for name in names})
