"""How this process was started, in the words that start it again.

Decides what advice such as "continue with" begins with: a command that a reader can copy and run
from the folder at hand. Imports the standard library alone.
"""

import itertools
import os
import re
import shlex
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

NEW_STORE = "TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1"  # a store for each attempt of torchrun
# Of this machine, before Lightning sets the same variables for ranks that it starts.
ADDRESS = {
    name: os.environ[name]
    for name in ("MASTER_ADDR", "MASTER_PORT", "NODE_RANK")
    if name in os.environ
}
# The function of the package that a program has called in place of a command, if it is at work.
_called: list[str] = []
_KEYWORDS = {"--data.num_rollouts": "rollouts", "--ckpt_path": "ckpt_path"}  # of that function
_LENGTHS = ("--trainer.max_steps", "--trainer.max_epochs")  # which have none
_CALLED = {  # what messages call the options of a command, and what they are in a call
    r"--ckpt_path (last|auto|best)\b(?= --)": r'ckpt_path="\1",',
    r"--ckpt_path (last|auto|best)\b": r'ckpt_path="\1"',
    r"--ckpt_path\b": "ckpt_path",
    r"--data\.num_rollouts (\d+)": r"rollouts=\1",
    r"--trainer\.default_root_dir (NEW|[\w.-]*/[\w./-]+)": r'run_folder="\1"',
    r"--trainer\.default_root_dir\b": "run_folder",
    r"--config (?:configs/)?([\w/]*\w)(?:\.yaml)?": r'config=[..., "\1"]',
    r"set model\.sampler\.environment\b": "pass environment=...",
    r"--accept_changes true": 'settings={"accept_changes": True}',
    r"--([\w.]+) (\d+)\b": r'settings={"\1": \2}',
}


def program(alone: bool = False) -> str:
    """The words in front of a sub-command: `gspo`, `python -m gspo_lightning`, `python train.py`.

    Under torchrun they begin with it and its number of processes, unless the sub-command runs
    ``alone``, as those do that only look at a run. From a program that is none of
    these three, such as a notebook, it is `gspo`, which comes with the package.
    """
    script, starter = Path(sys.argv[0]), None if alone else launcher()
    if script.name == "train.py":
        return f"{starter or this_python()} {shlex.quote(sys.argv[0])}"
    if script.name == "__main__.py" and script.parent.name == "gspo_lightning":
        return f"{starter or this_python()} -m gspo_lightning"
    found = shutil.which("gspo")
    named = script.name != "gspo" or (found is not None and Path(found) == script.absolute())
    words = "gspo" if named else _from_here(sys.argv[0])
    return words if starter is None else f"{starter} --no-python {words}"


@contextmanager
def called(name: str) -> Iterator[None]:
    """Have advice name a function, which a program has called, instead of a command."""
    _called.append(name)
    try:
        yield
    finally:
        _called.pop()


def is_call() -> bool:
    """Whether a program has called such a function, which is at work."""
    return bool(_called)


def as_called(text: str) -> str:
    """A message in which a call's keywords stand for a command's options, if a call is at work.

    >>> with called("train"):
    ...     as_called("leave --ckpt_path out; go on with --ckpt_path last --data.num_rollouts 8")
    'leave ckpt_path out; go on with ckpt_path="last", rollouts=8'
    """
    for pattern, instead in _CALLED.items() if _called else ():
        text = re.sub(pattern, instead, text)
    return text


def launcher() -> str | None:
    """The torchrun that started this process, as it was typed where that can be seen, or None."""
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        return None
    store = f"{NEW_STORE} " if os.environ.get(NEW_STORE[:-2]) == "1" else ""
    words = _words_of(os.getppid())
    ours = (sys.argv[0], "gspo", "gspo_lightning")
    end = next((i for i, word in enumerate(words) if word in ours), 0)
    if end and os.path.basename(words[1]) == "torchrun":  # a script: its Python stands before it
        given = [word for word in words[2:end] if word not in ("-m", "--no-python")]
        return store + shlex.join(["torchrun", *given])
    nodes = os.environ.get("GROUP_WORLD_SIZE", "1")
    first = "torchrun" if nodes == "1" else f"torchrun --nnodes={nodes}"
    return f"{store}{first} --nproc-per-node={os.environ.get('LOCAL_WORLD_SIZE', '1')}"


def machines() -> str:
    """What stands before all that where several machines run one training: srun, or an address."""
    if "TORCHELASTIC_RUN_ID" in os.environ:
        return ""  # torchrun has been told the address
    if "SLURM_PROCID" in os.environ and int(os.environ.get("SLURM_NTASKS", "1")) > 1:
        tasks = os.environ.get("SLURM_NTASKS_PER_NODE")
        per_node = f"--ntasks-per-node={tasks} " if tasks else ""
        return f"srun --nodes={os.environ.get('SLURM_NNODES', '1')} {per_node}"
    return "".join(f"{k}={v} " for k, v in ADDRESS.items()) if "NODE_RANK" in ADDRESS else ""


def _words_of(process: int) -> list[str]:
    """The command line of a process; empty where the system does not tell."""
    try:
        return os.fsdecode(Path(f"/proc/{process}/cmdline").read_bytes()).rstrip("\0").split("\0")
    except OSError:
        return []


def again(arguments: list[str]) -> str:
    """The command with these arguments that computes the same bits, to be run from here."""
    if _called:
        pairs = itertools.pairwise(arguments)
        given = {_KEYWORDS[key]: value for key, value in pairs if key in _KEYWORDS}
        written = [f"{k}={v if v.isdigit() else repr(v)}" for k, v in given.items()]
        pairs = itertools.pairwise(arguments)
        raised = {key.removeprefix("--"): int(value) for key, value in pairs if key in _LENGTHS}
        written += [f"settings={raised}"] if raised else []
        return f"{_called[-1]}({', '.join(['...', *written])})"
    threads = os.environ.get("OMP_NUM_THREADS")  # another number adds in another order
    first = "" if threads is None else f"OMP_NUM_THREADS={threads} "
    return f"{first}{machines()}{program()} {shlex.join(arguments)}"


def this_python() -> str:
    """How to call the Python that runs, from here."""
    found = shutil.which("python")
    path = os.path.abspath(sys.executable)
    return "python" if found is not None and os.path.abspath(found) == path else _from_here(path)


def _from_here(path: str) -> str:
    path = os.path.abspath(path)
    return shlex.quote(os.path.relpath(path) if path.startswith(os.getcwd() + os.sep) else path)
