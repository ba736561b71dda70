"""Agreement with TRL's GRPOTrainer: the same tensors through its loss and through ours.

TRL's own method is called on a stand-in for its trainer that has the settings the method reads.
"""

from collections import defaultdict
from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import pytest
import torch
import yaml

from gspo_lightning.advantages import group_advantages
from gspo_lightning.frozen import ReferencePolicy, ReferenceSync
from gspo_lightning.kl import kl_estimate
from gspo_lightning.objectives import Objective, picked_tokens, policy_loss, token_weights
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


def trl_loss(logprobs, old, ref, advantages, kind=grpo_trainer.GRPOTrainer, **settings):
    """TRL's loss of these tensors, and the metrics it logged."""
    metrics = {"train": defaultdict(list)}
    arguments = {name: settings.pop(name) for name in [*settings] if name in ARGUMENTS}
    trainer = SimpleNamespace(
        model=SimpleNamespace(training=True),
        args=SimpleNamespace(steps_per_generation=1, **(ARGUMENTS | arguments)),
        accelerator=SimpleNamespace(
            num_processes=1, gather=lambda x: x, reduce=lambda x, reduction: x
        ),
        aux_loss_enabled=False,
        use_vllm=False,
        vllm_importance_sampling_correction=False,
        current_gradient_accumulation_steps=1,
        get_gamma_weights=grpo_trainer.GRPOTrainer.get_gamma_weights,
        get_off_policy_mask=grpo_trainer.GRPOTrainer.get_off_policy_mask,
        max_completion_length=MAX_LENGTH,
        _entropy_bonus_enabled=False,
        _metrics=metrics,
        _get_per_token_logps_and_entropies=lambda *_, **__: (logprobs, -old, None),
        **(
            {"beta": 0.0, "top_entropy_quantile": 1.0, "off_policy_mask_threshold": None} | settings
        ),
    )
    trainer.accelerator.pad_across_processes = lambda x, **_: x
    trainer.get_high_entropy_mask = partial(grpo_trainer.GRPOTrainer.get_high_entropy_mask, trainer)
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
    loss = kind._compute_loss(trainer, trainer.model, inputs)
    return loss, metrics["train"]


ARGUMENTS = {
    "use_bias_correction_kl": False,
    "delta": None,
    "sapo_temperature_pos": 1.0,
    "sapo_temperature_neg": 1.05,
    "vespo_k_pos": 2.0,
    "vespo_lambda_pos": 3.0,
    "vespo_k_neg": 3.0,
    "vespo_lambda_neg": 2.0,
}
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
    "sapo": (TOKEN | {"loss_type": "sapo", "sapo_temperature_neg": 1.0625}, 0.4),
    "luspo": (GSPO | {"loss_type": "luspo"}, 1e-3),
    "vespo": (TOKEN | {"loss_type": "vespo"}, 0.4),
    "dual_clip": (TOKEN | {"loss_type": "dapo", "delta": 3.0}, 1.0),
    "deepseek": (
        TOKEN
        | {"loss_type": "grpo", "off_policy_mask_threshold": 0.5, "use_bias_correction_kl": True},
        1.0,
    ),
    "high_entropy": (TOKEN | {"loss_type": "dapo", "top_entropy_quantile": 0.2}, 0.4),
    # what TRL's trainers of these names make of their advantages is compared in test_algorithms
    **dict.fromkeys(("opo", "reinforce_plus_plus"), (TOKEN | {"loss_type": "dapo"}, 0.4)),
    "reinforce_plus_plus_baseline": (TOKEN | {"loss_type": "dapo"}, 0.4),
    "pass_at_k": (TOKEN | {"loss_type": "grpo"}, 0.4),
    # TRL has no critic any more; with advantages per token the policy's part is DAPO's
    "ppo": (TOKEN | {"loss_type": "dapo"}, 0.4),
}
OVERLAYS = ROOT / "configs" / "algorithm"


def read_overlay(name):
    """The row of choices, and what is told of the rest."""
    model = yaml.safe_load((OVERLAYS / f"{name}.yaml").read_text())["model"]["init_args"]
    return Objective(**model["objective"]), model


def test_every_overlay_is_compared_unless_trl_has_no_such_loss():
    alone = {"gspo_sum", "origin_sequence", "rloo"}  # a ratio that is not normalised by length
    alone |= {"clip_cov", "kl_cov", "gpg", "gmpo"}  # verl's; gmpo is compared below
    assert {path.stem for path in OVERLAYS.glob("*.yaml")} == alone | set(ALGORITHMS)


@pytest.mark.parametrize("kl_coef", [0.0, 0.04])
@pytest.mark.parametrize("name", ALGORITHMS)
def test_loss_and_gradient_equal_those_of_trl(name, kl_coef):
    objective = read_overlay(name)[0]
    if name == "sapo":  # TRL holds its temperatures in float32, which has no 1.05
        objective = replace(objective, tau_neg=1.0625)
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
    picked = None
    if objective.pick is not None:  # the entropies of the stand-in are minus the old log-probs
        tokens = logprobs.detach(), old, -old, advantages, MASK
        picked = picked_tokens(*tokens, objective, seed=0)
    ours = policy_loss(logprobs, old, advantages, MASK, weights, objective, picked)
    kind = "k3_corrected" if settings.get("use_bias_correction_kl") else "k3"
    loss = ours.loss + kl_coef * (weights * kl_estimate(logprobs, ref, kind, old)).sum()
    torch.testing.assert_close(loss, theirs, rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(
        *(torch.autograd.grad(value, logprobs)[0] for value in (loss, theirs)),
        rtol=1e-10,
        atol=1e-14,
    )
    if name in ("cispo", "sapo", "vespo", "dual_clip"):
        return  # TRL counts a capped ratio only where the advantage is positive, delta not at all
    fraction = (
        ours.clip_fraction_tokens
        if settings["importance_sampling_level"] == "token"
        else ours.clip_fraction_sequences
    )
    assert 0 < fraction < 1
    assert fraction.item() == pytest.approx(metrics["clip_ratio/region_mean"][0])


def test_the_geometric_ratio_equals_trl_s_gmpo():
    gmpo = pytest.importorskip("trl.experimental.gmpo.gmpo_trainer", exc_type=ImportError)
    objective = read_overlay("gmpo")[0]
    logprobs, old, ref, advantages = batch(0.8)
    settings = {"epsilon_low": 0.4, "epsilon_high": 0.4}
    theirs = trl_loss(logprobs, old, ref, advantages, gmpo.GMPOTrainer, **settings)[0]
    weights = token_weights(MASK, objective.aggregation, dtype=torch.float64)
    ours = policy_loss(logprobs, old, advantages, MASK, weights, objective).loss
    gradients = (torch.autograd.grad(loss, logprobs)[0] for loss in (ours, theirs))
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(*gradients, rtol=1e-10, atol=1e-14)


def test_a_reference_that_follows_moves_as_trl_s():
    callbacks = pytest.importorskip("trl.trainer.callbacks", exc_type=ImportError)
    ours, theirs, policy = (torch.nn.Linear(3, 2).double() for _ in range(3))
    ours.load_state_dict(theirs.state_dict())
    reference = ReferencePolicy(sync=ReferenceSync())
    reference.model = ours
    reference.follow(policy, 511)
    assert torch.equal(ours.weight, theirs.weight)
    reference.follow(policy, 512)
    callbacks.SyncRefModelCallback._sync_target_model(policy, theirs, 0.6)
    torch.testing.assert_close(ours.weight, theirs.weight, rtol=1e-14, atol=1e-15)


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
