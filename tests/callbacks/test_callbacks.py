import gc
import json
import math
import os
import shutil
from collections import Counter
from types import SimpleNamespace

import jsonargparse
import pytest
import torch
from lightning.pytorch import Callback
from PIL import Image

from gspo_lightning.callbacks import (
    AdaptiveKL,
    CurvePlot,
    HFExport,
    PredictionWriter,
    SampleTable,
)
from gspo_lightning.callbacks.files import export_whole
from gspo_lightning.callbacks.report import (
    chosen_rows,
    draw_curves,
    markdown_table,
    running_mean,
)
from gspo_lightning.checkpoint.io import CheckpointError
from gspo_lightning.curves import PICTURE
from gspo_lightning.kl import MultiplicativeKL, ProportionalKL
from support.rollout_dummies import (
    RolloutData,
    RolloutDummy,
    events,
    fit,
    make_outputs,
    make_trainer,
)


def coefficients(callback, observed, world_size=1, sequences=6):
    """The coefficient used in each rollout, then the one after the last."""
    trainer = SimpleNamespace(world_size=world_size, datamodule=None)
    module = SimpleNamespace(reference=object(), kl_coef=None)
    callback.on_fit_start(trainer, module)
    used = [module.kl_coef]
    for kl in observed:
        rollout = SimpleNamespace(rewards=torch.zeros(sequences))
        metrics = {} if kl is None else {"train/kl_divergence": kl}
        outputs = {"metrics": metrics, "rollout": rollout}
        callback.on_train_batch_end(trainer, module, outputs, None, 0)
        used.append(module.kl_coef)
    return used


def test_the_coefficient_follows_the_rule_after_each_rollout():
    used = coefficients(AdaptiveKL(MultiplicativeKL(target=0.01), 0.2), [0.03, 0.01, 0.001])
    assert used == pytest.approx([0.2, 0.3, 0.3, 0.15])


def test_warmup_lets_the_coefficient_rise_but_not_fall():
    used = coefficients(AdaptiveKL(initial=0.2, warmup=2), [0.0, 0.03, 0.0])
    assert used == pytest.approx([0.2, 0.2, 0.3, 0.15])


def test_the_proportional_rule_counts_the_sequences_of_all_ranks():
    rule = ProportionalKL(target=0.01, horizon=100)
    used = coefficients(AdaptiveKL(rule, 0.2), [0.02], world_size=4, sequences=5)
    assert used[-1] == pytest.approx(0.2 * (1 + 0.2 * 20 / 100))


@pytest.mark.parametrize("observed", [math.nan, None])
def test_a_rollout_without_kl_leaves_the_coefficient_unchanged(observed):
    assert coefficients(AdaptiveKL(initial=0.2), [observed])[-1] == 0.2


def test_the_coefficient_survives_a_checkpoint(tmp_path):
    fit(tmp_path / "whole", [AdaptiveKL()], num_rollouts=6)
    fit(tmp_path / "cut", [AdaptiveKL()], num_rollouts=4)
    resumed = AdaptiveKL()
    _, module = fit(tmp_path / "cut", [resumed], num_rollouts=6, ckpt="last")
    weights = [
        torch.load(tmp_path / d / "checkpoints/rollout=000006.ckpt") for d in ("whole", "cut")
    ]
    assert weights[0]["callbacks"]["AdaptiveKL"] == weights[1]["callbacks"]["AdaptiveKL"]
    assert module.kl_coef == resumed.coef == pytest.approx(0.2 * 0.5 * 1.5 * 1.5)
    assert resumed.rollouts_seen == 6


