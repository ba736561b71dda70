"""What signals do to a run: nothing is lost, and the exit code says that it was stopped."""

import os
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from lightning.pytorch import Trainer
from lightning.pytorch.plugins.environments import TorchElasticEnvironment
from lightning.pytorch.trainer.states import TrainerFn

import train
from gspo_lightning.checkpoint.signals import StopSignals, forbid_requeueing
from gspo_lightning.guards.ignored import check_trainer
from support.dummies import DummyModule
from support.repository import PYTHONPATH, ROOT
from support.run_folder import assert_same, names, scalars, state
from support.tiny_run import write_prompts

# No period saves; validation after 3 and 6 rollouts.
CONFIG = """
seed_everything: 0
trainer:
  accelerator: cpu
  enable_progress_bar: false
  val_check_interval: 3
  callbacks:
    - {class_path: gspo_lightning.RolloutCheckpoint, init_args: {every_n_rollouts: 99}}
    - {class_path: support.dummies.Coefficient}
model: {class_path: support.dummies.DummyModule}
data: {class_path: support.dummies.DummyData, init_args: {num_rollouts: 6}}
"""


@pytest.fixture(autouse=True)
def _folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    Path("run.yaml").write_text(CONFIG)


def fit(folder, *options):
    return train.main(
        ["fit", "--config", "run.yaml", f"--trainer.default_root_dir={folder}", *options]
    )


def send(at, number, rollout, times=1):
    settings = {"at": at, "number": int(number), "rollout": rollout, "times": times}
    key = "--trainer.callbacks"
    return [f"{key}+=support.dummies.Signaller", *(f"{key}.{k}={v}" for k, v in settings.items())]


TERM, INT, HUP, USR1 = signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1
NAMES = {TERM: "terminated", INT: "interrupted", HUP: "terminated", USR1: "terminated"}
each_signal = pytest.mark.parametrize(
    "number", [TERM, INT, HUP, USR1], ids=["TERM", "INT", "HUP", "USR1"]
)
SLURM = {
    "SLURM_NTASKS": "1",
    "SLURM_JOB_NAME": "train",
    "SLURM_JOB_ID": "1",
    "SLURM_PROCID": "0",
    "SLURM_LOCALID": "0",
    "SLURM_NODEID": "0",
}


@pytest.fixture
def scheduler(monkeypatch):
    """What makes SIGUSR1 ours: alone it would kill."""
    for name, value in SLURM.items():
        monkeypatch.setenv(name, value)


@pytest.fixture
def sender(request, number):
    """Who sends the signal: a user, or the scheduler."""
    if number == USR1:
        request.getfixturevalue("scheduler")


MOMENTS = [  # hook, and the rollout, which is then the last one
    ("on_train_batch_start", 1),
    ("on_train_batch_start", 4),
    ("on_before_optimizer_step", 3),  # with the validation that is due after it
    ("on_before_optimizer_step", 5),
    ("on_validation_start", 3),
    ("on_validation_batch_start", 3),
    ("on_validation_epoch_end", 3),
    ("on_before_optimizer_step", 6),  # the last rollout of the run
    ("on_save_checkpoint", 6),
    ("on_train_end", 6),
]
EACH = [(TERM, *moment) for moment in MOMENTS]  # what a signal does is the same for all of them
EACH += [(number, *MOMENTS[2]) for number in (INT, HUP, USR1)]


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    folder = tmp_path_factory.mktemp("straight")
    here = os.getcwd()
    os.chdir(folder)
    Path("run.yaml").write_text(CONFIG)
    assert fit(folder / "run") == 0
    os.chdir(here)
    return folder / "run"


@pytest.mark.usefixtures("sender")
@pytest.mark.parametrize(("number", "hook", "rollout"), EACH)
def test_a_signal_finishes_the_rollout_saves_and_loses_nothing(
    capfd, straight, number, hook, rollout
):
    before = [signal.getsignal(n) for n in NAMES]
    times = 2 if number == HUP else 1  # a terminal that closes sends one, and its shell another
    assert fit("run", *send(hook, number, rollout, times)) == 128 + number
    assert [signal.getsignal(n) for n in NAMES] == before
    assert names("run")[-1] == f"rollout={rollout:06d}.ckpt"
    first, last = capfd.readouterr().err.splitlines()
    name = signal.Signals(number).name
    assert first == f"{name}: finishing this rollout, then saving; once more stops at once"
    assert last.startswith(
        f"{name}: stopped; last checkpoint run/checkpoints/rollout={rollout:06d}.ckpt; continue "
        "with: gspo fit --config run.yaml"
    )
    assert fit("run", "--ckpt_path=last") == 0
    assert_same(state("run", 6), state(straight, 6))
    assert scalars("run") == scalars(straight)


