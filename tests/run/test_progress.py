import re
import shlex
import sys
import warnings
from types import SimpleNamespace

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import EMAWeightAveraging, Timer
from transformers import AutoModelForCausalLM, LlamaConfig

from gspo_lightning.callbacks import (
    AdaptiveKL,
    CurvePlot,
    HFExport,
    PredictionWriter,
    SampleTable,
)
from gspo_lightning.checkpoint import RolloutCheckpoint
from gspo_lightning.engine import products
from gspo_lightning.kl import MultiplicativeKL, ProportionalKL
from gspo_lightning.objectives import Objective
from gspo_lightning.optim import OptimizerConfig, build_optimizer
from gspo_lightning.run import one_line, plan, progress
from gspo_lightning.run.plan import (
    furthest,
    plan_lines,
    reached,
    resume_command,
    total_batches,
)
from gspo_lightning.run.progress import RolloutProgress, RunSummary
from gspo_lightning.start import layout
from support.dummies import DummyModule
from support.rollout_dummies import RolloutData, RolloutDummy, fit, make_trainer


@pytest.fixture(autouse=True)
def plain_python(monkeypatch):
    """Commands are shown as if `gspo fit` had been typed."""
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr("sys.argv", ["gspo", "fit"])


class Supervised(DummyModule):
    """As SFTModule: automatic optimization, a logged loss, no rollouts."""

    def __init__(self):
        super().__init__(automatic=True)

    def training_step(self, batch, batch_idx):
        self.log("train/loss", 1.0 / (batch_idx + 1), batch_size=2)
        return super().training_step(batch, batch_idx)["loss"]

    def validation_step(self, batch, batch_idx):
        self.log("val/loss", 0.25, batch_size=2)


@pytest.fixture
def terminal(monkeypatch):
    monkeypatch.setattr(layout, "on_terminal", lambda stream=None: True)
    monkeypatch.setenv("COLUMNS", "160")
    monkeypatch.setenv("NO_COLOR", "1")


# --- lines and bars ------------------------------------------------------------------------------


def test_a_rollout_is_one_line_where_there_is_no_terminal(tmp_path, capsys):
    fit(tmp_path, [RolloutProgress()], num_rollouts=12)
    lines = capsys.readouterr().out.splitlines()
    rollouts = [line for line in lines if line.startswith("rollout")]
    assert rollouts[3] == (
        "rollout  4/12  reward  0.530  kl 0.0180  clip 0.12  length  18.2    1,840 tok/s  "
        "rollout 0.41 s  score 0.01 s  optimise 1.25 s"
    )
    assert len(rollouts) == 12
    assert len({len(line) for line in rollouts}) == 1  # one below the other
    assert lines[lines.index(rollouts[2]) + 1] == (
        "validation after 3 rollouts: greedy 0.300  pass@4 0.500  reward 1.000"
    )


def test_without_a_reference_the_line_has_no_kl(tmp_path, capsys):
    fit(tmp_path, [RolloutProgress()], num_rollouts=3, module=RolloutDummy(reference=False))
    assert "kl" not in capsys.readouterr().out


def test_the_evaluation_before_training_is_called_by_its_name(tmp_path, capsys, terminal):
    fit(tmp_path, [RolloutProgress()], num_rollouts=3)
    out = capsys.readouterr().out
    assert "evaluation before training: greedy 0.000  pass@4 0.500" in out
    assert "evaluation before training 0/2 |" in out
    assert "anity" not in out


def test_a_terminal_gets_one_bar_with_the_phases(tmp_path, capsys, terminal):
    fit(tmp_path, [RolloutProgress()], num_rollouts=3)
    frames = re.split(r"[\r\n]+", capsys.readouterr().out)
    bar = [
        (frame.split()[0], frame.split()[1]) for frame in frames if "|" in frame and "/3" in frame
    ]
    first = [bar[i] for i in range(len(bar)) if i == 0 or bar[i] != bar[i - 1]]
    assert first[:6] == [
        ("training", "0/3"),
        ("rollout", "0/3"),
        ("score", "0/3"),
        ("optimise", "0/3"),
        ("optimise", "1/3"),
        ("rollout", "1/3"),
    ]
    assert first[-1] == ("trained", "3/3")
    last = [frame for frame in frames if frame.startswith("trained  3/3")][-1]
    figures = "reward 0.520  greedy 0.000  kl 0.0120  clip 0.12  length 18.2  1,840 tok/s"
    assert last.split(" |")[0] == f"trained  3/3  {figures}"  # the validation comes later


