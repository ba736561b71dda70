"""Examines whether a run fits: the plan's memory estimate against what each device has left."""

from collections.abc import Callable
from typing import Any

import torch
from lightning.pytorch import Callback

from gspo_lightning.doctor.findings import Finding
from gspo_lightning.guards.memory import available
from gspo_lightning.run.memory import ENGINE, before_loading, memory_line, needs, shortages
from gspo_lightning.sharding.memory import CACHE, GRADIENTS, IN_UPDATE, size_text

TIGHT = 0.8  # of what is available: allocators lose a part, and other processes grow


class First(Callback):
    """Examines what a run will take before any weight is read.

    Args:
        found: Takes what was found.
        show: Called with it.
        of_all: Makes what a rank finds what all of them find.
    """

    def __init__(
        self,
        found: list[Finding],
        show: Callable[[list[Finding]], None],
        of_all: Callable[[Any, list[Finding]], list[Finding]],
    ) -> None:
        self.found, self.show, self.of_all = found, show, of_all

    def before_loading(self, trainer: Any, module: Any) -> None:
        """Called by the module before it loads the first model."""
        needs = before_loading(trainer, module)
        if needs is None:
            return
        value = {**needs.card, **needs.host}
        short = [Finding("needs", "error", *pair, value) for pair in shortages(module, needs)]
        said = memory_line(module, needs) or ""
        part = self.of_all(trainer, short or [Finding("needs", "ok", said, value=value)])
        self.found += part
        self.show(part)


def wanted(trainer: Any, module: Any) -> dict[torch.device, dict[str, float]] | None:
    """Bytes by part that training will take on each device beyond the weights, already there.

    ``None`` if the model's config does not name its sizes.
    """
    run = needs(trainer, module)
    if run is None:
        return None
    parts = run.card
    update = max(IN_UPDATE, key=parts.__getitem__)
    beside = [CACHE] if parts[CACHE] > parts[GRADIENTS] + parts[update] else [GRADIENTS, update]
    there = ("weights", ENGINE)  # already
    always = [name for name in parts if name not in (*there, CACHE, GRADIENTS, *IN_UPDATE)]
    own = {name: parts[name] for name in (*always, *beside)}
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
    found = wanted(trainer, module)
    if found is None:
        text = "not estimated: the model's config does not name its sizes"
        return [Finding("memory", "warning", text, "watch the first rollouts")]
    return [device_memory(device, parts) for device, parts in found.items()]


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
