"""What the terminal shows: the plan, a bar or lines while a run goes on, five lines at its end.

Decides wording and layout; plain text without colours. A bar on a terminal, one line per rollout
anywhere else.
"""

import math
import os
import sys
import time
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback
from lightning.pytorch.callbacks import ProgressBar
from tqdm import tqdm

from gspo_lightning.bounds import check_at_least
from gspo_lightning.callbacks import CurvePlot, HFExport, PredictionWriter, SampleTable, loggers
from gspo_lightning.callbacks.report import figures, figures_line, rollout_line
from gspo_lightning.checkpoint.files import list_checkpoints
from gspo_lightning.run import plan
from gspo_lightning.run.first_page import first_page
from gspo_lightning.run.terminal_log import say


def on_terminal() -> bool:
    """Whether standard output can redraw a line."""
    if not sys.stdout.isatty() or os.environ.get("TERM") == "dumb":
        return False
    try:
        return os.get_terminal_size(sys.stdout.fileno()).columns > 0  # 0 in some containers
    except OSError:  # the terminal is gone
        return False


class RolloutProgress(ProgressBar):
    """A bar over rollouts on a terminal; one line per rollout where lines cannot be redrawn.

    Modules without rollouts (a warm start) get the same bar, and a line every few batches.

    Args:
        every_n_steps: Batches between two lines of a module without rollouts.
    """

    def __init__(self, every_n_steps: int = 50) -> None:
        super().__init__()
        check_at_least(1, every_n_steps=every_n_steps)
        self.every_n_steps = every_n_steps
        self._enabled = True
        self._train_bar: tqdm | None = None
        self._other_bar: tqdm | None = None  # validation, test, predict

    def enable(self) -> None:
        self._enabled = True

    def disable(self) -> None:
        self._enabled = False

    def print(self, *args: Any, **_: Any) -> None:
        if self._enabled:
            say(" ".join(map(str, args)), sys.stdout)

    def _bar(self, what: str, total: float | None, done: int, stay: bool) -> tqdm | None:
        if not (self._enabled and on_terminal()):
            return None
        return tqdm(
            desc=what,
            total=None if total == math.inf else total,
            initial=done,
            leave=stay,
            dynamic_ncols=True,
            bar_format="{desc} {n_fmt}/{total_fmt} |{bar}| {elapsed}<{remaining}{postfix}",
            file=sys.stdout,
        )

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        done = trainer.fit_loop.total_batch_idx + 1
        self._train_bar = self._bar("training ", plan.total_batches(trainer), done, stay=True)

    def on_phase(self, name: str, index: int) -> None:
        """Show what the rollout is at: ``rollout``, ``score`` or ``optimise``."""
        if self._train_bar is not None:
            self._train_bar.set_description_str(f"{name:<9}")

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, *_: Any) -> None:
        is_rollout = isinstance(outputs, dict) and "rollout" in outputs
        metrics = outputs["metrics"] if is_rollout else trainer.callback_metrics
        done, total = trainer.fit_loop.total_batch_idx + 1, plan.total_batches(trainer)
        if self._train_bar is not None:  # a bar has no room for seconds
            metrics = {k: v for k, v in metrics.items() if k.startswith("train/") or "tokens" in k}
        loss = f"loss {float(metrics['train/loss']):.4f}" if "train/loss" in metrics else ""
        text = rollout_line(metrics) if is_rollout else loss
        if self._train_bar is not None:
            self._train_bar.set_postfix_str(text, refresh=False)
            self._train_bar.update(done - self._train_bar.n)
            self._train_bar.refresh()
        elif self._enabled and (is_rollout or done % self.every_n_steps == 0 or done == total):
            count = f"{done:>{len(str(total or 9999))}}" + (f"/{total}" if total else "")
            say(f"{'rollout' if is_rollout else 'step'} {count}  {text}", sys.stdout)

    def on_train_end(self, *_: Any) -> None:
        self.on_phase("trained", 0)
        self._close()

    def on_exception(self, *_: Any) -> None:
        self._close()  # a bar that is left open would have the message in its middle

    def _close(self) -> None:
        for bar in (self._other_bar, self._train_bar):
            if bar is not None:
                bar.close()
        self._train_bar = self._other_bar = None

    def _start(self, what: str, batches: Any) -> None:
        total = sum(batches) if isinstance(batches, list) else batches
        self._other_bar = self._bar(what, total, 0, stay=False)

    def _step(self, *_: Any) -> None:
        if self._other_bar is not None:
            self._other_bar.update()

    def _finish(self, text: str) -> None:
        if self._other_bar is not None:
            self._other_bar.close()
            self._other_bar = None
        if self._enabled:
            say(text, sys.stdout)

    @staticmethod
    def _evaluation_name(trainer: Any, pl_module: Any) -> str:
        if trainer.sanity_checking:
            return "evaluation before training"
        if trainer.state.fn != "fit":
            return "validation"
        unit = "rollouts" if hasattr(pl_module, "sampler") else "steps"
        return f"validation after {trainer.fit_loop.total_batch_idx + 1} {unit}"

    def on_validation_start(self, trainer: Any, pl_module: Any) -> None:
        first = trainer.sanity_checking
        batches = trainer.num_sanity_val_batches if first else trainer.num_val_batches
        self._start(self._evaluation_name(trainer, pl_module), batches)

    def on_validation_end(self, trainer: Any, pl_module: Any) -> None:
        line = figures_line(figures(trainer.callback_metrics))
        self._finish(f"{self._evaluation_name(trainer, pl_module)}: {line}")

    def on_test_start(self, trainer: Any, pl_module: Any) -> None:
        self._start("test", trainer.num_test_batches)

    def on_test_end(self, trainer: Any, pl_module: Any) -> None:
        self._finish("test: " + figures_line(figures(trainer.callback_metrics, "test")))

    def on_predict_start(self, trainer: Any, pl_module: Any) -> None:
        self._start("predict", trainer.num_predict_batches)

    def on_predict_end(self, trainer: Any, pl_module: Any) -> None:
        files = [c.file(trainer) for c in trainer.callbacks if isinstance(c, PredictionWriter)]
        advice = "not written; add gspo_lightning.PredictionWriter to trainer.callbacks"
        self._finish("predictions: " + (", ".join(map(str, files)) or advice))

    on_validation_batch_end = on_test_batch_end = on_predict_batch_end = _step  # type: ignore[assignment]