@pytest.mark.usefixtures("sender")
@pytest.mark.parametrize(
    ("number", "hook", "rollout", "left"),
    [
        (TERM, "on_train_batch_start", 4, [2]),
        (TERM, "on_before_optimizer_step", 3, [2]),
        (INT, "on_before_optimizer_step", 3, [2]),
        (USR1, "on_before_optimizer_step", 3, [2]),
        (TERM, "on_validation_batch_start", 3, [2]),
        (TERM, "on_save_checkpoint", 4, [2]),  # two while the file is written: not half a file
    ],
)
def test_a_second_signal_stops_at_once_and_saves_nothing_half_done(
    capfd, straight, number, hook, rollout, left
):
    saver = "--trainer.callbacks.every_n_rollouts=2"
    callbacks = ["--trainer.callbacks=gspo_lightning.RolloutCheckpoint", saver]
    callbacks += ["--trainer.callbacks+=support.dummies.Coefficient"]
    assert fit("run", *callbacks, *send(hook, number, rollout, times=2)) == 128 + number
    assert names("run") == [f"rollout={n:06d}.ckpt" for n in left]
    assert "rollout=000002.ckpt; continue with: gspo" in capfd.readouterr().err.splitlines()[-1]
    assert fit("run", *callbacks, "--ckpt_path=last") == 0
    assert_same(state("run", 6), state(straight, 6))
    assert scalars("run") == scalars(straight)


SLOW_REWARD = """
trainer: {{accelerator: cpu, enable_progress_bar: false, default_root_dir: run}}
model:
  class_path: gspo_lightning.GSPOModule
  init_args:
    policy: {{path: {model_dir}}}
    sampler:
      class_path: gspo_lightning.GroupSampler
      init_args: {{group_size: 4, max_new_tokens: 6}}
    rewards:
      slow:
        fn:
          class_path: gspo_lightning.rewards.time_limit.TimeLimit
          init_args: {{fn: support.reward_functions.stops_its_run, seconds: 5}}
    kl_coef: 0.0
    reference: null
    evaluation: {{correct: null}}
data:
  class_path: gspo_lightning.PromptData
  init_args: {{path: prompts.jsonl, prompts_per_rollout: 4, num_rollouts: 2}}
"""


@pytest.mark.usefixtures("sender")
@pytest.mark.parametrize("number", [TERM, INT], ids=["TERM", "INT"])
def test_a_second_signal_waits_for_no_reward_in_another_process(
    capfd, tmp_path, monkeypatch, model_dir, number
):
    """16 completions of two seconds each are on their way in a thread."""
    write_prompts(tmp_path / "prompts.jsonl")
    Path("run.yaml").write_text(SLOW_REWARD.format(model_dir=model_dir))
    monkeypatch.setenv("STOP_WITH", str(int(number)))
    start = time.monotonic()
    try:
        assert fit("run") == 128 + number
        assert time.monotonic() - start < 15  # most of it to start the other process
    finally:
        Path("enough").touch()  # the thread is joined when this process ends
        for thread in threading.enumerate():
            if thread.name.startswith("ThreadPoolExecutor"):
                thread.join()
    first, last = capfd.readouterr().err.splitlines()[-2:]
    assert "once more stops at once" in first and last.startswith(NAMES[number])


@pytest.mark.parametrize("number", [TERM, pytest.param(INT, marks=pytest.mark.kills)])
def test_the_process_ends_though_a_reward_is_at_work(tmp_path, model_dir, number):
    """Python itself joins threads when it ends."""
    write_prompts(tmp_path / "prompts.jsonl")
    Path("run.yaml").write_text(SLOW_REWARD.format(model_dir=model_dir))
    environment = os.environ | {"STOP_WITH": str(int(number))}
    environment["PYTHONPATH"] = PYTHONPATH
    command = [sys.executable, ROOT / "train.py", "fit", "--config", "run.yaml"]
    process = subprocess.Popen(command, env=environment, stderr=-1, text=True)
    for line in process.stderr:
        if "once more stops at once" in line:
            break
    start = time.monotonic()
    left = process.stderr.read().splitlines()
    process.stderr.close()
    assert process.wait() == 128 + number
    assert time.monotonic() - start < 10 and left[0].startswith(NAMES[number])


