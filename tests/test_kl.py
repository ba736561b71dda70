"""KL estimators and the rules for the coefficient."""

import math

import pytest
import torch

from gspo_lightning.kl import (
    MultiplicativeKL,
    ProportionalKL,
    check_loss_kind,
    kl_clamped,
    kl_estimate,
)

NAN = float("nan")


@pytest.mark.parametrize(
    ("kind", "expected"), [("k1", 0.5), ("k2", 0.125), ("k3", math.exp(-0.5) - 0.5)]
)
def test_each_estimator_by_hand(kind, expected):
    """Fact 33, at d = -1.0 - (-1.5) = 0.5."""
    value = kl_estimate(torch.tensor([[-1.0]]).double(), torch.tensor([[-1.5]]).double(), kind)
    assert value.item() == pytest.approx(expected, rel=1e-14)


def test_k3_is_never_negative_and_zero_only_at_equality():
    """Fact 33; in float32 exp(-d) + d - 1 gives -6e-8 here and there."""
    d = torch.linspace(-3, 3, 601)
    value = kl_estimate(d, torch.zeros_like(d))
    assert (value[d.abs() > 1e-3] > 0).all()
    assert kl_estimate(d, d).abs().max() == 0


def test_k3_of_a_small_difference_keeps_its_digits():
    """A difference of 1e-4 gives d^2 / 2 = 5e-9, far below the float32 resolution at 1."""
    value = kl_estimate(torch.tensor([1e-4]), torch.tensor([0.0]))
    assert value.item() == pytest.approx(5e-9, rel=1e-2)


def exact_gradients(kind):
    """Mean gradient of an estimator under the policy, and both KL gradients, for one token."""
    logits = torch.tensor([0.3, -1.2, 0.8, 0.1], dtype=torch.float64, requires_grad=True)
    ref = torch.tensor([0.5, 0.2, -0.4, 0.0], dtype=torch.float64).log_softmax(0)
    lp = logits.log_softmax(0)
    mean = (lp.exp().detach() * kl_estimate(lp, ref, kind)).sum()
    reverse = (lp.exp() * (lp - ref)).sum()
    forward = (ref.exp() * (ref - lp)).sum()
    return [
        torch.autograd.grad(value, logits, retain_graph=True)[0]
        for value in (mean, reverse, forward)
    ]


def test_k1_as_a_loss_has_zero_mean_gradient():
    """Fact 33, summed over the whole vocabulary instead of sampled."""
    assert exact_gradients("k1")[0].abs().max() < 1e-15


def test_k2_as_a_loss_has_the_gradient_of_the_reverse_kl():
    """Fact 33."""
    mean, reverse, _ = exact_gradients("k2")
    torch.testing.assert_close(mean, reverse, atol=1e-15, rtol=1e-12)


def test_k3_as_a_loss_has_the_gradient_of_the_forward_kl():
    """Fact 33."""
    mean, _, forward = exact_gradients("k3")
    torch.testing.assert_close(mean, forward, atol=1e-15, rtol=1e-12)


def test_k1_and_k3_have_the_reverse_kl_as_their_mean():
    lp = torch.tensor([0.3, -1.2, 0.8], dtype=torch.float64).log_softmax(0)
    ref = torch.tensor([0.5, 0.2, -0.4], dtype=torch.float64).log_softmax(0)
    reverse = (lp.exp() * (lp - ref)).sum()
    for kind in ("k1", "k3"):
        torch.testing.assert_close((lp.exp() * kl_estimate(lp, ref, kind)).sum(), reverse)


def test_only_k2_and_k3_may_be_a_loss():
    """Fact 33."""
    check_loss_kind("k2")
    check_loss_kind("k3")
    with pytest.raises(ValueError, match="k1 cannot be a loss"):
        check_loss_kind("k1")
    with pytest.raises(ValueError, match="must be k2, k3 or k3_corrected, got 'k4'"):
        check_loss_kind("k4")
    with pytest.raises(ValueError, match="kind must be one of k1, k2, k3, k3_corrected, got 'k4'"):
        kl_estimate(torch.zeros(1), torch.zeros(1), "k4")


