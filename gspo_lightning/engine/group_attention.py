"""Keys and values of a rollout, and the attention that reads them where they lie.

Decides how completions of a group share their prompt: its keys and values are kept once and never
copied; all rows of a group attend to them in one matrix product. What a row adds itself lies in
buffers that are made once, so that no token makes them grow. Both parts meet in one softmax.
Leaves out which rows run, and all of the model but its attention.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from gspo_lightning.engine.group_layout import Layout

Attend = Callable[..., Tensor]  # see ``attention.Attend``


class Buffers(NamedTuple):
    """One layer: keys and values of prompts (slots, K, L, d) and of rows (slots, K, T, d)."""

    prompt_keys: Tensor
    prompt_values: Tensor
    keys: Tensor
    values: Tensor


class Arranged:
    """What is computed once a layout.

    Attributes:
        layout: Of the rows.
        rows: 0 to N - 1.
        bias: -inf on the padding of prompts, 0 elsewhere, (N, 1, 1, prompt + own tokens).
    """

    def __init__(self, layout: Layout, num_rows: int, length: int) -> None:
        device = layout.cell.device
        self.layout = layout
        self.rows = torch.arange(num_rows, device=device)
        self._indices: dict[int, tuple[Tensor, Tensor]] = {}
        columns = torch.arange(layout.longest, device=device)
        hidden = columns >= layout.prompt_lengths
        bias = torch.zeros(num_rows, layout.longest + length, device=device)
        bias[:, : layout.longest].masked_fill_(hidden, -torch.inf)
        self.bias = bias[:, None, None]

    def indices(self, num_heads: int) -> tuple[Tensor, Tensor]:
        """The layout's way to its grid and back, once a number of heads."""
        if num_heads not in self._indices:
            layout = self.layout
            self._indices[num_heads] = layout.to_grid(num_heads), layout.to_rows(num_heads)
        return self._indices[num_heads]


class DecodeStep:
    """One token of each row: where it goes, and what it must not see.

    Args:
        arranged: Of the rows' layout.
        lengths: Tokens in the cache of each row, this one included, (N,) int64.
        longest: The largest of them.
        equal: Whether all of them are the largest.
    """

    def __init__(self, arranged: Arranged, lengths: Tensor, longest: int, equal: bool) -> None:
        self.arranged = arranged
        self.lengths, self.columns, self.longest = lengths, lengths - 1, longest
        self.equal = equal
        self._biases: dict[int | None, Tensor | None] = {}

    def write(self, buffer: Tensor, new: Tensor) -> None:
        """Put the newest (1, K, N, d) behind what each row has."""
        rows = self.arranged.rows
        new = new[0, :, : len(rows)].transpose(0, 1)
        if self.equal:
            buffer[: len(new), :, self.longest - 1] = new
        else:
            buffer[rows, :, self.columns] = new

    def bias(self, window: int | None) -> Tensor | None:
        """-inf on what a row must not see, (N, 1, 1, prompt + own), once a window.

        ``None`` where it sees all.
        """
        if window not in self._biases:
            sees_all = self.equal and window is None and not self.arranged.layout.padded
            self._biases[window] = None if sees_all else self._make_bias(window)
        return self._biases[window]

    def _make_bias(self, window: int | None) -> Tensor:
        layout, lengths = self.arranged.layout, self.lengths[:, None]
        prompt = layout.longest
        bias = self.arranged.bias[..., : prompt + self.longest]
        if not self.equal or window is not None:
            # positions count from a prompt's first token
            position = torch.arange(bias.shape[-1], device=bias.device).expand(len(lengths), -1)
            hidden = position >= lengths + prompt
            position = torch.where(
                position < prompt, position, position - prompt + layout.prompt_lengths
            )
            if window is not None:  # the newest token sees `window` tokens, itself included
                hidden |= position < layout.prompt_lengths + lengths - window
            bias = bias.masked_fill(hidden[:, None, None], -torch.inf)
        return bias


