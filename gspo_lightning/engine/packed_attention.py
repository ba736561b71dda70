"""Attention within a row of packed sequences.

Decides what each token attends to: its own sequence and, for a completion, the prompt in front of
its group. Sequences of similar length are padded to one another here, and only here.
"""

import inspect
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from torch.utils.checkpoint import checkpoint

try:
    from torch.nn.attention.varlen import varlen_attn
except ImportError:
    varlen_attn = None  # type: ignore[assignment]

PREFIX = "gspo_"  # of the attention implementations that take an attention of ours
SIMILAR = 0.5  # sequences at least this long, relative to the longest, share a padded block
AT_ONCE = 512  # queries whose scores are written out at the same time
LAYERS = {"full_attention", "sliding_attention"}  # kinds of layers whose masks are known here


class Sequence(NamedTuple):
    """Tokens ``start`` to ``start + length`` of the row, behind the prompt they go on from.

    A prompt, or a text with one completion, goes on from nothing: ``prompt_length`` is 0.
    """

    start: int
    length: int
    prompt_start: int = 0
    prompt_length: int = 0


@dataclass(eq=False)
class PackedAttention:
    """Attention within a packed row; called by every layer, recomputed ones included.

    Args:
        sequences: What lies in the row, in order and without gaps.
        size: N, tokens of the row.
        device: Where the row is.
    """

    sequences: list[Sequence]
    size: int
    device: torch.device
    blocks: list[list[Sequence]] = field(init=False)  # computed together, padded to their first
    masks: dict[Any, Tensor | None] = field(default_factory=dict, init=False)
    joined: tuple[Tensor, Tensor, Tensor, int, int] | None = field(default=None, init=False)
    recomputed: bool = field(default=False, init=False)  # whether layers keep nothing for backward

    def __post_init__(self) -> None:
        self.blocks = _similar(self.sequences)
        slots, fill, starts = [], [], []
        offset = 0
        for members in self.blocks:
            # padding is on the right, where causal attention never lets the text see it
            longest = members[0].length
            for sequence in members:
                columns = torch.arange(longest)
                real = columns < sequence.length
                slots.append(torch.where(real, columns + sequence.start, 0))
                fill.append(~real)
                starts.append((sequence.start, sequence.length, offset))
                offset += longest
        self.slots = torch.cat(slots).to(self.device)  # the token behind each slot of the blocks
        self.filling = torch.cat(fill).nonzero()[:, 0].to(self.device)  # slots of padding
        home = [torch.arange(length) + at for _, length, at in sorted(starts)]
        self.home = torch.cat(home).to(self.device)  # the slot of each token
        self.cuts: list[int] = []  # of the row, so that each prompt is a piece of its own
        self.pieces: dict[int, int] = {}  # the piece of a prompt, by its start
        at = 0
        prompts = {(s.prompt_start, s.prompt_length) for s in self.sequences if s.prompt_length}
        for start, length in sorted(prompts):
            self.pieces[start] = len(self.cuts) + 1
            self.cuts += [start - at, length]
            at = start + length
        self.cuts.append(self.size - at)

    def __call__(
        self, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, **options: Any
    ) -> Tensor:
        """Attend in one layer: (1, heads, N, head size) to (1, N, heads, head size)."""
        if options.get("position_bias") is not None:
            raise ValueError("a position bias cannot be packed")
        scale, window = options.get("scaling"), sliding_window(module, options)
        plain = options.get("softcap") is None and options.get("s_aux") is None
        if plain and _has_varlen(query):
            return self._varlen(query, key, value, scale, window)

        queries = self._blocks(query)
        keys, values = self._blocks(key), self._blocks(value)
        prompt_keys, prompt_values = key.split(self.cuts, 2), value.split(self.cuts, 2)
        outputs = []
        for i, members in enumerate(self.blocks):
            q, k, v = queries[i], keys[i], values[i]
            if members[0].prompt_length:
                piece, shape = self.pieces[members[0].prompt_start], (len(members), -1, -1, -1)
                k = torch.cat([prompt_keys[piece].expand(shape), k], 2)
                v = torch.cat([prompt_values[piece].expand(shape), v], 2)
            mask = self._mask(i, window, q.dtype, not plain)
            if plain:
                grouped = q.shape[1] != k.shape[1]
                if grouped and q.is_cuda:  # its fast kernels take no mask beside grouped heads
                    k, v = _for_each_head(q, k, v)
                    grouped = False
                output = scaled_dot_product_attention(
                    q, k, v, mask, is_causal=mask is None, scale=scale, enable_gqa=grouped
                )
            else:
                assert mask is not None
                output = attend_explicitly(q, k, v, mask, options)
            outputs.append(output.transpose(1, 2).flatten(0, 1))
        together = outputs[0] if len(outputs) == 1 else torch.cat(outputs)
        return _Move.apply(together, self.home, self.slots, self.filling).unsqueeze(0)

    def _blocks(self, x: Tensor) -> list[Tensor]:
        """Cut (1, heads, N, d) into the blocks, (num, heads, length, d) each."""
        padded = _Move.apply(x[0].transpose(0, 1), self.slots, self.home, None)
        sizes = [(len(members), members[0].length) for members in self.blocks]
        parts = padded.split([num * length for num, length in sizes])
        return [
            part.view(*size, *part.shape[1:]).transpose(1, 2)
            for part, size in zip(parts, sizes, strict=True)
        ]

    def _mask(self, i: int, window: int | None, dtype: torch.dtype, always: bool) -> Tensor | None:
        """What is added to the scores of a block: (length, prompt + length), or plain causal."""
        block = self.blocks[i][0]
        columns = block.prompt_length + block.length
        if window is not None and window >= columns:
            window = None
        name = (i, window, dtype, always)
        if name not in self.masks:
            mask = None
            if block.prompt_length or window is not None or always:
                query = torch.arange(block.prompt_length, columns, device=self.device)[:, None]
                key = torch.arange(columns, device=self.device)
                seen = key <= query
                if window is not None:
                    seen &= query - key < window
                mask = torch.zeros(seen.shape, dtype=dtype, device=self.device)
                mask.masked_fill_(~seen, -torch.inf)
            self.masks[name] = mask
        return self.masks[name]

    def _varlen(
        self, query: Tensor, key: Tensor, value: Tensor, scale: float | None, window: int | None
    ) -> Tensor:
        """All sequences in one kernel for unequal lengths; keys are the prompt's and their own."""
        if self.joined is None:
            index, lengths_q, lengths_k = [], [0], [0]
            for start, length, prompt_start, prompt_length in self.sequences:
                index += [*range(prompt_start, prompt_start + prompt_length)]
                index += [*range(start, start + length)]
                lengths_q.append(length)
                lengths_k.append(prompt_length + length)
            keys = torch.tensor(index, device=self.device)
            lengths = torch.tensor([lengths_q, lengths_k], device=self.device)
            ends_q, ends_k = (x.cumsum(0, dtype=torch.int32) for x in lengths)
            self.joined = (keys, ends_q, ends_k, max(lengths_q), max(lengths_k))
        index_k, cu_q, cu_k, max_q, max_k = self.joined
        q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))
        options: dict[str, Any] = {"scale": scale}
        options["window_size"] = (-1 if window is None else window - 1, 0)
        repeats = q.shape[1] // k.shape[1]
        if repeats > 1 and "enable_gqa" in inspect.signature(varlen_attn).parameters:
            options["enable_gqa"], repeats = True, 1
        for_rows = _ForRows(index_k, repeats)
        k, v = for_rows(k), for_rows(v)
        # Of hooks the innermost alone are asked: those of a recomputation would miss what it keeps.
        kept = nullcontext() if self.recomputed else for_rows.kept_as_they_were()
        with kept:
            output: Any = varlen_attn(q, k, v, cu_q, cu_k, max_q, max_k, **options)
        return output.unsqueeze(0)


