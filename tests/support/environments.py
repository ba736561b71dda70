"""Environments for tests: what they say depends on row, seed and what they are told."""

import os
import signal
import threading

from gspo_lightning.environments import Environment, Turn

MESSAGES = ("7<eos>", "answer: 3+", "-", "1<eos>2<eos>3", "9=8, 7")


class Talk:
    """Says one of ``MESSAGES``, of several tokens, with ends of sequence among them."""

    def __init__(self, row: dict, seed: int, turns: int):
        self.state = f"{row.get('i')}/{seed}"
        self.left = turns

    def step(self, text: str) -> Turn:
        self.left -= 1
        self.state = f"{sum(map(ord, self.state + text))}"
        number = int(self.state)
        if self.left <= 0 or number % 7 == 0:
            return Turn(None, reward=number % 4)
        return Turn(MESSAGES[number % len(MESSAGES)], reward=0.5)


class Talker(Environment):
    def __init__(self, turns: int = 3):
        self.turns = turns
        self.seeds: list[int] = []

    def begin(self, row: dict, seed: int) -> Talk:
        self.seeds.append(seed)
        return Talk(row, seed, self.turns)


class Step:
    """An episode that is one function."""

    def __init__(self, step):
        self.step = step


class Says(Environment):
    """Answers what a function of the row and the text gives; an exception is raised."""

    def __init__(self, answer):
        self.answer = answer

    def begin(self, row: dict, seed: int) -> Step:
        def step(text):
            given = self.answer(row, text)
            if isinstance(given, BaseException):
                raise given
            return given

        return Step(step)


class Mortal(Talker):
    """Talks; the step of a process with the number ``TURN_KILL`` kills it, between two others."""

    def __init__(self):
        super().__init__()
        self.left, self.lock = int(os.environ.get("TURN_KILL", 0)), threading.Lock()

    def begin(self, row: dict, seed: int) -> Step:
        episode = super().begin(row, seed)

        def step(text):
            with self.lock:
                self.left -= 1
                if self.left == 0:
                    os.kill(os.getpid(), signal.SIGKILL)
            return episode.step(text)

        return Step(step)


def add(a: int, b: int) -> int:
    """Add two numbers.

    Args:
        a: The first.
        b: The second.
    """
    return a + b
