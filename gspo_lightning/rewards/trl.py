"""Reward functions with the arguments that TRL calls them with.

Decides what stands for each of TRL's arguments here, and which of them there is nothing for.
"""

import inspect
from collections.abc import Callable
from typing import Any, Literal

# What TRL 1.16 gives beside prompts, completions and the columns, and nothing here has.
ABSENT = ("completion_ids", "trainer_state", "log_extra", "log_metric", "environments")
Form = Literal["auto", "texts", "messages"]


class TRLReward:
    """A reward function of TRL's signature: ``fn(prompts, completions, **columns)``.

    It gets the columns of the rows, one list each, and ``None`` where a row lacks one; it may be
    ``async``, and give ``None`` where it does not apply. Its prompts are those of the data, before
    a chat template.

    Args:
        fn: The function; from a config its import path.
        completions: ``texts``; ``messages``, each completion a list with one message of the
            assistant's; ``auto`` gives messages where the prompt is a list of messages, as TRL
            does.
        prompt_column: Column with the prompt.

    Raises:
        ValueError: If ``fn`` cannot be called so, or needs what only TRL's trainer has.

    Source:
        ``reward_funcs`` of TRL 1.16, ``GRPOTrainer``.

    >>> def near(prompts, completions, answer, **kwargs):
    ...     return [float(text == right) for text, right in zip(completions, answer)]
    >>> TRLReward(near)([{"prompt": "1+1=", "answer": "2"}] * 2, ["2", "3"])
    [1.0, 0.0]
    """

    def __init__(
        self, fn: Callable[..., Any], completions: Form = "auto", prompt_column: str = "prompt"
    ) -> None:
        if completions not in ("auto", "texts", "messages"):
            raise ValueError(
                f"TRLReward.completions must be auto, texts or messages, got {completions!r}"
            )
        self.fn = fn
        self.completions = completions
        self.column = self.prompt_column = prompt_column
        self._needed = needed_columns(fn)

    def check_row(self, row: dict) -> None:
        """Refuse a row, before training, without a column that the function has to have."""
        for name in self._needed:
            if name not in row:
                raise ValueError(f"there is no column {name!r}, only {sorted(row)}")

    def __call__(self, rows: list[dict], completions: list[str]) -> Any:
        """What the function gives for B completions; something to await if it is ``async``."""
        prompts = [row[self.prompt_column] for row in rows]
        names = dict.fromkeys(name for row in rows for name in row)
        own = ("prompts", "completions", "prompt", "completion", self.prompt_column)
        columns = {n: [row.get(n) for row in rows] for n in names if n not in own}
        given = [self._completion(*pair) for pair in zip(prompts, completions, strict=True)]
        return self.fn(prompts=prompts, completions=given, **columns)

    def _completion(self, prompt: Any, text: str) -> Any:
        chat = self.completions == "messages"
        if self.completions == "auto":
            chat = isinstance(prompt, list)
        return [{"role": "assistant", "content": text}] if chat else text


def needed_columns(fn: Callable[..., Any]) -> list[str]:
    """The arguments of a function, beside prompts and completions, that have no default.

    Raises:
        ValueError: If it takes arguments by position, or needs what only TRL's trainer has.

    >>> needed_columns(lambda completions, answer, level=1, **kwargs: [])
    ['answer']
    """
    name = getattr(fn, "__name__", type(fn).__name__)
    try:
        found = inspect.signature(fn).parameters.values()
    except (TypeError, ValueError):
        return []  # written in C: seen when it is called
    named = [p.name for p in found if p.kind is not p.VAR_KEYWORD]
    if "completions" not in named and len(named) == len(found):
        raise ValueError(
            f"TRLReward.fn: {name} takes ({', '.join(named)}), and TRL's functions take "
            "(prompts, completions, **columns); give one of (rows, completions) without TRLReward"
        )
    needed = [p.name for p in found if p.kind is not p.VAR_KEYWORD and p.default is p.empty]
    if absent := [n for n in needed if n in ABSENT]:
        raise ValueError(
            f"TRLReward.fn: {name} needs {absent[0]}, which only TRL's trainer has; give it a "
            "default, and write what it is needed for as a function of (rows, completions)"
        )
    if len(named) == len(found):  # it takes no others, and a row may have them
        raise ValueError(
            f"TRLReward.fn: {name} takes ({', '.join(named)}) alone; add **kwargs, for the other "
            "columns of the rows"
        )
    return [n for n in needed if n not in ("prompts", "completions")]
