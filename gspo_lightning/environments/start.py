"""What is refused before a run with an environment begins.

Decides that what an episode earns must be scored, that settings of turns must be read by somebody,
and that a checkpoint imports no environment.
"""

from collections.abc import Iterable, Mapping
from typing import Any

from gspo_lightning.bounds import check_at_least, check_positive
from gspo_lightning.environments.episode import COLUMN, Environment, EnvironmentReward, Episode

MAX_TURNS = 8  # unless a sampler is told otherwise


class LeftOut(Environment):
    """Stands for an environment that only its name is known of.

    Args:
        what: Its class.
    """

    def __init__(self, what: str) -> None:
        self.what = what

    def begin(self, row: dict, seed: int) -> Episode:
        """Refuse."""
        raise ValueError(f"the environment {self.what} is named here and not imported")


def check_turns(environment: Environment | None, max_turns: int, seconds: float | None) -> None:
    """Refuse settings of a sampler's turns that are out of range, or that nothing would read.

    Raises:
        ValueError: Naming the setting.
    """
    check_at_least(1, "sampler.", max_turns=max_turns)
    check_positive("sampler.", environment_seconds=seconds)
    if environment is None and (max_turns != MAX_TURNS or seconds is not None):
        name = "environment_seconds" if max_turns == MAX_TURNS else "max_turns"
        raise ValueError(
            f"sampler.{name} is for turns with an environment, and there is none; set "
            f"sampler.environment, or take {name} out"
        )


def check_rewards(environment: Environment | None, terms: Mapping[str, Any]) -> None:
    """Refuse an environment whose rewards nobody asks for, and the other way round.

    Raises:
        ValueError: Naming the setting.
    """
    if isinstance(environment, LeftOut):  # refused where something is to be drawn
        return
    own = {name: term for name, term in terms.items() if isinstance(term.fn, EnvironmentReward)}
    if environment is None and own:
        raise ValueError(
            f"reward {next(iter(own))!r} is an EnvironmentReward, and the sampler has no "
            "environment; set model.sampler.environment, or take the term out"
        )
    if environment is not None and not own:
        raise ValueError(
            "model.sampler.environment needs a term that gives what its episodes earn, and says "
            "what becomes of its errors: model.rewards.NAME.fn: gspo_lightning.EnvironmentReward"
        )
    for name, term in own.items():
        if term.policy.retries:
            raise ValueError(
                f"reward {name!r}: on_error {term.on_error!r} would ask an episode again that is "
                "over; use stop or skip"
            )


def check_start(sampler: Any, data: Any) -> None:
    """Look at data and chat template, before anything is loaded.

    Args:
        sampler: Its ``messages`` take the template that the prompts are rendered with.
        data: The data module.

    Raises:
        ValueError: If the environment is missing, the template takes no messages, or the data has
            a column of the episodes' name.
    """
    environment = getattr(sampler, "environment", None)
    if environment is None:
        return
    if isinstance(environment, LeftOut):
        raise ValueError(
            f"the environment {environment.what} is named here and not imported: checkpoints, and "
            "configs of train(...), do no more; set model.sampler.environment, or call "
            "train(environment=...) or load_from_checkpoint(path, sampler=...)"
        )
    sampler.messages.template = getattr(data, "chat", None)
    try:
        environment.prepare(sampler.messages)
    except ValueError as error:
        raise ValueError(f"model.sampler.environment: {error}") from error
    examples: Mapping[str, Iterable[tuple[Any, dict]]] = getattr(data, "examples", {})
    for key, pairs in examples.items():
        for number, (_, row) in enumerate(pairs, start=1):
            if COLUMN in row:
                raise ValueError(
                    f"data.{key}: row {number} has a column {COLUMN!r}, where the sampler writes "
                    "what the environment said; rename it"
                )
