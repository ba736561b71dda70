"""Group-relative advantages."""

import math

import pytest
import torch

from gspo_lightning.advantages import flat_groups, group_advantages

KINDS = ("normalized", "relative", "leave_one_out", "batch_normalized")
NAN = float("nan")


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("relative", [[0.75, -0.25, -0.25, -0.25], [-1.0, 1.0, 1.0, -1.0]]),
        # first group: std with n - 1 is sqrt((0.75^2 + 3 * 0.25^2) / 3) = 0.5; second: sqrt(4 / 3)
        (
            "normalized",
            [[1.5, -0.5, -0.5, -0.5], [-(0.75**0.5), 0.75**0.5, 0.75**0.5, -(0.75**0.5)]],
        ),
        # first: 1 - 0 and 0 - 1/3; second: 0 - 4/3 and 2 - 2/3
        ("leave_one_out", [[1, -1 / 3, -1 / 3, -1 / 3], [-4 / 3, 4 / 3, 4 / 3, -4 / 3]]),
    ],
)
def test_each_kind_by_hand(kind, expected):
    """Fact 26."""
    rewards = torch.tensor([[1.0, 0.0, 0.0, 0.0], [0.0, 2.0, 2.0, 0.0]])
    torch.testing.assert_close(
        group_advantages(rewards, kind), torch.tensor(expected), atol=3e-6, rtol=0
    )


def test_batch_normalized_divides_by_the_std_of_all_rewards():
    """Fact 26: rewards 1, 3 and 5, 9 have mean 4.5 and n - 1 variance 35 / 3."""
    rewards = torch.tensor([[1.0, 3.0], [5.0, 9.0]], dtype=torch.float64)
    std = math.sqrt(35 / 3) + 1e-6
    expected = torch.tensor([[-1 / std, 1 / std], [-2 / std, 2 / std]], dtype=torch.float64)
    torch.testing.assert_close(group_advantages(rewards, "batch_normalized"), expected)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("value", [0.1, 0.0, -3.7, 1e6])
def test_a_flat_group_gives_exactly_zero(kind, value):
    """Fact 27: in float32 the mean of eight 0.1 is not 0.1, and their std is 8e-9."""
    rewards = torch.tensor([[value] * 8, [0.0, 1.0] * 4])
    advantages = group_advantages(rewards, kind)
    assert (advantages[0] == 0).all() and (advantages[1] != 0).all()
    assert flat_groups(rewards).tolist() == [True, False]


def test_flat_is_relative_to_the_size_of_the_rewards():
    """Fact 27: max - min <= 1e-6 * max(1, |max|)."""
    rewards = torch.tensor([[0.0, 9e-7], [0.0, 2e-6], [1e4, 1e4 + 5e-3], [1e4, 1e4 + 5e-2]])
    assert flat_groups(rewards.double()).tolist() == [True, False, True, False]


@pytest.mark.parametrize("group", [[1] + [0] * 3, [0] + [0.95] * 7, [0.4] * 7 + [1]])
def test_normalized_is_bounded_whatever_the_group(group):
    """Fact 28."""
    advantages = group_advantages(torch.tensor([group], dtype=torch.float32))
    assert advantages.isfinite().all()
    assert advantages.abs().max() <= math.sqrt(len(group) - 1) + 1e-3


def test_normalized_uses_the_group_std_not_a_leave_one_out_std():
    """Fact 28: without the one, the others' std is 0 and its advantage would be 1e6."""
    advantages = group_advantages(torch.tensor([[1.0, 0.0, 0.0, 0.0]]))
    assert advantages[0, 0].item() == pytest.approx(1.5, abs=1e-5)


@pytest.mark.parametrize("rewards", [torch.zeros(3, 1), torch.zeros(3)])
def test_a_group_of_one_is_an_error(rewards):
    """Fact 29."""
    with pytest.raises(ValueError, match="group size G >= 2"):
        group_advantages(rewards)


def test_the_group_is_an_axis():
    """Fact 29: two prompts with the same text and other rewards do not meet."""
    one = group_advantages(torch.tensor([[1.0, 0.0, 0.0]]))
    both = group_advantages(torch.tensor([[1.0, 0.0, 0.0], [9.0, 8.0, 1.0]]))
    assert torch.equal(one[0], both[0])


@pytest.mark.parametrize("kind", ["normalized", "relative", "leave_one_out"])
def test_a_missing_reward_takes_part_in_nothing(kind):
    """Fact 30: the others get what they would get without it."""
    without = group_advantages(torch.tensor([[1.0, 0.0, 0.25]]), kind)
    advantages = group_advantages(torch.tensor([[1.0, NAN, 0.0, 0.25]]), kind)
    assert advantages[0, 1] == 0
    torch.testing.assert_close(advantages[0, [0, 2, 3]], without[0])


