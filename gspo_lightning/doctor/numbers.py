"""Examines the numbers an update starts from: ratio, KL, noise, and the gradient's invariance.

Everything goes through the module's own forward and backward passes, in the precision of the run.
Of several ranks each makes as many of them as the others, on completions of its own. Decides the
tolerances. Takes no step and leaves no gradient behind. Advantages are made up, since flat groups
would leave no gradient to compare.
"""

from collections.abc import Iterable
from contextlib import nullcontext
from dataclasses import dataclass, fields, replace
from typing import Any, cast

import torch
from torch import Tensor, nn

from gspo_lightning.doctor.findings import Finding
from gspo_lightning.guards.health import what_fits
from gspo_lightning.kl import kl_estimate
from gspo_lightning.logprobs import LogProbs, samples_logprobs
from gspo_lightning.loss import LossChoices, micro_loss
from gspo_lightning.masked import masked_mean
from gspo_lightning.objectives import importance_log_ratio, token_weights
from gspo_lightning.rollout import Rollout, Samples
from gspo_lightning.sharding.ranks import weights_of

DROPOUTS = tuple(kind for name, kind in vars(nn).items() if "Dropout" in name)
ROWS = 16  # completions that noise and KL are measured on
PADDING = 8  # tokens; with masked columns attention takes another path through its kernels
GRADIENT_ROWS = 8  # completions whose gradient is computed in several cuts
# Largest difference of a gradient entry, over the largest entry. Float32 keeps 7 digits and loses
# two in the sums of a deep model; bfloat16 keeps less than 3, and TF32 about as few.
TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-3, torch.bfloat16: 0.1}
# Mean KL of equal weights: half the squared rounding error of a log-prob.
KL_TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-6, torch.bfloat16: 1e-2}


@dataclass(frozen=True)
class Cut:
    """One gradient: in which micro-batches, its tensors, log s and clip fractions on the way."""

    size: int
    gradients: list[Tensor]
    log_ratios: Tensor
    clipped: float


def dtype_of(module: Any, trainer: Any) -> torch.dtype:
    """The coarsest type that the run computes in: of the weights, or of autocast."""
    if "16" in str(trainer.precision):
        return torch.bfloat16
    return next(module.policy.parameters()).dtype


def configured_size(module: Any, data: Any) -> int:
    """Completions per forward and backward pass in the run; of ranks that differ, the fewest."""
    minibatch = data.prompts_per_rollout * module.sampler.group_size // module.num_minibatches
    own = max(1, min(module.micro_batch_size or minibatch, minibatch))
    return int(-over_ranks(module, -own))


def over_ranks(module: Any, number: float) -> float:
    """The largest of the numbers of all ranks; NaN if one is. Every rank must call."""
    if getattr(module._trainer, "world_size", 1) == 1:
        return number
    return module.all_gather(torch.tensor(float(number), device=module.device)).max().item()


def own_part(tensor: Tensor) -> Tensor:
    """What this rank holds of a tensor, in the same memory."""
    return cast(Any, tensor).to_local() if hasattr(tensor, "to_local") else tensor


def largest_entry(tensors: Iterable[Tensor]) -> float:
    """The largest absolute value in what this rank holds of tensors; NaN if one is there."""
    entries = [part.abs().max() for part in map(own_part, tensors) if part.numel()]
    return torch.stack(entries).max().item() if entries else 0.0


def dropout(policy: Any) -> Finding:
    """Find dropout that is still on: with it two passes over the same rows differ."""
    parts = policy.model.named_modules()
    layers = [name for name, part in parts if isinstance(part, DROPOUTS) and part.p > 0]
    if layers:
        text = f"{len(layers)} layers drop values at random, the first is {layers[0]}"
        remedy = "set their rates to 0 in config.json of policy.path: the ratio would not be 1"
        return Finding("dropout", "error", text, remedy, layers)
    return Finding("dropout", "ok", "off everywhere")


def spread(total: int, count: int) -> Tensor:
    """At most ``count`` numbers below ``total``, evenly spread: prompts of all lengths occur.

    >>> spread(8, 4).tolist()
    [0, 2, 5, 7]
    """
    return torch.linspace(0, total - 1, min(count, total)).round().long()


def rows_of(groups: Tensor, size: int) -> Tensor:
    """The rows of some groups of this size.

    >>> rows_of(torch.tensor([0, 2]), 3).tolist()
    [0, 1, 2, 6, 7, 8]
    """
    return (groups[:, None] * size + torch.arange(size)).flatten()


def logprobs_in_run(module: Any, samples: Samples, **options: bool) -> LogProbs:
    """Log-probs as the update computes them."""
    return samples_logprobs(module.policy.model, samples, module.sampler.temperature, **options)


