"""Every command and program of the README and of docs/ is run, or parsed as it would be run.

A block of shell goes through bash with stand-ins for the programs, which keep the words that they
are given; the words then go through the parser of the command. Blocks of Python are run.
"""

import argparse
import io
import json
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from contextlib import redirect_stdout
from importlib import import_module
from importlib.util import find_spec
from inspect import signature
from unittest.mock import patch

import pytest
import yaml

from gspo_lightning.run import entry, vllm_serve
from gspo_lightning.run.command import GSPOCLI, TOOLS, Watch
from gspo_lightning.run.one_line import quiet
from support.pages import PAGES, blocks
from support.repository import ROOT

BLOCKS = [block for page in PAGES for block in blocks(page)[0]]
LANGUAGES = {"sh", "python", "yaml", "json", "text"}
TRAIN = ("fit", "validate", "test", "predict", "doctor")
PROGRAMS = ("gspo", "python", "pip", "make", "torchrun", "tensorboard", "srun", "sbatch")
COMMAND = re.compile(rf"^\s*(\w+=\S* )*({'|'.join(PROGRAMS)}|for|while|export) ")
REWARDS = """
def _one(rows, completions):
    return [1.0] * len(completions)

polite = right = accuracy = _one
class Judge:
    async def __call__(self, rows, completions):
        return _one(rows, completions)
"""
STAND_IN = """#!/bin/sh
printf '%s\\0' "${0##*/}" "$@" >> "$RECORD"
printf '\\1\\0' >> "$RECORD"
[ "${0##*/} $1 $#" != "gspo configs 2" ] || cat "$CONFIGS/$2.yaml"
"""


class Parsed(Exception):
    """The words of a command were read to their end."""


class OnlyParsed(GSPOCLI):
    """Reads a command line and does nothing."""

    def _set_seed(self):
        pass

    before_instantiate_classes = instantiate_classes = _set_seed

    def _run_subcommand(self, subcommand):
        pass


@pytest.fixture(scope="module")
def parse():
    """Reads a command line; one for each of Lightning's commands, as making one takes its time."""
    made = {}

    def parse(*words):
        name = words[0]
        with quiet():
            if name not in made:
                made[name] = OnlyParsed(list(words), Watch())
            else:
                made[name].parse_arguments(made[name].parser, list(words))

    return parse


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with what the pages speak of: stand-ins for programs, rewards, rows, a config."""
    here = tmp_path_factory.mktemp("pages")
    (here / "bin").mkdir()
    for name in PROGRAMS:
        (here / "bin" / name).write_text(STAND_IN)
        (here / "bin" / name).chmod(0o755)
    for name in ("cat", "head", "mkdir", "sh"):
        (here / "bin" / name).symlink_to(shutil.which(name))
    (here / "my_rewards.py").write_text(REWARDS)
    for name in ("rows", "prompts", "heldout"):
        (here / f"{name}.jsonl").write_text('{"prompt": "1+2=", "answer": "3"}\n' * 16)
    for block in BLOCKS:
        name = re.match(r"# (\w+\.yaml)\b", block.text)
        if block.language == "yaml" and name and not block.mark:
            (here / name[1]).write_text(block.text)
    return here


@pytest.fixture(autouse=True)
def inside(folder, monkeypatch):
    monkeypatch.chdir(folder)
    monkeypatch.syspath_prepend(str(folder))
    monkeypatch.delitem(sys.modules, "my_rewards", raising=False)  # another test's
    monkeypatch.delenv("PL_GLOBAL_SEED", raising=False)


def typed(block, folder):
    """The commands of a block of shell, as bash hands their words on."""
    record = folder / "record"
    record.write_bytes(b"")
    environment = {
        "PATH": str(folder / "bin"), "RECORD": str(record), "CONFIGS": str(ROOT / "configs")
    }  # fmt: skip
    bash = shutil.which("bash")
    done = subprocess.run(
        [bash, "-euo", "pipefail", "-c", block.text],
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    words = record.read_bytes().decode().split("\0\1\0")
    return list(dict.fromkeys(tuple(line.split("\0")) for line in words if line))


def ours(words):
    """The words behind our program's name, and None for a program that is not ours."""
    words = list(words)
    if words[:1] == ["torchrun"]:
        from torch.distributed.run import parse_args

        options = parse_args(words[1:])
        words = [options.training_script, *options.training_script_args]
    if words[0] == "sbatch":  # whose script hands its arguments to fit
        assert (ROOT / words[1]).is_file()
        return ["fit", *words[2:]]
    if words[0] == "python":
        words = words[2:] if words[1] == "-m" else words[1:]
    return words[1:] if words[0] in ("gspo", "gspo_lightning", "train.py") else None


