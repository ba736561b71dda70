"""Two processes never train in the same folder."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

import train
from gspo_lightning.run.folder import find_leftovers
from gspo_lightning.run.launch import RANKS
from gspo_lightning.run.lock import FILE, RunLock, check_lock
from support.run_folder import names

CONFIG = """
trainer: {accelerator: cpu, enable_progress_bar: false, default_root_dir: run}
model: {class_path: support.dummies.DummyModule}
data: {class_path: support.dummies.DummyData, init_args: {num_rollouts: 3}}
"""
# what `RunLock.take` does, in a process that starts in no time
HOLDER = """
import fcntl, os, sys, time
file = os.open(sys.argv[1], os.O_RDWR | os.O_CREAT)
fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
os.write(file, f"{os.getpid()} on elsewhere".encode())
if os.fork() == 0:  # a worker of a loader, which outlives a kill by a while
    os.closerange(0, 3)
    time.sleep(10)
    os._exit(0)
print("taken", flush=True)
sys.stdin.read()
"""


@pytest.fixture(autouse=True)
def _folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("run.yaml").write_text(CONFIG)


@pytest.fixture
def holder():
    """Another process that trains in `run`."""
    Path("run").mkdir()
    command = [sys.executable, "-c", HOLDER, f"run/{FILE}"]
    process = subprocess.Popen(command, stdin=-1, stdout=-1, text=True)
    assert process.stdout.readline() == "taken\n"
    yield process
    process.kill()
    process.communicate()


def contents():
    return {str(p): p.read_bytes() for p in Path("run").rglob("*") if p.is_file()}


@pytest.mark.parametrize("option", ["", "--ckpt_path=auto"])
def test_a_folder_in_which_another_process_trains_is_refused(capsys, holder, option):
    temporary = Path("run/checkpoints/.rollout=000002.ckpt.1.tmp")  # it is about to be renamed
    temporary.parent.mkdir()
    temporary.write_bytes(b"half")
    before = contents()
    assert train.main(["fit", "--config", "run.yaml", *filter(None, [option])]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1
    assert err.startswith(f"error: run is being trained in by process {holder.pid} on elsewhere; ")
    assert "--trainer.default_root_dir NEW" in err
    assert contents() == before


def test_a_killed_process_has_nothing_any_more_though_its_children_live(holder):
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    assert Path("run", FILE).exists()
    assert train.main(["fit", "--config", "run.yaml"]) == 0
    assert names("run") == ["rollout=000003.ckpt"]
    assert not Path("run", FILE).exists()


def test_a_rehearsal_and_an_evaluation_need_no_lock(holder):
    for command in (["fit", "--trainer.fast_dev_run=1"], ["validate"]):
        assert train.main([command[0], "--config", "run.yaml", *command[1:]]) == 0


def test_the_file_names_the_process_and_goes_with_the_folders_that_were_made_for_it(tmp_path):
    lock = RunLock()
    lock.take(tmp_path / "a/b")
    assert (tmp_path / "a/b" / FILE).read_text().startswith(f"{os.getpid()} on ")
    lock.release()
    lock.release()
    assert os.listdir(tmp_path) == ["run.yaml"]


def test_a_training_holds_the_lock_to_its_end(monkeypatch):
    """Seen from another process, in the last hook of a run."""
    seen = []

    def look(*_):
        code = f"import fcntl; fcntl.lockf(open('run/{FILE}', 'r+'), fcntl.LOCK_EX | fcntl.LOCK_NB)"
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, check=False)
        seen.append(b"BlockingIOError" in done.stderr)

    monkeypatch.setattr("support.dummies.DummyModule.on_fit_end", look, raising=False)
    assert train.main(["fit", "--config", "run.yaml"]) == 0
    assert seen == [True]


def test_a_run_that_ended_while_this_one_was_being_loaded_is_not_overwritten(capsys, monkeypatch):
    """Between the first look at the folder and the lock."""

    def late(root):
        path = root / "checkpoints/rollout=000003.ckpt"
        path.parent.mkdir(parents=True)
        path.write_bytes(b"of another process")
        return find_leftovers(root)

    monkeypatch.setattr("gspo_lightning.run.folder.find_leftovers", late)
    assert train.main(["fit", "--config", "run.yaml"]) == 2
    assert "run already holds a run" in capsys.readouterr().err
    assert list(contents().values()) == [b"of another process"]


def test_where_there_are_no_locks_this_is_said_and_the_run_goes_on(capsys, monkeypatch):
    def no_locks(*_):
        raise OSError(37, "No locks available")

    monkeypatch.setattr("fcntl.lockf", no_locks)
    assert train.main(["fit", "--config", "run.yaml"]) == 0
    assert capsys.readouterr().err.startswith("run: the file system has no locks (No locks ava")


@pytest.mark.parametrize("name", [*RANKS, "NODE_RANK", "GROUP_RANK"])
def test_the_other_ranks_do_not_ask_for_the_folder_that_rank_0_has(holder, monkeypatch, name):
    """Refused, they would be gone, and rank 0 would wait for them."""
    monkeypatch.setenv(name, "0")
    with pytest.raises(ValueError, match="is being trained in by process"):
        check_lock(Path("run"))
    monkeypatch.setenv(name, "1")
    check_lock(Path("run"))
