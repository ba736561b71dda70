import errno
import os
import re
import subprocess
import sys
from fractions import Fraction
from pathlib import Path

import pytest
import torch
import yaml

from gspo_lightning.checkpoint.io import damage
from gspo_lightning.guards.out_of_memory import OutOfMemory
from gspo_lightning.run.command import Watch
from gspo_lightning.run.ending import report
from support import dummies
from support.command import DUMMY, checkpoints, enter, refused, run
from support.full_disk import FullDisk
from support.repository import ROOT
from support.run_folder import assert_same, scalars, state
from support.tiny_run import write_prompts


@pytest.fixture(autouse=True)
def plain_python(monkeypatch):
    """Commands are shown as if this Python were called `python` here."""
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)


@pytest.fixture(autouse=True)
def _folder(tmp_path, monkeypatch):
    enter(tmp_path, monkeypatch)


def meant(wrong, right):
    return f"unknown key `{wrong}`, did you mean `{right}`?"


# ---- mistakes ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("option", "line"),
    [
        ("--trainer.max_epoch 3", meant("trainer.max_epoch", "trainer.max_epochs")),
        ("--trainer.max_epoch=3", meant("trainer.max_epoch", "trainer.max_epochs")),
        ("--modl.kl_coef 3", meant("modl.kl_coef", "model")),
        ("--model.sampler.group_sze 3", "model.sampler: " + meant("group_sze", "group_size")),
        (
            "--model.init_args.sampler.init_args.group_sze 3",
            "model.sampler: " + meant("group_sze", "group_size"),
        ),
        (
            "--model.optimizer.learning_rat 3",  # the beginning of a name is not the name
            "model: " + meant("optimizer.learning_rat", "optimizer.learning_rate"),
        ),
        ("--model.num_epoch 3", "model: " + meant("num_epoch", "num_epochs")),
        ("--data.paths 3", "data: " + meant("paths", "path")),
        ("--model.num_epochs 1.5", "model.num_epochs: expected int, got 1.5"),
        (
            "--model.optimizer.learning_rate low",
            "model.optimizer.learning_rate: expected float, got low",
        ),
        ("--trainer.max_epochs three", "trainer.max_epochs: expected int, got three"),
        (
            "--model.kl_estimator k4",
            "model.kl_estimator: expected one of k2, k3, k3_corrected, got k4",
        ),
        (
            "--model.truncated zero_rewrd",
            "model.truncated: expected one of keep, mask, zero_reward, got zero_rewrd, "
            "did you mean `zero_reward`?",
        ),
        (
            "--model gspo_lightning.GSPOModul",
            "model: there is no GSPOModul in gspo_lightning, did you mean `GSPOModule`?",
        ),
        (
            "--model gspo_lightnin.GSPOModule",
            "model: there is no module gspo_lightnin, did you mean `gspo_lightning`?",
        ),
        (
            "--model.sampler GroupSamper",
            "model.sampler: there is no class GroupSamper, did you mean `GroupS",
        ),
        (
            "--trainer.callbacks+=gspo_lightning.AdaptivKL",
            "trainer.callbacks: there is no AdaptivKL in gspo_lightning, did you mean `Adap",
        ),
        ("--config missing.yaml", "config: there is no file missing.yaml"),
        ("word", "unexpected argument `word`"),
    ],
)
def test_a_wrong_option_is_one_line_that_names_the_right_one(capsys, option, line):
    assert refused(capsys, f"fit --config real.yaml {option}").startswith(line)


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("trainer: {max_epoch: 3}", meant("trainer.max_epoch", "trainer.max_epochs")),
        ("modl: {num_epochs: 3}", meant("modl.num_epochs", "model")),
        (
            "model: {init_args: {optimizer: {learning_rat: 3}}}",
            "model.optimizer: " + meant("learning_rat", "learning_rate"),
        ),
        (
            "model: {init_args: {sampler: {init_args: {group_sze: 3}}}}",
            "model.sampler: " + meant("group_sze", "group_size"),
        ),
        (
            "model: {init_args: {rewards: {a: {"
            "fn: {class_path: gspo_lightning.rewards.terms.MarkedAnswer}, wieght: 3}}}}",
            "model.rewards: " + meant("wieght", "weight"),
        ),
        (
            "model: {init_args: {rewards: {a: {fn: {class_path: gspo_lightning.rewards.terms."
            "MarkedAnswer, init_args: {markr: x}}}}}}",
            "model.rewards.fn: " + meant("markr", "marker"),
        ),
        (
            "model: {init_args: {objective: {ratio: token_}}}",
            "model.objective.ratio: expected one of",
        ),
        ("model: [", "config: overlay.yaml:1: "),
    ],
)
def test_a_wrong_key_in_an_overlay_is_one_line_that_names_the_right_one(capsys, text, line):
    Path("overlay.yaml").write_text(text)
    assert refused(capsys, "fit --config real.yaml --config overlay.yaml").startswith(line)


