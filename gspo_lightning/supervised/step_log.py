"""A supervised step: its learning rate, and its curves, logged before a checkpoint can be written.

Decides when and against what they are logged. What a module gives to `self.log` reaches the loggers
only after the callbacks have saved: a kill in between would lose the point, as the step is in the
checkpoint and does not run again.
"""

from typing import Any

from gspo_lightning.optim import num_optimizer_steps, set_learning_rate


def set_rate(module: Any) -> float:
    """Give the optimizer the learning rate of this step, and return it."""
    trainer = module.trainer
    return set_learning_rate(
        trainer.optimizers[0],
        module.optimizer_config,
        module.global_step,
        num_optimizer_steps(trainer),
    )


def log_step(module: Any, metrics: dict[str, Any], batch_size: int) -> None:
    """Log the metrics of a training step with the optimizer steps taken before it as axis.

    Args:
        module: A LightningModule with automatic optimization, inside of `training_step`.
        metrics: Numbers by name; callbacks find them in `trainer.callback_metrics`.
        batch_size: Examples in the batch.
    """
    trainer = module.trainer
    batches, every = trainer.accumulate_grad_batches, trainer.log_every_n_steps
    ends_step = (trainer.fit_loop.epoch_loop.batch_idx + 1) % batches == 0 or trainer.is_last_batch
    if ends_step and every and (trainer.global_step + 1) % every == 0:
        values = {name: float(value) for name, value in metrics.items()}
        for logger in trainer.loggers:
            logger.log_metrics(values, step=trainer.global_step)
    module.log_dict(metrics, logger=False, prog_bar=True, batch_size=batch_size)
