"""Draw G completions for each prompt, all in one batch.

Decides how a token is drawn: by inverting the cumulative distribution with one uniform number per
(seed, row, position), so that a row's completion does not depend on which rows share its batch.
Leaves out scoring, and every log-prob that trains: those are recomputed by the update's own code.
"""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor

from gspo_lightning.logprobs import forward_arguments
from gspo_lightning.rollout import PromptBatch, Samples, completion_mask

COMPACT_BELOW = 7 / 8  # share of running rows under which finished rows leave the batch


class Sampler(Protocol):
    """Anything that completes prompts.

    ``policy`` has ``model``, ``tokenizer``, ``eos_ids`` and ``pad_id``.

    Attributes:
        group_size: G, completions per prompt.
        max_new_tokens: Longest completion, in tokens, end of sequence included.
        temperature: Divides the logits.
    """

    group_size: int
    max_new_tokens: int
    temperature: float

    def sample(self, policy: Any, batch: PromptBatch, *, seed: int) -> Samples:
        """Complete every prompt of ``batch`` G times; the same seed gives the same completions."""
        ...


class GroupSampler:
    """Sample in process, with the transformers model and its KV cache.

    Each prompt is read once, its cache is repeated for the G completions of its group, and finished
    rows leave the batch. Only temperature shapes the distribution: top-p, top-k and penalties would
    sample from a distribution whose log-probs are not the ones that are trained.

    Args:
        group_size: G, completions per prompt.
        max_new_tokens: Longest completion, in tokens, end of sequence included.
        temperature: Divides the logits; 0 takes the most likely token (evaluation only).
        batch_size: Completions decoded at once, which bounds the KV cache; ``None`` is all.

    Raises:
        ValueError: If a value is out of range.
    """

    def __init__(
        self,
        group_size: int = 8,
        max_new_tokens: int = 256,
        temperature: float = 1.0,
        batch_size: int | None = None,
    ) -> None:
        for name, value in {
            "group_size": group_size,
            "max_new_tokens": max_new_tokens,
            "batch_size": batch_size,
        }.items():
            if value is not None and value < 1:
                raise ValueError(f"sampler.{name} must be >= 1, got {value}")
        if not 0 <= temperature < float("inf"):
            raise ValueError(f"sampler.temperature must be >= 0, got {temperature}")
        self.group_size = group_size
        self.max_new_tokens = max_new_tokens
        self.temperature = temperature
        self.batch_size = batch_size

    @torch.no_grad()
    def sample(self, policy: Any, batch: PromptBatch, *, seed: int) -> Samples:
        """Complete every prompt of ``batch`` G times.

        Args:
            policy: Has ``model``, ``tokenizer``, ``eos_ids`` and ``pad_id``.
            batch: The prompts, on the model's device.
            seed: The completions are a function of it, of the prompts and of the weights.

        Returns:
            Samples of B = P * G rows; T is the length of the longest completion drawn.

        Raises:
            FloatingPointError: If the policy's logits are not finite.
            ValueError: If the model has no key-value cache.
        """
        device = batch.prompt_ids.device
        group = torch.arange(len(batch)).repeat_interleave(self.group_size)
        uniform = torch.rand(
            len(group), self.max_new_tokens, generator=torch.Generator().manual_seed(seed)
        )
        was_training = policy.model.training
        policy.model.eval()  # gradient checkpointing would switch the KV cache off in train mode
        try:
            ids = [
                self._decode(policy, batch, rows.to(device), u.to(device))
                for rows, u in zip(
                    group.split(self.batch_size or len(group)),
                    uniform.split(self.batch_size or len(group)),
                    strict=True,
                )
            ]
        finally:
            policy.model.train(was_training)
        completion_ids = torch.cat(ids)
        mask, finished = completion_mask(completion_ids, policy.eos_ids)
        longest = int(mask.sum(1).max())
        completion_ids, mask = completion_ids[:, :longest], mask[:, :longest]
        index = group.to(device)
        return Samples(
            prompt_ids=batch.prompt_ids[index],
            prompt_mask=batch.prompt_mask[index],
            completion_ids=completion_ids,
            mask=mask,
            finished=finished,
            rows=[batch.rows[i] for i in group.tolist()],
            texts=[
                policy.tokenizer.decode(row[keep].tolist(), skip_special_tokens=True)
                for row, keep in zip(completion_ids.cpu(), mask.cpu(), strict=True)
            ],
            group_size=self.group_size,
        )

    def _decode(self, policy: Any, batch: PromptBatch, rows: Tensor, uniform: Tensor) -> Tensor:
        """Complete prompts ``rows`` (N,), repeats allowed, and return ids (N, max_new_tokens)."""
        model, limit = policy.model, self.max_new_tokens
        first, last = int(rows.min()), int(rows.max()) + 1
        prompt_mask = batch.prompt_mask[first:last]
        start = int(prompt_mask.int().argmax(1).min())  # padding that all these prompts share
        prompt_mask = prompt_mask[:, start:]
        prompt_ids = batch.prompt_ids[first:last, start:]
        positions = {"position_ids": (prompt_mask.cumsum(1) - 1).clamp(min=0)}
        if "position_ids" not in forward_arguments(model):
            positions = {}
        output = model(
            input_ids=prompt_ids,
            attention_mask=prompt_mask.long(),
            use_cache=True,
            logits_to_keep=1,
            **positions,
        )
        cache = getattr(output, "past_key_values", None)
        if cache is None:
            raise ValueError(
                f"policy.path: {type(model).__name__} gives no past_key_values; only models with a "
                "key-value cache can be sampled from here"
            )
        cache.reorder_cache(rows - first)  # also of recurrent layers
        logits = output.logits[rows - first, -1]
        # one mask for the whole decode; each step reads one column more of it
        length = prompt_mask.shape[1]
        mask = prompt_mask.new_ones(len(rows), length + limit).long()
        mask[:, :length] = prompt_mask[rows - first]
        position = mask[:, :length].sum(1)
        eos = torch.tensor(policy.eos_ids, device=rows.device)
        ids = torch.full((len(rows), limit), policy.pad_id, device=rows.device)
        batch_rows = torch.arange(len(rows), device=rows.device)  # the row of ids behind each
        running = torch.ones_like(batch_rows, dtype=torch.bool)
        for t in range(limit):
            token = draw(logits, uniform[batch_rows, t], self.temperature)
            ids[batch_rows[running], t] = token[running]
            running = running & ~torch.isin(token, eos)
            num_running = int(running.sum())
            if num_running == 0 or t + 1 == limit:
                break
            if num_running <= COMPACT_BELOW * len(running):
                keep = running.nonzero()[:, 0]
                cache.reorder_cache(keep)
                batch_rows, token, mask = batch_rows[keep], token[keep], mask[keep]
                position, running = position[keep], running[keep]
            if positions:
                positions = {"position_ids": (position + t)[:, None]}
            output = model(
                input_ids=token[:, None],
                attention_mask=mask[:, : length + t + 1],
                past_key_values=cache,
                use_cache=True,
                **positions,
            )
            cache, logits = output.past_key_values, output.logits[:, -1]
        return ids


