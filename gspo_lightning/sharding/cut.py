"""Cut a model into the parts of ranks, and put tensors together again.

Decides what is a unit that is gathered at once: each layer, and one more of all that is no layer.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    MixedPrecisionPolicy,
    OffloadPolicy,
    fully_shard,
)
from torch.distributed.tensor import DTensor, distribute_tensor

from gspo_lightning.checkpoint.parts import Parted
from gspo_lightning.engine.head import find_head
from gspo_lightning.engine.padded import unwrapped
from gspo_lightning.engine.probe import plainer_ways, some_ids
from gspo_lightning.policy.shards import (
    compute_device,
    give_parts,
    take_parts,
    units,
    whole_tensor,
)


def cut(
    model: Any,
    mesh: Any,
    computed: torch.dtype | None,
    reshard: bool,
    cpu_offload: bool,
) -> None:
    """Leave this rank its part of every weight of a causal language model.

    Embeddings, last norm and head are one unit, which stays whole from the first forward on until
    the backward is over: log-probs are made of the head's weight behind the model's forward.

    Args:
        model: In wrappers of adapters or without. All ranks hold the same weights, or of some
            matrices their parts already; see ``policy.shards``.
        mesh: The ranks, of one dimension.
        computed: Type that weights are gathered in; ``None`` is their own.
        reshard: Whether a layer's weights are let go between forward and backward.
        cpu_offload: Whether the parts, and so gradients and moments, are kept in host memory.
    """
    base = unwrapped(model)
    options: dict[str, Any] = {
        "mesh": mesh,
        "mp_policy": MixedPrecisionPolicy(
            param_dtype=computed,
            reduce_dtype=torch.float32,  # gradients of many ranks are not added up in bfloat16
            # True would take apart, and make anew, what our attention is told (a dataclass):
            # packed rows would silently be padded.
            cast_forward_inputs=False,
        ),
        "offload_policy": CPUOffloadPolicy() if cpu_offload else OffloadPolicy(),
    }
    parts = take_parts(base)
    for layer in decoder_layers(base):
        fully_shard(layer, reshard_after_forward=reshard, **options)
    fully_shard(base, reshard_after_forward=False, **options)
    give_parts(base, parts, torch.device("cpu") if cpu_offload else compute_device(base))
    if base is not model:
        # The wrapper of adapters calls the model's forward past the hooks that gather weights.
        model.base_model.forward = base.__call__
    if computed is not None:
        base.__dict__["_gspo_computed"] = computed  # how exact its numbers are, for the probe
        # Autocast leaves embeddings, and so what layers add to, in float32. Rounded at each layer,
        # that sum would double the noise of a ratio.
        base.get_input_embeddings().register_forward_hook(_widened)
    with torch.no_grad():  # a first pass, in which FSDP2 settles which unit is the root
        one_token(model)
    reshard_all(model)


def _widened(_: nn.Module, __: Any, output: Tensor) -> Tensor | None:
    return output.float() if torch.is_autocast_enabled(output.device.type) else None


def decoder_layers(base: Any) -> list[nn.Module]:
    """The repeated layers of a transformers model, by the names that it does not want split.

    Raises:
        ValueError: If the model names none.
    """
    names = set(getattr(base, "_no_split_modules", None) or ())
    kind = lambda module: type(module).__name__.removeprefix("FSDP")  # noqa: E731 - cut ones, too
    layers = [module for module in base.modules() if kind(module) in names]
    if not layers:
        raise ValueError(
            f"policy.path: {kind(base)} does not say which of its modules are layers, so "
            "it cannot be sharded; set trainer.strategy to ddp"
        )
    return layers


def one_token(model: nn.Module) -> None:
    """Call a model on one token."""
    ids = torch.zeros(1, 1, dtype=torch.long, device=compute_device(model))
    model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False)


def reshard_all(model: nn.Module) -> None:
    """Let go of every weight but this rank's parts."""
    for unit in units(model):
        unit.reshard()


