"""A module, a loader and callbacks with the shape of the real ones, in milliseconds."""

import os
import signal

import torch
from lightning.pytorch import Callback, LightningDataModule, LightningModule
from torch import nn


class Stream:
    """Sized and stateful; row numbers in an order that depends on the position alone."""

    def __init__(self, length: int):
        self.length = length
        self.served = 0

    def __len__(self) -> int:
        return self.length

    def __iter__(self):
        while True:
            self.served += 2
            yield torch.tensor([self.served - 2.0, self.served - 1.0])

    def state_dict(self) -> dict:
        return {"served": self.served}

    def load_state_dict(self, state: dict) -> None:
        self.served = state["served"]


class Rows:
    """Two batches; a plain list would count as two loaders."""

    def __len__(self) -> int:
        return 2

    def __iter__(self):
        return iter([torch.ones(2), torch.zeros(2)])


class DummyData(LightningDataModule):
    def __init__(self, num_rollouts: int = 6, with_val: bool = True):
        super().__init__()
        self.num_rollouts = num_rollouts
        self.with_val = with_val

    def train_dataloader(self):
        return Stream(self.num_rollouts)

    def val_dataloader(self):
        return Rows() if self.with_val else []

    def predict_dataloader(self):
        return Rows()


class DummyModule(LightningModule):
    """Several optimizer steps per batch, noise from the rollout index, a frozen model, a schedule.

    Args:
        learning_rate: Of AdamW.
        steps_per_rollout: Optimizer steps per batch.
        fail_at: Rollout whose first optimizer step is followed by an error.
        kill_at: Rollout whose first optimizer step is followed by SIGKILL to this process.
        interrupt_at: The same with a KeyboardInterrupt.
    """

    def __init__(
        self,
        learning_rate: float = 0.01,
        steps_per_rollout: int = 4,
        fail_at: int | None = None,
        kill_at: int | None = None,
        interrupt_at: int | None = None,
        automatic: bool = False,
    ):
        super().__init__()
        if learning_rate <= 0:
            raise ValueError(f"learning_rate must be above 0, got {learning_rate}")
        self.automatic_optimization = automatic
        self.learning_rate = learning_rate
        self.steps_per_rollout = steps_per_rollout
        self.events = {"fail": fail_at, "kill": kill_at, "interrupt": interrupt_at}
        torch.manual_seed(0)
        self.policy = nn.Linear(2, 2)
        self.frozen = {"reference": nn.Linear(2, 2)}
        self.kl_coef = 0.1

    def configure_optimizers(self):
        optimizer = torch.optim.AdamW(self.policy.parameters(), lr=self.learning_rate)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step))
        return [optimizer], [schedule]

    def loss(self, batch, index: int, step: int):
        generator = torch.Generator().manual_seed(1000 * index + step)
        noise = torch.randn(2, generator=generator)
        return (self.policy(batch + noise) ** 2).mean() * (1 + self.kl_coef)

    def training_step(self, batch, batch_idx: int):
        index = self.trainer.fit_loop.total_batch_idx
        if self.automatic_optimization:
            loss = self.loss(batch, index, 0)
        else:
            optimizer = self.optimizers()
            for step in range(self.steps_per_rollout):
                loss = self.loss(batch, index, step)
                optimizer.zero_grad()
                self.manual_backward(loss)
                optimizer.step()
                self._event(index)
            self.lr_schedulers().step()
        self._event(index)
        metrics = {"train/loss": loss.item(), "train/served": batch[1].item()}
        metrics["optim/learning_rate"] = self.trainer.optimizers[0].param_groups[0]["lr"]
        for logger in self.trainer.loggers:
            logger.log_metrics(metrics, step=index + 1)
        self.log("train/late", loss.detach())  # reaches the loggers behind on_train_batch_end
        return {"loss": loss, "index": index}

    def _event(self, index: int) -> None:
        if index == self.events["fail"]:
            raise RuntimeError("the reward function broke")
        if index == self.events["kill"]:
            os.kill(os.getpid(), signal.SIGKILL)
        if index == self.events["interrupt"]:
            raise KeyboardInterrupt

    def validation_step(self, batch, batch_idx: int):
        self.log("val/size", self.policy(batch).abs().mean(), batch_size=2)

    def on_validation_epoch_end(self):
        if not self.trainer.sanity_checking:
            for logger in self.trainer.loggers:  # at the place of the rollout before it
                step = self.trainer.fit_loop.total_batch_idx + 1
                logger.log_metrics({"val/coefficient": self.kl_coef}, step=step)

    def predict_step(self, batch, batch_idx: int):
        return self.policy(batch)


