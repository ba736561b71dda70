"""What of Lightning would silently be left out here, or done wrongly.

Decides which options and callbacks are refused before anything is loaded, with the setting that
does the same here, and which figures a callback may watch. A module that steps its optimizer
itself is left alone by much of Lightning without a word.
"""

import math
import warnings
from collections.abc import Iterable
from typing import Any

from lightning.pytorch import callbacks as lightning_callbacks
from lightning.pytorch.callbacks import (
    EMAWeightAveraging,
    LearningRateMonitor,
    ModelCheckpoint,
    OnExceptionCheckpoint,
)

from gspo_lightning.checkpoint.monitor import UnloggedFigure, monitored_name

HALF_DONE = "; RolloutCheckpoint keeps the last whole one"
INSTEAD = {  # of callbacks: why they are refused, and what does it here
    "BatchSizeFinder": "tries batch sizes, of which the module has none: set model.init_args."
    "micro_batch_size, which is halved by itself where memory is short",
    "LearningRateFinder": "has nothing to try: set model.init_args.optimizer.learning_rate",
    "GradientAccumulationScheduler": "accumulates nothing here: the module splits its mini-batches "
    "itself; set model.init_args.micro_batch_size",
    "StochasticWeightAveraging": "averages nothing here; use EMAWeightAveraging or WeightAveraging",
    "BaseFinetuning": "freezes before there is a policy, and its learning rates are overwritten; "
    "train adapters with model.init_args.policy.lora",
    "ModelPruning": "changes weights below the sampler; prune the model that HFExport writes",
    "SpikeDetection": "watches one loss per batch, and a rollout has many; name rules of run "
    "health in model.init_args.stop_when",
    "OnExceptionCheckpoint": f"saves in the middle of a rollout{HALF_DONE}",
}


def check_strategy(settings: Any) -> None:
    """Raise ValueError for strategies and precisions that would train wrongly."""
    given = settings.strategy
    name = given if isinstance(given, str) else getattr(given, "class_path", type(given).__name__)
    name = name.rpartition(".")[2]
    others = ("fsdp", "deepspeed", "FSDP", "DeepSpeed", "ModelParallel")
    if name.startswith(others) and name not in ("fsdp2", "FSDP2"):
        # FSDP1 and DeepSpeed allow one backward pass per batch, and a rollout has many; parts of a
        # layer on each card are more than the policy's own code can be cut into.
        raise ValueError(
            f"trainer.strategy {name}: a policy that is too large for one device is shared out "
            "by fsdp2 here (configs/hardware/fsdp2.yaml); one that is not trains with auto or ddp"
        )
    precision = str(settings.precision)
    if precision in ("16-mixed", "16"):
        raise ValueError(
            "trainer.precision 16-mixed: its loss scaling skips optimizer steps silently; use "
            "bf16-mixed or 32-true"
        )
    if precision.endswith("-true") and precision not in ("32-true", "64-true"):
        raise ValueError(
            f"trainer.precision {precision}: the dtype of the weights is the policy's own setting; "
            "set model.init_args.policy.dtype instead"
        )


def check_trainer(trainer: Any, module: Any) -> None:
    """Raise ValueError for a Trainer that would train a module wrongly, where that is its task."""
    check_strategy(trainer)
    if trainer.state.fn != "fit":
        return
    environment: Any = trainer._accelerator_connector.cluster_environment
    if getattr(environment, "auto_requeue", False):  # of SLURM; a command has seen to it before
        environment.auto_requeue = False
        warnings.warn(
            "SLURM: Lightning's requeueing would save in the middle of a rollout and is off here; "
            "with StopSignals() of gspo_lightning.checkpoint.signals as the first callback a run "
            "saves after its rollout on SIGUSR1 and ends",
            stacklevel=2,
        )
    try:
        check_training(trainer, trainer.callbacks, module, trainer.datamodule)
    except ValueError:
        # It would write a checkpoint of a training that has not begun.
        left = [c for c in trainer.callbacks if not isinstance(c, OnExceptionCheckpoint)]
        trainer.callbacks = left
        raise


def check_training(settings: Any, callbacks: Iterable[Any], module: Any, data: Any) -> None:
    """Raise ValueError for what would have no effect in a training, or a wrong one.

    Args:
        settings: A Trainer, or what has the names of its options.
        callbacks: All callbacks of the training.
        module: What is trained.
        data: Its data module, or None.
    """
    callbacks = list(callbacks)
    if settings.overfit_batches:
        raise ValueError(
            f"trainer.overfit_batches {settings.overfit_batches}: the data goes on to other rows "
            "in each batch; to train on a few again and again, name a file of them in data.path "
            "(as many as a batch has: data.prompts_per_rollout), and set the length as usual"
        )
    if not module.automatic_optimization:
        check_manual(settings)
        for callback in callbacks:
            check_callback(callback, module)
    check_monitors(settings, callbacks, module, data)


def check_manual(settings: Any) -> None:
    """Raise ValueError for trainer options whose work the module or its data does itself."""
    if settings.gradient_clip_val is not None or settings.gradient_clip_algorithm is not None:
        raise ValueError(
            "trainer.gradient_clip_val: the module clips; set model.init_args.max_grad_norm instead"
        )
    if settings.accumulate_grad_batches not in (None, 1):
        raise ValueError(
            "trainer.accumulate_grad_batches: the module splits its mini-batches itself; set "
            "model.init_args.micro_batch_size instead"
        )


