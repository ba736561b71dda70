"""Log-probs and entropy of completions under a causal language model.

Decides what "the log-prob of a token" is: log-softmax of the logits over the temperature, float32,
position ids counted from the attention mask. Padding that a whole batch shares is cut off, the
head runs on completion positions only, float32 copies of the logits live for one chunk at a time,
and a group's prompt is computed once. Leaves out loading the model and the mode it is in (dropout
must be off); any model with the forward of a Hugging Face causal language model will do.
"""

import inspect
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint


class LogProbs(NamedTuple):
    """Per-token results, 0 under a False mask.

    Attributes:
        logprobs: Log-prob of each completion token, nats, (B, T) float32.
        entropy: Entropy of the distribution each token was drawn from, nats, (B, T), or None.
    """

    logprobs: Tensor
    entropy: Tensor | None


def completion_logprobs(
    model: nn.Module,
    prompt_ids: Tensor,
    prompt_mask: Tensor,
    completion_ids: Tensor,
    mask: Tensor,
    *,
    temperature: float = 1.0,
    group_size: int = 1,
    chunk_size: int = 1024,
    with_entropy: bool = False,
) -> LogProbs:
    """Compute the log-prob of each completion token, with a gradient where gradients are on.

    Args:
        model: Causal language model; ``model(input_ids, attention_mask, ...)`` returns ``.logits``.
        prompt_ids: Left-padded, (B, L) int64.
        prompt_mask: True on real prompt tokens, (B, L) bool; the last column is all True.
        completion_ids: Right-padded, (B, T) int64.
        mask: Tokens whose log-prob is wanted, (B, T) bool.
        temperature: Sampling temperature the logits are divided by, > 0.
        group_size: Rows g * G to g * G + G - 1 share a prompt, which is then computed once per
            group. Ignored, at the same values, while the model checkpoints its activations
            (Hugging Face models drop their cache then).
        chunk_size: Token positions whose float32 logits exist at the same time.
        with_entropy: Also return the exact entropy, with its gradient.

    Returns:
        (B, T) results in float32 (float64 for a float64 model).

    Raises:
        ValueError: If an argument is out of range or the prompts are not left-padded.
    """
    if temperature <= 0:
        raise ValueError(f"temperature must be > 0, got {temperature}")
    if chunk_size < 1:
        raise ValueError(f"chunk_size must be at least 1 token, got {chunk_size}")
    if group_size < 1 or len(mask) % group_size:
        raise ValueError(f"group_size must divide the {len(mask)} rows, got {group_size}")
    if not prompt_mask[:, -1].all():
        raise ValueError("prompt_mask must end in True in every row: prompts are left-padded")

    full_length = mask.shape[1]
    start = int(prompt_mask.any(dim=0).int().argmax())  # padding that all prompts share
    prompt_ids, prompt_mask = prompt_ids[:, start:], prompt_mask[:, start:]
    # a token before a wanted one is context even if it does not count itself
    context = mask.flip(1).cumsum(1).flip(1) > 0
    length = max(1, int(context.any(dim=0).sum()))  # one column at least: the graph must exist
    completion_ids, context, keep = (
        completion_ids[:, :length],
        context[:, :length],
        mask[:, :length],
    )
    # any id may stand in the padding, also one without an embedding
    completion_ids = torch.where(context, completion_ids, 0)
    prompt_ids = torch.where(prompt_mask, prompt_ids, 0)

    logits = _completion_logits(model, prompt_ids, prompt_mask, completion_ids, context, group_size)
    # split, not slices: the gradients of all chunks meet in one concatenation
    pieces = zip(
        logits.reshape(-1, logits.shape[-1]).split(chunk_size),
        completion_ids.flatten().split(chunk_size),
        keep.flatten().split(chunk_size),
        strict=True,
    )
    # recomputed in backward, so that no float32 (B, T, V) is kept
    results = [
        checkpoint(
            _token_logprobs,
            *piece,
            temperature,
            with_entropy,
            use_reentrant=False,
            preserve_rng_state=False,
        )
        for piece in pieces
    ]

    def gathered(parts: tuple[Tensor, ...]) -> Tensor:
        return nn.functional.pad(torch.cat(parts).view_as(keep), (0, full_length - length))

    logprobs, entropy = zip(*results, strict=True)
    return LogProbs(gathered(logprobs), gathered(entropy) if with_entropy else None)


