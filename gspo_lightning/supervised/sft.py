"""Warm start: supervised fine-tuning of a policy on demonstrations, before any reward.

Decides the loss (mean negative log-prob of the completion tokens, end of sequence included) and the
unit of the schedule (optimizer steps). Gradient clipping and accumulation are the Trainer's
(``gradient_clip_val`` and ``accumulate_grad_batches``).
"""

from pathlib import Path
from typing import Any

from lightning.pytorch import LightningModule
from torch import Tensor
from torch.optim import Optimizer

from gspo_lightning.engine.mode import raise_flags
from gspo_lightning.engine.rotary import fix_rotary
from gspo_lightning.guards.rank_watch import watch_for
from gspo_lightning.guards.trainer import whole
from gspo_lightning.logprobs import completion_logprobs
from gspo_lightning.masked import masked_mean
from gspo_lightning.optim import (
    OptimizerConfig,
    build_optimizer,
    learning_rate_factor,
)
from gspo_lightning.policy.policy import PolicyConfig, load_policy, load_tokenizer
from gspo_lightning.policy.settings import log_settings, remake, restoring, settings_of
from gspo_lightning.supervised.step_log import num_optimizer_steps, set_rate_and_log


class SFTModule(LightningModule):
    """Imitate demonstrations, token by token.

    Logs ``train/loss``, ``train/learning_rate`` and, with validation data, ``val/loss`` (nats per
    completion token) against the optimizer step.

    Args:
        policy: The model to start from; ``weights: random`` starts from its ``config.json`` alone.
        optimizer: AdamW and its schedule; ``warmup`` and the fall are counted in optimizer steps.
    """

    learns_from = "SFTData"
    figures = ("train/loss", "train/learning_rate", "val/loss")

    def __init__(self, policy: PolicyConfig, optimizer: OptimizerConfig | None = None) -> None:
        super().__init__()
        optimizer = optimizer or OptimizerConfig(learning_rate=1e-5)
        self.save_hyperparameters(settings_of(SFTModule, locals()), logger=False)
        self.policy_config = policy
        self.optimizer_config = optimizer
        self.tokenizer = load_tokenizer(policy)  # data is set up before there is a model
        self.policy: Any = None

    def setup(self, stage: str) -> None:
        """Check what can be checked before the policy is loaded."""
        self.policy_config.check_device("trainer.accelerator", self.trainer.strategy.root_device)

    def configure_model(self) -> None:
        """Load the policy; Lightning calls this again for every fit and validate."""
        if self.policy is None:
            self.policy = load_policy(self.policy_config, self.tokenizer)
            self.policy.train()  # computes as in eval mode, but recomputes activations where set

    def configure_callbacks(self) -> list[Any]:
        """Have ranks that wait for another one say so."""
        return watch_for(self.trainer)

    def on_validation_start(self) -> None:
        """Make all texts alike to rotary embeddings that depend on the longest one."""
        fix_rotary(self.policy.model, getattr(self.trainer.datamodule, "max_tokens", 0))  # type: ignore[attr-defined]

    def on_fit_start(self) -> None:
        """Likewise, and before any batch."""
        self.on_validation_start()
        raise_flags(self)
        log_settings(self, ("val/loss", "train/loss"))

    def on_train_start(self) -> None:
        """Have the model compute as in eval mode, and recompute activations where that is set."""
        self.train()

    def configure_optimizers(self) -> Optimizer:
        """AdamW; each training step sets its learning rate."""
        # A falling schedule without an end is refused here, before anything is trained.
        learning_rate_factor(self.optimizer_config, num_optimizer_steps(self.trainer))
        return build_optimizer(self.policy, self.optimizer_config)

    def loss(self, batch: Any) -> Tensor:
        """Mean negative log-prob of the completion tokens.

        Every token counts the same, so a long demonstration weighs more than a short one.

        Args:
            batch: An ``SFTBatch``; its ``mask`` (B, T) selects the completions with their EOS.

        Returns:
            Nats per token, () float32. Over this rank's batch: several ranks average their means.
        """
        logprobs = completion_logprobs(
            self.policy.model, batch.prompt_ids, batch.prompt_mask, batch.completion_ids, batch.mask
        ).logprobs
        return -masked_mean(logprobs, batch.mask)

    @whole
    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """One batch; Lightning runs backward, clips and steps."""
        loss = self.loss(batch)
        set_rate_and_log(self, {"loss": loss.detach()}, batch_size=len(batch.mask))
        return loss

    @whole
    def validation_step(self, batch: Any, batch_idx: int) -> None:
        """Log the loss; batches are weighted by their tokens, so the mean is over all tokens."""
        tokens = int(batch.mask.sum())
        self.log("val/loss", self.loss(batch), batch_size=tokens, prog_bar=True, sync_dist=True)

    @classmethod
    def load_from_checkpoint(cls, checkpoint_path: Any, map_location: Any = None, **given: Any):  # type: ignore[override]
        """A module with the weights of a checkpoint; ``given`` arguments win over its own."""
        with restoring(SFTModule, checkpoint_path):
            given = remake(SFTModule, checkpoint_path, given)
            return super().load_from_checkpoint(checkpoint_path, map_location, **given)

    def export(self, path: str | Path) -> None:
        """Write the policy as a folder that ``AutoModelForCausalLM.from_pretrained`` loads."""
        if self.global_rank == 0:
            self.policy.export(path)
