"""What every supervised step does beside its loss: set the learning rate, log the curves.

Decides when and against what curves are logged. What a module gives to ``self.log`` reaches the
loggers only after the callbacks have saved: a kill in between would lose the point, as the step is
in the checkpoint and does not run again.
"""

import math
from typing import Any

from gspo_lightning.guards.trainer import leave_out_noise
from gspo_lightning.optim import set_learning_rate

leave_out_noise()  # here: a Trainer begins to talk as it is made


def set_rate_and_log(module: Any, metrics: dict[str, Any], batch_size: int) -> None:
    """Set the step's learning rate and log it with the metrics against the optimizer steps before.

    Args:
        module: A LightningModule with automatic optimization and an ``optimizer_config``, inside of
            ``training_step``.
        metrics: Numbers by name; callbacks find them in ``trainer.callback_metrics``.
        batch_size: Examples in the batch.
    """
    trainer, config = module.trainer, module.optimizer_config
    total = num_optimizer_steps(trainer)
    rate = set_learning_rate(trainer.optimizers[0], config, trainer.global_step, total)
    metrics = {f"train/{name}": number for name, number in metrics.items()}
    metrics["train/learning_rate"] = rate
    batches, every = trainer.accumulate_grad_batches, trainer.log_every_n_steps
    ends_step = (trainer.fit_loop.epoch_loop.batch_idx + 1) % batches == 0 or trainer.is_last_batch
    if ends_step and every and (trainer.global_step + 1) % every == 0:
        values = {name: float(value) for name, value in metrics.items()}
        for logger in trainer.loggers:
            logger.log_metrics(values, step=trainer.global_step)
    module.log_dict(metrics, logger=False, prog_bar=True, batch_size=batch_size)


def num_optimizer_steps(trainer: Any) -> int | None:
    """Optimizer steps of a whole supervised run; None if neither data nor Trainer bounds it.

    Worked out here: ``trainer.estimated_stepping_batches`` would build the training loader early,
    and a resumed run would then lose its position in the data.

    Args:
        trainer: Its data gives the batches per epoch as ``num_steps``.
    """
    bounds = [trainer.max_steps] if trainer.max_steps >= 0 else []
    batches = getattr(getattr(trainer, "datamodule", None), "num_steps", None)
    if batches is not None and trainer.max_epochs is not None and trainer.max_epochs >= 0:
        bounds.append(math.ceil(batches / trainer.accumulate_grad_batches) * trainer.max_epochs)
    return min(bounds) if bounds else None
