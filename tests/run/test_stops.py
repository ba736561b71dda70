"""Stop strings, stop ids and special tokens from the config to the end of a run."""

import json
import re
from pathlib import Path

import pytest
import torch
import yaml
from transformers import GenerationConfig

import train
from gspo_lightning.checkpoint.fingerprints import differences
from gspo_lightning.doctor import rewards as doctor_rewards
from gspo_lightning.doctor import text as doctor_text
from gspo_lightning.evaluation import Evaluation
from gspo_lightning.guards.health import RULES, History
from gspo_lightning.objectives import Objective
from gspo_lightning.policy.policy import PolicyConfig, load_policy
from gspo_lightning.rewards import MarkedAnswer, RewardTerm, score, score_or_keep
from gspo_lightning.sampling import GroupSampler
from support.command import enter, refused, run
from support.prompts import PROMPTS, batch_of
from support.repository import ROOT
from support.run_folder import assert_same, state
from support.tiny_models import build_model, build_rollout, build_tokenizer
from support.tiny_run import make_module, outputs_of, write_prompts

CONFIG = """
seed_everything: 0
trainer:
  accelerator: cpu
  enable_progress_bar: false
  default_root_dir: run
  num_sanity_val_steps: 0
  callbacks:
    - {class_path: gspo_lightning.RolloutCheckpoint, init_args: {every_n_rollouts: 1}}
    - {class_path: gspo_lightning.SampleTable, init_args: {every_n_rollouts: 1, num_samples: 16}}
model:
  class_path: gspo_lightning.GSPOModule
  init_args:
    policy: {path: policy}
    sampler:
      class_path: gspo_lightning.GroupSampler
      init_args: {group_size: 4, max_new_tokens: 12}
    rewards: {length: {fn: support.reward_functions.digits}}
    num_minibatches: 2
data:
  class_path: gspo_lightning.PromptData
  init_args: {path: prompts.jsonl, prompts_per_rollout: 4, num_rollouts: 2}
"""
STOPS = """
model:
  init_args:
    policy: {stop_strings: ["12", "="], stop_token_ids: [20]}
"""


@pytest.fixture
def folder(tmp_path, monkeypatch, model_dir):
    enter(tmp_path, monkeypatch)
    Path("policy").symlink_to(model_dir)
    write_prompts(Path("prompts.jsonl"))
    Path("run.yaml").write_text(CONFIG)
    Path("stops.yaml").write_text(STOPS)


# ---- a run ---------------------------------------------------------------------------------------


def samples(folder):
    return [json.loads(line) for line in Path(folder, "samples.jsonl").read_text().splitlines()]


def test_a_continued_run_with_stop_strings_is_the_straight_one(folder, capsys):
    command = ["fit", "--config=run.yaml", "--config=stops.yaml"]
    assert train.main(command) == 0
    straight = "--trainer.default_root_dir=cut"
    assert train.main([*command, straight, "--data.num_rollouts=1"]) == 0
    assert train.main([*command, straight, "--ckpt_path=last"]) == 0
    left, right = state("run", 2), state("cut", 2)
    for checkpoint in (left, right):
        checkpoint["callbacks"].pop("RunSummary", None)  # seconds
        del checkpoint["fingerprints"]  # the number of rollouts may differ
    assert_same(left, right)
    assert samples("run") == samples("cut")
    rows = samples("run")
    assert not any("12" in row["completion"] or "=" in row["completion"] for row in rows)
    assert any(not row["truncated"] and row["length"] < 12 for row in rows)
    capsys.readouterr()
    other = [*command, straight, "--ckpt_path=last", '--model.policy.stop_strings=["="]']
    assert train.main([*other, "--data.num_rollouts=3"]) == 2
    assert 'policy.stop_strings ["12", "="] -> ["="]' in capsys.readouterr().err


def test_a_checkpoint_from_before_a_switch_goes_on_without_it():
    key = "model.init_args.policy.include_stop_str_in_output"
    assert differences({}, {key: False, "stop": None}) == []
    assert differences({}, {key: True}) == [f"{key} null -> true"]
    assert differences({"kl": 0.0}, {}) == ["kl 0.0 -> null"]  # a number is no switch


def test_the_overlay_for_few_shot_prompts_goes_on_top_of_a_run(folder):
    overlay = f"--config={ROOT / 'configs/sampler/few_shot.yaml'}"
    assert train.main(["fit", "--config=run.yaml", overlay, "--data.num_rollouts=1"]) == 0
    settings = yaml.safe_load(Path("run", "config.yaml").read_text())["model"]["init_args"]
    assert settings["policy"]["stop_strings"] == ["\nQ:"]
    assert settings["policy"]["path"] == "policy"


