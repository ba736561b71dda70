"""What happens around rollouts: the KL coefficient, curves, samples, export, predictions.

Decides when these callbacks act and what their files hold; every file lies in the run folder
(``trainer.default_root_dir``).

The module hands over, as ``outputs`` of ``on_train_batch_end``, a dict with ``rollout``, ``index``
(0-based), ``metrics`` by full name, ``lengths`` (B,) in tokens and ``ratios`` (B,).
"""

import contextlib
import gc
import json
import math
import os
import shutil
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal

import numpy
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import WeightAveraging

from gspo_lightning.bounds import check_at_least
from gspo_lightning.callbacks.card import dress
from gspo_lightning.callbacks.hub import check_hub, check_hub_name, push
from gspo_lightning.callbacks.loggers import log_picture, log_samples
from gspo_lightning.callbacks.report import draw_curves, figures, rounded, sample_rows
from gspo_lightning.checkpoint.event_files import goes_on_in_place
from gspo_lightning.checkpoint.io import CheckpointError, describe, replacing
from gspo_lightning.checkpoint.monitor import monitored
from gspo_lightning.checkpoint.places import check_name, check_place
from gspo_lightning.checkpoint.quoted import json_line
from gspo_lightning.curves import PICTURE, curve
from gspo_lightning.kl import KLRule, MultiplicativeKL

WEIGHTS = "model*.safetensors*"  # in one file, or in several with their index
ACCURACY, HELD_OUT = "val/accuracy_greedy", "val/reward"


def due(index: int, period: int | None) -> bool:
    """Whether the rollout with this 0-based index ends a period.

    >>> [due(index, 3) for index in range(6)]
    [False, False, True, False, False, True]
    """
    return period is not None and (index + 1) % period == 0


def is_rehearsal(trainer: Any) -> bool:
    """Whether nothing may be written: the folder may hold a run that is worth keeping."""
    return bool(getattr(trainer, "fast_dev_run", False))


def write_json_lines(file: Path, rows: list[dict[str, Any]]) -> None:
    """Append one line per row, in one write; not through a link, which may have come later."""
    lines = "".join(json_line(rounded(row)) for row in rows)

    def opened(path: str, flags: int) -> int:
        return os.open(path, flags | os.O_NOFOLLOW, 0o666)

    with open(file, "a", encoding="utf-8", newline="\n", opener=opened) as stream:
        stream.write(lines)


@contextlib.contextmanager
def freeing() -> Iterator[None]:
    """Free what was made inside, at its end.

    The parts of a figure refer to each other: such rings, 10 MB each, would stay until Python looks
    for rings everywhere, which is rare in a process with torch. Looking through the new objects
    alone takes 15 ms.
    """
    gc.freeze()
    try:
        yield
    finally:
        gc.collect()
        gc.unfreeze()


def check_free(trainer: Any, callback: Callback, path: str, folder: bool) -> None:
    """Raise ValueError if something else is, or will be, where a callback is going to write."""
    check_place(Path(trainer.default_root_dir), path, folder)
    others = [other for other in trainer.callbacks if other is not callback]
    taken = {getattr(other, name, None) for other in others for name in ("path", "best_path")}
    if any(isinstance(name, str) and Path(name) == Path(path) for name in taken):
        raise ValueError(f"path {path!r} is that of two callbacks; give each its own")


@contextlib.contextmanager
def averaged(trainer: Any, pl_module: Any) -> Iterator[None]:
    """Have the average of the weights in the module, where a callback keeps one.

    Validations judge the average, so it is what an export must hold, wherever that callback stands.
    """
    keepers = [c for c in trainer.callbacks if isinstance(c, WeightAveraging)]
    keepers = [keeper for keeper in keepers if keeper._average_model is not None]
    for keeper in keepers:
        keeper._swap_models(pl_module)
    try:
        yield
    finally:
        for keeper in reversed(keepers):
            keeper._swap_models(pl_module)


