"""Examines what the policy reads: end, padding and beginning of texts, chat template, lengths.

Decides which combinations of tokenizer, model and prompts are mistakes.
"""

import itertools
import re
import statistics
from typing import Any

from gspo_lightning.callbacks.report import shortened
from gspo_lightning.doctor.findings import Finding
from gspo_lightning.policy.reads import overlength, positions

MARK = "MARKEDANSWER"
LOOKS_LIKE_CHAT = re.compile(r"<\|[^|<>\s]{1,40}\|>|\[/?INST\]|<(?:start|end)_of_turn>")
SHOWN = 400  # characters of a rendered text


def named(tokenizer: Any, ids: list[int]) -> str:
    """Ids with the tokens they stand for."""
    return ", ".join(f"{tokenizer.convert_ids_to_tokens(i)!r} ({i})" for i in ids)


def vocabulary_size(policy: Any) -> int:
    """Number of ids that the model embeds."""
    return policy.model.get_input_embeddings().weight.shape[0]


def special_ids(tokenizer: Any) -> set[int]:
    """Ids that stand for no ordinary text: special tokens, and those added to the vocabulary."""
    return {*tokenizer.all_special_ids, *tokenizer.get_added_vocab().values()}


def around_answer(chat: Any) -> tuple[str, str]:
    """What the chat template writes before and behind an answer; twice "" if that is not seen."""
    messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": MARK}]
    before, _, behind = chat.render(messages).rpartition(MARK)
    return before, behind if before else ""


def turn_end(chat: Any) -> list[int]:
    """The special tokens that the chat template writes behind an answer, as ids.

    Ordinary text there, such as a line end, can end no completion: it occurs inside of answers.
    """
    tokenizer = chat.tokenizer
    ids = tokenizer(around_answer(chat)[1], add_special_tokens=False)["input_ids"]
    return [i for i in ids if i in special_ids(tokenizer)]


def eos(policy: Any, data: Any) -> Finding:
    """Compare the ids that end a completion with what tokenizer and template end a text with."""
    tokenizer, ids, size = policy.tokenizer, policy.eos_ids, vocabulary_size(policy)
    own = tokenizer.eos_token_id
    value = {"eos_ids": ids, "tokenizer": own, "stop_strings": policy.ends.strings}
    file = "eos_token_id in generation_config.json of policy.path"
    mend = f"set policy.stop_token_ids, or {file},"
    if beyond := [i for i in ids if not 0 <= i < size]:
        text = f"{beyond} end a completion, but the model has ids 0 to {size - 1}"
        return Finding("eos", "error", text, f"set {file}", value)
    if own is not None and own not in ids:
        text = (
            f"completions end at {named(tokenizer, ids)}, the tokenizer ends texts with "
            f"{named(tokenizer, [own])}: the policy would write that and be decoded on"
        )
        return Finding("eos", "error", text, f"{mend} to [{own}, ...]", value)
    if getattr(data, "chat", None) is not None:
        behind = turn_end(data.chat)
        value["turn_end"] = behind
        if behind and not set(behind) & set(ids):
            end = named(tokenizer, behind[:1])
            text = f"completions end at {named(tokenizer, ids)}, the chat template ends a turn with"
            return Finding("eos", "error", f"{text} {end}", f"{mend} to a list with both", value)
    texts = "".join(f", or where the text has {string!r}" for string in policy.ends.strings)
    said = f"completions end at {named(tokenizer, ids) or 'no token'}{texts}"
    return Finding("eos", "ok", said, value=value)


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
    # a stop id may be a newline, with which a prompt may well end
    own = set(policy.eos_ids) - set(policy.ends.token_ids)
    ended = sum(ids[-1] in own for ids in prompts)
    if ended:
        text = f"{ended} of {len(prompts)} prompts end with an end of sequence"
        remedy = "set add_eos_token to false in tokenizer_config.json, or mend the chat template"
        return Finding("prompt end", "error", text, remedy, ended)
    return Finding("prompt end", "ok", "no prompt ends with an end of sequence", value=0)


