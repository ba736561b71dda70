"""Checkpoints at rollout boundaries: when to write, what to keep, and how to go on from there.

Decides the moment of saving (after a rollout and after the validation that belongs to it) and which
files stay. What a checkpoint holds is decided elsewhere: each module, callback and loader has its
own `state_dict`, and random streams are functions of the rollout index, so none is stored.
"""

import math
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal

import torch
import yaml
from lightning.fabric.plugins import TorchCheckpointIO
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

from gspo_lightning.bounds import check_at_least
from gspo_lightning.checkpoint import early_stops
from gspo_lightning.checkpoint.early_stops import agree_to_stop
from gspo_lightning.checkpoint.event_files import (
    cut_event_files,
    drop_unused,
    event_file_sizes,
    mark_event_files,
)
from gspo_lightning.checkpoint.files import (
    BEST,
    FOLDER,
    checkpoint_number,
    list_checkpoints,
    numbered_files,
)
from gspo_lightning.checkpoint.fingerprints import collect, differences, refuse_changes
from gspo_lightning.checkpoint.io import AtomicCheckpointIO, beyond_plain, replacing
from gspo_lightning.checkpoint.monitor import monitored
from gspo_lightning.checkpoint.parts import remove, remove_unnamed
from gspo_lightning.checkpoint.places import check_shared, local_folder
from gspo_lightning.checkpoint.ranks import check_alike, checkpoint_mark
from gspo_lightning.checkpoint.signals import StopSignals
from gspo_lightning.checkpoint.tables import cut_tables, save_tables

_TEMPORARY = re.compile(r"\..+\.(?:ckpt|yaml)\.\d+\.tmp")


