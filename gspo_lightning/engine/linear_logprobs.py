"""Log-probs and entropy straight from hidden states, a chunk of tokens at a time.

Decides what is kept for the backward pass: the hidden states and two numbers a token, no logits.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from gspo_lightning.engine.products import Linear, inner_product, linear, uses_onednn

Logits = Callable[[Tensor], Tensor]
PART = 8192  # words whose gradient of half precision is made at once


def is_plain(embedding: Any) -> bool:
    """Whether an output embedding is a matrix product and nothing besides."""
    hooks = (embedding._forward_hooks, embedding._forward_pre_hooks, embedding._backward_hooks)
    plain = type(embedding) in (nn.Linear, Linear) and not any(hooks)
    return plain and type(embedding.weight) in (nn.Parameter, Tensor)


class LinearLogprobs(torch.autograd.Function):
    """Matrix product, log-softmax and choice in one.

    The gradient of a log-prob by the logits is (chosen - p) / temperature, that of an entropy H is
    -p (log p + H) / temperature. The weight's gradient is added up in one buffer.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        ids: Tensor,
        finish: Logits | None,
        temperature: float,
        with_entropy: bool,
        size: int,
    ) -> tuple[Tensor, Tensor]:
        device = hidden.device.type
        # the dtype that the model itself would multiply in
        mixed = torch.is_autocast_enabled(device)
        dtype = torch.get_autocast_dtype(device) if mixed else hidden.dtype
        ctx.settings = (finish, temperature, size, dtype)
        exact = torch.promote_types(hidden.dtype, torch.float32)
        logprobs, entropy, top, total = hidden.new_empty(4, len(ids), dtype=exact).unbind()
        with torch.autocast(device, enabled=False):
            logits = _Chunk(weight, bias, finish, temperature, dtype, min(size, len(ids)))
            for part in _slices(len(ids), size):
                x = logits(hidden[part].to(dtype))
                top[part] = x.amax(-1)
                x.sub_(top[part, None])
                chosen = x.gather(1, ids[part, None])[:, 0]
                e = x.exp() if with_entropy else x.exp_()
                total[part] = e.sum(-1)
                log_total = total[part].log()
                logprobs[part] = chosen - log_total
                if with_entropy:  # clamped: 0 * -inf would be NaN
                    mean = torch.einsum("nv,nv->n", e, x.clamp_(min=torch.finfo(exact).min))
                    entropy[part] = log_total - mean / total[part]
                del x, e  # a chunk each, else still there while the next ones are made
        ctx.save_for_backward(hidden, weight, bias, ids, top, total, entropy)
        ctx.set_materialize_grads(False)
        return logprobs, entropy

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        grad, grad_entropy = grads
        hidden, weight, bias, ids, top, total, entropy = ctx.saved_tensors
        finish, temperature, size, dtype = ctx.settings
        needs = ctx.needs_input_grad
        device, exact = hidden.device.type, top.dtype
        grad = torch.zeros_like(top) if grad is None else grad
        grad_hidden = torch.empty_like(hidden) if needs[0] else None
        # sums over chunks are float32 at least, as within a single product
        grad_weight = torch.zeros_like(weight, dtype=exact) if needs[1] else None
        grad_bias = torch.zeros_like(bias, dtype=exact) if bias is not None and needs[2] else None
        with torch.autocast(device, enabled=False):
            logits = _Chunk(weight, bias, finish, temperature, dtype, min(size, len(ids)))
            for part in _slices(len(ids), size):
                h = hidden[part].to(dtype)
                x = logits(h, for_backward=True)
                x.sub_(top[part, None])
                factor = (-1 / (temperature * total[part]))[:, None]
                if grad_entropy is None:
                    x.exp_().mul_(grad[part, None] * factor)
                else:
                    e = x.exp()
                    x.clamp_(min=torch.finfo(exact).min)
                    x.add_((entropy[part] - total[part].log())[:, None])  # log p + H
                    x.mul_(grad_entropy[part, None]).add_(grad[part, None])
                    x.mul_(e.mul_(factor))
                    del e
                x.scatter_add_(1, ids[part, None], grad[part, None] / temperature)
                d = logits.pull(x)
                if grad_hidden is not None:
                    grad_hidden[part] = linear(d, logits.weight.t())
                if grad_weight is not None:
                    _add_product(grad_weight, d, h)
                if grad_bias is not None:
                    grad_bias += d.sum(0)
                del x, d
        return (
            grad_hidden,
            None if grad_weight is None else grad_weight.to(weight.dtype),
            None if grad_bias is None else grad_bias.to(bias.dtype),
            *[None] * 5,
        )


def _slices(count: int, size: int) -> list[slice]:
    return [slice(start, start + size) for start in range(0, count, size)]


class _Chunk:
    """Logits over the temperature, ours to write into, of up to ``size`` tokens at a time.

    Memory of that size is slow to come by, so all chunks use the same where nothing stands between
    the product and its float32 result.
    """

    def __init__(
        self,
        weight: Tensor,
        bias: Tensor | None,
        finish: Logits | None,
        temperature: float,
        dtype: torch.dtype,
        size: int,
    ) -> None:
        self.weight, self.bias = weight.to(dtype), None if bias is None else bias.to(dtype)
        self.finish, self.temperature = finish, temperature
        self.exact = torch.promote_types(dtype, torch.float32)
        self.raw: Tensor | None = None
        self.logits: Tensor | None = None
        self.buffer: Tensor | None = None
        plain = finish is None and dtype == self.exact
        if plain and not uses_onednn(self.weight):  # which gives its result in memory of its own
            self.buffer = self.weight.new_empty(size, len(weight))

    def __call__(self, h: Tensor, for_backward: bool = False) -> Tensor:
        self.raw = self.logits = None  # frees the last chunk's memory before the next takes more
        if self.buffer is not None:
            x = torch.mm(h, self.weight.t(), out=self.buffer[: len(h)])
            x = x if self.bias is None else x.add_(self.bias)
        else:
            raw = logits = linear(h, self.weight, self.bias)
            if self.finish is not None:
                with torch.set_grad_enabled(for_backward):
                    logits = self.finish(raw.requires_grad_(for_backward))
            x = logits.detach().to(self.exact)
            if self.finish is not None and x.data_ptr() == logits.data_ptr():
                x = x.clone()  # the gradient of `finish` may need its own result unchanged
            if for_backward and self.finish is not None:
                self.raw, self.logits = raw, logits
        return x if self.temperature == 1 else x.div_(self.temperature)

    def pull(self, grad: Tensor) -> Tensor:
        """The gradient by the matrix product from that by the logits of the last chunk."""
        if self.logits is not None and self.raw is not None:
            grad = torch.autograd.grad(self.logits, self.raw, grad.to(self.logits.dtype))[0]
        return grad.to(self.weight.dtype)


def _add_product(total: Tensor, d: Tensor, h: Tensor) -> None:
    """Add d.T @ h, in place; of a lower precision by parts, so that there is no second copy."""
    if d.dtype != total.dtype:
        for columns in _slices(len(total), PART):
            total[columns] += d[:, columns].t() @ h
    elif uses_onednn(total):
        total += inner_product(d, h)
    else:
        total.addmm_(d.t(), h)
