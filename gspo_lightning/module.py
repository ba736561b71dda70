"""GSPO as a LightningModule: collect a rollout, update on it.

Decides the settings and what is logged; ``collect`` and ``update`` are in the files of that name.
The maths is in ``objectives``, ``advantages``, ``kl`` and ``logprobs``; the KL coefficient belongs
to ``callbacks.AdaptiveKL``, the position in the data to ``data.PromptData``, and files, checkpoints
and pictures to the callbacks.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, Literal

import torch

from gspo_lightning.critic.critic import Critic, CriticConfig, check_critic, fit_critic, load_critic
from gspo_lightning.evaluation import Evaluation
from gspo_lightning.frozen.models import FrozenModels, ReferencePolicy, RewardModel
from gspo_lightning.guards.faults import Faults
from gspo_lightning.guards.health import Health
from gspo_lightning.guards.out_of_memory import TOKENS, BatchSizes
from gspo_lightning.kl import check_loss_kind
from gspo_lightning.objectives import Objective
from gspo_lightning.old_logprobs import MICRO, REFERRED, SAMPLED, OldLogProbs
from gspo_lightning.optim import (
    OptimizerConfig,
    build_optimizer,
    learning_rate_factor,
    set_learning_rate,
)
from gspo_lightning.policy.policy import PolicyConfig, load_policy, load_tokenizer
from gspo_lightning.rewards.terms import (
    RewardTerm,
    count_names,
    load_whitening_state,
    ramp_tokens,
    whitening_state,
)
from gspo_lightning.rewards.time_limit import TimeLimit
from gspo_lightning.rollout import PromptBatch
from gspo_lightning.sampling import GroupSampler, Sampler
from gspo_lightning.settings import check_settings
from gspo_lightning.tally import RolloutTally
from gspo_lightning.update import UpdatingModule


class GSPOModule(UpdatingModule):
    """Trains a causal language model with Group Sequence Policy Optimization.

    Args:
        policy: The model to train.
        rewards: Reward terms by name; their weighted sum is the reward of a completion.
        sampler: Draws the completions; ``None`` is ``GroupSampler()``.
        objective: Ratio, surrogate, aggregation, clip range. The defaults are GSPO as published.
        reference: Frozen policy of the KL penalty, or ``None`` for no KL at all.
        frozen_device: Puts the reference and the reward models there, whatever their own settings
            say: ``cuda:1``, ``cuda:+1``, ``policy`` or ``cpu``. ``None`` leaves it to each.
        optimizer: AdamW and its schedule, in rollouts.
        evaluation: How held-out prompts are evaluated.
        num_epochs: Passes over each rollout.
        num_minibatches: Optimizer steps per pass; must divide the completions of a rollout.
        micro_batch_size: Completions per forward and backward pass: memory, never the gradient.
            ``None`` is a whole mini-batch.
        micro_batch_tokens: Tokens per forward and backward pass, a shared prompt counted once and
            padding not at all: fewer passes where completions are short. ``None`` is no limit;
            with both limits, both hold. One completion is never cut.
        old_logprobs: Where the log-probs of the sampling policy come from. The first optimizer step
            of a rollout uses its own forward pass, whatever is set; the others with ``recompute`` a
            pass before it, with ``sampler`` those of the sampler, and with ``auto`` the sampler's
            if their noise in a few rows of the rollout is below 1 % of the clip range (float32
            as a rule; bfloat16 never), else a pass over what the first step does not cover.
        advantages: What a reward is compared with: its group, see ``advantages.group_advantages``,
            or what the critic expected (``gae``).
        critic: PPO's value model, or ``None``; needs ``advantages`` of ``gae``, and with it a group
            may be a single completion.
        truncated: What becomes of a completion that hit the limit: ``keep`` it, ``mask`` it out of
            loss and group statistics, or count its reward as 0 (``zero_reward``).
        overlong_ramp: Width in tokens of a penalty that falls to -1 at the limit, or below 1 as a
            share of the limit; ``None`` is off.
        kl_coef: Coefficient of the KL penalty; the ``AdaptiveKL`` callback takes it over.
        kl_estimator: ``k3`` (forward-KL gradient) or ``k2`` (reverse-KL gradient).
        entropy_coef: Coefficient of the entropy bonus.
        max_grad_norm: Gradients are scaled down to this norm; ``None`` only measures it.
        drop_flat_groups: Draw other prompts for groups whose rewards are all equal.
        max_draws: Times that further prompts are drawn per rollout.
        max_faults: Optimizer steps in a row with NaN or infinities that end the run. Such a step is
            skipped, counted as ``optim/faults``, and its mini-batch kept in ``faults/`` of the run
            for ``python train.py replay``.
        stop_when: Names of the rules of run health that end the run when they speak, at the next
            rollout boundary, with a checkpoint; see ``health_rules.RULES``.

    Raises:
        ValueError: If an argument is out of range or does not fit the others.

    Source:
        GSPO, arXiv:2507.18071.
    """

    learns_from = "PromptData"
    checkpoint_key = "gspo"

    def __init__(
        self,
        policy: PolicyConfig,
        rewards: dict[str, RewardTerm],
        sampler: Sampler | None = None,
        objective: Objective = Objective(),  # noqa: B008 - frozen
        reference: ReferencePolicy | None = None,
        frozen_device: str | None = None,
        optimizer: OptimizerConfig = OptimizerConfig(),  # noqa: B008 - frozen
        evaluation: Evaluation = Evaluation(),  # noqa: B008 - frozen
        num_epochs: int = 1,
        num_minibatches: int = 4,
        micro_batch_size: int | None = None,
        micro_batch_tokens: int | None = None,
        old_logprobs: OldLogProbs = "auto",
        advantages: Literal[
            "normalized", "relative", "leave_one_out", "batch_normalized", "gae"
        ] = "normalized",
        critic: CriticConfig | None = None,
        truncated: Literal["keep", "mask", "zero_reward"] = "keep",
        overlong_ramp: int | float | None = None,
        kl_coef: float = 0.0,
        kl_estimator: Literal["k2", "k3"] = "k3",
        entropy_coef: float = 0.0,
        max_grad_norm: float | None = 1.0,
        drop_flat_groups: bool = False,
        max_draws: int = 4,
        max_faults: int = 3,
        stop_when: list[str] | None = None,
    ) -> None:
        sampler = sampler or GroupSampler()
        super().__init__(rewards, sampler, evaluation)
        check_settings(
            {
                "num_epochs": num_epochs,
                "num_minibatches": num_minibatches,
                "micro_batch_size": micro_batch_size,
                "micro_batch_tokens": micro_batch_tokens,
                "max_draws": max_draws,
            },
            rewards,
            sampler,
            coefficients=(kl_coef, entropy_coef, max_grad_norm),
            has_reference=reference is not None,
            truncated=truncated,
        )
        check_critic(critic, advantages, sampler.group_size, drop_flat_groups)
        check_loss_kind(kl_estimator)
        self.automatic_optimization = False
        self.policy_config = policy
        self.tokenizer = load_tokenizer(policy)
        self.objective = objective
        self.reference = reference
        self.optimizer_config = optimizer
        self.num_epochs = num_epochs
        self.num_minibatches = num_minibatches
        self.micro_batch_size = micro_batch_size
        self.micro_batch_tokens = micro_batch_tokens
        self.old_logprobs = old_logprobs
        self.advantage_kind = advantages
        self.critic_config = critic
        self.critic: Critic | None = None
        self.needs_critic = False  # only training does
        self.kl_in_reward = critic is not None and critic.kl_in_reward
        self.truncated = truncated
        self.overlong_ramp = ramp_tokens(overlong_ramp, sampler.max_new_tokens)
        self.kl_coef = kl_coef
        self.kl_estimator = kl_estimator
        self.entropy_coef = entropy_coef
        self.max_grad_norm = max_grad_norm
        self.drop_flat_groups = drop_flat_groups
        self.max_draws = max_draws
        self.faults = Faults(max_faults)
        terms = {f"model.rewards.{name}.fn": term.fn for name, term in rewards.items()}
        models = {key: fn for key, fn in terms.items() if isinstance(fn, RewardModel)}
        owners = {MICRO: self, SAMPLED: sampler, REFERRED: reference, TOKENS: self}
        owners |= {f"{key}.batch_size": model for key, model in models.items()}
        self.sizes = BatchSizes(
            {k: o for k, o in owners.items() if hasattr(o, k.rpartition(".")[2])}, {MICRO: TOKENS}
        )
        self.tally = RolloutTally(rewards, count_names(rewards))
        self.health = Health(
            objective, num_epochs * num_minibatches, stop_when or (), sampler.max_new_tokens
        )
        # no module: Lightning must not see it
        self.frozen = FrozenModels(reference, models, frozen_device)
        self.seconds: dict[str, float] = {}
        self.peak_memory: dict[str, float] = {}  # GiB

    # --- Lightning's hooks around training -----------------------------------------------------

    def setup(self, stage: str) -> None:
        """Check what can be checked before anything is loaded, then load the frozen models."""
        self.seed = int(os.environ.get("PL_GLOBAL_SEED", 0))  # what seed_everything set
        self.needs_critic = stage == "fit"
        if stage == "fit":
            size = self.trainer.datamodule.prompts_per_rollout * self.sampler.group_size  # type: ignore[attr-defined]
            if size % self.num_minibatches:
                raise ValueError(
                    f"model.num_minibatches must divide the {size} completions of a rollout "
                    f"(prompts_per_rollout x group_size), got {self.num_minibatches}"
                )
        device = self.trainer.strategy.root_device
        self.frozen.load(self.policy_config, device, with_reference=stage == "fit")

    def configure_model(self) -> None:
        """Load the policy, once, where Lightning wants it."""
        if self.policy is None:
            self.policy = load_policy(self.policy_config, self.tokenizer)
            # Dropout is off in either mode; train mode is what gradient checkpointing needs.
            self.policy.train()
        if self.critic_config is not None and self.needs_critic and self.critic is None:
            self.critic = load_critic(self.critic_config, self.policy_config, self.policy.model)
        self.frozen.share(self.policy)

    def on_fit_start(self) -> None:
        """Begin to watch the run; behind the checkpoint, so that nothing is said twice."""
        self.health.begin(self.trainer.callbacks)  # type: ignore[attr-defined]

    def configure_optimizers(self) -> Any:
        """AdamW; ``training_step`` sets its learning rate, which a rollout's index decides."""
        learning_rate_factor(self.optimizer_config, self._num_rollouts)  # refuses now, not later
        return build_optimizer(self.policy, self.optimizer_config, self.critic)  # type: ignore[arg-type]

    @property
    def _num_rollouts(self) -> int | None:
        return getattr(self.trainer.datamodule, "num_rollouts", None)  # type: ignore[attr-defined]

    def teardown(self, stage: str) -> None:
        """Let the frozen models and the processes of reward functions go."""
        self.frozen.release()
        for term in self.rewards.values():
            if isinstance(term.fn, TimeLimit):
                term.fn.release()

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Note what whitening has seen, faults in a row, sizes and what health has seen."""
        checkpoint["gspo"] = {
            "whitening": whitening_state(self.rewards),
            "faults_in_a_row": self.faults.in_a_row,
            "sizes": self.sizes.state(self._sizes_of_ranks()),
            "health": self.health.state_dict(),
        }

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Take back what whitening has seen.

        Raises:
            ValueError: If the checkpoint is of another kind of module.
        """
        saved = checkpoint.get("gspo")
        if saved is None:
            raise ValueError("this is no checkpoint of GSPOModule")
        load_whitening_state(self.rewards, saved.get("whitening", {}))
        fit_critic(checkpoint.get("state_dict", {}), self.critic_config, self.trainer.training)
        if not self.trainer.training:
            return
        self.health.load_state_dict(saved.get("health", {}))
        self.faults.in_a_row = saved.get("faults_in_a_row", 0)
        if "sizes" in saved:
            self.sizes.load(saved["sizes"], self.global_rank)

    def fingerprints(self) -> dict[str, str]:
        """Marks of the models that are in no checkpoint; other ones would make it another run."""
        return self.frozen.fingerprints()

    def _sizes_of_ranks(self) -> list[list[int]]:
        """What is computed at once by each rank, which halves its own where memory is short."""
        own = torch.tensor(list(self.sizes.now().values()), device=self.device)
        gathered: Any = self.all_gather(own)
        return gathered.view(-1, len(own)).tolist()

    # --- one rollout ---------------------------------------------------------------------------

    def training_step(self, batch: PromptBatch, batch_idx: int) -> dict[str, Any]:
        """Collect a rollout and update on it: the whole algorithm, once."""
        index = self.trainer.fit_loop.total_batch_idx
        self.tally.reset()
        optimizer: Any = self.optimizers()
        ratio = self.critic_config.learning_rate_ratio if self.critic_config else 1.0
        set_learning_rate(optimizer, self.optimizer_config, index, self._num_rollouts, ratio)
        self.seconds = dict.fromkeys(("rollout", "score", "optimise"), 0.0)
        self.peak_memory = {}
        rollout = self.collect(batch)
        with self._phase("optimise"):
            rollout, ratios = self.learn(rollout)
        metrics = self._report(index)
        return {
            "rollout": rollout,
            "index": index,
            "metrics": metrics,
            "lengths": self._lengths,
            "ratios": ratios,
        }

    def _report(self, index: int) -> dict[str, float]:
        """Log every number of the rollout; they are the same on every rank."""
        figures = self.tally.compute()
        if self.reference is not None:
            figures["train/kl_coef"] = self.kl_coef  # the one that was used
        figures |= {f"time/{name}": seconds for name, seconds in self.seconds.items()}
        figures |= {f"memory/{name}": gib for name, gib in self.peak_memory.items()}
        figures["time/tokens_per_second"] = figures["rollout/tokens"] / self.seconds["rollout"]
        figures["policy/clip_range"] = self.health.width
        figures["optim/learning_rate"] = self.optimizers().param_groups[0]["lr"]  # type: ignore[union-attr]
        for logger in self.loggers:  # at once: a stop right behind this loses no point
            logger.log_metrics(figures, step=index)
        self.log_dict(figures, logger=False)  # for callbacks that monitor
        if self.health.check(figures):  # of figures that all ranks share: all of them stop
            self.trainer.should_stop = True
        return figures

    def export(self, path: str | Path) -> None:
        """Write the policy as a folder that ``AutoModelForCausalLM.from_pretrained`` loads."""
        if self.global_rank == 0:
            self.policy.export(path)  # type: ignore[union-attr]
