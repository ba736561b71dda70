"""`train`: a whole run from Python by one call, as `gspo fit` makes it."""

import ast
import re
import signal

import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM

import train as command
from gspo_lightning import EnvironmentReward, PolicyConfig, RewardTerm, Turn, train
from gspo_lightning.checkpoint import find_checkpoint
from gspo_lightning.rewards.left_out import in_config
from support.environments import Says
from support.repository import ROOT
from support.reward_functions import digits
from support.tiny_run import write_prompts

FEW = {"prompts_per_rollout": 4, "group_size": 2, "max_new_tokens": 6, "learning_rate": 1e-2}
BARE = """
trainer: {accelerator: cpu, enable_progress_bar: false}
model:
  class_path: gspo_lightning.GSPOModule
  init_args: {sampler: {class_path: gspo_lightning.GroupSampler}}
data: {class_path: gspo_lightning.PromptData}
"""
SERVED = {"class_path": "gspo_lightning.VLLMSampler", "init_args": {"server": "http://127.0.0.1:1"}}
AHEAD = {"class_path": "gspo_lightning.AsyncSampler", "init_args": {"inner": SERVED}}
TALKS = {"environment": Says(0)}
PROMPTS = [f"{i}+{i + 1}=" for i in range(1, 6)]


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("PL_GLOBAL_SEED", raising=False)
    return tmp_path


def weights(checkpoint):
    return torch.load(checkpoint, weights_only=True)["state_dict"]


def test_the_five_lines_of_the_readme_train_the_shipped_policy(here, capsys):
    text = (ROOT / "README.md").read_text().partition("## Your own run in five lines")[2]
    code = re.search(r"```python\n(.*?)```", text, re.DOTALL)[1].replace(
        "rollouts=20", "rollouts=2"
    )
    assert len(ast.parse(code).body) == 5
    known = {"__name__": "__main__"}
    exec(code, known)
    run = known["run"]
    assert run.folder == here / "runs" / "default"
    assert len(repr(run)) < 400 and str(run.folder) in repr(run)  # a notebook shows it
    assert run.checkpoint == find_checkpoint(run.folder, "last") and run.trainer.world_size == 1
    assert run.module.generate(["7+9+4="])[0][0].startswith(export_says(run, "7+9+4="))
    assert "extend    train(..., rollouts=4, ckpt_path='last')" in capsys.readouterr().out
    config = yaml.safe_load((run.folder / "config.yaml").read_text())
    assert config["data"]["init_args"]["num_rollouts"] == 2
    told = config["model"]["init_args"]["rewards"]["right"]["fn"]
    assert told["init_args"]["what"] == "__main__.right"


def export_says(run, prompt):
    model = AutoModelForCausalLM.from_pretrained(run.export)
    ids = torch.tensor([run.module.tokenizer(prompt)["input_ids"]])
    found = model.generate(ids, max_new_tokens=20, do_sample=False)[0, ids.shape[1] :]
    return run.module.tokenizer.decode(found, skip_special_tokens=True)


@pytest.mark.slow
def test_short_flags_train_to_the_bits_of_a_call(here):
    path = str(write_prompts(here / "prompts.jsonl"))
    more = FEW | {"seed": 3}
    run = train("data/arithmetic/policy", path, digits, val=path, rollouts=2, **more)
    words = ["fit", "--policy", "data/arithmetic/policy", "--data", path, "--val", path]
    words += ["--rollouts", "2", "--reward", "support.reward_functions.digits"]
    flags = [f"--{name}={value}" for name, value in more.items()]
    assert command.main([*words, *flags, "--run_folder", "shell"]) == 0
    ours, theirs = weights(run.checkpoint), weights(find_checkpoint(here / "shell", "last"))
    assert all(torch.equal(ours[name], theirs[name]) for name in ours | theirs)


