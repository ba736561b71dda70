"""Which weights hold a NaN or an infinity.

Decides how they are looked at: one pass over each tensor, one wait for the device. Leaves out what
becomes of it (``checkpoint``) and the steps that are at fault before the weights move (``faults``).
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor


def broken_weights(named: Iterable[tuple[str, Tensor]]) -> list[str]:
    """Names of the trained tensors with a value that is not finite; of a sharded one the part here.

    >>> weight = torch.nn.Parameter(torch.tensor([1.0, torch.inf]))
    >>> broken_weights([("weight", weight)])
    ['weight']
    """
    parts = {name: _part(tensor) for name, tensor in named if tensor.requires_grad}
    parts = {name: part for name, part in parts.items() if part.numel()}
    if not parts:
        return []
    # ten times as fast as isfinite; both ends, as their difference could overflow by itself
    ends = [torch.stack(torch.aminmax(part)).float() for part in parts.values()]
    fine = torch.stack([pair.to(ends[0].device) for pair in ends]).isfinite().all(1).tolist()
    return [name for name, good in zip(parts, fine, strict=True) if not good]


def _part(tensor: Tensor) -> Tensor:
    local = tensor.to_local() if hasattr(tensor, "to_local") else tensor
    return local.detach()
