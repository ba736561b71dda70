"""Short flags: which long keys they stand for, and what they refuse."""

import json

import pytest

from gspo_lightning.rewards import LastNumber
from gspo_lightning.start.short import SHORT, help_text, written_out
from gspo_lightning.start.typed import again, called
from support.command import instantiated, refused
from support.reward_functions import digits
from support.tiny_run import write_prompts


def test_flags_become_long_keys_which_no_config_behind_them_takes_back():
    words = ["fit", "--policy", "p", "--data=d.jsonl", "--config", "a", "--seed", "3"]
    assert written_out(words) == [
        *("fit", "--config", "a", "--model.policy.path", "p", "--data.path", "d.jsonl"),
        *("--seed_everything", "3"),
    ]
    same = ["fit", "--config", "a.yaml", "--data.path", "x", "--model.kl_coef=0.1"]
    assert written_out(same) == same and written_out(["fit", "--help"]) == ["fit", "--help"]
    assert written_out(["fit", "--rollouts", "1"])[:3] == ["fit", "--config", "base"]
    assert written_out([]) == []


def test_rewards_are_terms_under_their_own_names():
    words = [f"--reward={path}" for path in ("my.polite", "LastNumber", "other.polite")]
    (found,) = [w for w in written_out(["fit", *words]) if w.startswith("--model.rewards=")]
    assert json.loads(found.partition("=")[2]) == {
        "polite": {"fn": "my.polite"},
        "LastNumber": {"fn": "gspo_lightning.rewards.LastNumber"},
        "polite_2": {"fn": "other.polite"},
    }


@pytest.mark.parametrize(
    ("value", "is_file"),
    [
        ("rows.jsonl", True),
        ("openai/gsm8k", True),
        ("gspo_lightning.SFTData", False),
        ("PromptData", False),
        ("data.yaml", False),
        ("{path: x}", False),
    ],
)
def test_lightnings_own_data_option_is_left_alone(value, is_file):
    word = "--data.path" if is_file else "--data"
    assert written_out(["fit", "--config", "a", "--data", value])[-2:] == [word, value]


def test_the_doctor_keeps_its_own_option():
    words = ["doctor", "--config", "a", "--max_new_tokens", "8"]
    assert written_out(words) == words


@pytest.mark.parametrize(
    ("words", "line"),
    [
        ("--policy", "policy: --policy needs a value: the model to train"),
        ("--policy --seed 3", "policy: --policy needs a value"),
        ("--seed 3 --seed=4", "seed: --seed is given twice"),
        ("--data x --data.init_args.path y", "data.path: --data and --data.init_args.path set"),
        ("--policy x --model.policy.path=y", "--policy and --model.policy.path set the same key"),
        ("--policy x --model.policy y", "model.policy.path: --policy and --model.policy set the"),
        ("--policy x --model.policy={path:y}", "--policy and --model.policy set the same key"),
        ("--learning_rate 1 --model.optimizer=null", "--learning_rate and --model.optimizer set"),
        ("--seed 1 --run_folder x --trainer {'default_root_dir':y}", "--run_folder and --trainer"),
        ("--reward a.b --model.rewards.c.weight 2", "--reward and --model.rewards.c.weight set"),
    ],
)
def test_what_does_not_go_together_is_one_line(words, line):
    with pytest.raises(ValueError, match=line):
        written_out(["fit", *words.split()])


def test_a_mapping_around_the_key_of_a_flag_leaves_it_alone():
    words = ["--learning_rate", "1", "--model.optimizer", "{weight_decay: 0.5}"]
    optimizer = instantiated("--config", "arithmetic", *words).model.optimizer_config
    assert (optimizer.learning_rate, optimizer.weight_decay) == (1.0, 0.5)


def test_a_command_of_short_flags_needs_no_config(tmp_path, monkeypatch, model_dir, capsys):
    monkeypatch.chdir(tmp_path)
    prompts = write_prompts(tmp_path / "prompts.jsonl")
    words = {"policy": model_dir, "data": prompts, "val": prompts, "rollouts": 7, "seed": 5}
    words |= {"prompts_per_rollout": 3, "group_size": 4, "max_new_tokens": 6, "devices": 1}
    words |= {"learning_rate": 1e-3, "run_folder": "runs/short", "reward": "LastNumber"}
    assert words.keys() == SHORT.keys()
    flags = [word for name, value in words.items() for word in (f"--{name}", str(value))]
    template = ["--data.prompt_template", "{prompt}\nAnswer:"]
    cli = instantiated(*flags, "--reward", "support.reward_functions.digits", *template)
    module, data = cli.model, cli.datamodule
    assert module.policy_config.path == str(model_dir)
    assert module.rewards["digits"].fn is digits
    assert isinstance(module.rewards["LastNumber"].fn, LastNumber)
    assert (module.sampler.group_size, module.sampler.max_new_tokens) == (4, 6)
    assert module.optimizer_config.learning_rate == 1e-3
    assert data.paths["path"] == data.paths["val_path"] == str(prompts)
    assert (data.num_rollouts, data.prompts_per_rollout) == (7, 3)
    assert data.prompt_template == "{prompt}\nAnswer:"
    assert cli.root == tmp_path / "runs" / "short" and cli.config.fit.seed_everything == 5
    assert len(cli.trainer.callbacks) > 4  # those of base.yaml, too
    assert cli.config.fit.data.init_args.path == str(prompts)  # which config.yaml will say
    assert all(f"--{name} is --{key}" in help_text() for name, (key, _) in SHORT.items())
    line = refused(capsys, f"fit --policy {model_dir} --data {prompts}")
    assert line.startswith("model: rewards missing; set it in the config, or give --reward my_re")
    assert "did you mean `policy`" in refused(capsys, "fit --polcy x --config base")


def test_advice_inside_of_a_call_is_a_call():
    words = ["fit", "--policy", "x", "--data.num_rollouts", "6", "--ckpt_path", "last"]
    with called("train"):
        assert again(words) == "train(..., rollouts=6, ckpt_path='last')"
    assert "--ckpt_path last" in again(words)
