"""Attention of new tokens to a cache that lies where it is, by torch's kernel for a graphics card.

Decides when the kernel is asked: it reads as many tokens of each row as there are, so that nothing
is masked, padded, repeated or copied, in one launch where a softmax written out takes twenty.
"""

from typing import Any

import torch
from torch import Tensor

LARGEST_HEAD = 256  # numbers
kernel = (
    torch.ops.aten._flash_attention_forward
)  # torch's public name for it has no `seqused_k` yet


def fits(query: Tensor, window: int | None, seen: int, **options: Any) -> bool:
    """Whether the kernel computes this: half precision, no cap, no sinks, nothing out of sight.

    Args:
        query: (..., head size).
        window: Tokens that a token sees, itself included; ``None`` is all.
        seen: Tokens that there are to see at most.
        options: Those of :class:`gspo_lightning.engine.attention.Attend`.
    """
    return (
        query.is_cuda
        and query.dtype in (torch.bfloat16, torch.float16)
        and query.shape[-1] <= LARGEST_HEAD
        and query.shape[-1] % 8 == 0
        and (window is None or window >= seen)
        and options.get("softcap") is None
        and options.get("s_aux") is None
    )


def attend(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    tokens: int,
    lengths: Tensor,
    seen: int,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """Attend from the same number of tokens to each of the first slots of a cache; all is seen.

    Args:
        query: ``tokens`` for each slot, (n * tokens, heads, d).
        keys: (slots, key-value heads, T, d), contiguous.
        values: Likewise.
        tokens: New tokens of a slot.
        lengths: Tokens in each slot that are read, 1 at least, (n,) int32.
        seen: The most of them, or more.
        scale: Multiplies the scores.

    Returns:
        (n * tokens, heads, d), and the log of the sum of each softmax, (heads, n * tokens) float32:
        what two parts of a text need to meet in one softmax.
    """
    count, (_, heads, room, _) = len(lengths), keys.shape
    ends = torch.arange(count + 1, dtype=torch.int32, device=query.device)
    output, total, *_ = kernel(
        query,
        _in_rows(keys),
        _in_rows(values),
        ends * tokens,
        ends * (heads * room),  # where each slot begins, in rows of one head
        tokens,
        seen,
        0.0,
        False,
        False,
        scale=scale,
        seqused_k=lengths,
    )
    return output, total


def meet(near: tuple[Tensor, Tensor], far: tuple[Tensor, Tensor]) -> Tensor:
    """The attention to both parts of a text, from that to each.

    Args:
        near: Output (N, heads, d), log of the sum of its softmax (heads, N).
        far: Likewise.

    Returns:
        (N, heads, d).

    >>> one, two = torch.tensor([[[1.0]]]), torch.tensor([[[5.0]]])
    >>> round(meet((one, torch.tensor([[3.0]]).log()), (two, torch.zeros(1, 1))).item(), 5)
    2.0
    """
    share = torch.sigmoid(near[1] - far[1]).T[..., None]
    return torch.lerp(far[0].to(share.dtype), near[0].to(share.dtype), share).to(near[0].dtype)


def _in_rows(cache: Tensor) -> Tensor:
    """(slots, heads, T, d) as rows of tokens and heads, where a token's next head is T rows on."""
    slots, heads, room, size = cache.shape
    rows = slots * heads * room - (heads - 1) * room
    return cache.as_strided((rows, heads, size), (size, room * size, 1))
