"""Ratios, surrogates, aggregation weights and the policy loss."""

import math
from functools import partial

import pytest
import torch

from gspo_lightning.logprobs import completion_logprobs
from gspo_lightning.objectives import (
    Objective,
    clipped,
    importance_log_ratio,
    picked_tokens,
    policy_loss,
    token_weights,
)
from support import two_ranks

NAN = float("nan")
LEVELS = ("sequence", "sequence_token", "token", "sequence_sum")
AGGREGATIONS = ("sequence_mean", "token_mean", "fixed_length", "token_sum")
CLIP_COV = {"ratio": "token", "pick": "clip_cov", "pick_share": 0.3}
float64 = partial(torch.tensor, dtype=torch.float64)
weights64 = partial(token_weights, dtype=torch.float64)


def batch(seed=0, spread=1e-3, lengths=(5, 3, 1, 4, 2, 0)):
    """Random float64 (lp, old, A, mask) with ratios on both sides of the clip range."""
    generator = torch.Generator().manual_seed(seed)
    size, width = len(lengths), 5
    random = partial(torch.randn, size, width, generator=generator, dtype=torch.float64)
    old = -random().abs()
    mask = torch.arange(width) < torch.tensor(lengths)[:, None]
    logprobs = (old + spread * random()).requires_grad_()
    return logprobs, old, random()[:, 0], mask


def gradient(loss, x):
    return torch.autograd.grad(loss, x)[0]


# ---- ratio


def test_sequence_ratio_is_the_mean_log_ratio_in_every_column():
    """Fact 1: (0.2 + 0.4) / 2 = 0.3 over two tokens, and 0.5 over one."""
    old = float64([[-1.0, -2.0, -7.0], [-1.0, -7.0, -7.0]])
    lp = float64([[-0.8, -1.6, -1.0], [-0.5, -1.0, -1.0]])
    mask = torch.tensor([[True, True, False], [True, False, False]])
    expected = float64([[0.3] * 3, [0.5] * 3])
    torch.testing.assert_close(importance_log_ratio(lp, old, mask, "sequence"), expected)


def test_a_row_with_nothing_selected_has_ratio_one_and_enters_nothing():
    """Fact 1."""
    lp, old, advantages, mask = batch()
    objective = Objective(clip_low=1e-6, clip_high=1e-6)
    full = policy_loss(lp, old, advantages, mask, weights64(mask, "sequence_mean"), objective)
    assert (full.ratio[5] == 1).all()
    rows = slice(0, 5)  # without the empty row
    part = policy_loss(
        lp[rows],
        old[rows],
        advantages[rows],
        mask[rows],
        weights64(mask[rows], "sequence_mean"),
        objective,
    )
    assert full.loss == part.loss and full.clip_fraction_tokens == part.clip_fraction_tokens
    assert full.clip_fraction_sequences == part.clip_fraction_sequences > 0


def test_sequence_token_has_value_and_gradient_of_sequence():
    """Fact 2."""
    lp, old, advantages, mask = batch()
    weights = weights64(mask, "sequence_mean")
    one = policy_loss(lp, old, advantages, mask, weights, Objective("sequence")).loss
    two = policy_loss(lp, old, advantages, mask, weights, Objective("sequence_token")).loss
    torch.testing.assert_close(one, two, rtol=1e-14, atol=1e-16)
    torch.testing.assert_close(gradient(one, lp), gradient(two, lp), rtol=1e-12, atol=1e-16)


def test_sequence_token_lets_each_token_have_its_own_advantage():
    """Fact 2: this is what the token variant is for (GSPO eq. 14)."""
    lp, old, _, mask = batch(spread=1e-5)
    advantages = torch.arange(30, dtype=torch.float64).view(6, 5) - 14.5
    weights = weights64(mask, "sequence_mean")
    result = policy_loss(lp, old, advantages, mask, weights, Objective("sequence_token"))
    expected = -weights * result.ratio * advantages
    torch.testing.assert_close(gradient(result.loss, lp), expected, rtol=1e-12, atol=0)


