"""Memory of devices: what a phase took at its peak, what there is and what is left.

Decides what a peak is: bytes that tensors held on a GPU (``torch.cuda.max_memory_allocated``), and
on the CPU the resident memory of the whole process.
"""

import contextlib
import os
import resource
import sys
from collections.abc import Iterable
from pathlib import Path

import torch

GIB = 2**30
_PROCESS = Path("/proc/self")
_MEMINFO = Path("/proc/meminfo")
_V2, _V1 = Path("/sys/fs/cgroup"), Path("/sys/fs/cgroup/memory")  # versions of cgroups
_CGROUPS = (  # limit and use of a container
    (_V2 / "memory.max", _V2 / "memory.current"),
    (_V1 / "memory.limit_in_bytes", _V1 / "memory.usage_in_bytes"),
)


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


def available(device: torch.device) -> int | None:
    """Bytes that this process can still take on a device; ``None`` where nobody says."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        # What the allocator of this process holds and does not use is free for this process alone.
        return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    found = _of_machine("MemAvailable:", "SC_AVPHYS_PAGES")
    for limit, use in _CGROUPS:
        with contextlib.suppress(OSError, ValueError):  # "max" is no number: no limit
            found.append(int(limit.read_text()) - int(use.read_text()))
    return min(found) if found else None


def capacity(device: torch.device) -> int | None:
    """Bytes that a device has, or a container may take; ``None`` where nobody says."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    found = _of_machine("MemTotal:", "SC_PHYS_PAGES")
    for limit, _ in _CGROUPS:
        with contextlib.suppress(OSError, ValueError):
            found.append(int(limit.read_text()))
    return min(found) if found else None


def _of_machine(line: str, pages: str) -> list[int]:
    """Bytes by a line of /proc/meminfo, or by what the C library counts in pages; empty if not."""
    with contextlib.suppress(OSError):
        for found in _MEMINFO.read_text(encoding="utf-8").splitlines():
            if found.startswith(line):
                return [int(found.split()[1]) * 1024]
    with contextlib.suppress(OSError, ValueError):
        return [os.sysconf(pages) * os.sysconf("SC_PAGE_SIZE")]
    return []
