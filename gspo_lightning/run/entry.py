"""The way in: `gspo`, `python -m gspo_lightning` and `python train.py` are this `start`.

Decides which sub-commands there are and which module does the work of each. Says a first line and
answers for help and for typos before that module is imported, which takes seconds; so this file
imports the standard library alone, and its own package's files that do the same.
"""

import difflib
import gc
import os
import signal
import sys
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from pkgutil import resolve_name
from typing import Any, NoReturn

from gspo_lightning.run import launch
from gspo_lightning.run.leaving import leave
from gspo_lightning.start import shipped

TRAINING = "gspo_lightning.run.command:main"
# Of each sub-command: the function that runs it, and what it does. The function takes the words
# behind the sub-command, and Lightning's commands the sub-command, too; it returns the exit code.
COMMANDS = {
    "fit": (TRAINING, "train"),
    "validate": (TRAINING, "evaluate on the held-out prompts"),
    "test": (TRAINING, "evaluate on the test prompts"),
    "predict": (TRAINING, "complete prompts and write the completions with their rewards"),
    "samples": ("gspo_lightning.run.samples:main", "show a run's newest completions with rewards"),
    "chat": ("gspo_lightning.run.chat:main", "talk to what a run has trained"),
    "doctor": (TRAINING, "examine a config in seconds, without training"),
    "replay": (TRAINING, "find which tensor of a skipped step was not finite"),
    "compare": ("gspo_lightning.compare.__main__:main", "compare algorithms on one task"),
    "bench": ("gspo_lightning.bench.__main__:main", "measure seconds and memory"),
    "vllm-serve": (
        "gspo_lightning.run.vllm_serve:main",
        "start the vLLM server that a config's sampler asks",
    ),
    "configs": ("gspo_lightning.start.shipped:main", "list the configs of the package, print one"),
}
LIGHT = ("configs", "compare", "samples")  # those that import nothing which takes time
HELP = """\
usage: gspo COMMAND [options]          also python -m gspo_lightning, python train.py

GSPO, Group Sequence Policy Optimization, and its kin on PyTorch Lightning.

{commands}

  gspo fit --config arithmetic                            train the embedded demo, here
  gspo fit --config arithmetic --ckpt_path last           continue
  gspo fit --config base --config task/gsm8k --config hardware/one_gpu
  gspo fit --policy NAME --data rows.jsonl --reward my_rewards.polite    an own run; these three
                                                          and others are short: gspo fit --help
  gspo configs task/gsm8k > mine.yaml                     a config of your own
  gspo COMMAND --help                                     every option

A config is a YAML file, or the name of one in `gspo configs`. Later --config files and options win
over earlier ones; --print_config shows what a run would use. --ckpt_path is `last` (newest
checkpoint of the run folder trainer.default_root_dir), `auto` (the same, or a fresh start), `best`
(by what RolloutCheckpoint monitors) or a file. SIGTERM, SIGHUP and Ctrl-C finish the rollout and
save; once more stops at once. GSPO_TRACEBACK=1 shows where an error came from.
"""


def main(argv: list[str] | None = None) -> int:
    """Run one sub-command in this process, which stays as it is.

    Args:
        argv: The words behind the program's name; None takes those of the process.

    Returns:
        Its exit code, 2 where there is none of that name.
    """
    argv = sys.argv[1:] if argv is None else argv
    name = argv[0] if argv else ""
    if name in ("-h", "--help", "help"):
        lines = [f"  {name:<12}{text}" for name, (_, text) in COMMANDS.items()]
        print(HELP.format(commands="\n".join(lines)), end="")
        return 0
    if name == "--version":
        print(f"gspo_lightning {installed()}")
        return 0
    try:
        if name not in COMMANDS:
            raise ValueError(unknown(name))
        path, _ = COMMANDS[name]
        return resolve_name(path)(argv if path == TRAINING else argv[1:])
    except ValueError as error:  # `run.command` has words of its own for each error
        sys.stderr.write(f"error: {error}\n")
        return 2


def start() -> NoReturn:
    """Be the process of a command: with handlers of signals and a first line, before the imports.

    Exits with the code of ``main``.
    """
    path, _ = COMMANDS.get(sys.argv[1] if sys.argv[1:] else "", ("", ""))
    if not path or sys.argv[1] in LIGHT:
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # what is printed may go to `head`
        sys.exit(main())
    launch.refuse()  # the imports below read these variables
    handlers = stop_at_once()
    if launch.is_first():
        with suppress(OSError):  # a terminal that is gone
            print(first_line(sys.argv[1:]), file=sys.stderr, flush=True)
    gc.disable()  # what imports make stays: looking for garbage in it is a fifth of their time
    resolve_name(path)
    gc.freeze()  # nor is it looked through later
    gc.enable()
    if path != TRAINING:  # whose handlers are its own
        for number, handler in handlers.items():
            signal.signal(number, handler)
    leave(main())


def unknown(name: str) -> str:
    """The line about a sub-command that does not exist."""
    if not name:
        return "no command; try gspo fit --config arithmetic, or gspo --help"
    close = difflib.get_close_matches(name, COMMANDS, n=1)
    hint = f", did you mean `{close[0]}`?" if close else f"; there are {', '.join(COMMANDS)}"
    return f"unknown command `{name}`{hint}"


def first_line(argv: list[str]) -> str:
    """What is about to happen, said before the imports, which take seconds."""
    what = " ".join([argv[0], *shipped.config_names(argv)])
    return f"gspo_lightning {installed()}: {what}; loading torch and lightning ..."


def installed() -> str:
    """The version of the package."""
    try:
        return version("gspo_lightning")
    except PackageNotFoundError:
        return "(run from a folder, not installed)"


def stop_at_once() -> dict[int, Any]:
    """End at a signal without a traceback, until the command has handlers; returns the old ones."""
    old: dict[int, Any] = {}
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        handler = signal.getsignal(number)
        if handler != signal.SIG_IGN or number != signal.SIGHUP:  # as of nohup
            old[number] = signal.signal(number, lambda number, _: os._exit(128 + number))
    return old
