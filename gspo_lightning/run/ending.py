"""How a command ends that did not end by itself: one line, and an exit code.

Decides which errors a user can mend and how they are worded.
"""

import os
import re
import sys
import traceback
from collections.abc import Callable
from typing import Any

import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException, SIGTERMException

from gspo_lightning.checkpoint.io import disk_fault
from gspo_lightning.checkpoint.monitor import UnloggedFigure
from gspo_lightning.checkpoint.quoted import printable
from gspo_lightning.checkpoint.signals import is_late, is_of_another_rank
from gspo_lightning.guards.out_of_memory import OutOfMemory, is_out_of_memory
from gspo_lightning.rewards.terms import RewardError
from gspo_lightning.run.one_line import LONGEST, condense
from gspo_lightning.run.terminal_log import say, shown
from gspo_lightning.start import layout
from gspo_lightning.vllm import EngineError

# What a user's mistake raises: bad values, missing files, devices, packages.
MISTAKES = (ValueError, OSError, ImportError, FloatingPointError, MisconfigurationException)
UNREACHED = "parameters that were not used in producing the loss"  # Lightning's, under ddp
# Lightning's, of a figure that a callback watches and nothing logs
UNLOGGED = ("Early stopping conditioned on metric", "could not find the monitored key")

EXITING = ("argparse", "jsonargparse", "lightning", "gspo_lightning", "__main__")


def report(error: BaseException, watch: Any, go_on: Callable[[bool], str]) -> int:
    """Say what ended the command and how to go on; returns the exit code.

    Args:
        error: What ended it.
        watch: Knows whether work had ``begun``; ``refuse`` takes back what was written before.
        go_on: How to continue, or nothing; asked after the error is told, and whether there
            is time to read a checkpoint to its end.
    """
    cause = error.__context__ if isinstance(error, SystemExit) else error
    if isinstance(cause, KeyboardInterrupt):  # Lightning turns it into exit(1)
        return stopped("interrupted", 130, go_on)
    if isinstance(error, SIGTERMException):  # its own exit code is 0, as if all had been done
        return stopped("terminated", watch.signals.exit_code or 143, go_on)
    if isinstance(error, SystemExit):
        place = None if watch.begun else place_of_exit(error)
        if place is None:
            return left_by_itself(error, watch.begun, go_on)
        sys.stderr.write(f"error: {place} exits while the run is set up\n")
        watch.refuse()
        return 2
    # A reward function is the user's, numbers and memory are the run's: the error names its cause.
    of_run = isinstance(error, FloatingPointError | EngineError) or is_out_of_memory(error)
    of_user = isinstance(error, RewardError) or UNREACHED in str(error) or is_unlogged(error)
    known = of_run or of_user or not watch.begun
    # What is refused has a line of its own, whatever the system said before it, or to a reward.
    refused = isinstance(error, RewardError) or (isinstance(error, ValueError) and not watch.begun)
    full = watch.lock.lost() or (None if refused else disk_fault(error, watch.root))
    text = full or (mistake(error) if known else None)
    gone = text is None and is_of_another_rank(error)
    late = text is None and is_late(error)
    if gone:
        text = watch.signals.lost_ranks()
    elif late:
        text = "another rank has not answered within the time-out (rank_timeout)"
    if text is None or os.environ.get("GSPO_TRACEBACK") == "1":
        sys.stderr.write(printable("".join(traceback.format_exception(error)), keep="\n"))
    if text is not None:
        sys.stderr.write(
            f"{layout.styled('error:', layout.RED, sys.stderr)} {printable(shown(text))}\n"
        )
        if not watch.begun:
            watch.refuse()
    if not watch.lock.lost() and (advice := go_on(True)):
        say(advice)
    return 1 if text is None or full or gone or late or of_run else 2


def is_unlogged(error: BaseException) -> bool:
    """Whether a callback has found that nothing logs what it watches."""
    return isinstance(error, UnloggedFigure) or any(text in str(error) for text in UNLOGGED)