@pytest.mark.parametrize(
    ("command", "line"),
    [
        ("", "no command; try gspo fit --config arithmetic, or gspo --help"),
        ("ft", "unknown command `ft`, did you mean `fit`?"),
        ("fit", "fit.data, fit.model missing; give a config"),
        ("fit DUMMY --model.learning_rate -1", "learning_rate must be above 0, got -1.0"),
        ("fit DUMMY --model support.dummies.SetupFails", "reference.device: cuda:1 is not there"),
        ("fit DUMMY --trainer.accelerator cuda", "trainer.accelerator: `CUDAAccelerator` can not"),
        ("fit DUMMY --trainer.val_check_interval 7", "`val_check_interval` (7) must be"),
        ("fit DUMMY --trainer.strategy fsdp", "trainer.strategy fsdp: a policy that is too large"),
        ("fit DUMMY --trainer.strategy FSDPStrategy", "trainer.strategy"),
        (
            "fit DUMMY --trainer.strategy deepspeed_stage_2",
            "trainer.strategy deepspeed_stage_2:",
        ),
        ("fit DUMMY --trainer.precision 16-mixed", "trainer.precision 16-mixed"),
        ("fit DUMMY --trainer.precision 16", "trainer.precision 16-mixed"),
        ("fit DUMMY --trainer.strategy ModelParallelStrategy", "trainer.strategy ModelParallel"),
        ("fit DUMMY --trainer.precision bf16-true", "trainer.precision bf16-true: the dtype"),
        (
            "fit DUMMY --trainer.gradient_clip_val 1",
            "trainer.gradient_clip_val: the module clips; set model.init_args.max_g",
        ),
        (
            "fit DUMMY --trainer.accumulate_grad_batches 2",
            "trainer.accumulate_grad_batches: the module splits its mini-batches itself; set model."
            "init_args.micro_batch_size",
        ),
        ("fit DUMMY --ckpt_path last", "ckpt_path: no checkpoint in runs/default/checkpoints"),
        ("validate DUMMY --ckpt_path last", "ckpt_path: no checkpoint in"),
        ("predict DUMMY --ckpt_path nowhere.ckpt", "ckpt_path: no file nowhere.ckpt"),
        ("fit DUMMY --ckpt_path hpc", "ckpt_path `hpc` does not exist here"),
        ("fit DUMMY --ckpt_path best", "ckpt_path: best needs runs/default/checkpoints/best.yaml"),
    ],
)
def test_what_cannot_work_is_refused_in_one_line(capsys, command, line):
    command = command.replace("DUMMY", "--config dummy.yaml")
    assert refused(capsys, command).startswith(line)


def test_a_refused_run_leaves_no_trace_that_hinders_the_next(capsys):
    refused(capsys, "fit --config dummy.yaml --model support.dummies.SetupFails")
    code, _, err = run(capsys, "fit --config dummy.yaml")
    assert (code, err) == (0, "")


def test_a_traceback_can_be_asked_for(capsys, monkeypatch):
    monkeypatch.setenv("GSPO_TRACEBACK", "1")
    code, _, err = run(capsys, "fit --config dummy.yaml --model.learning_rate -1")
    assert code == 2
    assert "Traceback" in err and err.endswith("error: learning_rate must be above 0, got -1.0\n")


def test_a_crash_in_training_shows_where_and_how_to_go_on(capsys):
    code, _, err = run(capsys, "fit --config dummy.yaml --model.fail_at 3 --ckpt_path=auto")
    assert code == 1
    *trace, error, go_on = err.splitlines()
    assert trace[0].startswith("Traceback") and error == "RuntimeError: the reward function broke"
    assert go_on == (
        "last checkpoint runs/default/checkpoints/rollout=000002.ckpt; continue with: "
        "gspo fit --config dummy.yaml --model.fail_at 3 --ckpt_path last"
    )


def test_an_interrupt_is_one_line_that_says_how_to_go_on(capsys):
    code, _, err = run(capsys, "fit --config dummy.yaml --model.interrupt_at 2")
    assert code == 130
    assert err == (
        "interrupted; last checkpoint runs/default/checkpoints/rollout=000002.ckpt; continue with: "
        "gspo fit --config dummy.yaml --model.interrupt_at 2 --ckpt_path last\n"
    )


