"""Config files: read before they are parsed, so that a broken one is named with its line.

Decides what a config file must be: UTF-8 text, one YAML mapping, plain values, no key twice; and
that a text which begins with ``#`` is a text.
"""

import os
import re
from collections.abc import Sequence
from enum import Enum
from pathlib import Path
from typing import Any

import yaml
from jsonargparse import get_loader, set_dumper, set_loader

from gspo_lightning.start import shipped
from gspo_lightning.start.typed import program

WAY_OUT = f"`{program()} configs arithmetic` shows one"
LARGEST = 2**20  # bytes of a file
DEEPEST = 50  # levels of YAML, one in the other: readers call themselves for each of them
MOST = 20_000  # values of YAML, what aliases stand for counted each time


def nested_nulls(args: Sequence[str]) -> list[str]:
    """The words of a command line with each null of a nested key as that of a mapping.

    jsonargparse takes the other form, deeper than two keys, for the text None.

    >>> nested_nulls(["--model.policy.lora=null", "--model.reference", "null"])
    ['--model.policy={lora: null}', '--model.reference', 'null']
    """
    joined: list[str] = []
    for word in args:
        if word == "null" and joined and re.fullmatch(r"--[\w.]+", joined[-1]):
            word = f"{joined.pop()}=null" if joined[-1].count(".") > 1 else word
        if match := re.fullmatch(r"(--\w+\.\w+)\.([\w.]+)=null", word):
            *outer, last = match[2].split(".")
            inner = f"{{{last}: null}}"
            for key in reversed(outer):
                inner = f"{{{key}: {inner}}}"
            word = f"{match[1]}={inner}"
        joined.append(word)
    return joined


def check_config_file(path: str) -> None:
    """Raise ValueError, with line and way out, unless it is one YAML mapping of plain values."""
    file = Path(os.path.expanduser(path))
    if not os.path.exists(file):  # Path's own raises for a name that is too long
        said = f"there is no file {path} (looked in {Path.cwd()})"
        if not path.endswith(".yaml"):
            said += f" and no config {path} in the package"
        raise ValueError(f"config: {said}; {shipped.near(path)}")
    if not file.is_file():
        raise ValueError(f"config: {path} is no file; give the path of a YAML file")
    if file.stat().st_size > LARGEST:
        size = file.stat().st_size
        raise ValueError(f"config: {path} has {size} bytes; a config has a few thousand; {WAY_OUT}")
    content = file.read_bytes()
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise ValueError(f"config: {path}:{line}: not UTF-8; save the file as UTF-8") from error
    try:
        check_size(text)
        node = yaml.compose(text, Loader=yaml.SafeLoader)
        yaml.safe_load(text)  # refuses tags, which would make objects
    except yaml.reader.ReaderError as error:
        line = text.count("\n", 0, error.position) + 1
        raise ValueError(
            f"config: {path}:{line}: holds the character {error.character:#x}, so it is no text; "
            f"{WAY_OUT}"
        ) from error
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else 1
        raise ValueError(f"config: {path}:{line}: not YAML: {error.problem}; mend it") from error
    except (ValueError, RecursionError) as error:  # an impossible date; brackets without end
        raise ValueError(f"config: {path}: not YAML: {error}; mend it") from error
    if not isinstance(node, yaml.MappingNode):
        found = "is empty" if node is None else "does not hold keys with values"
        raise ValueError(f"config: {path} {found}; {WAY_OUT}")
    if "config" in [key.value for key, _ in node.value]:
        raise ValueError(f"config: {path} has the key config; name one more file by --config")
    check_keys(path, node)


def check_size(text: str) -> None:
    """Raise yaml.MarkedYAMLError where YAML is too much to be read, before anything is built of it.

    An alias costs its writer three characters and a reader all that it stands for, so that a few
    lines of aliases of aliases are millions of values, and one inside of its own anchor is endless.
    """
    if len(text) <= DEEPEST and "*" not in text:  # nearly every setting of a command line
        return
    sizes: dict[Any, int] = {}  # values that each anchor stands for
    opened: list[tuple[Any, int]] = []  # anchor of each level, and values before it
    total = 0
    for event in yaml.parse(text, Loader=yaml.SafeLoader):
        anchor = getattr(event, "anchor", None)
        problem = None
        if isinstance(event, yaml.AliasEvent):
            if anchor in [name for name, _ in opened]:
                problem = f"the alias *{anchor} stands inside of what it stands for"
            total += sizes.get(anchor, 0)
        elif isinstance(event, yaml.NodeEvent):
            total += 1
            sizes[anchor] = 1
        if isinstance(event, yaml.CollectionStartEvent):
            opened.append((anchor, total))
        elif isinstance(event, yaml.CollectionEndEvent):
            name, before = opened.pop()
            sizes[name] = total - before + 1
        if len(opened) > DEEPEST:
            problem = f"more than {DEEPEST} levels, one in the other"
        if total > MOST:
            problem = f"more than {MOST} values, with what aliases stand for"
        if problem:
            mark: Any = event.start_mark
            raise yaml.MarkedYAMLError(problem=problem, problem_mark=mark)


def check_keys(path: str, node: Any, prefix: str = "") -> None:
    """Refuse a key that stands twice in one mapping: YAML would silently take the last one."""
    if isinstance(node, yaml.SequenceNode):
        for item in node.value:
            check_keys(path, item, prefix)
    if not isinstance(node, yaml.MappingNode):
        return
    lines: dict[str, int] = {}
    for key, value in node.value:
        name, line = f"{prefix}{key.value}", key.start_mark.line + 1
        if name in lines:
            raise ValueError(
                f"config: {path}:{line}: {name} stands twice, first in line {lines[name]}; "
                "remove one"
            )
        lines[name] = line
        check_keys(path, value, f"{name}.")


def keep_texts() -> None:
    """Let the parser take a quoted text that begins with ``#`` as it stands.

    It reads the text of a setting that may also be null as YAML once more, where such a text is a
    comment: the pattern ``####(.*)`` would be no pattern, and a system prompt with a heading none.
    """
    load = get_loader("yaml")

    def loaded(text: str) -> Any:
        try:
            check_size(text)
            value = load(text)
        except yaml.MarkedYAMLError as error:
            raise yaml.YAMLError(f"not YAML: {error.problem}") from error
        except ValueError as error:  # an impossible date, a number of thousands of digits
            raise yaml.YAMLError(str(error)) from error
        return text if value is None and text.lstrip().startswith("#") else value

    set_loader("yaml", loaded, (yaml.YAMLError,))


def keep_choices() -> None:
    """Let the parser write a member of an enumeration as its value: some defaults of others are.

    YAML has no text for one, so a config with such a callback, a Timer of Lightning's, could not be
    written into the run folder.
    """

    class Dumper(yaml.SafeDumper):
        pass

    Dumper.add_multi_representer(Enum, lambda dumper, one: dumper.represent_data(one.value))

    def dump(data: Any) -> str:  # laid out as the parser does it
        return yaml.dump(
            data, Dumper=Dumper, default_flow_style=False, allow_unicode=True, sort_keys=False
        )

    set_dumper("yaml", dump)
