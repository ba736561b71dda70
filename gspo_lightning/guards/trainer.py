"""What a Trainer that a program made itself, without our command, must be told.

Decides what of its output is noise here, and what it cannot train.
"""

import logging
import re
import warnings
from collections.abc import Callable
from functools import wraps
from typing import Any, ParamSpec, TypeVar

Arguments = ParamSpec("Arguments")
Result = TypeVar("Result")

log = logging.getLogger(__name__)

# Messages of Lightning that are advertising, or repeat what the plan and our own lines say.
_CHATTER = re.compile(
    r"💡 Tip|(GPU|TPU|HPU) available: |`Trainer\.fit` stopped|Restor(ing|ed) |Loaded model weights"
    r"|`Trainer\((limit_|val_check_interval=)|\s*Detected KeyboardInterrupt"
    r"|(\[rank: \d+\] )?(Seed set to |Child process with PID )"
    r"|`weights_only` was not set|Time limit reached|Found current_model_state"
    # TF32 would round float32's log-ratios by more than the clip range
    r"|Initializing distributed: |-+\ndistributed_backend="
    r"|You are using a CUDA device \(.*\) that has Tensor Cores|LOCAL_RANK: \d+ - CUDA_VISIBLE_DEV"
)
_TALKERS = (
    "pytorch.accelerators.cuda",
    "pytorch.utilities.rank_zero",
    "fabric.utilities.distributed",
    "fabric.utilities.rank_zero",
    "fabric.utilities.seed",
    "fabric.strategies.launchers.subprocess_script",
)
_HARMLESS = {  # the beginning of a warning: the module that gives it
    # lightning 2.6.6 itself asks torch for LeafSpec, which torch 2.13 has deprecated
    r".*isinstance\(treespec, LeafSpec\)": r"lightning\.pytorch\.utilities\._pytree",
    # lightning 2.6.6 gathers from all ranks by a function that torch 2.13 has deprecated
    r"torch\.distributed\.nn\.functional\.all_gather is deprecated": "",
    # it saves behind the optimizer steps of a rollout, which is what is wanted
    r"Using ModelCheckpoint with manual optimization": r"lightning\.pytorch\.callbacks\.",
    # defaults of callbacks that are refused, each with a line of its own
    r"Unable to serialize instance (cpu|l1_unstructured|random_unstructured)$": "",
    # the policy is whole on each device, so its average is, too
    r"You're using the WeightAveraging callback with a model that overrides": "",
    # what a checkpoint calls the policy is the average, which is what is evaluated
    r"You're using the WeightAveraging callback, but loading a checkpoint outside the": "",
    # a run that goes on, beside RolloutCheckpoint's files
    r"Checkpoint directory .* exists and is not empty": "",
    # callbacks may come and go when a run is continued; what must not change has a fingerprint
    r"Be aware that when using `ckpt_path`, callbacks used to create the checkpoint": "",
    # tokenised prompts lie in memory: worker processes would only cost time
    r"The '\w+_dataloader' does not have many workers": r"lightning\.pytorch\.trainer\.",
    # barebones switches off what callbacks would monitor, as whoever asks for it knows
    r"You are trying to `self\.log\(\)` but `Trainer\(barebones": r"lightning\.pytorch\.core\.",
    # data.val_path: null is a choice
    r"Total length of `list` across ranks is zero": r"lightning\.",
}


def _no_chatter(record: logging.LogRecord) -> bool:
    return not _CHATTER.match(record.getMessage())


def leave_out_noise() -> None:
    """Keep what Lightning says that is no news to a user of this package out of the output.

    It begins as the Trainer is made, so it must be called before; again does no harm.
    """
    for name in _TALKERS:
        logging.getLogger(f"lightning.{name}").addFilter(_no_chatter)
    for message, module in _HARMLESS.items():
        warnings.filterwarnings("ignore", message=message, module=module)


def check_data(trainer: Any, module: Any, size: int) -> None:
    """Refuse to train on what is no data of rollouts, before a model is loaded.

    Args:
        trainer: The Trainer.
        module: What it trains, for messages.
        size: Completions of a prompt.

    Raises:
        ValueError: Naming what is needed.
    """
    name = type(module).__name__
    prompts = getattr(trainer.datamodule, "prompts_per_rollout", None)
    if prompts is None:
        raise ValueError(
            f"{name} learns from PromptData, which continues exactly where a run was stopped; a "
            "loader does not: trainer.fit(module, PromptData('prompts.jsonl', num_rollouts=100))"
        )
    if prompts * size % module.num_minibatches:
        raise ValueError(
            f"model.num_minibatches must divide the {prompts * size} completions of a rollout "
            f"(prompts_per_rollout x group_size), got {module.num_minibatches}"
        )
    done, limit = trainer.fit_loop.epoch_progress.current.processed, trainer.fit_loop.max_epochs
    if limit is not None and 0 < limit <= done:
        log.warning(f"nothing to train: this Trainer has done its max_epochs {limit}; make another")
    rollouts = getattr(trainer.datamodule, "num_rollouts", None)
    if rollouts is not None and rollouts < trainer.log_every_n_steps:
        trainer.log_every_n_steps = 1  # Lightning counts batches, of which a run may have ten


def check_batch(batch: Any, kind: type) -> None:
    """Raise ValueError for a batch of another kind, as a loader of texts gives it."""
    if not isinstance(batch, kind):
        raise ValueError(
            f"a batch must be a {kind.__name__}, got {type(batch).__name__}; give a PromptData as "
            "datamodule, or a loader with collate_fn=gspo_lightning.data.collate_prompts"
        )


def whole(step: Callable[Arguments, Result]) -> Callable[Arguments, Result]:
    """Make an error of a StopIteration within a step of a module.

    Lightning takes one for the end of the data: a rollout would stay half-trained, an evaluation
    would be that of its first batches, and nothing would say so.
    """

    @wraps(step)
    def run(*args: Arguments.args, **kwargs: Arguments.kwargs) -> Result:
        try:
            return step(*args, **kwargs)
        except StopIteration as error:
            raise RuntimeError(f"a StopIteration left {step.__qualname__}") from error

    return run


def tell_loading(trainer: Any, module: Any) -> None:
    """Let callbacks with ``before_loading`` look at a run of which no model is loaded yet."""
    for callback in trainer.callbacks:
        if before_loading := getattr(callback, "before_loading", None):
            before_loading(trainer, module)
