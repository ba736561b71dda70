"""A continued run is the same run, or says what has changed and how to go on all the same."""

import importlib
import json
import shutil
from pathlib import Path

import pytest
import torch

import train
from gspo_lightning.checkpoint.fingerprints import (
    MOVED,
    differences,
    moved,
    tokenizer_fingerprint,
)
from support.run_folder import assert_same, names, state
from support.tiny_models import build_model, build_tokenizer
from support.tiny_run import write_prompts

CONFIG = """
trainer:
  accelerator: cpu
  enable_progress_bar: false
  default_root_dir: run
  callbacks: [{class_path: gspo_lightning.RolloutCheckpoint, init_args: {every_n_rollouts: 1}}]
model:
  class_path: gspo_lightning.GSPOModule
  init_args:
    policy: {path: policy}
    reference: {path: start, device: cpu}
    kl_coef: 0.1
    num_minibatches: 2
    sampler:
      class_path: gspo_lightning.GroupSampler
      init_args: {group_size: 4, max_new_tokens: 6}
    rewards: {digits: {fn: support.reward_functions.digits}}
data:
  class_path: gspo_lightning.PromptData
  init_args: {path: prompts.jsonl, prompts_per_rollout: 4, num_rollouts: 1}
"""


def write_policy(path, seed=0):
    build_model("qwen3", seed).save_pretrained(path)
    build_tokenizer().save_pretrained(path)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A run of one rollout with all its files beside it."""
    folder = tmp_path_factory.mktemp("finished")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        Path("run.yaml").write_text(CONFIG)
        write_prompts(Path("prompts.jsonl"))
        write_policy("policy")
        write_policy("start")
        assert train.main(["fit", "--config", "run.yaml"]) == 0
    return folder


@pytest.fixture
def copied(finished, tmp_path, monkeypatch):
    shutil.copytree(finished, tmp_path / "copy")
    monkeypatch.chdir(tmp_path / "copy")


def go_on(*options):
    longer = "--data.num_rollouts=2"
    return train.main(["fit", "--config", "run.yaml", "--ckpt_path=last", longer, *options])


def change_a_prompt():
    rows = Path("prompts.jsonl").read_text().splitlines()
    rows[3] = json.dumps({"prompt": "1+2="})
    Path("prompts.jsonl").write_text("\n".join(rows))


def change_a_column():
    """What only a reward reads."""
    lines = Path("prompts.jsonl").read_text().splitlines()
    rows = [json.loads(line) | {"answer": i} for i, line in enumerate(lines)]
    Path("prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def change_the_order():
    rows = Path("prompts.jsonl").read_text().splitlines(keepends=True)
    Path("prompts.jsonl").write_text("".join(reversed(rows)))


def change_the_reference():
    write_policy("start", seed=1)


def change_the_tokenizer():
    file = Path("policy", "tokenizer.json")
    state = json.loads(file.read_text())
    vocabulary = state["model"]["vocab"]
    vocabulary["1"], vocabulary["2"] = vocabulary["2"], vocabulary["1"]
    file.write_text(json.dumps(state))


def nothing():
    pass


@pytest.mark.parametrize(
    ("change", "options", "line"),
    [
        (change_a_prompt, [], "data.path has other content"),
        (change_a_column, [], "data.path has other content"),
        (change_the_order, [], "data.path has other content"),
        (change_the_reference, [], "model.reference has other weights"),
        (change_the_tokenizer, [], "tokenizer is another"),
        (nothing, ["--model.kl_coef=0.2"], "model.init_args.kl_coef 0.1 -> 0.2"),
        (nothing, ["--model.sampler.temperature=0.5"], "temperature 1.0 -> 0.5"),
        (nothing, ["--model.rewards.digits.weight=3"], "rewards.digits.weight 1.0 -> 3.0"),
        (nothing, ["--data.prompts_per_rollout=2"], "data.init_args.prompts_per_rollout 4 -> 2"),
        (nothing, ["--seed_everything=1"], "seed_everything 0 -> 1"),
        (nothing, ["--trainer.precision=bf16-mixed"], "trainer.precision"),
        (nothing, ["--model.num_epochs=2", "--model.kl_coef=0"], "kl_coef 0.1 -> 0.0; model.init_"),
    ],
)
def test_a_change_that_makes_it_another_run_is_refused_in_one_line_until_it_is_accepted(
    copied, capsys, change, options, line
):
    change()
    assert go_on(*options) == 2
    *_, error = capsys.readouterr().err.splitlines()
    assert error.startswith("error: this would not continue the same run; add --accept_changes tr")
    assert line in error
    assert names("run") == ["rollout=000001.ckpt"]
    assert go_on(*options, "--accept_changes=true") == 0
    assert names("run") == ["rollout=000001.ckpt", "rollout=000002.ckpt"]
    assert "accept_changes" not in Path("run", "config.resume-000001.yaml").read_text()


ADAPTIVE = """
trainer:
  callbacks:
    - {class_path: gspo_lightning.RolloutCheckpoint, init_args: {every_n_rollouts: 1}}
    - class_path: gspo_lightning.AdaptiveKL
      init_args:
        initial: INITIAL
        warmup: WARMUP
        rule: {class_path: gspo_lightning.kl.RULE, init_args: {target: TARGET}}
