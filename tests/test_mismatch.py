"""Weights of rows where the sampler is not the policy: what they are, and what they leave alone."""

import itertools
import math
from dataclasses import replace

import pytest
import torch

from gspo_lightning.loss import LossChoices, micro_loss
from gspo_lightning.mismatch import Mismatch, row_weights
from gspo_lightning.objectives import Objective, token_weights
from gspo_lightning.sampling import GroupSampler
from support.tiny_run import gradients_of, make_module, outputs_of, run

CHOICES = [
    Mismatch("sequence", cap=1.5),
    Mismatch("mean", cap=1.05),
    Mismatch("sequence", cap=1.3, sequence_limit=0.2, token_limit=0.5),
    Mismatch(token_limit=0.3),
]


def differing(rollout, spread=0.2, seed=5):
    """The rollout in float64, its tokens drawn by a sampler that is off by ``spread`` nats."""
    generator = torch.Generator().manual_seed(seed)
    old = rollout.old_logprobs.double()
    noise = spread * torch.randn(old.shape, generator=generator, dtype=torch.float64)
    drawn = (old + noise).float().masked_fill(~rollout.mask, 0)
    return replace(rollout, old_logprobs=old, logprobs=drawn)


def weights_of(rollout, mismatch, **options):
    return row_weights(rollout.old_logprobs, rollout.logprobs, rollout.mask, mismatch, **options)


def weight_of_row(rollout, row, mismatch):
    """By hand, without the mean of ``sequence``: d of the tokens that count, then plain floats."""
    kept = rollout.mask[row].nonzero().flatten().tolist()
    d = [(rollout.old_logprobs[row, t] - rollout.logprobs[row, t].double()).item() for t in kept]
    mean = sum(d) / len(d)
    c = {
        "none": 1.0,
        "sequence": min(mismatch.cap, math.exp(sum(d))),
        "mean": min(mismatch.cap, max(1 / mismatch.cap, math.exp(mean))),
    }[mismatch.correction]
    out = abs(mean) > (mismatch.sequence_limit or math.inf)
    out = out or max(map(abs, d)) > (mismatch.token_limit or math.inf)
    return c, out


@pytest.mark.parametrize("mismatch", CHOICES)
def test_weights_are_those_of_a_loop_and_limits_move_no_mean(make_rollout, mismatch):
    rollout = differing(make_rollout())
    expected = [weight_of_row(rollout, row, mismatch) for row in range(6)]
    mean = sum(c for c, _ in expected) / 6 if mismatch.correction == "sequence" else 1.0
    found = weights_of(rollout, mismatch)
    wanted = torch.tensor([0 if out else c / mean for c, out in expected]).double()
    torch.testing.assert_close(found.weights[:, 0], wanted, rtol=1e-6, atol=0)
    assert torch.equal(found.weights, found.weights[:, :1].expand(6, 5))
    assert found.masked.tolist() == [out for _, out in expected]
    if mismatch.correction != "none":
        assert 0 < sum(found.capped) < 6
    if mismatch.token_limit is not None:
        assert 0 < sum(found.masked) < 6


@pytest.mark.parametrize("mismatch", CHOICES)
def test_an_equal_sampler_has_weights_of_exactly_1_and_the_same_loss_to_the_bit(
    make_rollout, mismatch
):
    rollout = make_rollout()
    rollout = replace(rollout, logprobs=rollout.old_logprobs)
    weights = weights_of(rollout, mismatch).weights
    assert (weights == 1).all() and weights.dtype == torch.float32
    logprobs, share = rollout.old_logprobs + 1e-4, token_weights(rollout.mask, "sequence_mean")
    plain = micro_loss(logprobs, None, rollout, share, LossChoices()).total
    rollout = replace(rollout, mismatch_weights=weights)
    assert micro_loss(logprobs, None, rollout, share, LossChoices()).total == plain


@pytest.mark.parametrize("mismatch", CHOICES)
def test_what_does_not_count_has_no_influence(make_rollout, mismatch):
    """Padding, and tokens within a completion that its sampler has not drawn."""
    rollout = differing(make_rollout())
    mask = rollout.mask.clone()
    mask[0, 2] = mask[3, 0] = False
    mask[4] = False  # a row without any token: neither weighed nor counted
    rollout = replace(rollout, mask=mask)
    plain = weights_of(rollout, mismatch).weights
    broken = rollout.logprobs.masked_fill(~mask, math.nan)
    other = weights_of(replace(rollout, logprobs=broken), mismatch).weights
    assert torch.equal(plain, other) and plain.isfinite().all()
    kept = [0, 1, 2, 3, 5]
    without = weights_of(rollout.select(torch.tensor(kept)), mismatch).weights
    torch.testing.assert_close(plain[kept], without, rtol=1e-12, atol=0)


