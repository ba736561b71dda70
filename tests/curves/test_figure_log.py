import contextlib
import csv
import io
import json
import re

import pytest
import torch
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger

from gspo_lightning import (
    AsyncSampler,
    CriticConfig,
    CurvePlot,
    EnvironmentReward,
    Evaluation,
    GroupSampler,
    Mismatch,
    ReferencePolicy,
    RewardTerm,
    RolloutCheckpoint,
    SampleTable,
)
from gspo_lightning.callbacks.report import draw_curves
from gspo_lightning.checkpoint.tables import _cut_rows
from gspo_lightning.curves import PICTURE, TABLE, curve
from gspo_lightning.curves.table import FIRST_SCREEN, LAYOUT, description
from gspo_lightning.guards.ignored import figures_of
from gspo_lightning.metrics import CURVES
from gspo_lightning.run.progress import RolloutProgress
from gspo_lightning.supervised import RewardModelModule, SFTModule
from support.curves_page import PAGE, written
from support.environments import Talker
from support.rollout_dummies import events
from support.run_folder import scalars
from support.tiny_run import PromptData, make_module, make_trainer, write_prompts


def read(folder):
    """Event files of a folder: the first metadata of each tag, and its points."""
    # as written: the other loader mends what TensorBoard's own server, which is in Rust, does not
    from tensorboard.backend.event_processing.event_file_loader import LegacyEventFileLoader

    metadata, points = {}, {}
    for file in sorted(folder.glob("events.out*")):
        for event in LegacyEventFileLoader(str(file)).Load():
            for value in event.summary.value:
                metadata.setdefault(value.tag, value.metadata)
                points.setdefault(value.tag, []).append(event.step)
    return metadata, points


@pytest.fixture(scope="module")
def run(tmp_path_factory, model_dir):
    """Two rollouts and their validations, with a TensorBoard, one with a prefix, and a table.

    Whatever counts rollouts is there, too; what the terminal shows is in `lines`.
    """
    folder = tmp_path_factory.mktemp("run")
    loggers = [
        TensorBoardLogger(folder, name="", version="", default_hp_metric=False),
        TensorBoardLogger(folder / "other", name="", version="", prefix="mine"),
        CSVLogger(folder / "rows", name="", version=""),
    ]
    module = make_module(
        model_dir,
        reference=ReferencePolicy(device="cpu"),
        evaluation=Evaluation(correct="digits", num_samples=2, ks=(1, 2)),
    )
    file = str(write_prompts(folder / "prompts.jsonl"))
    data = PromptData(file, prompts_per_rollout=4, num_rollouts=2, val_path=file)
    kept = [RolloutCheckpoint(1, keep_last=2), SampleTable(num_samples=16), CurvePlot()]
    options = {"logger": loggers, "num_sanity_val_steps": -1, "val_check_interval": 1}
    options |= {
        "callbacks": [*kept, RolloutProgress()],
        "enable_progress_bar": True,
        "enable_checkpointing": True,
    }
    trainer = make_trainer(folder, **options)
    with contextlib.redirect_stdout(io.StringIO()) as lines:
        trainer.fit(module, data)
    (folder / "lines").write_text(lines.getvalue())
    return folder, figures_of(module)


def test_the_first_group_asks_whether_it_learns_and_the_second_whether_it_is_healthy(run):
    _, points = read(run[0])
    # as TensorBoard sorts; a number in front stands before every letter
    assert sorted(points)[:12] == [
        "1 learning/1 reward",
        "1 learning/2 held-out accuracy",
        "1 learning/3 KL divergence",
        "1 learning/4 clip fraction",
        "1 learning/5 length",
        "1 learning/6 entropy",
        "2 health/1 reward spread",
        "2 health/2 solved groups",
        "2 health/3 hopeless groups",
        "2 health/4 truncated",
        "2 health/5 gradient norm",
        "2 health/6 spread of log-ratios",
    ]
    scalars = events(run[0], "scalars")
    for name, tag in FIRST_SCREEN.items():
        shown, own = ([(e.step, e.value) for e in scalars[n]] for n in (tag, name))
        assert shown == own and len(own) >= 2


def test_rollouts_count_from_1_and_the_evaluation_before_them_stands_at_0(run):
    _, points = read(run[0])
    assert points["train/reward"] == points["time/score"] == [1, 2]
    assert points["val/accuracy_greedy"] == [0, 1, 2]
    rows = (run[0] / "rows/metrics.csv").read_text().splitlines()
    steps = [dict(zip(rows[0].split(","), row.split(","), strict=True)) for row in rows[1:]]
    assert [row["step"] for row in steps if row["train/reward"]] == ["1", "2"]
    assert [row["step"] for row in steps if row["val/reward"]] == ["0", "1", "2"]
    assert not any(name[0].isdigit() for name in rows[0].split(","))  # TensorBoard's alone