@pytest.mark.usefixtures("sender")
@each_signal
@pytest.mark.parametrize("hook", ["setup", "on_validation_batch_start"])
def test_before_training_one_signal_stops_at_once(capfd, number, hook):
    rollout = 0 if hook == "setup" else -1
    assert fit("run", *send(hook, number, rollout)) == 128 + number
    assert names("run") == []
    lines = capfd.readouterr().err.splitlines()
    assert len(lines) == 1, lines
    (line,) = lines
    assert line == NAMES[number]


@pytest.mark.usefixtures("sender")
@each_signal
def test_an_evaluation_is_stopped_at_once(capfd, number):
    assert fit("run") == 0
    options = [*send("on_validation_batch_start", number, 0), "--ckpt_path=last"]
    command = ["validate", "--config", "run.yaml", "--trainer.default_root_dir=run", *options]
    assert train.main(command) == 128 + number
    assert capfd.readouterr().err == f"{NAMES[number]}\n"


def test_a_stop_waits_for_no_validation_that_is_not_due(capfd):
    assert fit("run", *send("on_train_batch_start", TERM, 4)) == 143
    assert [step for step, _ in scalars("run")["val/size"]] == [2]  # after rollout 3 alone


def test_a_signal_saves_though_the_end_is_not_to_be_saved(capfd):
    options = "--trainer.callbacks=gspo_lightning.RolloutCheckpoint"
    options = [options, "--trainer.callbacks.save_at_end=false"]
    assert fit("run", *options, *send("on_train_batch_start", TERM, 4)) == 143
    assert names("run") == ["rollout=000004.ckpt"]


def test_a_minimum_of_steps_does_not_hold_a_signal_up(capfd):
    options = ["--trainer.min_steps=99", *send("on_train_batch_start", TERM, 4)]
    assert fit("run", *options) == 143
    assert names("run") == ["rollout=000004.ckpt"]


@pytest.mark.usefixtures("scheduler")
def test_the_signal_of_a_scheduler_ends_the_run_at_a_boundary(capfd, straight):
    """SLURM's own way would save at once, in the middle of the rollout, and requeue."""
    options = send("on_before_optimizer_step", signal.SIGUSR1, 4)
    assert fit("run", *options) == 128 + signal.SIGUSR1
    assert names("run") == ["rollout=000004.ckpt"]
    assert not list(Path("run").glob("**/hpc_ckpt*"))
    assert fit("run", "--ckpt_path=auto") == 0
    assert_same(state("run", 6), state(straight, 6))


def test_lightnings_requeueing_is_refused(capfd):
    plugin = "lightning.pytorch.plugins.environments.SLURMEnvironment"
    assert fit("run", f"--trainer.plugins+={plugin}") == 2
    assert "set its init_args.auto_requeue to false" in capfd.readouterr().err


@pytest.mark.usefixtures("scheduler")
def test_ranks_of_torchrun_stay_its_ranks_under_slurm(monkeypatch):
    plugins = []
    monkeypatch.setattr(TorchElasticEnvironment, "detect", staticmethod(lambda: True))
    forbid_requeueing(plugins)
    assert plugins == []
    monkeypatch.setattr(TorchElasticEnvironment, "detect", staticmethod(lambda: False))
    monkeypatch.setenv("SLURM_NTASKS", "2")
    with pytest.raises(ValueError, match=r"^SLURM: .*Use `--ntasks-per-node=2` instead"):
        forbid_requeueing(plugins)


@pytest.mark.usefixtures("scheduler")
def test_a_program_is_told_that_lightning_does_not_requeue_in_a_rollout(tmp_path):
    module = DummyModule()
    trainer = Trainer(default_root_dir=tmp_path, accelerator="cpu", logger=False)
    trainer.state.fn = TrainerFn.FITTING
    with pytest.warns(UserWarning, match="SLURM: Lightning's requeueing would save in the middle"):
        check_trainer(trainer, module)
    assert not trainer._accelerator_connector.cluster_environment.auto_requeue


