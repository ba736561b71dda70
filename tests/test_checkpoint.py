import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from dummies import Coefficient, DummyData, DummyModule, Stopper
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.loggers import TensorBoardLogger

from gspo_lightning.checkpoint import (
    AtomicCheckpointIO,
    RolloutCheckpoint,
    checkpoint_number,
    find_checkpoint,
    list_checkpoints,
)


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


def names(folder):
    return [path.name for path in list_checkpoints(folder)]


def assert_same(left, right, where="checkpoint"):
    """Bit-identical trees of plain values and tensors."""
    assert type(left) is type(right), where
    if isinstance(left, dict):
        assert left.keys() == right.keys(), where
        for key in left:
            assert_same(left[key], right[key], f"{where}/{key}")
    elif isinstance(left, list | tuple):
        assert len(left) == len(right), where
        for i, pair in enumerate(zip(left, right, strict=True)):
            assert_same(*pair, f"{where}/{i}")
    elif isinstance(left, torch.Tensor):
        assert torch.equal(left, right), where
    else:
        assert left == right, where


def state(folder, number):
    """Everything in a checkpoint but the counters of validation batches and names of log files."""
    file = Path(folder, "checkpoints", f"rollout={number:06d}.ckpt")
    checkpoint = torch.load(file, weights_only=True)
    assert checkpoint.pop("event_files")
    loops = checkpoint["loops"]["fit_loop"]
    checkpoint["loops"] = {k: v for k, v in loops.items() if "val_loop" not in k}
    return checkpoint


def scalars(folder):
    """{tag: [(step, value), ...]} as TensorBoard shows them."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder), size_guidance={"scalars": 0})
    events.Reload()
    return {
        # sorted: files opened within one second, as only tests do, are read in any order
        tag: sorted((point.step, point.value) for point in events.Scalars(tag))
        for tag in events.Tags()["scalars"]
    }


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


KILLED = """
import sys
sys.path.insert(0, sys.argv[1])
from dummies import DummyModule
from test_checkpoint import fit
fit(sys.argv[2], module=DummyModule(kill_at=int(sys.argv[3])), ckpt="auto")
"""


@pytest.mark.slow
def test_a_run_killed_between_checkpoints_is_bit_identical_with_the_same_curves(straight, tmp_path):
    # Killed after the first of four optimizer steps of rollout 4 (checkpoint at 2, validation at 3)
    # and again in rollout 6, so points of rollouts 3, 4 and 5 are written twice.
    for kill_at, returncode in ((3, -signal.SIGKILL), (5, -signal.SIGKILL), (99, 0)):
        command = [sys.executable, "-c", KILLED, str(Path(__file__).parent), tmp_path, str(kill_at)]
        done = subprocess.run(command, capture_output=True, timeout=300, check=False)
        assert done.returncode == returncode, done.stderr.decode()
        if kill_at == 5:
            assert names(tmp_path) == ["rollout=000002.ckpt", "rollout=000004.ckpt"]
    assert_same(state(tmp_path, 6), state(straight, 6))
    assert scalars(tmp_path) == scalars(straight)


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


# ---- files -------------------------------------------------------------------------------------


def test_numbers_come_from_the_name_alone():
    assert checkpoint_number("a/rollout=000012.ckpt") == 12
    for foreign in ("last.ckpt", ".rollout=000012.ckpt.7.tmp", "rollout=12.ckpt.bak"):
        assert checkpoint_number(foreign) is None


def make(folder, *numbers):
    for number in numbers:
        path = Path(folder, "checkpoints", f"rollout={number:06d}.ckpt")
        AtomicCheckpointIO().save_checkpoint({"rollouts": number}, path)


def test_last_is_the_newest_complete_checkpoint_by_number(tmp_path):
    make(tmp_path, 90, 100, 20)
    folder = tmp_path / "checkpoints"
    whole = (folder / "rollout=000100.ckpt").read_bytes()
    (folder / "rollout=000200.ckpt").write_bytes(whole[:-30])  # cut while it was copied
    (folder / "mine.ckpt").write_bytes(whole)
    (folder / ".rollout=000300.ckpt.1.tmp").write_bytes(whole)
    assert find_checkpoint(tmp_path, "last").name == "rollout=000100.ckpt"
    assert find_checkpoint(tmp_path, "auto").name == "rollout=000100.ckpt"


def test_without_a_checkpoint_auto_starts_fresh_and_last_is_an_error(tmp_path):
    assert find_checkpoint(tmp_path, None) is None
    assert find_checkpoint(tmp_path, "auto") is None
    with pytest.raises(ValueError, match=r"no checkpoint in .*checkpoints"):
        find_checkpoint(tmp_path, "last")


@pytest.mark.parametrize("choice", ["best", "nowhere/rollout=000001.ckpt", "torn.ckpt"])
def test_a_path_that_cannot_be_loaded_is_an_error(tmp_path, monkeypatch, choice):
    monkeypatch.chdir(tmp_path)
    Path("torn.ckpt").write_bytes(b"PK\x03\x04")
    with pytest.raises(ValueError, match="ckpt_path"):
        find_checkpoint(tmp_path, choice)


def test_a_failed_save_leaves_the_old_file_and_no_other(tmp_path, monkeypatch):
    make(tmp_path, 1)
    path = tmp_path / "checkpoints" / "rollout=000001.ckpt"
    before = path.read_bytes()

    def half(checkpoint, file):
        file.write(b"half")
        raise OSError("no space left on device")

    monkeypatch.setattr(torch, "save", half)
    with pytest.raises(OSError, match="no space"):
        AtomicCheckpointIO().save_checkpoint({}, path)
    assert path.read_bytes() == before
    assert os.listdir(path.parent) == [path.name]


def test_the_temporary_file_lies_in_the_same_folder(tmp_path, monkeypatch):
    moves = []
    replace = os.replace
    monkeypatch.setattr(os, "replace", lambda a, b: (moves.append((a, b)), replace(a, b)))
    make(tmp_path, 1)
    [(source, target)] = moves
    assert Path(source).parent == Path(target).parent == tmp_path / "checkpoints"


def test_temporary_files_of_a_killed_save_are_removed(tmp_path):
    make(tmp_path, 1)
    torn = tmp_path / "checkpoints" / ".rollout=000002.ckpt.123.tmp"
    torn.write_bytes(b"half")
    fit(tmp_path, num_rollouts=1)
    assert not torn.exists()


def test_a_checkpoint_that_holds_code_is_refused(tmp_path):
    torch.save({"path": Path("x")}, tmp_path / "x.ckpt")
    with pytest.raises(Exception, match=r"[Ww]eights.only"):
        AtomicCheckpointIO().load_checkpoint(tmp_path / "x.ckpt")


@pytest.mark.parametrize("name", ["every_n_rollouts", "keep_last"])
def test_a_period_below_one_is_refused(name):
    with pytest.raises(ValueError, match=f"{name} must be at least 1, got 0"):
        RolloutCheckpoint(**{name: 0})