@pytest.mark.slow
def test_what_a_program_has_in_its_hands_goes_on_exactly_or_is_refused(here, model_dir, capsys):
    (here / "bare.yaml").write_text(BARE)

    def start(length, folder, reward=None, prompts=PROMPTS, **more):
        policy = AutoModelForCausalLM.from_pretrained(model_dir)
        reward = reward or (lambda rows, completions: [float(len(c)) for c in completions])
        more = {"run_folder": folder, "rollouts": length, "config": "bare.yaml"} | FEW | more
        return train(policy, prompts, reward, **more)

    whole = start(3, "whole")
    start(2, "cut")
    way_out = r'go on with ckpt_path="last", rollouts=4, or start .* run_folder="NEW"'
    with pytest.raises(ValueError, match=way_out):
        start(3, "cut")
    again = {"ckpt_path": "last"}
    with pytest.raises(ValueError, match=r'settings={"accept_changes": True} to .*rewards.reward'):
        start(3, "cut", lambda rows, completions: [0.0] * len(completions), **again)
    with pytest.raises(ValueError, match=r"data.path has other content"):
        start(3, "cut", prompts=[*PROMPTS[:-1], "3="], **again)
    cut = start(3, "cut", **again)
    capsys.readouterr()
    start(3, "cut", **again)
    done = capsys.readouterr().err
    assert "run; rollouts=6 makes it longer" in done and 'its own, run_folder="NEW"' in done
    one, other = weights(whole.checkpoint), weights(cut.checkpoint)
    assert all(torch.equal(one[name], other[name]) for name in one | other)
    config = yaml.safe_load((cut.folder / "config.yaml").read_text())
    start(3, "cut", **again)
    assert "; rollouts=6 makes it longer, " in capsys.readouterr().err
    assert config["data"]["init_args"]["path"] == "a list of 5 rows in memory"
    assert config["model"]["init_args"]["policy"]["path"] == str(model_dir)
    told = config["model"]["init_args"]["rewards"]["reward"]["fn"]
    assert told["class_path"].endswith("GivenInPython") and "<lambda>, code" in str(told)


@pytest.mark.parametrize(
    ("given", "error", "line"),
    [
        ({"kl_coef": 0.1}, TypeError, r"`kl_coef`; give it as settings={\"model.kl_coef\": ...}"),
        ({"beta": 0.1}, TypeError, r"`beta`; give it as settings={\"model.kl_coef\": ...}"),
        ({"train_dataset": []}, TypeError, "`train_dataset`, did you mean `prompts`"),
        ({"policy": 3}, ValueError, "model.policy: expected a folder, .* a PolicyConfig; got 3"),
        ({"policy": ""}, ValueError, "policy.path is empty; give a folder"),
        ({"prompts": (p for p in PROMPTS)}, ValueError, r"got generator; give list\(...\) of it"),
        ({"prompts": {"prompt": PROMPTS}}, ValueError, "got dict; a row is a dict, and a list of"),
        ({"reward": None}, ValueError, "^model.rewards: expected RewardTerm"),
        ({"reward": {1: digits}}, ValueError, "a term is named by a text, got 1"),
        ({"reward": "right"}, ValueError, "of your own has its module in front: my_rewards.right"),
        ({"config": None}, ValueError, "config: expected a file or a name, .*; got None"),
        ({"settings": ["a"]}, ValueError, "settings: expected a dict, such as .*; got list"),
        ({"settings": {"--a.b": 1}}, ValueError, "keys without dashes, such as .*; got '--a.b'"),
        ({"settings": {"kl_coef": 1}}, ValueError, "`kl_coef`, did you mean `model.kl_coef`"),
        ({"seed": "a"}, ValueError, "seed_everything: expected bool or int, got a"),
        ({"devices": 0}, ValueError, "trainer.devices: expected a number .* at least 1.*; got 0"),
        ({"lr": 1e-3}, TypeError, "train: unknown key `lr`, did you mean `learning_rate`\\?"),
        ({"rollout": 3}, TypeError, "did you mean `rollouts`"),
        ({"rollouts": 0}, ValueError, "data.num_rollouts must be >= 1, got 0"),
        ({"settings": {"model.kl_coeff": 1}}, ValueError, "unknown key .*did you mean `.*kl_coef"),
        ({"settings": {"data.path": "x"}}, ValueError, "settings: data.path is set by a keyword"),
        ({"settings": {"model.rewards.digits.weight": 2}}, ValueError, "is set by a keyword"),
        ({"config": "nowhere"}, ValueError, "config: there is no file nowhere"),
        ({"prompts": 3}, ValueError, "data.path: expected a file, .* got int"),
        ({"environment": Says}, ValueError, "environment: expected .*; got the class Says"),
        ({"environment_factory": Says}, TypeError, "did you mean `environment`"),
        ({"environment": Says(0)}, ValueError, "sampler.environment needs a term"),
        (TALKS | {"settings": {"model.sampler.init_args.environment": 1}}, ValueError, "a keyword"),
        (TALKS | {"settings": {"model.sampler": TALKS}}, ValueError, "a keyword already"),
        (
            TALKS | {"settings": {"model.sampler": AHEAD}},
            ValueError,
            "environment: the sampler of this config takes no",
        ),
        ({"reward": [digits, 3]}, ValueError, "model.rewards: expected RewardTerm .*, got int"),
        ({"reward": "no.such"}, ValueError, "model.rewards.fn: there is no module no"),
        ({"ckpt_path": "last"}, ValueError, "no checkpoint.*; leave ckpt_path out .* run_folder$"),
    ],
)
def test_what_cannot_be_is_one_line_and_leaves_nothing(here, model_dir, given, error, line):
    known = {"policy": str(model_dir), "prompts": PROMPTS, "reward": digits} | FEW
    with pytest.raises(error, match=line) as caught:
        train(**known | given)
    assert "\n" not in str(caught.value) and list(here.iterdir()) == []
    assert caught.value.__cause__ is None  # a notebook would show its frames, too, above the line


