"""What a continued run must have in common with its beginning, or it would be another run.

Decides which settings count and how a difference is told. Whoever has something that must not
change, such as a model or the data, has a method `fingerprints`.
"""

import hashlib
import json
import os
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

# Settings that may change at will. Paths: what they lead to has a fingerprint of its own, or comes
# from the checkpoint. Devices, and how much is computed at once: so that a run can move, or go on
# with less memory; only rounding changes, and the checkpoint has the sizes that an unchanged config
# continues with; where a sampler's engine is, too. Length, learning rate, evaluation: the point of
# continuing with another config. Limits that end a run early: they change nothing before that.
_FREE = re.compile(
    r"(?:data\.init_args\.(?:num_rollouts|num_steps|path|val_path|test_path|predict_path"
    r"|val_batch_size|split|val_split|name)"
    r"|model\.init_args\.(?:optimizer|evaluation)\..*"
    r"|model\.init_args\.(?:learning_rate|frozen_device|policy\.path|policy\.revision"
    r"|micro_batch_size|micro_batch_tokens|sampler\.init_args\.(?:inner\.init_args\.)?"
    r"(?:batch_size|server|transport|folder|timeout|start_timeout|noise_limit"
    r"|engine\.(?!dtype$).*)|max_faults|stop_when"
    r"|reference\.(?:path|device|batch_size)|rewards\..*\.(?:device|batch_size)))"
)
# What was so before there was a setting, where that is neither null nor false.
_BEFORE = {
    "model.init_args.mismatch.correction": "none",
    "model.init_args.mismatch.cap": 2.0,
    "model.init_args.sampler.init_args.max_turns": 8,
}
_COMPARED = ("model.", "data.", "trainer.precision")
_MARK = re.compile(r"[0-9a-f]{16}")  # what `digest` returns
LONGEST_VALUE = 60  # characters

# Class paths that changed. A config with an old one is refused in one line that says the new one; a
# checkpoint whose config had it is compared as if it had the new one, so that its run goes on.
# By module, or by class where the module's name is a room's now and holds something else.
MOVED = {
    "gspo_lightning.checkpoint_io": "gspo_lightning.checkpoint.io",
    "gspo_lightning.classifier": "gspo_lightning.frozen",
    "gspo_lightning.experiment": "gspo_lightning.compare.experiment",
    "gspo_lightning.gae": "gspo_lightning.critic.gae",
    "gspo_lightning.lora": "gspo_lightning.policy",
    "gspo_lightning.predictions": "gspo_lightning.callbacks",
    "gspo_lightning.preferences": "gspo_lightning.data",
    "gspo_lightning.progress": "gspo_lightning",
    "gspo_lightning.reward_model": "gspo_lightning.supervised",
    "gspo_lightning.sft": "gspo_lightning.supervised",
    "gspo_lightning.signals": "gspo_lightning.checkpoint.signals",
    "gspo_lightning.supervised.PreferenceData": "gspo_lightning.data.PreferenceData",
    "gspo_lightning.supervised.SFTData": "gspo_lightning.data.SFTData",
    "gspo_lightning.text_rewards": "gspo_lightning.rewards",
    "gspo_lightning.text_scores": "gspo_lightning.rewards",
    "gspo_lightning.time_limit": "gspo_lightning.rewards",
    "gspo_lightning.tracing": "gspo_lightning",
    "gspo_lightning.verifiers": "gspo_lightning.rewards",
}


def flat(tree: Any, prefix: str = "") -> dict[str, Any]:
    """Nested dicts as one, keys joined by dots.

    >>> flat({"data": {"path": "a", "rows": [1, 2]}})
    {'data.path': 'a', 'data.rows': [1, 2]}
    """
    if not isinstance(tree, dict):
        return {prefix: tree}
    parts = (flat(v, f"{prefix}.{k}" if prefix else str(k)) for k, v in tree.items())
    return {key: value for part in parts for key, value in part.items()}


def settings(config: Mapping[str, Any]) -> dict[str, Any]:
    """The entries of a flat config that must not change.

    >>> settings({"model.init_args.kl_coef": 0.1, "data.init_args.num_rollouts": 9,
    ...           "trainer.max_epochs": 1, "trainer.precision": "32-true"})
    {'model.init_args.kl_coef': 0.1, 'trainer.precision': '32-true'}
    """
    return {
        key: value
        for key, value in config.items()
        if key.startswith(_COMPARED) and not _FREE.fullmatch(key)
    }