@pytest.mark.parametrize(
    ("option", "line"),
    [
        ("--data.path missing.jsonl", "data.path: there is no file missing.jsonl"),
        ("--data.path EMPTY", "data.path: EMPTY has no rows"),
        ("--data.num_rollouts 0", "data.num_rollouts must be >= 1, got 0"),
        ("--data.max_prompt_tokens 3", "data.path: data/arithmetic/train.jsonl: row 1 has"),
        ("--model.policy.path ./no/where", "policy.path: "),
        ("--model.reference.device cuda:99", "model.reference.device is cuda:99, but this machine"),
        ("--model.num_minibatches 3", "model.num_minibatches must divide the "),
        ("--model.sampler.group_size 1", "sampler.group_size must be >= 2, got 1"),
        ("--model.optimizer.learning_rate 0", "optimizer.learning_rate must be above 0, got 0.0"),
    ],
)
def test_a_mistake_in_the_demo_is_one_line(capsys, tmp_path, monkeypatch, option, line):
    empty = tmp_path / "empty.jsonl"
    empty.touch()
    monkeypatch.chdir(ROOT)
    option, line = (text.replace("EMPTY", str(empty)) for text in (option, line))
    root = tmp_path / "run"
    command = f"fit --config configs/arithmetic.yaml --trainer.default_root_dir {root} {option}"
    code, _, err = run(capsys, f"{command} --trainer.limit_val_batches 1")
    assert code == 2
    assert err.startswith(f"error: {line}") and err.count("\n") == 1, err


# ---- the run folder ------------------------------------------------------------------------------


def test_a_run_is_quiet_and_leaves_config_events_and_checkpoints(capsys):
    assert run(capsys, "fit --config dummy.yaml") == (0, "", "")
    assert checkpoints() == [f"rollout=00000{n}.ckpt" for n in (2, 4, 6)]
    assert any(name.startswith("events.out.tfevents") for name in os.listdir("runs/default"))
    saved = yaml.safe_load(Path("runs/default/config.yaml").read_text())
    assert saved["data"]["init_args"]["num_rollouts"] == 6


def test_a_run_leaves_its_code_and_its_log(capsys):
    run(capsys, "fit --config dummy.yaml --model.fail_at 3")
    versions = Path("runs/default/versions.yaml").read_bytes()
    assert b"torch: " in versions
    log = Path("runs/default/log.txt").read_text()
    assert log.startswith("# ") and "gspo fit --config dummy.yaml --model.fail_at 3\n" in log
    assert "RuntimeError: the reward function broke" in log
    run(capsys, "fit --config dummy.yaml --ckpt_path last --accept_changes true")
    assert Path("runs/default/versions.yaml").read_bytes() == versions
    grown = Path("runs/default/log.txt").read_text()
    assert grown.startswith(log) and grown.count("# ") == 2


def test_a_continuation_with_other_code_is_noted_beside_the_start(capsys):
    run(capsys, "fit --config dummy.yaml --model.fail_at 3")
    Path("runs/default/versions.yaml").write_text("torch: 1.0\n")
    _, _, err = run(capsys, "fit --config dummy.yaml --ckpt_path last --accept_changes true")
    assert Path("runs/default/versions.yaml").read_text() == "torch: 1.0\n"
    assert "torch: " in Path("runs/default/versions.resume-000002.yaml").read_text()
    assert "see runs/default/versions.resume-000002.yaml\n" in err


def test_the_run_folder_alone_is_enough_to_validate(capsys):
    run(capsys, "fit --config dummy.yaml")
    expected = run(capsys, "validate --config dummy.yaml --ckpt_path last")
    Path("dummy.yaml").unlink()
    command = "validate --config runs/default/config.yaml --ckpt_path last"
    assert run(capsys, command) == expected
    assert expected[0] == 0 and "val/size" in expected[1]


def test_the_saved_config_runs_by_itself(capsys):
    run(capsys, "fit --config dummy.yaml")
    command = "fit --config runs/default/config.yaml --trainer.default_root_dir runs/again"
    assert run(capsys, command) == (0, "", "")
    assert checkpoints("runs/again") == checkpoints()


def test_a_second_run_does_not_start_in_the_folder_of_the_first(capsys):
    run(capsys, "fit --config dummy.yaml")
    line = refused(capsys, "fit --config dummy.yaml")
    assert line.startswith("runs/default already holds a run (up to rollout=000006.ckpt)")
    assert "--ckpt_path last" in line and "--trainer.default_root_dir NEW" in line
    assert "which has its length; go on with --ckpt_path last --data.num_rollouts 12, or" in line
    (checkpoint,) = Path("runs/default/checkpoints").glob("*=000006.ckpt")
    checkpoint.unlink()
    line = refused(capsys, "fit --config dummy.yaml")  # as of a run that was stopped
    assert "length" not in line and "continue it with --ckpt_path last, or" in line


