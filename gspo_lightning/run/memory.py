"""Whether a run fits: what it takes on each card and on each host, against what these have.

Decides what is said of it, and what is refused before any weight is read. Modules are read by
attribute, so a warm start, or a module of one's own, is left alone.
"""

import math
from dataclasses import dataclass
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from gspo_lightning.engine.padded import checkpoints
from gspo_lightning.engine.probe import reading
from gspo_lightning.guards.memory import available, capacity
from gspo_lightning.policy.folder import silence
from gspo_lightning.policy.lora import add_adapters
from gspo_lightning.policy.policy import DTYPES, checkpoint_activations
from gspo_lightning.policy.shards import compute_device
from gspo_lightning.run.terminal_log import say
from gspo_lightning.sharding import memory
from gspo_lightning.sharding.memory import (
    CACHE,
    GRADIENTS,
    IN_UPDATE,
    LARGEST_FILE,
    Ranks,
    Work,
    bytes_of,
    size_text,
)

ENGINE = "vLLM"
WORTH_SAYING = 2**30  # bytes: weights of that size take long to load, so the plan comes before
HEADROOM = 0.9  # of a card: what libraries take of it, and what its allocator loses


@dataclass(frozen=True)
class Needs:
    """What a run takes.

    Attributes:
        model: The policy's, maybe without its weights.
        ranks: Who shares it.
        device: Where this rank computes.
        card: Bytes by part on the device of each rank.
        host: Bytes by part in the memory of a machine beside those.
        reference: Bytes of a reference of its own, on each rank; None without one.
        reference_on: Where that is: ``card``, ``host`` or elsewhere.
    """

    model: Any
    ranks: Ranks
    device: torch.device
    card: dict[str, float]
    host: dict[str, float]
    reference: float | None = None
    reference_on: str = "card"

    @property
    def on_card(self) -> float:
        """The most at once on a device, for the policy and a reference beside it."""
        beside = (self.reference or 0.0) if self.reference_on == "card" else 0.0
        return memory.peak(self.card) + beside

    @property
    def on_host(self) -> float:
        """The most at once in the memory of a machine."""
        beside = (self.reference or 0.0) if self.reference_on == "host" else 0.0
        if self.device.type != "cpu":
            return memory.host_peak(self.host) + self.ranks.on_machine * beside
        return self.ranks.on_machine * self.on_card + memory.host_peak(self.host)


def needs(trainer: Any, module: Any, model: Any = None) -> Needs | None:
    """What a run takes.

    Args:
        trainer: Set up as far as its data and ranks.
        module: A GSPOModule.
        model: The policy's, where it is not loaded yet; it is taken to read packed rows.

    Returns:
        None without a model, or if its config does not give its sizes.
    """
    loaded: Any = getattr(getattr(module, "policy", None), "model", None)
    known: Any = loaded if model is None else model
    if known is None or not hasattr(module, "sampler"):
        return None
    packed = model is not None or reading(loaded, compute_device(loaded)) == "packed"
    ranks, device = _ranks(trainer, known), trainer.strategy.root_device
    card = memory.on_card(known, _work(trainer, module, packed), ranks)
    if card is None:
        return None
    engine, sleeps = _engine(module, device)
    part = CACHE if sleeps else ENGINE  # which lets go of the card while the policy is updated
    card |= {part: card.get(part, 0.0) + engine} if engine else {}
    host = memory.on_host(known, ranks, device.type)
    return Needs(known, ranks, device, card, host, *_reference(trainer, module, known))


def _engine(module: Any, device: torch.device) -> tuple[float, bool]:
    """Bytes of a card that vLLM in this process may take, and whether it lets go of them."""
    sampler = module.sampler
    if getattr(sampler, "server", "") is not None or device.type == "cpu":
        return 0.0, False
    share = sampler.engine.gpu_memory_utilization * (capacity(device) or 0)
    return share, sampler.engine.sleep is not False


