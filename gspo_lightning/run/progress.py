"""What the terminal shows: the plan, a bar and lines while a run goes on, what came of it.

Decides wording and layout: a bar with what matters first and a line now and then on a terminal, one
line per rollout anywhere else.
"""

import math
import shlex
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import yaml
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import ProgressBar
from tqdm import tqdm

from gspo_lightning.bounds import check_at_least
from gspo_lightning.callbacks import CurvePlot, HFExport, PredictionWriter, SampleTable, loggers
from gspo_lightning.callbacks.report import figure_texts, figures, rollout_figures
from gspo_lightning.checkpoint.files import BEST, FOLDER, list_checkpoints
from gspo_lightning.run import plan
from gspo_lightning.run.first_page import first_page
from gspo_lightning.run.terminal_log import lines_above_bars, say, say_beside
from gspo_lightning.start import layout
from gspo_lightning.start.typed import is_call, program

BAR_AND_TIMES = 20  # columns of a short bar, elapsed and remaining time
FREE = 3  # columns behind a bar, where a terminal shows the Ctrl-C that is typed


class RolloutProgress(ProgressBar):
    """A bar over rollouts on a terminal, and lines that stay; lines alone anywhere else.

    Modules without rollouts (a warm start) get the same bar, and a line every few batches.

    Args:
        every_n_steps: Batches between two lines of a module without rollouts, off a terminal.
        line_seconds: Least time between two lines of a terminal. Fast rollouts get one for
            several; the first and the last have theirs. Off a terminal every rollout has one.
    """

    def __init__(self, every_n_steps: int = 50, line_seconds: float = 5.0) -> None:
        super().__init__()
        check_at_least(1, every_n_steps=every_n_steps)
        check_at_least(0, line_seconds=line_seconds)
        self.every_n_steps, self.line_seconds = every_n_steps, line_seconds
        self._enabled = True
        self._train_bar: tqdm | None = None
        self._other_bar: tqdm | None = None  # validation, test, predict
        self._stream: Any = None  # what bars are drawn on
        self._above: ExitStack | None = None  # while there are bars
        self._phase = ""
        self._figures: list[str] = []  # beside the bar, most important first
        self._held_out: list[str] = []
        self._line: str | None = None  # of the newest rollout, not printed yet
        self._printed_at: float | None = None

    def enable(self) -> None:
        self._enabled = True

    def disable(self) -> None:
        self._enabled = False

    def print(self, *args: Any, **_: Any) -> None:
        if self._enabled:
            say(" ".join(map(str, args)), sys.stdout)

    def _bar(self, form: str, total: float | None, done: int, **options: Any) -> tqdm | None:
        if not (self._enabled and layout.on_terminal()):
            return None
        if self._above is None:
            self._stream, self._above = sys.stdout, lines_above_bars()
        return tqdm(
            total=None if total == math.inf else total,
            initial=done,
            ncols=layout.columns(self._stream) - FREE,
            bar_format=form,
            file=self._stream,
            **options,
        )

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        summaries = [c for c in trainer.callbacks if isinstance(c, RunSummary)]
        if summaries:  # a resumed run knows what it was last
            self._take_held_out(summaries[0].after or summaries[0].before)
        done = trainer.fit_loop.total_batch_idx + 1
        form = "{desc} |{bar}| {elapsed}<{remaining}"
        self._train_bar = self._bar(form, plan.total_batches(trainer), done)
        self._draw("training")

    def on_phase(self, name: str, index: int) -> None:
        """Show what the rollout is at: ``rollout``, ``score`` or ``optimise``."""
        self._draw(name)

    def _draw(self, phase: str | None = None, done: int | None = None) -> None:
        """Draw the bar with what is known, as far as it fits in a line."""
        bar = self._train_bar
        if bar is None:
            return
        self._phase = phase or self._phase
        done = bar.n if done is None else done
        count = f"{self._phase:<8} {done}" + (f"/{bar.total}" if bar.total else "")
        bar.ncols = layout.columns(self._stream) - FREE
        texts = layout.rows([count, *self._figures], bar.ncols - BAR_AND_TIMES)
        bar.set_description_str(texts[0], refresh=False)
        bar.update(done - bar.n)
        bar.refresh()

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, *_: Any) -> None:
        is_rollout = isinstance(outputs, dict) and "rollout" in outputs
        metrics = outputs["metrics"] if is_rollout else trainer.callback_metrics
        done, total = trainer.fit_loop.total_batch_idx + 1, plan.total_batches(trainer)
        loss = [f"loss {float(metrics['train/loss']):.4f}"] if "train/loss" in metrics else []
        texts = rollout_figures(metrics) if is_rollout else loss
        count = f"{done:>{len(str(total or 9999))}}" + (f"/{total}" if total else "")
        line = [f"{'rollout' if is_rollout else 'step'} {count}", *texts]
        if self._train_bar is None:
            if self._enabled and (is_rollout or done % self.every_n_steps == 0 or done == total):
                say("  ".join(line), sys.stdout)
            return
        # no room for seconds, nor for the columns that make lines stand below each other
        short = [" ".join(text.split()) for text in texts if not text.endswith(" s")]
        self._figures = [*short[:1], *self._held_out, *short[1:]]
        self._draw(done=done)
        self._line = layout.rows(line, layout.columns())[0]
        now = time.monotonic()
        if self._printed_at is None or now - self._printed_at >= self.line_seconds:
            self._printed_at = now
            self._print_line()

    def _print_line(self) -> None:
        if self._line is not None:
            say(self._line, sys.stdout)
        self._line = None

    def on_train_end(self, *_: Any) -> None:
        self._print_line()
        self._draw("trained")
        self._close()

    def on_exception(self, *_: Any) -> None:
        self._close()  # a bar that is left open would have the message in its middle

    def _close(self) -> None:
        self._close_other()
        if self._train_bar is not None:
            self._train_bar.close()
            self._train_bar = self._printed_at = None
        if self._above is not None:
            self._above.close()
            self._above = None

    def _close_other(self) -> None:
        if self._other_bar is not None:
            self._other_bar.close()
            self._other_bar = None
            if self._train_bar is None:
                self._close()

    def _start(self, what: str, batches: Any) -> None:
        total = sum(batches) if isinstance(batches, list) else batches
        form = "{desc} {n_fmt}/{total_fmt} |{bar}| {elapsed}<{remaining}"
        self._other_bar = self._bar(form, total, 0, desc=what, leave=False)

    def _step(self, *_: Any) -> None:
        if self._other_bar is not None:
            self._other_bar.update()

    def _finish(self, what: str, values: Mapping[str, float]) -> None:
        self._close_other()
        if self._enabled:
            say_beside(f"{what}: ", figure_texts(values), "  ")

    def _take_held_out(self, values: Mapping[str, float]) -> None:
        """Keep the first figure of an evaluation, an accuracy where there is one."""
        for name, value in [*values.items()][:1]:
            is_accuracy = name in ("greedy", "sampled") or name.startswith("pass@")
            self._held_out = [f"{name if is_accuracy else f'held-out {name}'} {value:.3f}"]

    @staticmethod
    def _evaluation_name(trainer: Any, pl_module: Any) -> str:
        if trainer.sanity_checking:
            return "evaluation before training"
        if trainer.state.fn != "fit":
            return "validation"
        done = trainer.fit_loop.total_batch_idx + 1
        return f"validation after {done} {plan.unit(pl_module)}"

    def on_validation_start(self, trainer: Any, pl_module: Any) -> None:
        first = trainer.sanity_checking
        if trainer.state.fn != "fit":
            self._say_weights(trainer, pl_module)
        batches = trainer.num_sanity_val_batches if first else trainer.num_val_batches
        self._start(self._evaluation_name(trainer, pl_module), batches)

    def on_validation_end(self, trainer: Any, pl_module: Any) -> None:
        values = figures(trainer.callback_metrics)
        self._take_held_out(values)
        self._finish(self._evaluation_name(trainer, pl_module), values)

    def on_test_start(self, trainer: Any, pl_module: Any) -> None:
        self._say_weights(trainer, pl_module)
        self._start("test", trainer.num_test_batches)

    def on_test_end(self, trainer: Any, pl_module: Any) -> None:
        self._finish("test", figures(trainer.callback_metrics, "test"))

    def on_predict_start(self, trainer: Any, pl_module: Any) -> None:
        self._say_weights(trainer, pl_module)
        self._start("predict", trainer.num_predict_batches)

    def on_predict_end(self, trainer: Any, pl_module: Any) -> None:
        files = [c.file(trainer) for c in trainer.callbacks if isinstance(c, PredictionWriter)]
        self._close_other()
        advice = "not written; add gspo_lightning.PredictionWriter to trainer.callbacks"
        if self._enabled:
            say("predictions: " + (", ".join(map(str, files)) or advice), sys.stdout)

    def _say_weights(self, trainer: Any, pl_module: Any) -> None:
        if self._enabled:
            say(f"weights: {plan.weights_in_use(trainer, pl_module)}", sys.stdout)

    on_validation_batch_end = on_test_batch_end = on_predict_batch_end = _step  # type: ignore[assignment]


