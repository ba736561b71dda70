"""Each line of docs/lightning.md is tried: what works has its effect, the rest says its way out."""

import inspect
import re
from datetime import timedelta
from types import SimpleNamespace

import lightning.pytorch.callbacks as theirs
import lightning.pytorch.loggers as logs
import pytest
import torch
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import Checkpoint, ModelCheckpoint

from gspo_lightning import (
    CriticConfig,
    Evaluation,
    GroupSampler,
    HFExport,
    PromptData,
    ReferencePolicy,
    RolloutCheckpoint,
    RolloutProgress,
)
from gspo_lightning.checkpoint.files import list_checkpoints
from gspo_lightning.checkpoint.io import AtomicCheckpointIO
from gspo_lightning.guards.ignored import check_callback, check_monitors, check_strategy, figures_of
from gspo_lightning.policy.settings import log_settings
from support.command import enter, instantiated
from support.dummies import DummyData, DummyModule, Stopper
from support.lightning_table import PAGE, TABLES, written
from support.rollout_dummies import events, fit
from support.tiny_run import make_module, make_trainer, write_prompts

OPTIONS, CALLBACKS, LOGGERS = TABLES["Trainer options"], TABLES["Callbacks"], TABLES["Loggers"]


def test_the_page_is_what_the_table_says():
    assert PAGE.read_text() == written(), "make lightning"


def test_every_name_of_lightning_has_a_line():
    options = set(inspect.signature(Trainer.__init__).parameters) - {"self"}
    assert set(OPTIONS) == options
    assert set(CALLBACKS) == set(theirs.__all__)
    assert set(LOGGERS) == set(logs.__all__)


# ---- refused -------------------------------------------------------------------------------------


class Thaws(theirs.BaseFinetuning):
    def freeze_before_training(self, module):
        raise AssertionError("it is refused before")

    finetune_function = freeze_before_training


VALUES = {"accumulate_grad_batches": 2, "gradient_clip_val": 1.0, "overfit_batches": 1}
VALUES |= {"gradient_clip_algorithm": "norm"}
MADE = {
    "BackboneFinetuning": lambda: theirs.BackboneFinetuning(),
    "BaseFinetuning": Thaws,
    "BatchSizeFinder": lambda: theirs.BatchSizeFinder(),
    "GradientAccumulationScheduler": lambda: theirs.GradientAccumulationScheduler({0: 2}),
    "LearningRateFinder": lambda: theirs.LearningRateFinder(),
    "ModelPruning": lambda: theirs.ModelPruning("l1_unstructured"),
    "OnExceptionCheckpoint": lambda: theirs.OnExceptionCheckpoint("here"),
    "StochasticWeightAveraging": lambda: theirs.StochasticWeightAveraging(0.1),
    "SpikeDetection": lambda: theirs.SpikeDetection(),
}


def refusal(tmp_path, model_dir, callbacks=(), val=True, **options):
    """With what a plain Trainer of Python's refuses a module, before anything is loaded."""
    prompts = str(write_prompts(tmp_path / "prompts.jsonl"))
    module = make_module(model_dir)
    data = PromptData(prompts, val_path=prompts if val else None, prompts_per_rollout=4)
    callbacks, present = list(callbacks), {*tmp_path.iterdir()}
    saves = any(isinstance(callback, Checkpoint) for callback in callbacks)
    trainer = make_trainer(tmp_path, callbacks=callbacks, enable_checkpointing=saves, **options)
    with pytest.raises(ValueError) as refused:
        trainer.fit(module, data)
    assert module.policy is None and {*tmp_path.iterdir()} == present
    assert "\n" not in str(refused.value)
    return str(refused.value)


@pytest.mark.parametrize("name", [name for name, row in OPTIONS.items() if row.here == "refused"])
def test_an_option_is_refused_with_the_setting_of_its_line(name, tmp_path, model_dir):
    way_out = re.search("`(.+?)`", OPTIONS[name].note)[1]
    assert way_out in refusal(tmp_path, model_dir, **{name: VALUES[name]})