def test_sequence_token_loses_no_bit_of_the_sequence_ratio():
    """Fact 2: adding log s to a log-prob of -20 first would round it to 2e-6."""
    old = torch.tensor([[-20.0, -0.1, -3.0]])
    lp = old + torch.tensor([[3e-4, -1e-4, 7e-4]])
    mask = torch.ones(1, 3, dtype=torch.bool)
    sequence = importance_log_ratio(lp, old, mask, "sequence")
    assert torch.equal(sequence, importance_log_ratio(lp, old, mask, "sequence_token"))


def test_token_ratio_is_the_difference():
    """Fact 3."""
    lp, old, _, mask = batch()
    expected = torch.where(mask, lp - old, 0)
    assert torch.equal(importance_log_ratio(lp, old, mask, "token"), expected)


def test_sequence_sum_is_not_normalised_by_length():
    """Fact 4: 0.1 on each of four tokens."""
    lp = torch.full((1, 5), 0.1, dtype=torch.float64)
    mask = torch.tensor([[True] * 4 + [False]])
    result = importance_log_ratio(lp, torch.zeros(1, 5).double(), mask, "sequence_sum")
    torch.testing.assert_close(result, torch.full((1, 5), 0.4).double(), rtol=1e-7, atol=0)


@pytest.mark.parametrize("surrogate", ["clip", "cispo"])
@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("padding", [NAN, -math.inf, 1e4])
def test_padding_changes_neither_loss_nor_gradient(level, surrogate, padding):
    """Fact 5."""
    lp, old, advantages, mask = batch()
    advantages = advantages[:, None].expand_as(mask)
    objective = Objective(level, surrogate)
    weights = weights64(mask, "sequence_mean")
    clean = policy_loss(lp, old, advantages, mask, weights, objective)
    dirty_lp = lp.detach().masked_fill(~mask, padding).requires_grad_()
    dirty = policy_loss(
        dirty_lp,
        old.masked_fill(~mask, -padding),
        advantages.masked_fill(~mask, padding),
        mask,
        weights,
        objective,
    )
    assert clean.loss == dirty.loss
    assert clean.clip_fraction_tokens == dirty.clip_fraction_tokens
    assert torch.equal(gradient(clean.loss, lp), gradient(dirty.loss, dirty_lp))


@pytest.mark.parametrize("level", LEVELS)
def test_the_clip_works_in_float32_under_autocast(level):
    """Fact 6: in bfloat16 1 + 5e-4 is 1 and nothing would ever be clipped."""
    old = torch.full((1, 5), -2.0)
    lp = (old + 5e-4).requires_grad_()
    mask = torch.ones(1, 5, dtype=torch.bool)
    weights = token_weights(mask, "sequence_mean")
    with torch.autocast("cpu", torch.bfloat16):
        result = policy_loss(lp, old, torch.ones(1), mask, weights, Objective(level))
    assert result.loss.dtype == result.ratio.dtype == torch.float32
    exponent = 5 * 5e-4 if level == "sequence_sum" else 5e-4
    assert result.ratio[0, 0].item() == pytest.approx(math.exp(exponent), abs=1e-6)
    assert result.clip_fraction_sequences == 1


def test_low_precision_log_probs_are_computed_in_float32():
    """Fact 6: -2 and -1.9921875 are neighbours in bfloat16."""
    lp = torch.tensor([[-1.9921875]], dtype=torch.bfloat16)
    old = torch.tensor([[-2.0]], dtype=torch.bfloat16)
    ratio = importance_log_ratio(lp, old, torch.ones(1, 1, dtype=torch.bool), "sequence").exp()
    assert ratio.item() == pytest.approx(math.exp(0.0078125), abs=1e-7)


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("jump", [50.0, -50.0, 5e3])
@pytest.mark.parametrize("advantage", [1.0, -1.0])
def test_one_broken_token_stays_finite_and_keeps_its_side(level, jump, advantage):
    """Fact 7: clipped sides have gradient 0, the others one of the right sign."""
    old = torch.full((1, 1), -60.0)
    lp = (old + jump).requires_grad_()
    mask = torch.ones(1, 1, dtype=torch.bool)
    weights = token_weights(mask, "sequence_mean")
    result = policy_loss(lp, old, torch.tensor([advantage]), mask, weights, Objective(level))
    slope = gradient(result.loss, lp)
    assert result.loss.isfinite() and slope.isfinite().all()
    is_clipped = (jump > 0) == (advantage > 0)
    assert result.clip_fraction_tokens == float(is_clipped)
    assert slope.sign().item() == (0.0 if is_clipped else -advantage)


