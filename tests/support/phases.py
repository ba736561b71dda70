"""What a crash test needs inside of a run: notes of where it is, and a death at a given moment.

`PHASE_LOG` names a file for the notes; `PHASE_KILL` is "PHASE:COUNT:SECONDS": the time after the
COUNTth beginning of that phase at which another process sends SIGKILL to this one, or
"bytes:COUNT:N": the COUNTth checkpoint is left with N bytes on the disk. `PHASE_FILL`, as
"PHASE:COUNT", fills the disk of the file `PHASE_FILLER`.
"""

import contextlib
import os
import signal
import time

from lightning.pytorch import Callback

from gspo_lightning.checkpoint import io as checkpoint_io
from gspo_lightning.checkpoint.io import AtomicCheckpointIO

_begun: dict[str, int] = {}
_current = ""


def begin(phase: str) -> None:
    """Note that a phase begins, and arrange for death if this is the one."""
    global _current
    if phase == _current:
        return
    _current = phase
    _begun[phase] = _begun.get(phase, 0) + 1
    with open(os.environ["PHASE_LOG"], "a") as file:
        file.write(phase + "\n")
    if os.environ.get("PHASE_FILL") == f"{phase}:{_begun[phase]}":
        _fill(os.environ["PHASE_FILLER"])
    wanted, count, seconds = os.environ.get("PHASE_KILL", "never:0:0").split(":")
    if (phase, _begun[phase]) == (wanted, int(count)):
        victim = os.getpid()
        if os.fork() == 0:
            time.sleep(float(seconds))
            os.kill(victim, signal.SIGKILL)
            os._exit(0)


def _fill(path: str) -> None:
    """Take all the room that is left."""
    with open(path, "wb", buffering=0) as file, contextlib.suppress(OSError):
        for size in (2**16, 1):
            with contextlib.suppress(OSError):
                while True:
                    file.write(bytes(size))


class Phases(Callback):
    """Tells the phases of a run."""

    def on_train_start(self, *_):
        begin("start")

    def on_train_batch_start(self, *_):
        begin("rollout")

    def on_before_optimizer_step(self, *_):
        begin("update")

    def on_train_batch_end(self, *_):
        begin("between")

    def on_validation_start(self, trainer, *_):
        begin("start" if trainer.sanity_checking else "validation")

    def on_validation_end(self, trainer, *_):
        begin("start" if trainer.sanity_checking else "between")

    def on_train_end(self, *_):
        begin("end")


class MarkedIO(AtomicCheckpointIO):
    """Tells when a checkpoint is being written."""

    def save_checkpoint(self, checkpoint, path, storage_options=None):
        begin("save")
        wanted, count, size = os.environ.get("PHASE_KILL", "never:0:0").split(":")
        if (wanted, int(count)) == ("bytes", _begun["save"]):
            _die_after(int(size))
        super().save_checkpoint(checkpoint, path, storage_options)
        begin("between")


def _die_after(size: int) -> None:
    pass_on = checkpoint_io._Sealed._pass
    left = size

    def stop(self, data):
        nonlocal left
        pass_on(self, memoryview(data)[:left])
        left -= len(data)
        if left < 0:
            self.file.flush()
            os.kill(os.getpid(), signal.SIGKILL)

    checkpoint_io._Sealed._pass = stop


def shortness(rows: list[dict], completions: list[str]) -> list[float | None]:
    """A second reward, so that sums over terms are resumed, too."""
    return [1 / (1 + len(text)) for text in completions]