@pytest.mark.filterwarnings("ignore:`.fit.ckpt_path=None.` was called:UserWarning")
@pytest.mark.filterwarnings("ignore:.*there is no last checkpoint")  # of OnExceptionCheckpoint
@pytest.mark.parametrize("name", [name for name, row in CALLBACKS.items() if row.here == "refused"])
def test_a_callback_is_refused_with_the_setting_of_its_line(name, tmp_path, model_dir, monkeypatch):
    monkeypatch.chdir(tmp_path)  # nor is anything written here, by OnExceptionCheckpoint
    way_out = re.search("`(.+?)`", CALLBACKS[name].note)[1]
    callback = MADE[name]()
    text = refusal(tmp_path, model_dir, [callback])
    assert type(callback).__name__ in text and way_out in text


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"save_on_exception": True}, "save_on_exception saves in the middle of a rollout"),
        ({"train_time_interval": timedelta(hours=1)}, "every_n_rollouts of RolloutCheckpoint"),
        ({"every_n_train_steps": 3}, "of which a rollout has 2: 3 is no multiple"),
        ({"filename": "rollout={step:06d}"}, "looks like the files of RolloutCheckpoint"),
        ({"filename": "{rollout}"}, "looks like the files of RolloutCheckpoint"),
    ],
)
def test_a_checkpoint_of_lightning_that_would_do_harm_is_refused(options, text):
    module = SimpleNamespace(num_epochs=1, num_minibatches=2)
    with pytest.raises(ValueError, match=text):
        check_callback(ModelCheckpoint(**options), module)


def test_an_average_that_would_never_be_updated_is_refused():
    module = SimpleNamespace(num_epochs=2, num_minibatches=3)
    check_callback(theirs.EMAWeightAveraging(update_every_n_steps=5), module)  # each fifth rollout
    with pytest.raises(ValueError, match="update_every_n_steps 2 never falls on the end of a roll"):
        check_callback(theirs.EMAWeightAveraging(update_every_n_steps=2), module)


@pytest.mark.parametrize(
    "name",
    ["fsdp", "deepspeed_stage_2", "FSDPStrategy", "DeepSpeedStrategy", "ModelParallelStrategy"],
)
def test_a_strategy_for_larger_models_is_refused(name):
    by_class = type(name, (), {})()
    for strategy in (name, SimpleNamespace(class_path=f"lightning.pytorch.strategies.{name}")):
        with pytest.raises(ValueError, match="is shared out by fsdp2 here"):
            check_strategy(SimpleNamespace(strategy=strategy, precision="32-true"))
    if name[0].isupper():
        with pytest.raises(ValueError, match=f"trainer.strategy {name}"):
            check_strategy(SimpleNamespace(strategy=by_class, precision="32-true"))


# ---- figures that are watched --------------------------------------------------------------------


@pytest.mark.parametrize(
    "callback",
    [
        theirs.EarlyStopping("val_reward"),
        ModelCheckpoint(monitor="val_reward"),
        RolloutCheckpoint(monitor="val_reward"),
        HFExport(monitor="val_reward"),
    ],
    ids=lambda callback: type(callback).__name__,
)
def test_a_figure_that_is_never_logged_is_refused_with_those_that_are(
    callback, tmp_path, model_dir
):
    text = refusal(tmp_path, model_dir, [callback])
    start = f"{type(callback).__name__}.monitor 'val_reward' is never logged, did you mean val/rew"
    assert text.startswith(start)
    assert "val/{response_length, reward, reward_digits, truncated_fraction}" in text


OFTEN = {"rollout/flat_groups_kept", "policy/sampler_noise", "policy/old_from_sampler"}


@pytest.mark.parametrize(
    "options",
    [
        {"overlong_ramp": 3, "drop_flat_groups": True, "evaluation": Evaluation("digits")},
        {
            "reference": ReferencePolicy(device="cpu"),
            "critic": CriticConfig(),
            "advantages": "gae",
            "sampler": GroupSampler(1, 6),
        },
    ],
    ids=["without reference", "with reference and critic"],
)
def test_what_is_known_before_is_what_is_logged(options, tmp_path, model_dir):
    prompts = str(write_prompts(tmp_path / "prompts.jsonl"))
    data = PromptData(prompts, val_path=prompts, prompts_per_rollout=4, num_rollouts=2)
    module = make_module(model_dir, **options)
    trainer = make_trainer(tmp_path, val_check_interval=2, log_every_n_steps=1)
    trainer.fit(module, data)
    known, logged = figures_of(module), {*trainer.callback_metrics}
    assert logged <= known and known - logged <= OFTEN, known ^ logged