def test_the_module_starts_with_the_callbacks_coefficient(tmp_path):
    seen = []

    class Spy(Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            seen.append(pl_module.kl_coef)

    fit(tmp_path, [AdaptiveKL(initial=0.4), Spy()], num_rollouts=3)
    assert seen == [0.4, 0.2, 0.2]  # KL 0 is below half the target, 0.006 is not


def test_adaptive_kl_needs_a_reference(tmp_path):
    with pytest.raises(ValueError, match="AdaptiveKL needs a reference policy"):
        fit(tmp_path, [AdaptiveKL()], module=RolloutDummy(reference=False))


def test_a_coefficient_that_stays_and_one_that_adapts_are_refused_together(tmp_path):
    module = RolloutDummy()
    module.hparams["kl_coef"] = 0.04
    with pytest.raises(ValueError, match=r"model.kl_coef is 0.04, and AdaptiveKL .*, 0.2 at first"):
        fit(tmp_path, [AdaptiveKL()], module=module)
    fit(tmp_path, [AdaptiveKL(initial=0.04)], module=module)


def test_a_horizon_too_short_for_the_rollout_is_refused_before_training(tmp_path):
    seen = []

    class Spy(Callback):
        def on_train_batch_start(self, *_):
            seen.append(1)

    with pytest.raises(ValueError, match="horizon must exceed"):
        fit(tmp_path, [AdaptiveKL(ProportionalKL(target=0.01, horizon=1)), Spy()])
    assert not seen


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: AdaptiveKL(initial=0.0), "initial must be finite and > 0, got 0.0"),
        (lambda: AdaptiveKL(initial=math.nan), "initial must be finite and > 0, got nan"),
        (lambda: AdaptiveKL(warmup=-1), "warmup must be >= 0, got -1"),
        (lambda: CurvePlot(every_n_rollouts=0), "every_n_rollouts must be >= 1, got 0"),
        (lambda: CurvePlot(path="/tmp/x.png"), "path must be a name inside the run folder"),
        (lambda: SampleTable(num_samples=0), "num_samples must be >= 1, got 0"),
        (lambda: SampleTable(text_every_n_rollouts=0), "text_every_n_rollouts must be >= 1"),
        (lambda: HFExport(path=""), "path must be a name inside the run folder"),
        (lambda: HFExport(path="../x"), "path must be a name inside the run folder"),
        (lambda: HFExport(best_path="/x"), "path must be a name inside the run folder"),
        (
            lambda: HFExport("a", monitor="val/x", best_path="./a"),
            "best_path must differ from path",
        ),
        (lambda: HFExport(mode="best"), "mode must be max or min, got 'best'"),
        (lambda: HFExport(every_n_rollouts=0), "every_n_rollouts must be >= 1, got 0"),
        (lambda: PredictionWriter(path="."), "path must be a name inside the run folder"),
    ],
)
def test_a_bad_argument_is_named_with_its_bound_and_value(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize(
    ("rule", "expected"),
    [
        ("{target: 0.05}", MultiplicativeKL(target=0.05)),
        (
            "{class_path: gspo_lightning.kl.ProportionalKL, init_args: {target: 0.05, horizon: 9}}",
            ProportionalKL(target=0.05, horizon=9),
        ),
        (
            "{class_path: gspo_lightning.kl.MultiplicativeKL, init_args: {target: 0.05}}",
            MultiplicativeKL(target=0.05),
        ),
    ],
)
def test_a_rule_parses_from_yaml(rule, expected):
    parser = jsonargparse.ArgumentParser(exit_on_error=False)
    parser.add_argument("--callbacks", type=list[Callback])
    text = (
        "callbacks: [{class_path: gspo_lightning.callbacks.files.AdaptiveKL, "
        f"init_args: {{initial: 0.1, rule: {rule}}}}}]"
    )
    callback = parser.instantiate(parser.parse_string(text)).callbacks[0]
    assert callback.rule == expected
    assert callback.coef == 0.1


def test_the_figure_shows_points_target_and_the_reason_for_an_empty_panel():
    names = "train/reward", "train/kl_divergence", "train/kl_loss"
    points = {name: [] for name in names}
    points["train/kl_divergence"] = [[0, 0.0], [1, 0.02], [2, 0.01]]
    figure = draw_curves(points, kl_target=0.015, has_reference=True)
    panels = dict(zip(names, figure.axes, strict=False))  # the fourth is empty
    drawn = [line.get_xydata().tolist() for line in panels["train/kl_divergence"].lines]
    assert [[1, 0.0], [2, 0.02], [3, 0.01]] in drawn
    assert {y for _, y in drawn[-1]} == {0.015}
    assert panels["train/kl_loss"].texts[0].get_text() == "nothing measured"
    figure = draw_curves({name: [] for name in names}, None, has_reference=False)
    texts = [axes.texts[0].get_text() for axes in figure.axes[:3]]
    assert texts == ["nothing measured", *["no reference policy"] * 2]


def test_a_running_mean_keeps_a_straight_line_and_its_length():
    line = [0.5 * i for i in range(20)]
    means = running_mean(line, width=3)
    assert len(means) == 20
    assert [m for m in means if not math.isnan(m)] == pytest.approx(line[2:18])


def test_the_picture_is_drawn_on_time_and_at_the_end(tmp_path):
    fit(tmp_path, [CurvePlot(every_n_rollouts=2, path="plots/c.png"), AdaptiveKL()], num_rollouts=5)
    with Image.open(tmp_path / "plots/c.png") as picture:
        assert picture.size == (1000, 990)
    images = events(tmp_path, "images")["c"]
    assert [image.step for image in images] == [2, 4, 5]
    assert (images[0].width, images[0].height) == (1000, 990)
    assert not list((tmp_path / "plots").glob("*.partial"))


def test_the_end_of_the_run_is_drawn_once_and_nothing_of_it_stays(tmp_path):
    gc.collect()
    gc.disable()  # which in a process with torch looks through everything only now and then
    try:
        fit(tmp_path, [CurvePlot(every_n_rollouts=2)], num_rollouts=4)
        # asked past their metaclasses: another test's class will not say its name
        name_of = type.__getattribute__
        kinds = Counter(name_of(type(thing), "__name__") for thing in gc.get_objects())
    finally:
        gc.enable()
    assert [image.step for image in events(tmp_path, "images")["curves"]] == [2, 4]
    assert [kinds[name] for name in ("Figure", "RendererAgg", "Axes")] == [0, 0, 0]
    assert gc.get_freeze_count() == 0


def test_a_resumed_run_draws_the_whole_run(tmp_path):
    fit(tmp_path, [CurvePlot()], num_rollouts=3)
    plot = CurvePlot()
    fit(tmp_path, [plot], num_rollouts=5, ckpt="last")
    assert [index for index, _ in plot.points["train/reward"]] == [0, 1, 2, 3, 4]
    assert plot.points["train/kl_divergence"][2] == pytest.approx([2, 0.012])


def test_two_pictures_of_a_run_keep_apart_and_go_on(tmp_path):
    def plots():
        return [CurvePlot(99), CurvePlot(99, "other/losses.png", ["train/policy_loss"])]

    fit(tmp_path, plots(), num_rollouts=3)
    resumed = plots()
    fit(tmp_path, resumed, num_rollouts=4, ckpt="last")
    assert resumed[1].points == {"train/policy_loss": [[i, -0.001] for i in range(4)]}
    assert len(resumed[0].points["train/reward"]) == 4
    images = events(tmp_path, "images")
    assert {name: [i.step for i in found][-1] for name, found in images.items()} == {
        "curves": 4,
        "losses": 4,
    }
    with Image.open(tmp_path / "other/losses.png") as picture:
        assert picture.size == (1000, 330)


def test_the_picture_has_held_out_figures_from_before_training_to_the_last(tmp_path):
    plot = CurvePlot()
    settings = {"num_sanity_val_steps": -1, "val_check_interval": 2}
    fit(tmp_path, [plot], num_rollouts=4, **settings)
    held_out = plot.points["val/accuracy_greedy"]
    assert held_out == [[-1, 0.0], [1, pytest.approx(0.2)], [3, pytest.approx(0.4)]]
    axes = draw_curves(plot.panels(), None, has_reference=True).axes[1]
    assert axes.get_title(loc="left") == "Held-out accuracy"
    assert axes.lines[0].get_xdata().tolist() == [0, 2, 4]


def test_a_held_out_reward_stands_in_for_an_accuracy_that_nobody_measures():
    plot = CurvePlot()
    plot.points["val/reward"] = [[1, 0.5]]
    assert [*plot.panels()][:3] == ["train/reward", "val/reward", "train/kl_divergence"]
    plot.points["val/accuracy_greedy"] = [[1, 0.5]]
    assert tuple(plot.panels()) == PICTURE


def test_points_of_an_earlier_version_are_drawn_on():
    plot = CurvePlot()
    plot.load_state_dict({"points": {"reward": [[0, 0.5]], "kl_coef": [[0, 0.2]]}})
    assert plot.points["train/reward"] == [[0, 0.5]] and plot.points["val/reward"] == []


def test_a_curve_that_does_not_exist_is_refused():
    with pytest.raises(ValueError, match="there is no figure 'train/rewards'; docs/curves"):
        CurvePlot(curves=["train/reward", "train/rewards"])


def test_a_curve_skips_what_is_not_finite():
    plot = CurvePlot()
    outputs = make_outputs(0, train__reward=math.nan)
    plot.on_train_batch_end(None, None, outputs, None, 0)
    assert plot.points["train/reward"] == []
    assert plot.points["train/avg_response_length"] == [[0, 18.25]]


def read_lines(folder):
    return [json.loads(line) for line in (folder / "samples.jsonl").read_text().splitlines()]


def test_a_sample_line_holds_the_values_of_its_row(tmp_path):
    fit(tmp_path, [SampleTable(num_samples=3)], num_rollouts=3)
    lines = read_lines(tmp_path)
    assert [line["rollout"] for line in lines] == [1, 1, 1, 2, 2, 2, 3, 3, 3]
    # of rewards 0, 1.1 and 1.2 and of 1.3, 1.4 and 1.5: the group that differs most, best first
    assert [line["completion"] for line in lines[3:6]] == ["text 1.2", "text 1.1", "text 1.0"]
    assert lines[3] == {
        "rollout": 2,
        "group": 1,
        "prompt": "abc",
        "completion": "text 1.2",
        "reward": 1.2,
        "parts": {"correct": 1.2, "style": 0.25},
        "advantage": 0.2,
        "length": 5,
        "truncated": True,
        "ratio": 1.002,
    }


def test_the_table_takes_pairs_of_the_groups_that_differ_most():
    rewards = torch.tensor([[1, 1, 1, 1], [0, 3, 1, 2], [math.nan, 0, 1, 0.5]]).flatten()

    def rows(num_samples, num_prompts):
        return chosen_rows(rewards, 4, num_samples, num_prompts)

    assert rows(4, 2) == [5, 4, 10, 8]  # what could not be scored is the worst of its group
    assert rows(6, 3) == [5, 4, 10, 8, 0, 3]  # a group without spread comes last
    assert rows(4, 1) == [5, 7, 6, 4]  # from best to worst
    assert rows(3, 9) == [5, 6, 4]  # no single ones: there would be nothing to compare
    assert rows(99, 2) == [5, 7, 6, 4, 10, 11, 9, 8, 0, 1, 2, 3]
    assert chosen_rows(torch.full((4,), math.nan), 2, 4, 2) == [0, 1, 2, 3]
    assert chosen_rows(torch.tensor([1.0, 0, 2]), 1, 2, 2) == [0, 1]


def test_samples_of_a_version_that_counted_from_0_are_counted_from_1(tmp_path):
    fit(tmp_path, [SampleTable(num_samples=1)], num_rollouts=3)
    file = tmp_path / "samples.jsonl"
    now = file.read_text()
    rows = [json.loads(line) for line in now.splitlines()]
    old = [json.dumps(row | {"rollout": row["rollout"] - 1}) + "\n" for row in rows]
    file.write_text("".join([*old, '{"rollout": 3}\n']))  # one that runs again
    fit(tmp_path, [SampleTable(num_samples=1)], num_rollouts=4, ckpt="last")
    assert [row["rollout"] for row in read_lines(tmp_path)] == [1, 2, 3, 4]
    assert file.read_text().startswith(now)


def test_a_missing_reward_is_null(tmp_path):
    table = SampleTable(num_samples=1)
    trainer = SimpleNamespace(default_root_dir=tmp_path, is_global_zero=True, loggers=[])
    outputs = make_outputs(0)
    outputs["rollout"].rewards[:] = math.nan
    table.on_train_batch_end(trainer, RolloutDummy(), outputs, None, 0)
    assert read_lines(tmp_path)[0]["reward"] is None


def test_only_rank_zero_writes_samples(tmp_path):
    trainer = SimpleNamespace(default_root_dir=tmp_path, is_global_zero=False, loggers=[])
    SampleTable().on_train_batch_end(trainer, RolloutDummy(), make_outputs(0), None, 0)
    assert not list(tmp_path.iterdir())


def test_samples_after_kill_and_resume_equal_those_of_one_run(tmp_path):
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    fit(whole, [SampleTable(every_n_rollouts=2, num_samples=4)], num_rollouts=8)
    fit(cut, [SampleTable(every_n_rollouts=2, num_samples=4)], num_rollouts=6)
    for number in (4, 5, 6):  # as if killed while rollout 8 was written, checkpoint 3 the newest
        (cut / f"checkpoints/rollout={number:06d}.ckpt").unlink()
    with (cut / "samples.jsonl").open("a") as file:
        file.write('{"rollout": 8, "prompt": "ab')
    fit(cut, [SampleTable(every_n_rollouts=2, num_samples=4)], num_rollouts=8, ckpt="last")
    assert (cut / "samples.jsonl").read_bytes() == (whole / "samples.jsonl").read_bytes()


def test_of_a_long_text_the_table_has_head_and_tail():
    sample = {
        "group": 1,
        "prompt": "p",
        "completion": "y" * 998 + "z",
        "reward": 0.5,
        "parts": {"a": None},
    }
    sample |= {"advantage": -1.5, "length": 3, "truncated": True, "ratio": 1.0001}
    assert "| " + "y" * 198 + " … " + "y" * 197 + "z |" in markdown_table([sample])


def test_the_text_table_reaches_tensorboard(tmp_path):
    fit(tmp_path, [SampleTable(text_every_n_rollouts=2)], num_rollouts=5)
    texts = events(tmp_path, "tensors")["samples/text_summary"]
    assert [text.step for text in texts] == [2, 4]
    assert b"text 3&#46;5" in texts[1].tensor_proto.string_val[0]


def test_the_export_holds_the_final_policy(tmp_path):
    _, module = fit(tmp_path, [HFExport(path="out/model")], num_rollouts=3)
    written = (tmp_path / "out/model/weight.txt").read_text()
    assert written == f"{module.policy.weight[0, 0].item():.9f}"


def test_two_callbacks_cannot_write_to_one_place(tmp_path):
    with pytest.raises(ValueError, match=r"path '\./a' is that of two callbacks"):
        fit(tmp_path, [CurvePlot(path="./a"), HFExport("a")], num_rollouts=3)


def test_weights_of_an_earlier_export_do_not_stay_beside_new_ones(tmp_path):
    names = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
    new = [*names, "model.safetensors.index.json"]

    def export(path):
        path.mkdir()
        for name in new:
            (path / name).touch()

    (tmp_path / "export").mkdir()
    for name in ("model.safetensors", "notes.md"):  # one file of all weights would be loaded first
        (tmp_path / "export" / name).touch()
    export_whole(SimpleNamespace(global_rank=0, export=export), tmp_path, "export")
    assert sorted(os.listdir(tmp_path / "export")) == [*new, "notes.md"]


def test_an_export_replaces_a_link_and_not_what_it_leads_to(tmp_path):
    """As in the cache of the hub, where a model's files are links to what others use, too."""
    (tmp_path / "export").mkdir()
    (tmp_path / "blob").write_text("weights of others")
    (tmp_path / "export/weight.txt").symlink_to("../blob")
    (tmp_path / "export/notes.md").write_text("mine")
    (tmp_path / ".export.partial").mkdir()  # of an export that was killed
    (tmp_path / ".export.partial/half").touch()
    fit(tmp_path, [HFExport()], num_rollouts=3)
    assert (tmp_path / "blob").read_text() == "weights of others"
    assert not (tmp_path / "export/weight.txt").is_symlink()
    assert sorted(os.listdir(tmp_path / "export")) == ["README.md", "notes.md", "weight.txt"]
    assert not list(tmp_path.glob(".*"))


class ExportsNothing(RolloutDummy):
    """As transformers does, with a line in the log, where it may not write."""

    def export(self, path):
        pass


class ExportIsRefused(RolloutDummy):
    def export(self, path):
        raise PermissionError(13, "Permission denied", str(path / "weight.txt"))


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        (ExportsNothing, "the model wrote no file"),
        (ExportIsRefused, "permission denied; the check"),
    ],
)
def test_an_export_that_fails_is_an_error(tmp_path, kind, reason):
    with pytest.raises(
        CheckpointError, match=f"export {tmp_path}/export was not written: {reason}"
    ):
        fit(tmp_path, [HFExport()], num_rollouts=3, module=kind())


