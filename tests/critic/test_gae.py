"""Token rewards, generalized advantage estimation, whitening and the value loss."""

import math
from functools import partial

import pytest
import torch

from gspo_lightning.critic.gae import gae, token_rewards, value_loss, whiten

float64 = partial(torch.tensor, dtype=torch.float64)
NAN = float("nan")
LENGTHS = torch.tensor([5, 3, 1, 4, 0, 2])
MASK = torch.arange(5) < LENGTHS[:, None]


def random(seed=0):
    generator = torch.Generator().manual_seed(seed)
    return partial(torch.randn, 6, 5, generator=generator, dtype=torch.float64)


# ---- token rewards


def test_the_reward_lands_on_the_last_token_and_the_penalty_on_each():
    mask = torch.tensor([[True, True, False], [True, True, True]])
    kl = float64([[0.5, -1.0, NAN], [1.0, 0.0, 2.0]])
    result = token_rewards(float64([2.0, -1.0]), mask, kl, kl_coef=0.1)
    expected = float64([[-0.05, 2.1, 0.0], [-0.1, 0.0, -1.2]])
    torch.testing.assert_close(result, expected)


def test_a_row_with_nothing_selected_has_no_reward():
    assert not token_rewards(torch.ones(1), torch.zeros(1, 3, dtype=torch.bool)).any()


# ---- generalized advantage estimation


def test_gae_by_hand():
    """Gamma 0.9, lambda 0.8, r = (0, 0, 1), V = (0.5, 0.4, 0.6).

    delta_2 = 1 - 0.6 = 0.4; delta_1 = 0.9 * 0.6 - 0.4 = 0.14; delta_0 = 0.9 * 0.4 - 0.5 = -0.14;
    A_2 = 0.4; A_1 = 0.14 + 0.72 * 0.4 = 0.428; A_0 = -0.14 + 0.72 * 0.428 = 0.16816.
    """
    rewards, values = float64([[0.0, 0.0, 1.0]]), float64([[0.5, 0.4, 0.6]])
    advantages, returns = gae(rewards, values, torch.ones(1, 3).bool(), gamma=0.9, lam=0.8)
    torch.testing.assert_close(advantages, float64([[0.16816, 0.428, 0.4]]))
    torch.testing.assert_close(returns, float64([[0.66816, 0.828, 1.0]]))


@pytest.mark.parametrize(("gamma", "lam"), [(1.0, 0.95), (0.9, 0.0), (0.99, 1.0), (0.7, 0.3)])
def test_gae_equals_an_independent_loop(gamma, lam):
    """The sum over l of (gamma lambda)^l delta_{t+l}, row by row and token by token."""
    rewards, values = random()().masked_fill(~MASK, 0), random(1)()
    advantages, returns = gae(rewards, values, MASK, gamma, lam)
    for i, n in enumerate(LENGTHS.tolist()):
        r, v = rewards[i].tolist(), [*values[i, :n].tolist(), 0.0]
        for t in range(5):
            expected = sum(
                (gamma * lam) ** k * (r[t + k] + gamma * v[t + k + 1] - v[t + k])
                for k in range(max(n - t, 0))
            )
            assert advantages[i, t].item() == pytest.approx(expected, rel=1e-12, abs=1e-14)
            back = expected + v[t] if t < n else 0.0
            assert returns[i, t].item() == pytest.approx(back, rel=1e-12, abs=1e-14)


def test_lambda_one_is_the_return_minus_the_value():
    rewards, values = random()().masked_fill(~MASK, 0), random(1)()
    advantages, returns = gae(rewards, values, MASK, gamma=1.0, lam=1.0)
    to_come = rewards.flip(1).cumsum(1).flip(1).masked_fill(~MASK, 0)
    torch.testing.assert_close(returns, to_come)
    torch.testing.assert_close(advantages, (to_come - values).masked_fill(~MASK, 0))


@pytest.mark.parametrize("padding", [NAN, math.inf, 1e4])
def test_padding_changes_neither_advantages_nor_returns(padding):
    rewards, values = random()().masked_fill(~MASK, 0), random(1)()
    wide = (0, 2)
    dirty = torch.nn.functional.pad(values.masked_fill(~MASK, padding), wide, value=padding)
    results = gae(
        torch.nn.functional.pad(rewards, wide), dirty, torch.nn.functional.pad(MASK, wide)
    )
    for clean, result in zip(gae(rewards, values, MASK), results, strict=True):
        assert torch.equal(clean, result[:, :5]) and not result[:, 5:].any()