def test_a_figure_of_a_validation_that_never_comes_is_refused(tmp_path, model_dir):
    stop = [theirs.EarlyStopping("val/reward")]
    for options in ({"val": False}, {"limit_val_batches": 0}):
        text = refusal(tmp_path, model_dir, stop, **options)
        assert "'val/reward' is never logged: nothing is held out; set data.val_path" in text


@pytest.mark.parametrize("callback", [theirs.LambdaCallback(), Stopper(99)])
def test_a_callback_of_ones_own_may_log_anything(callback, tmp_path, model_dir):
    settings = SimpleNamespace(limit_val_batches=1.0)
    module, watch = make_module(model_dir), theirs.EarlyStopping("mine")
    check_monitors(settings, [callback, watch], module, None)
    with pytest.raises(ValueError, match="'mine' is never logged"):
        check_monitors(settings, [watch], module, None)


# ---- callbacks that work -------------------------------------------------------------------------


@pytest.fixture(scope="module")
def together(tmp_path_factory):
    """One run with every callback of Lightning's that works, and its continuation."""
    folder = tmp_path_factory.mktemp("together")
    started = []

    def callbacks():
        lambdas = {"on_train_start": lambda *_: started.append(True)}
        return {
            "BasePredictionWriter": Writes("batch"),
            "Callback": Callback(),
            "Checkpoint": Checkpoint(),
            "DeviceStatsMonitor": theirs.DeviceStatsMonitor(),
            "EarlyStopping": theirs.EarlyStopping("val/accuracy_greedy", mode="max"),
            "LambdaCallback": theirs.LambdaCallback(**lambdas),
            "LearningRateMonitor": theirs.LearningRateMonitor("step"),
            "ModelCheckpoint": ModelCheckpoint(monitor="val/accuracy_greedy", mode="max"),
            "ModelSummary": theirs.ModelSummary(),
            "ThroughputMonitor": theirs.ThroughputMonitor(len),
            "Timer": theirs.Timer("00:01:00:00"),
            "TQDMProgressBar": theirs.TQDMProgressBar(),
        }

    first, second = callbacks(), callbacks()
    options = {"enable_progress_bar": True, "enable_model_summary": True}
    with pytest.warns(UserWarning):  # Lightning's own: no flops, a folder that holds the run
        fit(folder, [*first.values()], **options)
        trainer, _ = fit(folder, [*second.values()], num_rollouts=9, ckpt="last", **options)
    return folder, first, second, trainer, started


class Writes(theirs.BasePredictionWriter):
    """Keeps what it is to write."""

    def __init__(self, interval):
        super().__init__(interval)
        self.written = []

    def write_on_batch_end(self, trainer, module, prediction, *_):
        self.written.append(prediction)


def points(folder, start):
    return sum(len(e) for tag, e in events(folder, "scalars").items() if tag.startswith(start))


def predicted(tmp_path):
    writer = Writes("batch")
    trainer = make_trainer(tmp_path, callbacks=[writer])
    trainer.predict(DummyModule(), DummyData(2))
    return len(writer.written) == 2


def shows(tmp_path, capsys, callback, **options):
    fit(tmp_path, [callback], num_rollouts=3, **options)
    return capsys.readouterr().out


SHOWN = {
    "RichModelSummary": (lambda: theirs.RichModelSummary(), "Trainable params"),
    "RichProgressBar": (lambda: theirs.RichProgressBar(), "3/3"),
}
WORKS = {
    "Callback": lambda run: run.second["Callback"] in run.trainer.callbacks,
    "Checkpoint": lambda run: isinstance(run.trainer.callbacks[-1], RolloutCheckpoint),
    "DeviceStatsMonitor": lambda run: points(run.folder, "DeviceStatsMonitor") > 9,
    "EarlyStopping": lambda run: abs(run.second["EarlyStopping"].best_score - 0.9) < 1e-6,
    "LambdaCallback": lambda run: len(run.started) == 2,
    "LearningRateMonitor": lambda run: points(run.folder, "lr-") == 9,
    "ModelCheckpoint": lambda run: run.second["ModelCheckpoint"].best_model_score > 0.85,
    "ModelSummary": lambda run: run.second["ModelSummary"] in run.trainer.callbacks,
    "ProgressBar": lambda run: isinstance(run.trainer.progress_bar_callback, theirs.ProgressBar),
    "ThroughputMonitor": lambda run: points(run.folder, "train/batches") == 9,
    "Timer": lambda run: run.second["Timer"].time_elapsed() > run.first["Timer"].time_elapsed(),
    "TQDMProgressBar": lambda run: run.trainer.progress_bar_callback.total_train_batches == 9,
}
ELSEWHERE = {"EMAWeightAveraging", "WeightAveraging"}  # tests/checkpoint/test_beside.py


