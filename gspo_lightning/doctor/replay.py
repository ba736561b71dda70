"""Compute a mini-batch of ``faults/`` again and name the first tensor that is not finite.

``gspo replay DUMP`` loads the weights and the tensors of the dump, runs the code of the
update, and looks at everything in the order in which it is computed: weights, what the loss is
computed from, the output of each part of the model, log-probs, ratio, losses, gradients. The
optimizer is left out, since a fault does not reach it, and so is a critic: no dump has its weights.
"""

import argparse
import contextlib
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import torch
from torch import Tensor, nn

from gspo_lightning.checkpoint.quoted import printable
from gspo_lightning.doctor.dumps import Dump, load_dump
from gspo_lightning.engine.packing import pack, rows_of
from gspo_lightning.guards.faults import INPUTS
from gspo_lightning.logprobs import completion_logprobs, samples_logprobs
from gspo_lightning.loss import micro_loss
from gspo_lightning.objectives import importance_log_ratio
from gspo_lightning.policy.policy import Policy, load_policy, load_tokenizer
from gspo_lightning.rollout import Samples
from gspo_lightning.run.terminal_log import say
from gspo_lightning.start.typed import program


class Look(NamedTuple):
    """What was looked at: its name, whether it is finite, and the row where it first is not."""

    name: str
    finite: bool
    row: int | None = None
    remark: str = ""


class Looks:
    """Collects looks in the order of computation."""

    def __init__(self) -> None:
        self.all: list[Look] = []

    def at(self, name: str, tensor: Tensor, row: Callable[[int], int] | None = None) -> bool:
        """Look at a tensor; ``row`` turns a place along its first axis into a row of the batch."""
        bad = ~torch.isfinite(tensor.detach())
        if not bad.any():
            self.all.append(Look(name, True))
            return True
        place = int(bad.reshape(len(bad), -1).any(1).int().argmax()) if bad.ndim else 0
        what = "NaN" if tensor.detach().isnan().any() else "infinite"
        remark = f"{what}, {int(bad.sum())} of {bad.numel()} values"
        self.all.append(Look(name, False, row(place) if row and bad.ndim else None, remark))
        return False

    @property
    def first(self) -> Look | None:
        """The first that is not finite."""
        return next((look for look in self.all if not look.finite), None)


def build_policy(dump: Dump, device: torch.device) -> Policy:
    """The policy of the run with the weights of the dump."""
    config = dump.settings.policy
    policy = load_policy(config, load_tokenizer(config))
    rows = policy.model.get_input_embeddings().weight.shape[0]
    for name in ("prompt_ids", "completion_ids"):
        ids = getattr(dump.minibatch, name)
        if ids.dtype != torch.int64 or (ids.numel() and not 0 <= ids.min() <= ids.max() < rows):
            raise ValueError(f"minibatch.{name} must be ids from 0 to {rows - 1} of {config.path}")
    policy.train()  # as in the run; dropout is off in either mode
    if dump.settings.precision.startswith("64"):
        policy.double()
    policy.to(device)
    one = torch.ones(1, 1, dtype=torch.long, device=device)
    with torch.no_grad():  # a first pass on sound weights decides how the model is run
        completion_logprobs(policy.model, one, one.bool(), one, one.bool())
    try:
        policy.load_state_dict(dump.policy)
    except RuntimeError as error:
        lines = [" ".join(line.split()) for line in str(error).splitlines()]
        raise ValueError(
            f"its weights are not those of {config.path}: {' '.join(lines[1:2])[:200]}"
        ) from error
    return policy


def replay(dump: Dump, device: torch.device) -> Looks:
    """Compute the step of a dump again and look at every tensor on the way."""
    policy, looks = build_policy(dump, device), Looks()
    choices, settings = dump.choices, dump.settings
    minibatch, weights = dump.minibatch.to(device), dump.weights.to(device)
    for name, parameter in policy.model.named_parameters():
        looks.at(f"weight: {name}", parameter)
    for name in INPUTS:
        tensor = getattr(minibatch, name)
        if tensor is not None and (choices.kl_coef > 0 or name != "ref_logprobs"):
            looks.at(name, tensor.masked_fill(~minibatch.mask, 0), lambda row: row)
    trained = {name: p for name, p in policy.model.named_parameters() if p.requires_grad}
    total = {name: torch.zeros_like(p) for name, p in trained.items()}
    mixed = settings.precision == "bf16-mixed"
    sizes = settings.micro_batch_size, settings.micro_batch_tokens
    for index in minibatch.micro_batch_indices(*sizes):
        micro, part = minibatch.select(index), weights[index.to(device)]
        own: list[int] = index.tolist()
        with (
            watched(policy.model, looks, micro, own),
            torch.autocast(device.type, torch.bfloat16, enabled=mixed, cache_enabled=False),
        ):
            found = samples_logprobs(policy.model, micro, settings.temperature, with_entropy=True)
            loss = micro_loss(*found, micro, part, choices)
        looks.at("logprobs", found.logprobs, own.__getitem__)
        log_ratio = importance_log_ratio(found.logprobs, loss.old, micro.mask, "sequence")[:, 0]
        looks.at("ratio", log_ratio.exp(), own.__getitem__)
        for name in ("policy", "kl", "entropy"):
            looks.at(f"{'KL' if name == 'kl' else name} loss", getattr(loss.parts, name))
        looks.at("loss", loss.total)
        for name, gradient in gradients(loss.total, trained):
            total[name] += gradient
            looks.at(f"gradient: {name}", total[name])
    looks.at("norm of the gradient", nn.utils.get_total_norm(list(total.values())))
    return looks


