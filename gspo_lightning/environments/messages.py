"""How an environment's message becomes tokens behind those that the policy drew.

Decides that nothing drawn is ever tokenised again: with a chat template, a short conversation with
a mark for the policy's turn is rendered, and what the template writes behind the mark is what the
policy is given. The end of turn that the policy drew itself is not given once more.
"""

from collections.abc import Sequence
from typing import Any, Protocol

from gspo_lightning.environments.episode import Turn

MARK = "MARKEDTURN"  # letters alone: nothing that a template would escape, trim or split at
MESSAGE = "MARKEDMESSAGE"
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

    def __init__(self) -> None:
        self.template: Template | None = None

    def read(self, template: Template | None) -> None:
        """Take the template that prompts are rendered with.

        Raises:
            ValueError: If it writes no message behind a turn of the policy, saying what it does.
        """
        self.template = template
        if template is None:
            return
        try:
            tail = self.behind(Turn(MESSAGE))
        except ValueError as error:
            raise ValueError(
                f"sampler.environment: the chat template takes no message behind an answer: "
                f"{error}; use a template that does, or data.chat_template: false"
            ) from error
        if tail.count(MESSAGE) != 1:
            raise ValueError(
                "sampler.environment: the chat template does not write a message behind an answer "
                "once; use a template that does, or data.chat_template: false"
            )

    def behind(self, turn: Turn) -> str:
        """What the template writes behind an answer: its end, the message, the next turn's header.

        Raises:
            ValueError: If the template fails, or writes the answer more than once or not at all.
        """
        assert self.template is not None
        given = turn.message
        new = given if isinstance(given, list) else [{"role": "user", "content": turn.text}]
        answer: dict[str, Any] = {"role": "assistant", "content": MARK}
        text = self.template.render([QUESTION, answer, *new], opens=True)
        before, mark, behind = text.partition(MARK)
        if not mark or MARK in behind:
            raise ValueError("it does not write the answer once")
        return behind

    def ids(
        self, tokenizer: Any, turn: Turn, eos_ids: Sequence[int], ended: bool = True
    ) -> list[int]:
        """Tokens of a message, up to where the policy's next turn begins.

        Args:
            tokenizer: The policy's.
            turn: Its message is not None.
            eos_ids: All ids that end a completion.
            ended: Whether the policy drew one of them at the end of its turn.
        """
        if self.template is None:
            return tokenizer(turn.text, add_special_tokens=False)["input_ids"]
        text = self.behind(turn)
        ends = [tokenizer.convert_ids_to_tokens(i) for i in eos_ids] if ended else []
        header = text.partition(turn.text)[0] if turn.text else text
        found = [(header.find(end), end) for end in ends if end and end in header]
        if not found:
            return tokenizer(text, add_special_tokens=False)["input_ids"]
        # From the end of turn on, so that no tokenizer puts a space where a text would begin.
        ids = tokenizer(text[min(found)[0] :], add_special_tokens=False)["input_ids"]
        first = next((place for place, i in enumerate(ids) if i in eos_ids), -1)
        return ids[first + 1 :]
