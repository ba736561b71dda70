"""Checkpoint files: whole or not at all, and every kind of damage is noticed."""

import errno
import os
import random
import shutil
import zipfile
from pathlib import Path

import pytest
import torch

from gspo_lightning.checkpoint.files import find_checkpoint
from gspo_lightning.checkpoint.io import (
    AtomicCheckpointIO,
    CheckpointError,
    damage,
    disk_fault,
    is_sealed,
)
from support.full_disk import FullDisk


def content(number=1):
    generator = torch.Generator().manual_seed(number)
    return {
        "rollouts": number,
        "state_dict": {"a": torch.randn(40, 3, generator=generator), "b": torch.ones(())},
        "optimizer_states": [{"state": {0: {"step": torch.tensor(3.0)}}, "betas": [0.9, 0.99]}],
        "names": ["x", None, True, 1.5],
    }


def save(folder, number=1):
    path = Path(folder, "checkpoints", f"rollout={number:06d}.ckpt")
    AtomicCheckpointIO().save_checkpoint(content(number), path)
    return path


def test_torch_alone_loads_a_checkpoint_and_unzip_finds_it_in_order(tmp_path):
    path = save(tmp_path)
    loaded = torch.load(path, weights_only=True)
    assert torch.equal(loaded["state_dict"]["a"], content()["state_dict"]["a"])
    assert loaded["names"] == ["x", None, True, 1.5]
    assert zipfile.ZipFile(path).testzip() is None


def test_the_same_content_is_the_same_file(tmp_path):
    assert save(tmp_path / "a").read_bytes() == save(tmp_path / "b").read_bytes()


# ---- damage --------------------------------------------------------------------------------------


def damaged_copies(data: bytes):
    """(name, bytes): 20 truncations, a flipped bit at 200 places, and other files."""
    places = random.Random(0)
    size = len(data)
    for i in range(20):
        cut = 1 + i if i < 5 else places.randrange(size)  # the seal is in the last bytes
        yield f"without the last {cut} of {size} bytes", data[: size - cut]
    ends = [*range(40), *range(size - 140, size)]  # the first record, the archive's index, the seal
    for place in ends + [places.randrange(size) for _ in range(20)]:
        flipped = bytearray(data)
        flipped[place] ^= 1 << places.randrange(8)
        yield f"bit flipped in byte {place}", bytes(flipped)
    yield "empty", b""
    yield "zeros", bytes(size)
    yield "a text", b"not a checkpoint, but long enough to be one\n" * 40
    yield "more at the end", data + b"\0"
    yield "twice", data[:-29] + data
    other = bytearray(data)
    other[1000:1100] = bytes(100)  # a hole, as a power cut leaves
    yield "a hole", bytes(other)


def test_every_damage_is_noticed_named_and_gone_around(tmp_path):
    """The matrix: none of the damaged files is loaded, by name or by `auto`."""
    good, bad = save(tmp_path, 1), save(tmp_path, 2)
    data = bad.read_bytes()
    tried = 0
    for name, broken in damaged_copies(data):
        bad.write_bytes(broken)
        assert damage(bad) is not None, name
        with pytest.warns(UserWarning, match=r"rollout=000002.ckpt is (cut off|damaged)"):
            assert find_checkpoint(tmp_path, "auto") == good, name
        with pytest.raises(ValueError, match=r"rollout=000002.ckpt is (cut off|damaged)"):
            find_checkpoint(tmp_path, str(bad))
        with pytest.raises(ValueError, match=r"ckpt_path: .*rollout=000002.ckpt is"):
            AtomicCheckpointIO().load_checkpoint(bad)
        tried += 1
    assert tried == 226
    bad.write_bytes(data)
    assert damage(bad) is None and find_checkpoint(tmp_path, "auto") == bad


def test_a_folder_and_a_checkpoint_of_another_program_are_refused(tmp_path):
    good = save(tmp_path, 1)
    folder = good.with_name("rollout=000002.ckpt")
    folder.mkdir()
    with pytest.warns(UserWarning, match="is not a file"):
        assert find_checkpoint(tmp_path, "auto") == good
    folder.rmdir()
    torch.save(content(), folder)
    assert not is_sealed(folder)
    with pytest.raises(ValueError, match="no checkpoint of this trainer"):
        find_checkpoint(tmp_path, str(folder))


class Evil:
    """Runs code when it is unpickled."""

    def __reduce__(self):
        return os.mkdir, ("hacked",)


def test_a_checkpoint_that_holds_code_is_refused_and_the_code_not_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for number, value in enumerate([Evil(), Path("x"), {"deep": [Evil()]}], start=1):
        path = tmp_path / f"rollout={number:06d}.ckpt"
        AtomicCheckpointIO().save_checkpoint({"rollouts": 1, "value": value}, path)
        assert damage(path) is None  # it is what was written; that does not make it safe
        with pytest.raises(Exception, match=r"[Ww]eights.only"):
            AtomicCheckpointIO().load_checkpoint(path)
    assert not Path("hacked").exists()


