"""A run folder, whatever stands in it and whatever happens to it."""

import os
import re
import shutil
import subprocess
from pathlib import Path
from types import SimpleNamespace

import pytest

import train
from gspo_lightning.checkpoint import places
from gspo_lightning.checkpoint.places import check_shared, local_folder
from support.command import enter, instantiated, refused, run
from support.repository import ROOT
from support.run_folder import assert_same, names, scalars, state

RUN = """
trainer:
  accelerator: cpu
  enable_progress_bar: false
  num_sanity_val_steps: 0
  callbacks:
    - {class_path: gspo_lightning.RolloutCheckpoint, init_args: {every_n_rollouts: 2}}
    - {class_path: gspo_lightning.SampleTable, init_args: {num_samples: 2}}
model: {class_path: support.rollout_dummies.RolloutDummy}
data: {class_path: support.rollout_dummies.RolloutData, init_args: {num_rollouts: 6}}
"""
FIT = "fit --config run.yaml --trainer.default_root_dir run"
HAPPENS = "--trainer.callbacks+=support.folder_events.Happens --trainer.callbacks.what="


@pytest.fixture(autouse=True)
def _folder(tmp_path, monkeypatch):
    enter(tmp_path, monkeypatch)
    Path("run.yaml").write_text(RUN)


def contents():
    """Every path here with what it leads to or holds."""
    found = {}
    for path in sorted(Path().rglob("*")):
        plain = path.is_file() and not path.is_symlink()
        found[str(path)] = path.read_bytes() if plain else path.is_symlink() and os.readlink(path)
    return found


# ---- what stands in it ---------------------------------------------------------------------------


def link(path):
    Path("valuable").write_text("")  # as a lock may be
    path.symlink_to("../valuable")


def hard_link(path):
    Path("valuable").write_text("")
    path.hardlink_to("valuable")


def file(path):
    path.write_text("mine")


MINE = "was not written by a run"
PLOT = " --trainer.callbacks+=gspo_lightning.CurvePlot --trainer.callbacks.path "
EXPORT = " --trainer.callbacks+=gspo_lightning.HFExport --trainer.callbacks.path "


@pytest.mark.parametrize(
    ("name", "make", "words", "option"),
    [
        *((".lock", make, f"run/.lock {MINE}", "") for make in (link, hard_link, os.mkfifo, file)),
        *((name, link, f"run/{name} is a link", "") for name in ("log.txt", "config.yaml")),
        ("samples.jsonl", os.mkfifo, "run/samples.jsonl is no ordinary file", ""),
        ("checkpoints", file, "run/checkpoints is a file", ""),
        *((name, file, f"run/{name} {MINE}", "") for name in ("versions.yaml", "curves.png")),
        ("source", Path.mkdir, f"run/source {MINE}", ""),
        ("export", file, "run/export is a file", EXPORT + "export"),
        ("plots", file, "run/plots is no folder", PLOT + "plots/a.png"),
        ("c.png", Path.mkdir, "run/c.png is a folder", PLOT + "c.png"),
    ],
)
def test_what_stands_in_the_way_is_named_and_left_alone(capsys, name, make, words, option):
    Path("run").mkdir()
    make(Path("run", name))
    before = contents()
    line = refused(capsys, FIT + option)
    assert words in line and "--trainer.default_root_dir NEW" in line
    assert contents() == before


OWN = ["samples.jsonl", "./config.yaml", "checkpoints/rollout=000004.ckpt", "faults/a", ".lock"]


@pytest.mark.parametrize(
    "path", [*OWN, "log.txt", "events.out.tfevents.1", "a\0b", "..", 201 * "x", "\ud800"]
)
@pytest.mark.parametrize("callback", ["CurvePlot", "HFExport", "PredictionWriter"])
def test_a_callback_cannot_write_over_the_runs_own_files(callback, path):
    kind = getattr(__import__("gspo_lightning.callbacks", fromlist=[callback]), callback)
    with pytest.raises(ValueError, match=r"^path .*(own files|inside the run folder|UTF-8)"):
        kind(path=path)