@pytest.mark.parametrize("mismatch", CHOICES)
def test_two_ranks_weigh_their_rows_as_one_does(make_rollout, mismatch):
    rollout = differing(make_rollout())
    whole = weights_of(rollout, mismatch).weights
    parts, sums = [rollout.select(torch.arange(4)), rollout.select(torch.arange(4, 6))], []
    for part in parts:
        weights_of(part, mismatch, reduce=lambda x: sums.append(x) or x)
    total = sum(sums)
    ranks = [weights_of(part, mismatch, reduce=lambda _: total).weights for part in parts]
    torch.testing.assert_close(torch.cat(ranks), whole, rtol=1e-12, atol=0)


def test_the_exact_weight_recovers_a_mean_under_the_policy_from_rows_of_another_one():
    """All texts of two tokens over an alphabet of two, as often as the sampler draws each."""
    sampler = {"": 0.25, "a": 0.75, "b": 0.5}  # chance of an "a" behind what was written
    policy = {"": 0.6, "a": 0.3, "b": 0.9}
    worth = {"aa": 1.0, "ab": -2.0, "ba": 5.0, "bb": 0.5}

    def logprobs(chances, text):
        found = []
        for place, letter in enumerate(text):
            chance = chances[text[:place]]
            found.append(math.log(chance if letter == "a" else 1 - chance))
        return found

    def chance(chances, text):
        return math.exp(sum(logprobs(chances, text)))

    texts = ["".join(letters) for letters in itertools.product("ab", repeat=2)]
    rows = [text for text in texts for _ in range(round(16 * chance(sampler, text)))]
    assert len(rows) == 16
    old, drawn = (
        torch.tensor([logprobs(chances, text) for text in rows]).double()
        for chances in (policy, sampler)
    )
    values = torch.tensor([worth[text] for text in rows]).double()
    mask = torch.ones(16, 2, dtype=torch.bool)

    def estimate(mismatch):
        return (row_weights(old, drawn, mask, mismatch).weights[:, 0] * values).mean().item()

    truth = sum(chance(policy, text) * worth[text] for text in texts)
    assert estimate(Mismatch("sequence", cap=math.inf)) == pytest.approx(truth, abs=1e-6)
    others = Mismatch(), Mismatch("sequence", cap=1.1), Mismatch("mean", cap=math.inf)
    assert all(abs(estimate(other) - truth) > 0.1 for other in others)


@pytest.mark.parametrize("mismatch", CHOICES)
def test_the_gradient_is_that_of_a_loop_and_kl_and_entropy_are_not_weighed(make_rollout, mismatch):
    rollout = differing(make_rollout())
    generator = torch.Generator().manual_seed(3)
    logprobs = rollout.old_logprobs + 0.1 * torch.randn(6, 5, generator=generator).double()
    logprobs.requires_grad_()
    entropy = torch.rand(6, 5, generator=generator).double().requires_grad_()
    objective = Objective(clip_low=0.03, clip_high=0.04)
    choices = LossChoices(objective, "k2", kl_coef=0.3, entropy_coef=0.2, mismatch=mismatch)
    share = token_weights(rollout.mask, "sequence_mean", dtype=torch.float64)
    weighed = replace(rollout, mismatch_weights=weights_of(rollout, mismatch).weights)
    for rows in torch.arange(6).split(4):  # in micro-batches
        part = logprobs[rows], entropy[rows], weighed.select(rows), share[rows]
        micro_loss(*part, choices).total.backward()
    found = logprobs.grad.clone(), entropy.grad.clone()
    logprobs.grad = entropy.grad = None
    hand = [weight_of_row(rollout, row, mismatch) for row in range(6)]
    mean = sum(c for c, _ in hand) / 6 if mismatch.correction == "sequence" else 1.0
    total, clipped = 0.0, 0
    for row, (c, out) in enumerate(hand):
        kept = rollout.mask[row].nonzero().flatten().tolist()
        s = sum(logprobs[row, t] - rollout.old_logprobs[row, t] for t in kept) / len(kept)
        s, gain = s.exp(), rollout.advantages[row, 0].item()
        surrogate = torch.minimum(s * gain, s.clamp(0.97, 1.04) * gain)
        clipped += int(surrogate.item() != (s * gain).item())
        total = total - (0 if out else c / mean) * surrogate / 6
        for t in kept:
            d = logprobs[row, t] - rollout.ref_logprobs[row, t]
            total = total + (0.3 * d**2 / 2 - 0.2 * entropy[row, t]) / len(kept) / 6
    total.backward()
    assert 0 < clipped < 6
    for mine, loop in zip(found, (logprobs.grad, entropy.grad), strict=True):
        torch.testing.assert_close(mine, loop, rtol=1e-10, atol=1e-10)