def as_rollout(
    module: Any, samples: Samples, advantages: Tensor | None = None, with_ref: bool = True
) -> Rollout:
    """Samples as a rollout; advantages are made up unless given."""
    if advantages is None:
        advantages = torch.linspace(-1, 1, len(samples))
    advantages = advantages.to(samples.mask.device)
    with torch.no_grad(), weights_of(module._trainer).apart():
        old = logprobs_in_run(module, samples).logprobs
        ref = None
        if with_ref and module.reference is not None:
            ref = module.reference.logprobs(samples, module.sampler.temperature).to(old.device)
        values = None
        if module.critic is not None:
            pieces = samples.micro_batch_indices(None)
            values = module.critic.old_values(module.policy.model, samples, pieces)
    return Rollout(
        **{field.name: getattr(samples, field.name) for field in fields(Samples)},
        old_logprobs=old,
        old_known=torch.zeros_like(samples.finished),  # no step yet: the first pass replaces them
        ref_logprobs=ref,
        rewards=torch.zeros(len(samples), device=old.device),
        reward_parts={},
        advantages=advantages[:, None].expand_as(samples.mask),
        values=values,
        returns=None if values is None else values + advantages[:, None],
    )


def gradient(module: Any, rollout: Rollout, size: int, choices: LossChoices | None = None) -> Cut:
    """The gradient of one optimizer step, ``size`` rows at a time, by the update's code.

    ``choices`` are the module's, unless others are given. Without gradients enabled there are none.
    """
    choices = choices or module.choices
    aggregation, limit = module.objective.aggregation, module.sampler.max_new_tokens
    weights = token_weights(rollout.mask, aggregation, limit)
    wanted = torch.is_grad_enabled()
    parameters = [p for p in module.policy.parameters() if p.requires_grad and wanted]
    module.policy.zero_grad(set_to_none=True)
    log_ratios, clipped = [], 0.0
    # Without a backward pass ranks would keep whole weights, which an optimizer must not see.
    passes = nullcontext() if wanted else weights_of(module._trainer).apart()
    try:
        with passes:
            for micro, part in zip(rollout.micro_batches(size), weights.split(size), strict=True):
                found = logprobs_in_run(module, micro, with_entropy=True)
                value = None
                if module.critic is not None:
                    value = module.critic.loss(module.policy.model, micro, part).loss
                loss = micro_loss(*found, micro, part, choices, value)
                if wanted:
                    module.manual_backward(loss.total)
                own = found.logprobs.detach(), loss.old, micro.mask
                log_ratios.append(importance_log_ratio(*own, "sequence")[:, 0].float().cpu())
                clipped = max(clipped, loss.clip.clip_fraction_sequences.item())
        gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
    finally:
        module.policy.zero_grad(set_to_none=True)
    return Cut(size, gradients, torch.cat(log_ratios), clipped)


def first_step(
    module: Any, trainer: Any, data: Any, samples: Samples, rows: int = GRADIENT_ROWS
) -> list[Finding]:
    """Ratio and clip fraction of the first step, and the same gradient in several cuts.

    The rows are as few as fit where one configured micro-batch fits twice, and at most ``rows``.
    """
    size = configured_size(module, data)
    rollout = as_rollout(module, samples.select(spread(len(samples), min(rows, 2 * size))))
    whole = gradient(module, rollout, len(rollout))
    sizes = sorted({1, min(size, len(rollout))} - {len(rollout)})
    return [
        start_ratio(whole.log_ratios.exp(), whole.clipped),
        invariance(whole, (gradient(module, rollout, s) for s in sizes), trainer, module),
    ]


def start_ratio(ratios: Tensor, clipped: float) -> Finding:
    """The first mini-batch has its own log-probs for old ones: ratio 1, to the last bit."""
    off = (ratios - 1).abs().max().item()
    value = {"largest_difference_from_1": off, "clip_fraction": clipped}
    if off or clipped:
        text = f"up to {off:.1e} from 1 before any step, {clipped:.0%} clipped"
        remedy = "the policy is not the one that sampled: look for dropout or a changing module"
        return Finding("ratio", "error", text, remedy, value)
    return Finding("ratio", "ok", "exactly 1 before the first step, nothing clipped", value=value)


def invariance(whole: Cut, cuts: Any, trainer: Any, module: Any) -> Finding:
    """Compare gradients of the same rows: cuts and padding must not matter."""
    largest = over_ranks(module, largest_entry(whole.gradients))
    tolerance = TOLERANCE[dtype_of(module, trainer)]
    rows = len(whole.log_ratios)
    if not largest > 0:
        text = f"is {largest} everywhere for {rows} completions with made-up advantages"
        remedy = "no loss term reaches a trained weight; see policy.lora and requires_grad"
        return Finding("gradient", "error", text, remedy, {"largest": largest})
    differences = {}
    for cut in cuts:  # one at a time: each is as large as the model
        pairs = zip(whole.gradients, cut.gradients, strict=True)
        own = largest_entry(own_part(a) - own_part(b) for a, b in pairs)
        differences[cut.size] = over_ranks(module, own) / largest
    worst = max(differences.values(), default=0.0)
    value = {"rows": rows, "differences": differences, "tolerance": tolerance}
    sizes = " and ".join(map(str, differences))
    text = (
        f"{rows} completions at once and {sizes} at a time differ by {worst:.1e} of the largest "
        f"entry (tolerance {tolerance:.0e})"
    )
    if not worst <= tolerance:
        remedy = (
            "the model mixes the rows of a batch, or reads padding: try policy.attention eager, "
            "float32, or another architecture"
        )
        return Finding("gradient", "error", text, remedy, value)
    return Finding("gradient", "ok", text, value=value)


