"""Dumps of faulty steps: data, and checked to be that before anything is made of them.

Decides what a dump must hold. A dump may come from anywhere: of what it says only settings that are
known by name and type are taken over, none of them chooses code, and whether the model it names may
bring code of its own is for the command line to say.
"""

import inspect
import math
import types
import zipfile
from dataclasses import dataclass, fields, is_dataclass
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import torch
from torch import Tensor

from gspo_lightning.checkpoint.io import damage
from gspo_lightning.guards.faults import VERSION
from gspo_lightning.loss import LossChoices
from gspo_lightning.policy import PolicyConfig
from gspo_lightning.rollout import Rollout


@dataclass(frozen=True)
class Settings:
    """The settings of a run that a step is computed with.

    Attributes:
        policy: Where the policy comes from.
        temperature: Of the sampler.
        precision: The Trainer's.
        device: Kind of the device, ``cpu`` or ``cuda``.
        micro_batch_size: Completions per pass.
        micro_batch_tokens: Tokens per pass.
        critic: Whether the run had one.
    """

    policy: PolicyConfig
    temperature: float
    precision: Literal["32-true", "32", "64-true", "64", "bf16-mixed"]
    device: Literal["cpu", "cuda"]
    micro_batch_size: int
    micro_batch_tokens: int | None = None
    critic: bool = False

    def __post_init__(self) -> None:
        if not 0 < self.temperature < math.inf:
            raise ValueError(f"temperature must be above 0, got {self.temperature}")
        for size in (self.micro_batch_size, self.micro_batch_tokens):
            if size is not None and size < 1:
                raise ValueError(f"a micro-batch must be at least 1, got {size}")
        if "/" in (self.policy.attention or ""):
            raise ValueError(f"settings.policy.attention is {self.policy.attention}, code of a hub")


@dataclass(frozen=True)
class Dump:
    """What a dump holds.

    Attributes:
        minibatch: B rows.
        weights: Of each token in the loss, (B, T).
        policy: State dict of the policy.
        settings: Of the run.
        choices: What the loss is made of.
        found: What was not finite.
        prompts: The prompt of each row.
    """

    minibatch: Rollout
    weights: Tensor
    policy: dict[str, Any]
    settings: Settings
    choices: LossChoices
    found: tuple[str, ...]
    prompts: list[str]

    def __post_init__(self) -> None:
        size = len(self.minibatch)
        for name in ("prompts", "minibatch.texts"):
            texts = self.prompts if name == "prompts" else self.minibatch.texts
            if len(texts) != size:
                raise ValueError(f"{name} must have {size} entries, has {len(texts)}")
        if self.weights.shape != self.minibatch.mask.shape:
            raise ValueError(f"weights must have the shape {tuple(self.minibatch.mask.shape)}")
        for name, value in self.policy.items():
            extra = name.endswith("_extra_state") and isinstance(value, dict)
            if extra and {k: type(v) for k, v in value.items()} == {"start": str, "scale": float}:
                continue
            if not fits(name, str) or not fits(value, Tensor):
                raise ValueError(f"policy.{name} is no tensor")


def load_dump(path: Path, trust_remote_code: bool = False) -> Dump:
    """Read a dump.

    Args:
        path: The file.
        trust_remote_code: Whether code that lies beside the weights of its model may be run.

    Raises:
        ValueError: If the file is not there, or is no whole dump; the message names it.
    """
    if not path.is_file():
        raise ValueError(f"replay: no file {path}; dumps lie in faults/ of the run folder")
    none = f"replay: {path} is no dump of a faulty step"
    if not zipfile.is_zipfile(path):
        raise ValueError(none)
    if (reason := damage(path)) is not None:
        raise ValueError(f"{none}: it {reason}")
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # any, from a file that is made to break its reader
        line = (str(error).splitlines() or [""])[0]
        raise ValueError(f"{none}: {type(error).__name__}: {line[:200]}") from error
    if type(content) is not dict or "minibatch" not in content or "found" not in content:
        raise ValueError(none)
    if content.pop("version", None) != VERSION:
        raise ValueError(f"replay: {path} was written by another version of this program")
    try:
        settings = known("settings", content.get("settings"))
        policy = known("settings.policy", settings.get("policy"))
        settings = settings | {"policy": policy | {"trust_remote_code": trust_remote_code}}
        batch = known("minibatch", content["minibatch"])
        texts = batch.get("texts")  # the rows themselves are not in a dump
        batch = batch | {"rows": [{}] * len(texts if isinstance(texts, list) else [])}
        return made("", Dump, content | {"settings": settings, "minibatch": batch})
    except ValueError as error:
        raise ValueError(f"replay: {path}: {error}") from error


def known(where: str, entries: Any) -> dict[str, Any]:
    """Entries by name."""
    if type(entries) is not dict or not all(type(name) is str for name in entries):
        raise ValueError(f"{where} is no table of entries by name")
    return entries


def made(where: str, kind: Any, entries: dict[str, Any]) -> Any:
    """A dataclass from plain entries, each of which is of the type that its field has.

    Raises:
        ValueError: If an entry is missing, unknown, of another type or out of range.
    """
    prefix, hints = f"{where}." if where else "", get_type_hints(kind)
    values = {}
    for name, value in known(where or "its content", entries).items():
        if name not in hints:
            raise ValueError(f"{prefix}{name} is no entry of a dump")
        inner = [h for h in (hints[name], *get_args(hints[name])) if is_dataclass(h)]
        if inner and value is not None:
            values[name] = made(f"{prefix}{name}", inner[0], value)
        elif fits(value, hints[name]):
            values[name] = value
        else:
            plain = isinstance(value, str | int | float | None)
            said = repr(value)[:80] if plain else f"a {type(value).__name__}"
            wanted = inspect.formatannotation(hints[name]).replace("typing.", "")
            raise ValueError(f"{prefix}{name} is {said}, must be {wanted}")
    try:
        return kind(**values)
    except TypeError as error:  # an entry that has no default is missing
        absent = [f.name for f in fields(kind) if f.name not in values]
        raise ValueError(f"{where or 'it'} lacks one of {', '.join(absent)}") from error


def fits(value: Any, hint: Any) -> bool:
    """Whether a value is plain data of the type that an annotation says.

    >>> fits(1, float), fits(True, int), fits(["a"], list[str]), fits([1], list[str] | None)
    (True, False, True, False)
    """
    kind, inner = get_origin(hint), get_args(hint)
    if kind in (Union, types.UnionType):
        return any(fits(value, each) for each in inner)
    if kind is Literal:
        return type(value) is str and value in inner
    if kind in (list, tuple):
        return type(value) is kind and all(fits(each, inner[0]) for each in value)
    if kind is dict:
        return type(value) is dict and all(
            fits(each, part)
            for pair in value.items()
            for each, part in zip(pair, inner, strict=True)
        )
    if hint is Any:
        return True
    if hint is Tensor:
        return isinstance(value, Tensor) and value.layout is torch.strided
    return type(value) is hint or (hint is float and type(value) is int)