def export_whole(
    pl_module: Any, root: Path, path: str, dress: Callable[[Path], None] = lambda folder: None
) -> None:
    """Export beside the folder and move in file by file, so that no file of it is ever half a file.

    A link in the folder is replaced, not followed: its target may be a model that others use.

    Args:
        pl_module: Has ``export``.
        root: The run folder.
        path: Name of the folder inside it.
        dress: Puts what a model has beside its weights into the folder, on rank 0.

    Raises:
        CheckpointError: If the disk refuses, or the module writes nothing.
    """
    folder = root / path
    beside = folder.with_name(f".{folder.name}.partial")
    try:
        if pl_module.global_rank == 0:
            clear(beside)  # of an export that was killed
        pl_module.export(beside)  # on every rank: a sharded policy is gathered from all
        if pl_module.global_rank == 0:
            if all(file.is_dir() for file in beside.rglob("*")):
                raise CheckpointError(f"export {folder} was not written: the model wrote no file")
            dress(beside)
            written = [file for file in beside.rglob("*") if not file.is_dir()]
            for file in written:
                target = folder / file.relative_to(beside)
                target.parent.mkdir(parents=True, exist_ok=True)
                os.replace(file, target)
            if names := {file.name for file in written if file.match(WEIGHTS)}:
                for file in folder.glob(WEIGHTS):  # one of all weights would win over new ones
                    if file.name not in names:
                        file.unlink()
    except OSError as error:
        raise CheckpointError(
            f"export {folder} was not written: {describe(error, folder)}; the checkpoints written "
            "before are intact"
        ) from error
    finally:
        if pl_module.global_rank == 0:
            clear(beside)


def clear(folder: Path) -> None:
    """Remove a folder, or a link to one, if it is there and may be removed."""
    if os.path.islink(folder):
        folder.unlink()
    shutil.rmtree(folder, ignore_errors=True)


