"""Compute a mini-batch of ``faults/`` again and name the first tensor that is not finite.

``python train.py replay DUMP`` loads the weights and the tensors of the dump, runs the code of the
update, and looks at everything in the order in which it is computed: weights, what the loss is
computed from, the output of each part of the model, log-probs, ratio, losses, gradients. The
optimizer is left out, since a fault does not reach it, and so is a critic: no dump has its weights.
"""

import argparse
import contextlib
import sys
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from gspo_lightning.checkpoint.quoted import printable
from gspo_lightning.engine.packing import pack, rows_of
from gspo_lightning.guards.faults import VERSION
from gspo_lightning.logprobs import completion_logprobs, samples_logprobs
from gspo_lightning.loss import LossChoices, micro_loss
from gspo_lightning.objectives import Objective, importance_log_ratio
from gspo_lightning.policy.lora import LoRAConfig
from gspo_lightning.policy.policy import Policy, PolicyConfig, load_policy, load_tokenizer
from gspo_lightning.rollout import Rollout, Samples
from gspo_lightning.run.terminal_log import say


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


def load_dump(path: Path) -> dict[str, Any]:
    """Read a dump; ValueError if the file is not there or is no dump."""
    if not path.is_file():
        raise ValueError(f"replay: no file {path}; dumps lie in faults/ of the run folder")
    content = torch.load(path, weights_only=True) if zipfile.is_zipfile(path) else None
    if not isinstance(content, dict) or "minibatch" not in content or "found" not in content:
        raise ValueError(f"replay: {path} is no dump of a faulty step")
    if content["version"] != VERSION:
        raise ValueError(f"replay: {path} was written by another version of this program")
    return content


def build_policy(dump: dict[str, Any], device: torch.device) -> Policy:
    """The policy of the run with the weights of the dump."""
    settings, entries = dump["settings"], dump["settings"]["policy"]
    lora = None if entries["lora"] is None else LoRAConfig(**entries["lora"])
    config = PolicyConfig(**entries | {"lora": lora})
    policy = load_policy(config, load_tokenizer(config))
    policy.train()  # as in the run; dropout is off in either mode
    if settings["precision"] == "64-true":
        policy.double()
    policy.to(device)
    one = torch.ones(1, 1, dtype=torch.long, device=device)
    with torch.no_grad():  # a first pass on sound weights decides how the model is run
        completion_logprobs(policy.model, one, one.bool(), one, one.bool())
    policy.load_state_dict(dump["policy"])
    return policy


def replay(dump: dict[str, Any], device: torch.device) -> Looks:
    """Compute the step of a dump again and look at every tensor on the way."""
    policy, looks = build_policy(dump, device), Looks()
    chosen = dict(dump["choices"])
    choices = LossChoices(**chosen | {"objective": Objective(**chosen["objective"])})
    batch = dump["minibatch"]
    rows: list[dict] = [{}] * len(batch["texts"])
    known = {f.name: batch[f.name] for f in fields(Rollout) if f.name in batch}  # older dumps
    minibatch = Rollout(**known | {"rows": rows})
    minibatch, weights = minibatch.to(device), dump["weights"].to(device)
    for name, parameter in policy.model.named_parameters():
        looks.at(f"weight: {name}", parameter)
    for name in ("advantages", "old_logprobs", "ref_logprobs"):
        tensor = getattr(minibatch, name)
        if tensor is not None and (choices.kl_coef > 0 or name != "ref_logprobs"):
            looks.at(name, tensor.masked_fill(~minibatch.mask, 0), lambda row: row)
    settings = dump["settings"]
    trained = {name: p for name, p in policy.model.named_parameters() if p.requires_grad}
    total = {name: torch.zeros_like(p) for name, p in trained.items()}
    mixed = settings["precision"] == "bf16-mixed"
    tokens = settings.get("micro_batch_tokens")
    for index in minibatch.micro_batch_indices(settings["micro_batch_size"], tokens):
        micro, part = minibatch.select(index), weights[index.to(device)]
        own: list[int] = index.tolist()
        with (
            watched(policy.model, looks, micro, own),
            torch.autocast(device.type, torch.bfloat16, enabled=mixed, cache_enabled=False),
        ):
            temperature = settings["temperature"]
            found = samples_logprobs(policy.model, micro, temperature, with_entropy=True)
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


def report(dump: dict[str, Any], looks: Looks) -> list[str]:
    """What was found, in a few lines."""
    lines, first = [f"recorded: {', '.join(dump['found'])} not finite"], looks.first
    if dump["settings"].get("critic"):
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
        prompt, text = dump["prompts"][first.row], dump["minibatch"]["texts"][first.row]
        lines.append(f"  row {first.row}, prompt {prompt[:200]!r}, completion {text[:200]!r}")
    return lines


def main(argv: list[str]) -> int:
    """Replay one dump; returns the exit code, 0 if a tensor is not finite, 1 if all are.

    Raises:
        ValueError: If the dump cannot be read or the device is not there.
    """
    parser = argparse.ArgumentParser("train.py replay", description=__doc__.split("\n\n")[0])
    parser.add_argument("dump", type=Path, help="a file in faults/ of a run folder")
    parser.add_argument("--device", help="default: where the run was, if that is here, else cpu")
    arguments = parser.parse_args(argv)
    dump = load_dump(arguments.dump)
    recorded = dump["settings"]["device"]
    device = arguments.device or (recorded if torch.cuda.is_available() else "cpu")
    if device.startswith("cuda") and not torch.cuda.is_available():
        raise ValueError(f"replay: --device {device}, but this machine has no CUDA device")
    if device.partition(":")[0] != recorded:
        note = f"the run was on {recorded}, this is {device}: other kernels round differently"
        say(note, sys.stdout)
    looks = replay(dump, torch.device(device))
    for line in report(dump, looks):
        say(printable(line), sys.stdout)  # a dump is data, and may quote anything
    return int(looks.first is None)
