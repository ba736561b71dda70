"""Sums and means under a mask.

Decides how a padded tensor is reduced: what lies under a False mask is replaced before any
arithmetic, so that NaN or infinity there does no harm, and reductions run in float32 at least.
"""

import torch
from torch import Tensor


def masked_sum(x: Tensor, mask: Tensor, dim: int | tuple[int, ...] | None = None) -> Tensor:
    """Sum the selected entries.

    Args:
        x: Values, any shape and dtype.
        mask: Bool, broadcastable to the shape of ``x``; False entries are left out.
        dim: Dimension(s) to reduce; all of them if None.

    Returns:
        The sum, float32 (float64 if ``x`` is); 0 where nothing is selected.

    >>> masked_sum(torch.tensor([1.0, 2.0, float("nan")]), torch.tensor([True, True, False]))
    tensor(3.)
    """
    # where() and no product: NaN * 0 is NaN, in the value and in the gradient.
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    return torch.where(mask, x, torch.zeros((), dtype=x.dtype, device=x.device)).sum(dim)


def masked_mean(x: Tensor, mask: Tensor, dim: int | tuple[int, ...] | None = None) -> Tensor:
    """Average the selected entries.

    Args:
        x: Values, any shape and dtype.
        mask: Bool, broadcastable to the shape of ``x``; False entries are left out.
        dim: Dimension(s) to reduce; all of them if None.

    Returns:
        The mean, float32 (float64 if ``x`` is); 0 where nothing is selected.

    >>> mask = torch.tensor([[True, True], [False, False]])
    >>> masked_mean(torch.tensor([[1.0, 3.0], [5.0, 7.0]]), mask, dim=1)
    tensor([2., 0.])
    """
    count = mask.expand_as(x).sum(dim).clamp(min=1)
    return masked_sum(x, mask, dim) / count
