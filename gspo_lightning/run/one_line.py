"""What a terminal sees of a mistake or a warning: one line, without the noise of libraries.

Decides how a mistake that a parser found is worded, and what of the libraries' output is noise.
"""

import contextlib
import difflib
import inspect
import os
import re
import sys
import threading
import warnings
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, NoReturn

from jsonargparse import Namespace
from jsonargparse._typehints import ActionTypeHint
from lightning.pytorch import Trainer
from lightning.pytorch.cli import LightningArgumentParser
from transformers.utils import logging as transformers_logging

from gspo_lightning.checkpoint.fingerprints import moved
from gspo_lightning.checkpoint.io import disk_fault
from gspo_lightning.checkpoint.quoted import printable
from gspo_lightning.guards.trainer import leave_out_noise
from gspo_lightning.run.terminal_log import shown
from gspo_lightning.start import layout
from gspo_lightning.start.shipped import find_config
from gspo_lightning.start.short import SHORT

LONGEST = 400  # characters of an error line; beyond come dumps of whole configs

# Lines of a jsonargparse message that say how it searched, not what is wrong.
_NOISE = re.compile(
    r"Does not validate against|Subtypes: |Errors:|Given value type: |Problem with given class_path"
    r"|Expected a path but |Expected a <class 'NoneType'>"
    r"|Unable to load config |Subclass types expect one of:|a class path \(str\)|a dict with"
)
_NO_CLASS = "Not a valid subclass of"
_OWN_PATH = re.compile(r"gspo_lightning(?:\.\w+)+")
_KEY = re.compile(r'Parser key "(.+?)":\s*(.*)')
_UNKNOWN = re.compile(r"unknown key `[^`]+`(?:, did you mean `[^`]+`\?|; known: [^.]+)?")

# Words of other trainers and of torch, for which no spelling is close.
_ELSEWHERE = {
    "lr": "optimizer.learning_rate",
    "num_generations": "sampler.group_size",
    "max_completion_length": "sampler.max_new_tokens",
    "beta": "kl_coef",
    "epsilon": "objective.clip_low",
    "epsilon_high": "objective.clip_high",
}


class OneLineParser(LightningArgumentParser):
    """Reports every mistake as one line on stderr that begins with `error:`, exit code 2."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        # The start of an option's name is otherwise taken for the option, here and inside
        # init_args: `--model.optimizer.learning_rat` would pass, and other typos not.
        kwargs.setdefault("allow_abbrev", False)
        super().__init__(*args, **kwargs)

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Add what was probably meant; raise inside a nested value, print and exit at the top."""
        message = self._name_the_unknown(message, getattr(ex, "subcommand_parser", None) or self)
        if not self.exit_on_error:
            super().error(message, ex)
        self.refuse(printable(shown(condense(message))))

    def refuse(self, line: str) -> NoReturn:
        """Say what is wrong, and end the process."""
        sys.stderr.write(f"{layout.styled('error:', layout.RED, sys.stderr)} {line}\n")
        sys.exit(2)

    def validate(self, namespace: Any, *args: Any, **kwargs: Any) -> None:
        """Refuse null where a setting takes none, and anything but settings for a group of them.

        jsonargparse lets null pass everywhere, and a group's own value is checked by nobody: either
        would surface as an error of the code that uses it, without a key.
        """
        super().validate(namespace, *args, **kwargs)
        of_their_own = {a.dest: a for a in self._actions if isinstance(a, ActionTypeHint)}
        for key, action in of_their_own.items():
            if action.default is not None and namespace.get(key, "absent") is None:
                self._check_value_key(action, None, key, namespace)
        for key in {*(self.groups or {})} - {*of_their_own}:
            value = namespace.get(key, Namespace())
            if not isinstance(value, Namespace):
                inside = [a.dest for a in self._actions if a.dest.startswith(f"{key}.")]
                known = [d.removeprefix(f"{key}.") for d in inside if not d.endswith(".help")]
                said = f"expected settings, such as {', '.join(known[:3])}; got {written(value)}"
                raise TypeError(f'Parser key "{key}":\n  {said}')

    def dump(self, *args: Any, **kwargs: Any) -> str:
        """Write settings down; they were checked when they were parsed, which takes long."""
        return super().dump(*args, **{"skip_validation": True} | kwargs)

    def parse_object(self, cfg_obj: Any, *args: Any, **kwargs: Any) -> Any:
        """Refuse settings that are no mapping; the error of jsonargparse names an attribute."""
        if not isinstance(cfg_obj, dict | Namespace):
            self.error(f"expected settings, such as `{{name: value}}`; got {written(cfg_obj)}")
        return super().parse_object(cfg_obj, *args, **kwargs)

    def _name_the_unknown(self, message: str, parser: Any) -> str:
        dests = [action.dest for action in parser._actions]
        if match := re.fullmatch(r"unrecognized arguments: (--)?([^ =]+).*", message, re.DOTALL):
            return (
                unknown(match[2], [*dests, *(SHORT if self.exit_on_error else ())])
                if match[1]
                else f"unexpected argument `{match[2]}`{_config_meant(match[2])}"
            )
        if match := re.fullmatch(r"Group '(.+)' does not accept option '(.+)'", message):
            group = f"{match[1]}."
            inside = [dest.removeprefix(group) for dest in dests if dest.startswith(group)]
            return f'Parser key "{match[1]}":\n{unknown(match[2], inside)}'
        refused = r"Option '(.+)' is not accepted|Subcommand '.+' does not accept option '(.+)'"
        if match := re.fullmatch(refused, message):
            return unknown(match[1] or match[2], dests)
        if match := re.fullmatch(r"the following arguments are required: (.*)", message):
            whole = "give a config, such as --config arithmetic"
            in_config = "set it in the config"
            if match[1] == "rewards":
                in_config += ", or give --reward my_rewards.polite (the import path of a function)"
            way_out = whole if self.exit_on_error else in_config
            return f"{match[1]} missing; {way_out}"
        return message


