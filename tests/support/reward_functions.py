"""Reward functions that a config, or another process, can name; the process starts in no time."""

import os
import signal
import sys
import time


def digits(rows: list[dict], completions: list[str]) -> list[float | None]:
    """Share of digits: a reward that differs within most groups."""
    return [sum(c.isdigit() for c in text) / max(len(text), 1) for text in completions]


def talks(rows: list[dict], completions: list[str]) -> list[float | None]:
    """As ``digits``, with a line on standard output, as users have them for debugging."""
    print("judging", completions[0])
    return digits(rows, completions)


def ones(rows, completions):
    return [1.0] * len(completions)


def even_prompts_teach(rows, completions):
    """Rewards differ only in groups whose prompt has an even number of terms."""
    return [
        float(i % 4 == 0) if row["prompt"].count("+") % 2 else 1.0 for i, row in enumerate(rows)
    ]


def length(rows: list[dict], completions: list[str]) -> list[float | None]:
    """Number of characters."""
    return [float(len(text)) for text in completions]


def by_command(rows: list[dict], completions: list[str]) -> list[float | None]:
    """Do what the completion says."""
    return [_obey(row, text) for row, text in zip(rows, completions, strict=True)]


def _obey(row: dict, text: str) -> float | None:
    if text == "sleep":
        time.sleep(60)
    elif text == "hang":  # as some native code does: nothing but a kill ends it
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        while True:
            time.sleep(60)
    elif text == "raise":
        raise KeyError("no such thing")
    elif text == "exit":
        os._exit(7)
    elif text == "sys.exit":
        sys.exit(4)
    elif text == "interrupt":
        raise KeyboardInterrupt
    elif text == "mute":
        raise Mute
    elif text == "50 MB":
        raise ValueError("x" * 50_000_000)
    elif text == "text":
        return "0.5"
    elif text == "close":  # as programs do that become daemons
        os.closerange(3, 256)
        time.sleep(60)
    elif text == "fork":
        return float(os.fork() == 0)  # its child answers 1
    elif text == "none":
        return None
    elif text == "print":
        print("printed by a reward function")
    elif text == "flood":
        print("x" * 1_000_000)
        sys.stdout.close()
    elif text == "pid":
        return float(os.getpid())
    return row.get("value", 0.5)


class Mute(Exception):
    """An error without a text."""

    def __str__(self) -> str:
        raise RuntimeError("no text")


async def slow_judge(rows: list[dict], completions: list[str]) -> list[float | None]:
    """Number of characters, as somebody far away tells it."""
    import asyncio

    await asyncio.sleep(60 if "slow" in completions else 0)
    return [float(len(text)) for text in completions]


def sleepy_digits(rows: list[dict], completions: list[str]) -> list[float | None]:
    """Share of digits; texts that begin with an even digit never return."""
    for text in completions:
        if text[:1] in {"0", "2", "4", "6", "8"}:
            time.sleep(60)
    return [sum(c.isdigit() for c in text) / max(len(text), 1) for text in completions]


def two_for_one(rows: list[dict], completions: list[str]) -> list[float | None]:
    return [0.0] * (len(completions) + 1)


class Scaled:
    """A class with an argument."""

    def __init__(self, factor: float) -> None:
        self.factor = factor

    def __call__(self, rows: list[dict], completions: list[str]) -> list[float | None]:
        return [self.factor * len(text) for text in completions]


class Counting:
    """Counts the letter a."""

    def __init__(self):
        self.counts = {"letters": 0}

    def __call__(self, rows, completions):
        self.counts = {"letters": sum(text.count("a") for text in completions)}
        return [0.0] * len(completions)


class SlowAtFirst:
    """Never returns the first time; a file remembers that."""

    def __init__(self, file: str) -> None:
        self.file = file

    def __call__(self, rows: list[dict], completions: list[str]) -> list[float | None]:
        if not os.path.exists(self.file):
            open(self.file, "w").close()
            time.sleep(60)
        return [float(len(text)) for text in completions]


def stops_its_run(rows: list[dict], completions: list[str]) -> list[float | None]:
    """Send the signal `STOP_WITH` twice, while this process is asked; then be slow."""
    if not os.path.exists("stopped"):
        open("stopped", "w").close()
        for _ in range(2):
            os.kill(os.getppid(), int(os.environ["STOP_WITH"]))
            time.sleep(0.2)
    if not os.path.exists("enough"):
        time.sleep(2)
    return [0.0] * len(completions)