@pytest.mark.filterwarnings("ignore:Couldn't infer the batch indices:UserWarning")
@pytest.mark.parametrize("name", [name for name, row in CALLBACKS.items() if row.here == "works"])
def test_a_callback_works_beside_all_others_and_over_a_resume(name, together, tmp_path, capsys):
    keys = ("folder", "first", "second", "trainer", "started")
    run = SimpleNamespace(**dict(zip(keys, together, strict=True)))
    if name == "BasePredictionWriter":
        assert predicted(tmp_path)
    elif name in SHOWN:
        make, text = SHOWN[name]
        bar = {"enable_progress_bar": "Bar" in name, "enable_model_summary": "Bar" not in name}
        assert text in shows(tmp_path, capsys, make(), **bar)
    else:
        assert name in ELSEWHERE or WORKS[name](run)


# ---- options that work, or do nothing ------------------------------------------------------------


class Looks(Callback):
    """Counts batches and validations, and notes how torch is set in each."""

    def __init__(self):
        self.rollouts = self.validations = self.val_batches = 0
        self.modes = {}

    def on_train_batch_start(self, trainer, module, batch, batch_idx):
        self.rollouts += 1
        self.modes["deterministic"] = torch.are_deterministic_algorithms_enabled()
        self.modes["detect_anomaly"] = torch.is_anomaly_enabled()
        self.modes["weight"] = module.policy.weight.detach().clone()
        self.modes["served"] = int(batch[1])

    def on_validation_start(self, *_):
        self.validations += 1

    def on_validation_batch_start(self, *_):
        self.val_batches += 1
        self.modes["inference_mode"] = torch.is_inference_mode_enabled()


class Slow(Callback):
    def on_train_batch_end(self, *_):
        self.slept = torch.ones(400, 400) @ torch.ones(400, 400)


PLAIN = {"num_rollouts": 2, "val_check_interval": 2, "num_sanity_val_steps": 0, "logger": False}


def looked(tmp_path, *callbacks, **options):
    """What a run of two rollouts with options of Lightning's looks like from inside."""
    looks = Looks()
    trainer, _ = fit(tmp_path, [looks, *callbacks], **PLAIN | options)
    return SimpleNamespace(trainer=trainer, **vars(looks), **looks.modes)


@pytest.fixture(scope="module")
def commands(tmp_path_factory):
    """Trainers of the command: with another checkpoint and a bar, and with neither."""
    with pytest.MonkeyPatch.context() as monkeypatch:
        enter(tmp_path_factory.mktemp("commands"), monkeypatch)
        bar, off = "--trainer.enable_progress_bar=true", "--trainer.enable_checkpointing=false"
        given = ["--trainer.callbacks=ModelCheckpoint", bar], ["--trainer.callbacks=null", off]
        return [instantiated("--config", "dummy.yaml", *words).trainer for words in given]


def evaluated(tmp_path, stage, **options):
    looks = Looks()
    trainer = make_trainer(tmp_path, callbacks=[looks], **options)
    result = getattr(trainer, stage)(DummyModule(), DummyData(2), **{})
    return looks, result


def plain_run(tmp_path):
    return looked(tmp_path / "plain", **{"num_rollouts": 2})


def untouched(tmp_path, **options):
    """Whether an option leaves a run as it is without."""
    return torch.equal(looked(tmp_path / "with", **options).weight, plain_run(tmp_path).weight)


def stops_after(tmp_path, **options):
    return looked(tmp_path, Stopper(1), num_rollouts=4, val_check_interval=4, **options).rollouts