def test_a_finished_run_has_nothing_to_do_and_can_be_made_longer(capsys):
    run(capsys, "fit --config dummy.yaml")
    code, _, err = run(capsys, "fit --config dummy.yaml --ckpt_path last")
    assert code == 0
    line = err.splitlines()[-1]
    assert line.startswith("nothing to do: ")
    assert "--data.num_rollouts 12 makes it longer" in line and "default_root_dir NEW" in line
    code, _, err = run(capsys, "fit --config dummy.yaml --ckpt_path auto --data.num_rollouts 8")
    assert (code, err.splitlines()) == (
        0,
        [
            "continuing from runs/default/checkpoints/rollout=000006.ckpt",
            "changed since runs/default/config.yaml: data.init_args.num_rollouts 6 -> 8",
        ],
    )
    assert checkpoints()[-1] == "rollout=000008.ckpt"
    first = yaml.safe_load(Path("runs/default/config.yaml").read_text())
    second = yaml.safe_load(Path("runs/default/config.resume-000006.yaml").read_text())
    lengths = [saved["data"]["init_args"]["num_rollouts"] for saved in (first, second)]
    assert lengths == [6, 8]


def test_the_command_line_wins_over_what_a_checkpoint_holds(capsys):
    run(capsys, "fit --config dummy.yaml --model support.dummies.SavesHyperparameters")
    file = "runs/default/checkpoints/rollout=000006.ckpt"
    command = (
        f"fit --config dummy.yaml --model support.dummies.SavesHyperparameters --ckpt_path {file}"
    )
    run(capsys, f"{command} --model.learning_rate 0.5 --data.num_rollouts 7")
    saved = yaml.safe_load(Path("runs/default/config.resume-000006.yaml").read_text())
    assert saved["model"]["init_args"]["learning_rate"] == 0.5


def test_an_older_checkpoint_goes_on_only_in_another_folder(capsys):
    run(capsys, "fit --config dummy.yaml")
    command = "fit --config dummy.yaml --ckpt_path runs/default/checkpoints/rollout=000002.ckpt"
    assert "holds later checkpoints" in refused(capsys, command)
    code, *_ = run(capsys, f"{command} --trainer.default_root_dir runs/branch")
    assert code == 0
    assert checkpoints("runs/branch") == ["rollout=000004.ckpt", "rollout=000006.ckpt"]
    assert Path("runs/branch/config.yaml").exists()


def test_logs_of_a_run_without_a_checkpoint_are_moved_aside(capsys):
    run(capsys, "fit --config dummy.yaml --model.fail_at 1")
    Path("runs/default/notes.txt").write_text("mine")
    Path("runs/default/samples.jsonl").write_text("{}\n")
    old = {name for name in os.listdir("runs/default") if "tfevents" in name}
    old |= {"log.txt", "samples.jsonl"}
    content = {name: Path("runs/default", name).read_bytes() for name in old}
    code, _, err = run(capsys, "fit --config dummy.yaml")
    assert (code, err) == (
        0,
        "moved the logs of a run that ended without a checkpoint to runs/default/earlier-1\n",
    )
    assert not old - {"log.txt"} & set(os.listdir("runs/default"))
    folder = Path("runs/default/earlier-1")
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == content
    assert Path("runs/default/notes.txt").exists()


@pytest.mark.parametrize("option", ["", " --ckpt_path auto"])
def test_a_finished_run_without_checkpoints_is_not_started_over(capsys, option):
    command = "fit --config dummy.yaml --trainer.callbacks [] --trainer.enable_checkpointing false"
    assert run(capsys, command)[0] == 0
    before = {path: path.read_bytes() for path in Path("runs").rglob("*") if path.is_file()}
    line = refused(capsys, command + option)
    assert "runs/default holds a finished run" in line and "default_root_dir NEW" in line
    after = {path: path.read_bytes() for path in Path("runs").rglob("*") if path.is_file()}
    assert after == before
    Path("runs/default/finished").unlink()  # the way out that the line names
    assert run(capsys, command)[0] == 0
    moved = {path.name for path in Path("runs/default/earlier-1").iterdir()}
    assert moved == {path.name for path in before if "tfevents" in path.name} | {"log.txt"}


def test_a_run_with_checkpoints_or_stopped_by_a_signal_has_no_mark(capsys):
    key = "--trainer.callbacks"
    stop = f" {key}+=support.dummies.Signaller {key}.at=on_train_batch_start {key}.number=15"
    command = f"fit --config dummy.yaml --trainer.enable_checkpointing false {key}=[]"
    assert run(capsys, command + stop)[0] == 143
    assert not Path("runs/default/finished").exists()
    assert run(capsys, "fit --config dummy.yaml --trainer.default_root_dir runs/b")[0] == 0
    assert not Path("runs/b/finished").exists()


def test_a_config_that_no_run_wrote_is_not_overwritten(capsys):
    Path("config.yaml").write_text(DUMMY)
    line = refused(capsys, "fit --config config.yaml --trainer.default_root_dir .")
    assert "config.yaml was not written by a run" in line
    assert Path("config.yaml").read_text() == DUMMY