def _config_meant(word: str) -> str:
    found = find_config(word)[0]
    return f", did you mean `--config {word}`?" if os.path.isfile(found) else ""


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """`, did you mean ...?`, or nothing when no known word is close.

    >>> did_you_mean("group_sze", ["group_size", "temperature"])
    ', did you mean `group_size`?'
    """
    close = difflib.get_close_matches(word, list(known), n=1)
    return f", did you mean `{close[0]}`?" if close else ""


def unknown(key: str, known: Iterable[str]) -> str:
    """Say that a key does not exist, and which does.

    >>> unknown("temprature", ["help", "group_size", "temperature"])
    'unknown key `temprature`, did you mean `temperature`?'
    >>> unknown("colour", ["help", "group_size", "temperature"])
    'unknown key `colour`; known: group_size, temperature'
    >>> unknown("lr", ["learning_rate", "betas"])
    'unknown key `lr`, did you mean `learning_rate`?'
    """
    names = [name for name in known if name.rpartition(".")[2] not in ("help", "config")]
    hint = did_you_mean(key, names)
    if meant := _ELSEWHERE.get(key.rpartition(".")[2]):
        short = meant.rpartition(".")[2]
        meant = short if short in names else f"model.{meant}" if "model" in names else meant
        hint = f", did you mean `{meant}`?"
    if not hint and "model" in names and (whole := whole_key(key)):
        hint = f", did you mean `{whole}`?"
    if not hint and "." in key:  # perhaps only the beginning is wrong
        hint = did_you_mean(key.partition(".")[0], [name for name in names if "." not in name])
    if not hint and "." not in key and len(names) <= 20:
        hint = f"; known: {', '.join(names)}"
    return f"unknown key `{key}`{hint}"


def whole_key(name: str) -> str | None:
    """The key of a run's setting of which somebody has written the last part alone.

    >>> whole_key("kl_coef"), whole_key("prompt_column"), whole_key("colour")
    ('model.kl_coef', 'data.prompt_column', None)
    """
    if name in _ELSEWHERE:
        return f"model.{_ELSEWHERE[name]}"
    import gspo_lightning as own

    owners = {"model": own.GSPOModule, "data": own.PromptData, "model.sampler": own.GroupSampler}
    owners |= {"model.objective": own.Objective, "model.optimizer": own.OptimizerConfig}
    owners |= {"model.policy": own.PolicyConfig, "trainer": Trainer}
    for place, kind in owners.items():
        if name in inspect.signature(kind).parameters:
            return f"{place}.{name}"
    return None