def tries(tmp_path, model_dir, **options):
    prompts = str(write_prompts(tmp_path / "prompts.jsonl"))
    data = PromptData(prompts, val_path=prompts, prompts_per_rollout=2, val_batch_size=2)
    module, batches = make_module(model_dir), []
    counts = theirs.LambdaCallback(on_test_batch_start=lambda *_: batches.append(1))
    trainer = make_trainer(tmp_path, callbacks=[counts], **options)
    trainer.test(module, data, verbose=False)
    return len(batches)


def logged(tmp_path, **options):
    from lightning.pytorch.loggers import TensorBoardLogger

    fit(tmp_path, **PLAIN | {"logger": TensorBoardLogger(tmp_path, "", "")} | options)
    return events(tmp_path, "scalars")


TRIED = {
    "accelerator": lambda p, **_: looked(p).trainer.strategy.root_device.type == "cpu",
    "strategy": lambda p, **_: looked(p, strategy="auto").rollouts == 2,  # ddp: tests/test_ddp.py
    "devices": lambda p, **_: looked(p, devices=1).trainer.world_size == 1,
    "num_nodes": lambda p, **_: looked(p, num_nodes=1).trainer.num_nodes == 1,
    "precision": lambda p, **_: precise(p),
    "logger": lambda p, **_: looked(p).trainer.loggers == [] and "train/loss" in logged(p / "b"),
    "callbacks": lambda p, **_: looked(p).rollouts == 2,
    "fast_dev_run": lambda p, **_: looked(p, fast_dev_run=1).rollouts == 1 and not [*p.iterdir()],
    "max_epochs": lambda p, **_: looked(p, max_epochs=2).rollouts == 4,
    "min_epochs": lambda p, **_: (stops_after(p / "a"), stops_after(p, min_epochs=1)) == (1, 4),
    "max_steps": lambda p, **_: looked(p, num_rollouts=9, max_steps=5).rollouts == 2,
    "min_steps": lambda p, **_: stops_after(p, min_steps=8, min_epochs=0) == 2,
    "max_time": lambda p, **_: looked(p, Slow(), max_time=timedelta(microseconds=1)).rollouts == 1,
    "limit_train_batches": lambda p, **_: looked(p, limit_train_batches=1, **EVERY).rollouts == 1,
    "limit_val_batches": lambda p, **_: looked(p, limit_val_batches=1).val_batches == 1,
    "limit_test_batches": lambda p, model_dir, **_: tries(p, model_dir, limit_test_batches=2) == 2,
    "limit_predict_batches": lambda p, **_: (
        len(evaluated(p, "predict", limit_predict_batches=1)[1]) == 1
    ),
    "val_check_interval": lambda p, **_: looked(p, **EVERY).validations == 2,
    "check_val_every_n_epoch": lambda p, **_: (
        looked(p, max_epochs=2, check_val_every_n_epoch=2).validations == 1
    ),
    "num_sanity_val_steps": lambda p, **_: looked(p, num_sanity_val_steps=-1).validations == 2,
    "log_every_n_steps": lambda p, **_: len(logged(p, log_every_n_steps=50)["train/loss"]) == 2,
    "enable_checkpointing": lambda p, commands, **_: saves(commands),
    "enable_progress_bar": lambda p, commands, **_: bars(commands),
    "enable_model_summary": lambda p, capsys, **_: summary(p, capsys),
    "deterministic": lambda p, **_: deterministic(p),
    "benchmark": lambda p, **_: untouched(p, benchmark=True),
    "inference_mode": lambda p, **_: (
        [
            evaluated(p, "validate", inference_mode=mode)[0].modes["inference_mode"]
            for mode in (True, False)
        ]
        == [True, False]
    ),
    "use_distributed_sampler": lambda p, **_: untouched(p, use_distributed_sampler=False),
    "profiler": lambda p, **_: looked(p, profiler="simple").trainer.profiler.recorded_durations[
        "run_training_batch"
    ],
    "detect_anomaly": lambda p, **_: looked(p, detect_anomaly=True).detect_anomaly,
    "barebones": lambda p, **_: barebones(p),
    "plugins": lambda p, **_: own_files(p),
    "sync_batchnorm": lambda p, **_: untouched(p, sync_batchnorm=True),
    "reload_dataloaders_every_n_epochs": lambda p, **_: untouched(
        p, reload_dataloaders_every_n_epochs=1
    ),
    "default_root_dir": lambda p, **_: (
        looked(p).trainer.default_root_dir == str(p) and list_checkpoints(p)
    ),
    "enable_autolog_hparams": lambda p, **_: asks_for_settings(),
    "model_registry": lambda p, **_: untouched(p, model_registry="mine"),
}
EVERY = {"val_check_interval": 1, "check_val_every_n_epoch": None}


