"""Short flags: `gspo fit --policy NAME --data FILE --reward my_rewards.polite`.

Decides which long key each of them stands for, and the config that such a command has if it names
none. They are written out before the command line is parsed, so that a run's config has the long
keys alone. Imports the standard library alone.
"""

import itertools
import json
import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

SHORT = {  # of each flag: the key that it stands for, and what it is
    "policy": ("model.policy.path", "the model to train, a folder or a name on the hub"),
    "data": ("data.path", "prompts: a file, a folder or a dataset's name on the hub"),
    "val": ("data.val_path", "held-out prompts"),
    "reward": ("model.rewards", "import path of a reward function; again for a further one"),
    "rollouts": ("data.num_rollouts", "length of the run"),
    "prompts_per_rollout": ("data.prompts_per_rollout", "prompts, per rank"),
    "group_size": ("model.sampler.group_size", "completions of a prompt"),
    "max_new_tokens": ("model.sampler.max_new_tokens", "longest completion"),
    "learning_rate": ("model.optimizer.learning_rate", "of AdamW"),
    "devices": ("trainer.devices", "number of devices"),
    "run_folder": ("trainer.default_root_dir", "where the run writes"),
    "seed": ("seed_everything", "of everything that is drawn"),
}
BASE = "base"  # the config without --config
OWN = {("doctor", "max_new_tokens")}  # options that a command has under the same name
_CLASS = re.compile(r"(\w+\.)*[A-Z]\w*|\{.*|.*\.ya?ml", re.DOTALL)  # what Lightning's --data takes


def written_out(words: Sequence[str]) -> list[str]:
    """A command line, without the program's name, in which each short flag is its long key.

    They stand at the end: a config behind a flag does not take it back, nor does a mapping around
    its key, which is set in that mapping instead.

    Raises:
        ValueError: If a flag has no value, or stands beside another one of the same key.

    >>> written_out(["fit", "--policy", "my/model", "--reward", "mine.polite"])[:3]
    ['fit', '--config', 'base']
    >>> written_out(["fit", "--config", "a.yaml", "--rollouts=5"])
    ['fit', '--config', 'a.yaml', '--data.num_rollouts', '5']
    """
    found: list[str] = []
    flags: list[str] = []
    rewards: list[str] = []
    given: dict[str, str] = {}  # flags by their keys
    rest = list(words)
    while rest:
        word = rest.pop(0)
        name, equals, value = word.removeprefix("--").partition("=")
        following = value if equals else rest[0] if rest else ""
        if not _is_short(words[0], word, name, following):
            found.append(word)
            continue
        key, what = SHORT[name]
        if not equals:
            if not rest or rest[0].startswith("--"):
                raise ValueError(f"{name}: --{name} needs a value: {what}")
            value = rest.pop(0)
        if name == "reward":
            rewards.append(value)
        elif key in given:
            raise ValueError(f"{name}: --{name} is given twice; leave one out")
        else:
            flags += [f"--{key}", value]
        given[key] = f"--{name}"
    if not given:
        return found
    for word, following in itertools.zip_longest(words, words[1:], fillvalue=""):
        flag, equals, value = word.partition("=")
        key = flag.replace(".init_args", "").removeprefix("--")
        key = "model.rewards" if key.startswith("model.rewards") else key.rstrip("+")
        if not word.startswith("--") or flag in given.values():
            continue
        value = value if equals else following
        for other in given:
            if key == other or (other.startswith(f"{key}.") and _holds(key, value, other)):
                raise ValueError(
                    f"{other}: {given[other]} and {flag} set the same key; leave one out"
                )
    found += flags
    if rewards:
        found.append(f"--model.rewards={json.dumps(_terms(rewards))}")
    if not any(w.partition("=")[0] in ("--config", "-c") for w in words):
        found[1:1] = ["--config", BASE]
    return found


def help_text() -> str:
    """What each short flag stands for, in one paragraph."""
    flags = ", ".join(f"--{name} is --{key} ({what})" for name, (key, what) in SHORT.items())
    alone = f"A command with one of them and no --config has --config {BASE}."
    return f"Short flags win over every config: {flags}. {alone}"


def _is_short(command: str, word: str, name: str, value: str) -> bool:
    if not word.startswith("--") or name not in SHORT or (command, name) in OWN:
        return False
    # Lightning's own --data names the class of the data, or a file of its settings.
    return name != "data" or not _CLASS.fullmatch(value) or Path(value).is_dir()


def _holds(key: str, value: str, inner: str) -> bool:
    """Whether the value of a key sets a key inside of it: in a mapping, or as the whole policy."""
    mapping = value.startswith("{")
    last = inner.rpartition(".")[2]
    told = re.search(rf"\b{last}['\"]?\s*:", value) is not None
    return told if mapping else key == "model.policy" or value == "null"


def _terms(paths: list[str]) -> dict[str, dict[str, str]]:
    """Reward terms, each under the last part of its path."""
    whole = [path if "." in path else f"gspo_lightning.rewards.{path}" for path in paths]
    names = numbered([path.rpartition(".")[2] for path in paths])
    return {name: {"fn": path} for name, path in zip(names, whole, strict=True)}


def numbered(names: Sequence[str]) -> list[str]:
    """Names that are all different: the second of a name, and those behind it, get a number.

    >>> numbered(["right", "kind", "right"])
    ['right', 'kind', 'right_2']
    """
    seen: Counter[str] = Counter()
    found = []
    for name in names:
        seen[name] += 1
        found.append(name if seen[name] == 1 else f"{name}_{seen[name]}")
    return found