def lines_that_stay(out: str) -> list[str]:
    """What is left of each line of a terminal, bars in progress aside."""
    return [line.rpartition("\r")[2] for line in out.split("\n")]


@pytest.mark.parametrize("size", [60, 80, 120])
def test_bars_and_lines_fit_a_narrow_terminal_with_what_matters_first(
    tmp_path, capsys, terminal, monkeypatch, size
):
    monkeypatch.setenv("COLUMNS", str(size))
    monkeypatch.setattr("sys.argv", ["train.py", "fit"])
    fit(tmp_path, [RolloutProgress(), RunSummary(), SampleTable()], num_rollouts=4)
    out = capsys.readouterr().out
    frames = [frame for frame in re.split(r"[\r\n]+", out) if frame and str(tmp_path) not in frame]
    assert [frame for frame in frames if len(frame) > size] == []
    bars = [frame for frame in frames if frame.startswith("trained")]
    assert bars and all(bar.startswith("trained  4/4  reward 0.530 ") for bar in bars)
    shown = {60: [], 80: ["greedy", "kl"], 120: ["greedy", "kl", "clip", "length", "tok/s"]}
    assert re.findall("greedy|kl|clip|length|tok/s", bars[-1]) == shown[size]
    (line,) = [line for line in frames if line.startswith("rollout 1/4")]
    assert line.endswith({60: "clip 0.12", 80: "1,840 tok/s", 120: "score 0.01 s"}[size])


def test_a_terminal_has_a_line_now_and_then_by_the_clock(tmp_path, capsys, terminal, monkeypatch):
    now = [100.0]
    monkeypatch.setattr(progress, "time", SimpleNamespace(monotonic=lambda: now[0]))

    class Takes(Callback):
        def on_train_batch_start(self, trainer, module, batch, batch_idx):
            now[0] += 2.0 if batch_idx < 7 else 30.0

    def numbers(folder, **options):
        settings = {"limit_val_batches": 0, "num_rollouts": 10}
        fit(tmp_path / folder, [Takes(), RolloutProgress(**options)], **settings)
        return re.findall(
            r"^rollout +(\d+)/10 .*", "\n".join(lines_that_stay(capsys.readouterr().out)), re.M
        )

    # begun at 102 s, so due again at 107 s and, as rollout 4 ends at 108 s, at 113 s
    assert numbers("five") == ["1", "4", "7", "8", "9", "10"]
    assert numbers("twenty", line_seconds=20.0) == ["1", "8", "9", "10"]
    assert len(numbers("none", line_seconds=0)) == 10


def test_what_anybody_prints_stands_above_the_bar(tmp_path, capsys, terminal):
    class Prints(Callback):
        def on_train_batch_end(self, *_):
            print("a reward", "prints", end="")
            print(" this")
            print("and warns", file=sys.stderr)
            warnings.showwarning("so", UserWarning, "file.py", 1)

    before = sys.stdout, sys.stderr
    with one_line.quiet():
        fit(tmp_path, [RolloutProgress(), Prints()], num_rollouts=2, val_check_interval=2)
    assert (sys.stdout, sys.stderr) == before
    lines = lines_that_stay(capsys.readouterr().out)
    assert lines.count("a reward prints this") == lines.count("and warns") == 2
    assert lines.count("warning: so") == 2


def escapes(text: str) -> set[str]:
    return set(re.findall(r"\x1b\[[0-9;]*m", text))


def test_labels_are_bold_on_a_terminal_that_may_have_colours(
    tmp_path, capsys, terminal, monkeypatch
):
    callbacks = [RolloutProgress(), RunSummary()]
    fit(tmp_path / "plain", callbacks, num_rollouts=3)  # NO_COLOR is set
    assert escapes(capsys.readouterr().out) == set()
    monkeypatch.setenv("NO_COLOR", "")  # as good as not set
    fit(tmp_path / "bold", callbacks, num_rollouts=3)
    out = capsys.readouterr().out
    assert escapes(out) == {"\x1b[1m", "\x1b[0m"}
    assert "\x1b[1mresult    \x1b[0mgreedy" in out
    monkeypatch.undo()
    fit(tmp_path / "pipe", callbacks, num_rollouts=3)
    assert "\x1b" not in capsys.readouterr().out


