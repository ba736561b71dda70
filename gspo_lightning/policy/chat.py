"""Chat messages as text: what a tokenizer's template makes of them.

Decides which messages are taken, that none of them gets lost on the way, which date a template
sees, and how much it may write. A template is data from a model's folder: it runs in the sandbox of
transformers, within bounds of length and time.
"""

import contextlib
import difflib
import inspect
import re
import signal
import threading
from collections.abc import Callable, Iterator, Mapping
from datetime import datetime
from functools import partial
from typing import Any

from jinja2 import pass_context
from transformers import PreTrainedTokenizerBase
from transformers.utils import chat_template_utils

LONGEST = 16 << 20  # characters of a rendering, where nothing else bounds it
LONGEST_TOKEN = 256  # characters; known vocabularies have none longer than 128
LONGEST_POWER = 4096  # bits
SECONDS = 10  # of computing, for one rendering; well-known templates take a thousandth of one
MARK = "MARKEDTEXT"  # letters alone: nothing that a template would escape, trim or split at
_CALLED = inspect.signature(PreTrainedTokenizerBase.apply_chat_template).parameters
_OWN = {"messages", *_CALLED} - {"tools", "documents"}  # what is not for a user to give


class TooLong(ValueError):
    """A text that has more characters than the tokens that are allowed can hold."""