def test_a_run_folder_is_one_place_on_a_disk(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", "/home/somebody")
    monkeypatch.setenv("SCRATCH", "/scratch")
    for path, absolute in {
        "a/../b": tmp_path / "b",
        "~/a": Path("/home/somebody/a"),
        "$SCRATCH/a": Path("/scratch/a"),
    }.items():
        assert local_folder(path) == absolute
    for path in (
        "s3://x/y",
        "file:///x",
        "gs:/x",
        "$MISSING/a",
        "a\0b",
        "",
        None,
        "x/" + 256 * "é",
        "\udcff",
    ):
        with pytest.raises(ValueError, match=r"^trainer.default_root_dir(: | is empty)"):
            local_folder(path)


def test_the_page_names_the_runs_own_files():
    page = (ROOT / "docs" / "safety.md").read_text()
    named = re.findall(
        "`(.*?)/?`", page.partition("**What stands in it.**")[2].partition("A call")[0]
    )
    assert {*named} == {*places.FILES, *places.FOLDERS, places.EVENTS, ".lock"}


def test_a_folder_of_a_logger_is_read_as_the_runs_own(tmp_path, monkeypatch):
    """A relative one with a variable, once joined to the working folder, would lead elsewhere."""
    monkeypatch.setenv("SCRATCH", str(tmp_path / "scratch"))
    words = "--config run.yaml --trainer.logger TensorBoardLogger --trainer.logger.save_dir"
    made = instantiated(*words.split(), "$SCRATCH/curves", "--trainer.logger.name=a")
    assert made.trainer.logger.root_dir == str(tmp_path / "scratch/curves/a")


def test_an_address_is_no_run_folder(capsys):
    before = contents()
    line = refused(capsys, "fit --config run.yaml --trainer.default_root_dir s3://x/y")
    assert line.startswith("trainer.default_root_dir: s3://x/y is an address")
    assert contents() == before


# ---- what happens to it --------------------------------------------------------------------------


def test_a_relative_folder_keeps_its_meaning_when_the_working_folder_changes(capsys, tmp_path):
    option = f"{HAPPENS}wander{PLOT}c.png{EXPORT}model --trainer.logger CSVLogger "
    code, _, err = run(capsys, f"{FIT} {option} --trainer.logger.save_dir logs --model.fail_at 5")
    os.chdir(tmp_path)
    assert code == 1, err
    assert err.splitlines()[-1].startswith("last checkpoint run/checkpoints/rollout=000004.ckpt;")
    assert os.listdir("elsewhere") == []
    assert "5" in Path("logs/lightning_logs/version_0/metrics.csv").read_text()
    assert len(Path("run/samples.jsonl").read_text().splitlines()) == 10


@pytest.mark.parametrize(
    ("what", "words"),
    [
        ("remove", "was removed during the run, and nothing is left to go on from"),
        ("move", "was moved to moved during the run; go on there with --trainer.default_root_dir"),
        ("replace", "was moved to moved during the run"),
        ("lead_elsewhere", "was moved to real during the run"),
    ],
)
def test_a_run_without_its_folder_ends_in_one_line(capsys, what, words):
    if what == "lead_elsewhere":
        Path("real").mkdir()
        Path("run").symlink_to("real")
    code, out, err = run(capsys, f"{FIT} {HAPPENS}{what}")
    assert (code, out, err.count("\n")) == (1, "", 1), err
    assert err.startswith("error: the run folder run ") and words in err
    left = {"moved": "moved", "real": "real"}.get(words.split(" ")[3])
    if left:
        assert names(left) == ["rollout=000002.ckpt"]
        assert not Path(left, ".lock").exists()
    assert not Path("run/checkpoints").exists()
    if what == "move":
        again = f"{FIT} --trainer.default_root_dir moved --ckpt_path last"
        assert run(capsys, again)[0] == 0 and names("moved")[-1] == "rollout=000006.ckpt"


@pytest.fixture
def small_disk():
    """A file system of its own in `run`; called with its mount options."""
    Path("run").mkdir()

    def mount(*options):
        command = ["mount", "-t", "tmpfs", "-o", ",".join(options), "tmpfs", "run"]
        try:
            done = subprocess.run(command, capture_output=True, text=True, check=False)
        except FileNotFoundError:
            pytest.skip("there is no mount here")
        if done.returncode:
            pytest.skip(f"nothing can be mounted here: {done.stderr.strip()}")

    yield mount
    while os.path.ismount("run"):
        subprocess.run(["umount", "run"], check=True)


def test_a_disk_that_is_full_to_its_last_block_is_one_line(capsys, small_disk):
    """Also to the log, whose copy of that very line does not fit."""
    small_disk("size=1m")
    code, _, err = run(capsys, f"{FIT} {HAPPENS}fill")
    assert code == 1 and "Traceback" not in err
    error, go_on = err.splitlines()
    assert error.startswith("error: ") and "no space left" in error
    assert go_on.startswith("last checkpoint run/checkpoints/rollout=000002.ckpt; continue with: ")
    assert not Path("run/.lock").exists()
    Path("run/filler").unlink()
    assert run(capsys, f"{FIT} --ckpt_path last")[0] == 0
    assert run(capsys, FIT.replace("dir run", "dir straight"))[0] == 0
    assert_same(state("run", 6), state("straight", 6))


def test_a_disk_that_cannot_be_written_to_is_one_line(capsys, small_disk):
    small_disk("size=1m")
    Path("run/.lock").write_text("1 on a machine that was switched off\n")
    small_disk("remount", "ro")
    line = refused(capsys, FIT)
    assert line.startswith(
        "trainer.default_root_dir: cannot write run/.lock: Read-only file system"
    )
    Path("run").is_mount()


# ---- logs that were damaged ----------------------------------------------------------------------


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """The folder of a run that failed in rollout 5, after the checkpoint of 4, and a whole one."""
    folder = tmp_path_factory.mktemp("runs")
    with pytest.MonkeyPatch.context() as patch:
        enter(folder, patch)
        Path("run.yaml").write_text(RUN)
        for name, option in (("run", "--model.fail_at 4"), ("whole", "--model.fail_at null")):
            command = FIT.replace("dir run", f"dir {name}") + f" {option}"
            assert train.main(command.split()) == (1 if name == "run" else 0)
    return folder


def events(folder):
    [path] = Path(folder).glob("events.out.tfevents.*")
    return path


def delete_events(_):
    events("run").unlink()


def flip(place):
    def flip_bit(_):
        data = bytearray(events("run").read_bytes())
        data[place] ^= 4
        events("run").write_bytes(data)

    return flip_bit


def cut_events(_):
    path = events("run")
    path.write_bytes(path.read_bytes()[:-700])


def cut_config(_):
    path = Path("run/config.yaml")
    path.write_bytes(path.read_bytes()[:333] + b"\xff: [")


def cut_samples(_):
    """Rollouts 0 to 3 have two lines each, and rollout 4 was not finished."""
    path = Path("run/samples.jsonl")
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"junk\n{}\n\xff\n" + b"".join(lines[3:]))


