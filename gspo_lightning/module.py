"""GSPO as a LightningModule: collect a rollout, update on it.

Decides the settings, what Lightning's hooks do, and what is logged of a step.
"""

import math
import os
from contextlib import nullcontext
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from lightning.pytorch import LightningModule

from gspo_lightning.advantages import Kind
from gspo_lightning.bounds import check_at_least, check_positive
from gspo_lightning.collect import Collector
from gspo_lightning.critic import Critic, CriticConfig, check_critic, fit_critic, load_critic
from gspo_lightning.curves import FigureLog
from gspo_lightning.engine.mode import raise_flags
from gspo_lightning.engine.rotary import fix_rotary
from gspo_lightning.environments.start import check_rewards, check_start
from gspo_lightning.evaluation import Evaluation, Evaluator, describe
from gspo_lightning.frozen import FrozenModels, ReferencePolicy, RewardModel
from gspo_lightning.frozen.models import check_kl_in_reward, check_reference
from gspo_lightning.guards.faults import Faults
from gspo_lightning.guards.health import Health
from gspo_lightning.guards.ignored import check_trainer
from gspo_lightning.guards.out_of_memory import MICRO, REFERRED, SAMPLED, TOKENS, Sizes
from gspo_lightning.guards.rank_watch import gradient_wait, tell_phase, together, watch_for
from gspo_lightning.guards.trainer import (
    check_batch,
    check_data,
    leave_out_noise,
    tell_loading,
    whole,
)
from gspo_lightning.kl import check_loss_kind
from gspo_lightning.loss import LossChoices
from gspo_lightning.mismatch import Mismatch
from gspo_lightning.objectives import Objective
from gspo_lightning.old_logprobs import OldLogProbs, Source
from gspo_lightning.optim import (
    OptimizerConfig,
    build_optimizer,
    learning_rate_factor,
    set_learning_rate,
)
from gspo_lightning.policy import Policy, check_lengths, load_policy
from gspo_lightning.policy.complete import complete, logits
from gspo_lightning.policy.given import GivenPolicy, GivenTokenizer, as_policy, given_tokenizer
from gspo_lightning.policy.settings import log_settings, remake, restoring, settings_of
from gspo_lightning.rewards import (
    GivenRewards,
    TimeLimit,
    as_terms,
    check_present,
    check_signatures,
    check_terms,
    columns_needed,
    count_names,
    load_whitening_state,
    ramp_tokens,
    row_checks,
    score_or_keep,
    terms_left_out,
    whitening_state,
)
from gspo_lightning.rollout import PromptBatch, Rollout, stream_seed
from gspo_lightning.sampling import GroupSampler, Sampler
from gspo_lightning.sharding import mesh_of, share_out, weights_of
from gspo_lightning.step import Clock, Ranks, Step
from gspo_lightning.tally import RolloutTally
from gspo_lightning.update import Updater
from gspo_lightning.vllm.ahead import AsyncSampler, check_apart, is_ahead

leave_out_noise()  # here: a Trainer begins to talk as it is made


