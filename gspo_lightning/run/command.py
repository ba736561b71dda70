"""The command line: Lightning's four commands, ``doctor`` and ``replay``.

Decides which commands and options there are, what is refused before anything is loaded, and which
callbacks, plugins and loggers a run has that its config does not name.
"""

import itertools
import json
import os
import shlex
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from pkgutil import resolve_name
from typing import Any

from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer
from lightning.pytorch.callbacks import ProgressBar
from lightning.pytorch.cli import LightningCLI
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.plugins import CheckpointIO

import gspo_lightning
from gspo_lightning.callbacks import AdaptiveKL, PredictionWriter
from gspo_lightning.checkpoint import RolloutCheckpoint
from gspo_lightning.checkpoint.files import find_checkpoint, list_checkpoints
from gspo_lightning.checkpoint.io import AtomicCheckpointIO, CheckpointError, damage
from gspo_lightning.checkpoint.places import local_folder
from gspo_lightning.checkpoint.rollout_checkpoint import in_pieces
from gspo_lightning.checkpoint.signals import StopSignals, forbid_requeueing
from gspo_lightning.checkpoint.tables import open_tables
from gspo_lightning.guards.ignored import check_strategy, check_training
from gspo_lightning.run import (
    config_files,
    early,
    ending,
    folder,
    launch,
    lock,
    memory,
    one_line,
    progress,
    start_checks,
)
from gspo_lightning.run.plan import longer_run, resume_command, total_batches
from gspo_lightning.run.terminal_log import TerminalLog, begin_here, say, working_folder
from gspo_lightning.run.tracing import RolloutProfile
from gspo_lightning.start import shipped, short, typed

config_files.keep_texts()
config_files.keep_choices()
# A tool stands above the command line, which knows its name and imports it when it is asked for.
TOOLS = {
    "doctor": "gspo_lightning.doctor.examine:main",
    "replay": "gspo_lightning.doctor.replay:main",
}


class Watch(Callback):
    """Knows whether work has begun, which decides how an error is shown, and how much was done."""

    def __init__(self) -> None:
        self.begun = False
        self.rollouts = 0
        self.root: Path | None = None  # the run folder, once training has begun
        self.refuse = lambda: None  # takes back what was written before the run began
        self.terminal = TerminalLog()
        self.lock = lock.RunLock()
        self.signals = StopSignals()

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage == "fit":
            start_checks.check_interval(trainer)

    def before_loading(self, trainer: Trainer, module: LightningModule) -> None:
        if getattr(trainer, "instead_of_training", None) is None:  # the doctor says it itself
            memory.say_before_loading(trainer, module)

    def on_train_batch_start(self, trainer: Trainer, *_: Any) -> None:
        self.begun = True
        self.root = Path(trainer.default_root_dir)

    def on_train_batch_end(self, *_: Any) -> None:
        self.rollouts += 1
        self.check_folder()

    def check_folder(self, *_: Any) -> None:
        """End the run if its folder is gone, before a callback makes another one in its place."""
        if lost := self.lock.lost():
            raise CheckpointError(lost)

    on_train_end = on_validation_end = check_folder  # type: ignore[assignment]

    def on_validation_batch_start(self, trainer: Trainer, *_: Any, **__: Any) -> None:
        self.begun = not trainer.sanity_checking or self.begun

    on_test_batch_start = on_validation_batch_start
    on_predict_batch_start = on_validation_batch_start


