"""Optimizer and learning-rate schedule: AdamW with decay groups, warm-up and decay.

The unit of a schedule is its owner's: rollouts in ``GSPOModule``, optimizer steps in
``SFTModule`` and ``RewardModelModule``.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

from torch import nn
from torch.optim import AdamW, Optimizer

from gspo_lightning.bounds import check_at_least, check_positive


@dataclass(frozen=True)
class OptimizerConfig:
    """AdamW and its schedule.

    Args:
        learning_rate: Peak learning rate.
        betas: Decay of the running mean and of the running square of the gradient.
        eps: Added to the root of the running square.
        weight_decay: Decoupled decay of matrices. Embeddings, norms and biases never decay.
        schedule: ``constant``, or a ``linear`` or ``cosine`` fall over the run.
        warmup: Length of the linear rise from 0, in the unit of the schedule.
        min_ratio: Where the fall ends, as a share of ``learning_rate``.

    Raises:
        ValueError: If a value is out of range.
    """

    learning_rate: float = 1e-6
    betas: tuple[float, float] = (0.9, 0.99)
    eps: float = 1e-8
    weight_decay: float = 0.0
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    warmup: int = 0
    min_ratio: float = 0.0

    def __post_init__(self) -> None:
        check_positive("optimizer.", learning_rate=self.learning_rate, eps=self.eps)
        if not all(0 <= beta < 1 for beta in self.betas):
            raise ValueError(f"optimizer.betas must lie in [0, 1), got {self.betas}")
        check_at_least(0, "optimizer.", weight_decay=self.weight_decay, warmup=self.warmup)
        if not 0 <= self.min_ratio <= 1:
            raise ValueError(f"optimizer.min_ratio must lie in [0, 1], got {self.min_ratio}")


def build_optimizer(
    module: nn.Module, config: OptimizerConfig, critic: nn.Module | None = None
) -> AdamW:
    """Make AdamW over the trainable parameters, matrices with decay and all else without.

    A matrix that is an embedding does not decay: its rows are looked up, and rows that a batch does
    not use would shrink for nothing.

    Args:
        module: What is trained.
        config: The settings.
        critic: Trained beside it, in groups that say so: it may have another learning rate.
    """
    groups = _parameter_groups(module, config)
    if critic is not None:
        groups += [group | {"critic": True} for group in _parameter_groups(critic, config)]
    return AdamW(groups, lr=config.learning_rate, betas=config.betas, eps=config.eps)


def _parameter_groups(module: nn.Module, config: OptimizerConfig) -> list[dict[str, Any]]:
    # A head that is tied to the embedding is the same tensor, so it does not decay either.
    embeddings = {id(m.weight) for m in module.modules() if isinstance(m, nn.Embedding)}
    decay: list[nn.Parameter] = []
    plain: list[nn.Parameter] = []
    for parameter in module.parameters():
        if parameter.requires_grad:
            matrix = parameter.ndim >= 2 and id(parameter) not in embeddings
            (decay if matrix else plain).append(parameter)
    groups = [
        {"params": decay, "weight_decay": config.weight_decay, "decays": True},
        {"params": plain, "weight_decay": 0.0, "decays": False},
    ]
    return [group for group in groups if group["params"]]


def learning_rate_factor(config: OptimizerConfig, total: int | None) -> Callable[[int], float]:
    """The schedule as a function: steps taken so far -> share of ``learning_rate``.

    Args:
        config: The settings.
        total: Length of the run in the unit of the schedule; needed unless ``constant``.

    Raises:
        ValueError: If a falling schedule has no length to fall over.

    >>> factor = learning_rate_factor(OptimizerConfig(schedule="linear", warmup=2), total=6)
    >>> [factor(step) for step in range(7)]
    [0.5, 1.0, 1.0, 0.75, 0.5, 0.25, 0.0]
    """
    if config.schedule != "constant" and total is None:
        raise ValueError(
            f"optimizer.schedule {config.schedule} needs the length of the run; set "
            "data.num_rollouts (or data.num_steps), or use constant"
        )

    def factor(step: int) -> float:
        if step < config.warmup:
            return (step + 1) / config.warmup  # the first step already moves
        if config.schedule == "constant" or total is None:
            return 1.0
        done = min((step - config.warmup) / max(1, total - config.warmup), 1.0)
        fall = 1 - done if config.schedule == "linear" else 0.5 * (1 + math.cos(math.pi * done))
        return config.min_ratio + (1 - config.min_ratio) * fall

    return factor


def set_learning_rate(
    optimizer: Optimizer,
    config: OptimizerConfig,
    step: int,
    total: int | None,
    critic_ratio: float = 1.0,
) -> float:
    """Put the numbers of ``config`` at ``step`` into ``optimizer``.

    A function of the step, so there is nothing to save; and what a checkpoint restored with the
    moments (learning rate, betas, decay) gives way to what the config says now.

    Args:
        optimizer: From :func:`build_optimizer`.
        config: The settings.
        step: Steps taken so far, in the unit of the schedule.
        total: Length of the run in that unit.
        critic_ratio: Learning rate of the critic's groups, as a multiple.

    Returns:
        The learning rate.
    """
    rate = config.learning_rate * learning_rate_factor(config, total)(step)
    for group in optimizer.param_groups:
        group["lr"] = rate * (critic_ratio if group.get("critic") else 1.0)
        group["betas"], group["eps"] = config.betas, config.eps
        group["weight_decay"] = config.weight_decay if group["decays"] else 0.0
    return rate