def test_a_rehearsal_needs_no_folder_of_its_own(capsys):
    run(capsys, "fit --config dummy.yaml")
    before = checkpoints()
    code, *_ = run(capsys, "fit --config dummy.yaml --trainer.fast_dev_run true")
    assert (code, checkpoints()) == (0, before)


def test_a_rehearsal_leaves_a_finished_run_as_it_is(capsys, tmp_path, model_dir):
    """Whichever callbacks write: samples, curves, the last and the best export."""
    write_prompts(tmp_path / "prompts.jsonl")
    Path("mine.yaml").write_text(
        f"""
        trainer:
          accelerator: cpu
          enable_progress_bar: false
          default_root_dir: run
          callbacks:
            - class_path: gspo_lightning.CurvePlot
            - class_path: gspo_lightning.SampleTable
            - class_path: gspo_lightning.HFExport
              init_args: {{monitor: val/accuracy_sampled, every_n_rollouts: 1}}
        model:
          class_path: gspo_lightning.GSPOModule
          init_args:
            policy: {{path: {model_dir}}}
            sampler:
              class_path: gspo_lightning.GroupSampler
              init_args: {{group_size: 4, max_new_tokens: 6}}
            rewards: {{digits: {{fn: support.reward_functions.digits}}}}
            kl_coef: 0.0
            reference: null
            evaluation: {{correct: digits}}
        data:
          class_path: gspo_lightning.PromptData
          init_args:
            path: prompts.jsonl
            val_path: prompts.jsonl
            prompts_per_rollout: 4
            num_rollouts: 3
        """
    )

    def contents():
        files = (path for path in Path("run").rglob("*") if path.is_file())
        return {str(path): (path.stat().st_mtime_ns, path.read_bytes()) for path in files}

    assert run(capsys, "fit --config mine.yaml")[0] == 0
    before = contents()
    for file in ("run/samples.jsonl", "run/curves.png", "run/export/model.safetensors"):
        assert file in before, sorted(before)
    assert any(name.startswith("run/export_best") for name in before)
    assert run(capsys, "fit --config mine.yaml --trainer.fast_dev_run true")[0] == 0
    assert contents() == before


def test_a_checkpoint_of_another_model_is_refused_in_one_line(capsys):
    run(capsys, "fit --config dummy.yaml")
    code, _, err = run(
        capsys, "validate --config dummy.yaml --model support.dummies.Other --ckpt_path last"
    )
    assert code == 2
    assert err.startswith("error: ckpt_path: the checkpoint is of another model: ")


def test_validate_and_predict_load_the_newest_checkpoint(capsys):
    run(capsys, "fit --config dummy.yaml")
    figures = []
    for option in ("", "--ckpt_path last"):
        code, out, _ = run(capsys, f"validate --config dummy.yaml {option}")
        assert code == 0
        figures.append(out)
    assert "val/size" in figures[0] and figures[0] != figures[1]
    assert run(capsys, "predict --config dummy.yaml --ckpt_path last")[0] == 0
    events = [name for name in os.listdir("runs/default") if "tfevents" in name]
    assert len(events) == 1  # only training draws curves


def test_print_config_merges_overlays_in_their_order(capsys):
    Path("overlay.yaml").write_text("model: {init_args: {learning_rate: 0.5}}")
    command = "fit --config dummy.yaml --config overlay.yaml --data.num_rollouts 7 --print_config"
    code, out, err = run(capsys, command)
    assert (code, err) == (0, "")
    shown = yaml.safe_load(out)
    assert shown["model"]["init_args"]["learning_rate"] == 0.5
    assert shown["model"]["init_args"]["steps_per_rollout"] == 4
    assert shown["data"]["init_args"]["num_rollouts"] == 7


# Forks for each command, so that none sees what another one has imported.
APART = """
import os, sys, train, gspo_lightning.run.command
for line in sys.stdin:
    if os.fork() == 0:
        code = train.main(line.split())
        tools = [name for name in sys.modules if name.startswith("gspo_lightning.doctor.")]
        sys.exit(f"{line} loads {tools}" if tools else code)
    os.wait()
"""


def test_short_names_are_found_though_nothing_imports_their_classes_and_no_tool_is_loaded():
    key = "--trainer.callbacks"
    lines = [
        f"fit --model GSPOModule --data PromptData {key} AdaptiveKL --print_config",
        f"fit --model SFTModule --data SFTData {key}+=SampleTable --print_config",
        f"fit --model RewardModelModule --data PreferenceData {key}+=RolloutProfile --print_config",
        "fit --data SFTDat",
    ]
    program = [sys.executable, "-c", APART]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        program, input="\n".join(lines), env=environment, capture_output=True, text=True, check=True
    )
    assert done.stderr == "error: data: there is no class SFTDat, did you mean `SFTData`?\n"
    shown = done.stdout.split("# lightning.pytorch==")[1:]
    assert [re.findall(r"class_path: gspo_lightning\.(\w+)\n", text) for text in shown] == [
        ["AdaptiveKL", "GSPOModule", "PromptData"],
        ["SampleTable", "SFTModule", "SFTData"],
        ["RolloutProfile", "RewardModelModule", "PreferenceData"],
    ]