# ---- writing -------------------------------------------------------------------------------------


def test_the_temporary_file_lies_in_the_same_folder(tmp_path, monkeypatch):
    moves = []
    replace = os.replace
    monkeypatch.setattr(os, "replace", lambda a, b: (moves.append((a, b)), replace(a, b)))
    save(tmp_path)
    [(source, target)] = moves
    assert Path(source).parent == Path(target).parent == tmp_path / "checkpoints"


def test_file_then_name_then_folder_reach_the_disk_in_this_order(tmp_path, monkeypatch):
    """A name that reaches the disk before its bytes would be an empty file after a power cut."""
    save(tmp_path, 1)
    order = []
    fsync, replace = os.fsync, os.replace

    def spy(number):
        order.append(Path(os.readlink(f"/proc/self/fd/{number}")).name)
        fsync(number)

    monkeypatch.setattr(os, "fsync", spy)
    monkeypatch.setattr(os, "replace", lambda a, b: (order.append("rename"), replace(a, b)))
    save(tmp_path, 2)
    assert order == [f".rollout=000002.ckpt.{os.getpid()}.tmp", "rename", "checkpoints"]


@pytest.mark.filterwarnings("ignore:.*multi-threaded.*:DeprecationWarning")
def test_tensors_are_streamed_to_the_disk_without_a_copy(tmp_path):
    """64 MiB are saved while memory grows by less than a tenth of that."""
    tensors = {"state_dict": {str(i): torch.ones(2**20) for i in range(16)}}  # 4 MiB each
    child = os.fork()
    if child == 0:  # a process of its own: its peak starts at what it has now
        import resource

        code = 1
        try:
            start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
            AtomicCheckpointIO().save_checkpoint(tensors, tmp_path / "a.ckpt")
            grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - start  # KiB
            code = 0 if grown < 6 * 1024 else 2
        finally:
            os._exit(code)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert damage(tmp_path / "a.ckpt") is None


def test_a_disk_that_fills_up_at_any_byte_leaves_the_older_checkpoints(tmp_path, monkeypatch):
    whole = save(tmp_path, 1).read_bytes()
    replaced = save(tmp_path, 2)
    before = replaced.read_bytes()
    opened = Path.open
    size = len(whole)
    for room in [*range(0, size, size // 20), size - 29, size - 1]:
        with monkeypatch.context() as patch:
            patch.setattr(
                Path, "open", lambda self, *a, room=room, **k: FullDisk(opened(self, *a, **k), room)
            )
            with pytest.raises(
                CheckpointError, match=r"rollout=000002.ckpt was not written: no sp"
            ):
                save(tmp_path, 2)
        assert replaced.read_bytes() == before
        assert sorted(os.listdir(replaced.parent)) == ["rollout=000001.ckpt", "rollout=000002.ckpt"]


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_without_permission_is_one_line(tmp_path):
    path = save(tmp_path, 1)
    path.parent.chmod(0o500)
    with pytest.raises(CheckpointError, match="was not written: permission denied"):
        save(tmp_path, 2)


def test_an_interrupt_in_the_middle_of_a_save_is_not_hidden_by_torch(tmp_path, monkeypatch):
    path = save(tmp_path, 1)
    before = path.read_bytes()

    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("gspo_lightning.checkpoint.io._Sealed._pass", interrupt)
    with pytest.raises(KeyboardInterrupt):
        save(tmp_path, 1)
    assert path.read_bytes() == before and os.listdir(path.parent) == [path.name]


def test_the_room_that_is_left_is_told(tmp_path, monkeypatch):
    usage = shutil._ntuple_diskusage(4 * 2**30, 4 * 2**30 - 2**27, 2**27)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)

    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(CheckpointError, match=r"left on device \(0.1 of 4.0 GiB free\); those"):
        save(tmp_path)


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (
            OSError(errno.ENOSPC, "No space left on device", "a.jsonl"),
            "no space left on device: a.",
        ),
        (OSError(errno.EDQUOT, "Disk quota exceeded"), "disk quota exceeded; the checkpoints"),
        (OSError(errno.EIO, "Input/output error"), "input/output error; "),
        (  # what safetensors raises
            RuntimeError('I/O error: Os { code: 28, kind: StorageFull, message: "No space" }'),
            "no space left on device; ",
        ),
        (RuntimeError("File too large (os error 27)"), "file too large; "),
        (OSError(errno.ENOENT, "No such file or directory"), None),
        (RuntimeError("index 28 is out of bounds"), None),
    ],
)
def test_a_full_disk_is_known_whoever_met_it(error, line):
    found = disk_fault(error)
    assert found is None if line is None else found.startswith(line)


def test_a_full_disk_is_known_behind_another_error():
    try:
        try:
            raise OSError(errno.ENOSPC, "No space left on device")
        except OSError as error:
            raise RuntimeError("the writer thread died") from error
    except RuntimeError as error:
        assert disk_fault(error).startswith("no space left on device")
