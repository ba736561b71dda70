"""Rewards without their functions: of a checkpoint, and of a config that a program has made.

Decides that nothing which a checkpoint names is imported, what stands in a config for a function
that has no import path, and where it is said that a function is missing.
"""

import hashlib
import inspect
import json
from collections.abc import Callable, Mapping
from typing import Any

from gspo_lightning.policy.settings import OWN, plain
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

    def why(self) -> str:
        """Why it is missing, and the way out."""
        return (
            f"{self.what} is not imported from a checkpoint; to train or evaluate, call "
            "load_from_checkpoint(path, rewards={...}) with the functions"
        )


class GivenInPython(LeftOut):
    """Stands, in the config of a run that a program began, for a function without an import path.

    Args:
        what: The function, in words that tell whether it is the same one.
    """

    def why(self) -> str:
        """Why it is missing, and the way out."""
        return (
            f"{self.what} was given by a Python program; call train there again, or put the "
            "function into a module and name it in model.rewards"
        )


def in_config(fn: Callable[..., Any]) -> str | dict[str, Any]:
    """A reward function as a config has it: its import path, if it can be imported from there.

    >>> from gspo_lightning.rewards.text_rewards import variety
    >>> in_config(variety)
    'gspo_lightning.rewards.text_rewards.variety'
    >>> in_config(lambda rows, texts: [1.0])["init_args"]["what"].rpartition(" ")[0]
    'gspo_lightning.rewards.left_out.<lambda>, code'
    """
    module, name = getattr(fn, "__module__", None), getattr(fn, "__qualname__", "")
    if inspect.isfunction(fn) and module != "__main__" and "<" not in name:
        return f"{module}.{name}"
    what = plain(fn)
    if "<" in name and inspect.isfunction(fn):  # others have the same name
        code = fn.__code__
        own = [c for c in code.co_consts if not inspect.iscode(c)]
        told = repr((code.co_code, code.co_names, own)).encode()
        what = f"{what}, code {hashlib.sha256(told).hexdigest()[:8]}"
    elif not isinstance(what, str) and what["class_path"].startswith(OWN) and not what["init_args"]:
        return {"class_path": what["class_path"]}
    elif not isinstance(what, str):
        what = json.dumps(what)
    kind = f"{GivenInPython.__module__}.{GivenInPython.__qualname__}"
    return {"class_path": kind, "init_args": {"what": what}}


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
            raise ValueError(f"reward {name!r}: {term.fn.why()}")