class RunSummary(Callback):
    """The plan before a run, and a few lines at its end: what came of it and where it lies.

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
            for line in lines:
                say_beside(line[:10], line[10:].split(" "))
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
        if not trainer.is_global_zero:
            return
        for name, text in self.lines(trainer, pl_module).items():
            command = " --ckpt_path " in text
            parts = map(shlex.quote, shlex.split(text)) if command else text.split(" ")
            say_beside(f"{name:<9} ", parts, end=" \\" if command else "")

    def lines(self, trainer: Any, pl_module: Any) -> dict[str, str]:
        """What came of the run, what it wrote and how to look at that, and how it goes on."""
        done = trainer.fit_loop.total_batch_idx + 1
        root = Path(trainer.default_root_dir)
        result = self._result(plan.unit(pl_module))
        seconds = f"{self.seconds:,.0f} s of training, {done:,} {plan.unit(pl_module)}"
        lines = {"result": result, "time": seconds} | written(trainer, root)
        if not list_checkpoints(root):
            return lines | {"resume": "not possible: no checkpoint was written"}
        longer = plan.longer_run(trainer) if plan.reached(trainer) else {}
        if sys.argv[1:2] == ["fit"] or is_call():
            go_on = plan.resume_command(sys.argv[1:], longer)
        else:  # a program of the user's
            raised = [f"{key.removeprefix('--')} = {value}" for key, value in longer.items()]
            call = f"fit(..., ckpt_path={str(list_checkpoints(root)[-1])!r})"
            go_on = ", ".join([*raised, call])
        return lines | {"extend" if longer else "resume": go_on}

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


def written(trainer: Any, root: Path) -> dict[str, str]:
    """What a run has written, by name, each with the command that shows it, where there is one."""
    look, folder = program(alone=True), shlex.quote(str(root))
    curves = [root / c.path for c in trainer.callbacks if isinstance(c, CurvePlot)]
    samples = [c.file(trainer) for c in trainer.callbacks if isinstance(c, SampleTable)]
    exports = [c for c in trainer.callbacks if isinstance(c, HFExport)]
    files = {
        "curves": [*filter(Path.exists, curves), *loggers.places(trainer)],
        "samples": there(samples, f"{look} samples {folder}"),
        "model": there([root / c.path for c in exports], f"{look} chat {folder}"),
        "best": there([root / c.best_path for c in exports]) + best_checkpoint(root),
        "saved": list_checkpoints(root)[-1:],
        "log": there([root / "log.txt"]),
    }
    return {name: ", ".join(map(str, found)) for name, found in files.items() if found}


def there(paths: Sequence[Path], command: str | None = None) -> list[Any]:
    """Those of the paths that exist, and behind them how they are looked at."""
    found: list[Any] = [path for path in paths if path.exists()]
    return [*found, command] if found and command else found


def best_checkpoint(root: Path) -> list[str]:
    """The best checkpoint with the figure that says so, if a run keeps one."""
    try:
        text = (root / FOLDER / BEST).read_text(encoding="utf-8")
        (name, file), *values = yaml.safe_load(text)["kept"][0].items()
    except (OSError, ValueError, TypeError, LookupError, AttributeError, yaml.YAMLError):
        return []
    path = root / FOLDER / str(file)
    figure = ", ".join(f"{key} {value:.4g}" for key, value in values)
    return [f"{path} ({figure})"] if name == "file" and path.exists() else []
