"""Masked reductions."""

import pytest
import torch

from gspo_lightning.masked import masked_mean, masked_sum

NAN = float("nan")


def test_masked_mean_of_each_row_by_hand():
    x = torch.tensor([[1.0, 2.0, 99.0], [4.0, 99.0, 99.0]])
    mask = torch.tensor([[True, True, False], [True, False, False]])
    assert masked_mean(x, mask, dim=1).tolist() == [1.5, 4.0]
    assert masked_mean(x, mask).item() == pytest.approx(7 / 3)
    assert masked_sum(x, mask, dim=0).tolist() == [5.0, 2.0, 0.0]


@pytest.mark.parametrize("reduction", [masked_sum, masked_mean])
def test_nothing_selected_gives_zero(reduction):
    assert reduction(torch.tensor([1.0, NAN]), torch.tensor([False, False])).item() == 0


@pytest.mark.parametrize("reduction", [masked_sum, masked_mean])
@pytest.mark.parametrize("padding", [NAN, float("inf"), -1e4])
def test_values_under_a_false_mask_change_neither_value_nor_gradient(reduction, padding):
    """Fact 5."""
    x = torch.tensor([1.0, 3.0, padding], requires_grad=True)
    result = reduction(x, torch.tensor([True, True, False]))
    (gradient,) = torch.autograd.grad(result, x)
    assert result.item() == reduction(torch.tensor([1.0, 3.0]), torch.tensor([True, True])).item()
    assert gradient[2] == 0 and gradient[:2].isfinite().all()


def test_low_precision_is_summed_in_float32():
    """Fact 6: in bfloat16 256 + 1 is 256."""
    x = torch.tensor([256.0, 1.0], dtype=torch.bfloat16)
    assert masked_sum(x, torch.tensor([True, True])).item() == 257


def test_float64_stays_float64():
    assert masked_mean(torch.ones(2, dtype=torch.float64), torch.tensor([True, True])).dtype == (
        torch.float64
    )


def test_a_mask_is_broadcast_before_it_is_counted():
    x = torch.tensor([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]])
    rows = torch.tensor([[True], [False], [True]])
    assert masked_mean(x, rows).item() == 3.5