class RolloutCheckpoint(Checkpoint):
    """Save every few rollouts, always at a rollout boundary, and continue from there exactly.

    A boundary is reached when a rollout's updates are done, every other callback has seen it, and
    the validation that is due after it is finished. One Lightning batch is one rollout; for
    modules that step on every batch (`SFTModule`) the unit is the batch. A run that is stopped, by
    a signal or by `trainer.should_stop`, saves whatever the period; all ranks stop together.

    Args:
        every_n_rollouts: Save when the number of completed rollouts is a multiple of this.
        keep_last: Newest files to keep, at least 1.
        save_at_end: Also save after the last rollout of an epoch.
        monitor: A validation figure, such as `val/accuracy_sampled`: the checkpoints with the best
            ones are kept, too, and a new best one is saved whether or not a period ends;
            `--ckpt_path best` finds the best of them. None keeps no best one. The evaluation
            before training does not count.
        mode: Whether the largest (`max`) or the smallest (`min`) figure is the best.
        keep_best: Best files to keep, at least 1.

    Attributes:
        accept_changes: Continue although settings, data or models are not those of the checkpoint.
        best_model_path: The best file of this run, the newest one without a `monitor`: what
            `trainer.test(ckpt_path="best")` and `trainer.test()` load after `fit`.

    Raises:
        ValueError: If `every_n_rollouts`, `keep_last` or `keep_best` is below 1, `mode` is no
            mode, or the validation has no such figure.
    """

    def __init__(
        self,
        every_n_rollouts: int = 10,
        keep_last: int = 3,
        save_at_end: bool = True,
        monitor: str | None = None,
        mode: Literal["max", "min"] = "max",
        keep_best: int = 1,
    ) -> None:
        check_at_least(
            1, every_n_rollouts=every_n_rollouts, keep_last=keep_last, keep_best=keep_best
        )
        if mode not in ("max", "min"):
            raise ValueError(f"mode must be max or min, got {mode!r}")
        self.every_n_rollouts, self.save_at_end = every_n_rollouts, save_at_end
        self.keep_last, self.keep_best = keep_last, keep_best
        self.monitor, self.mode = monitor, mode
        self.accept_changes = False
        self.best_model_path = ""
        self._best: list[tuple[float, int]] = []  # figure, rollouts; the best one first
        self._marks: dict[str, Any] = {}
        self._validates = False  # whether a run that is not stopped validates now
        self._awaits_validation = False
        self._saving = self._ended = False
        self._saved = (0, False)  # rollouts of the newest one, and whether the run was stopping
        self._left_out: set[str] = set()  # callbacks whose state no checkpoint can hold
        self._resumed = False
        self._over = False  # whether the checkpoint has reached `max_steps`
        self._stops = False  # whether the run is to stop where it begins
        self.lifted_max_steps: int | None = None  # the limit while it is lifted

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """See to it that files are written whole, all of them in one folder that stays the same."""
        if type(trainer.strategy.checkpoint_io) is TorchCheckpointIO:
            trainer.strategy.checkpoint_io = AtomicCheckpointIO()
        # Last of all: another callback that saves would count this rollout only after its state has
        # been saved here, and a resumed run would not know of its file.
        others = [callback for callback in trainer.callbacks if callback is not self]  # type: ignore[attr-defined]
        trainer.callbacks = [*others, self]  # type: ignore[attr-defined]  # Lightning iterates over the old list
        root = local_folder(trainer.default_root_dir)
        # Lightning keeps a relative path as it is; a reward may change the working folder.
        trainer._default_root_dir = str(root)  # type: ignore[attr-defined]
        if stage == "fit" and not trainer.fast_dev_run:  # type: ignore[attr-defined]
            check_shared(trainer, root)
            mark_event_files(trainer)

    def on_exception(self, trainer: Trainer, *_: Any) -> None:
        """Leave no trace of a fit that was refused."""
        drop_unused(trainer)

    def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
        """Save now, or leave it to the validation that is about to run."""
        agree_to_stop(trainer)
        due, self._validates = self._is_due(trainer), _validation_follows(trainer)
        self._awaits_validation = due and self._validates
        if due and not self._validates:
            self._save(trainer)
        if _stopped_by_signal(trainer) and not self._validates:
            # Lightning validates once more before a stop; whoever signals does not wait so long.
            trainer.fit_loop.epoch_loop._skip_next_val = True

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save before a validation that a stop brings, where the stop came too late for a hook."""
        if trainer.state.fn == "fit" and trainer.should_stop and not self._validates:
            self._save_once(trainer)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save the boundary whose validation has just been completed."""
        if trainer.state.fn != "fit":
            return
        agree_to_stop(trainer)
        figure = math.nan
        if self.monitor is not None:
            figure = monitored(self, trainer.callback_metrics)
        due, self._awaits_validation = self._awaits_validation, False
        validates, self._validates = self._validates, False
        if not validates or trainer.fast_dev_run:  # type: ignore[attr-defined]
            return  # before training, or brought about by a stop: an unstopped run has it not
        best = self._enters_best(figure, trainer.fit_loop.total_batch_idx + 1)
        if due or best or _stops(trainer):
            self._save(trainer)

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        agree_to_stop(trainer)

    on_train_epoch_end = on_train_epoch_start

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save what no hook before has: the stop came from a later one, or in another way."""
        agree_to_stop(trainer)
        refused = trainer.fit_loop.total_batch_idx >= _done(trainer)  # a hook took no batch more
        ends = trainer.is_last_batch or _at_limit(trainer)
        # At the end it is saved already, unless the validation before has broken off.
        if trainer.should_stop or refused or self.save_at_end or not ends:
            self._ended = True
            self._save_once(trainer)
            self._ended = False

    def _save_once(self, trainer: Trainer) -> None:
        """Save the last whole rollout, unless that has been done since the run began to stop."""
        number = _done(trainer)
        newest, stopping = self._saved
        new = number > newest or (trainer.should_stop and not stopping)
        if number and new and not in_pieces(trainer) and not trainer.fast_dev_run:  # type: ignore[attr-defined]
            self._save(trainer)

    def on_save_checkpoint(self, trainer: Trainer, pl_module: Any, checkpoint: dict) -> None:
        """Give every checkpoint the same loop counters, whether validation ran before it or not.

        From "after validation" Lightning asks the new configuration whether a validation is due,
        and miscounts the logger's axis when it is not; from "end of training" it takes the epoch
        for complete. So the counters are always those of "batch end", one batch processed and not
        yet completed, from which a restart skips the validation.
        """
        if not self._saving:
            return
        self._leave_out(checkpoint["callbacks"])
        loops = checkpoint["loops"]["fit_loop"]
        progress, epochs = loops["epoch_loop.batch_progress"], loops["epoch_progress"]
        counted = self._ended and progress["total"]["completed"] == progress["total"]["started"]
        for scope in ("total", "current"):
            done = progress[scope]["started"]
            progress[scope] |= {"ready": done, "processed": done, "completed": done - 1}
            epoch = epochs[scope]["ready"] - 1
            epochs[scope] |= {"processed": epoch, "completed": epoch}
        if counted and not trainer.fit_loop._should_accumulate():
            loops["epoch_loop.state_dict"]["_batches_that_stepped"] -= 1
        checkpoint["epoch"] = epochs["current"]["processed"]
        checkpoint["rollouts"] = progress["total"]["ready"]
        early_stops.note(trainer, checkpoint["callbacks"])
        checkpoint["event_files"] = event_file_sizes(trainer)
        save_tables(trainer)
        self._marks = self._marks or collect(trainer, pl_module)
        checkpoint["fingerprints"] = self._marks

    def _leave_out(self, states: dict[str, Any]) -> None:
        """Take out the states of callbacks that could not be loaded: each would cost the file."""
        for key, state in [*states.items()]:
            if place := beyond_plain(state):
                del states[key]
                if key not in self._left_out:
                    rank_zero_warn(
                        f"{key.partition('{')[0]} begins anew when this run is continued: a "
                        f"checkpoint holds plain values and tensors, and in its state {place}"
                    )
                self._left_out.add(key)

    def state_dict(self) -> dict[str, Any]:
        if self.monitor is None:
            return {}
        return {"monitor": self.monitor, "mode": self.mode, "best": [list(b) for b in self._best]}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take the best figures back, unless they are of another figure."""
        if (state_dict.get("monitor"), state_dict.get("mode")) == (self.monitor, self.mode):
            self._best = [(value, number) for value, number in state_dict["best"]]

    def _is_due(self, trainer: Trainer) -> bool:
        if trainer.fast_dev_run:  # type: ignore[attr-defined]  # a rehearsal leaves no files
            return False
        ends = trainer.is_last_batch or _at_limit(trainer)
        if _stops(trainer) or (self.save_at_end and ends):
            return True
        return (trainer.fit_loop.total_batch_idx + 1) % self.every_n_rollouts == 0

    def _enters_best(self, value: float, number: int) -> bool:
        """Note a figure if it is among the best, and say whether it is."""
        if math.isnan(value):
            return False
        sign = -1 if self.mode == "max" else 1
        ranked = sorted([*self._best, (value, number)], key=lambda b: (sign * b[0], b[1]))
        self._best = ranked[: self.keep_best]
        return (value, number) in self._best

    def _save(self, trainer: Trainer) -> None:
        """Write; a ``FloatingPointError`` on every rank if the weights are not finite on any."""
        number = _done(trainer)
        path = Path(trainer.default_root_dir, FOLDER, _file_name(number))
        # A finite gradient may still end in a NaN: by a learning rate too large for the type, or by
        # an optimizer's own state. Weights that nothing can be made of must not be the newest file.
        broken = broken_weights(trainer.lightning_module.named_parameters())
        if not trainer.strategy.reduce_boolean_decision(not broken, all=True):
            written = list_checkpoints(trainer.default_root_dir)
            last = f"the last one is {written[-1]}" if written else "there is no earlier one"
            raise FloatingPointError(
                f"after {number} rollouts the weights are not finite ({', '.join(broken[:1])}), so "
                f"no checkpoint is written; {last}"
            )
        self._saving = True
        try:
            trainer.save_checkpoint(path, weights_only=False)  # False: optimizer state goes in, too
        finally:
            self._saving = False
        self._saved = number, trainer.should_stop
        best_number = self._best[0][1] if self._best else number
        self.best_model_path = str(path.with_name(_file_name(best_number)))
        if trainer.is_global_zero:
            self._write_best(path.parent)
            # Keep later files: a run that goes on from before a damaged file has some.
            written = list_checkpoints(trainer.default_root_dir)
            found = [file for file in written if (checkpoint_number(file) or 0) <= number]
            best = {_file_name(number) for _, number in self._best}
            for old in found[: -self.keep_last]:
                if old.name not in best:
                    remove(old)

    def _write_best(self, folder: Path) -> None:
        if self.monitor is None or not self._best:
            return
        kept = [{"file": _file_name(n), self.monitor: value} for value, n in self._best]
        text = yaml.safe_dump({"mode": self.mode, "kept": kept}, sort_keys=False)
        with replacing(folder / BEST, durable=True) as file:
            file.write(text.encode())

    def on_load_checkpoint(self, trainer: Trainer, pl_module: Any, checkpoint: dict) -> None:
        """Forget whether the saved rollout was the last: the run may have been made longer.

        Raises:
            ValueError: If the run would not be the same one, saying what has changed.
        """
        if "rollouts" not in checkpoint or not trainer.training:
            return  # written by another callback, or loaded for its weights
        self._marks = collect(trainer, pl_module)
        if not self.accept_changes:
            file = _file_name(checkpoint["rollouts"])
            refuse_changes(file, differences(checkpoint["fingerprints"], self._marks))
        self._resumed = True
        self._saved = checkpoint["rollouts"], True
        early_stops.keep_what_the_config_says(trainer, checkpoint["callbacks"])
        self._over = 0 <= trainer.max_steps <= checkpoint["global_step"]
        checkpoint["loops"]["fit_loop"]["epoch_loop.batch_progress"]["is_last_batch"] = False
        if trainer.is_global_zero:
            cut_event_files(trainer, checkpoint["event_files"], checkpoint["rollouts"])
            cut_tables(trainer, checkpoint["rollouts"])

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Remove what a kill in the middle of a save left behind.

        Raises:
            ValueError: If the run would begin anew in the folder of another one.
        """
        check_alike(checkpoint_mark(trainer.ckpt_path))  # known by now to a program's ranks, too
        if not trainer.fast_dev_run:  # type: ignore[attr-defined]
            _check_start(trainer)
        # Lift limits until training begins: Lightning would leave out the end of training, too,
        # with what callbacks do there, and the run may have been killed just before it.
        if self._over:
            self.lifted_max_steps, self._over = trainer.max_steps, False
            trainer.fit_loop.epoch_loop.max_steps = -1
        self._stops, trainer.should_stop = trainer.should_stop, False  # as of a Timer that is up
        folder = Path(trainer.default_root_dir, FOLDER)
        if trainer.is_global_zero and folder.is_dir():
            for path in folder.iterdir():
                if _TEMPORARY.fullmatch(path.name):
                    path.unlink(missing_ok=True)
            remove_unnamed(folder)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Settle what depends on the new configuration, which is known only now."""
        self._leave_out({c.state_key: c.state_dict() for c in trainer.callbacks})  # type: ignore[attr-defined]
        trainer.should_stop |= self._stops or bool(early_stops.reasons(trainer))
        agree_to_stop(trainer)
        if not self._resumed:
            return
        self._resumed = False
        if self.lifted_max_steps is not None:
            trainer.fit_loop.epoch_loop.max_steps = self.lifted_max_steps
            self.lifted_max_steps = None
        folder = Path(trainer.default_root_dir, FOLDER)
        # Forget best checkpoints that are not here: a run may go on in another folder.
        self._best = [best for best in self._best if (folder / _file_name(best[1])).exists()]
        if trainer.is_global_zero:
            self._write_best(folder)
        fit_loop = trainer.fit_loop
        progress = fit_loop.epoch_loop.batch_progress
        if progress.current.ready >= trainer.num_training_batches:
            # End the epoch here: Lightning would read its end from `is_last_batch`, which was true
            # for the old number of rollouts, and a longer run would stop at once.
            fit_loop.epoch_progress.increment_processed()
            fit_loop.epoch_progress.increment_completed()
            # Without this the next epoch counts as the rest of this one.
            fit_loop.reset_restart_stage()


