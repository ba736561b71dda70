"""Reward model: a sequence classifier with one output, fitted to pairs of completions.

Decides the loss (Bradley-Terry, with an optional term that keeps scores near 0) and what counts as
a pair put right. Gradient clipping and accumulation are the Trainer's (``gradient_clip_val`` and
``accumulate_grad_batches``); what is exported is what ``RewardModel`` loads.
"""

import math
from pathlib import Path
from typing import Any, NamedTuple

import torch
from lightning.pytorch import LightningModule
from torch import Tensor
from torch.nn.functional import logsigmoid
from torch.optim import Optimizer
from transformers import AutoConfig, AutoModelForSequenceClassification

from gspo_lightning.engine.mode import raise_flags
from gspo_lightning.engine.rotary import check_rotary
from gspo_lightning.guards.rank_watch import watch_for
from gspo_lightning.guards.trainer import whole
from gspo_lightning.optim import (
    OptimizerConfig,
    build_optimizer,
    learning_rate_factor,
)
from gspo_lightning.policy.folder import load_weights, unloadable
from gspo_lightning.policy.policy import (
    DTYPES,
    PolicyConfig,
    check_special_ids,
    checkpoint_activations,
    load_tokenizer,
    make_ready,
)
from gspo_lightning.policy.reads import positions
from gspo_lightning.policy.settings import log_settings, remake, restoring, settings_of
from gspo_lightning.supervised.step_log import num_optimizer_steps, set_rate_and_log


class PairLoss(NamedTuple):
    """Loss, share of pairs put right, and mean score difference of B pairs; each () float32."""

    loss: Tensor
    accuracy: Tensor
    margin: Tensor


def bradley_terry(chosen: Tensor, rejected: Tensor, centring: float = 0.0) -> PairLoss:
    """Negative log-likelihood of the preferences, if scores are log-odds.

    The loss is the mean of -log sigmoid(chosen - rejected), plus ``centring`` times the mean square
    of all scores: the difference alone leaves their level free, and it would drift.

    Args:
        chosen: Scores of the better completions, (B,).
        rejected: Scores of the worse ones, (B,).
        centring: Coefficient of the mean square, >= 0.

    Returns:
        Loss in nats per pair; accuracy, the share of pairs with chosen > rejected; margin, the mean
        of chosen - rejected. The gradient flows through the loss alone.

    Source:
        InstructGPT, arXiv:2203.02155, equation 1, with one pair per prompt.

    >>> bradley_terry(torch.tensor([1.0, 0.0]), torch.tensor([0.0, 0.0])).accuracy
    tensor(0.5000)
    """
    difference = chosen.float() - rejected.float()
    loss = -logsigmoid(difference).mean()
    if centring:
        loss = loss + centring * torch.cat([chosen, rejected]).float().square().mean()
    right = (difference > 0).float().mean()
    return PairLoss(loss, right, difference.detach().mean())