def condense(message: str) -> str:
    r"""Boil a message of several lines down to where and what.

    >>> condense('Parser key "model":\n  Errors:\n  - Parser key "clip":\n    unknown key `low`')
    'model.clip: unknown key `low`'
    >>> condense('Parser key "seed":\n  Errors:\n  - Expected a <class \'int\'>\n  Given value: a')
    'seed: expected int, got a'
    >>> condense('Parser key "fn":\n  no module, got: gspo_lightning.verifiers.LastNumber')
    'fn: gspo_lightning.verifiers.LastNumber is gspo_lightning.rewards.LastNumber now'
    """
    renamed = [path for path in _OWN_PATH.findall(message) if moved(path) != path]
    reading = max(_readings(message), key=lambda reading: len(reading.keys))
    text = f"{'.'.join(reading.keys)}: " if reading.keys else ""
    new = f"{renamed[0]} is {moved(renamed[0])} now" if renamed else None
    text += new or _what(reading.reasons, reading.value)
    return text if len(text) <= LONGEST else f"{text[:LONGEST]} ..."


@dataclass
class _Reading:
    """One way in which a value was understood: where it went wrong, why, and what was given."""

    keys: list[str]
    reasons: list[str] = field(default_factory=list)
    value: str = ""


def _readings(message: str) -> list[_Reading]:
    """The readings of a value that a message of jsonargparse tells one below the other.

    A type of several alternatives is tried one by one, and each that fails stands in an indented
    block of its own. The one that came deepest, to a key inside, is the one that was meant.
    """
    found = [_Reading([])]
    blocks = [(-1, found[0])]  # those that the line at hand stands in, with their indents
    for line in filter(str.strip, message.splitlines()):
        text = line.strip().removeprefix("- ").replace("Expected <class", "Expected a <class")
        # A dash begins another reading; other lines as far left as the key may still be about it.
        indent = len(line) - len(line.lstrip()) - line.lstrip().startswith("- ")
        while len(blocks) > 1 and indent < blocks[-1][0]:
            blocks.pop()
        if match := _KEY.fullmatch(text):
            found.append(_Reading([*blocks[-1][1].keys, match[1]]))
            blocks.append((indent, found[-1]))
            text = match[2]
        reading = blocks[-1][1]
        if match := re.fullmatch(r"Given value:\s*(?:NestedArg\(key=.*, val=(.*)\)|(.*))", text):
            reading.value = match[1] or match[2]
        elif text and not _NOISE.match(text):
            reading.reasons.append(text)
    return found


def _what(reasons: list[str], value: str) -> str:
    """The one sentence worth showing among those of several readings of a value."""
    for reason in reasons:
        if match := _UNKNOWN.search(reason):
            return match[0]
    for reason in reasons:
        if found := _import_trouble(reason, value):
            return found
    types = [_expected(reason) for reason in reasons if reason.startswith("Expected a ")]
    if types and len(types) == len(reasons):
        got = re.search(r"Got value: (.*)", reasons[0])
        value = (got[1] if got else value) or "nothing"
        choices = re.findall(r"'([^']*)'", " ".join(types))
        wanted = [kind for kind in types if "'" not in kind]
        wanted += [f"one of {', '.join(choices)}"] if choices else []
        said = "null" if value == "None" else value
        return f"expected {' or '.join(wanted)}, got {said}" + did_you_mean(
            value.strip("'"), choices
        )
    for reason in reasons:
        if not reason.startswith(("Expected a ", _NO_CLASS)):
            return reason
    for reason in reasons:
        if match := re.match(rf"{_NO_CLASS} (\w+)(?:. Got value: (.*))?", reason):
            form = f"the class_path of a {match[1]}, with its init_args"
            return f"expected {form}; got {match[2] or value or 'nothing'}"
    return "; ".join(reasons)


def written(value: Any) -> str:
    """A value as it would stand in a config, cut where it is long."""
    text = "null" if value is None else repr(value)
    return text if len(text) <= 80 else f"{text[:80]} ..."