def test_help_needs_no_libraries():
    command = [sys.executable, "-X", "importtime", str(ROOT / "train.py"), "--help"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    assert "gspo fit --config arithmetic" in done.stdout
    imported = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines()}
    assert "sys" in imported or "os" in imported
    assert not imported & {"lightning", "torch", "transformers", "numpy", "yaml"}


def test_a_numerical_fault_is_one_line_and_how_to_go_on(capsys):
    watch = Watch()
    watch.begun = True
    code = report(
        FloatingPointError("the loss is nan; no step was taken"), watch, lambda _: "go on"
    )
    assert code == 1
    assert capsys.readouterr().err == "error: the loss is nan; no step was taken\ngo on\n"


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (
            OutOfMemory("out of memory in rollout 3, sampling"),
            "out of memory in rollout 3, sampling",
        ),
        (
            torch.OutOfMemoryError("CUDA out of memory. Tried 2 GiB.\nGPU 0 has"),
            "out of memory: CUDA out of memory. Tried 2 GiB.; smaller batches need less",
        ),
    ],
)
def test_short_memory_is_one_line_and_how_to_go_on(capsys, error, line):
    watch = Watch()
    watch.begun = True
    assert report(error, watch, lambda _: "go on") == 1
    assert capsys.readouterr().err == f"error: {line}\ngo on\n"


def test_weights_that_no_text_reaches_are_one_line_under_ddp(capsys):
    watch = Watch()
    watch.begun = True
    error = "your LightningModule has parameters that were not used in producing the loss ret"
    assert report(RuntimeError(error), watch, lambda _: "") == 2
    line = capsys.readouterr().err
    assert line.startswith("error: trainer.strategy: no text reaches some of the policy's weights")
    assert "ddp_find_unused_parameters_true" in line and line.count("\n") == 1


BROKEN = """
trainer:
  accelerator: cpu
  enable_progress_bar: false
  default_root_dir: run
  callbacks:
    - {{class_path: gspo_lightning.RolloutCheckpoint, init_args: {{every_n_rollouts: 1}}}}
    - {{class_path: support.fault_injection.Later, init_args: {{first: 1, kind: {kind}}}}}
model:
  class_path: gspo_lightning.GSPOModule
  init_args:
    policy: {{path: {policy}}}
    sampler:
      class_path: gspo_lightning.GroupSampler
      init_args: {{group_size: 4, max_new_tokens: 6}}
    rewards: {{length: {{fn: support.reward_functions.length}}}}
    num_minibatches: 2
data:
  class_path: gspo_lightning.PromptData
  init_args: {{path: prompts.jsonl, prompts_per_rollout: 4, num_rollouts: 9}}
"""


@pytest.mark.filterwarnings("always:rollout")
def test_faults_in_a_row_end_a_run_with_reason_dump_and_last_checkpoint(
    capsys, tmp_path, model_dir
):
    write_prompts(tmp_path / "prompts.jsonl")
    Path("broken.yaml").write_text(BROKEN.format(policy=model_dir, kind="gradient"))
    code, _, err = run(capsys, "fit --config broken.yaml")
    assert code == 1 and "Traceback" not in err
    warned = [line for line in err.splitlines() if line.startswith("warning: rollout")]
    assert len(warned) == 2 and "(2 in a row; the run stops at 3)" in warned[1]
    error, go_on = err.splitlines()[-2:]
    assert error.startswith(
        "error: rollout 3, optimizer step 1: gradient not finite, the last of 3"
    )
    dump = error.rpartition(" ")[2]
    assert dump == "run/faults/rollout=000003-step=001-rank0.pt"
    assert go_on.startswith("last checkpoint run/checkpoints/rollout=000002.ckpt; continue with: ")
    code, out, _ = run(capsys, f"replay {dump}")
    assert code == 1 and "recorded: gradient not finite" in out  # a callback is not in the dump


def test_broken_weights_end_a_run_in_one_line_because_nothing_can_be_drawn(
    capsys, tmp_path, model_dir
):
    write_prompts(tmp_path / "prompts.jsonl")
    Path("broken.yaml").write_text(BROKEN.format(policy=model_dir, kind="weights"))
    code, _, err = run(capsys, "fit --config broken.yaml")
    assert code == 1 and "Traceback" not in err
    error, go_on = err.splitlines()[-2:]
    assert error.startswith("error: rollout 2: the policy's logits are not finite")
    assert error.endswith("no completion can be drawn")
    assert go_on.startswith("last checkpoint run/checkpoints/rollout=000001.ckpt; continue with: ")