class SetupFails(DummyModule):
    def setup(self, stage: str) -> None:
        raise ValueError("reference.device: cuda:1 is not there; use cpu")


class Coefficient(Callback):
    """Owns `kl_coef`, as AdaptiveKL does, and changes it after every rollout."""

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        pl_module.kl_coef *= 1.1

    def on_validation_end(self, trainer, pl_module):
        if not trainer.sanity_checking:
            pl_module.kl_coef += 0.01

    def state_dict(self) -> dict:
        return {"kl_coef": self._module.kl_coef}

    def load_state_dict(self, state: dict) -> None:
        self._module.kl_coef = state["kl_coef"]

    def setup(self, trainer, pl_module, stage):
        self._module = pl_module


class Stopper(Callback):
    """Stops the run by itself after some rollouts."""

    def __init__(self, after: int):
        self.after = after

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if trainer.fit_loop.total_batch_idx + 1 == self.after:
            trainer.should_stop = True


class Signaller(Callback):
    """Sends signals to this process at one moment of the run.

    Args:
        at: Name of the hook.
        number: The signal.
        rollout: Number of the rollout at that moment, from 1; -1 before training.
        times: How often.
        rank: The rank that it is sent to.
    """

    def __init__(self, at: str, number: int, rollout: int = 2, times: int = 1, rank: int = 0):
        self.rank = rank
        self.sent, self.number, self.rollout, self.times = 0, number, rollout, times
        setattr(self, at, self._send)

    def _send(self, trainer, *_, **__):
        done = -1 if trainer.sanity_checking else trainer.fit_loop.total_batch_idx + 1
        while trainer.global_rank == self.rank and done == self.rollout and self.sent < self.times:
            self.sent += 1
            os.kill(os.getpid(), self.number)


class Refused(Callback):
    """Writes a file that the system refuses, in a hook from the third rollout on."""

    at = "on_train_end"
    error: Exception = OSError()

    def on_train_batch_end(self, trainer, *_):
        self._write("on_train_batch_end", trainer)

    def on_train_end(self, trainer, *_):
        self._write("on_train_end", trainer)

    def _write(self, hook, trainer):
        if hook == self.at and trainer.fit_loop.total_batch_idx >= 2:
            raise self.error


class FailsOnRank(Callback):
    """A mistake of the user's on one rank alone, while the others wait for it.

    Args:
        rank: That rank.
        error: `one line` for an error with a line of its own, `killed` for SIGKILL, `ours` for any
            other.
    """

    def __init__(self, rank: int, error: str = "one line"):
        self.rank = rank
        self.error = error

    def on_before_optimizer_step(self, trainer, *_):
        if trainer.global_rank == self.rank and trainer.fit_loop.total_batch_idx == 2:
            if self.error == "one line":
                raise FloatingPointError("the loss is nan")
            if self.error == "killed":
                os.kill(os.getpid(), signal.SIGKILL)
            raise RuntimeError("the module broke")


class SavesHyperparameters(DummyModule):
    def __init__(self, learning_rate: float = 0.01):
        super().__init__(learning_rate)
        self.save_hyperparameters()


class Other(DummyModule):
    def __init__(self):
        super().__init__()
        self.head = nn.Linear(2, 1)


class Killer(Callback):
    """SIGKILL to this process before the second optimizer step of a rollout."""

    def __init__(self, at: int):
        self.at = at
        self.steps = 0

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        if trainer.fit_loop.total_batch_idx == self.at:
            self.steps += 1
            if self.steps == 2:
                os.kill(os.getpid(), signal.SIGKILL)