def _file_name(number: int) -> str:
    return f"rollout={number:06d}.ckpt"


def broken_weights(named: Iterable[tuple[str, Tensor]]) -> list[str]:
    """Names of the trained tensors with a value that is not finite; of a sharded one the part here.

    One pass over each tensor, one wait for the device.

    >>> weight = torch.nn.Parameter(torch.tensor([1.0, torch.inf]))
    >>> broken_weights([("weight", weight)])
    ['weight']
    """
    trained = {name: tensor for name, tensor in named if tensor.requires_grad}
    here = {n: t.to_local() if hasattr(t, "to_local") else t for n, t in trained.items()}
    parts = {name: part.detach() for name, part in here.items() if part.numel()}
    if not parts:
        return []
    # ten times as fast as isfinite; both ends, as their difference could overflow by itself
    ends = [torch.stack(torch.aminmax(part)).float() for part in parts.values()]
    fine = torch.stack([pair.to(ends[0].device) for pair in ends]).isfinite().all(1).tolist()
    return [name for name, good in zip(parts, fine, strict=True) if not good]


def _check_start(trainer: Trainer) -> None:
    """Refuse to mix two runs: a command has looked already, but a program may not have."""
    root = trainer.default_root_dir
    continues = trainer.ckpt_path is not None or trainer.fit_loop.total_batch_idx >= 0
    if not continues and (started := numbered_files(root)):
        raise ValueError(
            f"{root} already holds a run (up to {started[-1].name}); continue it with "
            f"fit(..., ckpt_path={str(started[-1])!r}), or "
            "start in another folder with Trainer(default_root_dir=NEW)"
        )


