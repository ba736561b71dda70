"""Keys and values of a rollout, and the attention that reads them where they lie.

Decides how completions of a group share their prompt: its keys and values are kept once and never
copied; all rows of a group attend to them in one matrix product, in a grid of groups and places
that one gather reaches and another leaves. What a row adds itself lies in buffers that are made
once, so that no token makes them grow. Both parts meet in one softmax.
"""

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, NamedTuple, Self

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

AT_ONCE = 512  # queries of a text whose scores are written out at the same time
Attend = Callable[..., Tensor]  # as ``attention.Attend``, which stands a floor higher


@dataclass
class Layout:
    """Which row attends to which prompt; constant between two changes of the batch.

    The rows of a group lie side by side in a grid of groups and places. Where a group has fewer
    rows than places, the rest of the grid repeats some row and is not read.

    Attributes:
        num_groups: Prompt slots in use.
        num_places: The most rows of one group.
        source: The row in each cell of the grid, (groups * places,) int64.
        cell: The cell of each row, (N,) int64.
        prompt_lengths: Tokens of each row's prompt, (N, 1) int64.
        longest: Tokens of the longest prompt in use.
        padded: Whether some prompt in use is shorter.
    """

    num_groups: int
    num_places: int
    source: Tensor
    cell: Tensor
    prompt_lengths: Tensor
    longest: int
    padded: bool

    def clone(self) -> Self:
        """The same in other tensors."""
        tensors = ("source", "cell", "prompt_lengths")
        return replace(self, **{name: getattr(self, name).clone() for name in tensors})

    def take(self, other: Self) -> None:
        """Write the tensors of another layout of the same sizes into those of this one."""
        self.source.copy_(other.source)
        self.cell.copy_(other.cell)
        self.prompt_lengths.copy_(other.prompt_lengths)

    def to_grid(self, num_heads: int) -> Tensor:
        """Of (N, heads, ...) flattened: what lies in a grid of (groups, heads, places)."""
        rows = self.source.view(self.num_groups, 1, -1) * num_heads
        heads = torch.arange(num_heads, device=rows.device)[:, None]
        return (rows + heads).flatten()

    def to_rows(self, num_heads: int) -> Tensor:
        """Of a grid of (groups, heads, places) flattened: what belongs to (N, heads)."""
        group = self.cell.div(self.num_places, rounding_mode="floor")
        first = self.cell + group * ((num_heads - 1) * self.num_places)
        heads = torch.arange(num_heads, device=first.device) * self.num_places
        return (first[:, None] + heads).flatten()


class Buffers(NamedTuple):
    """One layer: keys and values of prompts (slots, K, L, d) and of rows (slots, K, T, d)."""

    prompt_keys: Tensor
    prompt_values: Tensor
    keys: Tensor
    values: Tensor


class Arranged:
    """What is computed once a layout.

    Attributes:
        rows: 0 to N - 1.
        bias: -inf on the padding of prompts, 0 elsewhere, (N, 1, 1, prompt + own tokens).
    """

    def __init__(self, layout: Layout, num_rows: int, length: int) -> None:
        device = layout.cell.device
        self.layout = layout
        self.rows = torch.arange(num_rows, device=device)
        self._indices: dict[int, tuple[Tensor, Tensor]] = {}
        hidden = torch.arange(layout.longest, device=device) >= layout.prompt_lengths
        bias = torch.zeros(num_rows, layout.longest + length, device=device)
        bias[:, : layout.longest].masked_fill_(hidden, -torch.inf)
        self.bias = bias[:, None, None]

    def indices(self, num_heads: int) -> tuple[Tensor, Tensor]:
        """The layout's way to its grid and back, once a number of heads."""
        if num_heads not in self._indices:
            to_grid, to_rows = self.layout.to_grid(num_heads), self.layout.to_rows(num_heads)
            self._indices[num_heads] = to_grid, to_rows
        return self._indices[num_heads]


