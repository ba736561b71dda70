"""What ends a run before its planned length: what is left, what is said, and how it goes on."""

import os
import re
import sys
from pathlib import Path

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.utilities import rank_zero_only

import train
from gspo_lightning.run.command import Watch
from gspo_lightning.run.ending import report
from support.command import DUMMY, enter, instantiated, refused
from support.dummies import DummyModule
from support.run_folder import assert_same, names, scalars, state


@pytest.fixture(autouse=True)
def _folder(tmp_path, monkeypatch):
    enter(tmp_path, monkeypatch)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)


SAVER = "[{class_path: gspo_lightning.RolloutCheckpoint, init_args: {every_n_rollouts: 99}}]"
COEFFICIENT = "--trainer.callbacks+=support.dummies.Coefficient"


def fit(folder, *options, length=6):
    common = [f"--trainer.callbacks={SAVER}", COEFFICIENT, f"--data.num_rollouts={length}"]
    where = f"--trainer.default_root_dir={folder}"
    return train.main(["fit", "--config=dummy.yaml", where, *common, *options])


def adding(name, **settings):
    key = "--trainer.callbacks"
    return [f"{key}+={name}", *(f"{key}.{k}={v}" for k, v in settings.items())]


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    """Six rollouts, validation after 3 and 6."""
    folder = tmp_path_factory.mktemp("straight")
    (folder / "dummy.yaml").write_text(DUMMY)
    here = os.getcwd()
    os.chdir(folder)
    assert fit(folder / "run") == 0
    os.chdir(here)
    return folder / "run"


# ---- trainer.should_stop -------------------------------------------------------------------------


class StopsAt(Callback):
    """Sets `should_stop` in one hook, once a number of rollouts is done."""

    def __init__(self, hook: str, rollout: int):
        self.rollout = rollout
        setattr(self, hook, self._stop)

    def _stop(self, trainer, *_, **__):
        done = trainer.fit_loop.total_batch_idx + 1
        if not trainer.sanity_checking and done == self.rollout:
            trainer.should_stop = True


class LateStops(DummyModule):
    """Stops in a hook that Lightning calls behind those of all callbacks."""

    def __init__(self, hook: str, rollout: int):
        super().__init__()
        self.rollout = rollout
        setattr(self, hook, self._stop)

    def _stop(self, *_, **__):
        if self.trainer.fit_loop.total_batch_idx + 1 == self.rollout:
            self.trainer.should_stop = True


class Refuses(DummyModule):
    """Takes no batch after the second one."""

    def on_train_batch_start(self, batch, batch_idx):
        return -1 if batch_idx == 2 else None


@pytest.mark.parametrize(
    ("who", "hook", "rollout"),
    [
        ("callback", "on_validation_end", 3),
        ("module", "on_train_batch_end", 2),
        ("module", "on_train_batch_end", 3),  # with the validation that is due after it
        ("module", "on_validation_end", 3),
    ],
)
def test_a_stop_in_any_hook_leaves_a_checkpoint_and_a_line_and_loses_nothing(
    capfd, straight, who, hook, rollout
):
    options = adding("test_ends.StopsAt", hook=hook, rollout=rollout)
    if who == "module":
        options = ["--model=test_ends.LateStops", f"--model.hook={hook}"]
        options += [f"--model.rollout={rollout}"]
    assert fit("run", *options) == 0
    path = f"rollout={rollout:06d}.ckpt"
    assert names("run") == [path] and state("run", rollout)["epoch"] == 0
    name = {"callback": "StopsAt", "module": "LateStops"}[who]
    assert capfd.readouterr().err.startswith(
        f"stopped after {rollout} of 6 batches by {name}._stop, which set trainer.should_stop; "
        f"last checkpoint run/checkpoints/{path}; continue with: gspo fit"
    )
    assert fit("run", "--ckpt_path=auto", "--accept_changes=true") == 0
    now, before = state("run", 6), state(straight, 6)
    for checkpoint in (now, before):
        checkpoint.pop("fingerprints")  # the module's class is one of them
    assert_same(now, before)
    left = scalars("run")  # with the validation that a stop brings, which is a figure more
    assert all({*points} <= {*left[tag]} for tag, points in scalars(straight).items())


def test_a_module_that_takes_no_further_batch_leaves_what_is_whole(capfd):
    assert fit("run", "--model=test_ends.Refuses") == 0
    assert names("run") == ["rollout=000002.ckpt"]
    assert "stopped after 2 of 6 batches by a hook that took no" in capfd.readouterr().err
    assert (
        fit(
            "run",
            "--ckpt_path=auto",
            "--accept_changes=true",
            "--model=support.dummies.DummyModule",
        )
        == 0
    )
    assert names("run")[-1] == "rollout=000006.ckpt"


