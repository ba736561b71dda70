"""A policy put to use without a run: texts in, completions out.

Decides how prompts that come from no data file are read, and what is drawn where nothing is said.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from gspo_lightning.engine.padded import forward_arguments
from gspo_lightning.engine.rotary import fix_rotary
from gspo_lightning.policy.chat import Chat, checked
from gspo_lightning.policy.shards import compute_device
from gspo_lightning.rollout import PromptBatch
from gspo_lightning.sampling import GroupSampler


def complete(
    policy: Any,
    prompts: Sequence[str | list[dict]],
    num_samples: int = 1,
    temperature: float = 0.0,
    max_new_tokens: int = 256,
    seed: int = 0,
    in_run: bool = False,
) -> list[list[str]]:
    """Complete prompts.

    Args:
        policy: A policy that is loaded.
        prompts: P texts, or lists of chat messages for the tokenizer's template.
        num_samples: Completions of each.
        temperature: Divides the logits; 0 takes the most likely token.
        max_new_tokens: Longest completion, in tokens.
        seed: The completions are a function of it, of the prompts and of the weights.
        in_run: Leave rotary embeddings as the run has them: their frequencies may depend on the
            longest text, and a longer one is refused.

    Returns:
        P lists of ``num_samples`` texts, without what ended them.

    Raises:
        ValueError: For a prompt that is no text, or an empty one.
    """
    check_loaded(policy)
    if isinstance(prompts, str) or not prompts:
        raise ValueError(
            f"prompts must be a list of at least one, such as ['7+9='], got {prompts!r}"
        )
    tokenizer, chat, ids = policy.tokenizer, None, []
    for number, prompt in enumerate(prompts, start=1):
        text = prompt
        if not isinstance(prompt, str):
            try:
                messages = checked(prompt)
            except ValueError as error:
                raise ValueError(f"prompt {number} {error}") from error
            if not tokenizer.chat_template:
                raise ValueError(
                    f"prompt {number} is a list of messages, and the tokenizer has no chat "
                    "template; give a text, or save chat_template.jinja beside the tokenizer"
                )
            chat = chat or Chat(tokenizer)
            text = chat.prompt(messages)
        found = tokenizer(text, add_special_tokens=isinstance(prompt, str))["input_ids"]
        if not found:
            raise ValueError(f"prompt {number} is empty")
        ids.append(torch.tensor(found))
    longest = max(map(len, ids)) + max_new_tokens
    mask = pad_sequence([torch.ones_like(x).bool() for x in ids], True, padding_side="left")
    device = compute_device(policy.model)
    if not in_run:
        fix_rotary(policy.model, longest)
    padded = pad_sequence(ids, True, padding_side="left")
    batch = PromptBatch(padded.to(device), mask.to(device), [{} for _ in ids])
    sampler = GroupSampler(num_samples, max_new_tokens, temperature)
    texts = sampler.sample(policy, batch, seed=seed).texts
    return [texts[p : p + num_samples] for p in range(0, len(texts), num_samples)]


def logits(policy: Any, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
    """Logits of a policy, with positions that begin at each row's first token.

    Args:
        policy: A policy that is loaded.
        input_ids: (B, L) int64, padded on either side.
        attention_mask: True or 1 on real tokens, (B, L); ``None`` where all are.

    Returns:
        (B, L, V); what stands under a False mask means nothing.
    """
    check_loaded(policy)
    options: dict[str, Any] = {}
    if attention_mask is not None:
        options["attention_mask"] = attention_mask.long()
        if "position_ids" in forward_arguments(policy.model):
            options["position_ids"] = (attention_mask.long().cumsum(1) - 1).clamp(min=0)
    return policy.model(input_ids=input_ids, use_cache=False, **options).logits


def check_loaded(policy: Any) -> None:
    """Raise RuntimeError, with the way out, where a module has no policy yet."""
    if policy is None:
        raise RuntimeError(
            "the policy is not loaded yet: a Trainer loads it, or call configure_model()"
        )