def check_tool(words):
    """Fail unless a program other than Lightning's commands takes these words."""
    program, *rest = words
    if (own := ours(words)) is not None:
        path, _ = entry.COMMANDS[own[0]]
        return reaches_its_work(TOOLS.get(own[0], path), own[1:])
    if program == "python" and rest[0].endswith(".py"):
        assert len(rest) == 1 and (ROOT / rest[0]).exists()
        return None
    if program == "python" and rest[1].startswith(("gspo_lightning.", "support.")):
        inside = find_spec(rest[1]).submodule_search_locations
        return reaches_its_work(f"{rest[1]}{'.__main__' if inside else ''}:main", rest[2:])
    if program == "python":
        assert rest[:2] == ["-m", "pytest"]
        assert all((ROOT / word).exists() for word in rest if word.startswith("tests"))
    elif program == "make":
        targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
        assert set(rest) <= set(targets)
    elif program == "pip":
        project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
        extras = ",".join(re.findall(r"\[(.+?)\]", " ".join(rest)))
        assert set(filter(None, extras.split(","))) <= set(project["optional-dependencies"])
    else:
        assert program == "tensorboard" and rest[0] == "--logdir" and len(rest) == 2


def reaches_its_work(path, words):
    """Call the function of a command, which ends when its words are read."""
    module, _, name = path.partition(":")
    with pytest.raises((Parsed, SystemExit)) as end, redirect_stdout(io.StringIO()):
        function = getattr(import_module(module), name)
        with patch.object(sys, "argv", [path, *words]):  # which some of them read
            function(*([list(words)] if signature(function).parameters else []))
    assert end.type is Parsed or (end.value.code == 0 and "--help" in words)


def prints(words):
    """Run a command that prints, such as help."""
    with redirect_stdout(io.StringIO()) as shown:
        try:
            assert entry.main(words) == 0
        except SystemExit as end:
            assert end.code == 0
    assert shown.getvalue()


def check_all(commands, parse, monkeypatch):
    """Check commands; those of Lightning's together, as far as their first config is the same."""
    together = {}
    tools = []
    for words in dict.fromkeys(commands):
        own = ours(words)
        if own is not None and own[:1] == ["vllm-serve"] and "--help" not in own:
            own = ["fit", *vllm_serve.parsed(own[1:])[1]]  # what is left is the training's
        if own is not None and len(own) < 2:  # a name alone, in a sentence
            assert not own or own[0] in entry.COMMANDS or own[0] == "--help"
            continue
        if own is not None and (
            own[0] in ("--help", "--version", "configs")
            or any(re.search(r"^--(help|print_config|.*\.help)$", word) for word in own)
        ):
            prints(own)
        elif own is not None and own[0] in TRAIN:
            first = own[own.index("--config") + 1] if "--config" in own else own
            together.setdefault((own[0], str(first)), []).append(own)
        else:
            tools.append(words)
    for (name, _), group in together.items():
        try:
            parse(name, *(word for own in group for word in own[1:]))
        except BaseException:  # one by one, to see which
            for own in group:
                print("gspo", shlex.join(own))
                parse(*own)
    whole = argparse.ArgumentParser.parse_args

    def only_parse(self, *arguments, **named):
        whole(self, *arguments, **named)
        raise Parsed

    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", only_parse)
    for words in tools:
        print(shlex.join(words))
        check_tool(words)