class Breaks(DummyModule):
    """Raises within its third batch."""

    def __init__(self, error: str):
        super().__init__(automatic=True)
        self.error = {"StopIteration": StopIteration, "exit": SystemExit(3)}[error]

    def _event(self, index):
        if index == 2:
            raise self.error


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        ("StopIteration", 1, "stopped after 2 of 6 batches by a StopIteration, which was raised "),
        ("exit", 3, f"stopped by sys.exit in _event ({__file__}, line "),
    ],
)
def test_what_ends_a_batch_in_its_middle_saves_nothing_of_it(capfd, error, code, line):
    options = ["--model=test_ends.Breaks", f"--model.error={error}"]
    assert fit("run", *options) == code
    assert names("run") == [] and not Path("run/finished").exists()
    err = capfd.readouterr().err
    assert err.startswith(line) and "there is no checkpoint yet; the same command starts ag" in err


class Loses(Callback):
    """Raises what Lightning takes for the end of the data, in a hook of the last batch."""

    def __init__(self, hook: str):
        setattr(self, hook, self._lose)

    def _lose(self, trainer, *_, **__):
        if trainer.fit_loop.total_batch_idx == 5:
            raise StopIteration


@pytest.mark.parametrize(("hook", "left"), [("validation", 6), ("train_batch", 5)])
def test_a_stop_iteration_of_a_hook_costs_no_checkpoint(capfd, hook, left):
    assert fit("run", *adding("test_ends.Loses", hook=f"on_{hook}_start")) == 0
    assert names("run") == [f"rollout={left:06d}.ckpt"]
    said = capfd.readouterr().err
    assert said.startswith(f"stopped after {left} of 6 batches by a ") == (left < 6)


def test_only_what_reached_its_length_is_marked_finished(capfd):
    """Without checkpoints the mark alone keeps a command from starting over."""
    none = ["--trainer.callbacks=[]", "--trainer.enable_checkpointing=false"]
    assert (
        fit("run", *none, *adding("test_ends.StopsAt", hook="on_train_batch_end", rollout=2)) == 0
    )
    assert "there is no checkpoint yet; the same command starts again" in capfd.readouterr().err
    assert not Path("run/finished").exists()
    assert fit("run", *none, "--ckpt_path=auto") == 0
    assert Path("run/finished").exists()


# ---- EarlyStopping, Timer, max_steps -------------------------------------------------------------


class Falls(DummyModule):
    """Its held-out figure falls from the first validation on."""

    def validation_step(self, batch, batch_idx):
        self.log("val/size", -float(self.trainer.global_step), batch_size=2)


STOPPING = ["--model=test_ends.Falls", "--trainer.val_check_interval=2"]
STOPPING += adding("lightning.pytorch.callbacks.EarlyStopping", monitor="val/size", mode="max")


def test_early_stopping_stands_for_as_long_as_its_settings_do(capfd):
    patience = "--trainer.callbacks.patience"
    assert fit("run", *STOPPING, f"{patience}=1", length=20) == 0
    (line,) = capfd.readouterr().err.splitlines()
    assert line.startswith(
        "stopped after 4 of 20 batches by EarlyStopping: Monitored metric val/size did not improve "
        "in the last 1 records. Best score: -8.000; change its settings to go on; last checkpoint "
        "run/checkpoints/rollout=000004.ckpt, and then continue with: gspo fit"
    )
    files = set(os.listdir("run"))
    assert fit("run", *STOPPING, f"{patience}=1", "--ckpt_path=last", length=20) == 0
    assert set(os.listdir("run")) == files
    line = capfd.readouterr().err.splitlines()[-1]
    assert line.startswith(
        "nothing to do: run/checkpoints/rollout=000004.ckpt was ended by EarlyStopping: Monitored "
    )
    assert names("run") == ["rollout=000004.ckpt"]
    assert fit("run", *STOPPING, f"{patience}=2", "--ckpt_path=auto", length=20) == 0
    assert "did not improve in the last 2 records" in capfd.readouterr().err
    assert names("run") == ["rollout=000004.ckpt", "rollout=000006.ckpt"]


def test_a_decision_at_the_end_of_an_epoch_is_in_its_checkpoint(capfd):
    stopping = [*STOPPING, "--trainer.callbacks.check_on_train_epoch_end=true"]
    stopping += ["--trainer.callbacks.patience=1", "--trainer.max_epochs=4"]
    assert fit("run", *stopping, length=2) == 0
    assert fit("run", *stopping, "--ckpt_path=auto", length=2) == 0
    assert "nothing to do" in capfd.readouterr().err
    assert names("run")[-1] == "rollout=000004.ckpt"


