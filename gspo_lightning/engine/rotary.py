"""Rotary embeddings whose frequencies depend on the longest text of a forward pass.

Transformers takes the frequencies of longrope (Phi-3 and its kin) and of dynamic scaling from the
largest position of a call, so that a short text beside a long one, or a text that grows while it is
sampled, would have other numbers than alone. Decides that a run has one set of frequencies, that of
its longest text, as servers of such models have it: then no number depends on a batch.
"""

import inspect
import logging
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from gspo_lightning.engine.padded import unwrapped

log = logging.getLogger(__name__)

BEYOND = 4  # times `max_position_embeddings`: dynamic scaling begins where that ends


def fix_rotary(model: Any, longest: int, *others: Any) -> None:
    """Let every text have the frequencies that a text of ``longest`` tokens has, and say so.

    Args:
        model: A transformers model, also within peft; models without such an embedding stay as
            they are.
        longest: Tokens of the longest text that the model will see.
        others: Further models that read the same texts, or ``None``.
    """
    lines = [_fix(unwrapped(each), longest) for each in (model, *others) if each is not None]
    for line in dict.fromkeys(line for line in lines if line is not None):
        log.warning(line)


def _fix(base: Any, longest: int) -> str | None:
    """Fix a model's embeddings; the line to say, or ``None`` where nothing was to be done."""
    known, limit = base.__dict__, rotary_limit(base)
    known["_gspo_longest"] = longest  # trials reach beyond what begins before that
    if limit is None or longest <= limit:
        return None
    limit = known.setdefault("_gspo_rotary_own_limit", limit)
    known["_gspo_rotary_limit"] = longest  # a longer text would still change them
    for module in _rotaries(base):
        own = module.__dict__.pop("_gspo_own_forward", module.forward)
        module.__dict__["_gspo_own_forward"] = own
        module.forward = partial(_as_in_a_text_of, longest, own)
    return (
        f"{type(base).__name__}: its rotary embedding depends on the length beyond {limit:,} "
        f"tokens; texts here may have {longest:,}, and all of them are read with the frequencies "
        "of that length"
    )


def rotary_limit(base: Any) -> int | None:
    """The most tokens of a text up to which frequencies stay; ``None`` where they always stay.

    After :func:`fix_rotary` that is the longest text that it was told of.
    """
    known = base.__dict__
    if "_gspo_rotary_limit" not in known:
        limits = [_limit(module) for module in _rotaries(base)]
        known["_gspo_rotary_limit"] = min((x for x in limits if x is not None), default=None)
    return known["_gspo_rotary_limit"]


def check_rotary(base: Any, longest: int) -> None:
    """Refuse texts for which the frequencies would change within a run.

    Raises:
        ValueError: If a text may be longer than the frequencies are good for.
    """
    limit = rotary_limit(base)
    if limit is not None and longest > limit:
        raise ValueError(
            f"{type(base).__name__}: its rotary embedding is another one beyond {limit:,} tokens, "
            f"and a text here may have {longest:,}; lower the lengths, or call "
            "gspo_lightning.engine.rotary.fix_rotary(model, longest) before the first pass"
        )


def forget_lengths(base: Any) -> None:
    """Let the next text have frequencies of its own: dynamic scaling keeps the longest one's."""
    for module in _rotaries(base):
        for kind in _kinds(module):
            _first(module, 2, **kind)


def _rotaries(base: Any) -> Iterator[nn.Module]:
    for module in getattr(base, "modules", tuple)():
        if "Rotary" in type(module).__name__ and "position_ids" in _arguments(module):
            yield module


def _arguments(module: nn.Module) -> list[str]:
    return list(inspect.signature(type(module).forward).parameters)


def _limit(module: Any) -> int | None:
    """The largest text whose first positions are as in a short one, found by trying."""
    config = getattr(module, "config", None)  # a model's own code may have none here
    most = BEYOND * (getattr(config, "max_position_embeddings", None) or 2**17)

    def changes(length: int) -> bool:
        return any(
            not torch.equal(_first(module, length, **kind), _first(module, 2, **kind))
            for kind in _kinds(module)
        )

    if not changes(most):
        return None
    low, high = 2, most
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if changes(middle) else (middle, high)
    return low


def _kinds(module: Any) -> list[dict[str, Any]]:
    """The arguments beside positions that an embedding is called with: of each kind of layer."""
    if "layer_type" not in _arguments(module):
        return [{}]
    return [{"layer_type": kind} for kind in module.rope_type]


@torch.no_grad()
def _first(module: Any, length: int, **options: Any) -> Tensor:
    """What the embedding gives for positions 0 and 1 of a text of ``length`` tokens."""
    device = next(iter(module.buffers()), torch.empty(0)).device
    found = module(
        torch.zeros(1, 1, 1, device=device),
        torch.tensor([[0, 1, length - 1]], device=device),
        **options,
    )
    return torch.cat([torch.view_as_real(x) if x.is_complex() else x for x in _parts(found)])[:, :2]


def _parts(found: Any) -> tuple[Tensor, ...]:
    return found if isinstance(found, tuple) else (found,)


def _as_in_a_text_of(
    longest: int, forward: Callable[..., Any], x: Tensor, *args: Any, **kw: Any
) -> Any:
    """Call a rotary embedding with one position more, the last of a text of ``longest`` tokens."""
    positions = kw.pop("position_ids") if "position_ids" in kw else args[0]
    last = positions.new_full((*positions.shape[:-1], 1), longest - 1)
    found = forward(x, torch.cat([positions, last], -1), *args[1:], **kw)
    parts = tuple(part[..., :-1, :] for part in _parts(found))
    return parts if isinstance(found, tuple) else parts[0]