def _completion_logits(
    model: nn.Module,
    prompt_ids: Tensor,
    prompt_mask: Tensor,
    completion_ids: Tensor,
    context: Tensor,
    group_size: int,
) -> Tensor:
    """Return the logits that predict the completion tokens, (B, T, V), in the model's dtype."""
    # the last prompt token predicts the first completion token; nothing follows the last one
    ids = torch.cat([prompt_ids, completion_ids[:, :-1]], dim=1)
    attention_mask = torch.cat([prompt_mask, context[:, :-1]], dim=1).long()
    position_ids = (attention_mask.cumsum(dim=1) - 1).clamp(min=0)
    forward = forward_arguments(model)
    head = prompt_ids.shape[1] - 1  # tokens whose logits nobody needs

    def run(rows: slice, columns: slice, num_logits: int, **cache: Any) -> Any:
        if "position_ids" in forward:  # some models count positions by themselves
            cache["position_ids"] = position_ids[rows, columns]
        if "logits_to_keep" in forward:
            cache["logits_to_keep"] = num_logits
        mask = attention_mask[rows, : columns.stop]  # also over what is already in the cache
        return model(input_ids=ids[rows, columns], attention_mask=mask, **cache)

    every, end, length = slice(None), ids.shape[1], completion_ids.shape[1]
    checkpointed = any(getattr(part, "gradient_checkpointing", False) for part in model.modules())
    if group_size > 1 and head > 0 and not checkpointed:
        prompt = run(slice(None, None, group_size), slice(0, head), 1, use_cache=True)
        cache: Any = getattr(prompt, "past_key_values", None)
        if _holds_attention_only(cache):
            cache.batch_repeat_interleave(group_size)
            behind = run(every, slice(head, end), length, use_cache=True, past_key_values=cache)
            return behind.logits[:, -length:]
    return run(every, slice(0, end), length, use_cache=False).logits[:, -length:]


def _holds_attention_only(cache: Any) -> bool:
    """Whether a cache is keys and values alone, full or windowed, so that rows can be repeated.

    Recurrent layers (of hybrids such as Qwen3-Next, Jamba or LFM2) keep a state that is written in
    place, through which no gradient passes; other classes of cache hold what is not known here.
    """
    standard = type(cache).__name__ == "DynamicCache"
    return standard and not any(hasattr(layer, "conv_states") for layer in cache.layers)


def forward_arguments(model: Any) -> set[str]:
    """The arguments that a model's forward names, also behind wrappers that take ``**kwargs``."""
    model = getattr(model, "_orig_mod", model)  # torch.compile
    model = model.get_base_model() if hasattr(model, "get_base_model") else model  # peft
    return set(inspect.signature(model.forward).parameters)


def _token_logprobs(
    logits: Tensor, ids: Tensor, keep: Tensor, temperature: float, with_entropy: bool
) -> tuple[Tensor, Tensor | None]:
    """Return log-prob and entropy, (n,) each, of n positions with logits (n, V)."""
    # before the softmax: NaN in a padded position must not reach the gradient either
    logits = logits.masked_fill(~keep[:, None], 0)
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32)) / temperature
    distribution = logits.log_softmax(dim=-1)
    chosen = distribution.gather(-1, ids[:, None]).squeeze(-1)
    entropy = -(distribution.exp() * distribution).sum(-1) if with_entropy else None
    return (
        chosen.masked_fill(~keep, 0),
        None if entropy is None else entropy.masked_fill(~keep, 0),
    )