@pytest.mark.filterwarnings("always:.*(TensorBoard points|could not be read)")
@pytest.mark.parametrize(
    ("damage", "words", "lost"),
    [
        (delete_events, "tfevents", 99),
        (cut_events, "was damaged and is mended", 20),
        (flip(400), "was damaged and is mended", 1),
        (flip(3), "was damaged and is mended", 1),  # a length, in the first record
        (cut_config, "run/config.yaml is damaged", 0),
        (cut_samples, "samples.jsonl: 3 lines could not be read and were left out; of the 8", 0),
        (lambda _: Path("run/samples.jsonl").unlink(), "up to rollout 4 8 are missing", 0),
        (lambda _: None, "continuing from", 0),
    ],
    ids=["gone", "cut", "flipped", "length", "config", "samples", "no samples", "nothing"],
)
def test_a_damaged_log_is_said_and_never_in_the_way(capsys, runs, damage, words, lost):
    shutil.copytree(runs / "run", "run")
    damage(None)
    Path("run/events.out.tfevents.mine").write_text("not of this program")
    code, _, err = run(capsys, f"{FIT} --ckpt_path last --model.fail_at null --accept_changes true")
    assert code == 0 and words in err and "Traceback" not in err, err
    assert Path("run/events.out.tfevents.mine").read_text() == "not of this program"
    left, right = state("run", 6), state(runs / "whole", 6)
    for checkpoint in (left, right):
        checkpoint["callbacks"].pop("SampleTable")  # the number of lines, of which some are lost
    assert_same(left, right)
    Path("run/events.out.tfevents.mine").unlink()
    left, right = scalars("run"), scalars(runs / "whole")
    points = {(tag, *point) for tag in left for point in left[tag]}
    whole = {(tag, *point) for tag in right for point in right[tag]}
    assert points <= whole and len(whole - points) <= lost
    assert {point for point in whole if point[1] > 4} <= points
    assert sum(map(len, left.values())) <= sum(map(len, right.values()))  # none twice


# ---- several machines ----------------------------------------------------------------------------


class Ranks:
    """The strategy of a rank: it is told the token and what the others have seen."""

    def __init__(self, others):
        self.others = others

    def broadcast(self, value):
        return "1"

    def barrier(self, name):
        pass

    def reduce_boolean_decision(self, decision, all):
        return decision and self.others


def test_ranks_that_do_not_see_one_folder_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(places, "TOKEN_SECONDS", 0)
    (tmp_path / "shared").mkdir()
    (tmp_path / "shared/.token-1").touch()

    def rank(number, folder, others=True):
        strategy = Ranks(others)
        return SimpleNamespace(
            world_size=2, global_rank=number, is_global_zero=number == 0, strategy=strategy
        ), tmp_path / folder

    check_shared(*rank(1, "shared"))
    with pytest.raises(ValueError, match="is not seen by rank 1; name one on a file system that"):
        check_shared(*rank(1, "own"))
    with pytest.raises(ValueError, match="is seen by rank 0; name one"):
        check_shared(*rank(0, "new", others=False))
    assert not (tmp_path / "new").exists()
    check_shared(*rank(0, "new"))
    assert os.listdir(tmp_path / "new") == []


def test_only_a_folder_of_a_network_is_waited_for(tmp_path, monkeypatch):
    mounts = tmp_path / "mountinfo"
    monkeypatch.setattr(places, "MOUNTS", mounts)
    assert not places.is_local(tmp_path)
    mounts.write_text(
        f"27 1 8:1 / / rw,relatime shared:1 - ext4 /dev/a rw\n"
        f"31 27 0:9 / {tmp_path}/net rw - nfs4 host:/runs rw\n"
    )
    assert places.is_local(tmp_path / "own/run") and not places.is_local(tmp_path / "net/run")
