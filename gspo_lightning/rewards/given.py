"""What a program may give as rewards: terms by name, or functions as they are at hand.

Decides the name of a term that comes without one.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields
from typing import TYPE_CHECKING, Any

from gspo_lightning.rewards.terms import RewardTerm
from gspo_lightning.start.short import numbered

if TYPE_CHECKING:  # in a config rewards are terms by name
    GivenReward = RewardTerm | Callable[[list[dict], list[str]], Any]
    GivenRewards = GivenReward | Sequence[GivenReward] | Mapping[str, GivenReward]
else:
    GivenRewards = dict[str, RewardTerm]


def as_terms(given: "GivenRewards") -> dict[str, RewardTerm]:
    """Reward terms by name, of one function or term, a list of them, or a dict.

    A function gives its term its name, an object that of its class; further ones of one name are
    numbered.

    Raises:
        ValueError: For what is no reward, naming it.

    >>> list(as_terms([len, print, RewardTerm(len)]))
    ['len', 'print', 'len_2']
    """
    if not isinstance(given, Mapping):
        rewards: Any = given if isinstance(given, list | tuple) else [given]
        given = dict(zip(numbered([term_name(r) for r in rewards]), rewards, strict=True))
    return {name: _term(name, reward) for name, reward in given.items()}


def term_name(reward: Any) -> str:
    """The name of a reward's term; a lambda has none of its own."""
    fn = getattr(reward, "fn", reward)  # of a term, or of what wraps a function
    fn = getattr(fn, "func", fn)  # of a partial
    name = getattr(fn, "__name__", type(fn).__name__)
    return name if name.isidentifier() else "reward"


def _term(name: str, reward: Any) -> RewardTerm:
    if isinstance(reward, RewardTerm):
        return reward
    wanted = f"RewardTerm ({', '.join(f.name for f in fields(RewardTerm) if f.init)})"
    wanted += ", or a function of rows and completions"
    if isinstance(reward, type):
        raise ValueError(
            f"model.rewards.{name}: expected {wanted}, got the class {reward.__name__}; give an "
            f"object of it: {reward.__name__}()"
        )
    if hasattr(reward, "forward"):
        raise ValueError(
            f"model.rewards.{name}: got a model, {type(reward).__name__}; give its folder or hub "
            "name: RewardModel(path)"
        )
    if not callable(reward):
        what = f"{reward!r}"[:60] if isinstance(reward, str) else type(reward).__name__
        raise ValueError(f"model.rewards.{name}: expected {wanted}, got {what}")
    return RewardTerm(reward)