def test_a_file_or_a_dumb_terminal_is_no_terminal(monkeypatch):
    assert not layout.on_terminal()
    stream = SimpleNamespace(isatty=lambda: True, fileno=lambda: 1)
    size = SimpleNamespace(columns=80)
    monkeypatch.setattr("os.get_terminal_size", lambda number: size)
    monkeypatch.setenv("TERM", "xterm")
    assert layout.on_terminal(stream) and layout.columns(stream) == 80
    monkeypatch.setenv("TERM", "dumb")
    assert not layout.on_terminal(stream)
    monkeypatch.setenv("TERM", "xterm")
    size.columns = 0
    assert not layout.on_terminal(stream)


def test_a_resumed_bar_starts_where_the_run_stopped(tmp_path, capsys, terminal):
    fit(tmp_path, [RunSummary()], num_rollouts=4)
    fit(tmp_path, [RolloutProgress(), RunSummary()], num_rollouts=6, ckpt="last")
    out = capsys.readouterr().out
    frames = re.findall(r"(?:training|rollout|optimise|trained) +(\d)/6 .*\|", out)
    assert (min(frames), max(frames)) == ("4", "6")
    assert re.search(r"5/6  reward 0.540  greedy 0.300", out)  # known from before


def test_a_resumed_run_counts_its_lines_on(tmp_path, capsys):
    fit(tmp_path, num_rollouts=4)
    fit(tmp_path, [RolloutProgress()], num_rollouts=6, ckpt="last")
    assert re.findall(r"rollout (\d)/6", capsys.readouterr().out) == ["5", "6"]


def test_an_error_closes_the_bar(tmp_path, terminal):
    bar = RolloutProgress()
    with pytest.raises(RuntimeError, match="the reward function broke"):
        fit(tmp_path, [bar], module=RolloutDummy(fail_at=1))
    assert bar._train_bar is None


def test_other_ranks_print_nothing(capsys):
    bar = RolloutProgress()
    bar.setup(SimpleNamespace(is_global_zero=False), None, "fit")
    bar._start("test", 3)
    bar._finish("text", {})
    bar.print("text")
    assert capsys.readouterr().out == ""


def test_a_warm_start_prints_every_few_steps_and_the_last(tmp_path, capsys):
    trainer = make_trainer(tmp_path, [RolloutProgress(every_n_steps=4), RunSummary()])
    trainer.fit(Supervised(), datamodule=RolloutData(10))
    lines = capsys.readouterr().out.splitlines()
    assert [line for line in lines if line.startswith("step")] == [
        "step  4/10  loss 0.2500",
        "step  8/10  loss 0.1250",
        "step 10/10  loss 0.1000",
    ]
    assert "validation after 3 steps: loss 0.250" in lines
    assert "result    loss 0.250 -> 0.250 (held out, after 9 steps)" in lines


def test_validate_and_predict_say_what_came_out(tmp_path, capsys):
    module, data = RolloutDummy(), RolloutData(1)
    trainer = make_trainer(tmp_path, [RolloutProgress(), PredictionWriter()])
    trainer.validate(module, datamodule=data, verbose=False)
    trainer.predict(module, datamodule=data, return_predictions=False)
    assert capsys.readouterr().out.splitlines() == [
        "weights: those of the config, untrained by this run",
        "validation: greedy 0.000  pass@4 0.500  reward 1.000",
        "weights: those of the config, untrained by this run",
        f"predictions: {tmp_path}/predictions.jsonl",
    ]


