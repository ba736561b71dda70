"""Why a training ended before its planned length, and by whose decision."""

from typing import Any

from gspo_lightning.checkpoint import early_stops
from gspo_lightning.checkpoint.rollout_checkpoint import agree_to_stop, in_pieces
from gspo_lightning.run import plan


def why_early(trainer: Any, module: Any, stopped_by: str | None = None) -> str | None:
    """Who ended a training, and how to have it go on; None if it has its planned length.

    Args:
        trainer: It has ended, and not by a signal.
        module: What it trained.
        stopped_by: The function that set `trainer.should_stop`, if one did.
    """
    if plan.reached(trainer):
        return None
    if getattr(getattr(module, "health", None), "stopped", None) is not None:
        return "by model.stop_when, as said above"
    for reason in early_stops.reasons(trainer):
        return f"by EarlyStopping: {reason}; change its settings to go on"
    for spent, limit in plan.time_limits(trainer):
        if spent >= limit:
            return f"by the limit of {limit} (trainer.max_time or Timer); raise it to go on"
    if in_pieces(trainer):
        return "by a StopIteration, which was raised within a rollout"
    if stopped_by is None:
        return "by a hook that took no further batch, or by data that ended"
    if stopped_by == agree_to_stop.__qualname__:
        stopped_by = "another rank"
    return f"by {stopped_by}, which set trainer.should_stop"