def test_log_ratios_beyond_all_bounds_keep_weights_finite(make_rollout):
    rollout = differing(make_rollout(), spread=1e4)
    for mismatch in (*CHOICES, Mismatch("sequence", cap=math.inf)):
        assert weights_of(rollout, mismatch).weights.isfinite().all()


# ---- in a run ------------------------------------------------------------------------------------


class Off(GroupSampler):
    """Says log-probs that are off by a random error in each token, or none."""

    def __init__(self, spread=0.2):
        super().__init__(group_size=4, max_new_tokens=6)
        self.spread = spread

    def sample(self, policy, batch, *, seed):
        samples = super().sample(policy, batch, seed=seed)
        if self.spread is None:
            return replace(samples, logprobs=None)
        generator = torch.Generator().manual_seed(seed)
        error = self.spread * torch.randn(samples.mask.shape, generator=generator)
        return replace(samples, logprobs=(samples.logprobs + error).masked_fill(~samples.mask, 0))


def test_a_run_logs_what_it_measures_and_what_it_weighs(tmp_path, model_dir):
    mismatch = Mismatch("sequence", cap=1.5, token_limit=0.4)
    options = {"sampler": Off(), "num_epochs": 2, "mismatch": mismatch}
    (outputs,) = outputs_of(tmp_path, model_dir, **options)
    rollout, figures = outputs["rollout"], outputs["metrics"]
    d = (rollout.old_logprobs - rollout.logprobs).double()
    tokens, exact = d[rollout.mask], d.sum(1).exp()
    means = d.sum(1) / rollout.mask.sum(1)
    k3 = ((d.exp() - 1 - d).sum(1) / rollout.mask.sum(1)).mean()
    expected = {
        "log_ratio_mean": tokens.mean(),
        "log_ratio_std": tokens.std(correction=0),
        "sequence_log_ratio_std": means.std(correction=0),
        "kl": k3,
        "ess": exact.sum() ** 2 / len(exact) / (exact**2).sum(),
        "capped": (exact > 1.5).float().mean(),
        "masked": (d.abs() > 0.4).any(1).float().mean(),
    }
    for name, value in expected.items():
        assert figures[f"sampler/{name}"] == pytest.approx(value.item(), rel=1e-4), name
        assert value != 0, name
    # of each mini-batch's rows the mean is 1 but for those that the limit leaves out
    assert 0.5 < figures["sampler/weight_mean"] < 1


def test_none_measures_and_weights_of_1_change_no_bit(tmp_path, model_dir):
    plain, weighed = (
        outputs_of(tmp_path, model_dir, mismatch=mismatch, old_logprobs="recompute")[0]
        for mismatch in (Mismatch(), Mismatch(token_limit=1e9))
    )
    assert plain["metrics"]["sampler/ess"] == pytest.approx(1, abs=1e-6)
    assert 0 < plain["metrics"]["sampler/log_ratio_std"] < 1e-5  # rounding of float32
    assert "sampler/weight_mean" not in plain["metrics"]
    assert weighed["metrics"]["sampler/weight_mean"] == 1.0
    assert torch.equal(plain["ratios"], weighed["ratios"])
    assert not torch.equal(plain["ratios"], torch.ones(16))


def test_micro_batches_change_no_gradient(tmp_path, model_dir):
    options = {"sampler": Off(), "mismatch": Mismatch("sequence", cap=1.5)}
    whole = gradients_of(tmp_path, model_dir, **options)
    cut = gradients_of(tmp_path, model_dir, micro_batch_size=3, **options)
    torch.testing.assert_close(cut[0], whole[0], rtol=1e-4, atol=1e-6)
    assert whole[0].abs().max() > 1e-3


def test_a_sampler_without_log_probs_is_refused_and_so_are_its_own_as_old_ones(tmp_path, model_dir):
    with pytest.raises(ValueError, match=r"needs the sampler's log-probs, and Off returns none"):
        run(tmp_path, model_dir, sampler=Off(None), mismatch=Mismatch("mean"))
    with pytest.raises(ValueError, match=r"old_logprobs cannot be sampler with model.mismatch"):
        make_module(model_dir, mismatch=Mismatch("mean"), old_logprobs="sampler")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"correction": "token"}, "mismatch.correction must be one of none, sequence, mean, got"),
        ({"cap": 1.0}, "mismatch.cap must be above 1, got 1.0"),
        ({"cap": math.nan}, "mismatch.cap must be above 1"),
        ({"sequence_limit": 0.0}, "mismatch.sequence_limit must be above 0 nats or null, got 0.0"),
        ({"token_limit": -1.0}, "mismatch.token_limit must be above 0 nats"),
    ],
)
def test_the_choices_name_a_bad_value(options, message):
    with pytest.raises(ValueError, match=message):
        Mismatch(**options)
