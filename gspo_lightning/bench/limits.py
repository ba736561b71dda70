"""What the hardware allows: FLOPs that a rollout and its update need, peaks, matrix products alone.

Decides the convention of "model FLOPs": only what cannot be left out is counted. A prompt is read
once per group, padding and recomputation count nothing, the head runs on positions that predict a
completion token, and a backward pass costs two forward passes. Old log-probs count nothing, since
the sampler knows them.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from gspo_lightning.engine.linear_logprobs import linear
from gspo_lightning.engine.padded import text_config

# dense FLOP/s of tensor cores in bfloat16, of plain cores in float32, bytes/s; from data sheets
DATA_SHEETS = {
    "H100 PCIe": (756e12, 51e12, 2.0e12),
    "H100 NVL": (835e12, 60e12, 3.9e12),
    "H100": (989e12, 67e12, 3.35e12),
    "H200": (989e12, 67e12, 4.8e12),
    "A100-SXM4-80GB": (312e12, 19.5e12, 2.039e12),
    "A100 80GB PCIe": (312e12, 19.5e12, 1.935e12),
    "A100": (312e12, 19.5e12, 1.555e12),
    "L40S": (362e12, 91.6e12, 0.864e12),
    "L4": (121e12, 30.3e12, 0.3e12),
    "A10": (125e12, 31.2e12, 0.6e12),
    "RTX 4090": (165e12, 82.6e12, 1.008e12),
}


@dataclass(frozen=True)
class Shape:
    """The sizes of a dense decoder that decide its cost.

    Attributes:
        body: Weights of all linear layers but the head.
        head: Weights of the head, V * D.
        attention: Layers * heads * head size.
        cache: Numbers in the key-value cache per token: 2 * layers * key-value heads * head size.
    """

    body: int
    head: int
    attention: int
    cache: int


@dataclass(frozen=True)
class Work:
    """The tokens of one rollout.

    Attributes:
        prompts: Length of each prompt, (P,) tokens.
        lengths: Length of each completion, (P * G,) tokens; row p * G + g belongs to prompt p.

    >>> work = Work(prompts=(3,), lengths=(2, 1))
    >>> work.tokens, work.head_tokens, work.attended
    (4, 3, 10)
    """

    prompts: tuple[int, ...]
    lengths: tuple[int, ...]

    @property
    def tokens(self) -> int:
        """Tokens that the layers see: nothing follows the last token of a completion."""
        return sum(self.prompts) + self.head_tokens - len(self.lengths)

    @property
    def head_tokens(self) -> int:
        """Positions that predict a completion token."""
        return sum(self.lengths)

    @property
    def attended(self) -> int:
        """Over all tokens, the positions that each attends to, itself included."""
        in_prompts = sum(length * (length + 1) // 2 for length in self.prompts)
        return in_prompts + self.attended_in_decoding

    @property
    def attended_in_decoding(self) -> int:
        """The part of ``attended`` that belongs to completion tokens."""
        group_size = len(self.lengths) // len(self.prompts)
        fed = [(self.prompts[row // group_size], n - 1) for row, n in enumerate(self.lengths)]
        return sum(n * prompt + n * (n + 1) // 2 for prompt, n in fed)

    def running(self, step: int) -> int:
        """Completions that still run when their token number ``step`` is drawn, from 0."""
        return sum(length > step for length in self.lengths)

    def forward_flops(self, shape: Shape) -> float:
        """FLOPs of one forward pass over all tokens; sampling them needs the same.

        >>> Work(prompts=(3,), lengths=(2, 1)).forward_flops(Shape(10, 7, 5, 0))
        322.0
        """
        linear = shape.body * self.tokens + shape.head * self.head_tokens
        return 2.0 * linear + 4.0 * shape.attention * self.attended


def shape_of(model: Any) -> Shape:
    """Read the sizes of a Hugging Face causal language model with dense layers."""
    body, head = linear_weights(model)
    config = text_config(model)
    heads, layers = config.num_attention_heads, config.num_hidden_layers
    size = getattr(config, "head_dim", None) or config.hidden_size // heads
    kv_heads = getattr(config, "num_key_value_heads", None) or heads
    return Shape(
        body=sum(weight.numel() for weight in body),
        head=head.numel(),
        attention=layers * heads * size,
        cache=2 * layers * kv_heads * size,
    )


def linear_weights(model: Any) -> tuple[list[Tensor], Tensor]:
    """The weights (out, in) of all linear layers that read text, and that of the head."""
    head = model.get_output_embeddings()
    body = [m.weight for m in model.get_decoder().modules() if isinstance(m, nn.Linear)]
    return [weight.detach() for weight in body], head.weight.detach()


def data_sheet(name: str, dtype: torch.dtype) -> tuple[float, float] | None:
    """Peak FLOP/s and bytes/s of a GPU by the name that torch gives it; None if it is not known.

    >>> data_sheet("NVIDIA H100 80GB HBM3", torch.bfloat16)
    (989000000000000.0, 3350000000000.0)
    """
    for known, (bfloat16, float32, bandwidth) in DATA_SHEETS.items():
        if known in name:  # the longer names stand first
            return (bfloat16 if dtype == torch.bfloat16 else float32), bandwidth
    return None


def measured_peak(device: torch.device, dtype: torch.dtype, size: int | None = None) -> float:
    """FLOP/s of a large matrix product here and now, the best of ten; on the CPU per CPU second."""
    size = size or (8192 if device.type == "cuda" else 1024)
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    linear(a, b)
    clock = 0 if device.type == "cuda" else 1
    return 2.0 * size**3 / min(_clocked(lambda: linear(a, b), device)[clock] for _ in range(10))


def products_alone(model: Any, work: Work, updates: int) -> dict[str, float]:
    """CPU seconds that the matrix products of the linear layers take by themselves.

    No attention, no sampling, no framework: nothing that computes the same layers can be faster.

    The model's own weights are multiplied, so that they come from memory as they do in a run; each
    of ``updates`` equal parts of the rollout takes one forward and one backward pass.

    Returns:
        ``rollout``: each prompt once, then one product per layer and step, over the completions
        that still run. ``optimise``: forward and backward of every part.
    """
    body, head = linear_weights(model)
    device = head.device
    running = [work.running(step) for step in range(1, max(work.lengths))]  # no part of the time

    def rollout() -> None:
        _forward(body, sum(work.prompts))
        _forward([head], len(work.lengths))
        for rows in running:
            _forward([*body, head], rows)

    def optimise() -> None:
        for _ in range(updates):
            _forward_backward(body, max(1, work.tokens // updates))
            _forward_backward([head], max(1, work.head_tokens // updates))

    return {"rollout": _clocked(rollout, device)[1], "optimise": _clocked(optimise, device)[1]}


def roofline(shape: Shape, work: Work, width: int, flops: float, bandwidth: float) -> dict:
    """Seconds below which a GPU cannot do it, from the peaks of its data sheet.

    A weight takes ``width`` bytes; ``flops`` and ``bandwidth`` in bytes are per second.

    Returns:
        ``rollout``: every step reads all weights and the cache of the completions that run.
        ``optimise``: three forward passes at the peak.
    """
    decode_steps = max(work.lengths)
    read = decode_steps * (shape.body + shape.head) + shape.cache * work.attended_in_decoding
    return {"rollout": width * read / bandwidth, "optimise": 3 * work.forward_flops(shape) / flops}


def _forward(weights: Sequence[Tensor], rows: int) -> None:
    for weight in weights:
        linear(weight.new_zeros(rows, weight.shape[1]), weight)


def _forward_backward(weights: Sequence[Tensor], rows: int) -> None:
    for weight in weights:
        x, gradient = (weight.new_zeros(rows, size) for size in reversed(weight.shape))
        linear(x, weight)
        linear(gradient, weight.T)
        linear(gradient.T, x.T)


def _clocked(action: Callable[[], Any], device: torch.device) -> tuple[float, float]:
    """Wall and CPU seconds."""
    wall, cpu = time.perf_counter(), time.process_time()
    action()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - wall, time.process_time() - cpu
