"""How models write tool calls: four forms, read from the text of a turn.

Decides what a call is, and what is a call gone wrong: text that begins like one and cannot be read.
"""

import json
import re
from collections.abc import Callable
from typing import Any, NamedTuple


class ToolCall(NamedTuple):
    """A call, or, where it cannot be read, what is wrong with it."""

    name: str
    arguments: dict[str, Any]
    error: str | None = None


def hermes(text: str) -> list[ToolCall]:
    """Hermes and Qwen: JSON between ``<tool_call>`` tags, one pair a call.

    >>> hermes('Let me see. <tool_call>{"name": "add", "arguments": {"a": 1}}</tool_call>')
    [ToolCall(name='add', arguments={'a': 1}, error=None)]
    """
    parts = text.split("<tool_call>")[1:]
    return [_read(part.partition("</tool_call>")[0], "arguments") for part in parts]


def llama(text: str) -> list[ToolCall]:
    """Llama 3.1: the turn is JSON with name and parameters, several with semicolons between them.

    >>> llama('{"name": "add", "parameters": {"a": 1}}')
    [ToolCall(name='add', arguments={'a': 1}, error=None)]
    """
    _, tag, rest = text.rpartition("<|python_tag|>")
    body = (rest if tag else text).strip()
    if not body.startswith("{") or not (tag or re.match(r'\{\s*"(name|type)"\s*:', body)):
        return []
    return [_read(part, "parameters") for part in _objects(body)]


def mistral(text: str) -> list[ToolCall]:
    """Mistral: behind ``[TOOL_CALLS]`` a JSON list of calls, or name and JSON, one by one.

    >>> mistral('[TOOL_CALLS][{"name": "add", "arguments": {"a": 1}}]')
    [ToolCall(name='add', arguments={'a': 1}, error=None)]
    >>> mistral('[TOOL_CALLS]add[ARGS]{"a": 1}')
    [ToolCall(name='add', arguments={'a': 1}, error=None)]
    """
    calls = []
    for part in text.split("[TOOL_CALLS]")[1:]:
        body = part.strip()
        if body.startswith("["):
            try:
                found = json.loads(body)
            except ValueError as error:
                calls.append(ToolCall("", {}, f"it is no JSON: {error}"))
                continue
            calls += [_call(one, "arguments") for one in found]
            continue
        name, _, rest = body.partition("{")
        name = re.split(r"\[(?:ARGS|CALL_ID)\]", name)[0].strip()
        calls.append(_arguments(name, "{" + rest))
    return calls


def gpt_oss(text: str) -> list[ToolCall]:
    """gpt-oss: a message to ``functions.NAME`` in a channel.

    >>> start = "<|channel|>commentary to=functions.add <|constrain|>json"
    >>> gpt_oss(start + '<|message|>{"a": 1}')
    [ToolCall(name='add', arguments={'a': 1}, error=None)]
    """
    calls = []
    for part in text.split("<|start|>"):
        header, found, body = part.rpartition("<|message|>")
        name = re.search(r"to=functions\.([\w.-]+)", header) if found else None
        if name is not None:
            calls.append(_arguments(name[1], re.split(r"<\|(?:call|end)\|>", body)[0]))
    return calls


FORMS: dict[str, Callable[[str], list[ToolCall]]] = {
    "hermes": hermes,
    "llama": llama,
    "mistral": mistral,
    "gpt_oss": gpt_oss,
}


def _read(text: str, key: str) -> ToolCall:
    try:
        return _call(json.loads(text), key)
    except (ValueError, RecursionError) as error:
        return ToolCall("", {}, f"it is no JSON: {error}")


def _call(value: Any, key: str) -> ToolCall:
    name = value.get("name") if isinstance(value, dict) else None
    if not isinstance(name, str):
        return ToolCall("", {}, f'it must be an object with "name" and "{key}"')
    others = [value[k] for k in ("arguments", "parameters") if k in value]
    arguments = value.get(key, others[0] if others else {})
    if isinstance(arguments, str):  # some write the arguments as JSON in a text
        return _arguments(name, arguments)
    if not isinstance(arguments, dict):
        return ToolCall(name, {}, f'"{key}" must be an object')
    return ToolCall(name, arguments)


def _arguments(name: str, text: str) -> ToolCall:
    try:
        found = json.loads(text)
    except (ValueError, RecursionError) as error:
        return ToolCall(name, {}, f"its arguments are no JSON: {error}")
    if not isinstance(found, dict):
        return ToolCall(name, {}, "its arguments must be an object")
    return ToolCall(name, found)


def _objects(text: str) -> list[str]:
    """JSON objects with semicolons between them; what cannot be read stays whole."""
    parts: list[str] = []
    rest, decoder = text, json.JSONDecoder()
    while rest:
        try:
            end = decoder.raw_decode(rest)[1]
        except ValueError:
            return [*parts, rest]
        parts.append(rest[:end])
        rest = rest[end:].lstrip("; \n\t")
    return parts