def opens_turn(chat: Any) -> bool:
    """Whether a prompt ends where an answer begins.

    Some templates write no header for an answer, as a question's end opens it (``[/INST]``), and
    some write the header always: then what stands before an answer is the prompt, spaces aside. A
    question that ends as an answer does opens nothing.
    """
    messages = [{"role": "user", "content": "a"}]
    prompt = chat.render(messages, opens=True)
    if prompt != chat.render(messages):
        return True
    before = around_answer(chat)[0].rstrip()
    end = chat.tokenizer(prompt, add_special_tokens=False)["input_ids"][-1:]
    return bool(before) and prompt.startswith(before) and end != turn_end(chat)[:1]


def template(policy: Any, data: Any, examples: list[tuple[list[int], dict]]) -> Finding:
    """Compare the chat template with how prompts are made and what they look like."""
    tokenizer = policy.tokenizer
    has, used = getattr(tokenizer, "chat_template", None) is not None, data.chat_template
    value = {"tokenizer": has, "used": used}
    if used:
        if not opens_turn(data.chat):
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


def history(chat: Any) -> Finding:
    """Whether the chat template shows earlier answers as the policy drew them, thoughts included.

    In a rollout of several turns they stay as they were drawn; a chat that is served is rendered.
    """
    question, more = {"role": "user", "content": "a"}, {"role": "user", "content": "b"}
    thought = f"<think>\n{MARK}\n</think>\n\nc"
    shown = [
        chat.render([question, {"role": "assistant", "content": answer}, more], opens=True)
        for answer in (thought, MARK)
    ]
    changes = []
    if MARK not in shown[0]:
        changes.append("takes the thoughts out of earlier answers")
    opened = chat.render([question], opens=True)
    before = shown[1].partition(MARK)[0]
    if not before.startswith(opened) or "<think>" in before[len(opened) :]:
        changes.append("begins earlier answers otherwise than it opens the next one")
    if not changes:
        return Finding("history", "ok", "earlier turns are shown as they were drawn", value=[])
    text = f"the chat template {' and '.join(changes)}; in training they stay as they were drawn"
    remedy = "serve the policy with a template that leaves them, or train without thoughts"
    return Finding("history", "warning", text, remedy, changes)


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


def marked(tokenizer: Any, ids: list[int]) -> str:
    """Ids as text, each special token in marks: one that is mere text looks the same without."""
    special = special_ids(tokenizer)
    runs = itertools.groupby(enumerate(ids), lambda pair: pair[1] in special and ("id", pair[0]))
    texts = [(found, tokenizer.decode([i for _, i in run])) for found, run in runs]
    return "".join(f"«{text}»" if found else text for found, text in texts)


def example(policy: Any, samples: Any) -> list[Finding]:
    """The first prompt and completion as the policy sees them, special tokens marked."""
    prompt = samples.prompt_ids[0][samples.prompt_mask[0]].tolist()
    length = int(samples.lengths[0])
    completion = samples.completion_ids[0][:length].tolist()
    drawn = samples.mask[0][:length].tolist()
    runs = itertools.groupby(zip(drawn, completion, strict=True), lambda pair: pair[0])
    said = [(own, marked(policy.tokenizer, [i for _, i in run])) for own, run in runs]
    spoken = "".join(text if own else f"[environment: {text}]" for own, text in said)
    texts = [marked(policy.tokenizer, prompt), spoken]
    quoted = [repr(shortened(text, SHOWN)) for text in texts]
    size = f"{sum(drawn)} tokens" + ("" if samples.finished[0] else ", cut off")
    size += f", {length - sum(drawn)} of the environment" if not all(drawn) else ""
    legend = " (« » marks special tokens)" if "«" in texts[0] else ""
    return [
        Finding("prompt", "ok", f"{quoted[0]}{legend}", value=texts[0]),
        Finding("completion", "ok", f"{quoted[1]} ({size})", value=texts[1]),
    ]