"""


def adaptive(rule="MultiplicativeKL", target=0.12, initial=0.2, warmup=5):
    values = {"RULE": rule, "TARGET": target, "INITIAL": initial, "WARMUP": warmup}
    text = ADAPTIVE
    for name, value in values.items():
        text = text.replace(name, str(value))
    Path("adaptive.yaml").write_text(text)
    return "--config=adaptive.yaml"


@pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`")
def test_another_rule_of_the_kl_coefficient_makes_it_another_run(copied, capsys):
    command = ["fit", "--config=run.yaml", adaptive(), "--trainer.default_root_dir=kl"]
    command.append("--model.kl_coef=0.0")
    assert train.main(command) == 0
    last = [*command, "--ckpt_path=last", "--data.num_rollouts=2"]
    for change, line in [
        (
            {"target": 5.0, "warmup": 0, "initial": 0.3},
            "AdaptiveKL.initial 0.2 -> 0.3; AdaptiveKL.rule.target 0.12 -> 5.0; AdaptiveKL.warmup "
            "5 -> 0",
        ),
        ({"rule": "ProportionalKL"}, 'AdaptiveKL.rule "MultiplicativeKL" -> "ProportionalKL"'),
    ]:
        adaptive(**change)
        capsys.readouterr()
        assert train.main(last) == 2
        assert line in capsys.readouterr().err
    Path("adaptive.yaml").write_text("trainer: {}")  # no AdaptiveKL at all
    assert train.main(last) == 2
    assert 'AdaptiveKL.rule "MultiplicativeKL" -> null' in capsys.readouterr().err
    adaptive(target=5.0)
    assert train.main([*last, "--accept_changes=true"]) == 0


def test_what_was_accepted_once_is_the_run_from_then_on(copied):
    assert go_on("--model.kl_coef=0.2", "--accept_changes=true") == 0
    assert go_on("--model.kl_coef=0.2", "--data.num_rollouts=3") == 0
    assert go_on("--model.kl_coef=0.1", "--data.num_rollouts=4") == 2


@pytest.mark.parametrize(
    "options",
    [
        ["--model.optimizer.learning_rate=0.1", "--model.optimizer.weight_decay=0.1"],
        [
            "--model.evaluation.num_samples=2",
            "--model.evaluation.ks=[1]",
            "--data.val_path=prompts.jsonl",
        ],
        ["--trainer.val_check_interval=2", "--trainer.max_epochs=2"],
        ["--trainer.callbacks+=gspo_lightning.SampleTable"],
        ["--model.reference.device=policy", "--model.frozen_device=cpu"],
        [  # what is advised where memory is short
            *("--model.micro_batch_size=1", "--model.micro_batch_tokens=64"),
            *("--model.reference.batch_size=4", "--model.sampler.init_args.batch_size=8"),
        ],
        ["--model.max_faults=9", "--model.stop_when=[]"],
    ],
)
def test_what_changes_no_number_of_a_rollout_but_by_rounding_may_change_at_will(copied, options):
    assert go_on(*options) == 0
    assert names("run")[-1] != "rollout=000001.ckpt"


def test_files_may_move(copied):
    Path("elsewhere").mkdir()
    for name in ("prompts.jsonl", "policy", "start"):
        shutil.move(name, "elsewhere")
    options = ["--data.path=elsewhere/prompts.jsonl", "--model.policy.path=elsewhere/policy"]
    assert go_on(*options, "--model.reference.path=elsewhere/start") == 0


def test_an_evaluation_may_use_other_data_and_models(copied):
    change_a_prompt()
    change_the_reference()
    options = ["--data.val_path=prompts.jsonl", "--model.kl_coef=0.3", "--seed_everything=5"]
    assert train.main(["validate", "--config", "run.yaml", "--ckpt_path=last", *options]) == 0


def test_the_learning_rate_of_the_config_wins_over_that_of_the_checkpoint(copied):
    """What is free to change without a word has an effect."""
    assert go_on("--model.optimizer.learning_rate=0.1") == 0
    groups = state("run", 2)["optimizer_states"][0]["param_groups"]
    assert {group["lr"] for group in groups} == {0.1}


def test_without_changes_the_longer_run_is_the_straight_one(copied):
    assert go_on() == 0
    command = ["fit", "--config", "run.yaml", "--data.num_rollouts=2"]
    assert train.main([*command, "--trainer.default_root_dir=straight"]) == 0
    left, right = state("run", 2), state("straight", 2)
    assert left["fingerprints"]["data.path"] and left["fingerprints"]["tokenizer"]
    assert left["fingerprints"]["model.reference"]
    assert_same(left, right)


def test_what_a_call_leaves_in_a_tokenizer_is_no_change():
    tokenizer = build_tokenizer()
    before = tokenizer_fingerprint(tokenizer)
    tokenizer(["1+2=", "1="], padding=True, truncation=True, max_length=3)
    assert tokenizer_fingerprint(tokenizer) == before
    tokenizer.chat_template = "{{ messages }}"
    assert tokenizer_fingerprint(tokenizer) != before


def test_a_slow_tokenizer_has_a_fingerprint():
    class Slow:
        def __init__(self, vocabulary):
            self.special_tokens_map = {"eos_token": "</s>"}
            self.vocabulary = vocabulary

        def get_vocab(self):
            return self.vocabulary

    marks = {tokenizer_fingerprint(Slow(v)) for v in ({"a": 0, "b": 1}, {"b": 1, "a": 0})}
    assert len(marks) == 1
    assert tokenizer_fingerprint(Slow({"a": 1, "b": 0})) not in marks


def test_a_checkpoint_holds_plain_values_alone(copied):
    path = Path("run", "checkpoints", "rollout=000001.ckpt")
    assert torch.load(path, weights_only=True)["fingerprints"]["model.init_args.kl_coef"] == 0.1


def test_a_class_path_from_before_the_rooms_is_no_change():
    term = "model.init_args.rewards.right"
    key, weight = f"{term}.fn.class_path", f"{term}.weight"
    saved = {key: "gspo_lightning.verifiers.LastNumber", weight: 1.0}
    now = {key: "gspo_lightning.rewards.LastNumber", weight: 1.0}
    assert differences(saved, now) == []
    assert len(differences(saved, now | {key: "gspo_lightning.rewards.ExactMatch"})) == 1
    assert len(differences(saved, now | {weight: 2.0})) == 1


def test_a_setting_that_came_later_is_no_change_unless_it_is_used():
    new = {"mismatch.correction": "none", "mismatch.cap": 2.0, "sampler.init_args.max_turns": 8}
    now = {f"model.init_args.{name}": value for name, value in new.items()}
    assert differences({}, now) == []
    key = "model.init_args.mismatch.correction"
    assert differences({}, now | {key: "mean"}) == [f'{key} "none" -> "mean"']


@pytest.mark.parametrize("old, new", sorted(MOVED.items()))
def test_what_has_moved_is_where_the_table_says(old, new):
    names = {
        "gspo_lightning.checkpoint_io": ["AtomicCheckpointIO"],
        "gspo_lightning.classifier": ["RewardModel"],
        "gspo_lightning.experiment": ["RunRecord", "ExpertShift"],
        "gspo_lightning.gae": ["gae"],
        "gspo_lightning.lora": ["LoRAConfig"],
        "gspo_lightning.predictions": ["PredictionWriter"],
        "gspo_lightning.preferences": ["PreferenceData"],
        "gspo_lightning.progress": ["RolloutProgress", "RunSummary"],
        "gspo_lightning.reward_model": ["RewardModelModule"],
        "gspo_lightning.sft": ["SFTModule"],
        "gspo_lightning.signals": ["StopSignals"],
        "gspo_lightning.text_rewards": ["LengthBonus", "SoftOverlong", "RepetitionPenalty"],
        "gspo_lightning.text_scores": ["same_language", "variety"],
        "gspo_lightning.time_limit": ["TimeLimit"],
        "gspo_lightning.tracing": ["RolloutProfile"],
        "gspo_lightning.verifiers": [
            *("ExactMatch", "LastNumber", "MathVerify", "RegexMatch", "TagFormat", "ValidJSON"),
        ],
    }
    for path in [f"{old}.{name}" for name in names[old]] if old in names else [old]:
        module, _, name = moved(path).rpartition(".")
        assert moved(path).startswith(new)
        assert callable(getattr(importlib.import_module(module), name))
