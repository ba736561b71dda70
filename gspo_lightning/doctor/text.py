"""Examines what the policy reads: end, padding and beginning of texts, chat template, lengths.

Decides which combinations of tokenizer, model and prompts are mistakes.
"""

import re
import statistics
from functools import partial
from typing import Any

from gspo_lightning.doctor.findings import Finding
from gspo_lightning.policy.reads import overlength, positions

MARK = "MARKEDANSWER"
LOOKS_LIKE_CHAT = re.compile(r"<\|[^|<>\s]{1,40}\|>|\[/?INST\]|<(?:start|end)_of_turn>")
SHOWN = 300  # characters of a rendered text


def named(tokenizer: Any, ids: list[int]) -> str:
    """Ids with the tokens they stand for."""
    return ", ".join(f"{tokenizer.convert_ids_to_tokens(i)!r} ({i})" for i in ids)


def vocabulary_size(policy: Any) -> int:
    """Number of ids that the model embeds."""
    return policy.model.get_input_embeddings().weight.shape[0]


def turn_end(tokenizer: Any) -> list[int]:
    """What the chat template writes behind an answer, as ids; empty if that cannot be seen."""
    messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": MARK}]
    text = tokenizer.apply_chat_template(messages, tokenize=False)
    _, found, behind = text.rpartition(MARK)
    return tokenizer(behind, add_special_tokens=False)["input_ids"] if found and behind else []


def eos(policy: Any, data: Any) -> Finding:
    """Compare the ids that end a completion with what tokenizer and template end a text with."""
    tokenizer, ids, size = policy.tokenizer, policy.eos_ids, vocabulary_size(policy)
    own = tokenizer.eos_token_id
    value = {"eos_ids": ids, "tokenizer": own}
    mend = "set eos_token_id in generation_config.json of policy.path"
    if beyond := [i for i in ids if not 0 <= i < size]:
        text = f"{beyond} end a completion, but the model has ids 0 to {size - 1}"
        return Finding("eos", "error", text, mend, value)
    if own is not None and own not in ids:
        text = (
            f"completions end at {named(tokenizer, ids)}, the tokenizer ends texts with "
            f"{named(tokenizer, [own])}: the policy would write that and be decoded on"
        )
        return Finding("eos", "error", text, f"{mend} to [{own}, ...]", value)
    if getattr(data, "chat_template", False):
        behind = turn_end(tokenizer)
        value["turn_end"] = behind
        if behind and not set(behind) & set(ids):
            special = [i for i in behind if i in tokenizer.all_special_ids]
            end = named(tokenizer, special[:1] or behind[:1])
            text = f"completions end at {named(tokenizer, ids)}, the chat template ends a turn with"
            return Finding("eos", "error", f"{text} {end}", f"{mend} to a list with both", value)
    return Finding("eos", "ok", f"completions end at {named(tokenizer, ids)}", value=value)


def padding(policy: Any) -> Finding:
    """Say what stands in padded positions; every choice is fine, as masks come from lengths."""
    pad, size = policy.tokenizer.pad_token_id, vocabulary_size(policy)
    if pad is not None and not 0 <= pad < size:
        text = f"the pad token is id {pad}, the model has ids 0 to {size - 1}"
        return Finding("pad", "error", text, "choose another pad_token in policy.path", pad)
    text = f"padded with {named(policy.tokenizer, [policy.pad_id])}"
    if pad is None:
        text = f"the tokenizer has no pad token, {named(policy.tokenizer, [policy.pad_id])} is used"
    if policy.pad_id in policy.eos_ids:
        text += "; it is also an end of sequence, which is fine: masks come from lengths"
    return Finding("pad", "ok", text, value=policy.pad_id)


def bos(policy: Any, data: Any, prompts: list[list[int]]) -> Finding:
    """Find prompts that begin with two BOS, or with none where the tokenizer puts one."""
    tokenizer = policy.tokenizer
    token = tokenizer.bos_token_id
    if token is None:
        return Finding("bos", "ok", "the tokenizer has no BOS")
    puts = tokenizer("a")["input_ids"][:1] == [token]
    twice = sum(ids[:2] == [token, token] for ids in prompts)
    without = sum(ids[0] != token for ids in prompts)
    value = {"bos": token, "twice": twice, "without": without, "prompts": len(prompts)}
    name = named(tokenizer, [token])
    if twice:
        text = f"{twice} of {len(prompts)} prompts begin with {name} twice"
        remedy = (
            f"the texts in {data.prompt_column!r} hold it already; take it out of them, or give raw"
            " messages and set data.chat_template: true"
        )
        if getattr(data, "chat_template", False):
            remedy = "template and messages both write it; take it out of one of them"
        return Finding("bos", "error", text, remedy, value)
    if puts and without:
        text = f"the tokenizer begins texts with {name}, {without} of {len(prompts)} prompts do not"
        remedy = "add {{ bos_token }} to the start of the chat template in policy.path"
        return Finding("bos", "warning", text, remedy, value)
    text = f"prompts begin with {name}, once"
    if without == len(prompts):
        text = f"no prompt begins with {name}; the tokenizer adds none to other texts either"
    return Finding("bos", "ok", text, value=value)


