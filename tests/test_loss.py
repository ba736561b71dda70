"""The loss of a micro-batch, and what one step remembers."""

import math
from dataclasses import replace

import pytest
import torch

from gspo_lightning.loss import LossChoices, micro_loss
from gspo_lightning.objectives import Objective, token_weights
from support.steps import make_step

WIDE = Objective(clip_low=0.9, clip_high=9.0)


def weights_of(rollout, dtype=torch.float32):
    return token_weights(rollout.mask, "sequence_mean", dtype=dtype)


def test_the_terms_are_those_of_a_loop(make_rollout):
    rollout = make_rollout(with_ref=True)
    generator = torch.Generator().manual_seed(3)
    logprobs = -torch.rand(6, 5, generator=generator)
    entropy = torch.rand(6, 5, generator=generator)
    choices = LossChoices(WIDE, "k2", kl_coef=0.3, entropy_coef=0.2)
    found = micro_loss(logprobs, entropy, rollout, weights_of(rollout), choices)
    policy = kl = bonus = 0.0
    for row in range(6):
        kept = rollout.mask[row].nonzero().flatten().tolist()
        moved = [(logprobs - rollout.old_logprobs)[row, t].item() for t in kept]
        ratio = math.exp(sum(moved) / len(kept))
        advantage = rollout.advantages[row, 0].item()
        policy -= ratio * advantage / 6
        for t in kept:
            d = (logprobs - rollout.ref_logprobs)[row, t].item()
            kl += 0.3 * d**2 / 2 / len(kept) / 6
            bonus -= 0.2 * entropy[row, t].item() / len(kept) / 6
    assert found.parts.policy.item() == pytest.approx(policy, rel=1e-5)
    assert found.parts.kl.item() == pytest.approx(kl, rel=1e-5)
    assert found.parts.entropy.item() == pytest.approx(bonus, rel=1e-5)
    assert found.total.item() == pytest.approx(policy + kl + bonus, rel=1e-5)


def test_rows_that_are_not_known_have_the_ratio_1_and_the_others_their_own(make_rollout):
    rollout = make_rollout()
    known = torch.tensor([True, False, True, False, False, True])
    rollout = replace(rollout, old_known=known)
    logprobs = (rollout.old_logprobs + 0.25).requires_grad_()
    found = micro_loss(logprobs, None, rollout, weights_of(rollout), LossChoices(WIDE))
    ratios = [found.clip.ratio[row][rollout.mask[row]] for row in range(6)]
    for ratio, is_known in zip(ratios, known.tolist(), strict=True):
        expected = math.exp(0.25) if is_known else 1.0
        torch.testing.assert_close(ratio, torch.full_like(ratio, expected))
    assert torch.equal(found.old[~known], logprobs.detach()[~known])
    found.total.backward()  # a ratio of exactly 1 has a gradient all the same
    assert logprobs.grad[~known][rollout.mask[~known]].abs().min() > 0


def test_what_stands_for_an_unknown_log_prob_does_not_matter(make_rollout):
    rollout = make_rollout()
    logprobs, choices = rollout.old_logprobs - 0.1, LossChoices(WIDE)
    unknown = torch.zeros(6, dtype=torch.bool)
    losses = [
        micro_loss(
            logprobs,
            None,
            replace(rollout, old_logprobs=old, old_known=unknown),
            weights_of(rollout),
            choices,
        ).total
        for old in (rollout.old_logprobs, torch.full_like(logprobs, math.nan))
    ]
    assert torch.equal(*losses)


def test_micro_batches_add_up_to_their_mini_batch_and_a_value_loss_is_added(make_rollout):
    rollout = make_rollout(with_ref=True)
    logprobs = rollout.old_logprobs.double() + 0.05
    weights = weights_of(rollout, torch.float64)
    choices = LossChoices(WIDE, kl_coef=0.1)
    whole = micro_loss(logprobs, None, rollout, weights, choices).total
    parts = [
        micro_loss(logprobs[rows], None, rollout.select(rows), weights[rows], choices).total
        for rows in torch.arange(6).split(4)
    ]
    torch.testing.assert_close(sum(parts), whole, rtol=1e-12, atol=0)
    value = torch.tensor(7.0, dtype=torch.float64)
    with_value = micro_loss(logprobs, None, rollout, weights, choices, value).total
    torch.testing.assert_close(with_value, whole + 7, rtol=1e-12, atol=0)


def test_k1_is_no_choice():
    with pytest.raises(ValueError, match="kl_estimator k1 cannot be a loss"):
        LossChoices(kl_estimator="k1")


def test_the_mini_batches_of_a_step_are_the_same_whenever_they_are_asked_for(make_rollout):
    rollout = make_rollout()
    step, other = make_step(index=4), make_step(index=5)
    first = step.minibatch_rows(rollout, 2, epoch=0)
    assert sorted(torch.cat(first).tolist()) == list(range(6))
    again = step.minibatch_rows(rollout, 2, epoch=0)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    seeds = {step.seed("minibatches/0"), step.seed("minibatches/1"), other.seed("minibatches/0")}
    assert len(seeds) == 3


def test_a_phase_that_comes_twice_is_added_up_and_told():
    step = make_step()
    told = []
    step.clock.on_phase = told.append
    for _ in range(2):
        with step.clock.phase("score"), step.clock.timed("reward"):
            sum(range(10_000))
    assert told == ["score", "score"]
    assert 0 < step.clock.seconds["reward"] < step.clock.seconds["score"]
    assert step.clock.seconds["optimise"] == 0 and step.clock.peak_memory["score_gib"] > 0