class CommandTrainer(Trainer):
    """A Trainer that can also examine what it would train."""

    instead_of_training: Callable[[], None] | None = None  # what `fit` does, once all is set up
    stopped_by: str | None = None  # the function that first asked for a stop
    _stops = False

    @property
    def should_stop(self) -> bool:
        """Whether training is to end at the next boundary; remembers who set it."""
        return self._stops

    @should_stop.setter
    def should_stop(self, value: bool) -> None:
        if value and self.stopped_by is None:
            self.stopped_by = sys._getframe(1).f_code.co_qualname
        self._stops = value

    def doctor(
        self,
        model: Any,
        datamodule: Any,
        num_prompts: int | None = None,
        max_new_tokens: int | None = None,
        thorough: bool = False,
        json: bool = False,
    ) -> int:
        """Examine a config in seconds, without training: each line ok, warning or error.

        Args:
            model: A GSPOModule.
            datamodule: Its PromptData.
            num_prompts: Prompts to complete, each twice group_size times; 4, or 2 where a model is
                slow.
            max_new_tokens: Longest completion, in tokens, to save time; never above the sampler's.
                256, or what a CPU samples in a quarter of a minute.
            thorough: Whether to look at as much of a slow model as of a fast one, in minutes.
            json: Whether to print a JSON list instead of lines.

        Returns:
            Exit code: 1 after an error that was found, else 0.
        """
        tool = resolve_name(TOOLS["doctor"])
        return tool(self, model, datamodule, num_prompts, max_new_tokens, thorough, json)

    def _run_stage(self) -> Any:
        # Override a private method: nothing public runs after all setup and before training.
        return (self.instead_of_training or super()._run_stage)()