def test_weights_that_a_step_has_broken_do_not_become_the_last_checkpoint(
    capsys, tmp_path, model_dir
):
    write_prompts(tmp_path / "prompts.jsonl")
    Path("broken.yaml").write_text(BROKEN.format(policy=model_dir, kind="moved"))
    code, _, err = run(capsys, "fit --config broken.yaml")
    assert code == 1 and "Traceback" not in err
    error, go_on = err.splitlines()[-2:]
    assert error == (
        "error: after 2 rollouts the weights are not finite (policy.model.model.embed_tokens.weight"
        "), so no checkpoint is written; the last one is run/checkpoints/rollout=000001.ckpt"
    )
    assert go_on.startswith("last checkpoint run/checkpoints/rollout=000001.ckpt; continue with: ")
    assert [f.name for f in Path("run/checkpoints").iterdir()] == ["rollout=000001.ckpt"]


LATE = ("train/late", "epoch")
FULL = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "runs/default/samples.jsonl")
WRAPPED = RuntimeError(
    'while serializing: IoError(Os { code: 28, kind: StorageFull, message: "" })'
)


def full_disk(monkeypatch, where):
    """The disk is full for one kind of file, from rollout 3 on; returns the options that use it."""
    if where == "curves":
        from tensorboard.summary.writer.record_writer import RecordWriter

        write, written = RecordWriter.write, []

        def refuse(self, data):
            written.append(data)
            if len(written) > 12:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            write(self, data)

        monkeypatch.setattr(RecordWriter, "write", refuse)
        return ""
    hook = "on_train_batch_end" if where == "samples" else "on_train_end"
    monkeypatch.setattr(dummies.Refused, "at", hook)
    monkeypatch.setattr(dummies.Refused, "error", FULL if where == "samples" else WRAPPED)
    return "--trainer.callbacks+=support.dummies.Refused"


@pytest.mark.parametrize("where", ["curves", "samples", "export"])
def test_a_full_disk_is_one_line_whichever_file_meets_it(capsys, monkeypatch, where):
    with monkeypatch.context() as patch:
        option = full_disk(patch, where)
        code, _, err = run(capsys, f"fit --config dummy.yaml {option}")
    assert code == 1 and "Traceback" not in err
    error, go_on = err.splitlines()
    assert error.startswith("error: no space left on device") and error.endswith("are intact")
    assert go_on.startswith("last checkpoint runs/default/checkpoints/rollout=00000")
    assert run(capsys, "fit --config dummy.yaml --ckpt_path last")[0] == 0
    run(capsys, "fit --config dummy.yaml --trainer.default_root_dir runs/straight")
    left, right = (Path("runs", name) for name in ("default", "straight"))
    assert_same(state(left, 6), state(right, 6))
    # `self.log`, which only the dummy's late curve goes through, comes behind the checkpoint
    kept, full = ({k: v for k, v in scalars(p).items() if k not in LATE} for p in (left, right))
    assert kept == full


PLACES = ["0", "1/4", "1/2", "3/4", "-29", "-1", "fsync", "rename"]


def fail_from(monkeypatch, place, size):
    """The disk is full at one place of the checkpoint of rollout 4, of ``size`` bytes."""
    name = ".rollout=000004.ckpt."
    opened, fsync, replace = Path.open, os.fsync, os.replace

    def full():
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def full_fsync(number):
        full() if name in os.readlink(f"/proc/self/fd/{number}") else fsync(number)

    def full_rename(source, target):
        full() if name in str(source) else replace(source, target)

    def open_on_full_disk(self, *args, **options):
        file = opened(self, *args, **options)
        return FullDisk(file, room) if self.name.startswith(name) else file

    if place == "fsync":
        monkeypatch.setattr(os, "fsync", full_fsync)
    elif place == "rename":
        monkeypatch.setattr(os, "replace", full_rename)
    else:
        room = size + int(place) if place[0] == "-" else int(Fraction(place) * size)
        monkeypatch.setattr(Path, "open", open_on_full_disk)