def _work(trainer: Any, module: Any, packed: bool) -> Work:
    data, sampler = trainer.datamodule, module.sampler
    sequences = data.prompts_per_rollout * sampler.group_size
    minibatch = sequences // module.num_minibatches
    decoded = min(getattr(sampler, "batch_size", None) or sequences, sequences)
    drawing = getattr(sampler, "inner", sampler)
    if hasattr(drawing, "take_weights") or getattr(drawing, "apart", False):  # by an engine
        decoded = 0
    return Work.of_rows(
        data.longest_prompt,
        sampler.max_new_tokens,
        decoded=decoded,
        rows=min(module.micro_batch_size or minibatch, minibatch),
        group_size=sampler.group_size,
        limit=module.micro_batch_tokens,
        packed=packed,
        half_precision="16" in str(trainer.precision),
        device=trainer.strategy.root_device.type,
    )


def _ranks(trainer: Any, model: Any) -> Ranks:
    strategy, count = trainer.strategy, trainer.world_size
    on_machine = max(1, count // max(1, getattr(trainer, "num_nodes", 1)))
    if not cuts(strategy):
        return Ranks(count, on_machine)
    in_parts = strategy.checkpoints == "parts"
    if strategy.checkpoints == "auto":
        in_parts = 3 * bytes_of(p for p in model.parameters() if p.requires_grad) > LARGEST_FILE
    gathers = strategy.rollout == "gathered"
    return Ranks(count, on_machine, True, gathers, strategy.cpu_offload, in_parts)


def cuts(strategy: Any) -> bool:
    """Whether a strategy leaves each rank a part of the policy, as FSDP2 does."""
    return hasattr(strategy, "share_out")


def _reference(trainer: Any, module: Any, model: Any) -> tuple[float | None, str]:
    """Bytes of a reference on one rank and where they are; None if it has no weights of its own."""
    reference, config = getattr(module, "reference", None), getattr(module, "policy_config", None)
    place = trainer.strategy.root_device
    word = reference and (getattr(module.frozen, "device", None) or reference.device)
    here = word == "policy" or word == str(place) or (word == "cpu" and place.type == "cpu")
    if reference is None or getattr(reference, "shared", False):
        return None, "card"
    if config is not None and here and reference.can_share(config):
        return None, "card"
    values = sum(p.numel() for p in model.parameters())
    own = getattr(reference, "dtype", None)
    dtype = DTYPES[own] if own else next(model.parameters()).dtype
    cut = here and cuts(trainer.strategy)
    on = "card" if here else "host" if word == "cpu" else "elsewhere"
    return values * dtype.itemsize / (trainer.world_size if cut else 1), on


def memory_line(module: Any, found: Needs | None) -> str | None:
    """What the policy takes on a device and its host, part by part, and the models beside it."""
    if found is None:
        return None
    each = f" on each of {found.ranks.count} ranks" if found.ranks.sharded else ""
    text = f"about {size_text(memory.peak(found.card))} for the policy{each}: {_list(found.card)}"
    if found.reference is not None:
        text += f"; reference {size_text(found.reference)}"
    critic = getattr(module, "critic", None)
    if critic is not None and critic.backbone is not None:
        size = 4 * bytes_of(critic.parameters())  # weights, gradients and Adam's two moments
        text += f"; critic {size_text(size)} and its activations"
    if memory.host_peak(found.host) >= WORTH_SAYING:
        text += f"; host memory of a machine: {_list(found.host)}"
    return text


def _list(parts: dict[str, float]) -> str:
    return ", ".join(f"{name} {size_text(value)}" for name, value in parts.items())


def without_weights(config: Any) -> Any:
    """The model that a policy's config describes, on the meta device: shapes and types alone.

    Returns:
        The model, with adapters where the config asks for them; the model itself where a program
        has given one; None if its code does not run there, or its weights are rounded to four bits.

    Raises:
        ValueError: If the config cannot be read.
    """
    if getattr(config, "model", None) is not None:
        return config.model
    if config.load_in_4bit:  # which weights are, is known once they are
        return None
    own = config.model_config()
    options = {"dtype": config.options()["dtype"], "trust_remote_code": config.trust_remote_code}
    try:
        with silence(), torch.device("meta"):
            model = AutoModelForCausalLM.from_config(own, **options)
            if config.lora is not None:
                model = add_adapters(model, config.lora)
        if config.gradient_checkpointing:
            checkpoint_activations(model)
    except Exception:  # a model's code may raise anything there, and loading says what is wrong
        return None
    return model


def before_loading(trainer: Any, module: Any) -> Needs | None:
    """What a run will take, before a weight is read; None if nothing can be said then.

    Raises:
        ValueError: If what no size of a batch makes smaller does not fit.
    """
    if not hasattr(module, "policy_config") or getattr(module, "policy", None) is not None:
        return None
    model = without_weights(module.policy_config)
    found = None if model is None else needs(trainer, module, model)
    if found is not None:
        _refuse(found)
    return found


def say_before_loading(trainer: Any, module: Any) -> None:
    """Print what a large run will take, and what there is too little of.

    Raises:
        ValueError: As :func:`before_loading`.
    """
    found = before_loading(trainer, module)
    if found is None or not trainer.is_global_zero:
        return
    if found.card["weights"] * found.ranks.count >= WORTH_SAYING:
        say(f"memory    {memory_line(module, found)}")
    for text, remedy in shortages(module, found):
        say(f"memory    {text}; {remedy}")


def _refuse(found: Needs) -> None:
    """Raise ValueError where the weights, gradients and moments alone are more than there is."""
    if found.device.type == "cpu":
        return  # a machine may swap
    state, has = memory.state_of(found.card), capacity(found.device)
    if has is None or state <= has:
        return
    whole = state * (found.ranks.count if found.ranks.sharded else 1)
    count = math.ceil(whole / (HEADROOM / 2 * has))  # as much again for what is computed
    raise ValueError(
        f"policy.path: weights, gradients and Adam's moments take {size_text(state)} on "
        f"{found.device}, which has {size_text(has)}, before anything is computed; share them out "
        f"among some {count} such cards (trainer.strategy fsdp2), train adapters (policy.lora), or "
        "take a smaller model"
    )


def shortages(module: Any, found: Needs) -> list[tuple[str, str]]:
    """What a run takes more of than is left, and what to lower; pairs of both, maybe none."""
    wanted = [(found.device, found.on_card)] if found.device.type != "cpu" else []
    wanted.append((torch.device("cpu"), found.on_host))
    short = []
    for device, need in wanted:
        left = available(device)
        if left is None or need <= left:
            continue
        ranks = f" for {found.ranks.on_machine} ranks" if found.ranks.on_machine > 1 else ""
        what = f"this machine's memory{ranks}" if device.type == "cpu" else device
        text = f"about {size_text(need)} of {what}, where {size_text(left)} are left"
        of_policy = device == found.device
        short.append((text, _remedy(module, found) if of_policy else _host_remedy(found)))
    return short


def _remedy(module: Any, found: Needs) -> str:
    """Which setting makes the largest part of a device's memory smaller."""
    parts = found.card
    update = max(IN_UPDATE, key=parts.__getitem__)
    moment = max(parts[CACHE], parts[GRADIENTS] + parts[update])
    if memory.state_of(parts) > moment:
        return (
            "train adapters (policy.lora), share the policy out among more cards "
            "(trainer.strategy fsdp2), or take a smaller model"
        )
    if parts[CACHE] >= parts[GRADIENTS] + parts[update]:
        whole = found.ranks.sharded and found.ranks.gathers
        gathered = bytes_of(found.model.parameters()) / 2 if whole else 0.0
        if _engine(module, found.device)[0] > parts[CACHE] / 2:
            return "lower sampler.engine.gpu_memory_utilization"
        if gathered > parts[CACHE] / 2:
            return "set trainer.strategy.init_args.rollout: in_step, or lower sampler.batch_size"
        return "lower sampler.batch_size or sampler.max_new_tokens"
    if update == "optimizer step":
        return "train adapters (policy.lora), or share the policy out (trainer.strategy fsdp2)"
    key = "micro_batch_size" if module.micro_batch_tokens is None else "micro_batch_tokens"
    again = "" if checkpoints(found.model) else ", or set policy.gradient_checkpointing: true"
    return f"lower model.init_args.{key}{again}"


def _host_remedy(found: Needs) -> str:
    """Which setting makes the largest part of a host's memory smaller."""
    largest = max(found.host, key=found.host.__getitem__, default="")
    if largest == "a checkpoint" and not found.ranks.in_parts:
        return "set trainer.strategy.init_args.checkpoints: parts"
    if found.ranks.cpu_offload:
        return "leave trainer.strategy.init_args.cpu_offload out, or take more machines"
    if found.reference_on == "host" and (found.reference or 0) > max(
        found.host.values(), default=0
    ):
        return "put the reference on a card (reference.device)"
    return "fewer ranks on this machine (trainer.devices), or trainer.strategy fsdp2"
