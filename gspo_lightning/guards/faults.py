"""Numerical faults: seen before the weights move, agreed on by all ranks, counted, written down.

Decides what is looked at, how many faults in a row end a run, and what a dump holds.
"""

import warnings
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gspo_lightning.checkpoint.io import AtomicCheckpointIO, CheckpointError
from gspo_lightning.rollout import Rollout
from gspo_lightning.start.typed import program

INPUTS = ("advantages", "old_logprobs", "ref_logprobs", "mismatch_weights")
LOOKED_AT = (*INPUTS, "logprobs", "ratio", "loss", "gradient")  # in the order of computation
FOLDER = "faults"  # inside the run folder
KEPT = 3  # newest dumps; each holds the policy's weights
VERSION = 2  # of a dump


class Faults:
    """Looks for NaN and infinities in every optimizer step, without waiting for the device.

    A flag per tensor stays on the device until the gradient is there; then the flags are summed
    over ranks, once per step, so that every rank skips or none does.

    Args:
        max_faults: Faulty steps in a row that end the run.

    Attributes:
        in_a_row: Faulty steps since the last good one, the same on every rank.
        found: What was not finite in the last step, on any rank; names of ``LOOKED_AT``.
        own: Whether this rank's mini-batch is to be written down: it is at fault, or nothing
            shows whose is.

    Raises:
        ValueError: If ``max_faults`` is below 1.
    """

    def __init__(self, max_faults: int) -> None:
        if max_faults < 1:
            raise ValueError(f"model.max_faults must be >= 1, got {max_faults}")
        self.max_faults = max_faults
        self.in_a_row = 0
        self.found: tuple[str, ...] = ()
        self.own = False
        self.flags: dict[str, Tensor] = {}

    def begin(self, minibatch: Rollout, with_reference: bool) -> None:
        """Start a step and look at what the loss is computed from, where it counts."""
        self.found, self.own, self.flags = (), False, {}
        for name in INPUTS:
            tensor = getattr(minibatch, name)
            if tensor is not None and (with_reference or name != "ref_logprobs"):
                self.look(name, tensor.masked_fill(~minibatch.mask, 0))

    def look(self, name: str, tensor: Tensor) -> None:
        """Remember whether any value is not finite."""
        bad = ~torch.isfinite(tensor.detach()).all()
        self.flags[name] = self.flags[name] | bad if name in self.flags else bad

    def settle(self, norm: Tensor, reduce: Callable[[Tensor], Tensor]) -> bool:
        """Decide, with all ranks, whether the step is at fault.

        Args:
            norm: Of the gradient, ().
            reduce: Sums a tensor over ranks; every rank must call.
        """
        self.look("gradient", norm)
        fine = torch.zeros((), dtype=torch.bool, device=norm.device)
        own = torch.stack([self.flags.get(name, fine) for name in LOOKED_AT]).double()
        every = reduce(own.clone())  # a copy: ``reduce`` may sum in place
        counts = dict(zip(LOOKED_AT, every.tolist(), strict=True))
        self.found = tuple(name for name, count in counts.items() if count)
        self.in_a_row = self.in_a_row + 1 if self.found else 0
        # The gradient is that of all ranks together: it cannot show which rank is at fault.
        self.own = bool(self.found) and (self.found == ("gradient",) or bool(own[:-1].any()))
        return bool(self.found)

    def tell(self, step: str, dump: Path | None) -> None:
        """Warn of the step that was skipped, or end the run after too many in a row.

        Args:
            step: Which one, in words.
            dump: Where its mini-batch is, if it was written down here.

        Raises:
            FloatingPointError: If this was the last of ``max_faults`` in a row.
        """
        what = f"{step}: {', '.join(self.found)} not finite"
        see = "" if dump is None else f"; what is it? {program()} replay {dump}"
        if self.in_a_row >= self.max_faults:
            raise FloatingPointError(
                f"{what}, the last of {self.in_a_row} such steps in a row (max_faults); none of "
                f"them touched the weights{see}"
            )
        if self.own:
            warnings.warn(
                f"{what}, so it is skipped ({self.in_a_row} in a row; the run stops at "
                f"{self.max_faults}){see}",
                stacklevel=2,
            )


def prompt_texts(minibatch: Rollout, tokenizer: Any) -> list[str]:
    """The prompt of each row, as the policy saw it."""
    pairs = zip(minibatch.prompt_ids.cpu(), minibatch.prompt_mask.cpu(), strict=True)
    return [tokenizer.decode(ids[keep].tolist()) for ids, keep in pairs]


def write_dump(path: Path, minibatch: Rollout, state: dict[str, Any], **rest: Any) -> Path | None:
    """Write a mini-batch with the weights that met it, for ``replay``; the newest files stay.

    Args:
        path: Where; its folder is made.
        minibatch: B rows of a rollout.
        state: The policy's state dict, as it was before the step.
        rest: Plain values and tensors.

    Returns:
        ``path``, or None if the disk would not take it, which is a warning: a run does not end for
        want of a dump.
    """
    batch = {field.name: getattr(minibatch, field.name) for field in fields(Rollout)}
    batch["rows"] = None  # rows of the data may hold anything, and the loss reads none of them
    content = {"version": VERSION, "minibatch": batch, "policy": state, **rest}
    try:
        AtomicCheckpointIO().save_checkpoint(on_cpu(content), path)
    except CheckpointError as error:
        warnings.warn(f"{path} could not be written: {error.__cause__}", stacklevel=2)
        return None
    own = path.parent.glob(f"rollout=*-{path.stem.rpartition('-')[2]}.pt")  # of this rank
    # Sort by time, not by name: a run that was continued counts from an earlier rollout on.
    for old in sorted(own, key=lambda file: file.stat().st_mtime_ns)[:-KEPT]:
        old.unlink(missing_ok=True)
    return path


def on_cpu(value: Any) -> Any:
    """The same value with every tensor on the CPU, without the storage it is a view of."""
    if isinstance(value, Tensor):
        return value.detach().cpu().clone()
    if isinstance(value, dict):
        return {name: on_cpu(part) for name, part in value.items()}
    return value