def _done(trainer: Trainer) -> int:
    """Whole rollouts at a boundary; `total_batch_idx` counts one that a hook has refused, too."""
    return trainer.fit_loop.epoch_loop.batch_progress.total.started  # type: ignore[attr-defined]


def in_pieces(trainer: Trainer) -> bool:
    """Whether training has ended within a rollout: Lightning takes a StopIteration for an end."""
    progress = trainer.fit_loop.epoch_loop.batch_progress.total
    return progress.processed < progress.started  # type: ignore[attr-defined]


def _at_limit(trainer: Trainer) -> bool:
    return 0 <= trainer.max_steps <= trainer.global_step


def _stops(trainer: Trainer) -> bool:
    """Whether the run ends here by somebody's decision, which a minimum may put off."""
    return trainer.should_stop and trainer.fit_loop._can_stop_early


def _stopped_by_signal(trainer: Trainer) -> bool:
    callbacks = trainer.callbacks  # type: ignore[attr-defined]
    return any(isinstance(c, StopSignals) and c.stopping for c in callbacks)


def _validation_follows(trainer: Trainer) -> bool:
    # Do not wait for the validation that a stop brings: an uninterrupted run has none there, and
    # what callbacks make of it must stay out of the checkpoint.
    stopping, trainer.should_stop = trainer.should_stop, False
    # Call Lightning's private method: a copy of its rules would drift.
    fit_loop = trainer.fit_loop
    scheduled = fit_loop.epoch_loop._should_check_val_fx(fit_loop._data_fetcher)  # type: ignore[arg-type]
    trainer.should_stop = stopping
    if not scheduled:
        return False
    # Lightning skips a validation without batches, and with it the hook that would save.
    return sum(trainer.num_val_batches) > 0 or trainer.val_dataloaders is None