class GSPOCLI(LightningCLI):
    """Lightning's commands and `doctor`, with this project's run folder and checkpoints."""

    kind_of_parser = one_line.OneLineParser

    def __init__(self, argv: list[str], watch: Watch) -> None:
        self.code = 0  # exit code of a command that ran to its end
        self.watch = watch
        self.argv = argv
        self.checkpoint: Path | None = None
        self.root = Path()
        self.rehearsal = False  # `fast_dev_run`: leaves no files
        self.traces: list[Callback] = []
        import_classes()
        super().__init__(
            LightningModule,
            LightningDataModule,
            subclass_mode_model=True,
            subclass_mode_data=True,
            auto_configure_optimizers=False,
            trainer_class=CommandTrainer,
            parser_class=self.kind_of_parser,
            save_config_callback=folder.RunConfig,
            seed_everything_default=0,  # True would draw another seed on continuing
            trainer_defaults={
                "default_root_dir": "runs/default",
                "max_epochs": 1,  # data.num_rollouts is the length of a run
                "log_every_n_steps": 1,  # counted in rollouts
                "use_distributed_sampler": False,  # the data shares prompts among ranks itself
                "enable_model_summary": False,  # the plan tells more
            },
            args=argv,
        )

    def subcommands(self) -> dict[str, set[str]]:  # type: ignore[override]
        """Lightning's four, without options that would do nothing here, and the doctor.

        Of them the one that is asked for: the parsers of the others would take most of the time.
        """
        four = {name: skip | {"weights_only"} for name, skip in LightningCLI.subcommands().items()}
        known = four | {"doctor": {"model", "datamodule", "json", "thorough"}}
        return {name: skip for name, skip in known.items() if [name] == self.argv[:1]} or known

    def add_arguments_to_parser(self, parser: Any) -> None:
        parser.add_argument(
            "--profile",
            type=int | None,
            nargs="?",
            const=2,
            help="fit: write a trace of this rollout, counted from the start of the command, into "
            "the run folder (without a number: of the second)",
        )

        parser.add_argument(
            "--rank_timeout",
            type=float | None,
            help="seconds that a rank waits for the others, at the start and in training, before "
            "the run ends; null leaves the strategy's own 30 minutes",
        )

    def _prepare_subcommand_parser(self, klass: Any, subcommand: str, **kwargs: Any) -> Any:
        parser = super()._prepare_subcommand_parser(klass, subcommand, **kwargs)
        parser.epilog = short.help_text()
        if subcommand == "fit":
            parser.add_argument(
                "--accept_changes",
                type=bool,
                default=False,
                help="Continue although settings, data or models are not those of the checkpoint.",
            )
        if subcommand == "doctor":  # a flag: an argument of the method would want a value
            text = "Print a JSON list instead of lines."
            parser.add_argument("--json", action="store_true", help=text)
            text = "Look at as much of a slow model as of a fast one, which takes minutes."
            parser.add_argument("--thorough", action="store_true", help=text)
            text = "Null, as it stands in the config.yaml of a run: no checkpoint is examined."
            parser.add_argument("--ckpt_path", type=str | None, help=text)
        return parser

    def parse_arguments(self, parser: Any, args: Any) -> None:
        """Parse; Lightning's version warns when a program passes arguments, as tests do."""
        args, notes = shipped.with_paths(short.written_out(args))
        for note in notes:
            say(note)
        for path in shipped.config_names(args):
            config_files.check_config_file(path)
        try:
            self.config = parser.parse_args(config_files.nested_nulls(args))
        except (TypeError, AttributeError, LookupError, AssertionError, RecursionError) as error:
            # The parser broke on what it was given: whatever is raised there is about a setting.
            raise ValueError(f"config: cannot be read: {type(error).__name__}: {error}") from error

    def _set_seed(self) -> None:
        """Refuse what numpy would, with the name of the key."""
        start_checks.check_seed(self._get(self.config, "seed_everything"))
        super()._set_seed()

    def _parse_ckpt_path(self) -> None:
        """Leave the config alone: what a checkpoint holds must not win over it."""

    def before_instantiate_classes(self) -> None:
        """Refuse what cannot work before anything is loaded."""
        config = self.config[self.subcommand]
        if config.trainer.default_root_dir is None:
            raise ValueError("trainer.default_root_dir is null; give a folder, such as runs/mine")
        self.root = local_folder(config.trainer.default_root_dir)
        self.rehearsal = bool(config.trainer.fast_dev_run)
        if ours := shipped.data_in(json.dumps(config.as_dict(), default=str)):
            say(f"{', '.join(ours)}: not here, so taken from the package ({shipped.DATA})")
        if self.subcommand == "doctor" and config.pop("ckpt_path", None) is not None:
            raise ValueError(
                "ckpt_path: doctor examines what a run starts with, not a checkpoint; give "
                "--ckpt_path null"
            )
        trains = self.subcommand == "fit" and not self.rehearsal
        if trains:
            lock.check_lock(self.root)
        path = config.get("ckpt_path")
        self.checkpoint = find_checkpoint(self.root, path and str(path))
        check_strategy(config.trainer)
        start_checks.check_options(config.trainer)
        if self.subcommand == "fit":
            start_checks.check_length(config.trainer)
        # Not kept in the config: a run that is continued with it should not be traced again.
        profile, config.profile = config.profile, None
        if profile is not None and self.subcommand != "fit":
            raise ValueError(
                f"profile: a trace is of a rollout in training; {self.subcommand} has none"
            )
        self.traces = [] if profile is None else [RolloutProfile(profile)]
        if trains:
            folder.check_folder(self.root, self.checkpoint)
        if self.subcommand in ("fit", "predict"):  # the others print
            folder.check_writable(self.root)
        self.save_config_kwargs = {
            "checkpoint": self.checkpoint,
            "terminal": self.watch.terminal,
            "leftovers": [] if self.checkpoint else folder.find_leftovers(self.root),
            "command": ["gspo", *self.argv],
        }

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """Fill in what the config leaves open."""
        config = self._get(self.config_init, "trainer")
        if self.checkpoint is not None:
            start_checks.check_checkpoint(self.checkpoint, self.model)
        plugins = as_list(config.plugins)
        if not has(plugins, CheckpointIO):
            plugins.append(AtomicCheckpointIO())
        forbid_requeueing(plugins)
        logger = config.logger
        if self.subcommand != "fit" and logger is None:
            logger = False  # the figures are printed; in the curves they would have no place
        elif logger is None or logger is True:
            logger = TensorBoardLogger(self.root, name="", version="", default_hp_metric=False)
        callbacks = self._callbacks(config)
        if self.subcommand in ("fit", "doctor"):
            check_training(config, callbacks, self.model, self.datamodule)
        if self.subcommand == "doctor":  # nothing is written: of the callbacks two may act
            self.save_config_callback = None
            callbacks = [c for c in callbacks if isinstance(c, AdaptiveKL) or c is self.watch]
            logger = False
            kwargs |= {"profiler": None, "enable_checkpointing": False}
            kwargs |= {"enable_progress_bar": False}
        for own, name in itertools.product(as_list(logger), ("_root_dir", "_save_dir")):
            path = getattr(own, name, None)  # a relative one keeps its meaning, as the run's does
            if isinstance(path, str) and "://" not in path:
                setattr(own, name, str(local_folder(path or ".", "trainer.logger")))
        kwargs |= {"callbacks": callbacks, "plugins": plugins, "logger": logger}
        kwargs |= {"default_root_dir": str(self.root)}
        try:
            trainer = super().instantiate_trainer(**kwargs)
        except (TypeError, AttributeError, KeyError, RuntimeError) as error:
            # Lightning's checks of its own options: whatever is raised there is about a setting.
            raise ValueError(f"trainer: {type(error).__name__}: {error}") from error
        launch.check_rank(trainer.world_size)
        start_checks.set_timeout(trainer.strategy, self._get(self.config, "rank_timeout"))
        start_checks.say_whom_it_waits_for(trainer)
        return trainer

    def _callbacks(self, config: Any) -> list[Callback]:
        """Those of the config, and for each kind that a run needs and that is missing, one."""
        # Signals come first: a callback before them could keep a signal waiting. Then comes what
        # sees that the folder is gone: a callback before it could make another one.
        callbacks = [self.watch.signals, self.watch, *as_list(config.callbacks), *self.traces]
        if config.enable_progress_bar is not False:
            if not has(callbacks, ProgressBar):
                callbacks.append(progress.RolloutProgress())
            if not has(callbacks, progress.RunSummary):
                callbacks.append(progress.RunSummary())
        if self.subcommand == "predict" and not has(callbacks, PredictionWriter):
            callbacks.append(PredictionWriter())
        if config.enable_checkpointing is not False and not has(callbacks, RolloutCheckpoint):
            callbacks.append(RolloutCheckpoint())  # beside others: from its files a run goes on
        for callback in callbacks:
            if isinstance(callback, RolloutCheckpoint):
                callback.accept_changes = bool(self._get(self.config, "accept_changes", False))
        return callbacks

    def _prepare_subcommand_kwargs(self, subcommand: str) -> dict[str, Any]:
        kwargs = super()._prepare_subcommand_kwargs(subcommand)
        if subcommand == "doctor":
            return kwargs | {name: self._get(self.config, name) for name in ("json", "thorough")}
        return kwargs | {"ckpt_path": self.checkpoint and str(self.checkpoint)}

    def doctor(self, **arguments: Any) -> None:
        """Keep the exit code; Lightning calls this in place of the Trainer's method."""
        self.code = self.trainer.doctor(**arguments)  # type: ignore[attr-defined]

    def before_fit(self) -> None:
        """Say where the run begins, now that most of what could be refused was not."""
        if not self.rehearsal:
            self.watch.lock.take(self.root)
            folder.check_folder(self.root, self.checkpoint)  # another run may have ended here since
        present = set(self.root.glob("*"))
        self.watch.refuse = lambda: folder.remove_traces(self.root, present)
        open_tables(self.trainer, goes_on=self.checkpoint is not None)
        if self.checkpoint is not None:
            say(f"continuing from {self.checkpoint}")

    def after_fit(self) -> None:
        """Say why the run ended, unless it has its planned length or a signal ended it."""
        if self.rehearsal or self.watch.signals.stopping:
            return
        why = early.why_early(self.trainer, self.model, self.trainer.stopped_by)  # type: ignore[attr-defined]
        if why is None:
            folder.mark_finished(self.root)
        health = getattr(self.model, "health", None)
        if getattr(health, "stopped", None) is not None or in_pieces(self.trainer):
            self.code = 1
        if self.checkpoint is not None and self.watch.rollouts == 0:
            longer = shlex.join(str(x) for pair in longer_run(self.trainer).items() for x in pair)
            end = f"is the end of the run; {longer} makes it longer, another run wants a "
            end += "folder of its own, --trainer.default_root_dir NEW"
            end = end if why is None else f"was ended {why}"
            say(typed.as_called(f"nothing to do: {self.checkpoint} {end}"))
            self.watch.refuse()  # the curves that Lightning has opened stay empty
        elif why is not None:
            done = self.trainer.fit_loop.epoch_loop.batch_progress.total.completed
            total = total_batches(self.trainer)
            length = f"{done:,}" if total is None else f"{done:,} of {total:,}"
            unit = "rollouts" if hasattr(self.model, "sampler") else "batches"
            go_on = where_to_go_on(self.argv, self.root)
            if why.endswith("to go on"):  # as it stands, the command would stop again at once
                go_on = go_on.replace("; continue with", ", and then continue with")
            say(f"stopped after {length} {unit} {why}; {go_on}")
        elif 0 <= self.trainer.max_steps <= (steps := self.trainer.global_step):
            say(f"ended by trainer.max_steps {self.trainer.max_steps}: {steps:,} optimizer steps")


