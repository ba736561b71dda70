"""What launched this process: variables of the environment that tell its rank, and the command.

Decides which variables are looked at before the libraries that read them are imported, when one is
a leftover, and how a launcher's command is written down. Imports the standard library alone:
torchmetrics reads LOCAL_RANK as it is imported.
"""

import os
import shlex
import sys
from collections.abc import Mapping
from pathlib import Path

# In the order in which Lightning looks for the rank of a process.
RANKS = ("RANK", "LOCAL_RANK", "SLURM_PROCID", "JSM_NAMESPACE_RANK")
NUMBERS = (
    *RANKS,
    "WORLD_SIZE",
    "LOCAL_WORLD_SIZE",
    "NODE_RANK",
    "GROUP_RANK",
    "MASTER_PORT",
    "SLURM_NTASKS",
    "SLURM_NTASKS_PER_NODE",
    "SLURM_NNODES",
    "SLURM_LOCALID",
    "SLURM_NODEID",
    "PL_GLOBAL_SEED",
)
NEW_STORE = "TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1"  # a store for each attempt of torchrun
STARTED = dict(os.environ)  # before Lightning sets the variables of its own ranks
TASK = ("SLURM_PROCID", "SLURM_LOCALID", "SLURM_NODEID")  # what srun tells each of its tasks


def check_variables() -> None:
    """Raise ValueError for a variable that is no number, or tasks that srun never began."""
    for name in NUMBERS:
        value = os.environ.get(name)
        if value is not None and not (value.isascii() and value.isdigit()):
            raise ValueError(
                f"{name}={value!r} in the environment is no whole number; {unset(name)}"
            )
    restarts = os.environ.get("TORCHELASTIC_MAX_RESTARTS", "0") != "0"
    if restarts and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
        # The ranks of a second attempt would look for each other at the addresses of the first.
        raise ValueError(
            "torchrun --max-restarts cannot restart a run whose ranks meet in torchrun's own store;"
            f" start it with {NEW_STORE} torchrun ... and --ckpt_path auto"
        )
    of_slurm = os.environ.get("SLURM_JOB_NAME") not in ("bash", "interactive")
    if "SLURM_NTASKS" in os.environ and of_slurm:
        missing = [name for name in TASK if name not in os.environ]
        if missing:
            raise ValueError(
                f"SLURM_NTASKS is in the environment and {missing[0]} is not, so this process is "
                f"no task of srun; start it with srun, or {unset('SLURM_NTASKS')}"
            )


def check_rank(world_size: int) -> None:
    """Raise ValueError where the only process of a run is told that it is not the first.

    It would write no curves and say nothing, as if another process did.
    """
    name = next((name for name in RANKS if name in os.environ), None)
    if world_size == 1 and name is not None and int(os.environ[name]) > 0:
        raise ValueError(
            f"{name}={os.environ[name]} in the environment says that this is not the first process "
            f"of the run, and trainer.devices and num_nodes make it the only one; {unset(name)}"
        )


def launched(python: str, script: str, started: Mapping[str, str] = STARTED) -> str:
    """What started this process, as typed before the script: ``python``, or a launcher with it.

    Args:
        python: The interpreter, as typed.
        script: The script, as in ``sys.argv[0]``.
        started: The environment that the process was started with.

    >>> launched("python", "train.py", {})
    'python'
    >>> launched("python", "train.py", {"SLURM_PROCID": "0", "SLURM_NTASKS_PER_NODE": "8",
    ...                                 "SLURM_NNODES": "2", "SLURM_NTASKS": "16"})
    'srun --nodes 2 --ntasks-per-node 8 python'
    >>> launched("python", "train.py", {"MASTER_ADDR": "a", "MASTER_PORT": "1", "NODE_RANK": "0"})
    'MASTER_ADDR=a MASTER_PORT=1 NODE_RANK=0 python'
    """
    if "TORCHELASTIC_RUN_ID" in started:
        words = _words_of(os.getppid())
        if script in words:
            words = words[: words.index(script)]
        else:  # no parent that can be looked at
            words = ["torchrun", "--nnodes", started.get("GROUP_WORLD_SIZE", "1")]
            words += ["--nproc-per-node", started.get("LOCAL_WORLD_SIZE", "1")]
        if len(words) > 1 and os.path.basename(words[1]) == "torchrun":
            words = ["torchrun", *words[2:]]  # a script, which its interpreter stands before
        store = f"{NEW_STORE} " if started.get(NEW_STORE[:-2]) == "1" else ""
        return store + shlex.join(words)
    if "SLURM_PROCID" in started and int(started.get("SLURM_NTASKS", "1")) > 1:
        nodes, tasks = started.get("SLURM_NNODES", "1"), started.get("SLURM_NTASKS_PER_NODE")
        per_node = f" --ntasks-per-node {tasks}" if tasks else ""
        return f"srun --nodes {nodes}{per_node} {python}"
    names = ("MASTER_ADDR", "MASTER_PORT", "NODE_RANK")
    given = [f"{name}={started[name]}" for name in names if name in started]
    return " ".join([*given, python] if "NODE_RANK" in started else [python])


def _words_of(process: int) -> list[str]:
    """The command line of a process; empty where the system does not tell."""
    try:
        return Path(f"/proc/{process}/cmdline").read_text().rstrip("\0").split("\0")
    except OSError:
        return []


def unset(name: str) -> str:
    """How to be rid of a variable."""
    return f"unset it: env -u {name} python train.py ..."


def refuse() -> None:
    """End the process with one line if a variable would break the imports that follow."""
    try:
        check_variables()
    except ValueError as error:
        sys.stderr.write(f"error: {error}\n")
        sys.exit(2)
