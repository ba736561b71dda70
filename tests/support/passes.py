"""Log-probs of a rollout computed the slow way, and the count of tokens that passes compute."""

import math

import torch

from gspo_lightning.engine import probe
from gspo_lightning.logprobs import completion_logprobs


def inputs(rollout):
    names = ("prompt_ids", "prompt_mask", "completion_ids", "mask")
    return tuple(getattr(rollout, name) for name in names)


def loop(model, rollout, temperature=1.0):
    """Row by row, token by token, without padding, cache or chunks; float64."""
    shape = rollout.mask.shape
    logprobs, entropy = torch.zeros(shape).double(), torch.zeros(shape).double()
    with torch.no_grad():
        for i, kept in enumerate(rollout.mask):
            ids = rollout.prompt_ids[i][rollout.prompt_mask[i]]
            for t in range(int(kept.sum())):
                logits = model(ids[None]).logits[0, -1].double() / temperature
                total = sum(math.exp(value) for value in logits.tolist())
                chances = [math.exp(value) / total for value in logits.tolist()]
                token = rollout.completion_ids[i, t]
                logprobs[i, t] = math.log(chances[token])
                entropy[i, t] = -sum(p * math.log(p) for p in chances)
                ids = torch.cat([ids, token[None]])
    return logprobs, entropy


def tried(model):
    """The model, its ways found: what is counted from now on are no trials."""
    for way in (probe.decoding, probe.reading):  # decoding opens the attention
        way(model, next(model.parameters()).device)
    return model


def tokens_of_passes(model, rollout, **options):
    """Token ids that each forward pass is given, padding included."""
    arguments = (model, *inputs(rollout))
    completion_logprobs(*arguments, **options)  # the first pass of all tries the model out
    count = []
    hook = model.register_forward_pre_hook(
        lambda _, __, kwargs: count.append(kwargs["input_ids"].numel()), with_kwargs=True
    )
    completion_logprobs(*arguments, **options)
    hook.remove()
    return count