def import_classes() -> None:
    """Import what a config names without a path: a short name is one of an imported class."""
    for name in gspo_lightning.__all__:
        getattr(gspo_lightning, name)


def as_list(items: Any) -> list[Any]:
    """None, one item or several, as a new list."""
    return [] if items is None else [*items] if isinstance(items, list) else [items]


def has(items: list[Any], kind: type) -> bool:
    """Whether one of the items is of this kind."""
    return any(isinstance(item, kind) for item in items)


def where_to_go_on(argv: list[str], root: Path | None, read: bool = True) -> str:
    """What is left in ``root`` of a training that ended early, and how to continue it, if it began.

    A checkpoint is read to its end if ``read``; otherwise it has only to look whole.
    """
    if root is None:
        return ""
    try:
        found = reversed(list_checkpoints(root))
        newest = next((path for path in found if not read or damage(path) is None), None)
    except OSError as error:  # raised, the error would hide why the training ended
        return f"the checkpoints of {root} cannot be read: {error.strerror}"
    if newest is None:
        return "there is no checkpoint yet; the same command starts again"
    go_on = resume_command(argv, {})
    return f"last checkpoint {newest}; continue with: {go_on}"


def main(argv: list[str] | None = None) -> int:
    """Run one command.

    Args:
        argv: Arguments without the program's name; None takes those of the process.

    Returns:
        Exit code: 0, 2 after a mistake of the user's, 1 after any other error, an error that the
        doctor found or a stop by `model.stop_when`, 130 after Ctrl-C, 143 after SIGTERM.
    """
    argv = sys.argv[1:] if argv is None else argv
    watch = Watch()
    with taken_over(watch, argv):
        try:
            launch.check_variables()
            with one_line.quiet():
                if argv[:1] == ["replay"]:
                    return resolve_name(TOOLS["replay"])(argv[1:])
                code = GSPOCLI(argv, watch).code
            if watch.signals.number is not None:
                name = signal.Signals(watch.signals.number).name
                say(f"{name}: stopped; {where_to_go_on(argv, watch.root)}")
            return watch.signals.exit_code or code
        except BaseException as error:
            return ending.report(error, watch, partial(where_to_go_on, argv, watch.root))


@contextmanager
def taken_over(watch: Watch, argv: list[str]) -> Iterator[None]:
    """Have the process's streams, signals and umask as a run needs them, for a while."""
    begin_here()
    umask = os.umask(0o022)  # no group and no stranger may change the files of a run
    os.umask(umask | 0o022)
    watch.terminal.take()
    watch.signals.install()
    watch.signals.on_lost_rank = lambda text: ending.report_lost_rank(
        text, watch, partial(where_to_go_on, argv, watch.root)
    )
    # Rewards of the user's lie in the working folder, and Python looks where its script lies.
    paths = [folder for folder in working_folder() if not {"", folder} & {*sys.path}]
    sys.path += paths
    try:
        yield
    finally:
        sys.path[:] = [path for path in sys.path if path not in paths]
        watch.signals.restore()
        watch.terminal.close()
        watch.lock.release()
        os.umask(umask)
