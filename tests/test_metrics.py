import itertools
import math

import pytest
import torch

from gspo_lightning.metrics import CURVES, PassAtK, RolloutMetrics, pass_at_k
from gspo_lightning.tally import RolloutTally


def test_curves_keep_the_names_of_the_origin():
    # fact 39
    assert CURVES == (
        "policy_loss", "entropy_loss", "kl_loss", "reward", "relative_advantage",
        "kl_divergence", "kl_coef", "avg_response_length",
    )  # fmt: skip


@pytest.mark.parametrize("n", [1, 4, 6])
def test_pass_at_k_counts_the_subsets_that_hold_a_correct_one(n):
    for c, k in itertools.product(range(n + 1), range(1, n + 1)):
        draws = list(itertools.combinations([True] * c + [False] * (n - c), k))
        share = sum(map(any, draws)) / len(draws)
        value = pass_at_k(torch.tensor([n]), torch.tensor([c]), k).item()
        assert value == pytest.approx(share, abs=1e-12)


def test_pass_at_k_stays_finite_for_many_samples():
    assert pass_at_k(torch.tensor([5000]), torch.tensor([1]), 100).item() == pytest.approx(0.02)


@pytest.mark.parametrize(("n", "c", "k"), [(4, 1, 5), (4, 5, 1), (4, -1, 1), (4, 1, 0)])
def test_pass_at_k_refuses_impossible_counts(n, c, k):
    with pytest.raises(ValueError):
        pass_at_k(torch.tensor([n]), torch.tensor([c]), k)


def test_pass_at_k_metric_is_the_mean_over_prompts_of_all_batches():
    metric = PassAtK(2)
    metric.update(torch.tensor([4, 4]), torch.tensor([0, 4]))
    metric.update(torch.tensor([4]), torch.tensor([1]))
    assert metric.compute().item() == pytest.approx((0 + 1 + 0.5) / 3)


def test_means_are_over_values_not_over_batches():
    # fact 41: 1, 2, 3 and 10 have mean 4; a mean of means would be 6
    metrics = RolloutMetrics(["x"])
    metrics.update("x", torch.tensor([1.0, 2.0, 3.0]))
    metrics.update("x", torch.tensor([10.0]))
    assert metrics.compute() == {"x": 4.0}


def test_totals_add_up_and_extremes_are_kept():
    metrics = RolloutMetrics([], ["n"], ["r"])
    for values in ([3.0, 5.0], [4.0], []):
        metrics.update("r", torch.tensor(values))
        metrics.update("n", torch.tensor(values))
    assert metrics.compute() == {"n": 12.0, "r_min": 3.0, "r_max": 5.0}


def test_what_was_never_counted_is_absent_not_nan():
    # fact 15
    metrics = RolloutMetrics(["x"], ["n"], ["r"])
    metrics.update("x", torch.tensor([]))
    assert metrics.compute() == {}


def test_metrics_hold_no_graph():
    # fact 41
    metrics = RolloutMetrics(["x"])
    metrics.update("x", torch.tensor([1.0], requires_grad=True))
    assert not metrics.sums.requires_grad


def test_two_ranks_give_the_numbers_of_one():
    # fact 41: what torchmetrics does on a sync, sums added and extremes compared
    def filled(values):
        metrics = RolloutMetrics(["x"], ["n"], ["r"])
        for name in ("x", "n", "r"):
            metrics.update(name, torch.tensor(values))
        return metrics

    one, first, second = filled([1.0, 2.0, 7.0]), filled([1.0]), filled([2.0, 7.0])
    first.sums += second.sums
    first.counts += second.counts
    first.low = torch.minimum(first.low, second.low)
    first.high = torch.maximum(first.high, second.high)
    assert first.compute() == one.compute()
    kinds = {name: fx.__name__ for name, fx in one._reductions.items()}
    assert kinds == {
        "sums": "dim_zero_sum", "counts": "dim_zero_sum",
        "low": "dim_zero_min", "high": "dim_zero_max",
    }  # fmt: skip


def test_kl_is_a_mean_per_sequence_then_over_sequences(make_rollout):
    # fact 36, by an independent loop
    rollout = make_rollout()
    tally = RolloutTally(["correct"])
    entropy = torch.ones_like(rollout.old_logprobs)
    tally.count_logprobs(rollout.old_logprobs, entropy, rollout.ref_logprobs, rollout.mask)
    means = []
    for old, ref, mask in zip(
        rollout.old_logprobs, rollout.ref_logprobs, rollout.mask, strict=True
    ):
        d = (old - ref)[mask].double()
        means.append(((-d).exp() + d - 1).mean().item())
    figures = tally.compute()
    assert figures["train/kl_divergence"] == pytest.approx(sum(means) / len(means), rel=1e-6)
    assert figures["policy/entropy"] == 1.0


def test_flat_groups_at_the_best_and_at_the_worst_are_told_apart(make_rollout):
    # fact 31; groups of three: one all best, one with spread
    rollout = make_rollout()
    for rewards, best, worst in (
        ([1.0, 1.0, 1.0, 0.0, 1.0, 0.0], 0.5, 0.0),
        ([0.0, 0.0, 0.0, 0.0, 1.0, 0.0], 0.0, 0.5),
        ([0.5, 0.5, 0.5, 0.0, 1.0, 0.0], 0.0, 0.0),
    ):
        tally = RolloutTally([])
        tally.count_rewards(rollout, torch.tensor(rewards), {}, torch.zeros(6))
        figures = tally.compute()
        assert figures["rollout/flat_best_fraction"] == best
        assert figures["rollout/flat_worst_fraction"] == worst


def test_noise_is_a_standard_deviation():
    # fact 18
    tally = RolloutTally([])
    tally.count_noise(torch.tensor([0.1, 0.3]))
    tally.count_noise(torch.tensor([0.1, 0.3]))
    assert tally.compute()["policy/ratio_noise"] == pytest.approx(0.1)


def test_clip_fractions_have_two_units(make_rollout):
    # fact 40: lengths 5 3 1 4 2 5; rows 1 and 2 clipped whole
    from gspo_lightning.objectives import Objective, policy_loss, token_weights

    rollout = make_rollout()
    log_ratio = torch.tensor([0.0, 0.1, 0.1, 0.0, 0.0, 0.0])[:, None].expand(6, 5)
    advantages = torch.ones(6)
    weights = token_weights(rollout.mask, "sequence_mean")
    tally = RolloutTally([])
    for rows in ([0, 1], [2, 3, 4, 5]):  # in micro-batches of unequal size
        old = rollout.old_logprobs[rows]
        loss = policy_loss(
            old + log_ratio[rows], old, advantages[rows], rollout.mask[rows], weights[rows],
            Objective(),
        )  # fmt: skip
        tally.count_losses(loss, torch.zeros(()), torch.zeros(()), rollout.mask[rows], 0.5)
    figures = tally.compute()
    assert figures["train/clip_fraction_sequences"] == pytest.approx(2 / 6)
    assert figures["train/clip_fraction_tokens"] == pytest.approx(4 / 20)
    assert figures["policy/ratio_max"] == pytest.approx(math.exp(0.1), rel=1e-6)