def test_a_config_a_term_and_a_signal(here, model_dir):
    class Stops:
        def __call__(self, rows, completions):
            signal.raise_signal(signal.SIGINT)
            return [1.0] * len(completions)

    term = RewardTerm(Stops(), weight=0.5)
    policy, settings = PolicyConfig(str(model_dir)), {"model.entropy_coef": 0.5}
    (here / "bare.yaml").write_text(BARE)
    settings |= {"trainer.enable_checkpointing": True}
    with pytest.raises(KeyboardInterrupt):
        terms = {"stops": term}
        train(policy, PROMPTS, terms, rollouts=9, settings=settings, config="bare.yaml", **FEW)
    assert find_checkpoint(here / "runs" / "default", "last").stem == "rollout=000001"
    config = yaml.safe_load((here / "runs" / "default" / "config.yaml").read_text())["model"]
    assert config["init_args"]["entropy_coef"] == 0.5
    assert config["init_args"]["policy"]["gradient_checkpointing"] is False
    assert config["init_args"]["rewards"]["stops"]["weight"] == 0.5


def test_a_config_of_a_call_says_what_it_lacks(here, model_dir, capsys):
    told = in_config(lambda rows, completions: [])
    text = {"model": {"class_path": "gspo_lightning.GSPOModule", "init_args": {
        "policy": {"path": str(model_dir)}, "rewards": {"reward": {"fn": told}}}},
        "data": {"class_path": "gspo_lightning.PromptData", "init_args": {
            "path": str(write_prompts(here / "p.jsonl"))}}}  # fmt: skip
    (here / "made.yaml").write_text(yaml.safe_dump(text))
    assert command.main(["fit", "--config", "made.yaml", "--trainer.accelerator=cpu"]) == 2
    assert "was given by a Python program; call train there" in capsys.readouterr().err


def test_an_environment_is_given_as_it_is_and_the_config_names_it(here, model_dir, capsys):
    heard = []

    def answer(row, text):  # of this call alone: nothing could import it
        heard.append(text)
        return Turn("+" if len(heard) % 2 else None, reward=1.0)

    (here / "bare.yaml").write_text(BARE)
    known = {"rollouts": 2, "config": "bare.yaml", "environment": Says(answer)} | FEW
    settings = {"model.sampler.max_turns": 2, "model.policy.stop_token_ids": list(range(1, 19))}
    prompts, reward = str(write_prompts(here / "p.jsonl")), EnvironmentReward()
    run = train(str(model_dir), prompts, reward, settings=settings, **known)
    assert run.module.sampler.environment is known["environment"] and len(heard) > 16
    assert run.trainer.callback_metrics["train/reward"] > 0.5
    written = run.folder / "config.yaml"
    assert "what: support.environments.Says" in written.read_text()
    words = ["fit", "--config", str(written), "--trainer.default_root_dir=other"]
    assert command.main(words) == 2
    said = capsys.readouterr().err
    assert "support.environments.Says is named here and not imported" in said
    assert "train(environment=...)" in said