@dataclass
class GroupAttention:
    """The cache of a rollout and its two ways to attend: ``reading`` prompts, ``extending`` rows.

    Args:
        num_prompts: Prompts that are in use at the same time.
        prompt_length: Tokens of the longest prompt.
        num_rows: Rows that run at the same time.
        length: Tokens that a row adds to the cache.
    """

    num_prompts: int
    prompt_length: int
    num_rows: int
    length: int
    layers: dict[int, Buffers] = field(default_factory=dict)
    windows: dict[int, int | None] = field(default_factory=dict)  # of each layer, as it said
    _arranged: Arranged | None = None  # of the last step, which many steps share

    def reading(self, slots: Sequence[int], lengths: Sequence[int]) -> Attend:
        """For a forward pass that brings these prompts, one after the other in one row."""
        borders = itertools.pairwise(itertools.accumulate(lengths, initial=0))
        pieces = [(slot, *border) for slot, border in zip(slots, borders, strict=True)]
        return partial(self._read, pieces)

    def _read(
        self,
        pieces: Sequence[tuple[int, int, int]],
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        **options: Any,
    ) -> Tensor:
        """Attend within each prompt (slot, start, end) and keep its keys and values."""
        index: int = module.layer_idx  # type: ignore[assignment]
        buffers = self.layers.get(index)
        if buffers is None:
            buffers = self.layers[index] = self._make(key, value)
        self.windows[index] = options.get("sliding_window")
        output = query.new_empty(1, query.shape[2], query.shape[1], value.shape[3])
        for slot, start, end in pieces:
            keys, values = key[:, :, start:end], value[:, :, start:end]
            buffers.prompt_keys[slot, :, : end - start] = keys[0]
            buffers.prompt_values[slot, :, : end - start] = values[0]
            output[:, start:end] = attend_within(query[:, :, start:end], keys, values, **options)
        return output

    def extending(self, layout: Layout, lengths: Tensor, longest: int, equal: bool) -> Attend:
        """For a forward pass that brings one token of each row; see :class:`DecodeStep`."""
        if self._arranged is None or layout is not self._arranged.layout:
            self._arranged = Arranged(layout, len(lengths), self.length)
        return partial(self._extend, DecodeStep(self._arranged, lengths, longest, equal))

    def _extend(
        self,
        step: DecodeStep,
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        *,
        scaling: float,
        sliding_window: int | None = None,
        softcap: float | None = None,
        s_aux: Tensor | None = None,
        **_: Any,
    ) -> Tensor:
        """Attend from one token of each row to its prompt and to what it added itself."""
        layout, num_rows = step.arranged.layout, len(step.lengths)
        more = query.shape[2] - num_rows  # behind them, which nobody reads
        prompt_keys, prompt_values, keys, values = self.layers[module.layer_idx]  # type: ignore[index]
        step.write(keys, key)
        step.write(values, value)
        heads, size = keys.shape[1], query.shape[3]
        to_grid, to_rows = step.arranged.indices(heads)
        groups, prompt, own = layout.num_groups * heads, layout.longest, step.longest
        count = num_rows * heads
        # query heads that share a key-value head are rows of one product: nothing is repeated
        grouped = query[0, :, :num_rows].transpose(0, 1).reshape(count, -1, size)
        grid = grouped.index_select(0, to_grid).view(groups, -1, size)
        far = torch.bmm(grid, prompt_keys.flatten(0, 1)[:groups, :prompt].mT)
        far = far.view(len(to_grid), -1, prompt).index_select(0, to_rows)
        near = torch.bmm(grouped, keys.flatten(0, 1)[:count, :own].mT)

        scores = torch.cat([far, near], dim=-1).view(num_rows, heads, -1, prompt + own)
        weights = _softmax(scores, scaling, step.bias(sliding_window), softcap, s_aux)
        weights = weights.to(value.dtype).view(count, -1, prompt + own)
        grid = weights[..., :prompt].contiguous().index_select(0, to_grid)
        far = torch.bmm(
            grid.view(groups, -1, prompt), prompt_values.flatten(0, 1)[:groups, :prompt]
        )
        output = far.view(len(to_grid), -1, far.shape[2]).index_select(0, to_rows)
        output += torch.bmm(weights[..., prompt:], values.flatten(0, 1)[:count, :own])
        output = output.view(1, num_rows, -1, output.shape[2])
        return nn.functional.pad(output, (0, 0, 0, 0, 0, more)) if more else output

    def move_rows(self, sources: list[int], targets: list[int], length: int) -> None:
        """Copy the first ``length`` tokens of rows to other slots, whose content is lost."""
        for layer in self.layers.values():
            for buffer in (layer.keys, layer.values):
                buffer[targets, :, :length] = buffer[sources, :, :length]

    def move_prompt(self, source: int, target: int) -> None:
        """Copy a prompt to another slot, whose content is lost."""
        for layer in self.layers.values():
            layer.prompt_keys[target] = layer.prompt_keys[source]
            layer.prompt_values[target] = layer.prompt_values[source]

    def _make(self, key: Tensor, value: Tensor) -> Buffers:
        def empty(like: Tensor, slots: int, length: int) -> Tensor:
            # zeros: a padded key must be finite to be masked
            return like.new_zeros(slots, like.shape[1], length, like.shape[3])

        return Buffers(
            empty(key, self.num_prompts, self.prompt_length),
            empty(value, self.num_prompts, self.prompt_length),
            empty(key, self.num_rows, self.length),
            empty(value, self.num_rows, self.length),
        )