def test_an_evaluation_says_which_weights_it_is_of(tmp_path, capsys):
    averaged = tmp_path / "averaged"
    trainer, _ = fit(tmp_path, [RolloutProgress()], num_rollouts=2, val_check_interval=2)
    capsys.readouterr()
    keeper = EMAWeightAveraging(update_every_n_steps=1)
    fit(averaged, [keeper], num_rollouts=2, val_check_interval=2)

    def weights(trainer, path=None):
        call = {"datamodule": RolloutData(1), "verbose": False, "ckpt_path": path}
        trainer.validate(trainer.lightning_module or RolloutDummy(), **call)
        return capsys.readouterr().out.splitlines()[0].removeprefix("weights: ")

    file = "checkpoints/rollout=000002.ckpt"
    assert weights(trainer) == "those in memory, after 2 rollouts"
    fresh = make_trainer(tmp_path, [RolloutProgress()])
    assert weights(fresh) == (
        "those of the config, untrained by this run; --ckpt_path last takes the newest of "
        f"{tmp_path}"
    )
    assert weights(fresh, tmp_path / file) == f"{tmp_path / file} (after 2 rollouts, not averaged)"
    fresh = make_trainer(tmp_path, [RolloutProgress(), keeper])
    assert weights(fresh, averaged / file) == f"{averaged / file} (after 2 rollouts, averaged)"


def test_a_bad_period_is_named():
    with pytest.raises(ValueError, match="every_n_steps must be >= 1, got 0"):
        RolloutProgress(every_n_steps=0)


# --- the summary ---------------------------------------------------------------------------------


def summary_of(out: str) -> dict[str, str]:
    lines = out.splitlines()
    start = [number for number, line in enumerate(lines) if line.startswith("result")][-1]
    return {line[:10].strip(): line[10:] for line in lines[start:]}