def _similar(sequences: list[Sequence]) -> list[list[Sequence]]:
    """Sort into lists of the same prompt and similar length, the longest of each list first."""
    by_prompt: dict[tuple[int, int], list[Sequence]] = {}
    for sequence in sequences:
        by_prompt.setdefault((sequence.prompt_start, sequence.prompt_length), []).append(sequence)
    lists: list[list[Sequence]] = []
    for members in by_prompt.values():
        members.sort(key=lambda sequence: -sequence.length)
        lists.append([])
        for sequence in members:
            if lists[-1] and sequence.length < SIMILAR * lists[-1][0].length:
                lists.append([])
            lists[-1].append(sequence)
    return lists


def sliding_window(module: Any, options: dict[str, Any]) -> int | None:
    """The window of a layer in tokens, from the call or else from the model's configuration."""
    if options.get("sliding_window") is not None:
        return options["sliding_window"]
    config = getattr(module, "config", None)
    kinds = getattr(config, "layer_types", None)
    if kinds and kinds[module.layer_idx] == "sliding_attention":
        return config.sliding_window  # type: ignore[union-attr]
    return None


def attend_explicitly(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor, options: dict[str, Any]
) -> Tensor:
    """Attention written out, for scores that are capped or share their weight with a sink.

    Long texts go piece by piece, each computed again in backward: no matrix of all scores is kept.

    Args:
        query: (n, heads, Q, d).
        key: (n, key-value heads, K, d); ``value`` likewise.
        mask: Added to the scores, (Q, K).
        options: As in :class:`gspo_lightning.engine.attention.Attend`; without ``scaling`` scores
            are multiplied by d ** -0.5.

    Returns:
        (n, heads, Q, d).
    """
    key, value = _for_each_head(query, key, value)
    if query.shape[2] <= AT_ONCE:
        return _attend_explicitly(query, key, value, mask, options)
    outputs = []
    for q, part in zip(query.split(AT_ONCE, 2), mask.split(AT_ONCE), strict=True):
        arguments = q, key, value, part, options
        outputs.append(checkpoint(_attend_explicitly, *arguments, use_reentrant=False))
    return torch.cat(outputs, 2)