# ---- surrogate


@pytest.mark.parametrize(
    ("ratio", "advantage", "loss", "slope"),
    [
        (1.5, 2.0, -2.6, 0.0),  # above 1.3 and wanted more: clipped
        (1.2, 2.0, -2.4, -2.4),  # inside
        (0.5, 2.0, -1.0, -1.0),  # below and wanted more: keeps the full gradient
        (0.5, -2.0, 1.6, 0.0),  # below 0.8 and wanted less: clipped
        (0.9, -2.0, 1.8, 1.8),
        (1.5, -2.0, 3.0, 3.0),  # above and wanted less: keeps the full gradient
        (1.5, 0.0, 0.0, 0.0),
    ],
)
@pytest.mark.parametrize("level", LEVELS)
def test_clip_by_hand(level, ratio, advantage, loss, slope):
    """Fact 8, clip range [0.8, 1.3]; d loss / d lp = -r A where it is not clipped."""
    lp = float64([[math.log(ratio)]]).requires_grad_()
    mask = torch.ones(1, 1, dtype=torch.bool)
    objective = Objective(level, clip_low=0.2, clip_high=0.3)
    weights = weights64(mask, "sequence_mean")
    result = policy_loss(lp, torch.zeros_like(lp), float64([advantage]), mask, weights, objective)
    assert result.loss.item() == pytest.approx(loss)
    assert gradient(result.loss, lp).item() == (pytest.approx(slope) if slope else 0.0)
    assert result.clip_fraction_tokens == float(slope == 0 and advantage != 0)


def test_clip_equals_the_formula_of_the_paper():
    """Fact 8: -min(r A, clip(r) A), as written there."""
    lp, old, advantages, mask = batch(spread=1.0)
    objective = Objective("token", "clip", "token_mean", clip_low=0.2, clip_high=0.3)
    result = policy_loss(lp, old, advantages, mask, weights64(mask, "token_mean"), objective)
    ratio, a = (lp - old).exp(), advantages[:, None]
    formula = -torch.minimum(ratio * a, ratio.clamp(0.8, 1.3) * a)[mask].mean()
    torch.testing.assert_close(result.loss, formula)
    torch.testing.assert_close(gradient(result.loss, lp), gradient(formula, lp))
    assert 0 < result.clip_fraction_tokens < 1


def test_an_advantage_of_zero_never_counts_as_clipped():
    """Fact 8."""
    mask = torch.ones(2, 1, dtype=torch.bool)
    log_ratio = torch.tensor([[3.0], [-3.0]])
    for surrogate in ("clip", "cispo"):
        objective = Objective("token", surrogate)
        assert not clipped(log_ratio, torch.zeros(2), mask, objective).any()


def test_clipped_counts_add_up_over_any_cut():
    """Fact 41: the numerators of the clip fractions are sums."""
    lp, old, advantages, mask = batch()
    objective = Objective("token")
    log_ratio = importance_log_ratio(lp, old, mask, "token")
    whole = clipped(log_ratio, advantages, mask, objective)
    parts = [
        clipped(log_ratio[i : i + 4], advantages[i : i + 4], mask[i : i + 4], objective)
        for i in (0, 4)
    ]
    assert torch.equal(whole, torch.cat(parts)) and whole.any()
    result = policy_loss(lp, old, advantages, mask, weights64(mask, "sequence_mean"), objective)
    assert result.clip_fraction_tokens.item() == pytest.approx(whole.sum() / mask.sum())
    assert result.clip_fraction_sequences.item() == pytest.approx(whole.any(1).sum() / 5)


def test_the_clip_range_is_resolved_below_the_spacing_of_float32_around_one():
    """Fact 6: 1e-8 above and below log(1 + 4e-4), where ratios differ by less than 6e-8."""
    mask = torch.ones(2, 1, dtype=torch.bool)
    log_ratio = math.log1p(4e-4) + torch.tensor([[1e-8], [-1e-8]])
    assert clipped(log_ratio, torch.ones(2), mask, Objective()).tolist() == [[True], [False]]


