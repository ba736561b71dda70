import math
import os
from pathlib import Path
from typing import ClassVar

import pytest
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.loggers import TensorBoardLogger

from gspo_lightning.checkpoint.files import checkpoint_number, find_checkpoint
from gspo_lightning.checkpoint.io import AtomicCheckpointIO
from gspo_lightning.checkpoint.rollout_checkpoint import RolloutCheckpoint
from support.dummies import Coefficient, DummyData, DummyModule, Stopper
from support.run_folder import assert_same, names, scalars, state


def fit(folder, *, num_rollouts=6, ckpt=None, with_val=True, callbacks=(), module=None, **trainer):
    """Train the dummy in `folder`; every=2 unless a RolloutCheckpoint is given."""
    callbacks = [Coefficient(), *callbacks]
    if not any(isinstance(c, RolloutCheckpoint) for c in callbacks):
        callbacks.append(RolloutCheckpoint(every_n_rollouts=2, keep_last=99))
    module = module or DummyModule()
    settings = {
        "max_epochs": 1,
        "val_check_interval": 3 if num_rollouts >= 3 else 1,
        "default_root_dir": folder,
        "logger": TensorBoardLogger(folder, name="", version="", default_hp_metric=False),
        "log_every_n_steps": 1,
        "plugins": [AtomicCheckpointIO()],
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "accelerator": "cpu",
    } | trainer
    trainer = Trainer(callbacks=callbacks, **settings)
    data = DummyData(num_rollouts, with_val)
    trainer.fit(module, datamodule=data, ckpt_path=find_checkpoint(folder, ckpt))
    return trainer, module


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    """Six rollouts without a stop, validation after 3 and 6, a checkpoint at every boundary."""
    folder = tmp_path_factory.mktemp("straight")
    fit(folder, callbacks=[RolloutCheckpoint(every_n_rollouts=1, keep_last=99)])
    return folder


def test_a_checkpoint_is_named_by_the_rollouts_completed(tmp_path):
    fit(tmp_path, num_rollouts=5)
    assert names(tmp_path) == [
        "rollout=000002.ckpt",
        "rollout=000004.ckpt",
        "rollout=000005.ckpt",  # the end
    ]


def test_a_program_that_names_no_plugin_gets_sealed_files_all_the_same(tmp_path):
    fit(tmp_path, num_rollouts=2, plugins=None)
    assert names(tmp_path) == ["rollout=000002.ckpt"]


def test_save_at_end_can_be_switched_off(tmp_path):
    fit(tmp_path, num_rollouts=5, callbacks=[RolloutCheckpoint(2, save_at_end=False)])
    assert names(tmp_path) == ["rollout=000002.ckpt", "rollout=000004.ckpt"]


def test_only_the_newest_checkpoints_are_kept(tmp_path):
    fit(tmp_path, callbacks=[RolloutCheckpoint(every_n_rollouts=1, keep_last=2)])
    assert names(tmp_path) == ["rollout=000005.ckpt", "rollout=000006.ckpt"]


def test_old_checkpoints_stay_until_the_new_one_is_complete(tmp_path, monkeypatch):
    seen = []
    save = AtomicCheckpointIO.save_checkpoint

    def spy(self, checkpoint, path, storage_options=None):
        seen.append(names(tmp_path))
        save(self, checkpoint, path, storage_options)

    monkeypatch.setattr(AtomicCheckpointIO, "save_checkpoint", spy)
    fit(tmp_path, num_rollouts=3, callbacks=[RolloutCheckpoint(every_n_rollouts=1, keep_last=1)])
    assert seen == [[], ["rollout=000001.ckpt"], ["rollout=000002.ckpt"]]


