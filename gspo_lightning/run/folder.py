"""The folder of a run: one run in each, with the config and the code it was made with.

Decides when a folder is refused and what is written beside the checkpoints.
"""

import itertools
import os
import shutil
import tempfile
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import yaml
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.cli import SaveConfigCallback
from lightning.pytorch.utilities import rank_zero_only

from gspo_lightning.checkpoint.event_files import mark_event_files, own_event_files
from gspo_lightning.checkpoint.files import checkpoint_number, list_checkpoints, numbered_files
from gspo_lightning.checkpoint.fingerprints import flat, settings
from gspo_lightning.checkpoint.io import damage, replacing
from gspo_lightning.checkpoint.places import ELSEWHERE, EVENTS, FILES, KEY, check_kinds
from gspo_lightning.run.provenance import write_provenance
from gspo_lightning.run.terminal_log import TerminalLog, say

CONFIG = "config.yaml"
LOG = "log.txt"
FINISHED = "finished"  # only where no checkpoint says so
FRESH = ("versions.yaml", "uncommitted.diff", "source", "samples.jsonl", "curves.png")
LONGEST_CHANGE = 120  # characters; whole lists of callbacks are longer


class RunConfig(SaveConfigCallback):
    """Saves what a run was started with, and beside it what each continuation was started with.

    Args:
        args: What Lightning gives its own callback, as are ``kwargs``.
        checkpoint: Where the run goes on, if it does.
        terminal: Copies the terminal into the run folder, if given.
        leftovers: Files of an earlier run that ended without a checkpoint; they are moved aside.
        command: The command line, for the log.
    """

    def __init__(
        self,
        *args: Any,
        checkpoint: Path | None = None,
        terminal: TerminalLog | None = None,
        leftovers: Sequence[Path] = (),
        command: Sequence[str] = (),
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        self.checkpoint, self.terminal = checkpoint, terminal
        self.leftovers, self.command = leftovers, command
        self.mark = ""  # in the names of the files of a continuation

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Write nothing yet: a run that cannot start should leave no trace."""

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write the files of a run that begins, and its log."""
        if not trainer.is_global_zero:
            return
        folder = Path(trainer.default_root_dir)
        folder.mkdir(parents=True, exist_ok=True)
        if self.checkpoint is None:
            move_leftovers(folder, self.leftovers)
        if self.terminal is not None:
            self.terminal.open(folder / LOG, self.command)
        if self.checkpoint is not None and (folder / CONFIG).exists():
            number = checkpoint_number(self.checkpoint)
            self.mark = f"resume-{self.checkpoint.stem if number is None else f'{number:06d}'}"
        mark_event_files(trainer)
        if not self.mark:
            self._write(folder / CONFIG)
            write_provenance(folder, "")

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write those of a continuation, unless nothing is left to do; say what is new in them."""
        if not (trainer.is_global_zero and self.mark):
            return
        folder = Path(trainer.default_root_dir)
        first, path = folder / CONFIG, folder / f"config.{self.mark}.yaml"
        self._write(path)
        if write_provenance(folder, self.mark):
            file = folder / f"versions.{self.mark}.yaml"
            say(f"the code or a version changed since {first}: see {file}")
        new, old = flat(yaml.safe_load(self.text)), settings_in(first)
        if old is None:
            say(f"{first} is damaged: what has changed since cannot be said; see {path}")
            return
        for key in sorted(old.keys() | new.keys()):
            if old.get(key) != new.get(key) and key != "ckpt_path":
                change = f"{key} {old.get(key)} -> {new.get(key)}"
                shown = change if len(change) <= LONGEST_CHANGE else f"{key}, see {path}"
                say(f"changed since {first}: {shown}")

    def _write(self, path: Path) -> None:
        """Write the config, first of all: it is what tells a run's folder from others."""
        with replacing(path) as file:
            file.write(self.text.encode())

    def fingerprints(self) -> dict[str, Any]:
        """The settings that make this run the one it is."""
        return settings(self.flat_config())

    def flat_config(self) -> dict[str, Any]:
        """All settings of the command, keys joined by dots."""
        return flat(yaml.safe_load(self.text))

    @cached_property
    def text(self) -> str:
        """All settings, as YAML."""
        config = self.config.clone()
        config.pop("accept_changes", None)  # given once: in the file it would hold for ever
        return self.parser.dump(config, skip_unset=False)


def check_folder(root: Path, checkpoint: Path | None) -> None:
    """Raise ValueError where a run would mix with another one in the same folder."""
    check_kinds(root)
    started = numbered_files(root)  # a damaged one, too, is of a run
    if checkpoint is None and started:
        held = f"{root} already holds a run (up to {started[-1].name})"
        done, length = checkpoint_number(started[-1]) or 0, planned_length(root)
        if length is not None and done >= length:  # continued as it is, it would end at once
            longer = f"--ckpt_path last --data.num_rollouts {2 * done}"
            raise ValueError(f"{held}, which has its length; go on with {longer}, or {ELSEWHERE}")
        raise ValueError(f"{held}; continue it with --ckpt_path last, or {ELSEWHERE}")
    if (root / FINISHED).exists():
        raise ValueError(
            f"{root} holds a finished run without checkpoints; {ELSEWHERE}, or remove "
            f"{root / FINISHED} to start again here"
        )
    number = None if checkpoint is None else checkpoint_number(checkpoint)
    found = list_checkpoints(root)
    later = [path for path in found if number is None or (checkpoint_number(path) or 0) > number]
    whole = [path for path in later if damage(path) is None]  # damaged ones will be written again
    if checkpoint is not None and whole and checkpoint.resolve() != whole[-1].resolve():
        raise ValueError(
            f"{root} holds later checkpoints than {checkpoint} (up to {whole[-1].name}); "
            f"continue with --ckpt_path last, or {ELSEWHERE}"
        )
    if started:
        return
    file = root / CONFIG
    content = file.read_bytes() if file.exists() else b""  # empty: what a power cut leaves
    foreign = [file] if content and not content.startswith(b"# lightning.pytorch==") else []
    if not file.exists():
        foreign = [root / name for name in FRESH if os.path.lexists(root / name)]
    if foreign:
        raise ValueError(f"{foreign[0]} was not written by a run and would be lost; {ELSEWHERE}")


def newest_config(root: Path) -> Path:
    """The config with which the run in a folder was last continued, or started."""
    return max(root.glob("config.resume-*.yaml"), default=root / CONFIG)


def planned_length(root: Path) -> int | None:
    """Rollouts of the run in a folder, as it was last continued; None if its config tells none."""
    found = settings_in(newest_config(root)) or {}
    length = found.get("data.init_args.num_rollouts")
    return length if type(length) is int and found.get("trainer.max_epochs") == 1 else None


@rank_zero_only
def check_writable(root: Path) -> None:
    """Raise ValueError if no file can be made in the run folder; leaves nothing behind."""
    missing = [folder for folder in (root, *root.parents) if not folder.exists()]
    try:
        root.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=root):
            pass
    except OSError as error:
        raise ValueError(f"{KEY}: cannot write in {root}: {error.strerror}; {ELSEWHERE}") from error
    finally:
        for folder in missing:  # the innermost first
            if folder.is_dir():
                folder.rmdir()