@pytest.mark.parametrize(
    ("ratio", "advantage", "slope"),
    [(2.0, 3.0, -3.9), (2.0, -3.0, 3.9), (0.5, 3.0, -1.5), (1.0, 0.0, 0.0)],
)
def test_cispo_by_hand(ratio, advantage, slope):
    """Fact 9: -min(r, 1.3) A lp; nothing loses its gradient."""
    lp = float64([[-1.0]]).requires_grad_()
    mask = torch.ones(1, 1, dtype=torch.bool)
    objective = Objective("token", "cispo", "token_mean", clip_low=1.0, clip_high=0.3)
    old = lp.detach() - math.log(ratio)
    weights = weights64(mask, "token_mean")
    result = policy_loss(lp, old, float64([advantage]), mask, weights, objective)
    assert gradient(result.loss, lp).item() == pytest.approx(slope)
    assert result.loss.item() == pytest.approx(-slope)
    assert result.clip_fraction_tokens == float(ratio > 1.3)


@pytest.mark.parametrize("level", LEVELS)
def test_at_ratio_one_the_loss_is_minus_the_mean_advantage_with_a_gradient(level):
    """Fact 10."""
    lp, _, advantages, mask = batch(lengths=(5, 3, 1, 4, 2, 5))
    weights = weights64(mask, "sequence_mean")
    result = policy_loss(lp, lp.detach(), advantages, mask, weights, Objective(level))
    assert result.loss.item() == pytest.approx(-advantages.mean().item())
    assert (gradient(result.loss, lp)[mask] != 0).all()
    assert (result.ratio == 1).all() and result.clip_fraction_sequences == 0


def test_autodiff_equals_equation_10_of_the_paper():
    """Fact 11: dL / dlp_it = -A_i s_i mask_it / (N n_i), written as a loop."""
    lp, old, advantages, mask = batch()
    objective = Objective(clip_low=0.9, clip_high=9.0)  # nothing is clipped
    weights = weights64(mask, "sequence_mean")
    slope = gradient(policy_loss(lp, old, advantages, mask, weights, objective).loss, lp)
    expected = torch.zeros(6, 5, dtype=torch.float64)
    lengths = [5, 3, 1, 4, 2, 0]
    for i, n in enumerate(lengths):
        for t in range(n):
            s = math.exp(sum((lp[i, u] - old[i, u]).item() for u in range(n)) / n)
            expected[i, t] = -advantages[i].item() * s / (5 * n)
    torch.testing.assert_close(slope, expected, rtol=1e-12, atol=1e-16)


# ---- aggregation


@pytest.mark.parametrize(
    ("aggregation", "expected"),
    [
        ("sequence_mean", [[0.25, 0.25, 0], [0.5, 0, 0], [0, 0, 0]]),
        ("token_mean", [[1 / 3, 1 / 3, 0], [1 / 3, 0, 0], [0, 0, 0]]),
        ("fixed_length", [[1 / 20, 1 / 20, 0], [1 / 20, 0, 0], [0, 0, 0]]),
        ("token_sum", [[0.5, 0.5, 0], [0.5, 0, 0], [0, 0, 0]]),
    ],
)
def test_weights_by_hand(aggregation, expected):
    """Fact 12: the empty row is not counted."""
    mask = torch.tensor([[1, 1, 0], [1, 0, 0], [0, 0, 0]]).bool()
    torch.testing.assert_close(token_weights(mask, aggregation, 10), torch.tensor(expected))


def test_sequences_of_10_and_1000_tokens_have_the_same_total_gradient():
    """Fact 13."""
    mask = torch.arange(1000) < torch.tensor([[10], [1000]])
    lp = torch.zeros(2, 1000, dtype=torch.float64, requires_grad=True)
    weights = weights64(mask, "sequence_mean")
    loss = policy_loss(lp, lp.detach(), float64([1.0, 1.0]), mask, weights, Objective()).loss
    torch.testing.assert_close(gradient(loss, lp).sum(1), float64([-0.5, -0.5]))


def padded(rollout, left, right):
    """The fields of a rollout with more padding, and NaN where nobody may look."""
    pad = torch.nn.functional.pad
    return {
        "prompt_ids": pad(rollout.prompt_ids, (left, 0)),
        "prompt_mask": pad(rollout.prompt_mask, (left, 0)),
        "completion_ids": pad(rollout.completion_ids, (0, right)),
        "mask": pad(rollout.mask, (0, right)),
        "old": pad(rollout.old_logprobs, (0, right), value=NAN),
        "advantages": pad(rollout.advantages, (0, right), value=NAN),
    }