class Chat:
    """A tokenizer's chat template with its arguments, limits and date.

    Args:
        tokenizer: Its template is used; of several the one with the name ``default``, or the one
            that the argument ``chat_template`` names.
        arguments: What the template is given besides the messages, such as ``enable_thinking``.
        now: The date and time that a template sees which asks for them.
        limit: Longest rendering, in characters.
        key: The setting that asks for the template, for messages.

    Raises:
        ValueError: If there is no such template, it cannot be read, or an argument means nothing to
            it.
    """

    def __init__(
        self,
        tokenizer: Any,
        arguments: Mapping[str, Any] | None = None,
        now: datetime | None = None,
        limit: int = LONGEST,
        key: str = "data.chat_template",
    ) -> None:
        self.tokenizer, self.limit = tokenizer, limit
        self.arguments = dict(arguments or {})
        self.source = choose_template(tokenizer, self.arguments.pop("chat_template", None), key)
        check_arguments(self.source, self.arguments, f"{key}_arguments")
        clock = {"strftime_now": (now or datetime.now()).strftime}
        try:
            self._template = sandbox(limit).from_string(self.source, globals=clock)
        except Exception as error:  # a template may be broken in many ways
            raise ValueError(
                f"{key}: the tokenizer's chat template cannot be read: {reason(error)}; mend it"
            ) from error
        self._sound: set[tuple[str, ...]] = set()  # sequences of roles of which nothing gets lost
        self._in_parts = False  # whether the template wants lists of parts for texts

    @property
    def reads_clock(self) -> bool:
        """Whether what the template writes may depend on the day."""
        return "strftime_now" in self.source

    def render(self, messages: list[dict], opens: bool = False) -> str:
        """Messages as text, as ``tokenizer.apply_chat_template`` writes them.

        Args:
            messages: With role and content, as :func:`checked` gives them.
            opens: Whether to open the assistant's turn behind them.

        Raises:
            TooLong: If the text has more than ``limit`` characters.
            ValueError: If the template fails, takes too long, or writes what is no text.
        """
        messages = [{k: v for k, v in message.items() if v is not None} for message in messages]
        if self._in_parts:
            messages = [in_parts(message) for message in messages]
        # newer versions of transformers hand reasoning over under all names that templates read
        alias = getattr(chat_template_utils, "_alias_reasoning_fields", list)
        values: dict[str, Any] = {"tools": None, "documents": None}
        values |= {**self.tokenizer.special_tokens_map, **self.arguments}
        values |= {"messages": alias(messages), "add_generation_prompt": opens}
        pieces, size = [], 0
        try:
            with limited_time(SECONDS):
                for piece in self._template.generate(values):
                    pieces.append(piece)
                    size += len(piece)
                    if size > self.limit:
                        raise TooLong(f"the chat template writes over {self.limit:,} characters")
            text = "".join(pieces)
            text.encode()
        except TooLong:
            raise
        except UnicodeEncodeError as error:
            sign = error.object[error.start]
            raise ValueError(
                f"the tokenizer's chat template writes a lone surrogate {sign!r}, which is no "
                "character; mend the template"
            ) from error
        except Exception as error:  # a template is a program, and may raise anything
            raise ValueError(
                f"the tokenizer's chat template fails: {reason(error)}; mend the template or the "
                "messages"
            ) from error
        return text

    def prompt(self, messages: list[dict]) -> str:
        """The text from which the policy goes on, nothing left out.

        An assistant's turn is opened behind the messages. Where the last of them is the
        assistant's, it is that turn's beginning, and stays open.

        Raises:
            TooLong: See :meth:`render`, or if the messages alone are too long.
            ValueError: See :meth:`render`, or if the text of a message is not in the rendering.
        """
        last = messages[-1]
        if last["role"] == "assistant" and isinstance(last.get("content"), str):
            return self._whole(messages, self._continued)
        return self._whole(messages, partial(self.render, opens=True))

    def conversation(self, messages: list[dict]) -> str:
        """Messages as text, every turn closed, nothing left out; raises as :meth:`prompt` does."""
        return self._whole(messages, self.render)

    def _whole(self, messages: list[dict], write: Callable[[list[dict]], str]) -> str:
        """What ``write`` makes of the messages, if it holds all their texts."""
        size = sum(len(message.get("content") or "") for message in messages)
        if size > self.limit:
            raise TooLong(f"the messages have {size:,} characters, over {self.limit:,}")
        try:
            return self._checked(messages, write)
        except ValueError as error:
            if self._sound or self._in_parts or isinstance(error, TooLong):
                raise
            first = error
        self._in_parts = True  # some templates know contents as lists of parts alone
        try:
            return self._checked(messages, write)
        except ValueError:
            self._in_parts = False
            raise first from None

    def _checked(self, messages: list[dict], write: Callable[[list[dict]], str]) -> str:
        text = write(messages)
        lost = self._lost(messages, text)
        if lost:
            raise ValueError(
                f"the chat template leaves out text of message {lost[0] + 1}, of role "
                f"{messages[lost[0]]['role']!r}; use the roles that it knows, or mend it"
            )
        return text

    def _continued(self, messages: list[dict]) -> str:
        """The text up to the end of the last message's content."""
        last, given = messages[-1], messages[-1]["content"]
        # The space shows whether the template trims a content: then the part given is trimmed, too.
        marked = {**last, "content": f"{given}{MARK} "}
        text, found, behind = self.render([*messages[:-1], marked]).rpartition(MARK)
        if not found:
            raise ValueError(
                "the chat template leaves out the last message, of role 'assistant', which the "
                "policy should continue; mend the template or the messages"
            )
        if not "".join(text.split()).endswith("".join(given.split())):
            raise ValueError(
                "the chat template leaves out the beginning of the last message, of role "
                "'assistant', such as its thoughts; mend the template or the message"
            )
        # Of the given part alone: the end of the header that opens the turn is no part of it.
        return text if behind.startswith(" ") or not given.strip() else text.rstrip()

    def _lost(self, messages: list[dict], text: str) -> list[int]:
        """Which messages' texts are not in their rendering ``text``.

        What is looked for are marks around each text: templates may trim, escape or move it. Of an
        assistant's text the beginning may be missing, as many templates forget earlier thoughts,
        and beside tool calls all of it.
        """
        texts = ["" if m.get("tool_calls") else m.get("content") or "" for m in messages]
        lost = [i for i, content in enumerate(texts) if content.strip() not in text]
        roles = tuple(message["role"] for message in messages)
        if not lost and roles in self._sound:
            return []  # short texts may be found by chance, so that roles are tried with marks
        marks = [(f"{MARK}{i}BEGIN ", f" {MARK}{i}END") for i in range(len(messages))]
        marked = [
            {**message, "content": content.join(pair)} if content.strip() else message
            for message, content, pair in zip(messages, texts, marks, strict=True)
        ]
        with contextlib.suppress(ValueError):  # a template that wants these very texts
            shown = self.render(marked)
            lost = [
                i
                for i, pair in enumerate(marks)
                for mark in pair[roles[i] == "assistant" :]
                if texts[i].strip() and mark.strip() not in shown
            ]
        if not lost:
            self._sound.add(roles)
        return lost


def checked(prompt: Any) -> list[dict]:
    """Messages of a prompt, each with its content as one text.

    Args:
        prompt: A text, which is a user's message, or a list of messages.

    Raises:
        ValueError: For anything else, and for parts of a content that are no text.

    >>> parts = [{"type": "text", "text": "2+"}, {"type": "text", "text": "3="}]
    >>> checked([{"role": "user", "content": parts}])
    [{'role': 'user', 'content': '2+3='}]
    """
    messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    whole = isinstance(messages, list) and messages and all(map(is_message, messages))
    if not whole or prompt == "":
        raise ValueError(
            f"must be a text or a list of messages with role and content, got {str(prompt)[:60]!r}"
        )
    return [joined(number, message) for number, message in enumerate(messages, start=1)]


