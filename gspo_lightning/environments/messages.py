"""How an environment's message becomes tokens behind those that the policy drew.

Decides that nothing drawn is ever tokenised again: with a chat template, a short conversation with
a mark for the policy's turn is rendered, and what the template writes behind the mark is what the
policy is given. The end of turn that the policy drew itself is not given once more.
"""

import itertools
from collections.abc import Iterator, Sequence
from typing import Any, Protocol

from gspo_lightning.environments.episode import Turn

MARK = "MARKEDTURN"  # letters alone: nothing that a template would escape, trim or split at
QUESTION = {"role": "user", "content": "a"}


class Template(Protocol):
    """A chat template: ``policy.Chat``."""

    def render(self, messages: list[dict], opens: bool = False) -> str:
        """Messages as text; ``opens`` the assistant's turn behind them."""
        ...


class Messages:
    """Messages of an environment as tokens.

    Attributes:
        template: Renders the messages; None where texts go in as they are.
    """

    def __init__(self, template: Template | None = None) -> None:
        self.template = template
        self._calls: dict[tuple[str, ...], bool] = {}  # of roles: do they follow a tool call?

    def check(self, turn: Turn) -> None:
        """Refuse a template that does not write such a message behind a turn of the policy.

        Args:
            turn: Its message is one word without quotes.

        Raises:
            ValueError: Saying what the template does.
        """
        if self.template is not None:
            self._behind(turn)

    def ids(
        self, tokenizer: Any, turn: Turn, eos_ids: Sequence[int], drawn: int | None
    ) -> list[int]:
        """Tokens of a message, up to where the policy's next turn begins.

        Args:
            tokenizer: The policy's.
            turn: Its message is not None.
            eos_ids: All ids that end a completion.
            drawn: That of them with which the policy ended its turn; None where a stop string did.
        """

        def read(text: str) -> list[int]:
            return tokenizer(text, add_special_tokens=False)["input_ids"]

        if self.template is None:
            return read(turn.text)
        closing, behind, calls = self._behind(turn)
        names = [tokenizer.convert_ids_to_tokens(i) for i in eos_ids]
        ends = [(closing.find(name), name) for name in names if name and name in closing]
        if calls and (drawn is None or not ends):
            raise ValueError(
                f"the chat template ends a tool call with {closing!r}, and no end of sequence of "
                "the policy is in it; set policy.stop_token_ids to the id of its last token"
            )
        if drawn is None:
            return read(behind)
        if not ends:  # what opens the next turn may itself be what ended this one
            ids = read(behind)
            return ids[1:] if ids[:1] == [drawn] else ids
        place, name = min(ends)
        if not behind.startswith(closing[: place + len(name)]):
            return read(behind)[1:]  # an earlier turn ends with another token than the last one
        # From the end of turn on, so that no tokenizer puts a space where a text would begin.
        ids = read(behind[place:])
        return ids[next(i for i, token in enumerate(ids) if token in eos_ids) + 1 :]

    def _behind(self, turn: Turn) -> tuple[str, str, bool]:
        """What ends a turn of the policy, what a message makes of that, and whether it is a call.

        The message stands behind a text, or behind tool calls where the template writes it nowhere
        else.
        """
        given = turn.message
        new = given if isinstance(given, list) else [{"role": "user", "content": turn.text}]
        roles = tuple(message["role"] for message in new)
        if roles in self._calls:
            return (*self._rendered(new, self._calls[roles]), self._calls[roles])
        reasons = []
        for calls in (False, True)[: 1 + ("tool" in roles)]:
            probe = [{**message, "content": f"MARKED{i}"} for i, message in enumerate(new)]
            try:
                shown = self._rendered(probe, calls)[1]
                if all(shown.count(message["content"]) == 1 for message in probe):
                    self._calls[roles] = calls
                    return (*self._rendered(new, calls), calls)
                reasons.append("it does not write the message once")
            except ValueError as error:
                reasons.append(str(error))
        raise ValueError(
            f"the chat template takes no message of the role {roles[0]!r} behind an answer: "
            f"{reasons[-1]}; use another template, or another role"
        )

    def _rendered(self, new: list[dict], calls: bool) -> tuple[str, str]:
        assert self.template is not None
        answer: dict[str, Any] = {"role": "assistant", "content": MARK}
        if calls:
            answer = {"role": "assistant", "content": "", "tool_calls": [*made_up_calls(new)]}
        texts = []
        for messages in ([QUESTION, answer], [QUESTION, answer, *new]):
            opens = len(messages) > 2
            before, mark, behind = self.template.render(messages, opens=opens).rpartition(MARK)
            if not mark or (not calls and MARK in before):
                raise ValueError("it does not write the answer once")
            texts.append(behind)
        return texts[0], texts[1]


def made_up_calls(results: list[dict]) -> Iterator[dict]:
    """Tool calls that messages may be the results of, each with the mark as its argument."""
    for number, message in zip(itertools.count(), results, strict=False):
        function = {"name": message.get("name", "tool"), "arguments": {"text": MARK}}
        call_id = message.get("tool_call_id", f"call{number:05d}")
        yield {"type": "function", "id": call_id, "function": function}