def model_gradient(model, fields, objective, micro_batch_size, order=None):
    """Gradient of a mini-batch through a model, one micro-batch at a time."""
    order = torch.arange(6) if order is None else torch.tensor(order)
    fields = {name: tensor[order] for name, tensor in fields.items()}
    weights = weights64(fields["mask"], objective.aggregation, max_length=5)
    model.zero_grad()
    for rows in torch.arange(6).split(micro_batch_size):
        part = {name: tensor[rows] for name, tensor in fields.items()}
        ids = [part[n] for n in ("prompt_ids", "prompt_mask", "completion_ids", "mask")]
        lp = completion_logprobs(model, *ids).logprobs
        old = part["old"].double()
        policy_loss(
            lp, old, part["advantages"], part["mask"], weights[rows], objective
        ).loss.backward()
    return torch.cat([parameter.grad.flatten() for parameter in model.parameters()])


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
def test_gradients_do_not_depend_on_micro_batches_row_order_or_padding(
    make_model, make_rollout, aggregation
):
    """Fact 13, in float64 through a model whose every operation is float64."""
    model, rollout = make_model("gpt2").double(), make_rollout()
    level = "token" if aggregation in ("token_mean", "fixed_length") else "sequence"
    objective = Objective(level, aggregation=aggregation, clip_low=0.9, clip_high=20.0)
    whole = model_gradient(model, padded(rollout, 0, 0), objective, 6)
    assert whole.abs().max() > 1e-3
    same = partial(torch.testing.assert_close, expected=whole, rtol=1e-10, atol=1e-12)
    for size in (1, 2, 4):
        same(model_gradient(model, padded(rollout, 0, 0), objective, size))
    same(model_gradient(model, padded(rollout, 0, 0), objective, 4, order=[4, 0, 5, 2, 1, 3]))
    same(model_gradient(model, padded(rollout, 7, 3), objective, 6))
    same(model_gradient(model, padded(rollout, 2, 1), objective, 1))


@pytest.mark.parametrize("aggregation", ["token_mean", "fixed_length"])
@pytest.mark.parametrize("level", ["sequence", "sequence_token", "sequence_sum", "geometric"])
def test_a_sequence_ratio_weighted_by_length_is_refused_with_the_reason(level, aggregation):
    """Fact 51: one rule for both; token_sum says by its name that it is wanted."""
    with pytest.raises(ValueError, match="weighted by the sequence's length"):
        Objective(level, aggregation=aggregation)
    assert Objective(level, aggregation="token_sum").aggregation == "token_sum"


def test_two_ranks_with_half_of_the_rows_have_the_gradient_of_one(tmp_path):
    """Fact 14, with two real processes; the halves hold 9 and 6 tokens, 3 and 2 sequences."""
    lp, *others = batch()
    whole = [lp.detach(), *others]
    torch.save(whole, tmp_path / "batch.pt")
    torch.multiprocessing.spawn(two_ranks.run_rank, (str(tmp_path), AGGREGATIONS), nprocs=2)
    gradients = torch.load(tmp_path / "gradients.pt", weights_only=True)
    scale = torch.ones((), dtype=torch.float64, requires_grad=True)
    for name in AGGREGATIONS:
        expected = two_ranks.loss_gradient(scale, whole, name)
        assert expected.abs() > 1e-2
        torch.testing.assert_close(gradients[name], expected, rtol=1e-12, atol=0)


@pytest.mark.parametrize("surrogate", ["clip", "cispo"])
@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("aggregation", AGGREGATIONS)
def test_with_all_rows_masked_the_loss_is_zero_and_attached(level, surrogate, aggregation):
    """Fact 15."""
    lp, old, advantages, mask = batch()
    nothing = torch.zeros_like(mask)
    weights = weights64(nothing, aggregation, 5)
    result = policy_loss(lp, old, advantages, nothing, weights, Objective(level, surrogate))
    assert result.loss == 0 and (weights == 0).all()
    assert (gradient(result.loss, lp) == 0).all()
    assert result.clip_fraction_sequences == 0 and result.clip_fraction_tokens == 0


# ---- arguments


