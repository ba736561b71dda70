"""Values of a wrong kind: the line names key, value and what is wanted, in words of the config."""

import os
import subprocess
import sys
import time

import pytest
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy

import train
from gspo_lightning.run import launch
from gspo_lightning.run.config_files import DEEPEST, check_config_file
from gspo_lightning.run.start_checks import set_timeout
from support.bad_input_cases import callback, model
from support.command import enter, refused
from support.repository import ROOT

ALIASES = "a: &a [1,1,1,1,1,1,1,1]\n" + "".join(
    f"{name}: &{name} [{','.join([f'*{before}'] * 8)}]\n"
    for before, name in zip("abcdefg", "bcdefgh", strict=True)
)


@pytest.fixture
def at_work(tmp_path, monkeypatch):
    enter(tmp_path, monkeypatch)


@pytest.mark.parametrize(
    ("overlay", "line"),
    [
        ("trainer: null", "trainer: expected settings, such as accelerator, strategy, "),
        ("trainer: {default_root_dir: null}", "trainer.default_root_dir is null; give a folder"),
        (model("advantages: null"), "model.advantages: expected one of normalized, relative, "),
        (model("reference: {device: null}"), "model.reference.device: expected str, got null"),
        (model("num_epochs: null"), "model.num_epochs: expected int, got null"),
        (
            model("evaluation: -1"),
            "model.evaluation: expected settings, such as correct, threshold",
        ),
        (model("policy: {path: null}"), "model: policy.path missing; set it in the config"),
        (
            model("policy: [x]"),
            "model.policy: expected settings, such as path, dtype, attention; got",
        ),
        ("model: {init_args: null}", "model: expected settings, such as `{name: value}`; got null"),
        (
            "model: {init_args: {rewards: {correct: {fn: {init_args: [1]}}}}}",
            "model.rewards.fn: expected settings",
        ),
        (
            "data: 3",
            "data: expected the class_path of a LightningDataModule, with its init_args; got 3",
        ),
        ("trainer: {callbacks: [3]}", "trainer.callbacks: expected the class_path of a Callback"),
        (
            callback("gspo_lightning.AdaptiveKL", "{warmup: 1.5}"),
            "trainer.callbacks.warmup: expected int, got 1.5",
        ),
        (
            callback(
                "gspo_lightning.AdaptiveKL",
                "{rule: {class_path: gspo_lightning.kl.ProportionalKL, init_args: {target: x}}}",
            ),
            "trainer.callbacks.rule.target: expected float, got x",
        ),
        (
            "trainer: {devices: [0, 0]}",
            "trainer.devices is [0, 0]: a CPU has no devices to choose from",
        ),
    ],
)
def test_a_value_of_a_wrong_kind_in_a_config(at_work, capsys, tmp_path, overlay, line):
    (tmp_path / "overlay.yaml").write_text(f"{overlay}\n")
    (tmp_path / "cpu.yaml").write_text("trainer: {accelerator: cpu}\n")
    command = "fit --config real.yaml --config cpu.yaml --config overlay.yaml"
    assert refused(capsys, command).startswith(line)
    assert sorted(path.suffix for path in tmp_path.iterdir()) == [".yaml"] * 4


@pytest.mark.parametrize(
    ("option", "line"),
    [
        ("--trainer.barebones=true", "trainer.barebones leaves out curves, checkpoints and"),
        (
            "--model.optimizer.lr=1e-3",
            "model: unknown key `optimizer.lr`, did you mean `optimizer.lea",
        ),
        ("--model.optimizer=torch.optim.AdamW", "model.optimizer: expected OptimizerConfig (lea"),
        ("--model.evaluation=null", "model.evaluation: expected settings, such as correct"),
        ("--model.num_epochs=", "model.num_epochs: expected int, got nothing"),
        ("--model.policy.stop_strings=','", "model.policy.stop_strings: expected list, got ','"),
        (
            "--model.policy={a: &a [*a]}",
            "model.policy: not YAML: the alias *a stands inside of what",
        ),
        (f"--trainer.max_epochs={'9' * 5000}", "trainer.max_epochs: Exceeds the limit (4300"),
    ],
)
def test_a_value_of_a_wrong_kind_in_an_option(at_work, capsys, option, line):
    assert train.main(["fit", "--config", "real.yaml", option]) == 2
    found = capsys.readouterr().err
    assert found.startswith(f"error: {line}") and found.count("\n") == 1, found


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (
            "trainer: {callbacks: &a [*a]}",
            "a.yaml:1: not YAML: the alias *a stands inside of what it",
        ),
        (f"{ALIASES}model: *h", "a.yaml:5: not YAML: more than 20000 values, with what aliases"),
        (f"a: {'[' * 5000}{']' * 5000}", f"a.yaml:1: not YAML: more than {DEEPEST} levels"),
        (f"a:\n  {'- ' * 5000}1", f"a.yaml:2: not YAML: more than {DEEPEST} levels"),
        ("a: !!python/name:os.system", "a.yaml:1: not YAML: could not determine a constructor"),
        ("a: 'x'\n" * 200_000, "a.yaml has 1400000 bytes; a config has a few thousand"),
        (f"a: {'9' * 5000}", "a.yaml: not YAML: Exceeds the limit"),
    ],
)
def test_yaml_that_would_never_end_is_refused_at_once(tmp_path, text, words):
    (tmp_path / "a.yaml").write_text(text)
    start = time.process_time()
    with pytest.raises(ValueError) as found:
        check_config_file(str(tmp_path / "a.yaml"))
    assert words in str(found.value) and "\n" not in str(found.value)
    assert time.process_time() - start < 2