class RewardModelModule(LightningModule):
    """Learn to score completions from which of two was preferred.

    Logs ``loss`` (nats per pair), ``accuracy`` and ``margin`` under ``train/`` and, with held-out
    pairs, under ``val/``, and ``train/learning_rate``, against the optimizer step.

    Args:
        policy: The model to start from: a causal language model, whose body is taken and whose head
            gives way to a new one with one output, or a sequence classifier with one label.
        optimizer: AdamW and its schedule; ``warmup`` and the fall are counted in optimizer steps.
        centring: Coefficient of the mean square of the scores, >= 0.

    Raises:
        ValueError: If ``centring`` is out of range, or ``policy`` cannot be such a model.
    """

    learns_from = "PreferenceData"
    figures = (
        "train/learning_rate",
        *(f"{stage}/{name}" for stage in ("train", "val") for name in PairLoss._fields),
    )

    def __init__(
        self, policy: PolicyConfig, optimizer: OptimizerConfig | None = None, centring: float = 0.0
    ) -> None:
        super().__init__()
        optimizer = optimizer or OptimizerConfig(learning_rate=1e-5)
        self.save_hyperparameters(settings_of(RewardModelModule, locals()), logger=False)
        if not 0 <= centring < math.inf:
            raise ValueError(f"model.centring must be >= 0 and finite, got {centring}")
        if policy.lora is not None:
            raise ValueError(
                "policy.lora: a reward model is trained whole here; set policy.lora to null"
            )
        self.policy_config = policy
        self.optimizer_config = optimizer
        self.centring = centring
        self.tokenizer = load_tokenizer(policy)  # data is set up before there is a model
        self.tokenizer.padding_side = "right"  # as RewardModel pads what it scores
        if self.tokenizer.pad_token_id is None:
            # Many causal models have no padding token; a classifier finds no end of a text without.
            self.tokenizer.pad_token = self.tokenizer.eos_token
        if self.tokenizer.pad_token_id is None:
            raise ValueError(
                f"policy.path: the tokenizer of {policy.path} has neither pad_token nor eos_token; "
                "give it a pad_token"
            )
        self.model: Any = None

    def configure_model(self) -> None:
        """Load the model; Lightning calls this again for every fit and validate."""
        if self.model is None:
            self.model = load_classifier(self.policy_config, self.tokenizer)
            self.model.train()  # computes as in eval mode, but recomputes activations where set

    def configure_callbacks(self) -> list[Any]:
        """Have ranks that wait for another one say so."""
        return watch_for(self.trainer)

    def on_fit_start(self) -> None:
        """Show Lightning a module in train mode, as it asks for."""
        raise_flags(self)
        log_settings(self, ("val/accuracy", "val/loss", "train/loss"))

    def on_train_start(self) -> None:
        """Have the model compute as in eval mode, and recompute activations where that is set."""
        self.train()

    def configure_optimizers(self) -> Optimizer:
        """AdamW; each training step sets its learning rate."""
        # A falling schedule without an end is refused here, before anything is trained.
        learning_rate_factor(self.optimizer_config, num_optimizer_steps(self.trainer))
        return build_optimizer(self.model, self.optimizer_config)

    def scores(self, ids: Tensor, mask: Tensor) -> Tensor:
        """Score N texts.

        Args:
            ids: Right-padded, (N, T); what stands under a False mask does not matter.
            mask: True on real tokens, (N, T) bool.

        Returns:
            (N,) float32.

        Raises:
            ValueError: If the texts are longer than the model reads.
        """
        limit = positions(self.model.config)
        if limit is not None and ids.shape[1] > limit:
            raise ValueError(
                f"the model reads {limit} tokens, a text has {ids.shape[1]}; lower data.max_tokens"
            )
        check_rotary(self.model, ids.shape[1])
        ids = ids.masked_fill(~mask, self.model.config.pad_token_id)
        return self.model(input_ids=ids, attention_mask=mask.long()).logits[:, 0].float()

    def loss(self, batch: Any) -> PairLoss:
        """Loss, accuracy and margin of a ``PreferenceBatch``; mean over this rank's pairs."""
        chosen, rejected = self.scores(batch.ids, batch.mask).chunk(2)
        return bradley_terry(chosen, rejected, self.centring)

    @whole
    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """One batch; Lightning runs backward, clips and steps."""
        found = self.loss(batch)
        metrics = {name: value.detach() for name, value in found._asdict().items()}
        set_rate_and_log(self, metrics, batch_size=len(batch.ids) // 2)
        return found.loss

    @whole
    def validation_step(self, batch: Any, batch_idx: int) -> None:
        """Log loss, accuracy and margin; batches are weighted by their pairs."""
        for name, value in self.loss(batch)._asdict().items():
            self.log(f"val/{name}", value, batch_size=len(batch.ids) // 2, sync_dist=True)

    @classmethod
    def load_from_checkpoint(cls, checkpoint_path: Any, map_location: Any = None, **given: Any):  # type: ignore[override]
        """A module with the weights of a checkpoint; ``given`` arguments win over its own."""
        with restoring(RewardModelModule, checkpoint_path):
            given = remake(RewardModelModule, checkpoint_path, given)
            return super().load_from_checkpoint(checkpoint_path, map_location, **given)

    def export(self, path: str | Path) -> None:
        """Write the model as a folder that ``RewardModel(path=...)`` loads."""
        if self.global_rank == 0:
            self.model.save_pretrained(path)
            self.tokenizer.save_pretrained(path)


def load_classifier(config: PolicyConfig, tokenizer: Any) -> Any:
    """Load a sequence classifier with one output, or make one from a causal language model.

    A new head is drawn from torch's global random state, which ``seed_everything`` sets.

    Args:
        config: What to load.
        tokenizer: Its tokenizer, with a padding token.

    Raises:
        ValueError: If the folder cannot be read, holds a classifier with several labels, or lacks
            weights of the model's body.
    """
    options: dict[str, Any] = {"trust_remote_code": config.trust_remote_code}
    key, auto = "policy.path", AutoModelForSequenceClassification
    try:
        settings = AutoConfig.from_pretrained(config.path, revision=config.revision, **options)
        architecture = (getattr(settings, "architectures", None) or [""])[0]
        if "SequenceClassification" in architecture and settings.num_labels != 1:
            raise ValueError(
                f"it has {settings.num_labels} labels; start from one with 1, or a language model"
            )
        settings.num_labels = 1
        settings.pad_token_id = tokenizer.pad_token_id  # before the export: saved along
        options["dtype"] = DTYPES[config.dtype]
        if config.attention is not None:
            options["attn_implementation"] = config.attention
        if config.weights == "random":
            model = auto.from_config(settings, **options)
    except Exception as error:  # whatever a model's code raises for sizes that do not fit
        raise unloadable(key, config.path, error) from error
    if config.weights == "pretrained":
        options |= {"config": settings, "revision": config.revision}
        model = load_weights(key, auto, config.path, new_head=True, **options)
    check_special_ids(model, {"pad_token": [tokenizer.pad_token_id]})
    make_ready(model)
    if config.gradient_checkpointing:
        checkpoint_activations(model)
    return model
