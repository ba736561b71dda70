"""A trace of one rollout: what runs when, on which thread and device.

Decides which rollout is traced and where the file lies. The ranges in it (``rollout``, ``score``
with ``reward``, ``old_logprobs`` and ``reference``, ``optimise``) are those whose seconds are
logged; a trace changes no number.
"""

import os
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback
from torch._C._profiler import _ExperimentalConfig
from torch.profiler import profile

from gspo_lightning.run.terminal_log import say

FOLDER = "profile"  # inside the run folder


class RolloutProfile(Callback):
    """Trace one rollout and its updates with torch's profiler.

    Every rank writes ``profile/rollout=000002.rank0.pt.trace.json.gz`` in the run folder.

    Args:
        rollout: Which one, counted from 1 where this process starts. The first one warms up.

    Raises:
        ValueError: If ``rollout`` is below 1.
    """

    def __init__(self, rollout: int = 2) -> None:
        if rollout < 1:
            raise ValueError(f"profile must be a rollout, 1 or later, got {rollout}")
        self.rollout = rollout
        self.begun = 0
        self._profile: profile | None = None

    def on_train_batch_start(self, *_: Any) -> None:
        self.begun += 1
        if self.begun != self.rollout:
            return
        # Frozen models run in threads of their own, which the profiler leaves out by default.
        threads = _ExperimentalConfig(profile_all_threads=True)
        os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # silences lines that say nothing to anyone
        self._profile = profile(experimental_config=threads)  # of all that torch can trace here
        self._profile.start()

    def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
        if self._profile is None:
            return
        self._profile.stop()
        number = trainer.fit_loop.total_batch_idx + 1
        name = f"rollout={number:06d}.rank{trainer.global_rank}.pt.trace.json.gz"
        path = Path(trainer.default_root_dir, FOLDER, name)
        path.parent.mkdir(parents=True, exist_ok=True)
        self._profile.export_chrome_trace(str(path))
        self._profile = None
        say(
            f"profile: rollout {number} is in {path} ({path.stat().st_size / 1e6:.1f} MB); open it "
            "at https://ui.perfetto.dev or in chrome://tracing"
        )

    def on_train_end(self, *_: Any) -> None:
        if self.begun < self.rollout:
            say(f"profile: no trace, the run ended before its rollout {self.rollout}")

    def on_exception(self, *_: Any) -> None:
        if self._profile is not None:  # tracing would go on in this process
            self._profile.stop()
            self._profile = None
