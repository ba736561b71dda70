"""Draw tokens from logits.

Decides how a token is drawn: by inverting the cumulative distribution with one uniform number per
row, which is faster than ``multinomial`` and makes a row independent of its batch. The vocabulary
is summed in blocks first, so that running sums, which cost many times what sums do, are only over
the blocks and within one of them.
"""

import torch
from torch import Tensor

BROKEN = -1  # the id where logits are not finite


class NotDecodable(Exception):
    """A model cannot be decoded in the way that was tried; the message says why."""


def draw(logits: Tensor, uniform: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """Draw one token a row.

    Args:
        logits: (N, V).
        uniform: Uniform numbers in [0, 1), (N,).
        temperature: Divides the logits; 0 takes the most likely token.

    Returns:
        Token ids, (N,) int64, and their log-probs under the tempered distribution in nats, (N,)
        float32; at temperature 0 all of it is on one token and the log-prob is 0. A token of
        probability 0 is never drawn. Where logits are not finite the id is -1, which
        :func:`listed` refuses: looking here would be one more wait for a device at each token.

    >>> logits = torch.tensor([[0.5, 0.25, 0.25]]).log().expand(3, 3)
    >>> tokens, logprobs = draw(logits, torch.tensor([0.49, 0.51, 0.99]), temperature=1.0)
    >>> tokens.tolist(), logprobs.exp()
    ([0, 1, 2], tensor([0.5000, 0.2500, 0.2500]))
    """
    if temperature == 0:
        largest, token = logits.max(-1)
        token = token.masked_fill(~largest.isfinite(), BROKEN)
        return token, torch.zeros_like(largest, dtype=torch.float32)
    size, vocabulary = logits.shape
    width = 1 << ((vocabulary.bit_length() + 1) // 2)  # of a block: about the square root
    num_blocks = -(-vocabulary // width)
    # the only float32 copy of the logits; columns behind the vocabulary get probability 0
    weights = logits.new_empty((size, num_blocks * width), dtype=torch.float32)
    weights[:, vocabulary:] = 0
    inside = weights[:, :vocabulary]
    largest = logits.amax(-1, keepdim=True).float()
    torch.sub(logits, largest, out=inside)
    if temperature != 1:
        inside.mul_(1 / temperature)
    inside.exp_()

    cumulative = weights.view(size, num_blocks, width).sum(-1).cumsum(-1)
    total = cumulative[:, -1:]
    point = _below(uniform[:, None] * total, total)
    block = torch.searchsorted(cumulative, point, right=True)
    block.clamp_(max=num_blocks - 1)  # where logits are not finite
    # the weight in all blocks before the chosen one: the point lies that far from its start
    before = cumulative.gather(1, (block - 1).clamp_(min=0)).masked_fill_(block == 0, 0)
    first = torch.arange(0, size * num_blocks, num_blocks, device=logits.device)
    within = weights.view(-1, width).index_select(0, first + block[:, 0]).cumsum(-1)
    place = torch.searchsorted(within, _below(point - before, within[:, -1:]), right=True)
    token = (block * width + place).clamp_(max=vocabulary - 1)
    logprob = (logits.gather(1, token).float() - largest) / temperature - total.log()
    return token.masked_fill_(~total.isfinite(), BROKEN)[:, 0], logprob[:, 0]


def listed(token: Tensor) -> list[int]:
    """The ids of drawn tokens, (N,), once the device has them.

    Raises:
        FloatingPointError: If the logits of one were not finite.
    """
    ids = token.tolist()
    if BROKEN in ids:
        raise FloatingPointError("the policy's logits are not finite; its weights are broken")
    return ids


def _below(point: Tensor, total: Tensor) -> Tensor:
    """Keep a point under the total: rounding must not lead past the last possible token."""
    return torch.minimum(point, total.nextafter(torch.zeros_like(total)))
