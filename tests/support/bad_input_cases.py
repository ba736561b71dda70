"""What a case of bad input is, for the tables of `test_bad_input.py`.

A case says what is changed about a run that works, and what the one line of its refusal must say.
"""

import zipfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Case:
    """One mistake.

    Attributes:
        name: What is wrong.
        words: All of them stand in the error line: where, what, and the way out.
        options: Added to the command.
        overlay: YAML laid over the config.
        files: Changed before the run, by path: the new content, or a function of the path.
        config: The config that works.
        command: fit, validate or predict.
        work: What may have been done before the refusal.
    """

    name: str
    words: tuple[str, ...]
    options: str = ""
    overlay: str = ""
    files: dict[str, bytes | Callable[[Path], Any]] = field(default_factory=dict)
    config: str = "gspo.yaml"
    command: str = "fit"
    work: frozenset[str] = frozenset()


MARKED = "{class_path: gspo_lightning.rewards.terms.MarkedAnswer}"
WEIGHTS = frozenset({"weights"})  # what only the loaded model shows
AS_ROOT = {"unreadable data", "a run folder without permission"}  # to root, nothing is forbidden


def key(name, words, options, **more):
    """A wrong option of the command line."""
    return Case(name, words, options=options, **more)


def yaml(name, words, text, **more):
    """A wrong overlay."""
    return Case(name, words, overlay=text, **more)


def model(text):
    """YAML for settings of the model."""
    return f"model: {{init_args: {{{text}}}}}"


def reward(text):
    """YAML for one reward term, `a`, instead of the others."""
    return model(f"rewards: {{a: {{{text}}}}}, evaluation: {{correct: null}}")


def scorer(path):
    """YAML for a reward model as the one reward."""
    arguments = f"{{path: {path}, device: cpu}}"
    return reward(f"fn: {{class_path: gspo_lightning.RewardModel, init_args: {arguments}}}")


def callback(name, arguments="{}"):
    """YAML for one callback instead of the others."""
    return f"trainer: {{callbacks: [{{class_path: {name}, init_args: {arguments}}}]}}"


def rule(arguments):
    """YAML for a rule of the KL coefficient."""
    path = "gspo_lightning.kl.ProportionalKL"
    return callback(
        "gspo_lightning.AdaptiveKL", f"{{rule: {{class_path: {path}, init_args: {arguments}}}}}"
    )


def loop(path):
    path.unlink(missing_ok=True)
    path.symlink_to(path.name)


def zipped(path):
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("notes.txt", "no checkpoint")
