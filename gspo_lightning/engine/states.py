"""Run a model on prompts and completions, for the states that the wanted tokens are predicted from.

Decides that a model is run in the best way that ``probe`` has found for it, and without its output
embedding where that can be had apart.
"""

from contextlib import nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from gspo_lightning.engine.head import Head, find_head
from gspo_lightning.engine.packing import pack, run_packed
from gspo_lightning.engine.padded import run_alone, run_padded, unwrapped
from gspo_lightning.engine.probe import reading, say_once, some_ids
from gspo_lightning.engine.rotary import check_rotary, rotary_limit


class States(NamedTuple):
    """What the wanted tokens are predicted from.

    Attributes:
        states: Hidden states (n, D), or logits (n, V) if there is no head.
        target: Where the tokens stand in a flattened (B, T), (n,).
        head: Makes logits of hidden states, or None.
    """

    states: Tensor
    target: Tensor
    head: Head | None


def predicting_states(
    model: nn.Module,
    prompt_ids: Tensor,
    prompt_mask: Tensor,
    completion_ids: Tensor,
    mask: Tensor,
    *,
    group_size: int = 1,
    packed: bool = True,
    with_head: bool = True,
) -> States:
    """Run the model, without its output embedding if that can be had apart.

    Other arguments and errors are those of :func:`gspo_lightning.logprobs.completion_logprobs`.

    Args:
        with_head: False for layers without an output embedding, ``model(...)`` then returns
            ``.last_hidden_state``.

    Returns:
        One state for each wanted token. With no wanted token at all ``target`` is empty and
        ``states`` has one row, which keeps the graph.
    """
    if group_size < 1 or len(mask) % group_size:
        raise ValueError(f"group_size must divide the {len(mask)} rows, got {group_size}")
    if not prompt_mask[:, -1].all():
        raise ValueError("prompt_mask must end in True in every row: prompts are left-padded")
    # a token before a wanted one is context even if it does not count itself
    context = mask.flip(1).cumsum(1).flip(1) > 0
    limit = rotary_limit(unwrapped(model))
    if limit is not None and prompt_ids.shape[1] + mask.shape[1] > limit:  # with padding
        check_rotary(unwrapped(model), int((prompt_mask.sum(1) + context.sum(1)).max()))
    way = reading(model, prompt_ids.device, packed=packed)
    head = _head(model, prompt_ids.device) if with_head else None
    # any id may stand in the padding, also one without an embedding
    completion_ids = torch.where(context, completion_ids, 0)
    prompt_ids = torch.where(prompt_mask, prompt_ids, 0)
    batch = prompt_ids, prompt_mask, completion_ids, context, mask
    catching: Any = nullcontext([]) if head is None else head.caught()
    with catching as caught:
        if way == "packed":
            row = pack(*batch)
            outputs, columns = [run_packed(model, row)], [row.ids.shape[1]]
            source, target = row.source, row.target
        elif way == "alone":
            outputs, columns, source, target = run_alone(model, *batch)
        else:
            size = group_size if way == "shared" else 1
            output, source, target, width = run_padded(model, *batch, size)
            outputs, columns = [output], [width]
    if head is not None:
        passes = caught[-len(outputs) :]
    else:
        passes = [x.logits if with_head else x.last_hidden_state for x in outputs]
    parts = [x[:, -count:].flatten(0, 1) for x, count in zip(passes, columns, strict=True)]
    states = parts[0] if len(parts) == 1 else torch.cat(parts)
    return States(states[source if len(target) else source.new_zeros(1)], target, head)


def _head(model: Any, device: torch.device) -> Head | None:
    """The model's head, if it can be had apart; where it cannot, that is said once."""
    base = unwrapped(model)
    if not hasattr(base, "get_input_embeddings"):
        return None
    found = find_head(base, some_ids(base, 1, 7).to(device))
    if isinstance(found, Head):
        return found
    say_once(base, f": the logits of all positions are in memory at once: {found}")
    return None
