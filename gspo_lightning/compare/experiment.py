"""Callbacks of experiments: the record of a run, and how a mixture's experts move.

Decides when a compared run has had its share, and what "activated experts that differ" means.
Leaves out which runs there are and what is made of them (``compare``).
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback
from torch import Tensor, nn

from gspo_lightning.bounds import check_at_least
from gspo_lightning.checkpoint.io import replacing
from gspo_lightning.logprobs import completion_logprobs
from gspo_lightning.rollout import Rollout


class RunRecord(Callback):
    """Give a run its share of completions, and write down what came of it.

    Dynamic sampling draws more prompts for a rollout than it keeps, so that a comparison by
    rollouts would give it more data than others: the run ends with the rollout in which so many
    completions have been sampled, those of dropped groups included. ``record.json`` in the run
    folder is written at the end, so that its presence says that the run is complete.

    Args:
        completions: Completions over all ranks.

    Raises:
        ValueError: If there are none.
    """

    FILE = "record.json"

    def __init__(self, completions: int) -> None:
        check_at_least(1, completions=completions)
        self.completions = completions
        self.sampled = 0
        self.rollouts: list[dict[str, float]] = []
        self.validations: list[dict[str, float]] = []

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, *_: Any) -> None:
        figures = outputs["metrics"]
        # prompts over all ranks
        self.sampled += int(figures["rollout/prompts_drawn"]) * pl_module.sampler.group_size
        self.rollouts.append(figures | {"index": outputs["index"], "completions": self.sampled})
        if self.sampled >= self.completions:
            trainer.should_stop = True

    def on_validation_end(self, trainer: Any, pl_module: Any) -> None:
        figures = {k: float(v) for k, v in trainer.callback_metrics.items() if k.startswith("val/")}
        after = {"rollouts": len(self.rollouts), "completions": self.sampled}
        if not self.validations or self.validations[-1]["rollouts"] < after["rollouts"]:
            self.validations.append(figures | after)

    def on_fit_end(self, trainer: Any, pl_module: Any) -> None:
        """Write the record, whole or not at all."""
        evaluated = self.validations and self.validations[-1]["rollouts"] == len(self.rollouts)
        if not trainer.is_global_zero or self.sampled < self.completions or not evaluated:
            return  # a kill between the last checkpoint and the last evaluation loses the latter
        record = {
            "parameters": sum(p.numel() for p in pl_module.policy.parameters()),
            "trained": sum(p.numel() for p in pl_module.parameters() if p.requires_grad),
            "group_size": pl_module.sampler.group_size,
            "kl": pl_module.kl_coef > 0,
            "rollouts": self.rollouts,
            "validations": self.validations,
        }
        file = Path(trainer.default_root_dir, self.FILE)
        with replacing(file) as new:
            new.write(json.dumps(record).encode())

    def state_dict(self) -> dict[str, Any]:
        names = ("sampled", "rollouts", "validations")
        return {name: getattr(self, name) for name in names}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        for name, value in state_dict.items():
            setattr(self, name, value)


class ExpertShift(Callback):
    """Log how many activated experts differ after an optimizer step, for the same tokens.

    The tokens are those of a few completions of the rollout before: drawn by the policy a moment
    ago, and the same before and after the step. Logged as ``moe/expert_change``, the share of
    (token, layer) choices among the top k that the policy after the step no longer makes, as the
    mean over the rollout's steps; ``moe/expert_change_rollout`` is that from first step to last.

    Args:
        completions: Completions of the rollout before that are looked at, at most.

    Raises:
        ValueError: If ``completions`` is below 1, or the model has no router.

    Source:
        GSPO, arXiv:2507.18071, section 5.3, reports about 10 % per gradient update for a model of
        48 layers.
    """

    def __init__(self, completions: int = 32) -> None:
        check_at_least(1, completions=completions)
        self.completions = completions
        self.rollout: Rollout | None = None
        self.first: list[Tensor] | None = None
        self.last: list[Tensor] | None = None
        self.changes: list[float] = []

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        if not routers(pl_module.policy.model):
            raise ValueError(
                f"ExpertShift: {type(pl_module.policy.model).__name__} has no router; it is for "
                "mixtures of experts"
            )

    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        """Look at the experts; the look before this one was one step ago."""
        if self.rollout is None:
            return
        now = self._choices(pl_module)
        if self.last is not None:
            self.changes.append(share_changed(self.last, now))
        self.first = self.first or now
        self.last = now

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, *_: Any) -> None:
        if self.rollout is not None and self.first is not None and self.last is not None:
            now = self._choices(pl_module)
            self.changes.append(share_changed(self.last, now))
            figures = {
                "moe/expert_change": sum(self.changes) / len(self.changes),
                "moe/expert_change_rollout": share_changed(self.first, now),
            }
            for logger in trainer.loggers:
                logger.log_metrics(figures, step=outputs["index"])
            outputs["metrics"].update(figures)  # for callbacks behind this one
        self.rollout = outputs["rollout"].select(
            torch.arange(min(self.completions, len(outputs["rollout"])))
        )
        self.first, self.last, self.changes = None, None, []

    def state_dict(self) -> dict[str, Any]:
        """The tokens that the rollout after a restart is to be looked at with."""
        if self.rollout is None:
            return {}
        names = ("prompt_ids", "prompt_mask", "completion_ids", "mask")
        return {name: getattr(self.rollout, name).cpu() for name in names}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        if state_dict:
            size, length = state_dict["mask"].shape
            nothing = torch.zeros(size)
            self.rollout = Rollout(
                **state_dict,
                finished=torch.zeros(size, dtype=torch.bool),
                rows=[{}] * size,
                texts=[""] * size,
                group_size=1,
                old_logprobs=torch.zeros(size, length),
                ref_logprobs=None,
                rewards=nothing,
                reward_parts={},
                advantages=torch.zeros(size, length),
            )

    @torch.no_grad()
    def _choices(self, pl_module: Any) -> list[Tensor]:
        """Experts of each token in each layer, sorted, (tokens, k) a layer."""
        assert self.rollout is not None
        rollout = self.rollout.to(pl_module.device)
        with recorded(pl_module.policy.model) as choices:
            completion_logprobs(
                pl_module.policy.model,
                rollout.prompt_ids,
                rollout.prompt_mask,
                rollout.completion_ids,
                rollout.mask,
            )
        return choices


def routers(model: nn.Module) -> list[nn.Module]:
    """The routers of a mixture of experts, in the order of its layers."""
    return [part for part in model.modules() if type(part).__name__.endswith("TopKRouter")]


@contextmanager
def recorded(model: nn.Module) -> Iterator[list[Tensor]]:
    """Collect what each router chooses in the forward passes of a ``with`` block."""
    choices: list[Tensor] = []

    def note(router: nn.Module, inputs: Any, output: tuple[Tensor, ...]) -> None:
        # transformers' routers give (logits, scores, indices)
        choices.append(output[-1].sort(-1).values)

    handles = [router.register_forward_hook(note) for router in routers(model)]
    try:
        yield choices
    finally:
        for handle in handles:
            handle.remove()


def share_changed(before: list[Tensor], after: list[Tensor]) -> float:
    """Share of the choices of ``before`` that are not among those of ``after``.

    Args:
        before: Experts of each token, one tensor a layer, (tokens, k) int.
        after: Likewise, of the same tokens.

    >>> before, after = [torch.tensor([[0, 1], [2, 3]])], [torch.tensor([[1, 4], [2, 3]])]
    >>> share_changed(before, after)
    0.25
    """
    kept = total = 0
    for old, new in zip(before, after, strict=True):
        kept += int((old[:, :, None] == new[:, None, :]).any(-1).sum())
        total += old.numel()
    return 1 - kept / total