def saves(commands):
    """RolloutCheckpoint is there beside another one, and in no run that keeps none."""
    both, none = ([type(c).__name__ for c in t.checkpoint_callbacks] for t in commands)
    return both == ["ModelCheckpoint", "RolloutCheckpoint"] and none == []


def bars(commands):
    on, off = (trainer.progress_bar_callback for trainer in commands)
    return isinstance(on, RolloutProgress) and off is None


def summary(tmp_path, capsys):
    looked(tmp_path, enable_model_summary=True)
    return "Trainable params" in capsys.readouterr().out


def precise(tmp_path):
    """What the line names is trained with, or refused with its reason."""
    named = re.findall("`([\\w-]+)`", OPTIONS["precision"].note)
    reasons = {"16-mixed": "loss scaling", "bf16-true": "policy.dtype", "16-true": "policy.dtype"}
    for precision in {*named} - {"32-true", "64-true", "bf16-mixed"}:
        with pytest.raises(ValueError, match=reasons[precision]):
            check_strategy(SimpleNamespace(strategy="auto", precision=precision))
    return looked(tmp_path, precision="bf16-mixed").trainer.precision == "bf16-mixed"


class Own(AtomicCheckpointIO):
    """A plugin of the user's."""


def own_files(tmp_path):
    """The plugin that is given writes the files; ours does where none is."""
    made = [
        looked(tmp_path / name, plugins=plugins).trainer.strategy.checkpoint_io
        for name, plugins in (("none", None), ("own", [Own()]))
    ]
    return [type(one) for one in made] == [AtomicCheckpointIO, Own]


def asks_for_settings():
    """Without the option no logger is told the settings; tests/test_from_python.py has it set."""
    told = []
    logger = SimpleNamespace(experiment=None, log_hyperparams=told.append)
    for wanted in (False, True):
        options = {"enable_autolog_hparams": wanted, "callbacks": [], "loggers": [logger]}
        trainer = SimpleNamespace(precision="32-true", datamodule=None, **options)
        log_settings(SimpleNamespace(trainer=trainer, hparams_initial={"a": 1}))
        assert len(told) == int(wanted)
    return told[0]["model.a"] == 1


def deterministic(tmp_path):
    try:
        return looked(tmp_path, deterministic=True).deterministic
    finally:
        torch.use_deterministic_algorithms(False)


def barebones(tmp_path):
    trainer = Trainer(barebones=True, accelerator="cpu", max_epochs=1, default_root_dir=tmp_path)
    with pytest.warns(UserWarning, match="barebones"):
        trainer.fit(DummyModule(), DummyData(2))
    return trainer.fit_loop.total_batch_idx == 1


@pytest.mark.filterwarnings("ignore:The number of training batches:UserWarning")
@pytest.mark.parametrize("name", [name for name, row in OPTIONS.items() if row.here != "refused"])
def test_an_option_does_what_its_line_says(name, tmp_path, model_dir, commands, capsys):
    assert TRIED[name](tmp_path, model_dir=model_dir, commands=commands, capsys=capsys)


# ---- loggers -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "method", "arguments"),
    [
        ("WandbLogger", "log_table", "key columns data step"),
        ("WandbLogger", "log_image", "key images step"),
        ("LitLogger", "log_metrics", "metrics step"),
        ("MLFlowLogger", "log_metrics", "metrics step"),
        ("CometLogger", "log_metrics", "metrics step"),
        ("Logger", "log_metrics", "metrics step"),
    ],
)
def test_a_logger_takes_what_it_is_given(kind, method, arguments):
    """Their packages are not installed: tests/callbacks/test_loggers.py stands in for them."""
    parameters = inspect.signature(getattr(getattr(logs, kind), method)).parameters
    assert {*arguments.split()} <= {*parameters}