def test_a_rollout_has_the_same_number_everywhere(run):
    curves = {name: dict(points) for name, points in scalars(run[0]).items()}
    with (run[0] / "rows/metrics.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    samples = [json.loads(line) for line in (run[0] / "samples.jsonl").read_text().splitlines()]
    lines = (run[0] / "lines").read_text()
    for number, reward in curves["train/reward"].items():
        of_it = [row["reward"] for row in samples if row["rollout"] == number]
        assert sum(of_it) / 16 == pytest.approx(reward, abs=1e-6)
        table = {k: v for row in rows if row["step"] == str(number) for k, v in row.items() if v}
        assert float(table["train/reward"]) == pytest.approx(reward)
        assert f"rollout {number}/2  reward {reward:6.3f}" in lines
        greedy = curves["val/accuracy_greedy"][number]
        assert float(table["val/accuracy_greedy"]) == pytest.approx(greedy)
        assert f"validation after {number} rollouts: greedy {greedy:.3f}" in lines
        file = run[0] / f"checkpoints/rollout={number:06d}.ckpt"
        points = torch.load(file, weights_only=True)["callbacks"]["CurvePlot"]["points"]
        drawn = draw_curves({"train/reward": points["train/reward"]}, None, False).axes[0].lines[0]
        x, y = drawn.get_data()
        assert (x[-1], y[-1]) == (number, pytest.approx(reward))


def test_every_tag_of_a_run_has_its_description_once(run):
    metadata, _ = read(run[0])
    figures = {tag: m for tag, m in metadata.items() if m.plugin_data.plugin_name == "scalars"}
    assert {tag for tag in metadata if "/" in tag and "hparams" not in tag} == figures.keys()
    assert len(figures) > 50
    for tag, found in figures.items():
        assert found.summary_description == description(tag) != ""
    assert figures["1 learning/5 length"].summary_description.endswith(
        "`train/avg_response_length`."
    )


def test_the_layout_draws_every_chart_that_it_names(run):
    metadata, points = read(run[0])
    assert metadata["custom_scalars__config__"].plugin_data.plugin_name == "custom_scalars"
    charts = {title: tags for group in LAYOUT.values() for title, tags in group.items()}
    for title in charts.keys() - {"critic", "turns"}:  # which this run has none of
        assert any(re.match(tag, name) for tag in charts[title] for name in points), title
    assert list(LAYOUT)[-1] == "Time and memory"


def test_names_with_a_prefix_stay_as_they_are(run):
    _, points = read(run[0] / "other")
    assert points["mine-train/reward"] == [1, 2]
    assert not any("1 learning" in tag for tag in points)


def test_the_page_has_every_figure():
    assert PAGE.read_text() == written(), "make curves"


def test_there_is_no_figure_without_a_description(run, model_dir):
    options = {"critic": CriticConfig(), "advantages": "gae", "overlong_ramp": 2}
    names = run[1] | figures_of(make_module(model_dir, **options))
    options = {"sampler": AsyncSampler(GroupSampler(), lag=0), "mismatch": Mismatch("mean")}
    names |= figures_of(make_module(model_dir, **options))
    sampler = GroupSampler(3, 4, environment=Talker())
    rewards = {"earned": RewardTerm(EnvironmentReward())}
    names |= figures_of(make_module(model_dir, sampler=sampler, rewards=rewards))
    names |= {*SFTModule.figures, *RewardModelModule.figures, *(f"train/{c}" for c in CURVES)}
    assert {name for name in names if curve(name) is None} == set()
    assert {name for name in PICTURE if name not in TABLE} == set()
    made = {name for name in names if name not in TABLE}
    assert {
        name for name in made if not re.match("memory/|reward/|val/(reward|pass)_", name)
    } == set()
    assert {name for name in TABLE if name not in names} == set()  # nor one of nothing


def test_rows_of_a_table_are_taken_back_to_a_checkpoint_by_what_they_count(tmp_path):
    file = tmp_path / "metrics.csv"
    kept = ["2,0.5,,,", "2,,0.1,,", "1,,,7,0", "1,,,8,"]  # rollout, validation, self.log, own
    gone = ["3,0.5,,,", "3,,0.1,,", "2,,,7,0"]
    head = "step,train/reward,val/reward,mine,epoch"
    file.write_text("\n".join([head, *gone, *kept, "2,,,8,"]) + "\n")
    _cut_rows(file, rollouts=2)
    assert file.read_text().split() == [head, *kept, "2,,,8,"]
    file.write_text("step,train/loss,train/learning_rate\n1,0.5,1e-3\n2,0.5,1e-3\n")
    _cut_rows(file, rollouts=2)  # the third of a supervised run has the number 2
    assert file.read_text().split()[1:] == ["1,0.5,1e-3"]
