"""Examines an engine that is apart from the policy: what it is, and whose weights it has.

Decides how far its numbers may be off.
"""

from typing import Any

import torch
from torch.nn.utils.rnn import pad_sequence

from gspo_lightning.doctor.findings import Finding
from gspo_lightning.rollout import PromptBatch
from gspo_lightning.sampling import GroupSampler
from gspo_lightning.sharding import weights_of

PROMPTS, TOKENS = 4, 32  # completed greedily by both
OTHER_WEIGHTS = 0.1  # nats a token: no dtype rounds by as much


def engine(module: Any, prompts: list[list[int]]) -> Finding:
    """Send it the weights, and let it and the policy complete the same prompts greedily.

    Args:
        module: A GSPOModule whose sampler has been reached.
        prompts: Ids of the first prompts of the run.
    """
    module.send_weights()
    few = [torch.tensor(ids) for ids in prompts[:PROMPTS]]
    ids = pad_sequence(few, batch_first=True, padding_side="left")
    real = [torch.ones(len(each), dtype=torch.bool) for each in few]
    mask = pad_sequence(real, batch_first=True, padding_side="left")
    batch = PromptBatch(ids, mask, [{} for _ in few]).to(module.device)
    sampler, policy = module.sampler, module.policy
    how = 1, min(TOKENS, sampler.max_new_tokens), 0.0
    with weights_of(getattr(module, "_trainer", None)).apart():
        own = GroupSampler(*how).sample(policy, batch, seed=0)
        asked = sampler.like(*how)
        asked.environment = None  # one turn, which the policy's is compared with
        found = asked.sample(policy, batch, seed=0)
    same = sum(a == b for a, b in zip(own.texts, found.texts, strict=True))
    noise, width = sampler.figures["sampler/noise_after_sync"], module.health.width
    said = f"{sampler.about}; greedy like the policy on {same} of {len(few)} prompts; noise "
    said += f"{noise:.2g} nats a token, the clip range is {width:.2g}"
    value = {"same": same, "prompts": len(few), "noise": noise, "clip_range": width}
    if not noise < OTHER_WEIGHTS:
        remedy = "it computes with other weights: restart it, and see docs/vllm.md"
        return Finding("engine", "error", said, remedy, value)
    if noise > width:
        remedy = "sampler.engine.dtype: float32, if there is room; else keep model.old_logprobs "
        return Finding("engine", "warning", said, f"{remedy}auto or recompute", value)
    if same < len(few):
        remedy = "two tokens may be equally likely; if it stays so, sampler.engine.dtype: float32"
        return Finding("engine", "warning", said, remedy, value)
    return Finding("engine", "ok", said, value=value)
