"""Variables of the environment by which a launcher tells a process its rank.

Decides which of them are looked at before the libraries that read them are imported, and when one
is a leftover. Imports the standard library alone: torchmetrics reads LOCAL_RANK as it is imported.
"""

import os
import sys

from gspo_lightning.start.typed import NEW_STORE, program

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


def is_first() -> bool:
    """Whether this process is the first of its run, as far as its launcher has told."""
    return int(next((os.environ[name] for name in RANKS if name in os.environ), "0")) == 0


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


def unset(name: str) -> str:
    """How to be rid of a variable."""
    return f"unset it: env -u {name} {program()} ..."


def refuse() -> None:
    """End the process with one line if a variable would break the imports that follow."""
    try:
        check_variables()
    except ValueError as error:
        sys.stderr.write(f"error: {error}\n")
        sys.exit(2)
