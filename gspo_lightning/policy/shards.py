"""Weights that several ranks read together, each its rows of every matrix.

Decides which weights of a model are read in part. transformers does the reading: it knows how files
name, tie and pack weights, and of a weight that is a part of one (a DTensor) it reads no more than
that part. So there is no host that ever holds the whole model for one rank.
"""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, Shard, distribute_tensor
from transformers import core_model_loading as loading
from transformers import modeling_utils


def whole_tensor(tensor: Tensor) -> Tensor:
    """A tensor that is no part of one, on the ranks' devices; all ranks must call.

    Parts that are kept in host memory are sent from the devices, too: not every group of ranks can
    send from the host.
    """
    if not isinstance(tensor, DTensor):
        return tensor
    return cast(Any, tensor.to(tensor.device_mesh.device_type)).full_tensor()


@contextmanager
def reading_parts(mesh: Any) -> Iterator[None]:
    """Within, a model that transformers loads has of each matrix the rows of this rank alone.

    Vectors are read whole, and so is what a file holds in another form than the model; all of it is
    cut later. Values are the same to the bit.

    Args:
        mesh: The ranks, of one dimension; ``None`` changes nothing.
    """
    if mesh is None:
        yield
        return
    load = modeling_utils.convert_and_load_state_dict_in_model

    # under the names that transformers calls it by
    def load_parts(model: Any, state_dict: Any, load_config: Any, *rest: Any, **more: Any) -> Any:
        if load_config.hf_quantizer is None:  # rounded weights are no rows of anything
            _cut_empty(model, state_dict, load_config.weight_mapping or [], mesh)
        return load(model, state_dict, load_config, *rest, **more)

    modeling_utils.convert_and_load_state_dict_in_model = load_parts
    try:
        yield
    finally:
        modeling_utils.convert_and_load_state_dict_in_model = load


def _cut_empty(model: Any, stored: dict[str, Any], mapping: list[Any], mesh: Any) -> None:
    """Make parts of the matrices of a model that is still without values.

    Args:
        model: On the meta device.
        stored: What the files hold, by name: tensors, or slices of which nothing is read yet.
        mapping: How transformers makes the model's weights of them.
        mesh: The ranks.
    """
    matrices = {n: p for n, p in model.named_parameters() if p.ndim > 1 and p.is_meta}
    sources = _sources(model, stored, mapping)
    whole = [name for name in sources if name in matrices]
    for name, (converter, shapes) in sources.items():
        weight = matrices.get(name)
        if weight is None or not _in_rows(weight, converter, shapes, mesh.size()):
            continue
        part = distribute_tensor(weight.detach(), mesh, [Shard(0)], src_data_rank=None)
        owner, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(owner), leaf, nn.Parameter(part, weight.requires_grad))
        whole.remove(name)
    # Of another shape than the model's: transformers says so, on all ranks alike.
    whole = [name for name in whole if sources[name][0] is not None]
    if whole and mesh.get_local_rank() == 0:
        size = sum(matrices[name].nbytes for name in whole) / 2**30
        warnings.warn(
            f"policy.path: {len(whole)} weights, such as {whole[0]}, lie in another form in the "
            f"file: each rank loads them whole ({size:.2f} GiB) before it keeps its part",
            stacklevel=2,
        )


def _sources(
    model: Any, stored: dict[str, Any], mapping: list[Any]
) -> dict[str, tuple[Any, list[tuple[int, ...]]]]:
    """What each weight of a model is made of: the converter, if there is one, and the shapes."""
    empty = model.state_dict()
    renamings = [each for each in mapping if isinstance(each, loading.WeightRenaming)]
    converters = [each for each in mapping if isinstance(each, loading.WeightConverter)]
    by_pattern = {pattern: each for each in converters for pattern in each.source_patterns}
    found: dict[str, tuple[Any, list[tuple[int, ...]]]] = {}
    prefix = model.base_model_prefix
    for key, tensor in stored.items():
        name, pattern = loading.rename_source_key(key, renamings, converters, prefix, empty)
        if name not in empty and key in empty:  # as transformers does: it needs no other name
            name, pattern = loading.rename_source_key(key, [], [], prefix, empty)
        converter = None if pattern is None else by_pattern[pattern]
        names = [name]
        if converter is not None:  # one tensor may be split into several weights
            first = converter.target_patterns[0]
            names = [name.replace(first, each) for each in converter.target_patterns]
        shape = tuple(tensor.shape if isinstance(tensor, Tensor) else tensor.get_shape())
        for each in names:
            found.setdefault(each, (converter, []))[1].append(shape)
    return found