def is_message(message: Any) -> bool:
    """Whether this is a chat message: who says it, and what; a content may be a list of parts.

    >>> is_message({"role": "user", "content": "1+1="}), is_message("1+1=")
    (True, False)
    """
    return (
        isinstance(message, dict)
        and isinstance(message.get("role"), str)
        and (isinstance(message.get("content"), str | list) or "tool_calls" in message)
    )


def joined(number: int, message: dict) -> dict:
    """The message with a text for a list of parts: templates for texts alone would lose them."""
    content = message.get("content")
    if not isinstance(content, list):
        return message
    for part in content:
        text = part.get("text") if isinstance(part, dict) and part.get("type") == "text" else None
        if not isinstance(text, str):
            raise ValueError(
                f"has a part in message {number} that is no text, {str(part)[:60]!r}; parts must "
                'be {"type": "text", "text": ...}'
            )
    return {**message, "content": "".join(part["text"] for part in content)}


def in_parts(message: dict) -> dict:
    content = message.get("content")
    if not isinstance(content, str):
        return message
    return {**message, "content": [{"type": "text", "text": content}]}


def choose_template(tokenizer: Any, name: str | None, key: str) -> str:
    """The tokenizer's template, or of several the one with this name, else ``default``."""
    found = getattr(tokenizer, "chat_template", None)
    if found is None:
        raise ValueError(
            f"{key} is true, but the tokenizer has no chat template; set it to false, or save "
            "chat_template.jinja beside the tokenizer"
        )
    templates = found if isinstance(found, dict) else {"default": found}
    if (name or "default") not in templates:
        raise ValueError(
            f"{key}_arguments: the tokenizer's chat templates are {sorted(templates)}; set "
            f"chat_template to one of them, got {name!r}"
        )
    return templates[name or "default"]


def check_arguments(source: str, arguments: Mapping[str, Any], key: str) -> None:
    """Refuse arguments that the template cannot read, as their names are nowhere in it."""
    words = set(re.findall(r"\w+", source))
    for name in arguments:
        if name in _OWN:
            raise ValueError(f"{key}: {name!r} is set by the rows and the run; take it out")
        if name not in words:
            near = difflib.get_close_matches(name, words, n=1)
            meant = f", did you mean {near[0]!r}?" if near else "; take it out, or mend the name"
            raise ValueError(f"{key}: the chat template reads no {name!r}{meant}")


def sandbox(limit: int) -> Any:
    """The sandbox in which transformers runs templates, without results that fill the memory.

    A long repetition is refused before it is made. Nothing is computed while a template is
    compiled, where no limit would hold: the optimizer is off, and what a template writes passes
    through a function of the context, which is not known then.
    """
    environment = chat_template_utils._compile_jinja_template("").environment
    bounded = environment.overlay(
        optimized=False, finalize=pass_context(lambda context, value: value)
    )
    compute = bounded.call_binop

    def call_binop(context: Any, operator: str, left: Any, right: Any) -> Any:
        for many, times in ((left, right), (right, left)):
            repeats = isinstance(times, int) and isinstance(many, str | list | tuple)
            if operator == "*" and repeats and len(many) * times > limit:
                raise TooLong(f"the chat template writes over {limit:,} characters")
        whole = isinstance(left, int) and isinstance(right, int)
        if operator == "**" and whole and left.bit_length() * right > LONGEST_POWER:
            raise ValueError(f"a power of more than {LONGEST_POWER} bits")
        return compute(context, operator, left, right)

    bounded.intercepted_binops = frozenset({"*", "**"})
    bounded.call_binop = call_binop
    return bounded


@contextlib.contextmanager
def limited_time(seconds: float) -> Iterator[None]:
    """Raise TimeoutError after so many seconds of computing; only in the program's main thread.

    The clock of the processor, as a machine may sleep; its signal is none that others use.
    """
    if threading.current_thread() is not threading.main_thread():
        yield  # Python runs handlers of signals in no other thread
        return

    def stop(*_: Any) -> None:
        raise TimeoutError(f"it takes over {seconds:g} s")

    before = signal.signal(signal.SIGVTALRM, stop)
    signal.setitimer(signal.ITIMER_VIRTUAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        signal.signal(signal.SIGVTALRM, before)


def reason(error: Exception) -> str:
    """The first line of what an error says."""
    return (str(error).splitlines() or [type(error).__name__])[0]
