"""What a module takes of what a program has at hand: paths, loaded models, functions."""

from copy import deepcopy

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from gspo_lightning import CriticConfig, GSPOModule, PromptData, ReferencePolicy, RewardTerm
from gspo_lightning.engine.norms import Fused
from gspo_lightning.policy.policy import fingerprint
from support.reward_functions import digits
from support.tiny_run import make_module, make_trainer, write_prompts


@pytest.fixture
def model(model_dir):
    return AutoModelForCausalLM.from_pretrained(model_dir)


def fit(root, module, num_rollouts=1):
    path = write_prompts(root / "prompts.jsonl")
    trainer = make_trainer(root)
    trainer.fit(module, PromptData(path, prompts_per_rollout=4, num_rollouts=num_rollouts))
    return trainer


def test_a_path_and_a_loaded_model_train_to_the_same_bits(tmp_path, model_dir, model):
    with_all = {
        "reference": ReferencePolicy(device="cpu"),
        "kl_coef": 0.1,
        "advantages": "gae",
        "critic": CriticConfig(),
    }
    start = fingerprint(model)
    modules = [make_module(model_dir, policy=given, **with_all) for given in (model_dir, model)]
    for module in modules:
        fit(tmp_path, module)
    by_path, loaded = modules
    fused = [sum(isinstance(p, Fused) for p in m.policy.model.modules()) for m in modules]
    assert fused[0] == fused[1] > 0  # what a card runs in one kernel
    assert loaded.policy.model is model and fingerprint(model) != start  # it is trained in place
    assert loaded.reference.fingerprint == by_path.reference.fingerprint == start  # a copy
    pairs = zip(by_path.state_dict().items(), loaded.state_dict().items(), strict=True)
    assert all(a == b and torch.equal(x, y) for (a, x), (b, y) in pairs)
    assert loaded.hparams["policy"] == by_path.hparams["policy"]
    again = make_module(model_dir, policy=model)  # a second module on the same object
    fit(tmp_path, again)
    assert again.policy.model is model


def test_a_model_that_was_made_needs_its_tokenizer(tmp_path, model_dir, model):
    made = AutoModelForCausalLM.from_config(deepcopy(model.config))
    made.config.name_or_path = ""
    with pytest.raises(ValueError, match=r"model.tokenizer: .*policy=model, tokenizer=tokenizer"):
        make_module(model_dir, policy=made)
    tokenizer = AutoTokenizer.from_pretrained(model_dir, padding_side="right")
    module = make_module(model_dir, policy=made, tokenizer=tokenizer)
    fit(tmp_path, module)
    assert tokenizer.padding_side == "right" and module.tokenizer.padding_side == "left"
    assert module.hparams["policy"]["path"] == f"loaded-{type(made).__name__}"
    assert module.hparams["tokenizer"] == str(model_dir)
    # elsewhere: a folder
    other = make_module(model_dir, tokenizer=str(model_dir))
    assert other.tokenizer("1+2=") == make_module(model_dir).tokenizer("1+2=")


def test_a_checkpoint_of_a_loaded_model_comes_back(tmp_path, model_dir, model):
    module = make_module(model_dir, policy=model)
    fit(tmp_path, module).save_checkpoint(tmp_path / "x.ckpt")
    again = GSPOModule.load_from_checkpoint(tmp_path / "x.ckpt")
    assert again.generate(["1+2="]) == module.generate(["1+2="])


@pytest.mark.parametrize(
    ("change", "line"),
    [
        (lambda m: m.half(), r"is loaded in float16; load it with dtype=torch.float32"),
        (lambda m: m.base_model, "expected a causal language model of transformers, got"),
        (lambda m: torch.nn.Linear(2, 2), "expected a causal language model .*, got Linear"),
        (lambda m: m.lm_head.weight.data.fill_(float("nan")) is None or m, "NaN or infinite wei"),
        (lambda m: 3, r"model.policy: expected PolicyConfig \(path, .*, got int"),
    ],
)
def test_what_is_no_policy_is_one_line(model_dir, model, change, line):
    with pytest.raises(ValueError, match=line):
        make_module(model_dir, policy=change(model))
    with pytest.raises(ValueError, match=r"model.tokenizer: expected a tokenizer .*, got int"):
        make_module(model_dir, tokenizer=3)


def polite(rows, completions):
    return [1.0] * len(completions)


@pytest.mark.parametrize(
    ("given", "names"),
    [
        (digits, ["digits"]),
        ([digits, RewardTerm(polite, weight=2.0), polite], ["digits", "polite", "polite_2"]),
        ({"right": digits, "kind": RewardTerm(polite)}, ["right", "kind"]),
        (lambda rows, completions: [1.0], ["reward"]),
    ],
)
def test_rewards_are_taken_as_they_are_at_hand(model_dir, given, names):
    module = make_module(model_dir, rewards=given)
    assert list(module.rewards) == names
    assert all(isinstance(term, RewardTerm) for term in module.rewards.values())


@pytest.mark.parametrize(
    ("given", "line"),
    [
        ("my.reward", r"^model.rewards: expected RewardTerm \(fn, .*, got 'my.reward'"),
        ({"a": RewardTerm}, r"model.rewards.a: .*got the class RewardTerm; give an object of it"),
        (torch.nn.Linear(2, 1), r"got a model, Linear; give its folder .*: RewardModel\(path\)"),
        ([], "model.rewards is empty"),
        (None, "^model.rewards: expected .* got NoneType"),
    ],
)
def test_what_is_no_reward_is_one_line(model_dir, given, line):
    with pytest.raises(ValueError, match=line):
        make_module(model_dir, rewards=given)
