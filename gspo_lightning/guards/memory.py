"""Peak memory of a phase, by device.

Decides what a peak is: bytes that tensors held on a GPU (``torch.cuda.max_memory_allocated``), and
on the CPU the resident memory of the whole process.
"""

import contextlib
import resource
import sys
from collections.abc import Iterable
from pathlib import Path

import torch

GIB = 2**30
_PROCESS = Path("/proc/self")


def reset_peaks(devices: Iterable[torch.device]) -> None:
    """Begin to look for new peaks.

    Where the kernel has no such switch, the process's peak stays that since its start.
    """
    for device in devices:
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        else:
            with contextlib.suppress(OSError):
                (_PROCESS / "clear_refs").write_text("5")


def peaks(devices: Iterable[torch.device]) -> dict[torch.device, float]:
    """Peak memory of each device since ``reset_peaks``, GiB."""
    return {device: _peak(device) / GIB for device in devices}


def _peak(device: torch.device) -> int:
    """Bytes held on a GPU; on the CPU the highest resident memory of this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    with contextlib.suppress(OSError):
        for line in (_PROCESS / "status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
