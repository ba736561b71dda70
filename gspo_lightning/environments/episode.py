"""What an environment is: it begins episodes, which answer what the policy writes.

Decides what an answer may be, and where a reward function finds what an episode earned: in the
column ``episode`` of the completion's row.
"""

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, Protocol

COLUMN = "episode"  # of a row, once its completion is drawn
ROLES = ("user", "tool", "system")  # who may say a message of an environment


@dataclass(frozen=True)
class Turn:
    """An environment's answer to a turn of the policy.

    Attributes:
        message: What the policy reads next: a text, or chat messages (``role`` of user, tool or
            system, ``content``, and what else the chat template knows, such as a tool's ``name``).
            ``None`` ends the episode.
        reward: Added to the reward of the episode.

    Raises:
        TypeError: If the message is of another kind.
        ValueError: If the reward is not finite, or a message has no such role or no text.

    >>> Turn("higher"), Turn(None, reward=1.0)
    (Turn(message='higher', reward=0.0), Turn(message=None, reward=1.0))
    """

    message: str | list[dict] | None
    reward: float = 0.0

    def __post_init__(self) -> None:
        if not isinstance(self.reward, int | float) or not math.isfinite(self.reward):
            raise ValueError(f"a Turn's reward must be a finite number, got {self.reward!r}")
        if self.message is None or isinstance(self.message, str):
            return
        if not isinstance(self.message, list) or not self.message:
            kind = type(self.message).__name__
            raise TypeError(f"a Turn's message must be a text, chat messages or None, got {kind}")
        for message in self.message:
            fits = isinstance(message, dict) and isinstance(message.get("content"), str)
            if not fits or message.get("role") not in ROLES:
                raise ValueError(
                    f"a Turn's chat message must have a content, a text, and a role of {ROLES}, "
                    f"got {str(message)[:60]!r}"
                )

    @property
    def text(self) -> str:
        """The words of the message."""
        if isinstance(self.message, list):
            return "\n".join(message["content"] for message in self.message)
        return self.message or ""


class Episode(Protocol):
    """One conversation; has whatever state it needs, none of which outlives the rollout."""

    def step(self, text: str) -> Turn:
        """Answer a turn of the policy.

        Args:
            text: What it wrote, special tokens kept, without what ended the turn.
        """
        ...


class Environment(ABC):
    """Begins episodes, each a function of row, seed and what the policy writes.

    Then a run that was killed continues bit for bit, as nothing of an episode has to be saved.
    Calls of different rows run side by side in threads: episodes may share what they only read.

    A base class and no protocol: of a protocol, a config would take only classes whose methods have
    the very same annotations.
    """

    @abstractmethod
    def begin(self, row: dict, seed: int) -> Episode:
        """Begin an episode.

        Args:
            row: A copy of the row of the data.
            seed: The same for all completions of a prompt, which are compared with each other.
        """

    def describe(self, chat: Any) -> None:  # noqa: B027 - most have nothing to say
        """Give the chat template, ``policy.Chat``, what prompts must tell of the environment."""

    def prepare(self, messages: Any) -> None:
        """Look, once before a run, at how messages become tokens.

        Args:
            messages: ``Messages``; its ``template`` is the chat template, or None.

        Raises:
            ValueError: If that template does not take this environment's messages.
        """
        messages.check(Turn("MESSAGE"))


class EnvironmentReward:
    """What an episode earned: the sum of its turns' rewards.

    Where the environment failed it is an error of that completion alone, and ``on_error`` of the
    term decides: ``stop`` (the default) ends the run, ``skip`` leaves the completion without a
    reward.
    """

    def __call__(self, rows: list[dict], completions: list[str]) -> list[float | Exception]:
        """Score B completions of a sampler with an environment."""
        return [_earned(row.get(COLUMN)) for row in rows]


def _earned(record: dict[str, Any] | None) -> float | Exception:
    if record is None:
        return RuntimeError("the completion has no episode: the sampler has no environment")
    if record["error"] is not None:
        return RuntimeError(f"the environment failed: {record['error']}")
    return record["reward"]


def transcript(record: dict[str, Any]) -> str:
    """An episode for people: the policy's words, and in brackets those of the environment.

    >>> turns = [{"policy": "5", "environment": "higher"}, {"policy": "7"}]
    >>> transcript({"turns": turns, "error": None})
    '5 [environment: higher] 7'
    """
    parts = []
    for turn in record["turns"]:
        parts.append(turn["policy"])
        if "environment" in turn:
            parts.append(f"[environment: {turn['environment']}]")
    if record["error"] is not None:
        parts.append(f"[environment failed: {record['error']}]")
    return " ".join(parts)


def shown(row: dict, text: str) -> str:
    """A completion for people: with the words of its environment, if it had one."""
    return transcript(row[COLUMN]) if COLUMN in row else text