def test_the_summary_names_what_was_written_and_how_to_look_at_it(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("sys.argv", ["gspo", "fit", "--config", "c.yaml"])
    (tmp_path / "log.txt").touch()
    callbacks = [RunSummary(), CurvePlot(), SampleTable(), HFExport(monitor="val/reward")]
    best = RolloutCheckpoint(every_n_rollouts=1, monitor="val/reward")
    trainer = make_trainer(tmp_path, [*callbacks, best])
    trainer.fit(RolloutDummy(), datamodule=RolloutData(3))
    found = summary_of(capsys.readouterr().out)
    assert re.fullmatch(r"\d+ s of training, 3 rollouts", found.pop("time"))
    checkpoint = f"{tmp_path}/checkpoints/rollout=000003.ckpt"
    assert found == {
        "result": "greedy 0.000 -> 0.300 (held out, after 3 rollouts)",
        "curves": f"{tmp_path}/curves.png, tensorboard --logdir {tmp_path}",
        "samples": f"{tmp_path}/samples.jsonl, gspo samples {tmp_path}",
        "model": f"{tmp_path}/export, gspo chat {tmp_path}",
        "best": f"{tmp_path}/export_best, {checkpoint} (val/reward 1)",
        "saved": checkpoint,
        "log": f"{tmp_path}/log.txt",
        "extend": "gspo fit --config c.yaml --data.num_rollouts 6 --ckpt_path last",
    }


def test_a_long_command_is_folded_so_that_it_can_be_copied(tmp_path, capsys, terminal, monkeypatch):
    monkeypatch.setenv("COLUMNS", "60")
    monkeypatch.setattr("sys.argv", ["gspo", "fit", "--data.path", "my file", "--model", "x" * 30])
    fit(tmp_path, [RunSummary()], num_rollouts=3)
    out = capsys.readouterr().out
    command = out[out.index("extend    ") + 10 :]
    assert command.count(" \\\n") == 2 and max(map(len, command.splitlines())) <= 60
    words = ["--data.path", "my file", "--model", "x" * 30, "--data.num_rollouts", "6"]
    assert shlex.split(command.replace("\\\n", "")) == [
        "gspo",
        "fit",
        *words,
        "--ckpt_path",
        "last",
    ]


def test_a_run_that_stopped_early_says_how_to_resume(tmp_path, capsys, monkeypatch):
    class Stop(Callback):
        def on_train_batch_end(self, trainer, *_):
            trainer.should_stop = True

    fit(tmp_path, [RunSummary(), Stop()], num_rollouts=4)
    found = summary_of(capsys.readouterr().out)
    assert found["resume"] == "gspo fit --ckpt_path last"
    monkeypatch.setattr("sys.argv", ["mine.py", "--fast"])  # a program without these options
    fit(tmp_path / "own", [RunSummary()], num_rollouts=3)
    newest = f"fit(..., ckpt_path='{tmp_path}/own/checkpoints/rollout=000003.ckpt')"
    assert summary_of(capsys.readouterr().out)["extend"] == f"data.num_rollouts = 6, {newest}"


def test_a_resumed_run_still_knows_how_it_began(tmp_path, capsys):
    fit(tmp_path, [RunSummary()], num_rollouts=3)
    resumed = RunSummary()
    fit(tmp_path, [resumed], num_rollouts=6, ckpt="last")
    found = summary_of(capsys.readouterr().out)
    assert found["result"] == "greedy 0.000 -> 0.600 (held out, after 6 rollouts)"


def test_the_time_of_earlier_parts_counts(tmp_path, capsys, monkeypatch):
    clock = iter(range(0, 10**6, 7))
    monkeypatch.setattr(progress, "time", SimpleNamespace(monotonic=lambda: next(clock)))
    first = RunSummary()
    fit(tmp_path, [first], num_rollouts=1, val_check_interval=1)
    resumed = RunSummary()
    resumed.load_state_dict(first.state_dict())
    assert resumed.seconds == first.seconds > 0
    resumed.on_train_start(SimpleNamespace(is_global_zero=False), None)
    resumed.on_train_end(None, None)
    assert resumed.seconds == first.seconds + 7


def test_the_state_is_plain_values(tmp_path):
    fit(tmp_path, [RunSummary()], num_rollouts=3)
    saved = torch.load(tmp_path / "checkpoints/rollout=000003.ckpt", weights_only=True)
    state = saved["callbacks"]["RunSummary"]
    assert state["before"] == {"greedy": 0.0, "pass@4": 0.5, "reward": 1.0}
    copy = RunSummary()
    copy.load_state_dict(state)
    assert copy.state_dict() == state


def test_without_validation_the_summary_shows_training(tmp_path, capsys):
    class Logs(RolloutDummy):
        def training_step(self, batch, batch_idx):
            outputs = super().training_step(batch, batch_idx)
            self.log("train/reward", outputs["metrics"]["train/reward"], batch_size=2)
            return outputs

    fit(tmp_path, [RunSummary()], num_rollouts=4, module=Logs(), limit_val_batches=0)
    found = summary_of(capsys.readouterr().out)
    assert found["result"] == "reward 0.500 -> 0.530 (training, first and last of the rollouts)"
    assert found["saved"] == f"{tmp_path}/checkpoints/rollout=000004.ckpt"


def test_a_run_of_several_epochs_is_extended_by_epochs(tmp_path, capsys):
    fit(tmp_path, [RunSummary()], num_rollouts=3, max_epochs=2)
    found = summary_of(capsys.readouterr().out)
    assert found["extend"].endswith("--trainer.max_epochs 4 --ckpt_path last")


def test_without_a_checkpoint_there_is_no_command(tmp_path, capsys):
    trainer = make_trainer(tmp_path, [RunSummary()], enable_checkpointing=False)
    trainer.fit(RolloutDummy(), datamodule=RolloutData(3))
    found = summary_of(capsys.readouterr().out)
    assert found["resume"] == "not possible: no checkpoint was written"


@pytest.mark.parametrize(
    ("words", "longer", "expected"),
    [
        ("fit", {}, "gspo fit --ckpt_path last"),
        ("fit --ckpt_path auto --x 1", {}, "gspo fit --x 1 --ckpt_path last"),
        ("fit --accept_changes true --ckpt_path=auto", {}, "gspo fit --ckpt_path last"),
        (
            "fit --data.init_args.num_rollouts=4 --data.num_rollouts 5 --y",
            {"--data.num_rollouts": 8},
            "gspo fit --y --data.num_rollouts 8 --ckpt_path last",
        ),
    ],
)
def test_the_command_repeats_what_was_typed(words, longer, expected):
    assert resume_command(words.split(), longer) == expected


# --- the plan ------------------------------------------------------------------------------------


def planned(**changes):
    """The demo's settings: 16 x 8 completions of 40 tokens, 4 mini-batches, 40 rollouts."""
    module = RolloutDummy()
    module.sampler = SimpleNamespace(group_size=8, max_new_tokens=40, batch_size=None)
    module.num_minibatches = 4
    module.reference = SimpleNamespace(device="cuda:1")
    module.frozen = SimpleNamespace(model_to_cut=None)
    config = LlamaConfig(
        vocab_size=32,
        hidden_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=256,
    )
    module.policy.model = AutoModelForCausalLM.from_config(config)
    for name, value in changes.pop("module", {}).items():
        setattr(module, name, value)
    data = SimpleNamespace(num_rollouts=40, prompts_per_rollout=16, longest_prompt=32)
    settings = {
        "datamodule": data,
        "num_training_batches": float("inf"),
        "limit_train_batches": 1.0,
        "max_epochs": 1,
        "max_steps": -1,
        "accumulate_grad_batches": 1,
        "world_size": 1,
        "precision": "32-true",
        "default_root_dir": "runs/x",
        "fit_loop": SimpleNamespace(total_batch_idx=-1),
        "strategy": SimpleNamespace(root_device=torch.device("cpu")),
        "lightning_module": module,
    }
    return SimpleNamespace(**settings | changes), module


def plan_of(**changes) -> dict[str, str]:
    lines = plan_lines(*planned(**changes))
    assert len(lines) <= 9
    return {line.split()[0]: line.split(maxsplit=1)[1] for line in lines}


def test_the_plan_counts_what_will_happen(monkeypatch):
    monkeypatch.setattr(products, "onednn_is_faster", lambda: False)
    plan = plan_of()
    assert plan["plan"] == (
        "40 rollouts, each 16 prompts x 8 completions of at most 40 tokens; "
        "at most 204,800 tokens to sample"
    )
    assert plan["updates"] == (
        "4 optimizer steps per rollout (1 epoch x 4 mini-batches of 32), 160 in all"
    )
    assert plan["scoring"] == "reference on cuda:1, reward correct"
    assert plan["policy"].endswith("all trained, float32 on cpu, precision 32-true")
    assert plan["run"] == "runs/x"


def test_the_plan_says_where_onednn_multiplies(monkeypatch):
    monkeypatch.setattr(products, "onednn_is_faster", lambda: True)
    monkeypatch.setattr(products, "SMALLEST_WEIGHT", 0)
    assert plan_of()["policy"].endswith("precision 32-true, products by oneDNN")
    assert plan_of(precision="bf16-mixed")["policy"].endswith("precision bf16-mixed")


def test_the_plan_counts_ids_that_the_model_lacks():
    def plan(count):
        trainer, module = planned()
        module.policy.tokenizer = ["x"] * count
        return next(x for x in plan_lines(trainer, module) if x.startswith("policy"))

    assert plan(35).endswith(", 3 of the tokenizer's 35 ids unknown to it")
    assert "unknown" not in plan(32)


def test_the_plan_of_a_resumed_run_counts_what_is_left():
    plan = plan_of(fit_loop=SimpleNamespace(total_batch_idx=29))
    assert plan["plan"].startswith("40 rollouts (30 done), each 16 prompts")
    assert plan["plan"].endswith("at most 51,200 tokens to sample")


def test_the_plan_counts_the_prompts_of_all_ranks():
    plan = plan_of(world_size=2)
    assert "each 32 prompts x 8" in plan["plan"]
    assert "at most 409,600 tokens" in plan["plan"]
    assert "mini-batches of 32)" in plan["updates"]  # per rank, as memory is


def test_the_plan_shows_epochs_and_micro_batches():
    plan = plan_of(module={"num_epochs": 2, "micro_batch_size": 8})
    assert plan["updates"] == (
        "8 optimizer steps per rollout (2 epochs x 4 mini-batches of 32, 8 at a time), 320 in all"
    )


def test_the_plan_says_how_often_an_update_reads_a_prompt(monkeypatch):
    trainer, module = planned(module={"micro_batch_size": 4})
    way = "padded"
    monkeypatch.setattr(plan, "reading", lambda *_: way)

    def updates():
        return next(line for line in plan_lines(trainer, module) if line.startswith("updates"))

    assert "4 at a time)" in updates()  # a model whose rows do not share a prompt reads it 8 times
    way = "packed"
    assert "4 at a time, each prompt read 2 times)" in updates()
    module.micro_batch_size = 3
    assert "3 at a time, each prompt read 3 times)" in updates()
    module.micro_batch_size = 8
    assert "8 at a time)" in updates()


def test_the_plan_bounds_how_far_a_weight_moves():
    """Ten rollouts of a warm-up to 1e-6: 4 steps each at 0.1, 0.2, ... 1.0 times that."""
    config = OptimizerConfig(learning_rate=1e-6, warmup=10)
    data = SimpleNamespace(num_rollouts=10, prompts_per_rollout=16, longest_prompt=32)
    plan = plan_of(module={"optimizer_config": config}, datamodule=data)
    assert plan["updates"].endswith("40 in all; they move a weight by at most 2.2e-05")
    # beta2 of 0.999 lets a step be 0.1 / sqrt(0.001) times the learning rate
    wild = OptimizerConfig(learning_rate=1.0, betas=(0.9, 0.999))
    assert furthest(wild, 5) == pytest.approx(5 * 0.1 / 0.001**0.5)


def test_no_weight_moves_further_than_the_plan_says():
    """The worst for AdamW: no gradient for long, then the same one."""
    weight = torch.nn.Parameter(torch.zeros(1, dtype=torch.float64))
    config = OptimizerConfig(learning_rate=1e-3, betas=(0.9, 0.999))
    optimizer = build_optimizer(torch.nn.ParameterList([weight]), config)
    for step in range(400):
        weight.grad = torch.full_like(weight, 1e-12 if step < 395 else 1.0)
        optimizer.step()
    assert 5e-3 < weight.abs().item() < furthest(config, 400)


def test_the_plan_shows_the_clip_range_and_what_rounds_by_more():
    objective = {"objective": Objective()}
    plan = plan_of(module=objective)
    assert plan["clip"].startswith("sequence ratio within [1 - 0.0003, 1 + 0.0004]; `doctor`")
    half = plan_of(module=objective, precision="bf16-mixed")
    assert "rounds it by some 2e-03 at 40 tokens" in half["clip"]  # 1e-2 / sqrt(40)
    assert half["clip"].endswith("or set trainer.precision 32-true")
    wide = {"objective": Objective("token", clip_low=0.2, clip_high=0.2)}
    assert "rounds" not in plan_of(module=wide, precision="bf16-mixed")["clip"]
    once = plan_of(module=objective | {"num_minibatches": 1})
    assert once["clip"].endswith("never clipped: one optimizer step per rollout")


def test_the_plan_says_how_fast_a_kl_rule_is():
    def penalty(rule, **changes):
        return plan_of(callbacks=[AdaptiveKL(rule, 0.05)], **changes)["penalty"]

    # 0.2 x 128 / 2000 a rollout; in 40 of them 1.0128 ** 40 = 1.66
    slow = penalty(ProportionalKL(0.05, horizon=2000))
    assert "rises by at most 0.013 of itself a rollout; too slow for 40 rollouts, x1.7 in" in slow
    fits = penalty(ProportionalKL(0.05))
    assert fits.endswith("aims at 0.05 nats per token, rises by at most 0.1 of itself a rollout")
    assert penalty(MultiplicativeKL()).endswith("rises by at most 0.5 of itself a rollout")
    # at its ceiling a coefficient is not slow, it is there
    assert penalty(MultiplicativeKL(maximum=0.05)) == "KL coefficient 0.1"
    assert plan_of()["penalty"] == "KL coefficient 0.1"
    assert "penalty" not in plan_of(module={"kl_coef": 0.0})


def test_the_plan_comes_before_any_work(tmp_path, capsys):
    seen = []

    class Spy(RolloutDummy):
        def validation_step(self, batch, batch_idx):
            seen.append(capsys.readouterr().out)
            super().validation_step(batch, batch_idx)

    fit(tmp_path, [RolloutProgress(), RunSummary()], num_rollouts=3, module=Spy())
    assert seen[0].startswith("plan      3 rollouts, each 2 prompts x 3 completions of at most 5")
    assert not any("plan  " in out for out in seen[1:])


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, 40),
        ({"num_training_batches": 12}, 12),
        ({"limit_train_batches": 5}, 5),
        ({"max_epochs": 3}, 120),
        ({"max_epochs": -1}, None),
        ({"datamodule": None}, None),
        ({"datamodule": SimpleNamespace(num_steps=9)}, 9),
    ],
)
def test_the_length_of_a_run(changes, expected):
    trainer, _ = planned(**changes)
    assert total_batches(trainer) == expected