def test_the_corrected_estimator_is_k3_times_the_ratio_with_the_gradient_of_k2_on_the_policy():
    """d/dlp of r k3 = r (k3 + 1 - e^-d) = r d; at ratio 1 that is k2's."""
    lp = torch.tensor([-1.0, -2.0, -0.5], dtype=torch.float64, requires_grad=True)
    ref = torch.tensor([-1.5, -1.0, -0.5], dtype=torch.float64)
    old = lp.detach() - torch.tensor([0.0, 0.3, 0.0], dtype=torch.float64)
    value = kl_estimate(lp, ref, "k3_corrected", old)
    ratio = torch.tensor([1.0, math.exp(0.3), 1.0], dtype=torch.float64)
    torch.testing.assert_close(value, ratio * kl_estimate(lp, ref))
    slope = torch.autograd.grad(value.sum(), lp)[0]
    torch.testing.assert_close(slope, ratio * (lp - ref).detach())
    with pytest.raises(ValueError, match="k3_corrected needs old_logprobs"):
        kl_estimate(lp, ref, "k3_corrected")


def test_the_exponent_is_clamped_and_clamped_tokens_are_found():
    """Fact 33: exp(200) is infinite in float32."""
    lp, ref = torch.tensor([[-200.0, -1.0, -21.5, 0.0]]), torch.tensor([[0.0, -1.0, -1.0, -21.0]])
    value = kl_estimate(lp, ref)
    assert value.isfinite().all() and (value >= 0).all()
    assert value[0, 0].item() == pytest.approx(math.exp(20) - 201, rel=1e-6)
    assert kl_clamped(lp, ref).tolist() == [[True, False, True, True]]


def test_a_clamped_token_is_still_pulled_towards_the_reference():
    """Fact 33: a clamp with no gradient leaves +1, which pushes the token further away."""
    lp = torch.tensor([-200.0], requires_grad=True)
    kl_estimate(lp, torch.tensor([0.0])).sum().backward()
    assert lp.grad.item() == pytest.approx(1 - math.exp(20), rel=1e-6)


@pytest.mark.parametrize("kind", ["k1", "k2", "k3"])
def test_the_gradient_flows_through_the_policy_alone(kind):
    """Fact 35."""
    lp = torch.tensor([-1.0, -2.0], requires_grad=True)
    ref = torch.tensor([-1.5, -1.0], requires_grad=True)
    kl_estimate(lp, ref, kind).sum().backward()
    assert (lp.grad != 0).all() and ref.grad is None


def test_low_precision_inputs_are_computed_in_float32():
    """Fact 6."""
    lp = torch.tensor([-1.0], dtype=torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16):
        value = kl_estimate(lp, torch.tensor([-1.001]))
    assert value.dtype == torch.float32
    assert value.item() == pytest.approx(5e-7, rel=1e-2)


# ---- rules


@pytest.mark.parametrize(
    ("observed", "expected"),
    [
        (0.0201, 0.3),  # above 2 * target: times 1.5
        (0.02, 0.2),  # the edges belong to the band
        (0.01, 0.2),
        (0.005, 0.2),
        (0.0049, 0.1),  # below half the target: times 0.5
        (-0.1, 0.1),
        (NAN, 0.2),
    ],
)
def test_the_multiplicative_rule_by_hand(observed, expected):
    """Fact 37: target 0.01, coefficient 0.2."""
    assert MultiplicativeKL().next_coef(0.2, observed, sequences=6) == pytest.approx(expected)


def test_the_multiplicative_rule_stays_within_its_bounds():
    """Fact 37: [0.01, 1.0]."""
    rule = MultiplicativeKL()
    assert rule.next_coef(0.9, observed=1.0, sequences=6) == 1.0
    assert rule.next_coef(0.015, observed=0.0, sequences=6) == 0.01
    assert rule.next_coef(1.0, observed=math.inf, sequences=6) == 1.0


def test_nan_leaves_a_coefficient_alone_that_lies_outside_the_bounds():
    """Fact 37: unchanged is unchanged."""
    assert MultiplicativeKL().next_coef(3.0, NAN, sequences=6) == 3.0


def test_the_multiplicative_rule_uses_each_of_its_settings():
    rule = MultiplicativeKL(0.1, factor_up=3, factor_down=0.1, high=4, low=0.2, maximum=9)
    assert rule.next_coef(1, 0.39, sequences=6) == 1 and rule.next_coef(1, 0.41, sequences=6) == 3
    assert rule.next_coef(1, 0.021, sequences=6) == 1
    assert rule.next_coef(1, 0.019, sequences=6) == pytest.approx(0.1)
    assert MultiplicativeKL(minimum=0.5).next_coef(0.6, 0.0, sequences=6) == 0.5