def draw(logits: Tensor, uniform: Tensor, temperature: float) -> Tensor:
    """Draw one token a row by inverting the cumulative distribution.

    Args:
        logits: (N, V).
        uniform: Uniform numbers in [0, 1), (N,).
        temperature: Divides the logits; 0 takes the most likely token.

    Returns:
        Token ids, (N,) int64. A token of probability 0 is never drawn.

    Raises:
        FloatingPointError: If the logits are not finite.

    >>> logits = torch.tensor([[0.5, 0.25, 0.25]]).log().expand(3, 3)
    >>> draw(logits, torch.tensor([0.49, 0.51, 0.99]), temperature=1.0).tolist()
    [0, 1, 2]
    """
    if temperature == 0:
        if not torch.isfinite(logits.amax(-1)).all():
            raise FloatingPointError("the policy's logits are not finite; its weights are broken")
        return logits.argmax(-1)
    cumulative = torch.softmax(logits.float() / temperature, -1).cumsum(-1)
    total = cumulative[:, -1:]
    if not torch.isfinite(total).all():
        raise FloatingPointError("the policy's logits are not finite; its weights are broken")
    # kept below the total, so that rounding cannot point past the last possible token
    point = torch.minimum(uniform[:, None] * total, total.nextafter(torch.zeros_like(total)))
    return torch.searchsorted(cumulative, point, right=True)[:, 0]
