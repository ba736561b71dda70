"""What is refused before a run with an environment begins.

Decides that what an episode earns must be scored, and that a checkpoint imports no environment.
"""

from collections.abc import Iterable, Mapping
from typing import Any

from gspo_lightning.environments.episode import COLUMN, Environment, EnvironmentReward, Episode


class LeftOut(Environment):
    """Stands where an environment stood, in a sampler that is made from a checkpoint.

    Args:
        what: Its class.
    """

    def __init__(self, what: str) -> None:
        self.what = what

    def begin(self, row: dict, seed: int) -> Episode:
        """Refuse."""
        raise ValueError(f"{self.what} is not loaded with a checkpoint")


def check_rewards(environment: Environment | None, terms: Mapping[str, Any]) -> None:
    """Refuse an environment whose rewards nobody asks for, and the other way round.

    Raises:
        ValueError: Naming the setting.
    """
    own = {name: term for name, term in terms.items() if isinstance(term.fn, EnvironmentReward)}
    if environment is None and own:
        raise ValueError(
            f"reward {next(iter(own))!r} is an EnvironmentReward, and the sampler has no "
            "environment; set model.sampler.environment (of GroupSampler), or take the term out"
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
            f"the environment {environment.what} is not imported from a checkpoint; to train or "
            "evaluate, call load_from_checkpoint(path, sampler=GroupSampler(environment=...))"
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
