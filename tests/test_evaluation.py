"""Held-out evaluation: figures by hand, and its own settings."""

import json
import os

import pytest
import torch

from gspo_lightning.data.prompts import PromptData
from gspo_lightning.evaluation import Evaluation, Evaluator, describe
from gspo_lightning.rewards.terms import RewardTerm, Scores
from gspo_lightning.rollout import PromptBatch, Samples
from support.reward_functions import digits
from support.tiny_run import make_module, make_trainer, write_prompts


class Scripted:
    """A sampler that gives the same texts at every call: `right` of `group_size` are correct."""

    def __init__(self, group_size, right):
        self.group_size = group_size
        self.right = right

    def sample(self, policy, batch, *, seed):
        size = self.group_size * len(batch)
        texts = [
            "yes" if g < right else "no" for right in self.right for g in range(self.group_size)
        ]
        ids = torch.ones(size, 3, dtype=torch.long)
        return Samples(
            prompt_ids=ids,
            prompt_mask=ids.bool(),
            completion_ids=ids,
            mask=torch.tensor([[True, True, text == "yes"] for text in texts]),
            finished=torch.tensor([text == "yes" for text in texts]),
            rows=[{}] * size,
            texts=texts,
            group_size=self.group_size,
        )


def yes(rows, completions):
    return [float(text == "yes") for text in completions]


def test_figures_by_hand():
    settings = Evaluation(correct="yes", num_samples=4, ks=(1, 2))
    evaluator = Evaluator(settings, {"yes": RewardTerm(yes, weight=0.5)})
    ones = torch.ones(2, 3, dtype=torch.long)
    batch = PromptBatch(ones, ones.bool(), [{}] * 2)
    samplers = {"greedy": Scripted(1, [1, 0]), "sampled": Scripted(4, [1, 4])}
    evaluator.update(None, batch, samplers, seed=0)
    assert evaluator.compute() == pytest.approx(
        {
            "accuracy_greedy": 1 / 2,
            "accuracy_sampled": 5 / 8,
            "reward": 5 / 16,
            "reward_yes": 5 / 8,
            "response_length": (5 * 3 + 3 * 2) / 8,
            "truncated_fraction": 3 / 8,
            "pass_at_1": 5 / 8,
            "pass_at_2": (0.5 + 1) / 2,
        }
    )


def test_without_a_correct_term_there_is_no_accuracy():
    evaluator = Evaluator(Evaluation(), {"yes": RewardTerm(yes)})
    ones = torch.ones(2, 3, dtype=torch.long)
    batch = PromptBatch(ones, ones.bool(), [{}] * 2)
    evaluator.update(None, batch, {"sampled": Scripted(4, [1, 4])}, seed=0)
    assert set(evaluator.compute()) == {
        "reward",
        "reward_yes",
        "response_length",
        "truncated_fraction",
    }


def validate(tmp_path, model_dir, **settings):
    os.environ["PL_GLOBAL_SEED"] = "0"
    evaluation = Evaluation(correct="digits", threshold=0.5, **settings)
    module = make_module(model_dir, evaluation=evaluation)
    path = str(write_prompts(tmp_path / "p.jsonl"))
    data = PromptData(path, val_path=path, val_batch_size=4)
    (figures,) = make_trainer(tmp_path).validate(module, data, verbose=False)
    return figures


def test_evaluation_has_its_own_token_limit_and_temperature(tmp_path, model_dir):
    usual = validate(tmp_path, model_dir)
    assert validate(tmp_path, model_dir) == usual  # the same draws at every validation
    assert validate(tmp_path, model_dir, temperature=0.1) != usual
    longer = validate(tmp_path, model_dir, max_new_tokens=20)
    assert longer["val/response_length"] > usual["val/response_length"]
    assert longer["val/truncated_fraction"] < usual["val/truncated_fraction"]


def test_evaluation_does_not_depend_on_the_training_sampler(tmp_path, model_dir):
    four = validate(tmp_path, model_dir, num_samples=4, ks=(1, 4))
    assert 0 < four["val/pass_at_1"] == pytest.approx(four["val/accuracy_sampled"])
    assert four["val/pass_at_4"] > four["val/pass_at_1"]
    two = validate(tmp_path, model_dir, num_samples=2, ks=(2,))
    assert "val/pass_at_4" not in two and "val/pass_at_2" in two


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_samples": 0}, "evaluation.num_samples must be >= 1, got 0"),
        ({"temperature": 0.0}, "evaluation.temperature must be above 0"),
        ({"max_new_tokens": 0}, "evaluation.max_new_tokens must be >= 1"),
        ({"num_samples": 2, "ks": (1, 4)}, r"evaluation.ks must lie in \[1, num_samples = 2\]"),
    ],
)
def test_evaluation_names_the_bad_argument(options, message):
    with pytest.raises(ValueError, match=message):
        Evaluation(**options)


def test_descriptions_are_plain_json():
    sampler = Scripted(2, [1])
    ones = torch.ones(1, 3, dtype=torch.long)
    samples = sampler.sample(None, PromptBatch(ones, ones.bool(), [{}]), seed=0)
    total = torch.tensor([1.0, float("nan")])
    (found,) = describe(samples, Scores(total, {"a": total}), ["1+1="])
    assert json.loads(json.dumps(found)) == {
        "prompt": "1+1=",
        "completions": [
            {"text": "yes", "reward": 1.0, "parts": {"a": 1.0}, "length": 3, "finished": True},
            {"text": "no", "reward": None, "parts": {"a": None}, "length": 2, "finished": False},
        ],
    }


def test_predict_gives_a_group_per_prompt(tmp_path, model_dir):
    module = make_module(model_dir, rewards={"digits": RewardTerm(digits)})
    data = PromptData(str(write_prompts(tmp_path / "p.jsonl", 5)), val_batch_size=2)
    batches = make_trainer(tmp_path).predict(module, data)
    groups = [group for batch in batches for group in batch]
    assert [group["prompt"] for group in groups][:2] == ["1=", "1+2="]
    assert [len(group["completions"]) for group in groups] == [4] * 5