@pytest.mark.parametrize(
    ("done", "steps", "limit", "total"),
    [
        (0, 0, 4, 1),  # four mini-batches a rollout
        (0, 0, 9, 3),
        (2, 8, 9, 3),
        (3, 12, 9, 3),  # a limit is looked at between rollouts
        (3, 11, 12, 4),  # a step was skipped for a fault
        (0, 0, 10**6, 40),
    ],
)
def test_the_length_of_a_run_that_max_steps_bounds(done, steps, limit, total):
    progress = SimpleNamespace(total=SimpleNamespace(started=done))
    loop = SimpleNamespace(
        total_batch_idx=done - 1, epoch_loop=SimpleNamespace(batch_progress=progress)
    )
    position = {"fit_loop": loop, "global_step": steps}
    trainer, module = planned(max_steps=limit, **position)
    assert total_batches(trainer) == total
    assert reached(trainer) == (done == total)
    trainer.max_steps, trainer.callbacks = -1, [SimpleNamespace(lifted_max_steps=limit)]
    assert total_batches(trainer) == total
    del module.num_minibatches  # a module of one's own: its steps are not known beforehand
    assert total_batches(trainer) == 40 and reached(trainer) == (steps >= limit)


def test_the_plan_names_the_limits_of_a_run():
    plan = plan_of(max_steps=9, global_step=0, callbacks=[Timer("00:01:00:00")])
    assert plan["plan"].startswith("3 rollouts, each 16 prompts")
    assert plan["plan"].endswith(
        "at most 15,360 tokens to sample, up to 9 optimizer steps (trainer.max_steps) and for at "
        "most 1:00:00 in all (trainer.max_time or Timer)"
    )
    assert plan["updates"].endswith(", 12 in all")