def prompt_end(policy: Any, prompts: list[list[int]]) -> Finding:
    """Find prompts that end with an end of sequence: the completion would start behind it."""
    ended = sum(ids[-1] in policy.eos_ids for ids in prompts)
    if ended:
        text = f"{ended} of {len(prompts)} prompts end with an end of sequence"
        remedy = "set add_eos_token to false in tokenizer_config.json, or mend the chat template"
        return Finding("prompt end", "error", text, remedy, ended)
    return Finding("prompt end", "ok", "no prompt ends with an end of sequence", value=0)


def template(policy: Any, data: Any, examples: list[tuple[list[int], dict]]) -> Finding:
    """Compare the chat template with how prompts are made and what they look like."""
    tokenizer = policy.tokenizer
    has, used = getattr(tokenizer, "chat_template", None) is not None, data.chat_template
    value = {"tokenizer": has, "used": used}
    if used:
        messages = [{"role": "user", "content": "a"}]
        render = partial(tokenizer.apply_chat_template, messages, tokenize=False)
        if render(add_generation_prompt=False) == render(add_generation_prompt=True):
            text = "the chat template opens no turn for the answer (add_generation_prompt)"
            remedy = "the policy would have to write the header itself; mend the chat template"
            return Finding("template", "warning", text, remedy, value)
        return Finding("template", "ok", "prompts are rendered with the chat template", value=value)
    texts = [str(row.get(data.prompt_column)) for _, row in examples]
    marks = {match for text in texts for match in LOOKS_LIKE_CHAT.findall(text)}
    known = set(tokenizer.all_special_tokens) | set(tokenizer.get_added_vocab())
    if foreign := sorted(marks - known):
        text = f"prompts look like chat, but {', '.join(foreign[:3])} is ordinary text here"
        remedy = "use the prompts of this tokenizer's template, or data.chat_template: true"
        return Finding("template", "warning", text, remedy, value)
    if has and not marks:
        text = "the tokenizer has a chat template, but prompts go in as they are"
        remedy = "set data.chat_template: true, unless the policy is meant to continue plain text"
        return Finding("template", "warning", text, remedy, value)
    text = "prompts hold the chat template's tokens" if marks else "plain text, no chat template"
    return Finding("template", "ok", text, value=value)


def vocabulary(policy: Any, prompts: list[list[int]]) -> Finding:
    """Compare sizes and count tokens that the tokenizer does not know."""
    size, unk = vocabulary_size(policy), policy.tokenizer.unk_token_id
    unknown = 0 if unk is None else sum(ids.count(unk) for ids in prompts)
    value = {"tokenizer": len(policy.tokenizer), "model": size, "unknown": unknown}
    text = f"{len(policy.tokenizer)} ids in the tokenizer, {size} in the model"
    if unknown:
        text += f"; {unknown} of {sum(map(len, prompts))} prompt tokens are unknown to it"
        remedy = "the policy cannot read them: use another tokenizer or other prompts"
        return Finding("vocabulary", "warning", text, remedy, value)
    return Finding("vocabulary", "ok", text, value=value)


def lengths(policy: Any, data: Any, prompts: list[list[int]], new_tokens: int) -> Finding:
    """Compare the longest prompt and completion with what the model reads."""
    sizes = [len(ids) for ids in prompts]
    dropped = getattr(data, "dropped", {}).get("path", 0)
    config = policy.model.config
    limit = positions(config)
    longest = max(sizes)
    value = {
        "longest": longest,
        "median": statistics.median(sizes),
        "dropped_share": dropped / (dropped + len(sizes)),
        "new_tokens": new_tokens,
        "positions": limit,
    }
    text = f"{len(sizes)} of at most {longest} tokens, median {value['median']:g}"
    if dropped:
        text += f"; {value['dropped_share']:.0%} are longer than data.max_prompt_tokens and dropped"
    # a model with a fixed table of positions is refused before it is examined
    if trouble := overlength(config, longest, new_tokens):
        return Finding("prompts", "warning", f"{text}; {trouble[0]}", trouble[1], value)
    text += f", and {new_tokens} new ones" + (f"; the model reads {limit}" if limit else "")
    if dropped > len(sizes):
        remedy = "raise data.max_prompt_tokens, or see whether these are the right prompts"
        return Finding("prompts", "warning", text, remedy, value)
    return Finding("prompts", "ok", text, value=value)


def example(policy: Any, samples: Any) -> list[Finding]:
    """The first prompt and completion as the policy sees them, special tokens included."""
    prompt = samples.prompt_ids[0][samples.prompt_mask[0]].tolist()
    completion = samples.completion_ids[0][samples.mask[0]].tolist()
    texts = [policy.tokenizer.decode(ids) for ids in (prompt, completion)]
    quoted = [repr(text if len(text) <= SHOWN else f"{text[:SHOWN]} ...") for text in texts]
    size = f"{len(completion)} tokens" + ("" if samples.finished[0] else ", cut off")
    return [
        Finding("prompt", "ok", quoted[0], value=texts[0]),
        Finding("completion", "ok", f"{quoted[1]} ({size})", value=texts[1]),
    ]