def test_aliases_and_depth_that_a_config_may_have_are_read(tmp_path):
    nested = "[" * (DEEPEST - 1) + "]" * (DEEPEST - 1)
    (tmp_path / "a.yaml").write_text(f"a: &a {{x: 1}}\nb: [*a, *a]\nc: {{<<: *a}}\nd: {nested}\n")
    check_config_file(str(tmp_path / "a.yaml"))


@pytest.mark.parametrize("name", ["RANK", "LOCAL_RANK", "SLURM_NTASKS", "PL_GLOBAL_SEED"])
@pytest.mark.parametrize("value", ["x", "", "-1", "1.5", "²"])
def test_a_variable_that_is_no_number_is_named_with_the_way_out(monkeypatch, name, value):
    monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match=f"^{name}={value!r} in .* unset it: env -u {name} "):
        launch.check_variables()


@pytest.mark.parametrize("name", launch.RANKS)
def test_a_rank_left_in_the_environment_is_no_run_without_curves(monkeypatch, name):
    for each in launch.RANKS:
        monkeypatch.delenv(each, raising=False)
    monkeypatch.setenv(name, "1")
    launch.check_rank(2)
    with pytest.raises(ValueError, match=f"^{name}=1 in the environment says that this is not"):
        launch.check_rank(1)
    monkeypatch.setenv(name, "0")
    launch.check_rank(1)


def test_a_run_is_refused_its_leftover_rank(at_work, capsys, monkeypatch, tmp_path):
    monkeypatch.setenv("RANK", "1")
    assert train.main(["fit", "--config", "dummy.yaml"]) == 2
    assert capsys.readouterr().err.startswith("error: RANK=1 in the environment says that")
    assert not (tmp_path / "runs").exists()


def test_tasks_that_srun_did_not_begin(monkeypatch):
    for name in launch.TASK:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("SLURM_NTASKS", "2")
    monkeypatch.setenv("SLURM_JOB_NAME", "bash")  # an allocation in which the command is typed
    launch.check_variables()
    monkeypatch.setenv("SLURM_JOB_NAME", "train")
    with pytest.raises(ValueError, match="no task of srun; start it with srun, or unset it"):
        launch.check_variables()


def test_restarts_of_torchrun_need_a_store_for_each_attempt(monkeypatch):
    monkeypatch.setenv("TORCHELASTIC_MAX_RESTARTS", "1")
    monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", "True")
    way_out = "start it with TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 torchrun ... and --ckpt_path auto"
    with pytest.raises(ValueError, match=f"{way_out}$"):
        launch.check_variables()
    monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", "False")
    launch.check_variables()


def test_ranks_wait_for_each_other_as_long_as_they_are_told():
    strategy = DDPStrategy()
    set_timeout(strategy, None)
    assert strategy._timeout.total_seconds() == 1800
    for own in (strategy, ModelParallelStrategy()):
        set_timeout(own, 90)
        assert own._timeout.total_seconds() == 90
    with pytest.raises(ValueError, match="rank_timeout must be above 0 seconds, got 0"):
        set_timeout(strategy, 0)


@pytest.mark.parametrize("way_in", ["train.py", "-m gspo_lightning"])
def test_a_variable_is_looked_at_before_a_library_reads_it(way_in):
    """Torchmetrics does as it is imported, with a traceback."""
    environment = os.environ | {"LOCAL_RANK": "x", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, *way_in.split(), "fit"]
    found = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert found.returncode == 2 and found.stdout == ""
    assert found.stderr.startswith("error: LOCAL_RANK='x' in") and found.stderr.count("\n") == 1
