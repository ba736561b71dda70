"""A user who says what the row of the data says: conversations with a script."""

import re

from gspo_lightning.checkpoint.quoted import printable
from gspo_lightning.environments.episode import Environment, Turn


class ScriptedUser(Environment):
    """Says the replies of the row one after the other, and looks at the answers between them.

    Args:
        replies: Column with what the user says behind the policy's turns, a list of texts. Behind
            the last of them the policy has one more turn.
        answers: Column with the right answer of each turn, a list of texts, or null where nothing
            is right or wrong; each right one earns its share of 1. A row without the column earns
            nothing.
        pattern: Finds the answer in a turn: group 1 of its last match. As it stands, the last
            number.
        stop_at_wrong: End the episode at the first turn that is not right.

    Raises:
        ValueError: If the pattern is none.

    >>> row = {"replies": ["-4="], "answers": ["16", "12"]}
    >>> episode = ScriptedUser().begin(row, seed=0)
    >>> episode.step("answer: 16"), episode.step("answer: 11")
    (Turn(message='-4=', reward=0.5), Turn(message=None, reward=0.0))
    """

    def __init__(
        self,
        replies: str = "replies",
        answers: str = "answers",
        pattern: str = r"(-?\d+(?:\.\d+)?)",
        stop_at_wrong: bool = False,
    ) -> None:
        self.replies, self.answers = replies, answers
        self.stop_at_wrong = stop_at_wrong
        try:
            self.pattern = re.compile(pattern)
        except re.error as error:
            raise ValueError(f"ScriptedUser.pattern: {pattern!r}: {error}") from error
        if self.pattern.groups < 1:
            raise ValueError(f"ScriptedUser.pattern {pattern!r} has no group; put one in brackets")

    def begin(self, row: dict, seed: int) -> "Script":
        """Read the script of a row.

        Raises:
            ValueError: If it is none, or has not one answer for each turn.
        """
        replies, answers = row.get(self.replies), row.get(self.answers)
        if not isinstance(replies, list) or not all(isinstance(text, str) for text in replies):
            text = printable(f"{replies!r:.60}")
            raise ValueError(f"column {self.replies!r} must be a list of texts, got {text}")
        if answers is not None and len(answers) != len(replies) + 1:
            raise ValueError(
                f"column {self.answers!r} must have one answer for each of {len(replies) + 1} "
                f"turns, got {len(answers)}"
            )
        return Script(self, replies, answers)


class Script:
    """One conversation."""

    def __init__(self, user: ScriptedUser, replies: list[str], answers: list | None) -> None:
        self.user, self.replies, self.answers, self.done = user, replies, answers, 0

    def step(self, text: str) -> Turn:
        """Say the next reply."""
        place, self.done = self.done, self.done + 1
        found = self.user.pattern.findall(text)
        last = found[-1] if found else None
        last = last[0] if isinstance(last, tuple) else last
        wanted = None if self.answers is None else self.answers[place]
        right = wanted is None or last == str(wanted)
        counted = 0 if self.answers is None else sum(a is not None for a in self.answers)
        reward = 1 / counted if right and wanted is not None else 0.0
        over = place == len(self.replies) or (self.user.stop_at_wrong and not right)
        return Turn(None if over else self.replies[place], reward)
