"""Tables and pictures reach whatever logger there is, and the summary says where curves are."""

import csv
import json
from pathlib import Path

import numpy
import pytest
from lightning.pytorch.loggers import CometLogger, CSVLogger, MLFlowLogger, TensorBoardLogger
from lightning.pytorch.loggers.logger import DummyLogger

from gspo_lightning.callbacks import CurvePlot, SampleTable
from gspo_lightning.callbacks.loggers import places
from gspo_lightning.run.progress import RunSummary
from support.command import checkpoints, enter, run
from support.dummies import Refused
from support.rollout_dummies import events, fit


class Kept:
    """Takes every call and keeps it."""

    def __init__(self):
        self.calls = []

    def __getattr__(self, name):
        if name.startswith("_"):
            raise AttributeError(name)
        return lambda *args, **kwargs: self.calls.append((name, args, kwargs))

    def of(self, name):
        return [(args, kwargs) for called, args, kwargs in self.calls if called == name]


class Wandb(DummyLogger):
    """Has the methods of WandbLogger, and the address of its run."""

    def __init__(self):
        super().__init__()
        self.tables, self.images = [], []

    @property
    def experiment(self):
        class Run:
            url = "https://wandb.example/run/7"

        return Run()

    def log_table(self, key, columns=None, data=None, dataframe=None, step=None):
        self.tables.append((key, columns, data, step))

    def log_image(self, key, images, step=None, **kwargs):
        self.images.append((key, images, step))


class Texts(DummyLogger):
    """Can log texts alone, and has no address."""

    def __init__(self):
        super().__init__()
        self.texts = []

    def log_text(self, key, columns=None, data=None, dataframe=None, step=None):
        self.texts.append((key, columns, data, step))

    def __getattr__(self, name):
        raise AttributeError(name)  # DummyLogger has any method there is


def without_package(kind, **attributes):
    """A logger of Lightning's whose package is not installed, on a client that keeps calls."""
    client = Kept()
    fixed = {"experiment": client, "log_metrics": lambda *_, **__: None, "save_dir": None}
    fixed |= {"log_hyperparams": lambda *_, **__: None, "finalize": lambda *_: None}
    fixed |= {"name": "runs", "version": "3", "after_save_checkpoint": lambda *_: None}
    fixed |= {"_experiment": None}
    made = type(kind.__name__, (kind,), {"__init__": lambda self: None} | fixed | attributes)
    return made(), client


@pytest.fixture(scope="module")
def logged(tmp_path_factory):
    """Three rollouts with a table each and a picture at the end, for all loggers at once."""
    folder = tmp_path_factory.mktemp("logged")
    mlflow, mlflow_client = without_package(MLFlowLogger, run_id="r1")
    comet, comet_client = without_package(CometLogger)
    loggers = {
        "tensorboard": TensorBoardLogger(folder, name="", version=""),
        "csv": CSVLogger(folder / "rows", name="", version=""),
        "wandb": Wandb(),
        "texts": Texts(),
        "mlflow": mlflow,
        "comet": comet,
    }
    callbacks = [
        SampleTable(num_samples=2, text_every_n_rollouts=1),
        CurvePlot(99),  # drawn at the end
        RunSummary(),
    ]
    trainer, _ = fit(folder, callbacks, num_rollouts=3, logger=[*loggers.values()])
    return folder, trainer, loggers | {"mlflow": mlflow_client, "comet": comet_client}


def test_a_logger_like_that_of_wandb_gets_samples_as_a_table_and_curves_as_an_image(logged):
    _, _, loggers = logged
    key, columns, rows, step = loggers["wandb"].tables[0]
    assert (key, step, len(loggers["wandb"].tables)) == ("samples", 1, 3)
    assert columns[:5] == ["group", "prompt", "completion", "reward", "parts"]
    assert [row[:3] for row in rows] == [[1, "abc", "text 0.2"], [1, "abc", "text 0.0"]]
    assert all(len(row) == len(columns) for row in rows)
    assert [(key, step) for key, _, step in loggers["wandb"].images] == [("curves", 3)]
    (pixels,) = loggers["wandb"].images[0][1]
    assert pixels.dtype == numpy.uint8 and pixels.shape == (990, 1000, 3)