class GSPOModule(LightningModule):
    """Trains a causal language model with Group Sequence Policy Optimization.

    Args:
        policy: The model to train; from Python also a path, a hub name or a loaded model.
        rewards: Terms by name (from Python also functions); their weighted sum is the reward.
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
        mismatch: How rows are weighed where the sampler's probabilities are not the policy's; all
            old log-probs are recomputed then.
        advantages: What a reward is compared with: its group, see ``advantages.group_advantages``,
            or what the critic expected (``gae``).
        critic: PPO's value model, or ``None``; needs ``advantages`` of ``gae``, and with it a group
            may be a single completion.
        truncated: What becomes of a completion that hit the limit: ``keep`` it, ``mask`` it out of
            loss and group statistics, or count its reward as 0 (``zero_reward``).
        overlong_ramp: Width in tokens of a penalty that falls to -1 at the limit, or below 1 as a
            share of the limit; ``None`` is off.
        kl_coef: Coefficient of the KL penalty; the ``AdaptiveKL`` callback takes it over.
        kl_estimator: ``k3`` (forward-KL gradient), ``k2`` (reverse-KL gradient) or
            ``k3_corrected`` (that also off the policy).
        kl_in_reward: Without a critic: the KL penalty is taken off the rewards, before they are
            compared, and is no term of the loss; with one, see ``critic.kl_in_reward``.
        entropy_coef: Coefficient of the entropy bonus.
        max_grad_norm: Gradients are scaled down to this norm; ``None`` only measures it.
        drop_flat_groups: Draw other prompts for groups whose rewards are all equal.
        max_draws: Times that further prompts are drawn per rollout.
        max_faults: Optimizer steps in a row with NaN or infinities that end the run. Such a step is
            skipped, counted as ``optim/faults``, and its mini-batch kept in ``faults/`` of the run
            for ``gspo replay``.
        stop_when: Names of the rules of run health that end the run when they speak, at the next
            rollout boundary, with a checkpoint; see ``guards.health.RULES``.
        tokenizer: Its folder or hub name (from Python also a loaded one); ``None``: the policy's.

    Raises:
        ValueError: If an argument is out of range or does not fit the others.

    Source:
        GSPO, arXiv:2507.18071.
    """

    learns_from = "PromptData"
    checkpoint_key = "gspo"

    def __init__(
        self,
        policy: GivenPolicy,
        rewards: GivenRewards,
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
        old_logprobs: Source = "auto",
        mismatch: Mismatch = Mismatch(),  # noqa: B008 - frozen
        advantages: Kind | Literal["gae"] = "normalized",
        critic: CriticConfig | None = None,
        truncated: Literal["keep", "mask", "zero_reward"] = "keep",
        overlong_ramp: int | float | None = None,
        kl_coef: float = 0.0,
        kl_estimator: Literal["k2", "k3", "k3_corrected"] = "k3",
        kl_in_reward: bool = False,
        entropy_coef: float = 0.0,
        max_grad_norm: float | None = 1.0,
        drop_flat_groups: bool = False,
        max_draws: int = 4,
        max_faults: int = 3,
        stop_when: list[str] | None = None,
        tokenizer: GivenTokenizer = None,
    ) -> None:
        super().__init__()
        policy, rewards = as_policy(policy), as_terms(rewards)
        sampler = sampler or GroupSampler()
        self.save_hyperparameters(settings_of(GSPOModule, locals()), logger=False)
        check_signatures(rewards)
        evaluation.check_terms(rewards)
        check_at_least(
            1,
            "model.",
            num_epochs=num_epochs,
            num_minibatches=num_minibatches,
            micro_batch_size=micro_batch_size,
            micro_batch_tokens=micro_batch_tokens,
            max_draws=max_draws,
        )
        check_terms(rewards, truncated)
        check_rewards(getattr(sampler, "environment", None), rewards)
        check_positive("sampler.", temperature=sampler.temperature)
        check_positive("model.", max_grad_norm=max_grad_norm)
        check_at_least(0, "model.", kl_coef=kl_coef)
        if not math.isfinite(entropy_coef):
            raise ValueError(f"model.entropy_coef must be finite, got {entropy_coef}")
        apart = check_apart(sampler, mismatch.weighs, old_logprobs, drop_flat_groups)
        check_reference(kl_coef, reference, policy)
        check_kl_in_reward(kl_in_reward, advantages, critic, reference)
        check_loss_kind(kl_estimator)
        check_critic(critic, advantages, sampler.group_size, drop_flat_groups)
        self.automatic_optimization = False
        self.policy_config = policy
        self.tokenizer = given_tokenizer(policy, tokenizer)
        self.policy: Policy | None = None
        self.rewards = rewards
        self.columns_needed, self.row_checks = columns_needed(rewards), row_checks(rewards)
        self.sampler = sampler
        self.objective = objective
        self.reference = reference
        self.optimizer_config = optimizer
        self.num_epochs, self.num_minibatches = num_epochs, num_minibatches
        self.micro_batch_size, self.micro_batch_tokens = micro_batch_size, micro_batch_tokens
        self.old_logprobs: Source = "recompute" if apart else old_logprobs
        self.mismatch = mismatch
        self.advantages = advantages
        self.critic_config = critic
        self.critic: Critic | None = None
        self.needs_critic = False  # only training does
        self.truncated = truncated
        self.overlong_ramp = ramp_tokens(overlong_ramp, sampler.max_new_tokens)
        self.kl_coef, self.kl_estimator = kl_coef, kl_estimator
        self.kl_in_reward = kl_in_reward if critic is None else critic.kl_in_reward
        self.entropy_coef = entropy_coef
        self.max_grad_norm = max_grad_norm
        self.drop_flat_groups, self.max_draws = drop_flat_groups, max_draws
        self.seed = 0
        self.collector: Collector = None  # type: ignore[assignment]  # made as fitting starts
        self.updater: Updater = None  # type: ignore[assignment]
        self.step: Step | None = None  # the one under way, for Lightning's hook around an update
        terms = {f"model.rewards.{name}.fn": term.fn for name, term in rewards.items()}
        self.reward_models = {k: fn for k, fn in terms.items() if isinstance(fn, RewardModel)}
        sizes = {MICRO: micro_batch_size}
        if hasattr(sampler, "batch_size"):
            sizes[SAMPLED] = sampler.batch_size
        if reference is not None:
            sizes[REFERRED] = reference.batch_size
        self.sizes = Sizes(sizes | {TOKENS: micro_batch_tokens} | self._reward_sizes())
        self.faults = Faults(max_faults)
        self.tally = RolloutTally(rewards, count_names(rewards))
        self.figure_log = FigureLog()
        self.evaluator = Evaluator(evaluation, rewards)
        self.eval_samplers = evaluation.samplers(sampler)
        self.health = Health(
            objective,
            num_epochs * num_minibatches,
            stop_when or (),
            sampler.max_new_tokens,
            mismatch.correction,
        )
        # FrozenModels is no nn.Module, or Lightning would move, save and synchronise the models.
        self.frozen = FrozenModels(reference, self.reward_models, frozen_device)

    @property
    def choices(self) -> LossChoices:
        """What the loss is made of now; the KL penalty may be in the rewards."""
        coef = 0.0 if self.kl_in_reward else self.kl_coef
        known = self.objective, self.kl_estimator, coef, self.entropy_coef, self.mismatch
        return LossChoices(*known)

    # --- one rollout ---------------------------------------------------------------------------

    @whole
    def training_step(self, batch: PromptBatch, batch_idx: int) -> dict[str, Any]:
        """Collect a rollout and update on it: the whole algorithm, once."""
        step = self.begin_step()
        self.send_weights(step)
        with step.ranks.weights.apart():
            rollout = self.collector.collect(batch, step)
        rollout, ratios = self.updater.learn(rollout, step)
        return self.report(rollout, ratios, step)

    def begin_step(self) -> Step:
        """Set the learning rate of the step and make what lives as long as it does."""
        trainer = self.trainer
        index = trainer.fit_loop.total_batch_idx
        ratio = self.critic_config.learning_rate_ratio if self.critic_config else 1.0
        optimizer: Any = self.optimizers()
        set_learning_rate(optimizer, self.optimizer_config, index, self._num_rollouts, ratio)
        self.tally.reset()
        devices = self.frozen.devices.values()
        clock = Clock(self.device, devices, lambda name: tell_phase(trainer, name, index))
        # A tensor made on the CPU goes to the device first: that device's backend adds up.
        reduce = trainer.strategy.reduce
        add = together(trainer, clock, lambda x: reduce(x.to(self.device), reduce_op="sum"))
        gather = together(trainer, clock, lambda x: self.all_gather(x.to(self.device)))
        weights = weights_of(trainer)
        # Ranks that share the policy wait for one another within each pass, where nothing tells it.
        wait: Any = nullcontext if weights.sharded else partial(gradient_wait, trainer, clock)
        ranks = Ranks(self.global_rank, trainer.world_size, add, gather, wait, weights)
        known = self.tally, self.choices, self.kl_coef
        self.step = Step(index, self.seed, ranks, clock, *known)
        return self.step

    def send_weights(self, step: Step | None = None) -> None:
        """Give a sampler whose engine is apart from the policy the weights; every rank calls.

        Without a step they are sent whatever was sent last: callbacks may have put others in their
        place, such as averages of them, for an evaluation.
        """
        if hasattr(self.sampler, "take_weights"):
            clock = Clock(self.device) if step is None else step.clock
            with clock.timed("sync", self.device):
                steps = self.trainer.global_step
                self.sampler.take_weights(self.policy, steps, anew=step is None)

    def report(self, rollout: Rollout, ratios: torch.Tensor, step: Step) -> dict[str, Any]:
        """Log every number of the rollout, the same on every rank; what callbacks get to see."""
        self.step = None
        figures = self.tally.compute()
        if self.reference is not None:
            figures["train/kl_coef"] = step.kl_coef
        figures |= {f"time/{name}": seconds for name, seconds in step.clock.seconds.items()}
        figures |= {f"memory/{name}": gib for name, gib in step.clock.peak_memory.items()}
        # A sampler that is ahead draws during the whole step before.
        phases = ("rollout", "score", "optimise") if is_ahead(self.sampler) else ("rollout",)
        seconds = sum(step.clock.seconds[name] for name in phases)
        figures["time/tokens_per_second"] = figures["rollout/tokens"] / seconds
        figures["policy/clip_range"] = self.health.width
        figures["optim/learning_rate"] = self.optimizers().param_groups[0]["lr"]  # type: ignore[union-attr]
        # At once, so that a stop right after the step loses no point.
        self.figure_log.log(self.trainer, figures, step.index + 1)
        self.log_dict(figures, logger=False)  # for callbacks that monitor
        if self.health.check(figures):  # the figures are those of all ranks, so all of them stop
            self.trainer.should_stop = True
        return {
            "rollout": rollout,
            "index": step.index,
            "metrics": figures,
            "lengths": step.lengths,
            "ratios": ratios,
        }

    def on_before_optimizer_step(self, optimizer: Any) -> None:
        """Measure and clip the gradient, behind callbacks that look at it as it was made."""
        if self.step is not None:
            self.updater.settle_gradient(optimizer, self.step)

    def on_train_batch_end(self, *_: Any) -> None:
        """Let gradients go, which callbacks have seen: as much memory as the weights take."""
        self.optimizers().zero_grad()  # type: ignore[union-attr]

    # --- Lightning's hooks around training -----------------------------------------------------

    def configure_callbacks(self) -> list[Any]:
        """Refuse, in the first hook there is, what Lightning would leave out or do wrongly here."""
        check_trainer(self.trainer, self)
        return watch_for(self.trainer)

    def setup(self, stage: str) -> None:
        """Check what can be checked before anything is loaded, then load the frozen models."""
        self.seed = int(os.environ.get("PL_GLOBAL_SEED", 0))  # what seed_everything set
        self.needs_critic = stage == "fit"
        check_present(self.rewards)
        check_start(self.sampler, self.trainer.datamodule)  # type: ignore[attr-defined]
        if stage == "fit":
            check_data(self.trainer, self, self.sampler.group_size)
        device = self.trainer.strategy.root_device
        examples = getattr(self.trainer.datamodule, "examples", {})  # type: ignore[attr-defined]
        held_out = self.eval_samplers["greedy"].max_new_tokens
        check_lengths(self.policy_config, examples, self.sampler.max_new_tokens, held_out)
        if stage == "fit":
            tell_loading(self.trainer, self)
        if hasattr(self.sampler, "reach"):
            self.sampler.reach(self.policy_config, self._longest)
        self.frozen.load(self.policy_config, device, with_reference=stage == "fit")

    def configure_model(self) -> None:
        """Load the policy, once, where Lightning wants it."""
        if self.policy is None:
            mesh = mesh_of(self._trainer)  # of ranks that cut the policy
            self.policy = load_policy(self.policy_config, self.tokenizer, mesh)
            self.policy.train()  # computes as in eval mode, but recomputes activations where set
            share_out(self.policy, self._trainer)
        if self.critic_config is not None and self.needs_critic and self.critic is None:
            self.critic = load_critic(self.critic_config, self.policy_config, self.policy.model)
        self.frozen.share(self.policy)

    def _fix_lengths(self) -> None:
        """Make all texts of the run alike to rotary embeddings that depend on the longest one."""
        others = getattr(self.critic, "backbone", None), getattr(self.reference, "model", None)
        fix_rotary(self.policy.model, self._longest, *others)  # type: ignore[union-attr]

    @property
    def _longest(self) -> int:
        """Tokens of the longest text that the run can have, prompt and completion."""
        prompts = getattr(self.trainer.datamodule, "max_prompt_tokens", 0)  # type: ignore[attr-defined]
        samplers = (self.sampler, *self.eval_samplers.values())
        return prompts + max(sampler.max_new_tokens for sampler in samplers)

    on_validation_start = on_test_start = on_predict_start = _fix_lengths

    def on_fit_start(self) -> None:
        """Make the two halves of a step, now that the models are there, and watch the run."""
        self._fix_lengths()
        if self.reference is not None:
            self.reference.check_follows(self.policy.model)  # type: ignore[union-attr]
        raise_flags(self)
        old_logprobs = OldLogProbs(
            self.policy,
            self.sampler,
            self.objective,
            self.sizes,
            source=self.old_logprobs,
            num_epochs=self.num_epochs,
            num_minibatches=self.num_minibatches,
            kl_in_reward=self.kl_in_reward,
        )
        self.collector = Collector(
            self.policy,
            self.critic,
            self.sampler,
            self.rewards,
            self.reference,
            self.frozen,
            old_logprobs,
            self.sizes,
            draw=lambda lacking: self.trainer.datamodule.draw(lacking),  # type: ignore[attr-defined]
            ahead=self.trainer.datamodule.ahead if is_ahead(self.sampler) else None,  # type: ignore[attr-defined]
            failed=self._failed,
            num_minibatches=self.num_minibatches,
            advantages=self.advantages,
            truncated=self.truncated,
            overlong_ramp=self.overlong_ramp,
            drop_flat_groups=self.drop_flat_groups,
            max_draws=self.max_draws,
            kl_in_reward=self.kl_in_reward,
        )
        self.updater = Updater(
            self,
            self.policy,
            self.critic,
            self.sampler,
            old_logprobs,
            self.sizes,
            self.faults,
            policy_settings=asdict(self.policy_config),
            num_epochs=self.num_epochs,
            num_minibatches=self.num_minibatches,
            max_grad_norm=self.max_grad_norm,
            reference=self.reference,
        )
        # Health begins behind the checkpoint: what it has said before a stop is not said again.
        self.health.begin(self.trainer.callbacks)  # type: ignore[attr-defined]
        log_settings(self)
        self.figure_log.begin(self.trainer)

    def on_train_start(self) -> None:
        """Have all models compute as in eval mode, and recompute activations where that is set."""
        self.train()

    def configure_optimizers(self) -> Any:
        """AdamW; ``training_step`` sets its learning rate, which a rollout's index decides."""
        learning_rate_factor(self.optimizer_config, self._num_rollouts)  # refuses now, not later
        return build_optimizer(self.policy, self.optimizer_config, self.critic)  # type: ignore[arg-type]

    @property
    def _num_rollouts(self) -> int | None:
        rollouts = getattr(self.trainer.datamodule, "num_rollouts", None)  # type: ignore[attr-defined]
        return rollouts and rollouts * max(1, self.trainer.max_epochs or 1)

    def teardown(self, stage: str) -> None:
        """Let the frozen models and the processes of reward functions go."""
        self.frozen.release()
        for term in self.rewards.values():
            if isinstance(term.fn, TimeLimit):
                term.fn.release()

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Note whitening, faults in a row, sizes, health and a reference that moves."""
        self.sizes.now |= self._reward_sizes()
        own = torch.tensor(self.sizes.numbers(), device=self.device)
        ranks: Any = self.all_gather(own)  # each halves its own sizes where its memory is short
        checkpoint["gspo"] = {
            "whitening": whitening_state(self.rewards),
            "faults_in_a_row": self.faults.in_a_row,
            "sizes": self.sizes.state(ranks.view(-1, len(own)).tolist()),
            "health": self.health.state_dict(),
        }
        if self.reference is not None and (moved := self.reference.state()) is not None:
            checkpoint["gspo"]["reference"] = moved
        if isinstance(self.sampler, AsyncSampler):
            checkpoint["gspo"]["under_way"] = self.sampler.state_dict()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Take back what whitening has seen.

        Raises:
            ValueError: If the checkpoint is of another kind of module.
        """
        saved = checkpoint.get("gspo")
        if saved is None:
            raise ValueError("this is no checkpoint of GSPOModule")
        training = self._trainer is not None and self.trainer.training  # else load_from_checkpoint
        load_whitening_state(self.rewards, saved.get("whitening", {}))
        fit_critic(checkpoint.get("state_dict", {}), self.critic_config, training)
        if not training:
            return
        if self.reference is not None:
            self.reference.load_state(saved.get("reference"))
        self.health.load_state_dict(saved.get("health", {}))
        self.faults.in_a_row = saved.get("faults_in_a_row", 0)
        if isinstance(self.sampler, AsyncSampler):
            self.sampler.load_state_dict(saved.get("under_way", []), self.global_rank)
        if "sizes" in saved:
            self.sizes.load(saved["sizes"], self.global_rank)
            for key, model in self.reward_models.items():
                model.batch_size = self.sizes.now[f"{key}.batch_size"] or model.batch_size

    def fingerprints(self) -> dict[str, str]:
        """Marks of the models that are in no checkpoint; other ones would make it another run."""
        return self.frozen.fingerprints()

    def _reward_sizes(self) -> dict[str, int | None]:
        return {f"{key}.batch_size": m.batch_size for key, m in self.reward_models.items()}

    @property
    def _failed(self) -> Path:
        """The file that keeps completions which could not be scored."""
        rank = f".rank{self.global_rank}" if self.global_rank else ""
        return Path(self.trainer.default_root_dir, f"failed_rollout{rank}.jsonl")

    # --- evaluation and prediction -------------------------------------------------------------

    def on_validation_epoch_start(self) -> None:
        """Start counting."""
        self.evaluator.reset()
        self.send_weights()

    @whole
    def validation_step(self, batch: PromptBatch, batch_idx: int) -> None:
        """Complete and score held-out prompts, with the same draws at every validation."""
        check_batch(batch, PromptBatch)
        seed = stream_seed(self.seed, batch_idx, self.global_rank, "evaluation")
        self.evaluator.update(self.policy, batch, self.eval_samplers, seed)

    def on_validation_epoch_end(self) -> None:
        """Log accuracies, pass@k and rewards as ``val/...``."""
        self._log_evaluation("val")

    on_test_epoch_start = on_validation_epoch_start
    test_step = validation_step

    def on_test_epoch_end(self) -> None:
        """Log the same figures as ``test/...``."""
        self._log_evaluation("test")

    def _log_evaluation(self, stage: str) -> None:
        weights_of(self.trainer).meet()  # the last batch is over here, maybe not on other ranks
        figures = {f"{stage}/{name}": value for name, value in self.evaluator.compute().items()}
        fitting = self.trainer.state.fn == "fit"
        self.log_dict(figures, logger=False if fitting else None, sync_dist=True)
        if fitting:  # Lightning drops the evaluation before training and counts from 0 after it
            self.figure_log.log(self.trainer, figures, self.trainer.fit_loop.total_batch_idx + 1)

    def on_predict_epoch_start(self) -> None:
        """Have completions drawn from the weights as they are now."""
        self.send_weights()

    @whole
    def predict_step(self, batch: PromptBatch, batch_idx: int) -> list[dict[str, Any]]:
        """Complete each prompt ``group_size`` times and score the completions."""
        check_batch(batch, PromptBatch)
        seed = stream_seed(self.seed, batch_idx, self.global_rank, "prediction")
        samples = self.sampler.sample(self.policy, batch, seed=seed)
        scores = score_or_keep(self.rewards, samples, self._failed)
        pairs = zip(batch.prompt_ids, batch.prompt_mask, strict=True)
        prompts = [self.tokenizer.decode(ids[keep].tolist()) for ids, keep in pairs]
        return describe(samples, scores, prompts)

    # --- the policy in a program of one's own --------------------------------------------------

    @classmethod
    def load_from_checkpoint(cls, checkpoint_path: Any, map_location: Any = None, **given: Any):  # type: ignore[override]
        """A module with the policy of a checkpoint; ``given`` arguments win over those it holds.

        Reward functions are not imported from it: they are left out unless they are given.
        """
        with restoring(GSPOModule, checkpoint_path):
            given = remake(GSPOModule, checkpoint_path, given, rewards=terms_left_out)
            return super().load_from_checkpoint(checkpoint_path, map_location, **given)

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None) -> Any:
        """Logits of the policy; see ``policy.complete.logits``."""
        return logits(self.policy, input_ids, attention_mask)

    def generate(self, prompts: list[Any], **options: Any) -> list[list[str]]:
        """Complete texts, or lists of chat messages; see ``policy.complete.complete``."""
        options = {"max_new_tokens": self.sampler.max_new_tokens} | options
        return complete(self.policy, prompts, in_run=self._trainer is not None, **options)

    def export(self, path: str | Path) -> None:
        """Write the policy as a folder that ``AutoModelForCausalLM.from_pretrained`` loads."""
        policy: Any = self.policy
        first = self.global_rank == 0
        state = weights_of(self._trainer).state_beside(policy.model, first, Path(path))
        if first:
            policy.export(path, state)
