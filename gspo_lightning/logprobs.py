"""Log-probs and entropy of completions under a causal language model.

Decides what "the log-prob of a token" is: log-softmax of the logits over the temperature, float32,
position ids counted in each text from its first real token. Any model with the forward of a Hugging
Face causal language model will do; dropout must be off.
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from gspo_lightning.engine.head import token_logprobs
from gspo_lightning.engine.states import predicting_states
from gspo_lightning.rollout import Samples


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
    chunk_size: int | None = None,
    with_entropy: bool = False,
    packed: bool = True,
) -> LogProbs:
    """Compute the log-prob of each completion token, with a gradient where gradients are on.

    Args:
        model: Causal language model; ``model(input_ids, attention_mask, ...)`` returns ``.logits``.
        prompt_ids: Left-padded, (B, L) int64.
        prompt_mask: True on real prompt tokens, (B, L) bool; the last column is all True.
        completion_ids: Right-padded, (B, T) int64.
        mask: Tokens whose log-prob is wanted, (B, T) bool.
        temperature: Sampling temperature the logits are divided by, > 0.
        group_size: Rows g * G to g * G + G - 1 share a prompt, for models that cannot be packed:
            it is then computed once per group, unless the model checkpoints its activations
            (Hugging Face models drop their cache then). Packed rows find out by themselves.
        chunk_size: Token positions whose float32 logits exist at the same time; ``None`` is 256
            on a CPU and 1024 elsewhere.
        with_entropy: Also return the exact entropy, with its gradient.
        packed: Pack rows if the model can be packed. False pads them: the same numbers with other
            rounding.

    Returns:
        (B, T) results in float32 (float64 for a float64 model).

    Raises:
        ValueError: If an argument is out of range or the prompts are not left-padded.
    """
    if temperature <= 0:
        raise ValueError(f"temperature must be > 0, got {temperature}")
    if chunk_size is not None and chunk_size < 1:
        raise ValueError(f"chunk_size must be at least 1 token, got {chunk_size}")
    found = predicting_states(
        model,
        prompt_ids,
        prompt_mask,
        completion_ids,
        mask,
        group_size=group_size,
        packed=packed,
    )
    if len(found.target) == 0:  # zeros, but of a graph with all parameters
        logits = found.states if found.head is None else found.head.logits(found.states)
        nothing = logits.sum().to(torch.promote_types(logits.dtype, torch.float32)) * 0
        nothing = nothing.expand(mask.shape)
        return LogProbs(nothing, nothing if with_entropy else None)
    chosen, entropy = token_logprobs(
        found.states,
        completion_ids.flatten()[found.target],
        found.head,
        temperature=temperature,
        with_entropy=with_entropy,
        chunk_size=chunk_size,
    )

    def spread(values: Tensor) -> Tensor:
        zeros = values.new_zeros(mask.numel())
        return zeros.index_copy(0, found.target, values).view(mask.shape)

    return LogProbs(spread(chosen), None if entropy is None else spread(entropy))


def samples_logprobs(
    model: nn.Module,
    samples: Samples,
    temperature: float,
    *,
    with_entropy: bool = False,
    packed: bool = True,
) -> LogProbs:
    """The log-probs of samples under a model on their device; see :func:`completion_logprobs`."""
    return completion_logprobs(
        model,
        samples.prompt_ids,
        samples.prompt_mask,
        samples.completion_ids,
        samples.mask,
        temperature=temperature,
        group_size=samples.group_size,
        with_entropy=with_entropy,
        packed=packed,
    )
