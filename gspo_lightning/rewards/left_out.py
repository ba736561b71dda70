"""Rewards of a module that comes from a checkpoint: their numbers without their functions.

Decides that nothing which a checkpoint names is imported, and where that is said.
"""

from collections.abc import Mapping
from typing import Any

from gspo_lightning.rewards.terms import RewardTerm


class LeftOut:
    """Stands where a reward function stood.

    Args:
        what: The function, as the checkpoint has it.
    """

    def __init__(self, what: str) -> None:
        self.what = what

    def __call__(self, rows: list[dict], completions: list[str]) -> list[float | None]:
        """Refuse to score."""
        raise ValueError(f"{self.what} is not loaded with a checkpoint")


def terms_left_out(saved: Mapping[str, Any] | None) -> dict[str, RewardTerm]:
    """The terms that a checkpoint's settings name, weights and bounds included.

    >>> terms_left_out({"right": {"fn": "mine.right", "weight": 2.0}})["right"].weight
    2.0
    """
    terms = {}
    for name, entries in (saved or {"reward": {"fn": "its function"}}).items():
        fn = entries["fn"]
        bounds = {"clip": tuple(entries["clip"])} if entries.get("clip") else {}
        what = fn["class_path"] if isinstance(fn, dict) else fn
        terms[name] = RewardTerm(**entries | bounds | {"fn": LeftOut(what)})
    return terms


def check_present(terms: Mapping[str, RewardTerm]) -> None:
    """Raise ValueError, saying what to give, where a reward was left out."""
    for name, term in terms.items():
        if isinstance(term.fn, LeftOut):
            raise ValueError(
                f"reward {name!r}: {term.fn.what} is not imported from a checkpoint; to train or "
                "evaluate, call load_from_checkpoint(path, rewards={...}) with the functions"
            )