def test_every_block_says_what_it_is_and_no_command_stands_outside():
    for page in PAGES:
        found, prose = blocks(page)
        for block in found:
            assert block.language in LANGUAGES, block.name
            if block.language == "text":
                assert not any(map(COMMAND.match, block.text.splitlines())), block.name
            if block.mark and block.mark.startswith("run by "):
                test = (ROOT / block.mark.removeprefix("run by ")).read_text()
                assert page.name in test, block.name
        indented = [line for line in prose.splitlines() if line.startswith("    ")]
        assert not any(map(COMMAND.match, indented)), page


def test_every_command_is_one_that_the_program_takes(folder, parse, monkeypatch):
    shell = [block for block in BLOCKS if block.language == "sh"]
    found = {block.name: typed(block, folder) for block in shell}
    assert all(found.values()) and len(found) > 20
    marked = {block.name for block in shell if block.mark}  # bash has read these, which is all
    words = [words for name, lines in found.items() if name not in marked for words in lines]
    check_all(words, parse, monkeypatch)


def inline(page):
    """Commands within sentences, without what stands for something."""
    _, prose = blocks(page)
    for code in re.findall(r"(?<!`)`([^`]+)`(?!`)", prose):
        text = re.sub(r"^(\w+=\S+ )+", "", " ".join(code.split()))
        if re.match(rf"({'|'.join(PROGRAMS)}) ", text):
            text = re.sub(r"(--config )?\.\.\.", "", text)  # `--config ...` is any config
            yield tuple(shlex.split(text))


def test_every_command_in_a_sentence_is_one_that_the_program_takes(parse, monkeypatch):
    found = [words for page in PAGES for words in inline(page) if len(words) > 1]
    assert len(found) > 20
    check_all(found, parse, monkeypatch)


@pytest.mark.parametrize(
    "block", [b for b in BLOCKS if b.language == "python" and not b.mark], ids=lambda b: b.name
)
def test_every_program_runs(block, monkeypatch, tmp_path, folder):
    for name in ("rows.jsonl", "my_rewards.py"):
        (tmp_path / name).symlink_to(folder / name)
    (tmp_path / "data").symlink_to(ROOT / "data")
    export = shutil.copytree(ROOT / "data/arithmetic/policy", tmp_path / "runs/arithmetic/export")
    generation = export / "generation_config.json"
    generation.write_text(json.dumps(json.loads(generation.read_text()) | {"max_new_tokens": 4}))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PL_GLOBAL_SEED", "0")
    text = block.text.replace(
        '"Qwen/Qwen3-0.6B"', '"data/arithmetic/policy", max_new_tokens=8, rollouts=1'
    )
    text = re.sub(r"rollouts=\d+", "rollouts=1", text)  # as short as can be
    text = re.sub(r"rollout=\d+", "rollout=000001", text)
    with redirect_stdout(io.StringIO()):
        exec(compile(text, block.name, "exec"), {"__name__": "__main__"})


def test_every_config_is_one_that_the_parser_takes(parse, tmp_path):
    made = []
    for block in BLOCKS:
        if block.language == "yaml" and not block.mark:
            settings = yaml.safe_load(block.text)
            if set(settings) == {"rewards"}:
                settings = {"model": {"init_args": settings}}
            if set(settings) == {"init_args"}:
                settings = {"data": settings}
            made.append(tmp_path / f"{block.page.stem}-{block.line}.yaml")
            made[-1].write_text(yaml.safe_dump(settings))
    assert len(made) > 5
    start = ["fit", "--config", "arithmetic"]
    try:
        parse(*start, *(word for path in made for word in ("--config", str(path))))
    except BaseException:  # one by one, to see which
        for path in made:
            print(path)
            parse(*start, "--config", str(path))
