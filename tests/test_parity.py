"""Agreement with TRL's GRPOTrainer: the same tensors through its loss and through ours.

TRL's own method is called on a stand-in for its trainer that has the settings the method reads.
"""

from collections import defaultdict
from functools import partial
from types import SimpleNamespace

import pytest
import torch
import yaml

from gspo_lightning.advantages import group_advantages
from gspo_lightning.kl import kl_estimate
from gspo_lightning.objectives import Objective, policy_loss, token_weights
from gspo_lightning.rewards.terms import overlong_penalty, ramp_tokens
from support.repository import ROOT

pytest.importorskip("trl")
grpo_trainer = pytest.importorskip("trl.trainer.grpo_trainer", exc_type=ImportError)

MAX_LENGTH = 7
LENGTHS = torch.tensor([5, 3, 1, 4, 2, 5])
MASK = torch.arange(5) < LENGTHS[:, None]


def batch(spread):
    """(lp, old, ref, A) in float64; ratios lie on both sides of the clip range."""
    generator = torch.Generator().manual_seed(0)
    random = partial(torch.randn, 6, 5, generator=generator, dtype=torch.float64)
    old = -random().abs()
    logprobs = (old + spread * random()).requires_grad_()
    return logprobs, old, old + 0.5 * random(), random()[:, 0]


def trl_loss(logprobs, old, ref, advantages, **settings):
    """TRL's loss of these tensors, and the metrics it logged."""
    metrics = {"train": defaultdict(list)}
    trainer = SimpleNamespace(
        model=SimpleNamespace(training=True),
        args=SimpleNamespace(use_bias_correction_kl=False, delta=None, steps_per_generation=1),
        accelerator=SimpleNamespace(
            num_processes=1, gather=lambda x: x, reduce=lambda x, reduction: x
        ),
        aux_loss_enabled=False,
        top_entropy_quantile=1.0,
        off_policy_mask_threshold=None,
        use_vllm=False,
        vllm_importance_sampling_correction=False,
        current_gradient_accumulation_steps=1,
        max_completion_length=MAX_LENGTH,
        _entropy_bonus_enabled=False,
        _metrics=metrics,
        _get_per_token_logps_and_entropies=lambda *_, **__: (logprobs, logprobs.detach(), None),
        **({"beta": 0.0} | settings),
    )
    ones = torch.ones(6, 4, dtype=torch.long)
    inputs = {
        "prompt_ids": ones,
        "prompt_mask": ones,
        "completion_ids": MASK.long(),
        "completion_mask": MASK.long(),
        "advantages": advantages,
        "old_per_token_logps": old,
        "ref_per_token_logps": ref,
        "num_items_in_batch": MASK.sum(),
    }
    loss = grpo_trainer.GRPOTrainer._compute_loss(trainer, trainer.model, inputs)
    return loss, metrics["train"]


# overlay: TRL's settings, spread of the log-ratios (about the clip range)
GSPO = {"loss_type": "grpo", "importance_sampling_level": "sequence"}
TOKEN = {"importance_sampling_level": "token"}
ALGORITHMS = {
    "gspo": (GSPO, 1e-3),
    # TRL has no such level; with one advantage per sequence it must equal gspo
    "gspo_token": (GSPO, 1e-3),
    "grpo": (TOKEN | {"loss_type": "grpo"}, 0.4),
    "dapo": (TOKEN | {"loss_type": "dapo"}, 0.4),
    "dr_grpo": (TOKEN | {"loss_type": "dr_grpo"}, 0.4),
    "origin_token": (TOKEN | {"loss_type": "dr_grpo"}, 0.4),
    # TRL names the cap itself, we name its distance from 1
    "cispo": (TOKEN | {"loss_type": "cispo", "epsilon_high": 5.0}, 2.0),
    # TRL has no critic any more; with advantages per token the policy's part is DAPO's
    "ppo": (TOKEN | {"loss_type": "dapo"}, 0.4),
}
OVERLAYS = ROOT / "configs" / "algorithm"


def read_overlay(name):
    """The row of choices, and what is told of the rest."""
    model = yaml.safe_load((OVERLAYS / f"{name}.yaml").read_text())["model"]["init_args"]
    return Objective(**model["objective"]), model


def test_every_overlay_is_compared_unless_trl_has_no_such_loss():
    alone = {"gspo_sum", "origin_sequence"}  # a ratio that is not normalised by length
    assert {path.stem for path in OVERLAYS.glob("*.yaml")} == alone | set(ALGORITHMS)


@pytest.mark.parametrize("kl_coef", [0.0, 0.04])
@pytest.mark.parametrize("name", ALGORITHMS)
def test_loss_and_gradient_equal_those_of_trl(name, kl_coef):
    objective = read_overlay(name)[0]
    settings, spread = ALGORITHMS[name]
    settings = {
        "epsilon_low": objective.clip_low,
        "epsilon_high": objective.clip_high,
        "beta": kl_coef,
    } | settings
    logprobs, old, ref, advantages = batch(spread)
    if name == "ppo":
        advantages = torch.randn(6, 5, generator=torch.Generator().manual_seed(1)).double()
    theirs, metrics = trl_loss(logprobs, old, ref, advantages, **settings)

    weights = token_weights(MASK, objective.aggregation, MAX_LENGTH, dtype=torch.float64)
    ours = policy_loss(logprobs, old, advantages, MASK, weights, objective)
    loss = ours.loss + kl_coef * (weights * kl_estimate(logprobs, ref)).sum()
    torch.testing.assert_close(loss, theirs, rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(
        *(torch.autograd.grad(value, logprobs)[0] for value in (loss, theirs)),
        rtol=1e-10,
        atol=1e-14,
    )
    if name == "cispo":
        return  # TRL counts a capped ratio only where the advantage is positive
    fraction = (
        ours.clip_fraction_tokens
        if settings["importance_sampling_level"] == "token"
        else ours.clip_fraction_sequences
    )
    assert 0 < fraction < 1
    assert fraction.item() == pytest.approx(metrics["clip_ratio/region_mean"][0])


def test_normalized_advantages_equal_trl_s_group_scaling():
    """TRL adds 1e-4 to the standard deviation (grpo_trainer, scale_rewards="group")."""
    rewards = torch.rand(2, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    expected = (rewards - rewards.mean(1, True)) / (rewards.std(1, keepdim=True) + 1e-4)
    torch.testing.assert_close(group_advantages(rewards, eps=1e-4), expected)


@pytest.mark.parametrize("name", ["dapo", "cispo"])
def test_the_length_penalty_equals_trl_s(name):
    rewards = pytest.importorskip("trl.rewards")
    ramp = ramp_tokens(read_overlay(name)[1]["overlong_ramp"], 20_480)
    assert ramp == 4_096  # DAPO's own numbers
    lengths = [1, 16_384, 16_385, 18_000, 20_479, 20_480]
    theirs = rewards.get_soft_overlong_punishment(20_480, ramp)([[0] * n for n in lengths])
    ours = overlong_penalty(torch.tensor(lengths), 20_480, ramp)
    torch.testing.assert_close(ours, torch.tensor(theirs), rtol=1e-6, atol=1e-7)
