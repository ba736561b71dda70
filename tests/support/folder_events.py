"""What can happen to a run folder in the middle of a run, as callbacks."""

import contextlib
import os
import shutil
from pathlib import Path

from lightning.pytorch import Callback

from gspo_lightning.checkpoint import places


class Happens(Callback):
    """Something happens once, after one rollout.

    Args:
        what: Name of a function below.
        rollout: After which one, counted from 1.
    """

    def __init__(self, what: str, rollout: int = 3):
        self.what, self.rollout = what, rollout

    def on_train_batch_end(self, trainer, *_):
        if trainer.fit_loop.total_batch_idx + 1 == self.rollout:
            globals()[self.what](Path(trainer.default_root_dir))


def wander(root):
    Path(root.parent, "elsewhere").mkdir()
    os.chdir(root.parent / "elsewhere")


def remove(root):
    shutil.rmtree(root)


def move(root):
    root.rename(root.with_name("moved"))


def replace(root):
    move(root)
    root.mkdir()


def lead_elsewhere(root):
    """The run folder is a link, which leads to another folder now."""
    root.unlink()
    root.with_name("other").mkdir()
    root.symlink_to("other")


def fill(root):
    """Take all the room of a small disk, and let each file end where a new block begins."""
    with (root / "log.txt").open("a") as log:
        log.write("." * (-(root / "log.txt").stat().st_size % 4096))
    with (root / "filler").open("wb", buffering=0) as file, contextlib.suppress(OSError):
        while True:
            file.write(bytes(4096))


class Impatient(Callback):
    """Does not wait for what another machine writes."""

    def __init__(self):
        places.TOKEN_SECONDS = 0