def collect(trainer: Any, module: Any) -> dict[str, Any]:
    """All marks of a run, plain values: of the module, its tokenizer, the data, the callbacks."""
    marks: dict[str, Any] = {
        "seed_everything": int(os.environ.get("PL_GLOBAL_SEED", 0)),
        "number of ranks": trainer.world_size,
    }
    if getattr(module, "tokenizer", None) is not None:
        marks["tokenizer"] = tokenizer_fingerprint(module.tokenizer)
    for owner in (module, trainer.datamodule, *trainer.callbacks):
        make = getattr(owner, "fingerprints", None)
        if callable(make):
            marks |= make()
    return marks


def moved(path: str) -> str:
    """The class path as it is now; one that never changed comes back as it is.

    >>> moved("gspo_lightning.verifiers.MathVerify"), moved("mine.reward")
    ('gspo_lightning.rewards.MathVerify', 'mine.reward')
    """
    if path in MOVED:
        return MOVED[path]
    module, _, name = path.rpartition(".")
    return f"{MOVED[module]}.{name}" if module in MOVED else path


def differences(saved: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """What is not as it was, one text each; an entry that is absent counts as null or false.

    A class path that the package has renamed since is the same one.

    >>> differences({"tokenizer": "a1", "data.path": "b2", "kl": 0.1},
    ...             {"tokenizer": "a1", "data.path": "c3", "kl": 0.2})
    ['data.path has other content', 'kl 0.1 -> 0.2']
    """
    saved = {key: moved(v) if isinstance(v, str) else v for key, v in saved.items()}
    saved = {key: value for key, value in _BEFORE.items() if key in now} | saved
    # a switch that came after the checkpoint was written is off in its run
    saved, now = ({k: v for k, v in marks.items() if v is not False} for marks in (saved, now))
    keys = [key for key in sorted(saved.keys() | now.keys()) if saved.get(key) != now.get(key)]
    if {"data.path", "data.rows"} <= {*keys}:  # one side has a mark of tokens, the other of rows
        keys = [key for key in keys if key not in ("data.rows", "data.rendering")]
    return [_difference(key, saved.get(key), now.get(key)) for key in keys]


def _difference(key: str, old: Any, new: Any) -> str:
    if key == "data.path" and (old is None or new is None):
        return (
            "data.path cannot be compared: prompts of a chat template are told by their rows now, "
            "and on one side they were not"
        )
    if key in ("data.path", "data.rows"):
        return "data.path has other content"
    if key == "data.rendering":
        return "data.system_prompt or data.chat_template_arguments are others"
    if key == "tokenizer":
        return f"{key} is another"
    if key.startswith("model.") and isinstance(old, str) and _MARK.fullmatch(old):
        return f"{key} has other weights" if new is not None else f"{key} is gone"
    return f"{key} {_short(old)} -> {_short(new)}"


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= LONGEST_VALUE else f"{text[:LONGEST_VALUE]}..."


def refuse_changes(path: Any, changes: list[str]) -> None:
    """Raise ValueError if something has changed, saying what and how to go on all the same."""
    if changes:
        # the way out first: a long list is cut off at its end
        raise ValueError(
            "this would not continue the same run; add --accept_changes true to go on all the "
            f"same, or restore what has changed since {path}: {'; '.join(changes)}"
        )


def digest(items: Iterable[str]) -> str:
    """A short hash of texts in their order.

    >>> digest(["a", "b"]) == digest(["ab"])
    False
    """
    total = hashlib.sha256()
    for item in items:
        data = item.encode("utf-8", "surrogatepass")
        total.update(len(data).to_bytes(8, "little") + data)
    return total.hexdigest()[:16]


def tokenizer_fingerprint(tokenizer: Any) -> str:
    """A short hash of all that decides which ids a text has, and of the chat template."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        state: Any = sorted(tokenizer.get_vocab().items())
    else:
        state = json.loads(backend.to_str())
        for passing in ("truncation", "padding"):  # of the last call, not of the tokenizer
            state.pop(passing, None)
    template = getattr(tokenizer, "chat_template", None)
    special = {name: str(token) for name, token in tokenizer.special_tokens_map.items()}
    return digest(json.dumps(part, sort_keys=True) for part in (state, special, template))


def sources(package: Path) -> dict[str, Path]:
    """The files of a package's source by their names."""
    return {str(file.relative_to(package.parent)): file for file in sorted(package.rglob("*.py"))}


def source_digest(files: Mapping[str, Path]) -> str:
    """A short hash of files, see :func:`sources`."""
    total = hashlib.sha256()
    for name, file in files.items():
        total.update(name.encode() + file.read_bytes())
    return total.hexdigest()[:16]