def test_the_defaults_are_gspo_as_published():
    assert Objective() == Objective("sequence", "clip", "sequence_mean", 3e-4, 4e-4)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"ratio": "word"}, "ratio must be one of sequence, .* got 'word'"),
        ({"surrogate": "ppo"}, "surrogate must be one of clip, cispo, soft, gamma, got 'ppo'"),
        ({"aggregation": "mean"}, "aggregation must be one of"),
        ({"clip_low": -0.1}, r"clip_low must be in \[0, 1\], got -0.1"),
        ({"clip_low": 1.1}, "clip_low"),
        ({"clip_high": -1e-4}, "clip_high must be in"),
        ({"clip_high": NAN}, "clip_high"),
        ({"pick": "some"}, "pick must be one of high_entropy, clip_cov, kl_cov, got 'some'"),
        (
            {"pick": "high_entropy"},
            r"pick_share must be in \(0, 1\) with pick high_entropy, got None",
        ),
        ({"pick": "high_entropy", "pick_share": 1.0}, "pick_share"),
        ({"pick_share": 0.5}, "pick_share 0.5 does nothing with pick null; set pick_share to null"),
        ({"tau_pos": 1.0}, "tau_pos 1.0 does nothing with surrogate clip; .* surrogate to soft"),
        ({"surrogate": "soft", "clip_dual": 3.0}, "clip_dual 3.0 does nothing with surrogate soft"),
        ({"surrogate": "soft", "clip_low": 0.2}, "surrogate soft has no clip range"),
        ({"ratio": "token", "surrogate": "soft", "tau_neg": 0.0}, "tau_neg must be > 0, got 0.0"),
        ({"surrogate": "gamma"}, "gamma is for ratio sequence_sum, got ratio sequence"),
        ({"clip_dual": 1.0}, r"clip_dual must be above 1 \+ clip_high, got 1.0"),
        ({"ratio": "geometric", "clip_dual": 3.0}, "geometric is clipped token by token"),
        ({"ratio": "geometric", "surrogate": "cispo"}, "geometric is clipped token by token"),
        ({"off_policy_limit": 0.0}, "off_policy_limit must be > 0"),
        ({"pick": "kl_cov", "pick_share": 0.1}, "kl_cov is for ratio token, got ratio sequence"),
        ({**CLIP_COV, "cov_low": 6.0}, "cov_low must be below cov_high 5.0, got 6.0"),
    ],
)
def test_a_bad_objective_names_its_field(arguments, message):
    with pytest.raises(ValueError, match=message):
        Objective(**arguments)


def test_a_wide_clip_range_is_allowed_for_a_sequence_ratio():
    assert Objective("sequence", clip_low=0.2, clip_high=0.2).clip_high == 0.2


@pytest.mark.parametrize("max_length", [None, 0])
def test_fixed_length_needs_the_generation_limit(max_length):
    with pytest.raises(ValueError, match="fixed_length needs max_length"):
        token_weights(torch.ones(2, 3, dtype=torch.bool), "fixed_length", max_length)


def test_unknown_words_are_refused():
    mask = torch.ones(2, 3, dtype=torch.bool)
    with pytest.raises(ValueError, match="aggregation must be one of"):
        token_weights(mask, "sum")
    with pytest.raises(ValueError, match="level must be one of"):
        importance_log_ratio(mask.float(), mask.float(), mask, "word")


@pytest.mark.parametrize("name", ["old_logprobs", "advantages", "mask", "weights"])
def test_a_wrong_shape_is_named(name):
    mask = torch.ones(2, 3, dtype=torch.bool)
    values = torch.zeros(2, 3)
    arguments = {"old_logprobs": values, "advantages": values, "mask": mask, "weights": values}
    arguments[name] = arguments[name][:1]  # would broadcast
    with pytest.raises(ValueError, match=f"{name} must have"):
        policy_loss(values, **arguments, objective=Objective())


def test_the_clip_width_is_the_narrower_side_or_the_only_one():
    assert Objective().clip_width == 3e-4
    assert Objective("token", clip_low=0.2, clip_high=0.1).clip_width == 0.1
    cispo = Objective("token", "cispo", "token_mean", clip_low=1.0, clip_high=4.0)
    assert cispo.clip_width == 4.0
    assert Objective("token", "soft", tau_neg=2.0).clip_width == 0.5