def test_the_plan_goes_by_the_schedule_of_the_whole_run_where_a_limit_cuts_it():
    config = OptimizerConfig(learning_rate=1.0, schedule="linear")
    changes = {"optimizer_config": config}
    plan = plan_of(module=changes, max_steps=8, global_step=0, max_epochs=2)
    assert plan["updates"].endswith(f"at most {4 * (1 + 79 / 80):.1e}")  # two rollouts of 80


@pytest.mark.parametrize(
    ("settings", "num_rollouts", "longer"),
    [
        ({"max_steps": 4}, 3, "--trainer.max_steps 8"),  # the data has more
        ({"max_steps": 12}, 3, "--trainer.max_steps 24 --data.num_rollouts 6"),
        ({"max_steps": 12, "max_epochs": 2}, 2, "--trainer.max_steps 24"),
    ],
)
def test_a_run_that_max_steps_ended_is_extended_by_what_bounds_it(
    tmp_path, capsys, settings, num_rollouts, longer
):
    module = RolloutDummy()
    module.num_minibatches = 4
    settings = {"val_check_interval": 2} | settings
    fit(tmp_path, [RunSummary()], num_rollouts=num_rollouts, module=module, **settings)
    lines = capsys.readouterr().out.splitlines()
    assert f"{settings['max_steps']} in all" in lines[1]
    command = lines[-1]
    assert command.startswith("extend") and command.endswith(f" {longer} --ckpt_path last")


def test_the_plan_knows_that_activations_are_recomputed():
    trainer, module = planned()

    def memory():
        return next(line for line in plan_lines(trainer, module) if line.startswith("memory"))

    usual = memory()
    module.policy.model.model.gradient_checkpointing = True  # as transformers marks it
    # 4 prompts of 32 tokens and 32 rows of 40: 2 layers of 11 x 64 + 4 x 256 values, beside each
    # row its prompt's keys and values of 64; or two inputs of 64 and one layer with its backward
    assert usual.startswith("memory    about 35 MiB for the policy: weights 1 MiB, gradients 1 MiB")
    assert "micro-batch 33 MiB, optimizer step 0 MiB; reference 1 MiB" in usual
    assert "micro-batch 19 MiB" in memory()
