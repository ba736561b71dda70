"""docs/turns.md: its programs run, its configs are parsed, and doctor warns of what it says."""

import json
import re
from importlib.resources import files
from types import SimpleNamespace

import pytest
import yaml

from gspo_lightning import ToolEnvironment
from gspo_lightning.doctor.text import history
from gspo_lightning.policy.chat import Chat
from support.command import instantiated
from support.environments import add
from support.repository import ROOT

PAGE = (ROOT / "docs" / "turns.md").read_text()
BLOCKS = {kind: re.findall(rf"```{kind}\n(.*?)```", PAGE, re.DOTALL) for kind in ("python", "yaml")}


def ran(number):
    names = {}
    exec(BLOCKS["python"][number], names)
    return names


def test_the_fifteen_lines_are_a_game():
    episode = ran(0)["GuessDigit"]().begin({"answer": "7"}, 0)
    turns = [episode.step(text) for text in ("5", "9 ", "7")]
    assert [turn.message for turn in turns] == ["higher", "lower", None]
    assert turns[-1].reward == 1
    code = [line for line in BLOCKS["python"][0].splitlines() if line and "import" not in line]
    assert len(code) <= 15


def test_the_five_lines_are_a_tool():
    environment = ToolEnvironment([ran(1)["area"]], form="hermes")
    call = '<tool_call>{"name": "area", "arguments": {"width": 2, "height": 1.5}}</tool_call>'
    assert environment.begin({}, 0).step(call).text == "3.0"


def test_a_call_trains_with_it(model_dir, tmp_path):
    """In the page's words, but for the files."""
    rows = [{"prompt": f"{i}+1=", "answer": str(i + 1)} for i in range(8)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    few = f"run_folder={str(tmp_path / 'run')!r}, rollouts=1, prompts_per_rollout=2, devices=1"
    few += ", group_size=2, max_new_tokens=6, settings={'trainer.accelerator': 'cpu'}"
    code = BLOCKS["python"][2].replace("Qwen/Qwen3-0.6B", str(model_dir))
    code = code.replace("rows.jsonl", str(tmp_path / "rows.jsonl"))
    code = code.replace("environment=GuessDigit()", f"environment=GuessDigit(), {few}")
    exec(code, ran(0))
    assert "what: builtins.GuessDigit" in (tmp_path / "run" / "config.yaml").read_text()


def test_the_configs_are_some(at_the_root, tmp_path):
    settings, tools = map(yaml.safe_load, BLOCKS["yaml"])
    sampler = settings["model"]["init_args"]["sampler"]["init_args"]
    assert sampler["environment"] == {"class_path": "my_envs.GuessDigit"}
    further = tools["model"]["init_args"]
    environment = further["sampler"]["init_args"]["environment"]
    assert environment["init_args"] == {"tools": ["my_tools.area"]}
    environment["init_args"]["tools"] = ["support.environments.add"]
    sampler["environment"] = environment
    settings["model"]["init_args"]["rewards"] |= further["rewards"]
    (tmp_path / "turns.yaml").write_text("# the page's\n" + yaml.safe_dump(settings))
    module = instantiated(
        *("--config", "configs/turns.yaml", "--config", tmp_path / "turns.yaml"),
        *("--trainer.default_root_dir", tmp_path / "run"),
    ).model
    assert module.sampler.environment.tools == [add]
    assert module.sampler.environment_seconds == 10 and module.rewards["won"].policy.skip
    assert module.rewards.keys() == {"won", "used", "right"}
    assert module.hparams["evaluation"]["correct"] == "won"


THOUGHTS, OPENING = "takes the thoughts out", "begins earlier answers otherwise"


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        *(("qwen2_5", []), ("gptoss", []), ("llama3_1", []), ("qwen3", [THOUGHTS])),
        *(("qwen3_5_nothink", [THOUGHTS, OPENING]), ("glm4moe", [THOUGHTS, OPENING])),
    ],
)
def test_doctor_warns_of_templates_that_show_another_history(name, changes):
    text = (files("trl") / "chat_templates" / f"{name}.jinja").read_text()
    finding = history(Chat(SimpleNamespace(chat_template=text, special_tokens_map={})))
    assert finding.status == ("warning" if changes else "ok")
    assert len(finding.value) == len(changes)
    assert all(found.startswith(c) for found, c in zip(finding.value, changes, strict=True))