class DecodeStep:
    """One token of each row: where it goes, and what it must not see.

    Args:
        arranged: What the layout of the rows gives.
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
        """-inf on what a row must not see, (N, 1, 1, prompt + own); ``None`` where it sees all."""
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
            own = position - prompt + layout.prompt_lengths
            position = torch.where(position < prompt, position, own)
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
    windows: dict[int, int | None] = field(default_factory=dict)  # that each layer asked for
    _arranged: Arranged | None = None  # of the newest layout, which many steps share

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
        if index not in self.layers:
            sizes = (self.num_prompts, self.prompt_length), (self.num_rows, self.length)
            self.layers[index] = Buffers(
                # zeros: a padded key must be finite to be masked
                *(
                    like.new_zeros(slots, like.shape[1], length, like.shape[3])
                    for slots, length in sizes
                    for like in (key, value)
                )
            )
        buffers = self.layers[index]
        self.windows[index] = options.get("sliding_window")
        output = query.new_empty(1, query.shape[2], query.shape[1], value.shape[3])
        for slot, start, end in pieces:
            keys, values = key[:, :, start:end], value[:, :, start:end]
            buffers.prompt_keys[slot, :, : end - start] = keys[0]
            buffers.prompt_values[slot, :, : end - start] = values[0]
            output[:, start:end] = attend_within(query[:, :, start:end], keys, values, **options)
        return output

    def going_on(self, pieces: Sequence[tuple[int, int, int, int, int]]) -> Attend:
        """For a forward pass that brings several tokens of some rows, one row after the other.

        Args:
            pieces: Of each row its slot, its prompt's slot, the prompt's tokens, how many of its
                own are in the cache, and how many come.
        """
        return partial(self._go_on, pieces)

    def _go_on(
        self,
        pieces: Sequence[tuple[int, int, int, int, int]],
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        **options: Any,
    ) -> Tensor:
        """Attend from the new tokens of each row to its prompt, to its own and to each other."""
        buffers: Buffers = self.layers[module.layer_idx]  # type: ignore[index]
        output = query.new_empty(1, query.shape[2], query.shape[1], value.shape[3])
        first = 0
        for slot, prompt, length, start, count in pieces:
            new, there = slice(first, first + count), slice(start, start + count)
            buffers.keys[slot, :, there], buffers.values[slot, :, there] = (
                key[0, :, new],
                value[0, :, new],
            )
            own = slice(0, start + count)
            keys = torch.cat(
                [buffers.prompt_keys[prompt, :, :length], buffers.keys[slot, :, own]], 1
            )
            values = [buffers.prompt_values[prompt, :, :length], buffers.values[slot, :, own]]
            whole = keys[None], torch.cat(values, 1)[None]
            output[:, new] = attend_within(query[:, :, new], *whole, **options)
            first += count
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
        **options: Any,
    ) -> Tensor:
        """Attend from one token of each row to its prompt and to what it added itself."""
        layout, num_rows = step.arranged.layout, len(step.lengths)
        more = query.shape[2] - num_rows  # the model's surplus rows, whose output nobody reads
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
        weights = _softmax(scores, step.bias(options.get("sliding_window")), **options)
        weights = weights.to(value.dtype).view(count, -1, prompt + own)
        grid = weights[..., :prompt].contiguous().index_select(0, to_grid)
        far_values = prompt_values.flatten(0, 1)[:groups, :prompt]
        far = torch.bmm(grid.view(groups, -1, prompt), far_values)
        output = far.view(len(to_grid), -1, far.shape[2]).index_select(0, to_rows)
        output += torch.bmm(weights[..., prompt:], values.flatten(0, 1)[:count, :own])
        output = output.view(1, num_rows, -1, output.shape[2])
        return nn.functional.pad(output, (0, 0, 0, 0, 0, more)) if more else output

    def move_rows(self, sources: Tensor, targets: Tensor, length: int) -> None:
        """Copy the first ``length`` tokens of rows to other slots, whose content is lost."""
        for layer in self.layers.values():
            for buffer in (layer.keys, layer.values):
                buffer[targets, :, :length] = buffer[sources, :, :length]

    def move_prompt(self, source: int, target: int) -> None:
        """Copy a prompt to another slot, whose content is lost."""
        for layer in self.layers.values():
            layer.prompt_keys[target] = layer.prompt_keys[source]
            layer.prompt_values[target] = layer.prompt_values[source]


def attend_within(query: Tensor, key: Tensor, value: Tensor, **options: Any) -> Tensor:
    """Causal attention of the last tokens of one text, or of all its S.

    Args:
        query: (1, heads, at most S, head size).
        key: (1, key-value heads, S, head size).
        value: Likewise.
        options: Those of :class:`gspo_lightning.engine.attention.Attend`.

    Returns:
        (1, queries, heads, head size).
    """
    length, before = query.shape[2], key.shape[2] - query.shape[2]
    whole = before + length
    window = whole if options.get("sliding_window") is None else options["sliding_window"]
    plain = options.get("softcap") is None and options.get("s_aux") is None
    visible = None
    if window < whole or before or not plain:
        visible = query.new_ones(length, whole, dtype=torch.bool)
        visible = visible.tril_(before).triu_(before + 1 - window)
    if query.is_cuda and (visible is not None or query.dtype == torch.float32):
        # Beside a mask and in float32 its kernels take no grouped heads, and all scores of all
        # heads would be written out: 1 GiB for 16 heads and 4,096 tokens.
        repeats = query.shape[1] // key.shape[1]
        key, value = (x.repeat_interleave(repeats, 1) for x in (key, value))
    heads = key.shape[1]
    if plain:
        scale, grouped = options["scaling"], heads != query.shape[1]
        output = scaled_dot_product_attention(
            query, key, value, visible, is_causal=visible is None, scale=scale, enable_gqa=grouped
        )
        return output.transpose(1, 2)
    assert visible is not None
    bias = torch.zeros(visible.shape, device=query.device).masked_fill_(~visible, -torch.inf)
    output = query.new_empty(1, length, query.shape[1], value.shape[3])
    for start in range(0, length, AT_ONCE):  # scores of a piece at a time
        piece = slice(start, start + AT_ONCE)
        scores = query[:, :, piece].unflatten(1, (heads, -1)) @ key[:, :, None].mT
        weights = _softmax(scores, bias[piece], **options).to(value.dtype)
        output[:, piece] = (weights @ value[:, :, None]).flatten(1, 2).transpose(1, 2)
    return output


def _softmax(scores: Tensor, bias: Tensor | None, scaling: float, **options: Any) -> Tensor:
    """Weights (..., heads, queries a head, ..., S) in float32 of scores, which are lost."""
    softcap, sinks = options.get("softcap"), options.get("s_aux")
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