@contextmanager
def gathered(model: nn.Module) -> Iterator[None]:
    """Keep the weights whole; all ranks begin and end together and call it as they like within.

    It is a plain model within: FSDP2's own hooks would cost time at every token, and a recording of
    decode steps would fail on what they wait for. Nothing may be trained.
    """
    # Tensors made in inference mode, as within trainer.validate, could not be trained later.
    with torch.inference_mode(False), torch.no_grad():
        for unit in units(model):
            unit.unshard()
    kept = [(unit, unit._forward_pre_hooks, unit._forward_hooks) for unit in units(model)]
    for unit, before, behind in kept:
        state = unit._get_fsdp_state()
        ids = state._pre_forward_hook_handle.id, state._post_forward_hook_handle.id
        unit._forward_pre_hooks = type(before)((k, h) for k, h in before.items() if k not in ids)
        unit._forward_hooks = type(behind)((k, h) for k, h in behind.items() if k not in ids)
    try:
        yield
    finally:
        for unit, before, behind in kept:
            unit._forward_pre_hooks, unit._forward_hooks = before, behind
        reshard_all(model)


def in_memory(tensor: Tensor) -> Tensor:
    """A copy on the CPU, also of what is there already: a single rank's part is the weight."""
    return tensor.to("cpu", copy=True)


def whole_state(
    state: Any,
    wanted: bool,
    keep: Callable[[Tensor], Tensor] = in_memory,
    done: dict[int, Tensor] | None = None,
) -> Any:
    """The same nested dicts and lists with a whole copy of every sharded tensor, on the CPU.

    One tensor after the other is gathered, so that no device ever holds two of them whole. Tied
    weights, the same tensor under two names, stay the same tensor. All ranks must call.

    Args:
        state: As ``state_dict(keep_vars=True)`` gives it, which has tied weights as one tensor.
        wanted: Whether this rank reads the result; the others get a dict that lacks the tensors.
        keep: Copies a tensor to where it is kept.
        done: Tensors that were gathered, by the identity of their part.
    """
    done = {} if done is None else done
    if isinstance(state, DTensor):
        if id(state) not in done:
            full = whole_tensor(state.detach())
            done[id(state)] = keep(full) if wanted else full.new_empty(0, device="cpu")
        return done[id(state)]
    if isinstance(state, dict):
        return type(state)((k, whole_state(v, wanted, keep, done)) for k, v in state.items())
    if isinstance(state, (list, tuple)):
        return type(state)(whole_state(part, wanted, keep, done) for part in state)
    return state.detach() if isinstance(state, Tensor) else state


def try_ways(model: Any, sampled: bool, gather: bool) -> None:
    """Find out, on all ranks at once, how the model is run best: a plan asks for it on rank 0."""
    device, base = compute_device(model), unwrapped(model)
    with gathered(model) if gather else nullcontext():
        plainer_ways(model, device, sampled=sampled)
        find_head(base, some_ids(base, 1, 7).to(device))
    base.reset_iter_state()  # a way that fails may have stopped in the middle of a pass


def part_of(full: Any, like: Any) -> Any:
    """This rank's part of a tensor, cut as ``like`` is; whole if that is whole."""
    if isinstance(full, Parted):
        if not isinstance(like, DTensor) or full.shape != like.shape:
            return full.rows(0, full.shape[0])
        ranks, rank = like.device_mesh.size(), like.device_mesh.get_local_rank()
        size = -(-full.shape[0] // ranks)  # as FSDP2 cuts: equal parts, the last ones may lack rows
        first = min(rank * size, full.shape[0])
        part = full.rows(first, min(size, full.shape[0] - first))
        mesh, shape = like.device_mesh, {"shape": full.shape, "stride": like.stride()}
        found = DTensor.from_local(part, mesh, like.placements, run_check=False, **shape)  # type: ignore[arg-type]
    elif not isinstance(like, DTensor) or isinstance(full, DTensor) or full.shape != like.shape:
        return full
    else:
        found = distribute_tensor(full, like.device_mesh, like.placements, src_data_rank=None)
    return found.to(like.device)  # made on the ranks' devices, where offloaded parts have no room