def gradients(loss: Tensor, parameters: dict[str, nn.Parameter]) -> list[tuple[str, Tensor]]:
    """The gradient of each parameter that has one, in the order in which they are computed."""
    order: list[str] = []
    hooks = [p.register_hook(lambda _, n=n: order.append(n)) for n, p in parameters.items()]
    found = torch.autograd.grad(loss, list(parameters.values()), allow_unused=True)
    for hook in hooks:
        hook.remove()
    by_name = dict(zip(parameters, found, strict=True))
    order += [name for name in parameters if name not in order]
    return [(name, by_name[name]) for name in order if by_name[name] is not None]


@contextlib.contextmanager
def watched(model: nn.Module, looks: Looks, micro: Samples, rows: list[int]) -> Iterator[None]:
    """Look at the output of every part of a model.

    Padding is looked at, too: attention reads it with weight 0, and 0 times NaN is NaN. ``rows``
    are the numbers of ``micro``'s sequences in the mini-batch.
    """
    packed = packed_rows(micro)

    def look(name: str, output: Any) -> None:
        tensor = output[0] if isinstance(output, tuple) else output
        if not isinstance(tensor, Tensor) or not tensor.is_floating_point() or not tensor.ndim:
            return
        own: Callable[[int], int] | None = None
        if tensor.shape[:2] == (1, len(packed)):  # all tokens one after the other
            tensor, own = tensor[0], lambda place: rows[packed[place]]
        elif tensor.ndim > 2 and len(tensor) == len(micro):
            own = rows.__getitem__
        elif tensor.ndim > 2 and len(tensor) * micro.group_size == len(micro):
            # the prompts of groups, each computed once
            own = lambda place: rows[place * micro.group_size]  # noqa: E731
        looks.at(f"output: {name}", tensor, own)

    with contextlib.ExitStack() as hooks:
        for name, part in model.named_modules():
            hook = part.register_forward_hook(lambda _, __, out, n=name: look(n, out))
            hooks.enter_context(hook)
        yield


def packed_rows(micro: Samples) -> list[int]:
    """The row of each token where a micro-batch is packed, as ``logprobs`` packs it."""
    context = micro.mask.flip(1).cumsum(1).flip(1) > 0
    prompts = torch.where(micro.prompt_mask, micro.prompt_ids, 0)
    packed = pack(prompts, micro.prompt_mask, micro.completion_ids, context, context)
    return rows_of(packed, context.shape[1]).tolist() if context.any() else []


def report(dump: Dump, looks: Looks) -> list[str]:
    """What was found, in a few lines."""
    lines, first = [f"recorded: {', '.join(dump.found)} not finite"], looks.first
    if dump.settings.critic:
        lines.append("the run had a critic: its values, loss and gradient are not computed here")
    kinds: dict[str, list[Look]] = {}
    for look in looks.all:
        kinds.setdefault(look.name.partition(": ")[0], []).append(look)
    for kind, group in kinds.items():
        bad = [look for look in group if not look.finite]
        state = f"{len(bad)} of {len(group)} not finite, first {bad[0].name}" if bad else "finite"
        lines.append(f"  {kind:<20} {state}")
    if first is None:
        lines.append(
            "all is finite here: the fault lies outside of the mini-batch, the weights and the "
            "settings (a callback, a kernel of another device, the gradient of another rank)"
        )
        return lines
    lines.append(f"first that is not finite: {first.name} ({first.remark})")
    if first.row is not None:
        prompt, text = dump.prompts[first.row], dump.minibatch.texts[first.row]
        lines.append(f"  row {first.row}, prompt {prompt[:200]!r}, completion {text[:200]!r}")
    return lines


class Arguments(argparse.ArgumentParser):
    """Reports a mistake as the commands of Lightning's parser do."""

    def error(self, message: str) -> NoReturn:
        raise ValueError(f"replay: {message}; {program()} replay DUMP")


def device_of(name: str) -> torch.device:
    """The device of a name; ValueError if it is not here."""
    if name != "cpu" and not re.fullmatch(r"cuda(:\d+)?", name):
        raise ValueError(f"replay: --device {name} is no device; give cpu, or cuda:0")
    device = torch.device(name)
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ValueError(f"replay: --device {name}, but this machine has no such device")
    return device


def main(argv: list[str]) -> int:
    """Replay one dump; returns the exit code, 0 if a tensor is not finite, 1 if all are.

    Raises:
        ValueError: If the dump cannot be read or the device is not there.
    """
    parser = Arguments(f"{program()} replay", description=__doc__.split("\n\n")[0])
    parser.add_argument("dump", type=Path, help="a file in faults/ of a run folder")
    parser.add_argument("--device", help="default: where the run was, if that is here, else cpu")
    parser.add_argument(
        "--trust_remote_code",
        action="store_true",
        help="run Python code that lies beside the weights of the policy; no dump can ask for it",
    )
    arguments = parser.parse_args(argv)
    dump = load_dump(arguments.dump, arguments.trust_remote_code)
    recorded = dump.settings.device
    name = arguments.device or (recorded if torch.cuda.is_available() else "cpu")
    device = device_of(name)
    if device.type != recorded:
        note = f"the run was on {recorded}, this is {device}: other kernels round differently"
        say(note, sys.stdout)
    try:
        looks = replay(dump, device)
    except ValueError as error:
        raise ValueError(f"replay: {arguments.dump}: {error}") from error
    for line in report(dump, looks):
        say(printable(line), sys.stdout)  # a dump is data, and may quote anything
    return int(looks.first is None)