# ---- the choices of other papers; tests/test_algorithms.py has their formulas


SOFT = {"ratio": "token", "surrogate": "soft"}
GAMMA = {"ratio": "sequence_sum", "surrogate": "gamma", "aggregation": "token_mean"}
WIDE = {"ratio": "token", "clip_low": 0.2, "clip_high": 0.2}
KL_COV = {"ratio": "token", "pick": "kl_cov", "pick_share": 0.2}


def whole_loss(choices, lp, old, advantages, mask):
    """The loss of a mini-batch, its entropies made up."""
    objective = Objective(**choices)
    weights, picked = weights64(mask, objective.aggregation, 5), None
    if objective.pick is not None:
        tokens = lp.detach(), old, old.abs(), advantages, mask
        picked = picked_tokens(*tokens, objective, seed=0)
    return policy_loss(lp, old, advantages, mask, weights, objective, picked)


@pytest.mark.parametrize(
    ("choices", "change"),
    [
        (WIDE, {"clip_dual": 1.5}),
        (WIDE, {"off_policy_limit": 0.01}),
        (WIDE, {"ratio": "geometric"}),
        (WIDE | {"surrogate": "cispo"}, {"clip_low": 1.0}),
        ({"ratio": "token"}, {"surrogate": "soft"}),
        (SOFT, {"tau_pos": 2.0}),
        (SOFT, {"tau_neg": 2.0}),
        *((GAMMA, {name: 1.5}) for name in ("k_pos", "lambda_pos", "k_neg", "lambda_neg")),
        ({}, {"aggregation": "token_sum"}),
        (WIDE, {"pick": "high_entropy", "pick_share": 0.5}),
        ({"pick": "high_entropy", "pick_share": 0.5}, {"pick_share": 0.1}),
        (WIDE, CLIP_COV | {"cov_low": 0.01}),
        (WIDE | CLIP_COV | {"cov_low": 0.01}, {"pick_share": 0.1}),
        (WIDE | CLIP_COV | {"cov_low": 0.01}, {"cov_low": 1.0}),
        (WIDE | CLIP_COV | {"cov_low": 0.01}, {"cov_high": 0.1}),
        (WIDE, KL_COV),
        (WIDE | KL_COV, {"cov_kl": 2.0}),
    ],
)
def test_each_choice_changes_the_gradient_and_ignores_padding(choices, change):
    lp, old, advantages, mask = batch(seed=2, spread=1.0)
    one, two = (whole_loss(c, lp, old, advantages, mask) for c in (choices, choices | change))
    slopes = [gradient(result.loss, lp) for result in (one, two)]
    assert (slopes[0] - slopes[1]).abs().max() > 1e-4
    dirty = lp.detach().masked_fill(~mask, NAN).requires_grad_()
    other = whole_loss(choices | change, dirty, old.masked_fill(~mask, 1e4), advantages, mask)
    assert other.loss == two.loss
    assert torch.equal(gradient(other.loss, dirty), slopes[1])


@pytest.mark.parametrize(
    ("choices", "ratio", "advantage", "loss", "slope"),
    [
        (WIDE | {"clip_dual": 3.0}, 4.0, -2.0, 6.0, 0.0),  # fact 48: held at c
        (WIDE | {"clip_dual": 3.0}, 2.0, -2.0, 4.0, 4.0),
        (WIDE | {"clip_dual": 3.0}, 4.0, 2.0, -2.4, 0.0),  # a positive advantage is PPO's
        (WIDE | {"surrogate": "cispo"}, 0.5, 3.0, 2.4, -2.4),  # held at 0.8
        (SOFT, 1.0, 1.0, -2.0, -1.0),  # fact 49: 4 / tau sigma(0) = 2, and the slope of the ratio
        (SOFT, 1.0, -1.0, 2 / 1.05, 1.0),
        # at ratio 2: 4 sigma(1) (1 - sigma(1)) 2
        (SOFT, 2.0, 1.0, -4 * 0.7310585786300049, -8 * 0.19661193324148185),
        (GAMMA, 1.0, 1.0, 1.0, -1.0),  # w = 1 weighs 1, and the log-prob is -1
        (GAMMA, 2.0, 1.0, 4 * math.exp(-3), -4 * math.exp(-3)),
        (GAMMA, 2.0, -1.0, -8 * math.exp(-2), 8 * math.exp(-2)),
        (WIDE | {"off_policy_limit": 0.1}, 0.9, -1.0, 0.0, 0.0),  # has fallen by 0.105
        (WIDE | {"off_policy_limit": 0.11}, 0.9, -1.0, 0.9, 0.9),
        (WIDE | {"off_policy_limit": 0.1}, 0.9, 1.0, -0.9, -0.9),
        (WIDE | {"ratio": "geometric"}, 1.5, 1.0, -1.2, 0.0),
        (WIDE | {"ratio": "geometric"}, 1.5, -1.0, 1.5, 1.5),
    ],
)
def test_other_surrogates_by_hand(choices, ratio, advantage, loss, slope):
    lp = float64([[-1.0]]).requires_grad_()
    mask = torch.ones(1, 1, dtype=torch.bool)
    old = lp.detach() - math.log(ratio)
    result = whole_loss(choices, lp, old, float64([advantage]), mask)
    assert result.loss.item() == pytest.approx(loss)
    assert gradient(result.loss, lp).item() == pytest.approx(slope)


