"""The policy's weights on their way to an engine.

Decides names, order and form: the names of a checkpoint, both where two weights are tied, whole
tensors, adapters merged into what they change.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers.core_model_loading import revert_weight_conversion

from gspo_lightning.engine.padded import unwrapped
from gspo_lightning.policy.lora import merged_weights
from gspo_lightning.policy.shards import whole_tensor

FILE = 2 * 2**30  # bytes of a file of weights: what is held in memory while it is written


class Weights:
    """Named tensors, whole, one at a time; ranks that each hold a part iterate together.

    Adapters, and models whose weights transformers names or cuts otherwise than their checkpoint
    (experts), are put together in host memory first. Other tensors are gathered as they are asked
    for, and no two of them are whole at the same time.

    Args:
        policy: Has ``model``.

    Attributes:
        dtype: What parameters are made before they are handed on; None leaves them as they are.
    """

    def __init__(self, policy: Any) -> None:
        self.dtype: torch.dtype | None = None
        model = policy.model
        base = unwrapped(model)
        # few, and often float32 on purpose
        self._exact = {name for name, _ in base.named_buffers()}
        own = dict(_stored(model))
        self._tensors: dict[str, Tensor] = own
        if base is not model:
            self._tensors = merged_weights(model, _on_the_cpu(own))
        if _named_otherwise(base, self._tensors):
            self._tensors = revert_weight_conversion(base, _on_the_cpu(self._tensors))

    @property
    def device(self) -> str:
        """Where the tensors are: ``cpu`` or ``cuda``."""
        return next(iter(self._tensors.values())).device.type

    def plan(self) -> dict[str, list[Any]]:
        """Names, dtypes and shapes of all tensors, in their order, as plain values."""
        tensors = self._tensors
        return {
            "names": list(tensors),
            "dtypes": [str(self._as(*pair)).removeprefix("torch.") for pair in tensors.items()],
            "shapes": [list(tensor.shape) for tensor in tensors.values()],
        }

    def __iter__(self) -> Iterator[tuple[str, Tensor]]:
        for name, tensor in self._tensors.items():
            yield name, whole_tensor(tensor.detach()).to(self._as(name, tensor))

    def _as(self, name: str, tensor: Tensor) -> torch.dtype:
        if self.dtype is None or name in self._exact or not tensor.is_floating_point():
            return tensor.dtype
        return self.dtype


def _stored(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """What a state dict holds, tied weights under each of their names.

    FSDP2 would part a model that is gathered as soon as anybody asks for its state dict.
    """
    yield from model.named_parameters(remove_duplicate=False)
    for prefix, module in model.named_modules():
        for name, buffer in module.named_buffers(recurse=False):
            if name not in module._non_persistent_buffers_set:
                yield f"{prefix}.{name}" if prefix else name, buffer


def _named_otherwise(model: Any, tensors: dict[str, Tensor]) -> bool:
    """Whether transformers holds a model under other names, or in other pieces, than it saves."""
    shapes = {
        name: torch.empty(tensor.shape, dtype=tensor.dtype, device="meta")
        for name, tensor in tensors.items()
    }
    return revert_weight_conversion(model, shapes).keys() != tensors.keys()


def _on_the_cpu(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Copies: adapters are merged into them, and must not be into the policy."""
    return {
        name: whole_tensor(tensor.detach()).to("cpu", copy=True) for name, tensor in tensors.items()
    }


def write(weights: Weights, folder: Path) -> None:
    """Write weights into the files of a new folder."""
    folder.mkdir(parents=True)
    held: dict[str, Tensor] = {}
    count = 0
    for name, tensor in weights:
        # a copy: safetensors refuses two names of one memory, and tied weights need both
        held[name] = torch.clone(tensor.cpu(), memory_format=torch.contiguous_format)
        if sum(part.nbytes for part in held.values()) >= FILE:
            _save(held, folder, count)
            held, count = {}, count + 1
    _save(held, folder, count)


def _save(tensors: dict[str, Tensor], folder: Path, number: int) -> None:
    if tensors:
        save_file(tensors, folder / f"model-{number:05d}.safetensors", {"format": "pt"})
