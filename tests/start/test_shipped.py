"""Configs by name, and the data of the package."""

import io
from pathlib import Path

import pytest

import train
from gspo_lightning.start import shipped

SHIPPED = str(shipped.CONFIGS / "task" / "gsm8k.yaml")


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["gspo"])


@pytest.mark.parametrize("name", ["task/gsm8k", "configs/task/gsm8k.yaml"])
def test_a_config_is_found_by_its_name_in_any_folder(name):
    assert shipped.find_config(name) == (SHIPPED, None)


@pytest.mark.parametrize(
    "name",
    ["gsm8k", "task/gsm8k.yaml", "task", "../configs/base", "", "/", "~nobody/x", "long" * 99],
)
def test_what_is_no_name_of_a_config_stays_a_path(name):
    assert shipped.find_config(name) == (name, None)


@pytest.mark.parametrize("file", ["task/gsm8k", "task/gsm8k.yaml"])
def test_a_file_of_the_user_wins_and_says_so(file):
    Path("task").mkdir()
    Path(file).write_text("mine")
    path, note = shipped.find_config("task/gsm8k")
    assert path == file
    assert note == (
        f"config task/gsm8k: the file {file} is taken, not the package's config of this name"
    )
    shown = ["fit", "--config", file, "-c=base"]
    replaced, notes = shipped.with_paths(shown)
    assert replaced == ["fit", "--config", file, f"-c={shipped.CONFIGS}/base.yaml"]
    assert bool(notes) == (file == "task/gsm8k")  # a path with its ending can mean one file only


def test_data_of_the_package_is_taken_where_there_is_none_here():
    ours = str(shipped.DATA / "arithmetic" / "train.jsonl")
    assert shipped.find_data("data/arithmetic/train.jsonl") == ours
    assert shipped.data_in('{"path": "data/arithmetic/policy", "x": ["data/none", "adata/x"]}') == [
        "data/arithmetic/policy"
    ]
    for path in ("data", "data/", "data/none", "data/../configs", "org/data/arithmetic", "/data"):
        assert shipped.find_data(path) == path
    Path("data/arithmetic").mkdir(parents=True)
    Path("data/arithmetic/train.jsonl").touch()
    assert shipped.find_data("data/arithmetic/train.jsonl") == "data/arithmetic/train.jsonl"


def test_configs_lists_each_with_its_first_sentence_and_prints_one(capsys):
    assert train.main(["configs"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == shipped.config_list()
    assert {"arithmetic", "base", "task/gsm8k", "hardware/one_gpu"} <= set(shipped.config_list())
    assert max(map(len, lines)) <= 100 and min(len(line.split()) for line in lines) > 3
    assert train.main(["configs", "task/gsm8k"]) == 0
    assert capsys.readouterr().out == Path(SHIPPED).read_text()


@pytest.mark.parametrize(
    ("command", "line"),
    [
        ("configs gsm8k", "the package has no config gsm8k; did you mean task/gsm8k?"),
        ("configs ../pyproject", "the package has no config ../pyproject; `gspo configs` lists"),
        ("fitt", "unknown command `fitt`, did you mean `fit`?"),
        ("sing", "unknown command `sing`; there are fit, validate, test, predict, "),
        ("fit arithmetic", "unexpected argument `arithmetic`, did you mean `--config arithmetic`?"),
        ("fit --config kl/off", "kl/off goes on top of a whole config: --config base --config kl"),
        ("fit --config ~nobody/x", "config: there is no file ~nobody/x (looked in "),
        (f"fit --config {'long' * 99}", "config: there is no file longlong"),
        ("fit --config TASK/GSM8K", "no config TASK/GSM8K in the package; did you mean task/gsm8k"),
        ("fit --config aritmetic", "no config aritmetic in the package; did you mean arithmetic, "),
    ],
)
def test_a_name_that_is_nowhere_is_one_line_with_those_near(capsys, command, line):
    assert train.main(command.split()) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("error: ") and err.count("\n") == 1 and line in err


@pytest.mark.parametrize("name", ["task/gsm8k", "configs/kl/adaptive.yaml"])
def test_an_overlay_alone_is_told_what_goes_below_it(name):
    with pytest.raises(ValueError, match=f"{name} goes on top .*: --config base --config {name}$"):
        shipped.with_paths(["fit", "--config", name])
    shipped.with_paths(["fit", "--config", name, "--model", "gspo_lightning.GSPOModule"])


def test_a_copy_of_a_config_has_its_bytes_on_a_terminal_of_ascii(monkeypatch):
    out = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr("sys.stdout", out)
    assert train.main(["configs", "task/reasoning"]) == 0
    assert out.buffer.getvalue() == (shipped.CONFIGS / "task/reasoning.yaml").read_bytes()