def with_longer_prompt(samples: Samples) -> Samples:
    """The same rows and one more, whose prompt is longer by ``PADDING`` tokens: padding for all.

    The last row of the result is the new one; of its completion one token counts, and its prompt
    grows by no more than a completion, so that it stays within the model's positions. Groups are
    given up: no prompt is computed for several rows.
    """
    columns = max(1, min(PADDING, samples.mask.shape[1] - 1))
    rows = torch.cat([torch.arange(len(samples)), torch.zeros(1, dtype=torch.long)])
    more = samples.select(rows)
    ids = nn.functional.pad(more.prompt_ids, (columns, 0))
    prompt_mask = nn.functional.pad(more.prompt_mask, (columns, 0))
    ids[-1] = torch.where(prompt_mask[-1], ids[-1], ids[-1, -1])
    prompt_mask[-1] = True
    mask = more.mask.clone()
    mask[-1, 1:] = False
    return replace(more, prompt_ids=ids, prompt_mask=prompt_mask, mask=mask, group_size=1)


def noise(module: Any, data: Any, samples: Samples, most: int = ROWS) -> Finding:
    """What rounding does to the log-ratio of unchanged weights, beside the clip range.

    Measured on ``most`` completions, at the lengths that they have.

    Twice: the same batches again, with and without a graph, which is what ``policy/ratio_noise``
    measures in a run; and the same completions with other padding. The latter tells the size of a
    rounding error. Errors cancel while no weight has moved, so that the former may be 0, and no
    longer after the smallest step, as then every activation may round the other way.
    """
    level, size = module.objective.ratio, configured_size(module, data)
    group = samples.group_size  # whole groups, as in a rollout; of different prompts
    rows = rows_of(spread(len(samples) // group, max(1, most // group)), group)[:most]
    same: list[Tensor] = []
    other: list[Tensor] = []
    with weights_of(module._trainer).apart():
        for part in (samples.select(index) for index in rows.split(size)):
            graph = logprobs_in_run(module, part).logprobs.detach()
            with torch.no_grad():
                again = logprobs_in_run(module, part, with_entropy=True).logprobs
                longer = with_longer_prompt(part)
                # Run the rows padded: packed ones have the same bits whatever else is in the batch.
                apart = logprobs_in_run(module, longer, packed=False).logprobs[:-1]
            for values, moved in ((same, again), (other, apart)):
                log_ratio = importance_log_ratio(graph, moved, part.mask, level)
                whole = level.startswith("sequence")  # then every column holds the same
                values.append(log_ratio[:, 0] if whole else log_ratio[part.mask])
    width = module.objective.clip_width
    here, there = (torch.cat(v).square().mean().sqrt().item() for v in (same, other))
    tokens = samples.select(rows).mask.sum(1).float().mean().item()
    value = {"same_batches": here, "other_batches": there, "clip_range": width, "tokens": tokens}
    text = (
        f"log-ratio of unchanged weights at {tokens:.0f} tokens: {here:.1e} in the same batches, "
        f"{there:.1e} with other padding; clip range {width:.1e}"
    )
    if (most_of_it := max(here, there)) > width / 3:
        fits = what_fits(most_of_it, module.objective, tokens)
        remedy = f"above a third of the range, the clip follows rounding: {fits}"
        return Finding("ratio noise", "warning", text, remedy, value)
    return Finding("ratio noise", "ok", text, value=value)


@torch.no_grad()
def start_kl(module: Any, trainer: Any, samples: Samples, rows: int = ROWS) -> Finding:
    """KL against the reference before any step: 0 for the policy's own start."""
    if module.reference is None:
        return Finding("kl", "ok", "no reference, so no KL is measured")
    part = samples.select(spread(len(samples), rows))
    with weights_of(module._trainer).apart():
        old = torch.cat([logprobs_in_run(module, row).logprobs for row in part.micro_batches(1)])
        ref = module.reference.logprobs(part, module.sampler.temperature).to(old.device)
    kl = masked_mean(kl_estimate(old, ref, "k3"), part.mask, dim=1).mean().item()
    types = [dtype_of(module, trainer), next(module.reference.model.parameters()).dtype]
    tolerance = max(KL_TOLERANCE[dtype] for dtype in types)
    value = {"kl": kl, "tolerance": tolerance}
    if not kl <= tolerance:
        text = f"starts at {kl:.3g} nats per token, not at 0: the reference is another model"
        if module.reference.path is not None:
            text += f" ({module.reference.path})"
        remedy = (
            "leave reference.path out for the policy's own start; if another one is meant, set the "
            "KL target above this"
        )
        return Finding("kl", "error", text, remedy, value)
    return Finding("kl", "ok", f"{kl:.1e} nats per token at the start", value=value)
