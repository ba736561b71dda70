"""Prompts of different lengths, as a sampler gets them."""

import torch

from gspo_lightning.rollout import PromptBatch

PROMPTS = [[5, 6, 7], [8], [9, 10, 11, 12, 13], [14, 15]]


def batch_of(prompts: list[list[int]]) -> PromptBatch:
    length = max(map(len, prompts))
    ids = torch.zeros(len(prompts), length, dtype=torch.long)
    mask = torch.zeros(len(prompts), length, dtype=torch.bool)
    for i, prompt in enumerate(prompts):
        ids[i, length - len(prompt) :] = torch.tensor(prompt)
        mask[i, length - len(prompt) :] = True
    return PromptBatch(ids, mask, [{"i": i} for i in range(len(prompts))])