def find_leftovers(root: Path) -> list[Path]:
    """The logs, beside a config that a run wrote, of a run that ended without a checkpoint."""
    if not (root / CONFIG).exists():
        return []
    named = [root / name for name in ("samples.jsonl", "curves.png", LOG)]
    return [*own_event_files(root), *(file for file in named if file.exists())]


def move_leftovers(root: Path, files: Sequence[Path]) -> None:
    """Move aside what :func:`find_leftovers` found, and say so; it may have been long."""
    if not files:
        return
    number = next(n for n in itertools.count(1) if not (root / f"earlier-{n}").exists())
    folder = root / f"earlier-{number}"
    folder.mkdir()
    for file in files:
        os.replace(file, folder / file.name)
    say(f"moved the logs of a run that ended without a checkpoint to {folder}")


@rank_zero_only
def mark_finished(root: Path) -> None:
    """Leave a mark in the folder of a run that has ended and has no checkpoint to show for it."""
    if not numbered_files(root):
        text = "This run has ended, without a checkpoint. Another one is not started over it.\n"
        (root / FINISHED).write_text(text)


@rank_zero_only
def remove_traces(root: Path, present: set[Path]) -> None:
    """Take back what a run wrote into ``root`` that was refused; what was ``present`` stays.

    Lightning opens the curves before anything is checked.
    """
    for pattern in (*FILES, EVENTS, "source", "source.resume-*"):
        for path in set(root.glob(pattern)) - present:
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    if root.is_dir() and not any(root.iterdir()):
        root.rmdir()


def settings_in(file: Path) -> dict[str, Any] | None:
    """The settings in a config, keys joined by dots; None if it cannot be read."""
    try:
        tree = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError, yaml.YAMLError):
        return None
    return flat(tree) if isinstance(tree, dict) else None