def _import_trouble(reason: str, value: str) -> str | None:
    """What is wrong with a class_path, if that is what a reason is about."""
    if match := re.search(r"Subclasses are disabled for (\w+), thus '(\S+)' is", reason):
        import gspo_lightning

        settings = ", ".join(inspect.signature(getattr(gspo_lightning, match[1])).parameters)
        return f"expected {match[1]} ({settings}), got {match[2]}"
    if match := re.search(r"module '(\S+)' has no attribute '(\S+)'", reason):
        meant = did_you_mean(match[2], dir(sys.modules.get(match[1])))
        if not meant and match[1] == "gspo_lightning.rewards":  # a name alone is one of ours
            meant = f"; one of your own has its module in front: my_rewards.{match[2]}"
        return f"there is no {match[2]} in {match[1]}{meant}"
    if match := re.search(r"No module named '(.+?)'", reason):
        advice = "; install it, or put its folder on PYTHONPATH"
        meant = did_you_mean(match[1], ["gspo_lightning"])
        return f"there is no module {match[1]}{meant or advice}"
    if match := re.search(r"Unexpected import path format: (.*)", reason):
        return f"class_path must be a dotted name such as gspo_lightning.GSPOModule, got {match[1]}"
    if match := re.search(r"(?:argument of|unhashable) type:? '(\w+)'", reason):
        kind = "null" if match[1] == "NoneType" else f"a value of type {match[1]}"
        return f"class_path must be a dotted name such as gspo_lightning.GSPOModule, got {kind}"
    no_such = (
        r"Import path ?(\S*) does not (?:correspond to a subclass of|implement protocol) (\w+)"
    )
    if match := re.search(no_such, reason):  # without the path where it came by an option
        advice = "give the class_path of one"
        if match[2] == "Sampler":
            advice += ": sample and like have the parameters of gspo_lightning.sampling.Sampler, "
            advice += "with the same type hints"
        return f"{match[1] or value} is no {match[2]}; {advice}"
    if match := re.search(r"function or a callable class: .*but got (.*?)\. Got value", reason):
        return f"expected the import path of a function or of a callable class, got {match[1]}"
    if match := re.search(r"callable class: Expected '(\S+)' to be", reason):
        return f"{match[1]} is no function and no class that is called; give the path of one"
    if match := re.search(r"callable class: (.*?)\.+ Got value", reason):
        return match[1]
    if "Expected an instantiatable class" in reason:
        return "has settings but no class; give its class_path, too"
    if match := re.search(r"Expected a dot import path string: (\S+)", reason):
        import lightning.pytorch.callbacks

        import gspo_lightning

        names = [*gspo_lightning.__all__, *lightning.pytorch.callbacks.__all__]
        return f"there is no class {match[1]}" + did_you_mean(match[1], names)
    return None


def _expected(reason: str) -> str:
    text = reason.removeprefix("Expected a ").partition(". Got value:")[0]
    return re.sub(r"<class '(?:\w+\.)*(\w+)'>", r"\1", text)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keep known noise out of the output, and show what warnings remain as one line each."""

    def show(message: Warning | str, category: type[Warning], *_: Any, **__: Any) -> None:
        text = printable(shown(" ".join(str(message).split())))
        sys.stderr.write(f"{layout.styled('warning:', layout.YELLOW, sys.stderr)} {text}\n")

    def end(arguments: threading.ExceptHookArgs) -> None:
        # TensorBoard writes in a thread; its error is raised again where the thread is waited for.
        error = arguments.exc_value
        of_events = isinstance(error, OSError) and "tfevents" in os.fsdecode(error.filename or "")
        if error is None or (disk_fault(error) is None and not of_events):
            threading.__excepthook__(arguments)

    transformers_logging.disable_progress_bar()  # one per folder of weights, gone in no time
    # Lightning 2.6.6 calls jsonargparse by names that have been renamed since.
    os.environ.setdefault("JSONARGPARSE_DEPRECATION_WARNINGS", "off")
    with warnings.catch_warnings():
        leave_out_noise()
        previous, warnings.showwarning = warnings.showwarning, show
        hook, threading.excepthook = threading.excepthook, end
        try:
            yield
        finally:
            warnings.showwarning, threading.excepthook = previous, hook
