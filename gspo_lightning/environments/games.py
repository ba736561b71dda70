"""A guessing game, the smallest environment that can be won by no single turn."""

import re

from gspo_lightning.bounds import check_at_least
from gspo_lightning.environments.episode import Environment, Turn


class GuessNumber(Environment):
    """Guess the number of the row: the environment says whether it is higher or lower.

    A turn is a guess: the last number in it. The episode ends with the right one, or with the last
    of ``tries``.

    Args:
        tries: Guesses at most.
        column: Column with the number to guess.
        higher: What is said where the number is higher than the guess.
        lower: What is said where it is lower.
        unread: What is said to a turn without a number, which costs a try as well.
        discount: Of the reward of 1, what is lost for each guess after the first.

    Raises:
        ValueError: If ``tries`` is below 1.

    >>> episode = GuessNumber().begin({"answer": "7"}, seed=0)
    >>> [episode.step(guess).message for guess in ("5", "I guess 9", "7")]
    ['higher', 'lower', None]
    """

    def __init__(
        self,
        tries: int = 4,
        column: str = "answer",
        higher: str = "higher",
        lower: str = "lower",
        unread: str = "a number, please",
        discount: float = 0.0,
    ) -> None:
        check_at_least(1, "GuessNumber.", tries=tries)
        self.tries, self.column = tries, column
        self.higher, self.lower, self.unread = higher, lower, unread
        self.discount = discount

    def begin(self, row: dict, seed: int) -> "Guesses":
        """Take the number of a row."""
        return Guesses(self, int(row[self.column]))


class Guesses:
    """One game."""

    def __init__(self, game: GuessNumber, number: int) -> None:
        self.game, self.number, self.done = game, number, 0

    def step(self, text: str) -> Turn:
        """Say higher or lower."""
        self.done += 1
        found = re.findall(r"-?\d+", text)
        guess = int(found[-1]) if found else None
        if guess == self.number:
            return Turn(None, reward=1 - self.game.discount * (self.done - 1))
        if self.done == self.game.tries:
            return Turn(None)
        if guess is None:
            return Turn(self.game.unread)
        return Turn(self.game.higher if self.number > guess else self.game.lower)