@pytest.mark.parametrize(
    ("observed", "expected"),
    [
        (0.011, 0.2 * (1 + 0.1 * 64 / 1000)),  # 10 % above
        (0.5, 0.2 * (1 + 0.2 * 64 / 1000)),  # far above: the error counts as 20 %
        (0.0, 0.2 * (1 - 0.2 * 64 / 1000)),
        (0.01, 0.2),
        (NAN, 0.2),
    ],
)
def test_the_proportional_rule_by_hand(observed, expected):
    """Fact 37."""
    rule = ProportionalKL(target=0.01, horizon=1000)
    assert rule.next_coef(0.2, observed, sequences=64) == pytest.approx(expected)


@pytest.mark.parametrize("sequences", [8, 32, 4096])
def test_a_horizon_in_rollouts_is_as_fast_for_every_size_of_rollout(sequences):
    """Fact 37, with a horizon of 4 rollouts."""
    rule = ProportionalKL(target=0.05, rollouts=4)
    assert rule.next_coef(0.2, 9.9, sequences) == pytest.approx(0.2 * (1 + 0.2 / 4))
    assert rule.next_coef(0.2, 0.055, sequences) == pytest.approx(0.2 * (1 + 0.1 / 4))
    assert rule.next_coef(0.2, 0.0, sequences) == pytest.approx(0.2 * (1 - 0.2 / 4))


def test_the_default_of_the_proportional_rule_answers_within_a_short_run():
    """Twelve times the target for nine rollouts of 32 completions: the coefficient doubles."""
    coef = 0.05
    for _ in range(9):
        coef = ProportionalKL(target=0.05).next_coef(coef, 0.6, sequences=32)
    assert coef == pytest.approx(0.05 * 1.1**9)
    assert coef > 2 * 0.05


def test_a_rule_of_before_the_horizon_in_rollouts_has_the_same_marks():
    """Or a run that was begun with a horizon in completions could not be continued."""
    marks = ProportionalKL(target=0.12, horizon=500).marks()
    assert {k: v for k, v in marks.items() if v is not None} == {
        "rule": "ProportionalKL", "rule.target": 0.12, "rule.horizon": 500, "rule.clip": 0.2,
    }  # fmt: skip
    assert ProportionalKL(target=0.12).marks()["rule.rollouts"] == 2.0


def test_the_clip_of_the_proportional_rule_bounds_the_error():
    rule = ProportionalKL(target=0.01, horizon=1000, clip=0.5)
    assert rule.next_coef(1.0, 9.9, sequences=100) == pytest.approx(1.05)


@pytest.mark.parametrize("rule", [MultiplicativeKL(), ProportionalKL(target=0.01)])
@pytest.mark.parametrize("coef", [0.0, -0.1, NAN])
def test_a_coefficient_that_is_not_positive_cannot_be_adapted(rule, coef):
    """Fact 37: no factor leads away from 0."""
    with pytest.raises(ValueError, match="kl_coef must be > 0"):
        rule.next_coef(coef, 0.01, sequences=6)


@pytest.mark.parametrize("rule", [MultiplicativeKL, ProportionalKL])
@pytest.mark.parametrize("target", [0.0, -0.01, NAN])
def test_a_target_that_is_not_positive_is_an_error(rule, target):
    """Fact 37."""
    with pytest.raises(ValueError, match="target must be > 0"):
        rule(target=target)


@pytest.mark.parametrize(
    ("arguments", "name"),
    [
        ({"factor_up": 0.9}, "factor_up"),
        ({"factor_down": 0.0}, "factor_down"),
        ({"factor_down": 1.1}, "factor_down"),
        ({"low": 3.0}, "low"),
        ({"minimum": 0.0}, "minimum"),
        ({"minimum": 2.0}, "minimum"),
    ],
)
def test_a_bad_setting_of_the_multiplicative_rule_is_named(arguments, name):
    with pytest.raises(ValueError, match=f"^{name} must"):
        MultiplicativeKL(**arguments)


def test_a_bad_setting_of_the_proportional_rule_is_named():
    with pytest.raises(ValueError, match=r"^horizon must"):
        ProportionalKL(0.01, horizon=0)
    with pytest.raises(ValueError, match=r"^rollouts must exceed clip = 0.2, got 0.2"):
        ProportionalKL(0.01, rollouts=0.2)
    with pytest.raises(ValueError, match=r"^clip must"):
        ProportionalKL(0.01, clip=0.0)
    with pytest.raises(ValueError, match=r"^horizon must exceed clip \* sequences = 20"):
        ProportionalKL(0.01, horizon=10).next_coef(0.2, 0.0, sequences=100)