def test_an_exception_in_a_rollout_saves_nothing_and_names_the_last_good_checkpoint(capfd):
    options = ["--trainer.callbacks=gspo_lightning.RolloutCheckpoint"]
    options += ["--trainer.callbacks.every_n_rollouts=2", "--model.fail_at=3"]
    assert fit("run", *options) == 1
    assert names("run") == ["rollout=000002.ckpt"]
    last = capfd.readouterr().err.splitlines()[-1]
    assert last.startswith("last checkpoint run/checkpoints/rollout=000002.ckpt; continue with: gs")
    assert last.endswith("--ckpt_path last")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("error", "rank", "expected"),
    [
        pytest.param("one line", 0, "error: the loss is nan", marks=pytest.mark.kills),
        (
            "killed",
            1,
            r"error: rank 1 \(process \d+\) was killed by SIGKILL, perhaps for want of memory",
        ),
    ],
)
def test_of_two_ranks_the_one_that_fails_is_named_once(error, rank, expected):
    """As users start two ranks: the first process starts the other one."""
    options = ["--trainer.devices=2", "--trainer.strategy=ddp", "--trainer.default_root_dir=run"]
    options += [
        "--trainer.callbacks+=support.dummies.FailsOnRank",
        f"--trainer.callbacks.rank={rank}",
        f"--trainer.callbacks.error={error}",
    ]
    environment = os.environ | {"PYTHONPATH": PYTHONPATH}
    command = [sys.executable, ROOT / "train.py", "fit", "--config", "run.yaml", *options]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 1, done.stderr
    assert "Traceback" not in done.stderr and "zombies" not in done.stderr
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1 and re.fullmatch(expected, errors[0]), done.stderr


class Process:
    """What a launcher holds of a rank that it has started."""

    pid = 77

    def __init__(self, returncode):
        self.returncode = returncode

    def poll(self):
        return self.returncode


@pytest.mark.parametrize(
    ("codes", "text"),
    [
        ([None, -11, None], "rank 2 (process 77) was killed by SIGSEGV"),
        ([-9, 0], "rank 1 (process 77) was killed by SIGKILL, perhaps for want of memory"),
        ([1, -15], "rank 1 (process 77) failed with exit code 1; see its line above; rank 2 "
         "(process 77) was killed by SIGTERM"),
        ([-50], "rank 1 (process 77) was killed by signal 50"),
        ([], "another rank is gone; if no line above says why, it was killed, perhaps for want of "
         "memory"),
    ],
)  # fmt: skip
def test_a_rank_that_is_gone_is_named_with_its_signal(codes, text):
    signals = StopSignals()
    launcher = SimpleNamespace(procs=[Process(code) for code in codes])
    signals._trainer = SimpleNamespace(strategy=SimpleNamespace(launcher=launcher), global_rank=0)
    assert signals.lost_ranks() == text


@pytest.mark.slow
def test_a_run_whose_terminal_is_gone_ends_as_if_it_were_there(straight):
    """Nobody reads its two streams any more; then the terminal hangs up, and its shell, too."""
    command = [sys.executable, ROOT / "train.py", "fit", "--config", "run.yaml"]
    command += ["--trainer.default_root_dir=run", "--trainer.enable_progress_bar=true"]
    command += send("on_before_optimizer_step", HUP, 4, times=2)
    environment = os.environ | {"PYTHONPATH": PYTHONPATH}
    process = subprocess.Popen(command, env=environment, stdout=-1, stderr=-1)
    process.stdout.close()
    process.stderr.close()
    assert process.wait() == 129
    assert names("run") == ["rollout=000004.ckpt"]
    log = Path("run/log.txt").read_text()
    assert "Traceback" not in log and "Logging error" not in log
    assert "standard output is gone (broken pipe): the run goes on, its lines are in run/l" in log
    for line in ("plan ", "validation after 3 steps", "saved ", "SIGHUP: stopped; last checkpoint"):
        assert f"\n{line}" in log
    assert fit("run", "--ckpt_path=auto") == 0
    assert_same(state("run", 6), state(straight, 6))


@pytest.mark.parametrize("number", [TERM, INT], ids=["TERM", "INT"])
def test_a_signal_while_libraries_are_imported_has_its_exit_code(number):
    process = subprocess.Popen([sys.executable, "-v", ROOT / "train.py", "fit"], stderr=-1)
    for line in process.stderr:  # -v reports each import
        if b"import 'torch" in line:
            break
    process.send_signal(number)
    process.stderr.read()
    process.stderr.close()
    assert process.wait() == 128 + number
