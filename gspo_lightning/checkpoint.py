"""Checkpoints at rollout boundaries: when to write, how to write, which one to continue from.

Decides the file names (`rollout=000040.ckpt`: the number of rollouts completed), the moment of
saving (after a rollout and after the validation that belongs to it) and the way onto the disk
(atomic). Leaves out what a checkpoint holds: each module, callback and loader has its own
`state_dict`, and random streams are functions of the rollout index, so none is stored.
"""

import os
import re
import zipfile
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins import CheckpointIO
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint

from gspo_lightning.event_files import cut_event_files, event_file_sizes

FOLDER = "checkpoints"  # inside the run folder
_NAME = re.compile(r"rollout=(\d+)\.ckpt")
_TEMPORARY = re.compile(r"\..+\.ckpt\.\d+\.tmp")


def checkpoint_number(path: str | Path) -> int | None:
    """Rollouts completed according to a checkpoint's name, None for a foreign name.

    >>> checkpoint_number("runs/a/checkpoints/rollout=000040.ckpt")
    40
    >>> checkpoint_number("last.ckpt") is None
    True
    """
    match = _NAME.fullmatch(Path(path).name)
    return int(match[1]) if match else None


def list_checkpoints(folder: str | Path) -> list[Path]:
    """Complete checkpoints of a run folder, oldest first; other and half-copied files are skipped.

    Args:
        folder: The run folder, the one that holds `checkpoints/`.

    Returns:
        Paths sorted by the number of rollouts completed.
    """
    numbered = [(checkpoint_number(path), path) for path in Path(folder, FOLDER).glob("*.ckpt")]
    # A file that was cut while somebody copied it has lost the index at its end: not a zip file.
    return [
        path
        for number, path in sorted((n, p) for n, p in numbered if n is not None)
        if zipfile.is_zipfile(path)
    ]


def find_checkpoint(folder: str | Path, choice: str | None) -> Path | None:
    """Turn the word given as `--ckpt_path` into a file.

    Args:
        folder: The run folder, the one that holds `checkpoints/`.
        choice: `last` (the newest), `auto` (the newest, or none), a path, or None.

    Returns:
        The checkpoint to load, None for a fresh start.

    Raises:
        ValueError: If there is no such checkpoint, with the way out.
    """
    if choice is None:
        return None
    if choice in ("best", "hpc", "registry"):
        raise ValueError(f"ckpt_path `{choice}` does not exist here: use last, auto or a path")
    if choice in ("last", "auto"):
        found = list_checkpoints(folder)
        if not found and choice == "last":
            raise ValueError(
                f"ckpt_path: no checkpoint in {Path(folder, FOLDER)}; leave --ckpt_path out for a "
                "fresh start, or name the run with --trainer.default_root_dir"
            )
        return found[-1] if found else None
    path = Path(choice)
    if not path.is_file():
        raise ValueError(f"ckpt_path: no file {choice}; use last, auto or an existing path")
    if not zipfile.is_zipfile(path):
        raise ValueError(f"ckpt_path: {choice} is not a complete checkpoint")
    return path


class AtomicCheckpointIO(CheckpointIO):
    """Write checkpoints so that a kill at any instant leaves the old file or the new one.

    Lightning's own writer goes through `$TMPDIR`, which may lie on another file system, where the
    final move is a copy and a kill truncates a good file; it does not fsync either.
    """

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None
    ) -> None:
        """Write to a temporary file beside `path`, force it to disk, rename it."""
        if storage_options is not None:
            raise TypeError("storage_options are for remote file systems: not supported")
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
        try:
            with temporary.open("wb") as file:
                torch.save(checkpoint, file)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)  # still there only when something above raised
        # The rename lives in the folder: without this a power cut may bring the old entry back.
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)

    def load_checkpoint(
        self, path: str | Path, map_location: Any = None, weights_only: bool | None = None
    ) -> dict[str, Any]:
        """Read plain values and tensors onto the CPU; a file that holds code is refused."""
        return torch.load(path, map_location=map_location or "cpu", weights_only=True)

    def remove_checkpoint(self, path: str | Path) -> None:
        """Delete one checkpoint, if it is still there."""
        Path(path).unlink(missing_ok=True)


