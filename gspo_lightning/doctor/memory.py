"""Examines whether a run fits: the plan's memory estimate against what each device has left."""

import contextlib
import os
from pathlib import Path
from typing import Any

import torch

from gspo_lightning.doctor.findings import Finding
from gspo_lightning.run.plan import IN_TURN, policy_memory, size_text

TIGHT = 0.8  # of what is available: allocators lose a part, and other processes grow
_MEMINFO = Path("/proc/meminfo")
_V2, _V1 = Path("/sys/fs/cgroup"), Path("/sys/fs/cgroup/memory")  # versions of cgroups
_CGROUPS = (  # limit and use of a container
    (_V2 / "memory.max", _V2 / "memory.current"),
    (_V1 / "memory.limit_in_bytes", _V1 / "memory.usage_in_bytes"),
)


def available(device: torch.device) -> int | None:
    """Bytes that this process can still take on a device; ``None`` where nobody says."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        # What the allocator of this process holds and does not use is free for this process alone.
        return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    found = []
    with contextlib.suppress(OSError):
        for line in _MEMINFO.read_text(encoding="utf-8").splitlines():
            if line.startswith("MemAvailable:"):
                found.append(int(line.split()[1]) * 1024)
    if not found:
        with contextlib.suppress(OSError, ValueError):
            found.append(os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
    for limit, use in _CGROUPS:
        with contextlib.suppress(OSError, ValueError):  # "max" is no number: no limit
            found.append(int(limit.read_text()) - int(use.read_text()))
    return min(found) if found else None


def needs(trainer: Any, module: Any) -> dict[torch.device, dict[str, float]] | None:
    """Bytes by part that training will take on each device beyond the weights, already there.

    ``None`` if the model's config does not name its sizes.
    """
    parts = policy_memory(trainer, module)
    if parts is None:
        return None
    largest = max(IN_TURN, key=parts.__getitem__)
    own = {name: parts[name] for name in ("gradients", "Adam", largest)}
    device = trainer.strategy.root_device
    if device.type == "cpu":  # the ranks of a run share one memory
        own = {name: size * trainer.world_size for name, size in own.items()}
    found = {device: own}
    for key, place in module.frozen.devices.items():
        needed = found.setdefault(place, {})
        if key == "model.reference" and not module.reference.shared:
            values = module.reference.batch_size * module.sampler.max_new_tokens
            config = module.policy.model.config.get_text_config()
            values *= getattr(config, "vocab_size", 0)
            width = 2 if "16" in str(trainer.precision) else 4  # bytes
            needed["logits of the reference"] = values * width
    return found


def memory(trainer: Any, module: Any) -> list[Finding]:
    """One finding per device."""
    wanted = needs(trainer, module)
    if wanted is None:
        text = "not estimated: the model's config does not name its sizes"
        return [Finding("memory", "warning", text, "watch the first rollouts")]
    return [device_memory(device, parts) for device, parts in wanted.items()]


def device_memory(device: torch.device, parts: dict[str, float]) -> Finding:
    """What a device still has to hold against what it has left."""
    check, need, left = f"memory {device}", sum(parts.values()), available(device)
    value = {"needed": need, "available": left, "parts": parts}
    listed = ", ".join(f"{name} {size_text(size)}" for name, size in parts.items())
    text = f"about {size_text(need)} beside the weights" + (f" ({listed})" if listed else "")
    if left is None:
        return Finding(check, "warning", f"{text}; what is left is not known", value=value)
    text += f"; {size_text(left)} left"
    if need <= TIGHT * left:
        return Finding(check, "ok", text, value=value)
    remedy = (
        "lower model.micro_batch_size and sampler.batch_size, set policy.gradient_checkpointing: "
        "true or policy.lora, or put the reference elsewhere (reference.device)"
    )
    return Finding(check, "error" if need > left else "warning", text, remedy, value)
