"""What a model must not do in train mode.

The ratio of GSPO compares the same weights at two times, and sampling runs in eval mode: whatever
is random in train mode, or only other there (dropout, jitter of a router, layers left out, weights
clamped), would move the ratio off 1 before the first step. Decides that a model always computes
what it computes in eval mode.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

from torch import nn

from gspo_lightning.engine.padded import text_config, unwrapped

RATES = "drop"  # in names of attributes: dropout, pdrop, layerdrop, drop_path


def stay_in_eval_mode(model: Any) -> None:
    """Let ``train()`` switch nothing on but the recomputing of activations, and no dropout ever.

    Transformers recomputes only in layers that are in train mode. Rates are set to 0 as well, as
    such a layer may drop something itself.
    """
    base = unwrapped(model)
    for module in model.modules():
        if isinstance(module, nn.modules.dropout._DropoutNd):  # alpha and feature dropout, too
            module.p = 0.0
        for name, value in vars(module).items():
            if isinstance(value, float) and RATES in name:
                setattr(module, name, 0.0)
    base.train = partial(_train, base)
    base.train(base.training)


def _train(base: nn.Module, mode: bool = True) -> nn.Module:
    """Stands in for a model's ``train``; the model itself says which mode was asked for."""
    for module in base.modules():
        module.training = mode and getattr(module, "gradient_checkpointing", False)
    base.training = mode
    return base


def raise_flags(module: nn.Module) -> None:
    """Mark all parts as in train mode: Lightning warns of others when a fit begins.

    Nothing may be computed until ``module.train()`` has set the mode itself.
    """
    for part in module.modules():
        part.training = True


@contextmanager
def mode_kept(model: nn.Module) -> Iterator[None]:
    """Give every part its mode back that it had before."""
    before = {part: part.training for part in model.modules()}
    try:
        yield
    finally:
        for part, training in before.items():
            part.training = training


def leave_routers_out(model: nn.Module) -> None:
    """Keep a mixture of experts from its auxiliary loss, which is no part of the objective here.

    ``output_router_logits: true`` in a config would make every forward compute it, from masks that
    packed rows do not have. The config stays as it is, for an export.
    """
    base = unwrapped(model)
    if hasattr(base, "config") and getattr(text_config(base), "output_router_logits", False):
        base.register_forward_pre_hook(_without_router_logits, with_kwargs=True)


def _without_router_logits(_: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
    return args, kwargs | {"output_router_logits": False}
