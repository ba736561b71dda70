"""What a command knows of itself while it runs, and what it gives back at its end."""

from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

from gspo_lightning.checkpoint.signals import StopSignals
from gspo_lightning.run.lock import RunLock
from gspo_lightning.run.start_checks import check_interval
from gspo_lightning.run.terminal_log import TerminalLog


class Watch(Callback):
    """Knows whether work has begun, which decides how an error is shown, and how much was done."""

    def __init__(self) -> None:
        self.begun = False
        self.rollouts = 0
        self.root: Path | None = None  # the run folder, once training has begun
        self.refuse = lambda: None  # takes back what was written before the run began
        self.terminal = TerminalLog()
        self.lock = RunLock()
        self.signals = StopSignals()

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage == "fit":
            check_interval(trainer)

    def on_train_batch_start(self, trainer: Trainer, *_: Any) -> None:
        self.begun = True
        self.root = Path(trainer.default_root_dir)

    def on_train_batch_end(self, *_: Any) -> None:
        self.rollouts += 1

    def on_validation_batch_start(self, trainer: Trainer, *_: Any, **__: Any) -> None:
        self.begun = not trainer.sanity_checking or self.begun

    on_test_batch_start = on_validation_batch_start
    on_predict_batch_start = on_validation_batch_start
