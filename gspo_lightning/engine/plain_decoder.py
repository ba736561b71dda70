"""Decode with a model's own key-value cache: for models that ``GroupDecoder`` cannot read.

Decides how rows share a batch that is padded on the left, and when finished ones leave it. Works
for every model that fills a cache, recurrent layers included.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from gspo_lightning.engine.drawing import NotDecodable, draw, listed
from gspo_lightning.engine.padded import forward_arguments
from gspo_lightning.engine.turns import Turns, with_given

COMPACT_BELOW = 7 / 8  # share of running rows under which finished rows leave the batch


@torch.no_grad()
def decode_plainly(
    policy: Any,
    prompt_ids: Tensor,
    prompt_mask: Tensor,
    groups: Tensor,
    uniform: Tensor,
    temperature: float,
    stopped: Callable[[int, int], bool] | None = None,
    *,
    alone: bool = False,
    turns: Turns | None = None,
    first_row: int = 0,
) -> tuple[Tensor, Tensor]:
    """Complete prompts, each read once.

    Args:
        policy: Has ``model``, ``eos_ids`` and ``pad_id``.
        prompt_ids: Token ids, padded on the left, (P, L) int64.
        prompt_mask: True on real tokens, (P, L) bool.
        groups: The prompt of each row, ascending, repeats allowed, (N,) int64.
        uniform: Numbers in [0, 1) that decide each token, (N, T).
        temperature: Divides the logits.
        stopped: Told each row's new token, whether a stop string ends the row there.
        alone: Leave mask and positions of a single row to the model, as some know no others.
        turns: Gives rows tokens where they end a turn, and knows stop strings then; ``None`` where
            the first end of a row is its last.
        first_row: The number in ``turns`` of the first of these rows.

    Returns:
        Token ids (N, T) and their log-probs (N, T) float32, both arbitrary behind the end.

    Raises:
        NotDecodable: If the model has no key-value cache.
        FloatingPointError: If the logits are not finite.
    """
    model, limit = policy.model, uniform.shape[1]
    first, last = int(groups.min()), int(groups.max()) + 1
    prompt_mask = prompt_mask[first:last]
    start = int(prompt_mask.int().argmax(1).min())  # padding that all these prompts share
    prompt_mask = prompt_mask[:, start:]
    options: dict[str, Any] = {"logits_to_keep": 1}
    if not alone:
        options["attention_mask"] = prompt_mask.long()
    if counted := not alone and "position_ids" in forward_arguments(model):
        options["position_ids"] = (prompt_mask.cumsum(1) - 1).clamp(min=0)
    output = model(input_ids=prompt_ids[first:last, start:], use_cache=True, **options)
    cache = getattr(output, "past_key_values", None)
    if cache is None:
        raise NotDecodable(
            "it gives no past_key_values; only models with a key-value cache can be sampled from"
        )
    if not torch.equal(groups, torch.arange(first, last, device=groups.device)):
        cache.reorder_cache(groups - first)  # also of recurrent layers
    logits = output.logits[groups - first, -1]
    # one mask for the whole decode; each step reads one column more of it
    length = prompt_mask.shape[1]
    mask = prompt_mask.new_ones(len(groups), length + limit).long()
    mask[:, :length] = prompt_mask[groups - first]
    position = mask[:, :length].sum(1)
    eos = torch.tensor(policy.eos_ids, device=groups.device)
    ids = torch.full((len(groups), limit), policy.pad_id, device=groups.device)
    logprobs = torch.zeros(ids.shape, device=ids.device)
    rows = torch.arange(len(groups), device=groups.device)  # the row of ids behind each
    running = torch.ones_like(rows, dtype=torch.bool)
    for t in range(limit):
        token, logprob = draw(logits, uniform[rows, t], temperature)
        if turns is not None:
            numbers = [first_row + row for row in rows.tolist()]
            token = with_given(turns.given(numbers), token)
        newest = listed(token)
        ids[rows[running], t] = token[running]
        logprobs[rows[running], t] = logprob[running]
        if turns is not None:
            going = running.nonzero()[:, 0].tolist()
            over = turns.over([numbers[i] for i in going], [newest[i] for i in going])
            for i, end in zip(going, over, strict=True):
                running[i] = not end
        else:
            running = running & ~torch.isin(token, eos)
        if stopped is not None:
            news = zip(running.tolist(), rows.tolist(), newest, strict=True)
            goes_on = [on and not stopped(row, token_id) for on, row, token_id in news]
            running = torch.tensor(goes_on, device=running.device)
        num_running = int(running.sum())
        if num_running == 0 or t + 1 == limit:
            break
        if num_running <= COMPACT_BELOW * len(running):
            keep = running.nonzero()[:, 0]
            cache.reorder_cache(keep)
            rows, token, mask = rows[keep], token[keep], mask[keep]
            position, running = position[keep], running[keep]
        options = {} if alone else {"attention_mask": mask[:, : length + t + 1]}
        if counted:
            options["position_ids"] = (position + t)[:, None]
        output = model(input_ids=token[:, None], past_key_values=cache, use_cache=True, **options)
        cache, logits = output.past_key_values, output.logits[:, -1]
    return ids, logprobs