def _attend_explicitly(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor, options: dict[str, Any]
) -> Tensor:
    scale, softcap, sinks = (options.get(name) for name in ("scaling", "softcap", "s_aux"))
    scores = query @ key.transpose(-1, -2) * (query.shape[-1] ** -0.5 if scale is None else scale)
    if softcap is not None:
        scores = torch.tanh(scores / softcap) * softcap
    scores = scores + mask
    if sinks is not None:
        sink = sinks.to(scores.dtype).view(1, -1, 1, 1).expand(*scores.shape[:-1], 1)
        scores = torch.cat([scores, sink], -1)
    # in float32 at least, as the models themselves do it
    weights = scores.to(torch.promote_types(scores.dtype, torch.float32)).softmax(-1)
    if sinks is not None:
        weights = weights[..., :-1]
    return weights.to(value.dtype) @ value


def _for_each_head(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    """Repeat keys and values for the query heads that share them; heads are axis 1."""
    repeats = query.shape[1] // key.shape[1]
    return key.repeat_interleave(repeats, 1), value.repeat_interleave(repeats, 1)


class _Move(torch.autograd.Function):
    """Rows of x, picked by an index whose way back is known: backward picks, too, and adds nothing.

    ``unpicked`` are the rows of x that no index names; they have no gradient.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, index: Tensor, back: Tensor, unpicked: Tensor | None
    ) -> Tensor:
        ctx.back, ctx.unpicked = back, unpicked
        return x.index_select(0, index)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        grad = grads[0].index_select(0, ctx.back)
        if ctx.unpicked is not None:
            grad = grad.index_fill_(0, ctx.unpicked, 0)
        return grad, None, None, None


class _ForRows:
    """Keys or values of a packed row, given to each sequence that attends to them.

    A prompt's are there once for each of its completions, which backward would keep: for 2,048
    tokens and 8 completions, eight times what the row has. They are made again there instead.

    Args:
        index: The token behind each place, (K,).
        repeats: Query heads that share a head of keys, where a kernel wants one for each.
    """

    def __init__(self, index: Tensor, repeats: int) -> None:
        self.index, self.repeats = index, repeats
        self.sources: dict[int, Tensor] = {}  # by where what was made of them lies

    def __call__(self, x: Tensor) -> Tensor:
        """Of (N, heads, d), (K, heads * repeats, d)."""
        made = self._make(x)
        self.sources[made.data_ptr()] = x.detach()
        return made

    def _make(self, x: Tensor) -> Tensor:
        picked = x.index_select(0, self.index)
        return picked if self.repeats == 1 else picked.repeat_interleave(self.repeats, 1)

    def kept_as_they_were(self) -> AbstractContextManager[Any]:
        """Within, what backward needs of them is kept as their sources and made anew there."""

        def pack(tensor: Tensor) -> Tensor | tuple[Tensor]:
            source = self.sources.get(tensor.data_ptr())
            same = source is not None and tensor.shape[0] == len(self.index)
            return (source,) if same else tensor  # type: ignore[return-value]

        def unpack(kept: Tensor | tuple[Tensor]) -> Tensor:
            return kept if isinstance(kept, Tensor) else self._make(kept[0])

        return torch.autograd.graph.saved_tensors_hooks(pack, unpack)


def _has_varlen(query: Tensor) -> bool:
    """Whether torch has a kernel for unequal lengths for this; it is one of half precision."""
    return (
        varlen_attn is not None
        and query.is_cuda
        and query.dtype in (torch.bfloat16, torch.float16)
        and query.shape[-1] <= 256
        and query.shape[-1] % 8 == 0  # it refuses others, for which padded blocks are computed
        and "window_size" in inspect.signature(varlen_attn).parameters
    )