def test_tokens_left_out_inside_a_completion_are_stepped_over():
    """A multi-turn completion: what a tool wrote is context, not action."""
    mask = torch.tensor([[True, False, True]])
    rewards, values = float64([[0.0, 0.0, 1.0]]), float64([[0.5, 9.0, 0.6]])
    advantages, _ = gae(rewards, values, mask, gamma=0.9, lam=0.8)
    without, _ = gae(rewards[:, ::2], values[:, ::2], mask[:, ::2], gamma=0.9, lam=0.8)
    torch.testing.assert_close(advantages[:, ::2], without)
    assert advantages[0, 1] == 0


# ---- whitening


def test_whitened_entries_have_mean_zero_and_deviation_one():
    x = random()().masked_fill(~MASK, NAN)
    result = whiten(x, MASK)
    assert result[MASK].mean().item() == pytest.approx(0, abs=1e-12)
    assert result[MASK].std().item() == pytest.approx(1, abs=1e-5)
    assert (result[~MASK] == 0).all()


def test_whitening_is_over_all_ranks():
    x = random()()
    whole = whiten(x, MASK)
    for part in (slice(0, 2), slice(2, 6)):
        answers = iter(sums(x, MASK))

        def reduce(own, answers=answers):
            return next(answers)

        torch.testing.assert_close(whiten(x[part], MASK[part], reduce), whole[part])


def sums(x, mask):
    """What the sums over all ranks are: of the mask, of the entries, of the squared deviations."""
    values = x[mask]
    return mask.sum().double(), values.sum(), ((values - values.mean()) ** 2).sum()


def test_entries_that_do_not_differ_become_zero():
    x = torch.full((2, 3), 0.1)
    assert (whiten(x, torch.ones(2, 3).bool()) == 0).all()
    assert (whiten(x, torch.zeros(2, 3).bool()) == 0).all()


# ---- value loss


@pytest.mark.parametrize(
    ("value", "target", "loss", "slope"),
    [
        (0.1, 1.0, 0.405, -0.9),  # within 0.2 of the old value 0
        (0.5, 1.0, 0.32, 0.0),  # moved 0.5 towards the target: the error of 0.2, no gradient
        (0.5, 0.1, 0.08, 0.4),  # moved past it: its own error 0.4 is larger than 0.1
        (-0.5, 1.0, 1.125, -1.5),  # moved away: keeps its gradient
    ],
)
def test_value_loss_by_hand(value, target, loss, slope):
    values = float64([[value]]).requires_grad_()
    one = torch.ones(1, 1, dtype=torch.float64)
    result = value_loss(values, 0 * one, target * one, one.bool(), one, clip=0.2)
    assert result.loss.item() == pytest.approx(loss)
    (gradient,) = torch.autograd.grad(result.loss, values)
    assert gradient.item() == pytest.approx(slope)
    assert result.clip_fraction == float(slope == 0)


def test_without_a_clip_the_loss_is_half_the_weighted_squared_error():
    values, old, returns, weights = random()(), random(1)(), random(2)(), random(3)().abs()
    result = value_loss(values, old, returns, MASK, weights)
    expected = 0.5 * (weights * (values - returns) ** 2)[MASK].sum()
    torch.testing.assert_close(result.loss, expected)
    assert result.clip_fraction == 0
    assert value_loss(values, old, returns, MASK, weights, clip=0.1).loss > result.loss


def test_rows_without_a_return_and_padding_have_no_gradient():
    values, old, weights = random()().requires_grad_(), random(1)(), random(2)().abs()
    returns = random(3)()
    returns[1] = NAN
    dirty = [x.masked_fill(~MASK, NAN) for x in (old, returns)]
    result = value_loss(values, *dirty, MASK, weights.masked_fill(~MASK, 0), clip=0.5)
    (gradient,) = torch.autograd.grad(result.loss, values)
    assert (gradient[1] == 0).all() and (gradient[~MASK] == 0).all() and gradient[0].any()
    nothing = value_loss(values, old, torch.full_like(old, NAN), MASK, weights)
    assert nothing.loss == 0 and nothing.loss.requires_grad
