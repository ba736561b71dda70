"""Run a model on prompts and completions, for the states that the wanted tokens are predicted from.

Decides how a model is run, by trying it once: on packed rows where its attention is open to us,
otherwise padded, a group's prompt in a cache that its completions share; and without its output
embedding where that can be had apart. What a model cannot do is said once.
"""

import logging
from contextlib import nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from gspo_lightning.engine.head import Head, find_head
from gspo_lightning.engine.packed_attention import LAYERS, PREFIX
from gspo_lightning.engine.packing import Row, pack
from gspo_lightning.engine.padded import run_padded, unwrapped

LOG = logging.getLogger(__name__)
PROBE = (4, 3)  # tokens of prompt and completion that a model is tried on


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
    head = _head(model, prompt_ids.device) if with_head else None
    packed = packed and _can_pack(model, prompt_ids.device)
    # any id may stand in the padding, also one without an embedding
    completion_ids = torch.where(context, completion_ids, 0)
    prompt_ids = torch.where(prompt_mask, prompt_ids, 0)
    batch = prompt_ids, prompt_mask, completion_ids, context, mask
    catching: Any = nullcontext([]) if head is None else head.caught()
    with catching as caught:
        if packed:
            row = pack(*batch)
            output = run_packed(model, row)
            source, target, columns = row.source, row.target, row.ids.shape[1]
        else:
            output, source, target, columns = run_padded(model, *batch, group_size)
    if head is not None:
        states = caught[-1]
    else:
        states = output.logits if with_head else output.last_hidden_state
    states = states[:, -columns:].flatten(0, 1)
    return States(states[source if len(target) else source.new_zeros(1)], target, head)


def run_packed(model: nn.Module, row: Row, **options: Any) -> Any:
    """Run a model on a packed row; it must have an open attention."""
    return model(
        input_ids=row.ids,
        # of four dimensions: the model passes such a mask on unread and makes none of its own
        attention_mask=row.ids.new_ones(1, 1, 1, 1),
        position_ids=row.position_ids,
        use_cache=False,
        attend=row.attend,
        **options,
    )


def _head(model: Any, device: torch.device) -> Head | None:
    """The model's head, if it can be had apart; where it cannot, that is said once."""
    base = unwrapped(model)
    if not hasattr(base, "get_input_embeddings"):
        return None
    found = find_head(base, _probe_ids(base, 1, sum(PROBE)).to(device))
    if isinstance(found, Head):
        return found
    _say_once(base, f"the logits of all positions are in memory at once: {found}")
    return None


def _can_pack(model: Any, device: torch.device) -> bool:
    """Whether a model can be run on packed rows; where it cannot, that is said once."""
    base = unwrapped(model)
    config = getattr(base, "config", None)
    if config is None:
        return False
    name = str(getattr(config, "_attn_implementation", None))
    kinds = set(getattr(config, "layer_types", None) or ())
    if not name.startswith(PREFIX):
        reason = f"its attention ({name}) takes none of ours"
    elif not kinds <= LAYERS:
        reason = f"it has layers of {', '.join(sorted(kinds - LAYERS))}"
    else:
        if "_gspo_packs" not in base.__dict__:
            base.__dict__["_gspo_packs"] = _packs(model, base, device)
        if base.__dict__["_gspo_packs"] is True:
            return True
        reason = base.__dict__["_gspo_packs"]
    _say_once(base, f"rows are padded, not packed: {reason}")
    return False


@torch.no_grad()
def _packs(model: Any, base: Any, device: torch.device) -> bool | str:
    """Run three short texts packed and one by one: True if both give the same, else why not."""
    ids = _probe_ids(base, 3, sum(PROBE)).to(device)
    ids[1, : PROBE[0]] = ids[0, : PROBE[0]]  # two texts of one prompt, one of another
    ids[2, :2] = 0
    prompt_mask = torch.ones(3, PROBE[0], dtype=torch.bool, device=device)
    prompt_mask[2, :2] = False
    on = torch.ones(3, PROBE[1], dtype=torch.bool, device=device)
    row = pack(ids[:, : PROBE[0]], prompt_mask, ids[:, PROBE[0] :], on, on)
    try:
        with torch.autocast(device.type, enabled=False):  # the weights' own precision
            together = run_packed(model, row, output_hidden_states=True).hidden_states[-1]
            alone = [
                model(input_ids=text[None], use_cache=False, output_hidden_states=True)
                for text in (ids[0], ids[1], ids[2, 2:])
            ]
    except (AttributeError, IndexError, RuntimeError, TypeError, ValueError) as error:
        if "memory" in str(error):  # the device is full, which says nothing about the model
            raise
        return f"it cannot be run on packed rows ({error})"
    expected = torch.cat([output.hidden_states[-1][0, -PROBE[1] - 1 : -1] for output in alone])
    distance = (together[0, row.source] - expected).float().norm() / expected.float().norm()
    # an attention that reaches into other texts is wrong by far more than rounding
    if distance < (1e-3 if torch.finfo(expected.dtype).bits >= 32 else 0.1):
        return True
    return f"packed rows give other values, by {distance:.1e} of theirs"


def _probe_ids(base: Any, rows: int, columns: int) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    vocabulary = base.get_input_embeddings().weight.shape[0]
    return torch.randint(vocabulary, (rows, columns), generator=generator)


def _say_once(base: Any, message: str) -> None:
    said = base.__dict__.setdefault("_gspo_said", set())
    if message not in said:
        said.add(message)
        LOG.warning("%s: %s", type(base).__name__, message)