def test_a_missing_reward_takes_no_part_in_the_batch_std():
    """Fact 30."""
    full = group_advantages(torch.tensor([[1.0, 0.0], [3.0, 0.0]]), "batch_normalized")
    holes = torch.tensor([[1.0, NAN, 0.0], [3.0, 0.0, NAN]])
    advantages = group_advantages(holes, "batch_normalized")
    torch.testing.assert_close(advantages[0, [0, 2]], full[0])
    torch.testing.assert_close(advantages[1, [0, 1]], full[1])


@pytest.mark.parametrize("kind", KINDS)
def test_fewer_than_two_rewards_give_zero(kind):
    """Fact 30."""
    rewards = torch.tensor([[1.0, NAN, NAN], [NAN, NAN, NAN]])
    assert (group_advantages(rewards, kind) == 0).all()
    assert flat_groups(rewards).all()


def test_a_missing_reward_does_not_make_a_flat_group_look_varied():
    """Fact 30."""
    rewards = torch.tensor([[0.5, NAN, 0.5], [-0.5, NAN, -0.5], [0.5, NAN, 0.6]])
    assert flat_groups(rewards).tolist() == [True, True, False]


@pytest.mark.parametrize("kind", KINDS)
def test_a_shift_of_all_rewards_changes_nothing(kind):
    rewards = torch.rand(2, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    torch.testing.assert_close(group_advantages(rewards + 5, kind), group_advantages(rewards, kind))


def test_eps_is_added_to_the_std():
    advantages = group_advantages(torch.tensor([[0.0, 2.0]], dtype=torch.float64), eps=1.0)
    assert advantages[0, 1].item() == pytest.approx(1 / (math.sqrt(2) + 1))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"kind": "median"}, "kind must be one of normalized, .* got 'median'"),
        ({"eps": -1.0}, "eps must be at least 0, got -1.0"),
    ],
)
def test_a_bad_argument_is_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        group_advantages(torch.tensor([[0.0, 1.0]]), **arguments)


def test_an_infinite_reward_is_an_error():
    with pytest.raises(ValueError, match="rewards must be finite"):
        group_advantages(torch.tensor([[0.0, float("inf")]]))


def test_opo_weighs_the_baseline_by_length():
    """(3 * 1 + 1 * 0) / 4 = 0.75; a missing reward has no say."""
    rewards = torch.tensor([[1.0, 0.0, NAN]])
    advantages = group_advantages(rewards, "opo", lengths=torch.tensor([[3, 1, 9]]))
    torch.testing.assert_close(advantages, torch.tensor([[0.25, -0.75, 0.0]]))
    with pytest.raises(ValueError, match="kind opo needs lengths"):
        group_advantages(rewards, "opo")


def test_gpg_is_larger_by_the_groups_that_are_flat():
    """One of two groups is flat: twice; three of four over two ranks: four times."""
    rewards = torch.tensor([[1.0, 0.0], [1.0, 1.0]])
    expected = torch.tensor([[0.5, -0.5], [0.0, 0.0]])
    torch.testing.assert_close(group_advantages(rewards, "gpg"), 2 * expected)
    other = torch.tensor([4, 0])  # rewards of the other rank, and those in groups with a spread
    four = group_advantages(rewards, "gpg", reduce=lambda counts: counts + other)
    torch.testing.assert_close(four, 4 * expected)


def test_pass_at_k_teaches_the_best_alone_by_its_lead():
    """Deviation of [1, 0.5, 0] is 0.5; with two best ones nothing is learned."""
    rewards = torch.tensor([[1.0, 0.5, 0.0], [1.0, 1.0, 0.0], [0.2, NAN, NAN]])
    expected = torch.tensor([[1.0, 0.0, 0.0], [0.0] * 3, [0.0] * 3])
    torch.testing.assert_close(group_advantages(rewards, "pass_at_k"), expected, atol=3e-6, rtol=0)


def test_reinforce_plus_plus_has_no_groups():
    rewards = torch.tensor([[1.0], [NAN]])
    assert group_advantages(rewards, "reinforce_plus_plus").tolist() == [[1.0], [0.0]]
    pair = torch.tensor([[1.0, 0.0]])
    baseline = group_advantages(pair, "reinforce_plus_plus_baseline")
    assert baseline.tolist() == [[0.5, -0.5]]