class AdaptiveKL(Callback):
    """Move the KL coefficient after each rollout, so that the KL divergence stays near a target.

    The one owner of the coefficient: no other code writes ``module.kl_coef``. The rule sees the KL
    divergence that the module reduced over all ranks, so every rank comes to the same number.

    Args:
        rule: How the next coefficient follows from the KL divergence.
        initial: Coefficient of the first rollout, > 0 (a product never leaves 0).
        warmup: Rollouts during which the coefficient may rise but not fall: KL starts at 0, and the
            rule would cut the coefficient before there is anything to measure.

    Raises:
        ValueError: If an argument is out of range, or the module has no reference policy.
    """

    def __init__(
        self,
        rule: KLRule = MultiplicativeKL(),  # noqa: B008 (immutable)
        initial: float = 0.2,
        warmup: int = 0,
    ) -> None:
        if not (initial > 0 and math.isfinite(initial)):
            raise ValueError(f"initial must be finite and > 0, got {initial}")
        check_at_least(0, warmup=warmup)
        self.rule, self.initial, self.warmup = rule, float(initial), warmup
        self.coef = self.initial
        self.rollouts_seen = 0

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Refuse what cannot work, before any model is loaded."""
        if stage != "fit":
            return
        if getattr(pl_module, "reference", None) is None:
            raise ValueError(
                "AdaptiveKL needs a reference policy to measure the KL divergence against: set "
                "model.reference, or remove AdaptiveKL from trainer.callbacks"
            )
        fixed = getattr(pl_module, "hparams", {}).get("kl_coef", 0.0)
        if fixed not in (0.0, self.initial):
            raise ValueError(
                f"model.kl_coef is {fixed}, and AdaptiveKL sets the coefficient, {self.initial} at "
                "first: for one that stays take AdaptiveKL out of trainer.callbacks (config base "
                "has none, the demos' have), else leave model.kl_coef at 0"
            )
        prompts = getattr(trainer.datamodule, "prompts_per_rollout", None)
        if prompts is not None:
            # A rule that cannot take rollouts of this size says so now, not after the first one.
            sequences = prompts * pl_module.sampler.group_size * trainer.world_size
            self.rule.next_coef(self.coef, math.nan, sequences)

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        pl_module.kl_coef = self.coef

    on_train_start = on_fit_start  # sharded strategies load the checkpoint between the two

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, *_: Any) -> None:
        # KL is absent where no token of the rollout trains, because all of them are truncated.
        observed = outputs["metrics"].get("train/kl_divergence", math.nan)
        sequences = outputs["rollout"].rewards.shape[0] * trainer.world_size
        coef = self.rule.next_coef(self.coef, observed, sequences)
        if self.rollouts_seen < self.warmup:
            coef = max(coef, self.coef)
        self.coef = float(coef)
        self.rollouts_seen += 1
        pl_module.kl_coef = self.coef

    def fingerprints(self) -> dict[str, Any]:
        """The rule, which is part of the mathematics: with another one it is another run."""
        marks = {**self.rule.marks(), "initial": self.initial, "warmup": self.warmup}
        return {f"AdaptiveKL.{name}": value for name, value in marks.items()}

    def state_dict(self) -> dict[str, Any]:
        return {"coef": self.coef, "rollouts_seen": self.rollouts_seen}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.coef, self.rollouts_seen = state_dict["coef"], state_dict["rollouts_seen"]


class CurvePlot(Callback):
    """Draw curves as one picture: a PNG in the run folder, an image in the logger.

    The points are part of the checkpoint, so a resumed run draws the whole run.

    Args:
        every_n_rollouts: Period in rollouts; the end of the run always draws.
        path: Name of the PNG inside the run folder.
        curves: Full names of the figures to draw, such as ``train/policy_loss``, each of which is
            a panel; ``None`` draws those that TensorBoard shows first. For another picture beside
            that one, put a second CurvePlot with a ``path`` of its own behind it.

    Raises:
        ValueError: If an argument is out of range, or there is no such figure.
    """

    def __init__(
        self,
        every_n_rollouts: int = 10,
        path: str = "curves.png",
        curves: list[str] | None = None,
    ) -> None:
        check_at_least(1, every_n_rollouts=every_n_rollouts)
        check_name(path)
        for name in curves or ():
            if curve(name) is None:
                raise ValueError(
                    f"curves: there is no figure {name!r}; docs/curves.md has them all"
                )
        self.every_n_rollouts, self.path = every_n_rollouts, path
        self.curves = None if curves is None else list(curves)
        names = (*PICTURE, HELD_OUT) if curves is None else curves
        self.points: dict[str, list[list[float]]] = {name: [] for name in names}

    @property
    def state_key(self) -> str:
        """Of this picture: a run may have several."""
        return "CurvePlot" if self.path == "curves.png" else f"CurvePlot {self.path}"

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Refuse a place that is taken, before any model is loaded."""
        if stage == "fit":
            check_free(trainer, self, self.path, folder=False)

    def on_train_batch_start(self, trainer: Any, pl_module: Any, *_: Any) -> None:
        # Up to the rollout before: by now its validation has come in.
        done = trainer.fit_loop.total_batch_idx
        if done and due(done - 1, self.every_n_rollouts):
            self._write(trainer, pl_module, done)

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, *_: Any) -> None:
        self._add(outputs["metrics"], outputs["index"], held_out=False)

    def on_validation_end(self, trainer: Any, pl_module: Any) -> None:
        if trainer.state.fn == "fit":
            self._add(trainer.callback_metrics, trainer.fit_loop.total_batch_idx, held_out=True)

    def _add(self, figures: Any, index: int, held_out: bool) -> None:
        for name, points in self.points.items():
            value = float(figures.get(name, math.nan))
            if name.startswith("val/") == held_out and math.isfinite(value):
                points.append([index, value])

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        self._write(trainer, pl_module, trainer.fit_loop.total_batch_idx + 1)

    def state_dict(self) -> dict[str, Any]:
        return {"points": {name: [list(p) for p in points] for name, points in self.points.items()}}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        saved = state_dict["points"]
        for name in self.points:  # checkpoints of earlier versions have the short names
            self.points[name] = saved.get(name, saved.get(name.removeprefix("train/"), []))

    def _write(self, trainer: Any, pl_module: Any, rollouts: int) -> None:
        if not trainer.is_global_zero or not any(self.points.values()) or is_rehearsal(trainer):
            return
        with freeing():
            self._draw(trainer, pl_module, rollouts)

    def _draw(self, trainer: Any, pl_module: Any, rollouts: int) -> None:
        rules = [c.rule for c in trainer.callbacks if isinstance(c, AdaptiveKL)]
        figure = draw_curves(
            self.panels(),
            kl_target=rules[0].target if rules else None,
            has_reference=getattr(pl_module, "reference", None) is not None,
        )
        file = Path(trainer.default_root_dir) / self.path
        file.parent.mkdir(parents=True, exist_ok=True)
        with replacing(file) as new:  # who watches the picture never sees half of it
            figure.savefig(new, format="png")
        pixels = numpy.asarray(figure.canvas.buffer_rgba())[..., :3]
        log_picture(trainer, Path(self.path).stem, pixels, rollouts)

    def panels(self) -> dict[str, list[list[float]]]:
        """What is drawn: the held-out reward stands in for an accuracy that nobody measures."""
        if self.curves is not None:
            return self.points
        lacking = not self.points[ACCURACY] and bool(self.points[HELD_OUT])
        names = [HELD_OUT if lacking and name == ACCURACY else name for name in PICTURE]
        return {name: self.points[name] for name in names}