def test_a_time_limit_counts_over_all_parts_and_is_raised_to_go_on(capfd):
    limit = "--trainer.max_time"
    assert fit("run", f"{limit}={{seconds: 0}}") == 0
    line = capfd.readouterr().err
    assert line.startswith("stopped after 0 of 6 batches by the limit of 0:00:00 (trainer.max_time")
    assert "the same command starts again" in line and not Path("run/finished").exists()
    assert fit("run", f"{limit}={{milliseconds: 1}}") == 0
    assert names("run") == ["rollout=000001.ckpt"]
    assert fit("run", f"{limit}={{milliseconds: 1}}", "--ckpt_path=auto") == 0
    assert "rollout=000001.ckpt was ended by the limit of 0:00:00.001" in capfd.readouterr().err
    assert fit("run", f"{limit}=00:01:00:00", "--ckpt_path=auto") == 0
    assert names("run")[-1] == "rollout=000006.ckpt"


def test_overfit_batches_is_refused_with_what_does_it(capsys):
    line = refused(capsys, "fit --config dummy.yaml --trainer.overfit_batches 1")
    assert line.startswith("trainer.overfit_batches 1: ") and "in data.path" in line


def test_a_run_that_max_steps_ended_has_its_length(capfd):
    """The dummy makes four steps a rollout, and none is begun once there are as many."""
    steps = "--trainer.max_steps"
    assert fit("run", f"{steps}=6") == 0
    files = set(os.listdir("run"))
    assert fit("run", f"{steps}=6", "--ckpt_path=auto") == 0
    assert set(os.listdir("run")) == files
    first, *_, line = capfd.readouterr().err.splitlines()
    assert first == "ended by trainer.max_steps 6: 8 optimizer steps"
    assert line.startswith("nothing to do: run/checkpoints/rollout=000002.ckpt is the end of the")
    assert fit("run", f"{steps}=12", "--ckpt_path=auto") == 0
    assert names("run") == ["rollout=000002.ckpt", "rollout=000003.ckpt"]


# ---- ranks ---------------------------------------------------------------------------------------


def test_a_stop_of_one_rank_is_a_stop_of_all(capfd, monkeypatch):
    """Another rank than this one stops after its third rollout."""
    from lightning.pytorch.strategies import SingleDeviceStrategy

    stop = {"at": False}

    def decide(self, decision, all=True):
        return decision or (stop["at"] and sys._getframe(1).f_code.co_name == "agree_to_stop")

    class Tells(Callback):
        def on_train_batch_end(self, trainer, *_):
            stop["at"] = trainer.fit_loop.total_batch_idx + 1 == 3

    monkeypatch.setattr(SingleDeviceStrategy, "reduce_boolean_decision", decide)
    monkeypatch.setattr("test_ends.Tells", Tells, raising=False)
    assert fit("run", *adding("test_ends.Tells")) == 0
    assert names("run") == ["rollout=000003.ckpt"]
    assert "stopped after 3 of 6 batches by another rank, which set" in capfd.readouterr().err


def test_a_run_of_several_nodes_says_for_whom_it_waits_and_where(capsys, monkeypatch):
    nodes = ["--config=dummy.yaml", "--trainer.num_nodes=3"]
    instantiated(*nodes)
    line = capsys.readouterr().err
    port = re.match(r"node 0 of 3 waits at 127.0.0.1 port (\d+) for node 1, 2 \(trainer", line)[1]
    assert f"with MASTER_ADDR=127.0.0.1 MASTER_PORT={port} NODE_RANK=0 to 2; MASTER_ADDR is" in line
    for name, value in {
        "MASTER_ADDR": "10.0.0.1",
        "MASTER_PORT": "29500",
        "NODE_RANK": "1",
    }.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(rank_zero_only, "rank", 0)  # put back afterwards
    instantiated(*nodes)
    line = capsys.readouterr().err
    assert line.startswith("node 1 of 3 waits at 10.0.0.1 port 29500 for node 0, 2 (")
    assert line.endswith("NODE_RANK=0 to 2\n")


def test_nodes_that_never_come_are_one_line(capsys):
    text = "Timed out after 61 seconds waiting for clients. 1/2 clients joined.\nException raised"
    error = torch.distributed.DistStoreError(text)
    assert report(error, Watch(), lambda _: "") == 2
    assert capsys.readouterr().err == (
        "error: trainer.num_nodes: not all ranks came together: Timed out after 61 seconds waiting "
        "for clients. 1/2 clients joined.\n"
    )
