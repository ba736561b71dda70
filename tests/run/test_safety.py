"""Files and texts of others: nothing in them is run, and nothing written here is open to others."""

import ast
import os
import re
import warnings
from fnmatch import fnmatch
from html.parser import HTMLParser
from pathlib import Path

import pytest

import train
from gspo_lightning.callbacks.report import markdown_table
from gspo_lightning.checkpoint import places
from gspo_lightning.frozen.reward_model import RewardModel
from gspo_lightning.policy.policy import PolicyConfig
from gspo_lightning.run.command import Watch
from gspo_lightning.run.ending import report
from gspo_lightning.run.one_line import quiet
from gspo_lightning.run.terminal_log import TerminalLog
from support.repository import ROOT
from support.tiny_run import write_prompts

with warnings.catch_warnings():  # the way in which TensorBoard cleans HTML is old
    warnings.simplefilter("ignore", DeprecationWarning)
    from tensorboard.plugin_util import markdown_to_safe_html


RUN = """
seed_everything: 0
trainer:
  default_root_dir: runs/open
  accelerator: cpu
  num_sanity_val_steps: 0
  callbacks:
    - {class_path: gspo_lightning.RolloutCheckpoint}
    - {class_path: gspo_lightning.SampleTable, init_args: {text_every_n_rollouts: 1}}
    - {class_path: gspo_lightning.CurvePlot}
    - {class_path: gspo_lightning.HFExport}
model:
  class_path: gspo_lightning.GSPOModule
  init_args:
    policy: {path: %s}
    sampler:
      class_path: gspo_lightning.GroupSampler
      init_args: {group_size: 4, max_new_tokens: 4}
    rewards: {mine: {fn: %s}}
data:
  class_path: gspo_lightning.PromptData
  init_args: {path: prompts.jsonl, prompts_per_rollout: 4, num_rollouts: 1}
"""
NASTY = [
    "<script>alert(1)</script>",
    '<img src=x onerror="alert(1)">',
    "[click](javascript:alert(1)) ![x](javascript:alert(1))",
    "<http://a.example> https://a.example",
    "| a | b |\n|---|---|\n| c | d |",
    "```\ncode\n``` and `code`",
    "# head\r\n> quote\n\n1. one\n* two\n---\n",
    "[ref]: javascript:alert(1)\n[ref]",
    "&lt;b&gt; &amp;#60;b&amp;#62;",
    "$x$ \\(y\\) ~~z~~ **b** __u__",
    "\x02klzzwxh:0000\x03 \x00 \x1b[31mred\x1b[0m \x9b2J",
    "line\u2028separator \x0b \x0c \x85 end",
]


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delenv("PL_GLOBAL_SEED", raising=False)
    monkeypatch.delenv("GSPO_TRACEBACK", raising=False)
    write_prompts(tmp_path / "prompts.jsonl")
    return tmp_path


# ---- file modes ----------------------------------------------------------------------------------


def test_nothing_that_a_run_writes_can_be_changed_by_group_or_world(folder, model_dir, capsys):
    Path("run.yaml").write_text(RUN % (model_dir, "support.reward_functions.digits"))
    umask = os.umask(0)  # everything is open to everybody
    try:
        assert train.main(["fit", "--config", "run.yaml"]) == 0, capsys.readouterr().err
        command = ["predict", "--config", "run.yaml", "--ckpt_path", "last"]
        assert train.main(command) == 0, capsys.readouterr().err
        after = os.umask(0)
    finally:
        os.umask(umask)
    assert after == 0  # given back
    written = [Path("runs"), *Path("runs").rglob("*")]
    names = {path.name for path in written}
    assert {"config.yaml", "versions.yaml", "log.txt", "samples.jsonl", "curves.png"} <= names
    assert {"rollout=000001.ckpt", "model.safetensors", "predictions.jsonl"} <= names
    assert any(name.startswith("events.out.tfevents") for name in names)
    chosen = {"curves.png", "export", "predictions.jsonl"}  # by callbacks
    others = {path.name for path in Path("runs/open").iterdir()} - chosen
    patterns = (*places.FILES, *places.FOLDERS, places.EVENTS)
    assert not [name for name in others if not any(fnmatch(name, p) for p in patterns)]
    loose = [str(path) for path in written if path.stat().st_mode & 0o022]
    assert not loose


def test_a_stricter_umask_stays_and_so_does_a_folder(folder, model_dir, capsys):
    Path("run.yaml").write_text(RUN % (model_dir, "support.reward_functions.digits"))
    Path("runs").mkdir()
    Path("runs").chmod(0o777)
    umask = os.umask(0o077)
    try:
        assert train.main(["fit", "--config", "run.yaml"]) == 0, capsys.readouterr().err
    finally:
        os.umask(umask)
    assert not [path for path in Path("runs").rglob("*") if path.stat().st_mode & 0o077]
    assert Path("runs").stat().st_mode & 0o777 == 0o777  # it was there before


