"""The settings of a module as plain values: for checkpoints, for loggers, and to make it again.

Decides what stands for an object that is no plain value, and what a checkpoint may make: the
settings' own dataclasses and the package's sampler. A checkpoint is data: nothing that it names is
imported, so reward functions and samplers of others come from whoever loads it.
"""

import inspect
import json
import numbers
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import fields, is_dataclass
from pathlib import Path
from pkgutil import resolve_name
from typing import Any, get_args, get_origin, get_type_hints

from gspo_lightning.checkpoint.fingerprints import flat
from gspo_lightning.checkpoint.io import read_without_tensors
from gspo_lightning.checkpoint.parts import KEY
from gspo_lightning.environments.start import LeftOut
from gspo_lightning.kl import KLRule

OWN = "gspo_lightning."
LONGEST_TEXT = 200  # characters of a value in a logger's table
# What people vary; TensorBoard shows five columns of a tab that could have seventy.
SHOWN_FIRST = (
    "AdaptiveKL.rule.target",
    "model.objective.clip_low",
    "model.objective.ratio",
    "model.optimizer.learning_rate",
    "model.sampler.group_size",
)
FIGURES = ("val/accuracy_greedy", "val/accuracy_sampled", "val/reward", "train/reward")
METHODS = ("sample", "like")  # of a sampler
SAMPLER = "gspo_lightning.sampling.GroupSampler"  # by its name: it stands high above this file
APART = "gspo_lightning.vllm.sampler.VLLMSampler"
AHEAD = "gspo_lightning.vllm.ahead.AsyncSampler"


def plain(value: Any) -> Any:
    """A value as YAML and checkpoints hold it; an object as the config that would make it.

    Of an object of somebody else's class only the class is told: its attributes may be secrets.

    >>> plain({"betas": (0.9, 0.99), "fn": len})
    {'betas': [0.9, 0.99], 'fn': 'builtins.len'}
    """
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, numbers.Real):  # numpy's, too, which a checkpoint must not hold
        return int(value) if isinstance(value, numbers.Integral) else float(value)
    if isinstance(value, str | Path):
        return str(value)
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [plain(item) for item in value]
    if hasattr(value, "__qualname__"):  # a function or a class
        return f"{value.__module__}.{value.__qualname__}"
    own = [kind for kind in type(value).__mro__ if kind.__module__.startswith(OWN)]
    if any(map(is_dataclass, own)) and not callable(value):  # a reward, which is, has a class
        return {f.name: plain(getattr(value, f.name)) for f in fields(value) if f.init}
    if hasattr(value, "get_vocab"):  # a tokenizer, by the place that it is from
        return str(value.name_or_path) or None
    kind = type(value)
    path = f"{kind.__module__}.{kind.__qualname__}"
    names = inspect.signature(kind).parameters if path.startswith(OWN) else ()
    known = {name: plain(getattr(value, name)) for name in names if hasattr(value, name)}
    return {"class_path": path, "init_args": known}