def test_the_export_has_a_period_of_its_own(tmp_path):
    seen = []

    class Spy(RolloutDummy):
        def export(self, path):
            super().export(path)
            seen.append(self.trainer.fit_loop.total_batch_idx)

    fit(tmp_path, [HFExport(every_n_rollouts=2)], num_rollouts=5, module=Spy())
    assert seen == [1, 3, 4]


class Judged(RolloutDummy):
    """Validates after rollouts 2, 4 and 6, with given figures (and once before training)."""

    def __init__(self, *figures):
        super().__init__()
        self.figures = [9.0, *figures]  # the evaluation before training is the best of all

    def validation_step(self, batch, batch_idx):
        done = self.trainer.fit_loop.total_batch_idx + 1
        self.log("val/score", self.figures[done // 2], batch_size=2)

    def export(self, path):
        super().export(path)
        (path / "rollouts.txt").write_text(str(self.trainer.fit_loop.total_batch_idx + 1))


def exported(folder, mode, *figures, num_rollouts=6, ckpt=None):
    export = HFExport(monitor="val/score", mode=mode, best_path="best")
    options = {"num_rollouts": num_rollouts, "ckpt": ckpt, "val_check_interval": 2}
    options["check_val_every_n_epoch"] = None
    fit(folder, [export], module=Judged(*figures), **options)
    names = ("export", "best")
    return [int((folder / name / "rollouts.txt").read_text()) for name in names]


@pytest.mark.parametrize(("mode", "best"), [("max", 4), ("min", 6)])
def test_the_best_export_is_of_the_best_validation(tmp_path, mode, best):
    assert exported(tmp_path, mode, 0.5, 0.7, 0.2) == [6, best]


def test_an_equal_or_missing_figure_does_not_replace_the_best(tmp_path):
    assert exported(tmp_path, "max", 0.5, 0.5, math.nan) == [6, 2]


def test_the_best_figure_survives_a_checkpoint(tmp_path):
    exported(tmp_path, "max", 0.5, 0.7, num_rollouts=4)
    assert exported(tmp_path, "max", 0.5, 0.7, 0.6, ckpt="last") == [6, 4]


def test_a_figure_that_the_validation_has_not_is_an_error_before_training(tmp_path):
    with pytest.raises(ValueError, match=r"monitor 'val/typo' is never logged.*\{accuracy_greedy"):
        fit(tmp_path, [HFExport(monitor="val/typo")])
    assert not (tmp_path / "checkpoints").exists()


def test_predictions_are_json_lines_and_replace_older_ones(tmp_path):
    for _ in range(2):
        trainer = make_trainer(tmp_path, [PredictionWriter()])
        trainer.predict(RolloutDummy(), datamodule=RolloutData(1))
    lines = (tmp_path / "predictions.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [json.loads(line) for line in lines]
    assert [row["prompt"] for row in rows] == ["p0", "p1"]
    assert [row["completions"][0]["reward"] for row in rows] == [1.0, None]
    assert "7 € x" in lines[0]


def test_each_rank_writes_predictions_of_its_own(tmp_path):
    writer = PredictionWriter()
    for rank in (0, 1):
        trainer = SimpleNamespace(default_root_dir=tmp_path, global_rank=rank)
        writer.on_predict_start(trainer, None)
        writer.on_predict_batch_end(trainer, None, [{"prompt": str(rank)}], None, 0)
    assert json.loads((tmp_path / "predictions.jsonl").read_text()) == {"prompt": "0"}
    assert json.loads((tmp_path / "predictions.rank1.jsonl").read_text()) == {"prompt": "1"}


def test_callback_state_loads_as_plain_values(tmp_path):
    fit(tmp_path, [AdaptiveKL(), CurvePlot(), SampleTable(), HFExport()], num_rollouts=3)
    copy = shutil.copy(tmp_path / "checkpoints/rollout=000003.ckpt", tmp_path / "copy.ckpt")
    state = torch.load(copy, weights_only=True)["callbacks"]
    assert state["CurvePlot"]["points"]["train/reward"][0] == [0, 0.5]