@pytest.mark.parametrize("place", PLACES)
def test_a_disk_that_fills_up_in_a_checkpoint_is_one_line_and_costs_nothing(
    capsys, monkeypatch, place
):
    """From the command line to the end, and on from there."""
    assert run(capsys, "fit --config dummy.yaml --trainer.default_root_dir runs/straight")[0] == 0
    folder = Path("runs/default/checkpoints")
    size = Path("runs/straight/checkpoints/rollout=000004.ckpt").stat().st_size
    before = Path("runs/straight/checkpoints/rollout=000002.ckpt").stat().st_size
    with monkeypatch.context() as patch:
        fail_from(patch, place, size)
        code, _, err = run(capsys, "fit --config dummy.yaml")
    assert code == 1 and "Traceback" not in err
    error, go_on = err.splitlines()
    assert error.startswith(f"error: checkpoint {folder}/rollout=000004.ckpt was not written: no s")
    assert error.endswith("those written before it are intact")
    assert go_on.startswith(f"last checkpoint {folder}/rollout=000002.ckpt; continue with: ")
    assert os.listdir(folder) == ["rollout=000002.ckpt"]
    assert damage(folder / "rollout=000002.ckpt") is None
    assert (folder / "rollout=000002.ckpt").stat().st_size == before
    assert run(capsys, "fit --config dummy.yaml --ckpt_path last")[0] == 0
    assert_same(state(Path("runs/default"), 6), state(Path("runs/straight"), 6))


def test_only_the_newest_checkpoint_is_read_and_only_after_the_error_is_told(capsys, monkeypatch):
    """A checkpoint has the size of the model, three times; all kept ones take minutes."""
    told = []

    def read(path):
        told.append((path.name, "the reward function broke" in capsys.readouterr().err))
        return "is damaged" if "000004" in path.name else None

    monkeypatch.setattr("gspo_lightning.run.command.damage", read)
    assert run(capsys, "fit --config dummy.yaml --model.fail_at 5")[0] == 1
    assert told == [("rollout=000004.ckpt", True), ("rollout=000002.ckpt", False)]


def test_an_error_of_reading_does_not_hide_why_the_run_ended(capsys, monkeypatch):
    def unreadable(path):
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr("gspo_lightning.run.command.damage", unreadable)
    code, _, err = run(capsys, "fit --config dummy.yaml --model.fail_at 5")
    assert code == 1 and "RuntimeError: the reward function broke" in err
    assert "there is no checkpoint yet" not in err


def test_a_stop_at_once_reads_no_checkpoint(capsys, monkeypatch):
    monkeypatch.setattr("gspo_lightning.run.command.damage", lambda path: pytest.fail("read"))
    key = "--trainer.callbacks"
    stop = f"{key}+=support.dummies.Signaller {key}.at=on_train_batch_start {key}.number=15"
    code, _, err = run(capsys, f"fit --config dummy.yaml {stop} {key}.rollout=5 {key}.times=2")
    assert code == 143
    assert err.splitlines()[-1].startswith(
        "terminated; last checkpoint runs/default/checkpoints/rollout=000004.ckpt; continue with: "
    )


def test_a_run_that_is_refused_leaves_no_trace(capsys):
    refused(capsys, "fit --config dummy.yaml --model support.dummies.SetupFails")
    assert not Path("runs/default").exists()
    Path("runs/default").mkdir(parents=True)
    Path("runs/default/events.out.tfevents.1.mine").write_text("not ours")
    refused(capsys, "fit --config dummy.yaml --model support.dummies.SetupFails")
    assert os.listdir("runs/default") == ["events.out.tfevents.1.mine"]


def test_a_reward_that_fails_in_the_middle_is_one_line_and_says_where_to_look(
    capsys, tmp_path, model_dir, monkeypatch
):
    write_prompts(tmp_path / "prompts.jsonl")
    (tmp_path / "mine.py").write_text(
        "calls = []\n"
        "def strict(rows, completions):\n"
        "    calls.append(1)\n"
        "    if len(calls) > 2:\n"
        "        raise KeyError('mood')\n"
        "    return [float(len(text)) for text in completions]\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    Path("mine.yaml").write_text(
        f"""
        trainer: {{accelerator: cpu, enable_progress_bar: false, default_root_dir: run}}
        model:
          class_path: gspo_lightning.GSPOModule
          init_args:
            policy: {{path: {model_dir}}}
            sampler:
              class_path: gspo_lightning.GroupSampler
              init_args: {{group_size: 4, max_new_tokens: 6}}
            rewards: {{mood: {{fn: mine.strict}}}}
        data:
          class_path: gspo_lightning.PromptData
          init_args: {{path: prompts.jsonl, prompts_per_rollout: 4, num_rollouts: 9}}
        """
    )
    code, _, err = run(capsys, "fit --config mine.yaml")
    (line,) = [text for text in err.splitlines() if text.startswith("error: ")]
    assert code == 2 and "Traceback" not in err
    assert line.startswith(
        "error: reward 'mood' failed: KeyError: 'mood' (mine.py:5); row with pro"
    )
    assert (
        line.endswith("all 16 completions are in run/failed_rollout.jsonl") or "run/failed" in line
    )
    assert len(Path("run/failed_rollout.jsonl").read_text().splitlines()) == 16
    monkeypatch.setenv("GSPO_TRACEBACK", "1")
    assert "Traceback" in run(capsys, "fit --config mine.yaml --trainer.default_root_dir again")[2]
