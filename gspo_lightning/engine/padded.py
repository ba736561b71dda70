"""Run a causal language model on padded rows, a group's prompt in a cache that its rows share.

The way for models whose attention cannot be had from outside, so that tokens cannot be packed; and
on one row at a time, for those that cannot be padded either. Decides what is cut off and what is
computed once.
"""

import inspect
from typing import Any

import torch
from torch import Tensor, nn


def run_padded(
    model: nn.Module,
    prompt_ids: Tensor,
    prompt_mask: Tensor,
    completion_ids: Tensor,
    context: Tensor,
    mask: Tensor,
    group_size: int,
) -> tuple[Any, Tensor, Tensor, int]:
    """Run a model on padded rows, cut to what any row needs.

    Args:
        model: A causal language model.
        prompt_ids: Left-padded, (B, L) int64.
        prompt_mask: True on real prompt tokens, (B, L) bool.
        completion_ids: Right-padded, (B, T) int64.
        context: True on the completion tokens that are part of the text, (B, T) bool.
        mask: True on those whose log-probs are wanted, (B, T) bool.
        group_size: Rows that share a prompt, side by side; 1 shares none.

    Returns:
        The model's output; which states of its last columns, flattened, predict wanted tokens;
        where these stand in a flattened (B, T); and the number of these last columns.
    """
    forward = forward_arguments(model)
    start = int(prompt_mask.any(dim=0).int().argmax())  # padding that all prompts share
    columns = max(1, int(context.any(dim=0).sum()))
    # the last prompt token predicts the first completion token; nothing follows the last one
    ids = torch.cat([prompt_ids[:, start:], completion_ids[:, : columns - 1]], dim=1)
    attention_mask = torch.cat([prompt_mask[:, start:], context[:, : columns - 1]], dim=1).long()
    position_ids = (attention_mask.cumsum(dim=1) - 1).clamp(min=0)
    unread = prompt_ids.shape[1] - start - 1  # tokens whose logits nobody needs

    def run(rows: slice, columns: slice, num_logits: int, **cache: Any) -> Any:
        if "position_ids" in forward:  # some models count positions by themselves
            cache["position_ids"] = position_ids[rows, columns]
        if "logits_to_keep" in forward:
            cache["logits_to_keep"] = num_logits
        mask = attention_mask[rows, : columns.stop]  # also over what is already in the cache
        return model(input_ids=ids[rows, columns], attention_mask=mask, **cache)

    every, end = slice(None), ids.shape[1]
    output = None
    if group_size > 1 and unread > 0 and not checkpoints(model):
        prompt = run(slice(None, None, group_size), slice(0, unread), 1, use_cache=True)
        cache: Any = getattr(prompt, "past_key_values", None)
        if _holds_attention_only(cache):
            cache.batch_repeat_interleave(group_size)
            output = run(every, slice(unread, end), columns, use_cache=True, past_key_values=cache)
    if output is None:
        output = run(every, slice(0, end), columns, use_cache=False)
    kept = mask[:, :columns]
    row, column = kept.nonzero().unbind(1)
    return output, row * columns + column, row * mask.shape[1] + column, columns


def run_alone(
    model: nn.Module,
    prompt_ids: Tensor,
    prompt_mask: Tensor,
    completion_ids: Tensor,
    context: Tensor,
    mask: Tensor,
) -> tuple[list[Any], list[int], Tensor, Tensor]:
    """Run a model on one text at a time, as anyone would, for models that read no others right.

    Arguments are those of :func:`run_padded`.

    Returns:
        The outputs of all passes; how many of the last columns count in each; which of the states
        in these columns, all passes joined, predict wanted tokens; and where these tokens stand in
        a flattened (B, T).
    """
    kept = "logits_to_keep" in forward_arguments(model)
    counts = context.sum(1).tolist()
    rows = [row for row, count in enumerate(counts) if count] or [0]
    outputs, columns, source, target, end = [], [], [], [], 0
    for row in rows:
        count = max(1, counts[row])
        prompt = prompt_ids[row][prompt_mask[row]]
        ids = torch.cat([prompt, completion_ids[row, : count - 1]])[None]
        options = {"logits_to_keep": count} if kept else {}
        outputs.append(model(input_ids=ids, use_cache=False, **options))
        columns.append(count)
        wanted = mask[row, :count].nonzero()[:, 0]
        source.append(wanted + end)
        target.append(wanted + row * mask.shape[1])
        end += count
    return outputs, columns, torch.cat(source), torch.cat(target)


def checkpoints(model: nn.Module) -> bool:
    """Whether a model recomputes its activations in the backward pass."""
    return any(getattr(part, "gradient_checkpointing", False) for part in model.modules())


def _holds_attention_only(cache: Any) -> bool:
    """Whether a cache is keys and values alone, full or windowed, so that rows can be repeated.

    Recurrent layers (of hybrids such as Qwen3-Next, Jamba or LFM2) keep a state that is written in
    place, through which no gradient passes; other classes of cache hold what is not known here.
    """
    standard = type(cache).__name__ == "DynamicCache"
    return standard and not any(hasattr(layer, "conv_states") for layer in cache.layers)


def forward_arguments(model: Any) -> set[str]:
    """The arguments that a model's forward names, also behind wrappers that take ``**kwargs``."""
    return set(inspect.signature(unwrapped(model).forward).parameters)


def unwrapped(model: Any) -> Any:
    """The causal language model within ``torch.compile`` and peft."""
    model = getattr(model, "_orig_mod", model)
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def text_config(model: Any) -> Any:
    """The config of a model's layers of text, which models of several kinds of input nest."""
    config = unwrapped(model).config
    return config.get_text_config() if hasattr(config, "get_text_config") else config
