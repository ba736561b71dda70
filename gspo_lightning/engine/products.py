"""Matrix products in float32 on a CPU, by the faster of the two libraries that torch has.

torch multiplies with MKL, which uses the wide registers of AVX-512 on CPUs of its own maker alone.
oneDNN, also a part of torch, uses them everywhere and is about twice as fast there. Decides when it
multiplies: a matter of the machine, the dtype and the sizes, never of a clock, so that a run that
is continued computes what it would have computed.
"""

import logging
import os
import platform
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

log = logging.getLogger(__name__)

DTYPE = torch.float32
FEW_ROWS = 8  # fewer are not worth bringing the weight into oneDNN's order for each product
FEW_ROWS_ORDERED = 3
SMALLEST_WEIGHT = 2**15  # numbers; with a smaller one the call takes longer than it saves
LARGEST_WEIGHT = 2**24  # a larger one would be copied for each product
KEPT = 160  # shapes that oneDNN and torch remember; a fourth to a half of a MB each


class Linear(nn.Linear):
    """``nn.Linear`` that lets oneDNN multiply where that is faster.

    Attributes:
        ordered: The weight in oneDNN's order, within :func:`ordered_weights`.
    """

    ordered: Tensor | None = None

    def forward(self, input: Tensor) -> Tensor:
        return linear(input, self.weight, self.bias, self.ordered)


def speed_up(model: nn.Module) -> None:
    """Make every plain ``nn.Linear`` of a model a :class:`Linear`, on a CPU where that pays.

    Weights, names and state dict stay as they are, results up to rounding.
    """
    if onednn_is_faster():
        for module in model.modules():
            if type(module) is nn.Linear:
                module.__class__ = Linear


@contextmanager
def ordered_weights(model: nn.Module) -> Iterator[Callable[[int], int]]:
    """Keep the weights in oneDNN's order as well, for many small products without gradient.

    Within, weights must not change and nothing may be trained.

    Yields:
        How many rows to compute where so many are wanted: rows that nobody reads are added once a
        pass rather than once a product.
    """
    layers = [m for m in model.modules() if type(m) is Linear and uses_onednn(m.weight)]
    try:
        for layer in layers:
            weight = layer.weight.detach()
            layer.ordered = torch.ops.mkldnn._reorder_linear_weight(weight, 64)
        yield lambda count: filled(count) if layers and count >= FEW_ROWS_ORDERED else count
    finally:
        for layer in layers:
            layer.ordered = None


def linear(
    input: Tensor, weight: Tensor, bias: Tensor | None = None, ordered: Tensor | None = None
) -> Tensor:
    """``input @ weight.T + bias``, with gradients where they are on and ``ordered`` is not given.

    Args:
        input: (..., D).
        weight: (V, D).
        bias: (V,).
        ordered: The weight in oneDNN's order.

    Returns:
        (..., V).
    """
    if not _pays(input, weight, FEW_ROWS if ordered is None else FEW_ROWS_ORDERED):
        return nn.functional.linear(input, weight, bias)
    rows = input.flatten(0, -2)
    if ordered is None and torch.is_grad_enabled():
        return _Linear.apply(rows, weight, bias).view(*input.shape[:-1], -1)
    return _product(rows, weight, bias, ordered).view(*input.shape[:-1], -1)


def uses_onednn(weight: Tensor) -> bool:
    """Whether oneDNN multiplies by this matrix, given rows enough.

    ``torch.backends.mkldnn.set_flags(_enabled=False)`` leaves all to MKL.
    """
    return (
        weight.dtype is DTYPE
        and weight.device.type == "cpu"
        and SMALLEST_WEIGHT <= weight.numel() <= LARGEST_WEIGHT
        and type(weight) in (nn.Parameter, Tensor)  # not one that is sharded
        and bool(torch.backends.mkldnn.enabled)
        and onednn_is_faster()
    )