class RunSummary(Callback):
    """The plan before a run, and five lines at its end: what came of it and where it lies.

    The evaluation before training is Lightning's sanity check over the whole held-out set
    (``num_sanity_val_steps: -1``), kept in the checkpoint: a resumed run does not evaluate again
    before training.
    """

    def __init__(self) -> None:
        self.before: dict[str, float] = {}  # held out, before the first rollout
        self.after: dict[str, float] = {}  # held out, the newest
        self.after_batches = 0
        self.first: dict[str, float] = {}  # of the first batch, for runs without validation
        self.newest: dict[str, float] = {}
        self.seconds = 0.0  # in training, over all parts of the run
        self._started: float | None = None
        self._planned = False

    def state_dict(self) -> dict[str, Any]:
        names = ("before", "after", "after_batches", "first", "newest")
        return {name: getattr(self, name) for name in names} | {"seconds": self._elapsed()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.before, self.after = state_dict["before"], state_dict["after"]
        self.first, self.newest = state_dict["first"], state_dict["newest"]
        self.after_batches, self.seconds = state_dict["after_batches"], state_dict["seconds"]

    def _elapsed(self) -> float:
        running = 0.0 if self._started is None else time.monotonic() - self._started
        return self.seconds + running

    def _plan(self, trainer: Any, pl_module: Any) -> None:
        if not self._planned and trainer.is_global_zero:
            lines = plan.plan_lines(trainer, pl_module)
            say("\n".join(lines), sys.stdout)
            done = trainer.fit_loop.total_batch_idx + 1
            loggers.log_page(trainer, "run", first_page(trainer, pl_module, lines), done)
        self._planned = True

    on_sanity_check_start = _plan

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        self._plan(trainer, pl_module)  # without an evaluation before training, as on resume
        self._started = time.monotonic()

    def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
        found = {name: trainer.callback_metrics.get(f"train/{name}") for name in ("reward", "loss")}
        self.newest = {name: float(value) for name, value in found.items() if value is not None}
        self.first = self.first or self.newest

    def on_validation_end(self, trainer: Any, pl_module: Any) -> None:
        if trainer.sanity_checking:
            self.before = figures(trainer.callback_metrics)
        elif trainer.state.fn == "fit":
            self.after = figures(trainer.callback_metrics)
            self.after_batches = trainer.fit_loop.total_batch_idx + 1

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        self.seconds, self._started = self._elapsed(), None

    def on_fit_end(self, trainer: Any, pl_module: Any) -> None:
        if trainer.is_global_zero:
            say("\n".join(self.lines(trainer, pl_module)), sys.stdout)

    def lines(self, trainer: Any, pl_module: Any) -> list[str]:
        unit = "rollouts" if hasattr(pl_module, "sampler") else "steps"
        done = trainer.fit_loop.total_batch_idx + 1
        root = Path(trainer.default_root_dir)
        files = {
            "curves": [root / c.path for c in trainer.callbacks if isinstance(c, CurvePlot)],
            "samples": [c.file(trainer) for c in trainer.callbacks if isinstance(c, SampleTable)],
            "checkpoint": list_checkpoints(root)[-1:],
            "model": [root / c.path for c in trainer.callbacks if isinstance(c, HFExport)],
        }
        found = {name: f[0] for name, f in files.items() if f and f[0].exists()}
        curves = [str(found.pop("curves"))] if "curves" in found else []
        curves += loggers.places(trainer)
        if "checkpoint" in found:
            longer = plan.longer_run(trainer, done) if plan.reached(trainer) else {}
            command = plan.resume_command(sys.argv, longer, plan.this_python())
            go_on = f"{'extend' if longer else 'resume':<9} {command}"
        else:
            go_on = "resume    not possible: no checkpoint was written"
        return [
            f"result    {self._result(unit)}",
            f"time      {self.seconds:,.0f} s of training, {done:,} {unit}",
            f"curves    {', '.join(curves) or 'none'}",
            f"files     {', '.join(f'{name} {path}' for name, path in found.items()) or 'none'}",
            go_on,
        ]

    def _result(self, unit: str) -> str:
        before, after = self.before, self.after
        where = f"held out, after {self.after_batches:,} {unit}"
        if not after:
            before, after = self.first, self.newest
            where = f"training, first and last of the {unit}"
        names = [name for name in ("greedy", "sampled") if name in after] or after
        # A run that began without an evaluation has only the newest figure.
        starts = {name: f"{before[name]:.3f} -> " if name in before else "" for name in names}
        changes = (f"{name} {starts[name]}{after[name]:.3f}" for name in names)
        return f"{', '.join(changes)} ({where})"