def _in_rows(weight: Tensor, converter: Any, shapes: list[tuple[int, ...]], ranks: int) -> bool:
    """Whether a rank's rows of a weight are the same rows, or whole experts, in the file."""
    if converter is None:
        return shapes == [tuple(weight.shape)]
    # One tensor of each expert in the file, one of all experts in the model: rows are experts.
    merge, *others = converter.operations
    along = [d for each in others for d in (getattr(each, "dim", None), *_transposed(each))]
    known = (loading.Concatenate, loading.Transpose)
    experts = (
        isinstance(merge, loading.MergeModulelist)
        and merge.dim == 0
        and all(isinstance(each, known) for each in others)
        and all(d is None or 0 < d < weight.ndim for d in along)
        and all(len(shape) == weight.ndim - 1 for shape in shapes)
        and len(shapes) == len(converter.source_patterns) * len(weight)
    )
    rows = -(-len(weight) // ranks)
    return experts and rows * (ranks - 1) < len(weight)  # a rank without experts can stack none


def _transposed(operation: Any) -> tuple[int, ...]:
    if not isinstance(operation, loading.Transpose):
        return ()
    return operation.dim0, operation.dim1


@contextmanager
def standing_in(layers: list[Any]) -> Iterator[None]:
    """Within, layers have weights without values in place of parts.

    peft takes a part of a weight for all of it, and would make adapters of the part's size.
    """
    parts = [(layer, layer.weight) for layer in layers if isinstance(layer.weight, DTensor)]
    for layer, part in parts:
        nothing = torch.zeros((), dtype=part.dtype, device=part.device)  # one number for all
        layer.weight = nn.Parameter(nothing.expand(part.shape), part.requires_grad)
    try:
        yield
    finally:
        for layer, part in parts:
            layer.weight = part.requires_grad_(layer.weight.requires_grad)


def compute_device(model: nn.Module) -> torch.device:
    """Where a sharded model computes, which is not where an offloaded one keeps its parts."""
    for group in units(model):
        return group._get_fsdp_state()._device
    return next(model.parameters()).device


def units(model: nn.Module) -> list[Any]:
    """What is gathered at once; nothing in a model that is not sharded."""
    return [module for module in model.modules() if isinstance(module, FSDPModule)]


def take_parts(model: Any) -> dict[str, DTensor]:
    """Take the parts that were read out of a model, which is left with weights of no device."""
    parts: dict[str, DTensor] = {}
    left: dict[int, nn.Parameter] = {}  # tied weights stay one
    for name, weight in list(model.named_parameters(remove_duplicate=False)):
        if not isinstance(weight, DTensor):
            continue
        if id(weight) not in left:
            empty = torch.empty(weight.shape, dtype=weight.dtype, device="meta")
            left[id(weight)] = nn.Parameter(empty, weight.requires_grad)
            parts[name] = weight
        owner, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(owner), leaf, left[id(weight)])
    return parts


@torch.no_grad()
def give_parts(model: Any, parts: dict[str, DTensor], device: torch.device) -> None:
    """Put parts into a model that was cut meanwhile, one after the other, and let go of each."""
    names: dict[int, list[str]] = {}
    for name, weight in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(weight), []).append(name)
    for name in list(parts):
        empty: Any = model.get_parameter(name)
        part: Any = torch.empty_like(empty, device=device)
        read: Any = parts.pop(name).detach()
        part.to_local().copy_(read.to_local())
        filled = nn.Parameter(part, empty.requires_grad)
        for each in names[id(empty)]:
            owner, _, leaf = each.rpartition(".")
            setattr(model.get_submodule(owner), leaf, filled)