@cache
def onednn_is_faster() -> bool:
    """Whether this CPU has AVX-512 that MKL does not use, and torch's oneDNN can be asked."""
    if torch.backends.cpu.get_cpu_capability() != "AVX512" or not torch.backends.mkl.is_available():
        return False
    if "GenuineIntel" in cpu_vendor():
        return False
    # by default each library keeps 1024 shapes, so memory would grow for hours; making one anew
    # costs a fifth of a ms
    os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", str(KEPT))
    os.environ.setdefault("LRU_CACHE_CAPACITY", str(KEPT))
    # fixed numbers: drawing random ones would shift the run's own
    x = torch.linspace(-1, 2, 45, device="cpu").view(9, 5)
    weight = torch.linspace(-1, 3, 15, device="cpu").view(3, 5)
    bias = torch.linspace(-1, 1, 3, device="cpu")
    expected = nn.functional.linear(x, weight, bias)
    try:  # torch promises neither operation to its users
        ordered = torch.ops.mkldnn._reorder_linear_weight(weight, 64)
        found = [_product(x, weight, bias), _product(x, weight, bias, ordered)]
        reason = "its results differ"
    except (AttributeError, RuntimeError, TypeError) as error:
        found, reason = [expected + 1], str(error).splitlines()[0]
    if all(torch.allclose(y, expected, atol=1e-5) for y in found):
        return True
    log.warning("MKL multiplies, oneDNN would be faster but cannot be asked: %s", reason)
    return False


def cpu_vendor() -> str:
    """The maker of the CPU as it says itself, such as ``AuthenticAMD``."""
    info = Path("/proc/cpuinfo")
    text = info.read_text(encoding="utf-8") if info.is_file() else ""
    lines = [line for line in text.splitlines() if line.startswith("vendor_id")]
    return lines[0].partition(":")[2].strip() if lines else platform.processor()


def whole(count: int) -> int:
    """The largest number up to ``count`` of which there are few: 4 to 16 between powers of two.

    For every number of rows oneDNN makes code, which takes time and memory.

    >>> whole(13), whole(63), whole(583), whole(2084)
    (12, 56, 576, 2048)
    """
    return count - count % _step(count)


def filled(count: int) -> int:
    """The smallest number from ``count`` on of which there are few.

    >>> filled(13), filled(63), filled(64)
    (16, 64, 64)
    """
    return count + -count % _step(count)


def _step(count: int) -> int:
    return max(4, 2 ** (max(count - 1, 1).bit_length() - (3 if count <= 64 else 4)))


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(rows, weight)
        found = _product(rows, weight, bias)
        return found if found._base is None else found.clone()  # not a view: callers write into it

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Any:
        rows, weight = ctx.saved_tensors
        needs_rows, needs_weight, needs_bias = ctx.needs_input_grad
        return (
            _product(grad, weight.t()) if needs_rows else None,
            inner_product(grad, rows) if needs_weight else None,
            grad.sum(0) if needs_bias else None,
        )


def inner_product(a: Tensor, b: Tensor) -> Tensor:
    """``a.T @ b`` of (N, V) and (N, D) that :func:`uses_onednn`; without gradient."""
    first = whole(len(a))
    if not first:
        return a.t() @ b
    found = _onednn(a[:first].t(), b[:first].t())
    return found if first == len(a) else found.addmm_(a[first:].t(), b[first:])


def _product(
    rows: Tensor, weight: Tensor, bias: Tensor | None = None, ordered: Tensor | None = None
) -> Tensor:
    """``linear`` of (N, D) by oneDNN, without gradient; ``ordered``: the weight in its order."""
    count, first = len(rows), whole(len(rows))
    ordered = weight if ordered is None else ordered
    if first == count:
        found = _onednn(rows, ordered, bias)
    elif count < 64:  # so few rows cost no more when padded
        more = nn.functional.pad(rows, (0, 0, 0, filled(count) - count))
        found = _onednn(more, ordered, bias)[:count]
    else:
        found = rows.new_empty(count, len(weight))
        found[:first] = _onednn(rows[:first], ordered, bias)
        found[first:] = nn.functional.linear(rows[first:], weight, bias)
    return found


def _onednn(rows: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    return torch.ops.mkldnn._linear_pointwise.default(rows, weight, bias, "none", [], "")


def _pays(input: Tensor, weight: Tensor, rows: int) -> bool:
    return (
        input.dtype is DTYPE
        and input.numel() >= rows * input.shape[-1]
        and uses_onednn(weight)
        and not torch.is_autocast_enabled("cpu")
        and not torch.compiler.is_compiling()  # a compiler chooses for itself
    )