def test_evaluation_ends_where_training_does(tmp_path, model_dir):
    config = PolicyConfig(str(model_dir), stop_strings=["5", "="])
    policy, batch = load_policy(config), batch_of(PROMPTS)
    for sampler in Evaluation().samplers(GroupSampler(2, 16)).values():
        drawn = sampler.sample(policy, batch, seed=0)
        assert not any("5" in text or "=" in text for text in drawn.texts)
    module = make_module(model_dir, policy=config)
    module.configure_model()
    assert module.policy.ends.strings == ["5", "="]


# ---- a policy ------------------------------------------------------------------------------------


def test_stop_ids_are_ends_of_sequence_and_an_export_has_them(model_dir, tmp_path):
    config = PolicyConfig(str(model_dir), stop_strings=["\n1", "<eos>"], stop_token_ids=[7, 1])
    policy = load_policy(config)
    assert policy.eos_ids == [1, 7]
    assert (policy.ends.strings, policy.ends.token_ids) == (["\n1"], [7, 1])
    policy.export(tmp_path / "out")
    written = GenerationConfig.from_pretrained(tmp_path / "out")
    assert (written.eos_token_id, written.stop_strings) == ([1, 7], ["\n1"])
    again = load_policy(PolicyConfig(str(tmp_path / "out")))
    assert (again.eos_ids, again.ends.strings) == ([1, 7], ["\n1"])
    none = load_policy(PolicyConfig(str(tmp_path / "out"), stop_strings=[]))
    assert none.ends.strings == [] and none.model.generation_config.stop_strings is None


def test_without_stops_an_export_is_as_it_was(model_dir, tmp_path):
    policy = load_policy(PolicyConfig(str(model_dir)))
    policy.export(tmp_path / "out")
    left, right = (
        json.loads(Path(path, "generation_config.json").read_text())
        for path in (model_dir, tmp_path / "out")
    )
    assert left == right


def test_a_model_without_an_end_of_sequence_may_end_at_stop_strings(model_dir, tmp_path):
    model, tokenizer = build_model("qwen3"), build_tokenizer()
    model.generation_config.eos_token_id = None
    tokenizer.eos_token = tokenizer.pad_token = None
    model.save_pretrained(tmp_path / "endless")
    tokenizer.save_pretrained(tmp_path / "endless")
    with pytest.raises(ValueError, match=r"could never end; .* or set policy.stop_strings"):
        load_policy(PolicyConfig(str(tmp_path / "endless")))
    policy = load_policy(PolicyConfig(str(tmp_path / "endless"), stop_strings=["="]))
    assert policy.eos_ids == [] and policy.pad_id == 0
    drawn = GroupSampler(4, 20).sample(policy, batch_of(PROMPTS), seed=0)
    assert 0 < drawn.finished.sum() < len(drawn)


@pytest.mark.parametrize(
    ("option", "line"),
    [
        ("stop_strings=['']", "policy.stop_strings holds an empty text"),
        ("stop_strings=['<eos>1']", "'<eos>1' holds the special token '<eos>'"),
        ("stop_token_ids=[32]", "policy.stop_token_ids: the tokenizer has no token 32; it has 21"),
        ("stop_strings=7", "policy.stop_strings: expected list"),
    ],
)
def test_what_cannot_end_a_completion_is_one_line(folder, capsys, option, line):
    assert line in refused(capsys, f"fit --config run.yaml --model.policy.{option}")
    assert not Path("run").exists()


# ---- special tokens for a reward -----------------------------------------------------------------


def right(**options):
    return RewardTerm(MarkedAnswer("answer: "), **options)


def test_a_term_with_special_tokens_sees_them_and_others_do_not():
    rows, texts, special = [{"answer": "7"}] * 2, ["7", "7"], ["answer: 7", "<|x|>7"]
    terms = {"plain": right(), "special": right(special_tokens=True)}
    parts = score(terms, rows, texts, special=special).parts
    assert parts["plain"].tolist() == [0.0, 0.0]
    assert parts["special"].tolist() == [1.0, 0.0]
    with pytest.raises(ValueError, match="special_tokens: true, but this sampler gives no"):
        score(terms, rows, texts)