def settings_of(owner: type, arguments: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of a constructor as plain values, once they are seen to be of the right kinds.

    Args:
        owner: The class; its hints say which of the settings' dataclasses an argument must be.
        arguments: ``locals()`` of its constructor.

    Raises:
        ValueError: For an argument of another kind, such as an optimizer of torch's, naming the
            settings that there are.
    """
    hints = _hints(owner)
    for name, hint in hints.items():
        value = arguments[name]
        values = {name: value}
        if get_origin(hint) is dict and isinstance(value, dict):
            values = {f"{name}.{key}": item for key, item in value.items()}
        for key, item in values.items():
            kinds: Any = tuple(kind for kind in (hint, *get_args(hint)) if is_dataclass(kind))
            for kind in (hint, *get_args(hint)):  # such as a Sampler, which is any class with these
                wanted: list[str] = []
                if getattr(kind, "_is_protocol", False):
                    wanted = [*kind.__annotations__, *(n for n in METHODS if n in vars(kind))]
                lacks = [n for n in wanted if not hasattr(item, n) or isinstance(item, type)]
                if lacks and item is not None:
                    got = item.__name__ if isinstance(item, type) else type(item).__name__
                    raise ValueError(
                        f"model.{key}: expected an object with {', '.join(wanted)}, got {got}"
                    )
            left_open = item is None and type(None) in get_args(hint)
            if kinds and not left_open and not isinstance(item, kinds):
                known = ", ".join(f.name for f in fields(kinds[0]) if f.init)
                got = plain(item) if isinstance(item, type) else type(item).__name__
                raise ValueError(f"model.{key}: expected {kinds[0].__name__} ({known}), got {got}")
    return {name: plain(arguments[name]) for name in hints}


def remake(
    owner: Any,
    path: Any,
    given: Mapping[str, Any],
    **others: Callable[[Any], Any],
) -> dict[str, Any]:
    """Arguments for a module's constructor, from the settings that a checkpoint holds.

    Args:
        owner: The module's class.
        path: The checkpoint.
        given: Arguments that win over the checkpoint's. Of a dataclass some fields may be given as
            a dict: ``policy={"path": "elsewhere"}``.
        others: What makes an argument that is no such dataclass, by its name.

    Returns:
        ``given``, and for all other arguments what the checkpoint holds.

    Raises:
        ValueError: If the file cannot be read, or an argument cannot be made from it, saying which
            one to give.
    """
    name = owner.__name__
    found = read_without_tensors(f"{name}.load_from_checkpoint", path)
    if KEY in found:
        raise ValueError(
            f"{path}: its tensors lie in parts, which only a run puts together; load the model "
            "that HFExport wrote, by policy.path, or train on with FSDP2's checkpoints: file"
        )
    saved = found.get("hyper_parameters", {})
    if not saved and "policy" not in given:
        raise ValueError(
            f"{path} does not hold the settings of its policy (an earlier version wrote it); give "
            f"them: {name}.load_from_checkpoint(path, policy=PolicyConfig(...))"
        )
    if saved.get("policy"):  # asked for anew: who loads a checkpoint need not trust its author
        saved["policy"] = saved["policy"] | {"trust_remote_code": False}
    made = dict(given)
    for argument, hint in _hints(owner).items():
        if argument in others:
            made.setdefault(argument, others[argument](saved.get(argument)))
            continue
        if argument not in given and argument not in saved:
            continue
        value, there = given.get(argument, saved.get(argument)), saved.get(argument)
        if isinstance(value, dict) and isinstance(there, dict):
            value = there | value
        try:
            made[argument] = _made(hint, value)
        except (TypeError, ValueError) as error:
            raise ValueError(
                f"{path}: {error}; to load it with other settings, give them by name: "
                f"{name}.load_from_checkpoint(path, {argument}={{...}})"
            ) from error
    return made


@contextmanager
def restoring(owner: Any, path: Any) -> Iterator[None]:
    """Say in one line that a checkpoint's weights do not fit, instead of a list of all names.

    Raises:
        ValueError: If they do not, with the first of the names.
    """
    try:
        yield
    except RuntimeError as error:
        head, *lines = str(error).splitlines() or [""]
        if not head.startswith("Error(s) in loading state_dict"):
            raise
        first = " ".join("".join(lines[:1]).split())
        first = first if len(first) <= LONGEST_TEXT else f"{first[:LONGEST_TEXT]} ..."
        raise ValueError(
            f"{path} does not hold the weights of the {owner.__name__} that its settings and those "
            f"given make: {first}; leave the policy's settings, such as policy.lora, as they were, "
            "and load it with the class that was trained"
        ) from error


def _hints(owner: Any) -> dict[str, Any]:
    """Types of a constructor's arguments, by name."""
    return {k: hint for k, hint in get_type_hints(owner.__init__).items() if k != "return"}


def _made(hint: Any, value: Any) -> Any:
    """A value of the hinted type from its plain form; what is no plain form stays as it is."""
    if isinstance(value, dict) and "class_path" in value:
        if value["class_path"] == AHEAD:  # nothing is ahead of a model that is loaded alone
            return _made(hint, value["init_args"]["inner"])
        if value["class_path"] not in (SAMPLER, APART):
            raise ValueError(f"{value['class_path']} is not made from a checkpoint")
        settings = dict(value["init_args"])
        if value["class_path"] == APART:  # a server is no part of what a checkpoint may choose
            known = _hints(resolve_name(SAMPLER))
            settings = {name: item for name, item in settings.items() if name in known}
        if (environment := settings.get("environment")) is not None:
            again = environment.get("init_args", {}).get("what")  # of one that was left out before
            settings["environment"] = LeftOut(again or environment["class_path"])
        else:  # settings of turns are refused without it, which they were not always
            settings.pop("max_turns", None)
            settings.pop("environment_seconds", None)
        return resolve_name(SAMPLER)(**settings)
    for kind in (hint, *get_args(hint)):
        if is_dataclass(kind) and isinstance(value, dict):
            hints = _hints(kind)
            return kind(**{k: _made(hints.get(k), item) for k, item in value.items()})  # type: ignore[operator]
        if get_origin(kind) is tuple and isinstance(value, list):
            return tuple(value)
        if get_origin(kind) is dict and isinstance(value, dict):
            return {k: _made(get_args(kind)[1], item) for k, item in value.items()}
    return value


def table(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Settings as a logger shows them: keys as on the command line, numbers and short texts.

    What is not set is left out.

    >>> table({"sampler": {"class_path": "Mine", "init_args": {"size": 8, "top": None}}, "ks": [1]})
    {'sampler': 'Mine', 'sampler.size': 8, 'ks': '[1]'}
    """
    found = {}
    for key, value in flat(dict(settings)).items():
        if isinstance(value, list):
            value = json.dumps(value, ensure_ascii=False)
        if key.endswith("class_path"):
            value = re.sub(rf"^{OWN}[\w.]*\.", "", value)
        if isinstance(value, str) and len(value) > LONGEST_TEXT:
            value = f"{value[:LONGEST_TEXT]}..."
        if value is not None:
            found[re.sub(r"\.(init_args|class_path)\b", "", key)] = value
    return found


def run_settings(module: Any) -> dict[str, Any]:
    """All settings of a run as one flat table, without what objects of other people's hold.

    Args:
        module: A LightningModule, attached to its Trainer.
    """
    trainer = module.trainer
    seed = int(os.environ.get("PL_GLOBAL_SEED", 0))  # what seed_everything set
    known: dict[str, Any] = {"seed_everything": seed, "trainer": {"precision": trainer.precision}}
    known |= {"model": module.hparams_initial, "data": getattr(trainer.datamodule, "hparams", {})}
    for callback in trainer.callbacks:
        if isinstance(getattr(callback, "rule", None), KLRule):  # it decides what is trained
            known[type(callback).__name__] = plain(callback)["init_args"]
    return table(known)


def log_settings(module: Any, figures: Sequence[str] = FIGURES) -> None:
    """Give every logger the settings of a run that begins, as one flat table.

    In TensorBoard the tab of hyperparameters shows them beside the newest values of ``figures``,
    which it takes from the curves, so that a run that is continued has one row.

    Args:
        module: A LightningModule, attached to its Trainer.
        figures: Names of curves.
    """
    trainer = module.trainer
    if not trainer.enable_autolog_hparams:
        return
    values = run_settings(module)
    for logger in trainer.loggers:
        if type(logger.experiment).__name__ != "SummaryWriter":  # on ranks other than 0, too
            logger.log_hyperparams(values)
            continue
        logger.log_hyperparams(values, metrics={})  # for its YAML file; None would draw a curve
        for part in _summaries(values, figures):
            # its own add_hparams would open another run
            logger.experiment._get_file_writer().add_summary(part)


def _summaries(values: dict[str, Any], figures: Sequence[str]) -> list[Any]:
    """What TensorBoard reads: which columns there are, and this run's values."""
    from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData
    from torch.utils.tensorboard.summary import hparams

    shown = {key: json.dumps(v) if isinstance(v, bool) else v for key, v in values.items()}
    columns, start, _ = hparams(shown, dict.fromkeys(figures, 0))
    packed = columns.value[0].metadata.plugin_data
    data = HParamsPluginData.FromString(packed.content)
    for column in data.experiment.hparam_infos:
        column.differs = column.name in SHOWN_FIRST
    packed.content = data.SerializeToString()
    return [columns, start]