# ---- code of others ------------------------------------------------------------------------------


def calls(path):
    """Every call of a file, with the dotted name of what is called."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Call):
            yield ast.unparse(node.func), node


FILES = [ROOT / "train.py", *sorted((ROOT / "gspo_lightning").rglob("*.py"))]


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_no_file_runs_what_it_reads(path):
    runs_programs = path.stem == "one_program"  # the process of CodeTests, which is asked to
    for name, call in calls(path):
        running = {"eval", "exec", "compile", "__import__", "os.system"}
        assert name not in running or (runs_programs and name in ("exec", "compile")), name
        assert not re.search(
            r"(pickle|dill|marshal|joblib)\.loads?$|yaml\.(unsafe_|full_)?load$", name
        ) or (
            path.stem == "time_limit"  # a message between two processes of one run
        ), name
        assert not name.endswith("torch.hub.load"), name
        assert not name.endswith("SourceFileLoader") or runs_programs, name
        given = {keyword.arg: ast.unparse(keyword.value) for keyword in call.keywords}
        assert given.get("shell", "False") == "False", name
        if name.endswith("load_dataset"):  # without that word, versions that know scripts run none
            assert not given.keys() & {"trust_remote_code", None}, name
        if name == "torch.load":
            assert given.get("weights_only") == "True", f"{path.name}:{call.lineno}"
        if re.match(r"Auto\w+\.from_(pretrained|config)$|auto\.from_", name):
            # named here, or in the options that every caller fills
            assert given.keys() & {"trust_remote_code", None}, f"{path.name}:{call.lineno}"


def test_remote_code_is_off_unless_asked():
    assert PolicyConfig("name").trust_remote_code is False
    assert RewardModel("name").trust_remote_code is False


# ---- texts of others -----------------------------------------------------------------------------


class Cells(HTMLParser):
    """Tags of an HTML table, and the text of its cells."""

    def __init__(self, text):
        super().__init__()
        self.tags = set()
        self.texts = []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.add(tag)
        if tag in ("td", "th"):
            self.texts.append("")

    def handle_data(self, data):
        if self.texts:
            self.texts[-1] += data


@pytest.mark.parametrize("text", NASTY, ids=range(len(NASTY)))
def test_tensorboard_shows_a_completion_as_it_stands(text):
    sample = {"prompt": text, "completion": text, "reward": 1.0, "parts": {text: 1.0}}
    sample |= {"advantage": 0.0, "length": 3, "truncated": False, "ratio": 1.0}
    found = Cells(markdown_to_safe_html(markdown_table([sample | {"group": g} for g in (0, 1)])))
    assert found.tags == {"table", "thead", "tbody", "tr", "th", "td"}
    columns = 8
    assert len(found.texts) == 3 * columns  # heads and two rows, nothing has broken out of a cell
    first, second = found.texts[columns : columns + 2]
    assert first == second

    def visible(text):
        """White space is all one in HTML; what is not seen is written as Python does."""
        plain = (c if c.isprintable() or c in "\n\r\t" else repr(c)[1:-1] for c in text)
        return " ".join("".join(plain).split())

    assert " ".join(first.split()) == visible(text)


def test_no_control_character_of_a_completion_reaches_terminal_or_log(folder, model_dir, capsys):
    Path("nasty.py").write_text(
        "def fn(rows, completions):\n"
        "    raise ValueError('\\x1b]0;title\\x07 \\x1b[2J \\x9b31m \\u202e')\n"
    )
    Path("run.yaml").write_text(RUN % (model_dir, "nasty.fn"))
    assert train.main(["fit", "--config", "run.yaml"]) == 2
    shown = "".join(capsys.readouterr()) + Path("runs/open/log.txt").read_text()
    assert "title" in shown
    assert not re.search("[\x00-\x09\x0b-\x1f\x7f-\x9f\u202e]", shown)


def test_a_traceback_has_no_control_characters(capsys):
    watch = Watch()
    watch.begun = True
    assert report(RuntimeError("\x1b[2J of a library"), watch, lambda _: "") == 1
    err = capsys.readouterr().err
    assert err == "RuntimeError: \\x1b[2J of a library\n"


def test_a_warning_has_no_control_characters(capsys):
    with warnings.catch_warnings(), quiet():
        warnings.simplefilter("always")
        warnings.warn("completion \x1b[2J\x9b1m", stacklevel=1)
    assert capsys.readouterr().err == "warning: completion \\x1b[2J\\x9b1m\n"


def test_the_log_holds_text_alone(tmp_path, capsys):
    log = TerminalLog()
    log.open(tmp_path / "log.txt", ["train.py"])
    try:
        print("\x1b]0;title\x07a \x1b]8;;http://a.example\x1b\\b \x1b[1;31mc \x9b2J \x08\x00d\te")
    finally:
        log.close()
    assert (tmp_path / "log.txt").read_text().splitlines()[1] == r"a b c \x9b2J \x08\x00d" "\te"