class SampleTable(Callback):
    """Keep a few completions of each rollout, with their rewards, for reading.

    Those of the prompts whose rewards differ most, of each from the best to the worst: what the
    update learns from. That is no fair sample; the curves have the means. Rows of a group are
    neighbours. On resume the lines of rollouts that will run again are dropped, so the file equals
    that of a run that was never stopped; lines that were lost or damaged meanwhile are counted in
    a warning.

    Args:
        every_n_rollouts: Period of ``samples.jsonl``, in rollouts.
        num_samples: Completions per rollout.
        num_prompts: Prompts that they belong to.
        text_every_n_rollouts: Period of the table in the logger, in rollouts; ``None`` writes none.
    """

    def __init__(
        self,
        every_n_rollouts: int = 1,
        num_samples: int = 8,
        text_every_n_rollouts: int | None = 10,
        num_prompts: int = 4,
    ) -> None:
        check_at_least(
            1,
            every_n_rollouts=every_n_rollouts,
            num_samples=num_samples,
            num_prompts=num_prompts,
            text_every_n_rollouts=text_every_n_rollouts,
        )
        self.every_n_rollouts = every_n_rollouts
        self.num_samples, self.num_prompts = num_samples, num_prompts
        self.text_every_n_rollouts = text_every_n_rollouts
        self.lines = 0  # in the file, of this run

    @staticmethod
    def file(trainer: Any) -> Path:
        return Path(trainer.default_root_dir) / "samples.jsonl"

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        file = self.file(trainer)
        if not trainer.is_global_zero or is_rehearsal(trainer):
            return
        file.parent.mkdir(parents=True, exist_ok=True)
        done = trainer.fit_loop.total_batch_idx + 1
        written, self.lines, unreadable, from_0 = self.lines, 0, 0, False
        if file.exists():
            with file.open("rb") as old, replacing(file) as new:
                for line in old:
                    # A kill may have cut the last line off.
                    rollout = rollout_of(line) if line.endswith(b"\n") else done + 1
                    unreadable += rollout is None
                    from_0 = from_0 or rollout == 0  # an earlier version wrote the file
                    if rollout is not None and rollout + from_0 <= done:
                        new.write(renumbered(line) if from_0 else line)
                        self.lines += 1
        lost = max(0, written - self.lines) if done and goes_on_in_place(trainer) else 0
        if lost or unreadable:
            warnings.warn(
                f"{file}: {unreadable} lines could not be read and were left out; of the {written} "
                f"written up to rollout {done} {lost} are missing",
                stacklevel=2,
            )

    def state_dict(self) -> dict[str, Any]:
        return {"lines": self.lines}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.lines = state_dict["lines"]

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, *_: Any) -> None:
        index = outputs["index"]
        lines_due = due(index, self.every_n_rollouts)
        text_due = due(index, self.text_every_n_rollouts)
        if not trainer.is_global_zero or not (lines_due or text_due) or is_rehearsal(trainer):
            return
        tokenizer = pl_module.policy.tokenizer
        samples = sample_rows(outputs, tokenizer, self.num_samples, self.num_prompts)
        if lines_due:
            write_json_lines(self.file(trainer), samples)
            self.lines += len(samples)
        if text_due:
            log_samples(trainer, samples, index + 1)