def check_callback(callback: Any, module: Any) -> None:
    """Raise ValueError for a callback that manual optimization makes useless or harmful."""
    name = type(callback).__name__
    for refused, why in INSTEAD.items():
        if isinstance(callback, getattr(lightning_callbacks, refused)):
            raise ValueError(f"trainer.callbacks: {name} {why}")
    # what the global step, which Lightning counts periods in, gains with a rollout
    steps = getattr(module, "num_epochs", 1) * getattr(module, "num_minibatches", 1)
    if isinstance(callback, EMAWeightAveraging):
        every = callback.update_every_n_steps
        if every > 0 and math.gcd(every, steps) > 1:  # looked at after each rollout, from step 0
            raise ValueError(
                f"trainer.callbacks: {name}.update_every_n_steps {every} never falls on the end of "
                f"a rollout of {steps} optimizer steps; set it to 1, which is every rollout"
            )
    if isinstance(callback, ModelCheckpoint):
        _check_saving(callback, name, steps)


def _check_saving(callback: ModelCheckpoint, name: str, steps: int) -> None:
    if callback.save_on_exception:
        text = "save_on_exception saves in the middle of a rollout"
        raise ValueError(f"trainer.callbacks: {name}.{text}{HALF_DONE}")
    if callback._train_time_interval is not None:
        raise ValueError(
            f"trainer.callbacks: {name}.train_time_interval never saves here; set every_n_rollouts "
            "of RolloutCheckpoint"
        )
    if callback._every_n_train_steps % steps:
        raise ValueError(
            f"trainer.callbacks: {name}.every_n_train_steps counts optimizer steps, of which a "
            f"rollout has {steps}: {callback._every_n_train_steps} is no multiple of them"
        )
    if (callback.filename or "").lstrip("{").startswith("rollout"):
        raise ValueError(
            f"trainer.callbacks: {name}.filename {callback.filename!r} looks like the files of "
            "RolloutCheckpoint, from which runs go on; choose another beginning"
        )


def check_monitors(settings: Any, callbacks: list[Any], module: Any, data: Any) -> None:
    """Raise ValueError for a callback that watches a figure which is never logged.

    A callback of the user's, or a module of the user's, may log what it likes; nothing is known
    then before it does.
    """
    names = figures_of(module)
    if names is None or any(map(_may_log, callbacks)):
        return
    validates = settings.limit_val_batches != 0 and _validation_data(data)
    for callback in callbacks:
        monitor = monitored_name(callback)
        watches_rate = monitor is not None and monitor.startswith("lr-")
        if watches_rate and any(isinstance(c, LearningRateMonitor) for c in callbacks):
            continue
        if monitor is not None and monitor not in names:
            raise UnloggedFigure(callback, names)
        # Ours, which base.yaml has for every task, keep no best one where nothing is held out.
        ours = type(callback).__module__.startswith("gspo_lightning.")
        if monitor is not None and monitor.startswith("val/") and not (validates or ours):
            raise ValueError(
                f"{type(callback).__name__}.monitor {monitor!r} is never logged: nothing is held "
                "out; set data.val_path (and no trainer.limit_val_batches of 0)"
            )


def figures_of(module: Any) -> set[str] | None:
    """Every figure that training a module of this package can log; None of any other module."""
    if not type(module).__module__.startswith("gspo_lightning."):
        return None
    if not hasattr(module, "tally"):
        return set(module.figures)
    names = module.tally.names | {f"time/{part}" for part in ("rollout", "score", "optimise")}
    names |= {"time/tokens_per_second", "time/reward", "time/old_logprobs"}
    names |= {f"memory/{phase}_gib" for phase in ("rollout", "score", "optimise")}
    names |= {"policy/clip_range", "optim/learning_rate", "train/kl_coef", "time/reference"}
    absent = {"train/kl_divergence", "train/kl_coef", "policy/kl_clamped_tokens", "time/reference"}
    if module.reference is not None:
        absent = set()
    if module.critic_config is None:
        absent |= {name for name in names if name.startswith("critic/")}
    else:
        names |= {"time/values"}
    if module.sampler.group_size == 1:
        absent |= {name for name in names if "flat_" in name} | {"reward/group_std"}
    if hasattr(module.sampler, "take_weights"):  # its engine is apart from the policy
        names |= {"time/sync"}
    else:
        absent |= {"sampler/noise_after_sync"}
    if not hasattr(module.sampler, "lag"):
        absent |= {"sampler/version_lag"}
    if getattr(module.sampler, "environment", None) is None:
        absent |= {name for name in names if name.startswith("env/")}
    else:
        names |= {"time/environment"}
    if not module.mismatch.weighs:
        absent |= {f"sampler/{name}" for name in ("weight_mean", "capped", "masked")}
    if module.overlong_ramp is None:
        absent |= {"reward/overlong"}
    evaluator = module.evaluator
    figures = {*evaluator.means.places, *evaluator.passes}
    if evaluator.settings.correct is None:
        figures = {name for name in figures if not name.startswith(("accuracy_", "pass_at_"))}
    return names - absent | {f"val/{name}" for name in figures}


def _may_log(callback: Any) -> bool:
    root = type(callback).__module__.partition(".")[0]
    own = root in ("gspo_lightning", "lightning", "pytorch_lightning")
    return not own or isinstance(callback, lightning_callbacks.LambdaCallback)


def _validation_data(data: Any) -> bool:
    paths = getattr(data, "paths", {})
    return bool(paths["val_path"] if "val_path" in paths else getattr(data, "val_path", True))