def left_by_itself(error: SystemExit, begun: bool, go_on: Callable[[bool], str]) -> int:
    """The exit code that somebody asked for; before training the parser has said why."""
    if begun:
        where = traceback.extract_tb(error.__traceback__)[-1]
        how = f"stopped by sys.exit in {where.name} ({where.filename}, line {where.lineno})"
        say("; ".join(filter(None, (how, go_on(True)))))
    if error.code is None or isinstance(error.code, int):
        return error.code or 0
    sys.stderr.write(f"{printable(str(error.code))}\n")  # as Python itself would
    return 1


def place_of_exit(error: SystemExit) -> str | None:
    """File and line of a user's module that asks to exit; None if the parser or we do."""
    frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__)]
    modules = [frame.f_globals.get("__name__", "") for frame in frames]
    # the function `exit` of Python is a frame of its own
    last = max((i for i, name in enumerate(modules) if name != "_sitebuiltins"), default=-1)
    if last < 0 or modules[last].partition(".")[0] in EXITING:
        return None
    return f"{frames[last].f_code.co_filename}:{frames[last].f_lineno}"


def stopped(how: str, code: int, go_on: Callable[[bool], str]) -> int:
    """Say that a signal ended the command at once."""
    say("; ".join(filter(None, (how, go_on(False)))))
    return code


def report_lost_rank(text: str, watch: Any, go_on: Callable[[bool], str]) -> None:
    """Say that a rank is gone, in a process that would wait for it and is about to be ended."""
    sys.stderr.write(f"error: {text}\n")
    say(go_on(False))
    watch.terminal.close()


def from_a_checkpoint(error: BaseException) -> bool:
    """Whether something broke on what a checkpoint holds; a refusal of ours says so itself."""
    frames = [frame.filename for frame in traceback.extract_tb(error.__traceback__)]
    restoring = any("checkpoint_connector" in name for name in frames)
    refused = restoring and isinstance(error, MISTAKES) and "gspo_lightning" in frames[-1]
    return restoring and isinstance(error, Exception) and not refused


def mistake(error: BaseException) -> str | None:
    """The line for an error that a user can mend, None for one that is ours."""
    text = str(error)
    if isinstance(error, RewardError):  # a completion that it quotes is no parser's message
        return text if len(text) <= LONGEST else f"{text[:LONGEST]} ..."
    if isinstance(error, RuntimeError) and "Error(s) in loading state_dict" in text:
        lines = [" ".join(line.split()) for line in text.splitlines()]
        text = f"ckpt_path: the checkpoint is of another model: {' '.join(lines[1:2])}"
        return f"{text[:LONGEST]}; set model.init_args.policy to what it was made with"
    if is_unlogged(error):
        return " ".join(text.split())  # whole: it lists what there is
    if from_a_checkpoint(error):
        line = re.sub(r"<.* at 0x\w+>", "an object", (text.splitlines() or [""])[0])
        said = f"{type(error).__name__}: {line[:200]}"
        if isinstance(error, TypeError):  # its text is about Python
            frame = traceback.extract_tb(error.__traceback__)[-1]
            said = f"a value of another type ({os.path.basename(frame.filename)}:{frame.lineno})"
        return f"ckpt_path: the checkpoint holds what no run of this config wrote: {said}"
    if UNREACHED in text:
        return (
            "trainer.strategy: no text reaches some of the policy's weights (those for pictures, "
            "or an expert's), and ddp waits for their gradient; set trainer.strategy to "
            "ddp_find_unused_parameters_true, or train adapters (policy.lora)"
        )
    if isinstance(error, torch.distributed.DistError):
        return f"trainer.num_nodes: not all ranks came together: {text.partition(chr(10))[0]}"
    if "Accelerator` can not run on your system" in text:
        return f"trainer.accelerator: {text.partition(' The following')[0]} Use cpu, or auto"
    if is_out_of_memory(error) and not isinstance(error, OutOfMemory):
        first = text.strip().partition("\n")[0][:200]
        return f"out of memory: {first or type(error).__name__}; smaller batches need less"
    known = (*MISTAKES, OutOfMemory, EngineError)
    return condense(text) if isinstance(error, known) and text else None