def rollout_of(line: bytes) -> int | None:
    """The rollout that a line of samples is of, from 1; None if it is no such line.

    >>> rollout_of(b'{"rollout": 3}'), rollout_of(b"{}"), rollout_of(b"junk")
    (3, None, None)
    """
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        return None
    rollout = row.get("rollout") if isinstance(row, dict) else None
    return rollout if type(rollout) is int else None


def renumbered(line: bytes) -> bytes:
    """A line of samples that counts rollouts from 0, counting them from 1."""
    row = json.loads(line)
    return json_line(row | {"rollout": row["rollout"] + 1}).encode()


class HFExport(Callback):
    """Write the policy as a folder that ``AutoModelForCausalLM.from_pretrained`` loads.

    With it come a model card (``README.md``), the curves as the card shows them if a CurvePlot
    stands before it, and generation settings that sample as training did.

    Args:
        path: Name of the folder inside the run folder; it always holds the newest export.
        every_n_rollouts: Export during the run as well, with this period in rollouts.
        monitor: A validation figure, such as ``val/accuracy_sampled``: the policy with the best one
            is kept in ``best_path``. ``None`` keeps no best one. The evaluation before training
            does not count.
        mode: Whether the largest (``max``) or the smallest (``min``) figure is the best.
        best_path: Name of the folder of the best policy inside the run folder.
        push_to_hub: Repository on the Hugging Face hub, such as ``me/my-model``, that gets the
            export as training ends: the best one where ``monitor`` is set. A new repository is
            private. Needs a token (``hf auth login``), which is tried before training.

    Raises:
        ValueError: If an argument is out of range, the validation has no such figure, or the hub
            would refuse the push.
    """

    def __init__(
        self,
        path: str = "export",
        every_n_rollouts: int | None = None,
        monitor: str | None = None,
        mode: Literal["max", "min"] = "max",
        best_path: str = "export_best",
        push_to_hub: str | None = None,
    ) -> None:
        check_name(path)
        check_name(best_path)
        check_at_least(1, every_n_rollouts=every_n_rollouts)
        if mode not in ("max", "min"):
            raise ValueError(f"mode must be max or min, got {mode!r}")
        if monitor is not None and Path(path) == Path(best_path):
            raise ValueError(f"best_path must differ from path, got {path!r} for both")
        self.path, self.every_n_rollouts = path, every_n_rollouts
        self.monitor, self.mode, self.best_path = monitor, mode, best_path
        self.best: float | None = None
        self.push_to_hub = push_to_hub
        self.held_out: dict[str, Any] = {}  # figures before training and the newest, for the card
        if push_to_hub is not None:
            check_hub_name(push_to_hub)

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Refuse a place that is taken and a push that would fail, before any model is loaded."""
        for path in (self.path, self.best_path) if stage == "fit" else ():
            check_free(trainer, self, path, folder=True)
        pushes = self.push_to_hub is not None and stage == "fit" and not is_rehearsal(trainer)
        if pushes and trainer.is_global_zero:
            check_hub(str(self.push_to_hub))

    def _export(self, trainer: Any, pl_module: Any, path: str) -> None:
        plots = [c.path for c in trainer.callbacks if isinstance(c, CurvePlot)]
        root = Path(trainer.default_root_dir)

        def dressed(folder: Path) -> None:
            name = self.push_to_hub or path
            picture = root / plots[0] if plots else None
            dress(folder, trainer, pl_module, name=name, held_out=self.held_out, picture=picture)

        with averaged(trainer, pl_module):
            export_whole(pl_module, root, path, dressed)

    def on_validation_end(self, trainer: Any, pl_module: Any) -> None:
        if trainer.state.fn != "fit" or is_rehearsal(trainer):
            return
        found = figures(trainer.callback_metrics)
        if trainer.sanity_checking:
            self.held_out["before"] = found
        else:
            done = trainer.fit_loop.total_batch_idx + 1
            self.held_out |= {"after": found, "rollouts": done}
        if self.monitor is None:
            return
        value = monitored(self, trainer.callback_metrics)
        if trainer.sanity_checking or math.isnan(value):
            return
        sign = 1 if self.mode == "max" else -1
        if self.best is None or sign * value > sign * self.best:
            self.best = value
            self._export(trainer, pl_module, self.best_path)

    def state_dict(self) -> dict[str, Any]:
        best = {} if self.monitor is None else {"monitor": self.monitor, "best": self.best}
        return best | {"held_out": dict(self.held_out)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.held_out = dict(state_dict.get("held_out", {}))
        if state_dict.get("monitor") == self.monitor:  # another figure's best says nothing
            self.best = state_dict.get("best")

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, *_: Any) -> None:
        ends = due(trainer.fit_loop.total_batch_idx, self.every_n_rollouts)
        if ends and not is_rehearsal(trainer):
            self._export(trainer, pl_module, self.path)

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        if not is_rehearsal(trainer):
            self._export(trainer, pl_module, self.path)

    def on_fit_end(self, trainer: Any, pl_module: Any) -> None:
        """Push, behind all that other callbacks have yet to write: it may take long, or fail."""
        if self.push_to_hub is None or is_rehearsal(trainer) or not trainer.is_global_zero:
            return
        folder = Path(trainer.default_root_dir, self.best_path)
        if self.best is None or not folder.is_dir():  # of a run that began in another folder
            folder = Path(trainer.default_root_dir, self.path)
        done = trainer.fit_loop.total_batch_idx + 1
        if address := push(folder, self.push_to_hub, f"After {done} rollouts"):
            trainer.print(f"pushed    {folder} to {address}")


class PredictionWriter(Callback):
    """Write what ``predict`` returns as JSON lines, one prompt a line.

    Ranks other than 0 write files of their own, ``predictions.rank1.jsonl`` and so on. A plain
    callback: Lightning's prediction writer warns about every loader it cannot index.

    Args:
        path: Name of the file inside the run folder; a file of that name is replaced.
    """

    def __init__(self, path: str = "predictions.jsonl") -> None:
        check_name(path)
        self.path = path

    def file(self, trainer: Any) -> Path:
        file = Path(trainer.default_root_dir) / self.path
        rank = trainer.global_rank
        return file if rank == 0 else file.with_name(f"{file.stem}.rank{rank}{file.suffix}")

    def on_predict_start(self, trainer: Any, pl_module: Any) -> None:
        self.file(trainer).unlink(missing_ok=True)
        self.file(trainer).parent.mkdir(parents=True, exist_ok=True)

    def on_predict_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, *_: Any) -> None:
        write_json_lines(self.file(trainer), outputs)
