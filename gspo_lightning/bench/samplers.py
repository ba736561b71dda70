"""Sampling with transformers' ``generate``, for comparison only.

One call per completion is what the script did that this project replaces, one call for all is what
most trainers do.
"""

import copy
from typing import Any, Self

import torch

from gspo_lightning.rollout import PromptBatch, Samples
from gspo_lightning.sampling import completed


class GenerateSampler:
    """Complete prompts with ``generate``.

    Args:
        group_size: G, completions per prompt.
        max_new_tokens: Longest completion, in tokens.
        one_by_one: One call per completion, without padding, instead of one for all.
    """

    temperature = 1.0

    def __init__(self, group_size: int, max_new_tokens: int, one_by_one: bool) -> None:
        self.group_size = group_size
        self.max_new_tokens = max_new_tokens
        self.one_by_one = one_by_one

    def like(self, group_size: int, max_new_tokens: int, temperature: float) -> Self:
        """The same way of sampling with other settings."""
        other = copy.copy(self)
        other.group_size, other.max_new_tokens = group_size, max_new_tokens
        other.temperature = temperature
        return other

    @torch.no_grad()
    def sample(self, policy: Any, batch: PromptBatch, *, seed: int) -> Samples:
        """Complete every prompt of ``batch`` G times, from torch's global generator."""
        torch.manual_seed(seed)
        group = torch.arange(len(batch)).repeat_interleave(self.group_size)
        prompt_ids, prompt_mask = batch.prompt_ids[group], batch.prompt_mask[group]
        ids = prompt_ids.new_full((len(group), self.max_new_tokens), policy.pad_id)
        was_training = policy.model.training
        policy.model.eval()
        for rows in torch.arange(len(group)).split(1 if self.one_by_one else len(group)):
            padding = int(prompt_mask[rows].int().argmax(1).min())  # columns that no row uses
            sequences = policy.model.generate(
                prompt_ids[rows, padding:],
                attention_mask=prompt_mask[rows, padding:].long(),
                do_sample=True,
                temperature=self.temperature,
                top_k=0,
                top_p=1.0,
                max_new_tokens=self.max_new_tokens,
                pad_token_id=policy.pad_id,
            )
            drawn = sequences[:, prompt_ids.shape[1] - padding :]
            ids[rows, : drawn.shape[1]] = drawn
        policy.model.train(was_training)
        return completed(policy, batch, ids, self.group_size)