def test_a_checkpoint_is_written_after_the_validation_that_is_due(tmp_path):
    order = []

    class Watch(Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            order.append(f"rollout {batch_idx + 1}")

        def on_validation_end(self, trainer, pl_module):
            if not trainer.sanity_checking:
                order.append("validation")

        def on_save_checkpoint(self, trainer, pl_module, checkpoint):
            order.append("save")

    fit(tmp_path, num_rollouts=3, callbacks=[Watch(), RolloutCheckpoint(every_n_rollouts=1)])
    assert order == ["rollout 1", "save", "rollout 2", "save", "rollout 3", "validation", "save"]


NO_ROWS = "ignore:Total length of `list` across ranks is zero"  # what `with_val=False` means


@pytest.mark.filterwarnings(NO_ROWS)
def test_without_validation_data_checkpoints_are_written_all_the_same(tmp_path):
    fit(tmp_path, with_val=False)
    assert names(tmp_path)[-1] == "rollout=000006.ckpt"


def test_frozen_models_are_not_in_a_checkpoint(straight):
    assert set(state(straight, 6)["state_dict"]) == {"policy.weight", "policy.bias"}


@pytest.mark.parametrize("stop", [1, 2, 3, 4, 5])
def test_a_run_stopped_anywhere_and_continued_is_bit_identical(straight, tmp_path, stop):
    fit(tmp_path, callbacks=[Stopper(stop)])
    assert names(tmp_path)[-1] == f"rollout={stop:06d}.ckpt"
    fit(tmp_path, ckpt="last")
    assert_same(state(tmp_path, 6), state(straight, 6))


def test_a_run_continued_twice_is_bit_identical(straight, tmp_path):
    fit(tmp_path, callbacks=[Stopper(2)])
    fit(tmp_path, callbacks=[Stopper(3)], ckpt="last")
    fit(tmp_path, ckpt="last")
    assert_same(state(tmp_path, 6), state(straight, 6))


@pytest.mark.filterwarnings(NO_ROWS)
@pytest.mark.parametrize("with_val", [True, False])
def test_a_finished_run_can_be_made_longer(straight, tmp_path, with_val):
    settings = {"with_val": with_val, "val_check_interval": 3}
    fit(tmp_path / "short", num_rollouts=3, **settings)
    fit(tmp_path / "short", num_rollouts=6, ckpt="last", **settings)
    fit(tmp_path / "long", num_rollouts=6, **settings)
    assert_same(state(tmp_path / "short", 6), state(tmp_path / "long", 6))


@pytest.mark.parametrize("num_rollouts", [3, 2])
def test_a_finished_run_trains_no_further(tmp_path, num_rollouts):
    fit(tmp_path, num_rollouts=3)
    before = state(tmp_path, 3)["state_dict"]
    trainer, module = fit(tmp_path, num_rollouts=num_rollouts, ckpt="last")
    assert_same(dict(module.state_dict()), dict(before))
    assert trainer.fit_loop.total_batch_idx == 2
    assert names(tmp_path)[-1] == "rollout=000003.ckpt"


def test_validation_may_be_rescheduled_on_continuing(straight, tmp_path):
    fit(tmp_path, callbacks=[Stopper(3)])
    fit(tmp_path, ckpt="last", val_check_interval=2)
    steps = [step for step, _ in scalars(tmp_path)["val/size"]]
    assert steps == [2, 3, 5]  # after rollouts 3 (old interval), 4 and 6


def test_several_epochs_continue_exactly(tmp_path):
    settings = {"num_rollouts": 3, "max_epochs": 3}
    fit(tmp_path / "straight", **settings)
    for stop in (2, 3, 5, 6, 7):
        fit(tmp_path / "stopped", callbacks=[Stopper(stop)], ckpt="auto", **settings)
    fit(tmp_path / "stopped", ckpt="last", **settings)
    left, right = state(tmp_path / "stopped", 9), state(tmp_path / "straight", 9)
    assert_same(left, right)


def test_automatic_optimization_continues_exactly(tmp_path):
    fit(tmp_path / "straight", module=DummyModule(automatic=True))
    fit(tmp_path / "stopped", module=DummyModule(automatic=True), callbacks=[Stopper(3)])
    fit(tmp_path / "stopped", module=DummyModule(automatic=True), ckpt="last")
    assert_same(state(tmp_path / "stopped", 6), state(tmp_path / "straight", 6))


def test_max_steps_counts_as_an_end(tmp_path):
    fit(tmp_path, max_steps=12, callbacks=[RolloutCheckpoint(every_n_rollouts=99)])
    assert names(tmp_path) == ["rollout=000003.ckpt"]


def test_a_rehearsal_leaves_no_checkpoint(tmp_path):
    fit(tmp_path, fast_dev_run=2)
    assert names(tmp_path) == []


def test_points_written_twice_show_once(straight, tmp_path):
    fit(tmp_path, callbacks=[RolloutCheckpoint(2, save_at_end=False), Stopper(3)])
    fit(tmp_path, ckpt="last")
    assert scalars(tmp_path) == scalars(straight)


def test_points_of_a_continuation_that_saved_nothing_show_once(straight, tmp_path):
    for rollout in (2, 3):
        with pytest.raises(RuntimeError, match="the reward function broke"):
            fit(tmp_path, ckpt="auto", module=DummyModule(fail_at=rollout))
    assert names(tmp_path) == ["rollout=000002.ckpt"]
    assert len(list(tmp_path.glob("events.out.tfevents.*"))) == 2
    fit(tmp_path, ckpt="last")
    assert len(list(tmp_path.glob("events.out.tfevents.*"))) == 2  # of the first and the last
    assert scalars(tmp_path) == scalars(straight)


@pytest.mark.parametrize("tail", [bytes(64), b"\x10\0\0\0\0\0\0\0" + b"?" * 40, b"\x10\0\0"])
def test_a_spoilt_end_of_the_curves_is_cut_off(straight, tmp_path, tail):
    """Zeros are what a power cut leaves; behind them TensorBoard would read no further."""
    fit(tmp_path, callbacks=[Stopper(3)])
    [file] = tmp_path.glob("events.out.tfevents.*")
    with file.open("ab") as stream:
        stream.write(tail)
    fit(tmp_path, ckpt="last")
    data = file.read_bytes()
    assert not data.endswith(tail) and scalars(tmp_path) == scalars(straight)


# ---- choosing ------------------------------------------------------------------------------------


def test_numbers_come_from_the_name_alone():
    assert checkpoint_number("a/rollout=000012.ckpt") == 12
    for foreign in ("last.ckpt", ".rollout=000012.ckpt.7.tmp", "rollout=12.ckpt.bak"):
        assert checkpoint_number(foreign) is None


def make(folder, *numbers):
    for number in numbers:
        path = Path(folder, "checkpoints", f"rollout={number:06d}.ckpt")
        AtomicCheckpointIO().save_checkpoint({"rollouts": number}, path)


def test_last_is_the_newest_checkpoint_by_number(tmp_path):
    make(tmp_path, 90, 100, 20)
    folder = tmp_path / "checkpoints"
    whole = (folder / "rollout=000100.ckpt").read_bytes()
    (folder / "mine.ckpt").write_bytes(whole)
    (folder / ".rollout=000300.ckpt.1.tmp").write_bytes(whole)
    assert find_checkpoint(tmp_path, "last").name == "rollout=000100.ckpt"
    assert find_checkpoint(tmp_path, "auto").name == "rollout=000100.ckpt"


@pytest.mark.parametrize("choice", ["auto", "last"])
def test_a_damaged_newest_checkpoint_is_named_and_the_one_before_it_used(tmp_path, choice):
    make(tmp_path, 90, 100)
    newest = tmp_path / "checkpoints" / "rollout=000100.ckpt"
    data = bytearray(newest.read_bytes())
    data[len(data) // 2] ^= 1
    newest.write_bytes(data)
    with pytest.warns(UserWarning, match=r"rollout=000100.ckpt is damaged.*the one before it"):
        assert find_checkpoint(tmp_path, choice).name == "rollout=000090.ckpt"


@pytest.mark.parametrize("choice", ["auto", "last"])
def test_when_every_checkpoint_is_damaged_nothing_starts_afresh(tmp_path, choice):
    make(tmp_path, 90)
    newest = tmp_path / "checkpoints" / "rollout=000090.ckpt"
    newest.write_bytes(newest.read_bytes()[:-30])
    with pytest.raises(ValueError, match=r"rollout=000090.ckpt is cut off.*no other is whole"):
        find_checkpoint(tmp_path, choice)


def test_without_a_checkpoint_auto_starts_fresh_and_last_is_an_error(tmp_path):
    assert find_checkpoint(tmp_path, None) is None
    assert find_checkpoint(tmp_path, "auto") is None
    with pytest.raises(ValueError, match=r"no checkpoint in .*checkpoints"):
        find_checkpoint(tmp_path, "last")


@pytest.mark.parametrize("choice", ["best", "hpc", "nowhere/rollout=000001.ckpt", "torn.ckpt"])
def test_a_path_that_cannot_be_loaded_is_an_error(tmp_path, monkeypatch, choice):
    monkeypatch.chdir(tmp_path)
    Path("torn.ckpt").write_bytes(b"PK\x03\x04")
    with pytest.raises(ValueError, match="ckpt_path"):
        find_checkpoint(tmp_path, choice)


def test_temporary_files_of_a_killed_save_are_removed(tmp_path):
    torn = tmp_path / "checkpoints" / ".rollout=000002.ckpt.123.tmp"
    torn.parent.mkdir()
    torn.write_bytes(b"half")
    fit(tmp_path, num_rollouts=1)
    assert not torn.exists()


@pytest.mark.parametrize("name", ["every_n_rollouts", "keep_last", "keep_best"])
def test_a_period_below_one_is_refused(name):
    with pytest.raises(ValueError, match=f"{name} must be >= 1, got 0"):
        RolloutCheckpoint(**{name: 0})


# ---- the best ------------------------------------------------------------------------------------


class Graded(DummyModule):
    """A validation figure that goes up and down with the rollouts completed."""

    figures: ClassVar = {1: 0.3, 2: 0.9, 3: 0.5, 4: 0.7, 5: math.nan, 6: 0.4}

    def on_validation_epoch_end(self):
        super().on_validation_epoch_end()
        done = self.trainer.fit_loop.total_batch_idx + 1
        self.log("val/grade", self.figures.get(done, 5.0))  # before training: does not count


def graded(folder, every=99, keep_last=1, ckpt=None, callbacks=(), **options):
    saver = RolloutCheckpoint(every, keep_last, monitor="val/grade", **options)
    callbacks = [saver, *callbacks]
    return fit(folder, callbacks=callbacks, module=Graded(), ckpt=ckpt, val_check_interval=1)


@pytest.mark.parametrize(
    ("options", "kept"),
    [
        ({}, [2, 6]),
        ({"keep_best": 2}, [2, 4, 6]),
        ({"mode": "min"}, [1, 6]),
        ({"mode": "min", "keep_best": 2}, [1, 6]),
        ({"keep_last": 3, "every": 1}, [2, 4, 5, 6]),
    ],
)
def test_the_best_checkpoints_stay_beside_the_newest(tmp_path, options, kept):
    graded(tmp_path, **options)
    assert names(tmp_path) == [f"rollout={n:06d}.ckpt" for n in kept]
    assert find_checkpoint(tmp_path, "last").name == "rollout=000006.ckpt"
    best = find_checkpoint(tmp_path, "best").name
    assert best == f"rollout={1 if options.get('mode') == 'min' else 2:06d}.ckpt"


@pytest.mark.parametrize(
    "content", [b"", b"kept: []", b"kept", b"{", b"kept: [{file: 3}]", b"\xff\xfe", b"kept: [{}]"]
)
def test_a_broken_list_of_the_best_is_named_with_the_way_out(tmp_path, content):
    (tmp_path / "checkpoints").mkdir()
    file = tmp_path / "checkpoints" / "best.yaml"
    file.write_bytes(content)
    with pytest.raises(ValueError, match=r"best.yaml does not say .*; use last, or a path"):
        find_checkpoint(tmp_path, "best")


def test_the_list_of_the_best_is_forced_to_the_disk_before_it_takes_the_old_ones_place(
    tmp_path, monkeypatch
):
    calls = []
    synced, replaced = os.fsync, os.replace

    def fsync(number):
        calls.append(("fsync", Path(os.readlink(f"/proc/self/fd/{number}")).name))
        synced(number)

    def replace(source, target):
        calls.append(("replace", Path(target).name))
        replaced(source, target)

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(os, "replace", replace)
    graded(tmp_path)
    last = len(calls) - 1 - calls[::-1].index(("replace", "best.yaml"))
    temporary = f".best.yaml.{os.getpid()}.tmp"
    assert calls[last - 1 : last + 2] == [
        ("fsync", temporary),
        ("replace", "best.yaml"),
        ("fsync", "checkpoints"),
    ]


def test_a_stopped_run_remembers_its_best_bit_for_bit(tmp_path):
    graded(tmp_path / "straight", keep_best=2)
    for stop in (1, 3, 4):
        graded(tmp_path / "stopped", ckpt="auto", callbacks=[Stopper(stop)], keep_best=2)
    graded(tmp_path / "stopped", ckpt="last", keep_best=2)
    assert names(tmp_path / "stopped") == names(tmp_path / "straight")
    assert_same(state(tmp_path / "stopped", 6), state(tmp_path / "straight", 6))


def test_a_validation_that_only_a_stop_brought_about_makes_no_best_one(tmp_path):
    def graded_by_three(ckpt=None, callbacks=()):
        saver = RolloutCheckpoint(2, monitor="val/grade")
        fit(tmp_path, callbacks=[saver, *callbacks], module=Graded(), ckpt=ckpt)

    graded_by_three(callbacks=[Stopper(2)])  # Lightning validates there: 0.9, the best of all
    graded_by_three(ckpt="last")
    assert find_checkpoint(tmp_path, "best").name == "rollout=000003.ckpt"


def test_a_branch_in_another_folder_has_best_ones_of_its_own(tmp_path):
    graded(tmp_path / "first", callbacks=[Stopper(3)])
    branch = tmp_path / "branch"
    fit(
        branch,
        callbacks=[RolloutCheckpoint(99, 1, monitor="val/grade")],
        module=Graded(),
        ckpt=tmp_path / "first" / "checkpoints" / "rollout=000003.ckpt",
        val_check_interval=1,
    )
    assert names(branch) == ["rollout=000004.ckpt", "rollout=000006.ckpt"]
    assert find_checkpoint(branch, "best").name == "rollout=000004.ckpt"


def test_a_figure_that_the_validation_has_not_is_refused_before_training(tmp_path):
    with pytest.raises(ValueError, match=r"monitor 'val/grad' is never logged.* val/\{size\}"):
        fit(tmp_path, callbacks=[RolloutCheckpoint(monitor="val/grad")])
    assert names(tmp_path) == []


def test_pruning_spares_what_was_written_before_a_damaged_newest(tmp_path):
    """Files later than the one just written are no reason to delete it or those before it."""
    fit(tmp_path, callbacks=[RolloutCheckpoint(2, 9)])
    newest = tmp_path / "checkpoints" / "rollout=000006.ckpt"
    whole = newest.read_bytes()
    newest.write_bytes(whole[:2000] + b"?" + whole[2001:])
    with pytest.warns(UserWarning, match="the one before it is used"):
        fit(tmp_path, ckpt="auto", callbacks=[RolloutCheckpoint(5, 1), Stopper(5)])
    assert names(tmp_path) == ["rollout=000005.ckpt", "rollout=000006.ckpt"]
    with pytest.warns(UserWarning, match="the one before it is used"):
        assert find_checkpoint(tmp_path, "auto").name == "rollout=000005.ckpt"


# ---- ends ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("stop", [2, 3, 4])
def test_a_run_bounded_by_max_steps_continues_exactly(tmp_path, stop):
    settings = {"max_steps": 16, "val_check_interval": 2}  # four rollouts of four steps
    fit(tmp_path / "straight", **settings)
    fit(tmp_path / "stopped", **settings | {"max_steps": 4 * stop})
    fit(tmp_path / "stopped", ckpt="last", **settings)
    assert_same(state(tmp_path / "stopped", 4), state(tmp_path / "straight", 4))
    assert scalars(tmp_path / "stopped") == scalars(tmp_path / "straight")


def test_the_end_of_training_is_made_up_for_when_max_steps_was_reached(tmp_path):
    """A run killed between its last checkpoint and its export has that export still to do."""

    class Ends(Callback):
        ends = 0

        def on_train_end(self, trainer, pl_module):
            self.ends += 1

    fit(tmp_path, max_steps=12)
    before = state(tmp_path, 3)
    again = Ends()
    trainer, module = fit(tmp_path, max_steps=12, ckpt="last", callbacks=[again])
    assert again.ends == 1 and trainer.max_steps == 12
    assert_same(dict(module.state_dict()), dict(before["state_dict"]))
    assert_same(state(tmp_path, 3), before)
