import pytest
import torch
from torch import nn

from gspo_lightning.optim import (
    OptimizerConfig,
    build_optimizer,
    learning_rate_factor,
    set_learning_rate,
)


def test_only_matrices_that_are_no_embedding_decay(tiny_policy):
    optimizer = build_optimizer(tiny_policy, OptimizerConfig(weight_decay=0.1))
    names = {id(p): name for name, p in tiny_policy.named_parameters()}
    decay, plain = ({names[id(p)] for p in group["params"]} for group in optimizer.param_groups)
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.1, 0.0]
    assert all("proj" in name for name in decay)
    assert "model.embed_tokens.weight" in plain  # tied to the head
    assert all("norm" in name or "embed" in name for name in plain)
    assert decay | plain == set(names.values())


def test_frozen_parameters_are_left_out():
    model = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 1))
    model[0].requires_grad_(False)
    optimizer = build_optimizer(model, OptimizerConfig())
    assert sum(len(group["params"]) for group in optimizer.param_groups) == 2


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        ("constant", [0.5, 1, 1, 1, 1, 1, 1]),
        ("linear", [0.5, 1, 1, 0.8, 0.6, 0.4, 0.2]),
        ("cosine", [0.5, 1, 1, 0.8828427, 0.6, 0.3171573, 0.2]),
    ],
)
def test_schedules(schedule, expected):
    config = OptimizerConfig(schedule=schedule, warmup=2, min_ratio=0.2)
    factor = learning_rate_factor(config, total=6)
    assert [factor(step) for step in range(7)] == pytest.approx(expected)
    assert factor(100) == pytest.approx(expected[-1])  # past the end it stays


def test_a_falling_schedule_needs_a_length():
    with pytest.raises(ValueError, match=r"optimizer.schedule cosine needs .* data.num_rollouts"):
        learning_rate_factor(OptimizerConfig(schedule="cosine"), total=None)


def test_the_config_wins_over_what_a_checkpoint_restored():
    model = nn.Linear(2, 2)
    optimizer = build_optimizer(model, OptimizerConfig(learning_rate=1.0, weight_decay=0.5))
    saved = optimizer.state_dict()
    config = OptimizerConfig(learning_rate=0.2, weight_decay=0.1, betas=(0.5, 0.6), warmup=4)
    optimizer = build_optimizer(model, config)
    optimizer.load_state_dict(saved)
    assert set_learning_rate(optimizer, config, step=1, total=None) == pytest.approx(0.1)
    for group, decay in zip(optimizer.param_groups, [0.1, 0.0], strict=True):
        assert (group["lr"], group["weight_decay"]) == (pytest.approx(0.1), decay)
        assert group["betas"] == (0.5, 0.6)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"learning_rate": 0.0}, "optimizer.learning_rate must be above 0, got 0.0"),
        ({"betas": (0.9, 1.0)}, r"optimizer.betas must lie in \[0, 1\)"),
        ({"weight_decay": -1.0}, "optimizer.weight_decay must be >= 0"),
        ({"warmup": -1}, "optimizer.warmup must be >= 0"),
        ({"min_ratio": 2.0}, "optimizer.min_ratio must lie in"),
        ({"eps": 0.0}, "optimizer.eps must be above 0"),
    ],
)
def test_the_config_names_the_bad_argument(options, message):
    with pytest.raises(ValueError, match=message):
        OptimizerConfig(**options)


def test_weights_without_gradient_history_do_not_move_without_decay():
    model = nn.Linear(2, 2)
    before = model.weight.clone()
    optimizer = build_optimizer(model, OptimizerConfig(learning_rate=1.0))
    model.weight.grad = torch.zeros_like(model.weight)
    optimizer.step()
    assert torch.equal(model.weight, before)
