"""The configs and the data that the package brings, by the names under which they are asked for.

Decides where a config or a file of data is looked for: a file of the user's wins. In a checkout
they lie in configs/ and data/, in a wheel inside the package. Imports the standard library alone.
"""

import argparse
import difflib
import itertools
import os
import re
import shutil
import sys
import textwrap
from collections.abc import Iterator, Sequence
from pathlib import Path

from gspo_lightning.start.typed import program

PACKAGE = Path(__file__).parents[1]
TOP = PACKAGE.parent  # of a checkout
CONFIGS = PACKAGE / "configs" if (PACKAGE / "configs").is_dir() else TOP / "configs"
DATA = PACKAGE / "shipped" if (PACKAGE / "shipped").is_dir() else TOP / "data"


def config_names(args: Sequence[str]) -> Iterator[str]:
    """The words that follow `--config` in a command line without the program, in their order.

    >>> list(config_names(["fit", "--config", "a.yaml", "--config=b.yaml", "-c", "base"]))
    ['a.yaml', 'b.yaml', 'base']
    """
    return (name for _, name in _configs(args))


def with_paths(args: Sequence[str]) -> tuple[list[str], list[str]]:
    """The command line with the path of each config in place of its name, and what to say of it.

    Raises:
        ValueError: If all of them are overlays of the package, which have no model of their own.
    """
    words, notes = list(args), []
    names = list(config_names(args))
    whole = {"--model", "--model.class_path"} & {word.partition("=")[0] for word in words}
    if names and not whole and all(map(_is_overlay, names)):
        flags = " ".join(f"--config {name}" for name in ("base", *names))
        raise ValueError(f"config: {names[0]} goes on top of a whole config: {flags}")
    for place, name in _configs(args):
        path, note = find_config(name)
        flag, equals, _ = words[place].partition("=")
        if words[place] == name:
            words[place] = path
        else:
            words[place] = f"{flag}{equals}{path}"
        notes += [note] if note else []
    return words, notes


def _configs(args: Sequence[str]) -> Iterator[tuple[int, str]]:
    """Of each config in a command line: the place of the word that it stands in, and its name."""
    for place, (word, following) in enumerate(itertools.zip_longest(args, args[1:])):
        flag, equals, name = word.partition("=")
        if flag in ("--config", "-c") and (equals or following is not None):
            yield (place, name) if equals else (place + 1, following)


def find_config(name: str) -> tuple[str, str | None]:
    """Where a config lies, and a line to say if a file of the user's is taken for one of ours.

    Args:
        name: A file, with or without `.yaml`; else the name of a config of the package, such as
            `task/gsm8k`, which may also be written `configs/task/gsm8k.yaml`.

    Returns:
        The path, which is ``name`` itself if there is no such config at all.
    """
    ours, known = _ours(name), _short(name) in config_list()
    for path in (name, f"{name}.yaml"):
        if os.path.isfile(os.path.expanduser(path)):  # Path's own raises for some names
            both = known and not os.path.samefile(os.path.expanduser(path), ours)
            hidden = both and not name.endswith(".yaml")
            note = f"config {name}: the file {path} is taken, not the package's config of this name"
            return path, note if hidden else None
    return (str(ours) if known else name), None


def _is_overlay(name: str) -> bool:
    found = Path(find_config(name)[0])
    return "/" in _short(name) and found.exists() and found.resolve() == _ours(name).resolve()


def _ours(name: str) -> Path:
    return CONFIGS / f"{_short(name)}.yaml"


def near(name: str) -> str:
    """Which configs of the package somebody who wrote ``name`` may have meant."""
    name = _short(name).lower()
    close = difflib.get_close_matches(name, config_list(), n=3)
    close += [other for other in config_list() if other.rpartition("/")[2] == name]
    meant = ", ".join(dict.fromkeys(close))
    return f"did you mean {meant}?" if meant else f"`{program()} configs` lists the package's"


def _short(name: str) -> str:
    """The name of a config of the package as it is listed, from what may be its path."""
    whole = name.startswith("configs/") and name.endswith(".yaml")
    return name.removeprefix("configs/").removesuffix(".yaml") if whole else name


def config_list() -> list[str]:
    """The names of the package's configs."""
    paths = sorted(CONFIGS.glob("**/*.yaml"), key=lambda path: (path.parent != CONFIGS, path))
    return [path.relative_to(CONFIGS).with_suffix("").as_posix() for path in paths]


def find_data(path: str) -> str:
    """A file or folder of the package for a path below `data/` at which there is nothing here.

    So the configs work in any folder. Whatever else ``path`` is comes back as it is.
    """
    top, _, rest = os.fspath(path).partition("/")
    ours = DATA / rest
    missing = top == "data" and rest and not Path(path).exists()
    return str(ours) if missing and ".." not in ours.parts and ours.exists() else path


def data_in(settings: str) -> list[str]:
    """The paths, among the texts in JSON, for which a file or folder of the package is taken."""
    paths = dict.fromkeys(re.findall(r'"(data/[^"]+)"', settings))
    return [path for path in paths if find_data(path) != path]


def title(name: str) -> str:
    """The first sentence of the comment at the top of a config."""
    lines = (CONFIGS / f"{name}.yaml").read_text(encoding="utf-8").splitlines()
    comment = itertools.takewhile(lambda line: line.startswith("#"), lines)
    text = " ".join(line.lstrip("# ") for line in comment)
    return re.split(r"(?<=[\w)]{4})\.(?: |$)", text)[0]  # not behind "Dr." and "eq."


def main(argv: list[str]) -> int:
    """List the configs, or print one; returns the exit code."""
    text = "List the configs of the package, each with its first sentence, or print one of them."
    parser = argparse.ArgumentParser(prog=f"{program()} configs", description=text)
    parser.add_argument("name", nargs="?", help="such as task/gsm8k; prints this config")
    name = parser.parse_args(argv).name
    if name is None:
        width = shutil.get_terminal_size((100, 24)).columns
        names = config_list()
        first = max(map(len, names)) + 2
        for name in names:
            text = textwrap.shorten(title(name), max(width - first, 40), placeholder=" ...")
            print(f"{name:<{first}}{text}")
        return 0
    path = _ours(name)
    if _short(name) not in config_list():
        raise ValueError(f"the package has no config {name}; {near(name)}")
    sys.stdout.flush()
    if hasattr(sys.stdout, "buffer"):  # not in a notebook
        sys.stdout.buffer.write(path.read_bytes())  # a copy, whatever a terminal can show
    else:
        print(path.read_text(encoding="utf-8"), end="")
    return 0