def test_a_logger_of_texts_gets_the_same_rows(logged):
    _, _, loggers = logged
    *tables, (name, columns, ((page,),), step) = sorted(loggers["texts"].texts)[::-1]
    assert tables == loggers["wandb"].tables[::-1]
    assert (name, columns, step) == ("run", ["page"], 0)
    assert "### Plan\n\n    plan " in page and "### Versions\n\n    python: " in page


def test_mlflow_and_comet_get_samples_as_text_and_curves_as_a_picture(logged):
    _, _, loggers = logged
    page, *texts = [args for args, _ in loggers["mlflow"].of("log_text")]
    assert page[0] == "r1" and page[2] == "run.md" and "### Plan" in page[1]
    assert [(run_id, file) for run_id, _, file in texts] == [
        ("r1", f"samples/rollout=00000{number}.md") for number in (1, 2, 3)
    ]
    assert "text 0&#46;2" in texts[0][1] and "text 1&#46;0" in texts[1][1]
    (run_id, pixels, name), _ = loggers["mlflow"].of("log_image")[0]
    assert (run_id, pixels.ndim, name) == ("r1", 3, "curves.png")
    assert [kwargs["step"] for _, kwargs in loggers["comet"].of("log_text")] == [0, 1, 2, 3]
    assert [kwargs["step"] for _, kwargs in loggers["comet"].of("log_image")] == [3]


def test_tensorboard_has_both_beside_other_loggers(logged):
    folder, _, _ = logged
    assert [e.step for e in events(folder, "images")["curves"]] == [3]
    tensors = events(folder, "tensors")
    assert len(tensors["samples/text_summary"]) == 3
    assert [e.step for e in tensors["run/text_summary"]] == [0]


def test_each_logger_says_where_its_curves_are(logged):
    folder, trainer, _ = logged
    assert places(trainer) == [
        f"tensorboard --logdir {folder}",
        f"{folder}/rows/metrics.csv",
        "https://wandb.example/run/7",
        "Texts",
        "MLFlowLogger runs 3",
        "CometLogger runs 3",
    ]


def test_the_summary_names_no_tensorboard_where_there_is_none(tmp_path, capsys):
    fit(tmp_path / "none", [RunSummary()], num_rollouts=3, logger=False)
    assert "curves " not in capsys.readouterr().out
    fit(tmp_path, [RunSummary()], num_rollouts=3, logger=CSVLogger(tmp_path / "rows", "", ""))
    assert f"curves    {tmp_path}/rows/metrics.csv\n" in capsys.readouterr().out


def test_rows_of_a_csv_logger_survive_a_kill_and_a_resume(tmp_path, capsys, monkeypatch):
    enter(tmp_path, monkeypatch)

    def rows(folder):
        with Path(folder, "metrics.csv").open() as file:
            return [{k: v for k, v in row.items() if v} for row in csv.DictReader(file)]

    def command(folder):
        logger = {"class_path": "lightning.pytorch.loggers.CSVLogger"}
        logger["init_args"] = {"save_dir": folder, "name": "", "version": ""}
        Path(f"{folder}.yaml").write_text(json.dumps({"trainer": {"logger": logger}}))
        return (
            f"fit --config dummy.yaml --config {folder}.yaml --trainer.default_root_dir {folder} "
            "--trainer.log_every_n_steps 0"  # or Lightning would have the logger write each time
        )

    code, _, err = run(capsys, command("whole"))
    assert code == 0, err
    monkeypatch.setattr(Refused, "at", "on_train_batch_end")  # of the third rollout
    monkeypatch.setattr(Refused, "error", RuntimeError("the module broke"))
    steps = {"failed": ["1", "2", "3"], "killed": ["1", "2"]}  # a kill leaves no time to write
    for folder, written in steps.items():
        with monkeypatch.context() as killed:
            if folder == "killed":
                killed.setattr(CSVLogger, "finalize", lambda *_: None)
            broken = f"{command(folder)} --trainer.callbacks+=support.dummies.Refused"
            code, _, err = run(capsys, broken)
        assert code == 1 and checkpoints(folder) == ["rollout=000002.ckpt"], err
        assert [row["step"] for row in rows(folder)] == written
        code, _, err = run(capsys, f"{command(folder)} --ckpt_path last")
        assert (code, "deleted" in err) == (0, False), err
        assert rows(folder) == rows("whole")