class RolloutCheckpoint(Checkpoint):
    """Save every few rollouts, always at a rollout boundary, and continue from there exactly.

    A boundary is reached when a rollout's updates are done, every other callback has seen it, and
    the validation that is due after it is finished. One Lightning batch is one rollout; for
    modules that step on every batch (`SFTModule`) the unit is the batch.

    Args:
        every_n_rollouts: Save when the number of completed rollouts is a multiple of this.
        keep_last: Newest files to keep, at least 1.
        save_at_end: Also save after the last rollout of an epoch and when training is stopped.

    Raises:
        ValueError: If `every_n_rollouts` or `keep_last` is below 1.
    """

    def __init__(
        self, every_n_rollouts: int = 10, keep_last: int = 3, save_at_end: bool = True
    ) -> None:
        for name, value in (("every_n_rollouts", every_n_rollouts), ("keep_last", keep_last)):
            if value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        self.every_n_rollouts = every_n_rollouts
        self.keep_last = keep_last
        self.save_at_end = save_at_end
        self._awaits_validation = False
        self._saving = False
        self._resumed = False

    # ---- saving ---------------------------------------------------------------------------------

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Save now, or leave it to the validation that is about to run."""
        if not self._is_due(trainer):
            return
        self._awaits_validation = _validation_follows(trainer)
        if not self._awaits_validation:
            self._save(trainer)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save the boundary whose validation has just been completed."""
        if self._awaits_validation:
            self._awaits_validation = False
            self._save(trainer)

    def on_save_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Give every checkpoint the same loop counters, whether validation ran before it or not.

        Lightning restarts in different ways from "batch end" and from "after validation"; the
        second one asks the new configuration whether a validation is due and miscounts the logger's
        axis when it is not. So the counters are always those of "batch end": one batch processed
        and not yet counted as completed. That restart skips the validation, which has run.
        """
        if not self._saving:
            return
        progress = checkpoint["loops"]["fit_loop"]["epoch_loop.batch_progress"]
        for scope in ("total", "current"):
            progress[scope]["completed"] = progress[scope]["ready"] - 1
        checkpoint["rollouts"] = progress["total"]["ready"]
        checkpoint["event_files"] = event_file_sizes(trainer)

    def _is_due(self, trainer: Trainer) -> bool:
        if trainer.fast_dev_run:  # type: ignore[attr-defined]  # a rehearsal leaves no files
            return False
        if self.save_at_end and (
            trainer.is_last_batch
            or trainer.should_stop
            or 0 <= trainer.max_steps <= trainer.global_step
        ):
            return True
        return (trainer.fit_loop.total_batch_idx + 1) % self.every_n_rollouts == 0

    def _save(self, trainer: Trainer) -> None:
        number = trainer.fit_loop.total_batch_idx + 1
        path = Path(trainer.default_root_dir, FOLDER, f"rollout={number:06d}.ckpt")
        self._saving = True
        try:
            trainer.save_checkpoint(path, weights_only=False)  # False: optimizer state goes in, too
        finally:
            self._saving = False
        if trainer.is_global_zero:
            for old in list_checkpoints(trainer.default_root_dir)[: -self.keep_last]:
                old.unlink(missing_ok=True)

    # ---- continuing -----------------------------------------------------------------------------

    def on_load_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Forget whether the saved rollout was the last: the run may have been made longer."""
        if "rollouts" not in checkpoint or not trainer.training:
            return  # written by another callback, or loaded for its weights
        self._resumed = True
        checkpoint["loops"]["fit_loop"]["epoch_loop.batch_progress"]["is_last_batch"] = False
        if trainer.is_global_zero:
            cut_event_files(trainer, checkpoint["event_files"], checkpoint["rollouts"])

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Remove what a kill in the middle of a save left behind."""
        folder = Path(trainer.default_root_dir, FOLDER)
        if trainer.is_global_zero and folder.is_dir():
            for path in folder.iterdir():
                if _TEMPORARY.fullmatch(path.name):
                    path.unlink(missing_ok=True)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Settle what depends on the new configuration, which is known only now."""
        if not self._resumed:
            return
        self._resumed = False
        fit_loop = trainer.fit_loop
        progress = fit_loop.epoch_loop.batch_progress
        if progress.current.ready >= trainer.num_training_batches:
            # The epoch is over. Lightning would read that from `is_last_batch`, which was true for
            # the old number of rollouts; with it a longer run would stop at once.
            fit_loop.epoch_progress.increment_processed()
            fit_loop.epoch_progress.increment_completed()
            # Without this the next epoch counts as the rest of this one.
            fit_loop.reset_restart_stage()


def _validation_follows(trainer: Trainer) -> bool:
    # A stop brings a validation that an uninterrupted run would not have: not waited for, so that
    # what callbacks make of it stays out of the checkpoint.
    stopping, trainer.should_stop = trainer.should_stop, False
    # Private, but the one place where Lightning decides this; a copy of its rules would drift.
    fit_loop = trainer.fit_loop
    scheduled = fit_loop.epoch_loop._should_check_val_fx(fit_loop._data_fetcher)  # type: ignore[arg-type]
    trainer.should_stop = stopping
    if not scheduled:
        return False
    # Lightning skips a validation without batches, and with it the hook that would save.
    return sum(trainer.num_val_batches) > 0 or trainer.val_dataloaders is None
