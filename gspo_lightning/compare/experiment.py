"""Callbacks of experiments: the record of a run, and how a mixture's experts move.

Decides when a compared run has had its share, and what "activated experts that differ" means.
"""

import json
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback
from torch import Tensor, nn

from gspo_lightning.bounds import check_at_least
from gspo_lightning.checkpoint.io import replacing
from gspo_lightning.compare.plan import RECORD
from gspo_lightning.logprobs import completion_logprobs

TOKENS = ("prompt_ids", "prompt_mask", "completion_ids", "mask")


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

    def __init__(self, completions: int) -> None:
        check_at_least(1, completions=completions)
        self.completions = completions
        self.sampled = 0
        self.rollouts: list[dict[str, float]] = []
        self.validations: list[dict[str, float]] = []

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, *_: Any) -> None:
        figures = outputs["metrics"]
        prompts = int(figures["rollout/prompts_drawn"])  # over all ranks
        self.sampled += prompts * pl_module.sampler.group_size
        self.rollouts.append(figures | {"index": outputs["index"], "completions": self.sampled})
        if self.sampled >= self.completions:
            trainer.should_stop = True

    def on_validation_end(self, trainer: Any, pl_module: Any) -> None:
        figures = {k: float(v) for k, v in trainer.callback_metrics.items() if k.startswith("val/")}
        done = len(self.rollouts)
        if not self.validations or self.validations[-1]["rollouts"] < done:
            self.validations.append(figures | {"rollouts": done, "completions": self.sampled})

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
        with replacing(Path(trainer.default_root_dir, RECORD)) as new:
            new.write(json.dumps(record).encode())

    def state_dict(self) -> dict[str, Any]:
        return {"sampled": self.sampled, "rollouts": self.rollouts, "validations": self.validations}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.sampled = state_dict["sampled"]
        self.rollouts = state_dict["rollouts"]
        self.validations = state_dict["validations"]


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
        self.tokens: dict[str, Tensor] = {}  # of the rollout before
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
        if self.tokens:
            now = self._choices(pl_module)
            if self.last is not None:
                self.changes.append(share_changed(self.last, now))
            self.first = self.first or now
            self.last = now

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, *_: Any) -> None:
        if self.first is not None and self.last is not None:
            now = self._choices(pl_module)
            self.changes.append(share_changed(self.last, now))
            figures = {
                "moe/expert_change": sum(self.changes) / len(self.changes),
                "moe/expert_change_rollout": share_changed(self.first, now),
            }
            for logger in trainer.loggers:
                logger.log_metrics(figures, step=outputs["index"] + 1)
            outputs["metrics"].update(figures)  # for callbacks behind this one
        rollout = outputs["rollout"]
        rollout = rollout.select(torch.arange(min(self.completions, len(rollout))))
        self.tokens = {name: getattr(rollout, name) for name in TOKENS}
        self.first, self.last, self.changes = None, None, []

    def state_dict(self) -> dict[str, Any]:
        """The tokens that the rollout after a restart is to be looked at with."""
        return {name: tensor.cpu() for name, tensor in self.tokens.items()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.tokens = dict(state_dict)

    @torch.no_grad()
    def _choices(self, pl_module: Any) -> list[Tensor]:
        """Experts of each token in each layer, sorted, (tokens, k) a layer."""
        tokens = (self.tokens[name].to(pl_module.device) for name in TOKENS)
        with recorded(pl_module.policy.model) as choices:
            completion_logprobs(pl_module.policy.model, *tokens)
        return choices


def routers(model: nn.Module) -> list[nn.Module]:
    """The routers of a mixture of experts, in the order of its layers."""
    return [part for part in model.modules() if type(part).__name__.endswith("TopKRouter")]


@contextmanager
def recorded(model: nn.Module) -> Iterator[list[Tensor]]:
    """Collect what each router chooses in the forward passes of a ``with`` block."""
    choices: list[Tensor] = []

    def note(router: nn.Module, inputs: Any, output: tuple[Tensor, ...]) -> None:
        choices.append(output[-1].sort(-1).values)  # transformers: (logits, scores, indices)

    with ExitStack() as hooks:
        for router in routers(model):
            hooks.enter_context(router.register_forward_hook(note))
        yield choices


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