def test_a_geometric_ratio_clips_each_token_before_the_mean():
    """Fact 50: log-ratios 1 and 0.1 with A > 0 are log 1.2 and 0.1; the first has no gradient."""
    lp = float64([[1.0, 0.1]]).requires_grad_()
    mask = torch.ones(1, 2, dtype=torch.bool)
    zeros = torch.zeros_like(lp)
    result = whole_loss(WIDE | {"ratio": "geometric"}, lp, zeros, float64([1.0]), mask)
    s = math.exp((math.log(1.2) + 0.1) / 2)
    assert result.loss.item() == pytest.approx(-s)
    assert gradient(result.loss, lp)[0].tolist() == pytest.approx([0.0, -s / 2])
    assert result.clip_fraction_tokens == 0.5


PICKS = ({"pick": "high_entropy", "pick_share": 0.5}, CLIP_COV | {"cov_low": 0.01}, KL_COV)


@pytest.mark.parametrize("choices", PICKS)
def test_two_ranks_pick_the_tokens_that_one_picks(choices):
    """Fact 52: ranks of 9 and 6 tokens; the statistics are those of all 15."""
    lp, old, advantages, mask = batch(spread=0.5)
    entropy = old.abs() + torch.arange(6)[:, None]  # the second rank's tokens are less certain
    tokens, objective = (lp.detach(), old, entropy, advantages, mask), Objective(**choices)
    whole = picked_tokens(*tokens, objective, seed=7)
    assert 0 < whole.sum() < 15 and not (whole & ~mask).any()
    seen = []

    def keep(rows):
        seen.append(rows)
        return rows, slice(None)

    halves = [[tensor[rows] for tensor in tokens] for rows in (slice(0, 3), slice(3, 6))]
    alone = [picked_tokens(*half, objective, 7, keep) for half in halves]
    every, starts = torch.cat(seen), (0, len(seen[0]))
    parts = [
        picked_tokens(*half, objective, 7, lambda rows, s=s: (every, slice(s, s + len(rows))))
        for half, s in zip(halves, starts, strict=True)
    ]
    assert torch.equal(torch.cat(parts), whole)
    assert not torch.equal(torch.cat(alone), whole)  # the statistics of half the rows are others


def test_tokens_as_uncertain_as_the_last_one_picked_are_picked():
    """Fact 52: the quantile of [1, 2, 2, 3, 0] that leaves two is 2."""
    entropy = float64([[1.0, 2.0, 2.0, 3.0, 0.0]])
    mask = torch.ones(1, 5, dtype=torch.bool)
    zeros = torch.zeros_like(entropy)
    objective = Objective(pick="high_entropy", pick_share=0.4)
    picked = picked_tokens(zeros, zeros, entropy, zeros, mask, objective, seed=0)
    assert picked.tolist() == [[False, True, True, True, False]]


def test_a_loss_that_picks_wants_its_tokens():
    values, mask = torch.zeros(2, 3), torch.ones(2, 3, dtype=torch.bool)
    objective = Objective(pick="high_entropy", pick_share=0.2)
    with pytest.raises(ValueError, match="pick high_entropy needs the tokens of picked_tokens"):
        policy_loss(values, values, values, mask, values, objective)
