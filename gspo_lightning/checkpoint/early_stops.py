"""EarlyStopping across a stop: its decision stands for as long as its settings do.

Lightning keeps what the callback has counted, but not that it has ended the run, so the same
command would train on until it decides once more; and it takes `patience` from the checkpoint,
whatever the config says.
"""

from typing import Any

from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import EarlyStopping
from lightning.pytorch.callbacks.early_stopping import EarlyStoppingReason

_SETTINGS = ("min_delta", "patience", "check_finite", "stopping_threshold", "divergence_threshold")


def of(trainer: Trainer) -> list[EarlyStopping]:
    """Those that a run has."""
    return [c for c in trainer.callbacks if isinstance(c, EarlyStopping)]  # type: ignore[attr-defined]


def note(trainer: Trainer, states: dict[str, Any]) -> None:
    """Put the settings that a decision depends on beside the state of each."""
    for stop in of(trainer):
        if stop.state_key in states:
            states[stop.state_key]["settings"] = _settings(stop)


def keep_what_the_config_says(trainer: Trainer, states: dict[str, Any]) -> None:
    """Withdraw, in the state to be loaded, a decision that was made with other settings."""
    for stop in of(trainer):
        state = states.get(stop.state_key)
        if state is None:
            continue
        if state.pop("settings", None) != _settings(stop):
            state["stopping_reason"] = EarlyStoppingReason.NOT_STOPPED.value
        state["patience"] = stop.patience


def reasons(trainer: Trainer) -> list[str]:
    """Why those that have ended this run did so; empty where none has."""
    ended = [s for s in of(trainer) if s.stopping_reason is not EarlyStoppingReason.NOT_STOPPED]
    texts = [stop.stopping_reason_message or stop.stopping_reason.name for stop in ended]
    return [text.removesuffix(" Signaling Trainer to stop.").rstrip(".") for text in texts]


def _settings(stop: EarlyStopping) -> dict[str, Any]:
    return {name: getattr(stop, name) for name in _SETTINGS}


def agree_to_stop(trainer: Any) -> None:
    """Stop all ranks when a callback has stopped one: the others would wait for it for ever."""
    if trainer.state.fn != "fit" or trainer.sanity_checking:
        return
    progress = trainer.fit_loop.epoch_loop.batch_progress.total
    if trainer.world_size > 1 and progress.processed < progress.ready:
        # The other ranks are in the middle of the rollout: this question would meet their sums.
        raise RuntimeError("a StopIteration in a hook has ended the training of this rank alone")
    if trainer.strategy.reduce_boolean_decision(trainer.should_stop, all=False):
        trainer.should_stop = True