def attend_within(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    scaling: float,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **_: Any,
) -> Tensor:
    """Causal attention within one text of S tokens.

    Args:
        query: (1, heads, S, head size).
        key: (1, key-value heads, S, head size).
        value: Likewise.
        scaling: Multiplies the scores.
        sliding_window: Tokens that a token sees, itself included; ``None`` is all before it.
        softcap: Scores are bent to stay within plus and minus this.
        s_aux: Attention sinks: a score per head that takes weight and gives nothing, (heads,).

    Returns:
        (1, S, heads, head size).
    """
    length, heads = query.shape[2], key.shape[1]
    window = length if sliding_window is None else sliding_window
    if softcap is None and s_aux is None:
        visible = None
        if window < length:
            visible = query.new_ones(length, length, dtype=torch.bool).tril_().triu_(1 - window)
        return scaled_dot_product_attention(
            query,
            key,
            value,
            attn_mask=visible,
            is_causal=visible is None,
            scale=scaling,
            enable_gqa=heads != query.shape[1],
        ).transpose(1, 2)
    hidden = (
        query.new_ones(length, length, dtype=torch.bool).tril_().triu_(1 - window).logical_not_()
    )
    bias = torch.zeros(hidden.shape, device=query.device).masked_fill_(hidden, -torch.inf)
    scores = query.unflatten(1, (heads, -1)) @ key[:, :, None].mT
    weights = _softmax(scores, scaling, bias, softcap, s_aux).to(value.dtype)
    return (weights @ value[:, :, None]).flatten(1, 2).transpose(1, 2)


def _softmax(
    scores: Tensor,
    scaling: float,
    bias: Tensor | None,
    softcap: float | None,
    sinks: Tensor | None,
) -> Tensor:
    """Weights (..., heads, queries a head, ..., S) in float32 of scores, which are lost."""
    scores = scores.float()
    if softcap is not None:
        scores, scaling = scores.mul_(scaling / softcap).tanh_().mul_(softcap), 1.0
    if bias is None:
        scores.mul_(scaling)
    else:
        torch.add(bias, scores, alpha=scaling, out=scores)
    if sinks is None:
        return scores.softmax(-1)
    shape = (scores.shape[1], scores.shape[2], *[1] * (scores.ndim - 3))
    sink = sinks.float().view(shape).expand(*scores.shape[:-1], 1)
    return torch.cat([scores, sink], dim=-1).softmax(-1)[..., :-1]
