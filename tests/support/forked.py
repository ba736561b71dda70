"""Ranks as forks of the test's own process, which pay for no import of their own."""

import os
import socket
import time
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch


def fork_ranks(
    folder: Path, count: int, work: Callable[[int], Any], timeout: float = 120
) -> list[Any]:
    """Run ``work(rank)`` in ``count`` processes that Lightning takes for ranks of one training.

    Returns:
        What each rank has returned, plain values and tensors.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    children = {}
    for rank in range(count):
        pid = os.fork()
        if pid == 0:
            code = 1
            try:
                os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
                os.environ |= {"LOCAL_RANK": str(rank), "PL_GLOBAL_SEED": "0"}
                torch.set_num_threads(1)
                warnings.simplefilter("ignore")  # pytest makes errors of what a run leaves out
                torch.save(work(rank), folder / f"rank{rank}.pt")
                code = 0
            except BaseException:
                (folder / f"rank{rank}.txt").write_text(traceback.format_exc())
            finally:
                os._exit(code)
        children[pid] = rank
    codes: dict[int, int | None] = {}
    end = time.monotonic() + timeout
    while children and time.monotonic() < end and not any(codes.values()):
        pid, status = os.waitpid(-1, os.WNOHANG)
        if pid in children:
            codes[children.pop(pid)] = os.waitstatus_to_exitcode(status)
        else:
            time.sleep(0.01)
    for pid, rank in children.items():  # others wait for a rank that has failed
        os.kill(pid, 9)
        os.waitpid(pid, 0)
        codes[rank] = None
    texts = "".join(path.read_text() for path in sorted(folder.glob("rank*.txt")))
    assert codes == dict.fromkeys(range(count), 0), f"{codes}\n{texts}"
    return [torch.load(folder / f"rank{rank}.pt", weights_only=True) for rank in range(count)]
