"""Callbacks that keep what a run computed."""

from typing import ClassVar

import torch
from lightning.pytorch import Callback


class Outputs(Callback):
    """Keeps what each rollout handed to the callbacks."""

    def __init__(self):
        self.all = []

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        self.all.append(outputs)


class Steps(Callback):
    """Keeps the gradient, flat, of every optimizer step, before it is clipped."""

    def __init__(self):
        self.gradients = []

    def on_before_optimizer_step(self, trainer, module, optimizer):
        parameters = [p for p in module.policy.parameters() if p.requires_grad]
        self.gradients.append(torch.cat([p.grad.flatten() for p in parameters]).clone())


class Logged(Callback):
    """Keeps a logged value of every optimizer step."""

    def __init__(self, name):
        self.name = name
        self.values = []

    def on_train_batch_end(self, trainer, *_):
        if trainer.global_step > len(self.values):
            self.values.append(float(trainer.callback_metrics[self.name]))


class Probe(Callback):
    """Keeps what a run computed."""

    outputs: ClassVar[list] = []
    start: ClassVar[list] = []
    end: ClassVar[list] = []

    def on_train_start(self, trainer, module):
        type(self).outputs = []
        type(self).start = [p.detach().clone() for p in module.policy.parameters()]

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        self.outputs.append(outputs)

    def on_train_end(self, trainer, module):
        type(self).end = [p.detach().clone() for p in module.policy.parameters()]