def test_a_marker_that_is_a_special_token_is_rewarded_in_a_run(tmp_path, model_dir):
    tokenizer = build_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["answer: "]})
    build_model("qwen3").save_pretrained(tmp_path / "marked")
    tokenizer.save_pretrained(tmp_path / "marked")
    seen = {}

    def keep(name):
        def fn(rows, completions):
            seen[name] = completions
            return [float(len(text)) for text in completions]

        return fn

    terms = {
        "plain": RewardTerm(keep("plain")),
        "special": RewardTerm(keep("special"), special_tokens=True),
    }
    policy = PolicyConfig(str(tmp_path / "marked"))
    [outputs] = outputs_of(tmp_path, model_dir, policy=policy, rewards=terms)
    rollout = outputs["rollout"]
    assert seen["plain"] == rollout.texts and seen["special"] == rollout.special_texts
    assert not any("answer: " in text for text in seen["plain"])
    assert any("answer: " in text for text in seen["special"])
    assert not any("<eos>" in text for text in seen["special"])
    # what the special text adds is what was left out
    marked = zip(seen["plain"], seen["special"], strict=True)
    assert all(re.sub("answer: |<pad>|<unk>", "", b) == a for a, b in marked)


def test_completions_that_could_not_be_scored_are_kept_as_their_term_saw_them(tmp_path):
    def fails(rows, completions):
        raise ValueError("no")

    rollout, file = build_rollout(), tmp_path / "failed.jsonl"
    object.__setattr__(rollout, "special_texts", [f"<|x|>{text}" for text in rollout.texts])
    terms = {"marked": RewardTerm(fails, special_tokens=True)}
    with pytest.raises(ValueError, match="all 6 completions are in"):
        score_or_keep(terms, rollout, file)
    assert json.loads(file.read_text().splitlines()[1])["text"] == "<|x|>text 1"


# ---- what is said --------------------------------------------------------------------------------


def test_the_doctor_names_the_stops_where_all_completions_hit_the_limit(folder, capsys):
    Path("endless.yaml").write_text(
        "model: {init_args: {truncated: zero_reward, sampler: {init_args: {max_new_tokens: 1}}}}"
    )
    code, out, _ = run(
        capsys, "doctor --config run.yaml --config endless.yaml --json --num_prompts 2"
    )
    found = {finding["check"]: finding for finding in json.loads(out)}
    assert code == 1
    said = found["rewards"]
    assert said["text"].startswith("every completion earns 0, so no update has a direction: ")
    assert said["text"].endswith("hit the limit, and model.truncated took their reward")
    assert "policy.stop_strings" in said["remedy"] and "model.truncated: keep" in said["remedy"]
    assert "policy.stop_strings" in found["truncated"]["remedy"]


def test_rewards_that_do_not_differ_are_blamed_on_truncation_only_where_most_were_cut():
    nothing, missing = torch.zeros(8), torch.full((8,), torch.nan)
    assert "mend the reward terms" in doctor_rewards.total(nothing, 4, 0.5).remedy
    assert "policy.stop_strings" in doctor_rewards.total(nothing, 4, 0.6).remedy
    assert "policy.stop_strings" in doctor_rewards.total(missing, 4, 1.0).remedy
    assert "see the reward terms" in doctor_rewards.total(missing, 4).remedy


def test_the_doctor_says_where_completions_end(model_dir):
    policy = load_policy(PolicyConfig(str(model_dir), stop_strings=["\n1"], stop_token_ids=[20]))
    found = doctor_text.eos(policy, None)
    assert found.status == "ok"
    assert found.text == (
        "completions end at '<eos>' (1), '\\n' (20), or where the text has '\\n1'"
    )
    # prompts may end with a stop id; with an end of sequence they may not
    assert doctor_text.prompt_end(policy, [[5, 20]]).status == "ok"
    assert doctor_text.prompt_end(policy, [[5, 1]]).status == "error"


def test_run_health_names_truncation_and_stops():
    run_so_far = History(Objective(), 4, 100)
    figures = {"reward/group_std": 0.0, "rollout/truncated_fraction": 1.0}
    for rule in ("truncated", "variance"):
        message = RULES[rule].message(figures, run_so_far)
        assert "policy.stop_strings or policy.stop_token_ids" in message
    said = RULES["variance"].message(figures, run_so_far)
    assert "100% of the completions hit the limit, and model.truncated" in said
    said = RULES["variance"].message(figures | {"rollout/truncated_fraction": 0.5}, run_so_far)
    assert "use other prompts" in said and "truncated" not in said
