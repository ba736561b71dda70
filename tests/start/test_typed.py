"""The command in use, as advice names it."""

import sys

import pytest

from gspo_lightning.start import typed

TORCHRUN = {"TORCHELASTIC_RUN_ID": "none", "LOCAL_WORLD_SIZE": "2", "GROUP_WORLD_SIZE": "1"}
MACHINES = TORCHRUN | {"GROUP_WORLD_SIZE": "3"}
PACKAGE = "/lib/gspo_lightning/__main__.py"


@pytest.mark.parametrize(
    ("script", "environment", "expected"),
    [
        ("train.py", {}, "python train.py"),
        ("a b/train.py", {}, "python 'a b/train.py'"),
        (PACKAGE, {}, "python -m gspo_lightning"),
        ("/env/bin/gspo", {}, "gspo"),  # what the shell finds
        ("/other/bin/gspo", {}, "/other/bin/gspo"),
        ("{here}/env/bin/gspo", {}, "env/bin/gspo"),
        ("/lib/pytest/__main__.py", {}, "gspo"),
        ("train.py", TORCHRUN, "torchrun --nproc-per-node=2 train.py"),
        (PACKAGE, MACHINES, "torchrun --nnodes=3 --nproc-per-node=2 -m gspo_lightning"),
        ("/env/bin/gspo", TORCHRUN, "torchrun --nproc-per-node=2 --no-python gspo"),
    ],
)
def test_the_program_is_named_as_it_was_started(
    monkeypatch, tmp_path, script, environment, expected
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", [script.format(here=tmp_path)])
    monkeypatch.setattr(sys, "executable", "/env/bin/python")
    monkeypatch.setattr(typed.shutil, "which", lambda name: f"/env/bin/{name}")
    for name in MACHINES:
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert typed.program() == expected


def test_torchrun_and_machines_are_named_as_they_were_typed(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["train.py"])
    for name in ("OMP_NUM_THREADS", *TORCHRUN):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(typed, "this_python", lambda: "python")
    monkeypatch.setattr(typed, "ADDRESS", {"MASTER_ADDR": "a", "NODE_RANK": "0"})
    assert typed.again(["fit"]) == "MASTER_ADDR=a NODE_RANK=0 python train.py fit"
    slurm = {"PROCID": "0", "NTASKS": "16", "NTASKS_PER_NODE": "8", "NNODES": "2"}
    for name, value in slurm.items():
        monkeypatch.setenv(f"SLURM_{name}", value)
    assert typed.again(["fit"]) == "srun --nodes=2 --ntasks-per-node=8 python train.py fit"
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")  # as a task of srun
    monkeypatch.setenv("TORCH_DISABLE_SHARE_RDZV_TCP_STORE", "1")
    options = ["--nnodes", "2", "--max-restarts", "1"]
    words = ["/env/bin/python3", "/env/bin/torchrun", *options, "train.py", "fit"]
    monkeypatch.setattr(typed, "_words_of", lambda process: words)
    assert typed.again(["fit"]) == (
        "TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 torchrun --nnodes 2 --max-restarts 1 train.py fit"
    )


def test_python_is_named_as_it_is_reached_from_here(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    inside = str(tmp_path / ".venv/bin/python")
    monkeypatch.setattr(sys, "executable", inside)
    monkeypatch.setattr(typed.shutil, "which", lambda name: inside)
    assert typed.this_python() == "python"  # an activated environment
    monkeypatch.setattr(typed.shutil, "which", lambda name: None)
    assert typed.this_python() == ".venv/bin/python"
    monkeypatch.setattr(sys, "executable", "/opt/a b/python")
    assert typed.this_python() == "'/opt/a b/python'"


def test_a_command_is_repeated_with_its_number_of_threads(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["/lib/pytest/__main__.py"])
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    assert typed.again(["fit", "--config", "a b.yaml"]) == (
        "OMP_NUM_THREADS=1 gspo fit --config 'a b.yaml'"
    )
    monkeypatch.delenv("OMP_NUM_THREADS")
    assert typed.again(["fit"]) == "gspo fit"


def test_a_call_is_repeated_with_its_keywords_and_a_length_without_one_among_the_settings():
    words = ["fit", "--config", "a.yaml", "--trainer.max_steps", "8", "--ckpt_path", "last"]
    with typed.called("train"):
        assert typed.again(words) == (
            "train(..., ckpt_path='last', settings={'trainer.max_steps': 8})"
        )
