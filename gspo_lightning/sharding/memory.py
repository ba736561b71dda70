"""What training a policy takes on a card and on its host, by part: estimated, nothing is computed.

Decides how the estimate is made. Sizes and constants come from the model's modules, which may lie
on the meta device, so that it can be had before any weight is read.
"""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from gspo_lightning.engine.head import tokens_of_chunk
from gspo_lightning.engine.linear_logprobs import PART
from gspo_lightning.engine.padded import checkpoints, unwrapped
from gspo_lightning.policy.folder import sizes

LARGEST_FILE = 32 * 2**30  # bytes of weights and moments that rank 0 writes alone
CACHE, GRADIENTS = "KV cache", "gradients"
IN_UPDATE = ("micro-batch", "optimizer step")  # one after the other, each beside gradients
STATE = ("weights", GRADIENTS, "Adam", "optimizer step")  # of which each rank has its part
BEHIND = {"o_proj", "out_proj", "c_proj", "dense", "down_proj"}  # of attention and feed-forward


@dataclass(frozen=True)
class Work:
    """What a run asks of one device.

    Attributes:
        prompt_tokens: Longest prompt.
        new_tokens: Longest completion.
        decoded: Completions that are decoded at the same time.
        tokens_at_once: Tokens of a micro-batch.
        read_again: Prompt tokens of a micro-batch that completions of a group share, counted once
            for each of them.
        half_precision: Whether activations take two bytes whatever the weights take.
        device: Kind of the device, ``cpu`` or another.
    """

    prompt_tokens: int
    new_tokens: int
    decoded: int
    tokens_at_once: int
    read_again: int = 0
    half_precision: bool = False
    device: str = "cpu"

    @classmethod
    def of_rows(
        cls,
        prompt_tokens: int,
        new_tokens: int,
        decoded: int,
        rows: int,
        group_size: int,
        limit: int | None = None,
        packed: bool = True,
        **more: Any,
    ) -> "Work":
        """Where a micro-batch has so many completions, each of the most tokens.

        Args:
            prompt_tokens: As of the class, like ``new_tokens``, ``decoded`` and ``more``.
            rows: Completions of a micro-batch.
            group_size: Completions of a prompt.
            limit: Tokens of a micro-batch at most; a single row is never cut.
            packed: Whether rows of a group share their prompt.
        """
        shared = group_size if packed else 1

        def tokens(rows: int) -> int:
            return math.ceil(rows / shared) * prompt_tokens + rows * new_tokens

        most = max(tokens(rows) if limit is None else limit, prompt_tokens + new_tokens)
        at_once = min(tokens(rows), most)
        while rows > 1 and tokens(rows) > most:
            rows -= 1
        again = rows * prompt_tokens if min(shared, rows) > 1 else 0
        return cls(prompt_tokens, new_tokens, decoded, at_once, again, **more)


@dataclass(frozen=True)
class Ranks:
    """How many share a policy, and what of it they share.

    Attributes:
        count: Ranks of the run.
        on_machine: Those of them on one machine.
        sharded: Whether each has a part of the policy (``fsdp2``), not all of it (``ddp``).
        gathers: Whether the whole policy is gathered while completions are drawn.
        cpu_offload: Whether parts, their gradients and moments lie in host memory.
        in_parts: Whether each rank writes its part of a checkpoint, not rank 0 the whole.
    """

    count: int = 1
    on_machine: int = 1
    sharded: bool = False
    gathers: bool = True
    cpu_offload: bool = False
    in_parts: bool = False


def on_card(model: Any, work: Work, ranks: Ranks = Ranks()) -> dict[str, float] | None:
    """Bytes by part on the device of one rank; the allocator's own losses come on top.

    The cache is there by turns with gradients and what an update takes beside them, of which a
    micro-batch and an optimizer step are there by turns: see :func:`peak`. With K layers, D hidden,
    I units of the feed-forward part, V vocabulary, H heads and J key-value heads of size d, e bytes
    of an activation, w of a weight and C = V times the tokens of a chunk of logits:

    - cache = decoded * (prompt + new tokens) * K * 2 J d * e
    - micro-batch = the largest of four moments:
      activations + 2 C * 4, logits and what their entropy is made of;
      activations + C * 4 + V D * 4, logits and the gradient of their matrix, before it is added to
      that of other micro-batches; both with tokens * D (4 + 2 w), the last norm and its result;
      activations + tokens * 4 D * 4, what the backward pass of a layer takes; and
      the gradient of the embedding, V D * 4, twice where the two are one (tied): both are whole
      matrices before they are added
    - activations = tokens * K * a, what backward needs of a layer; with checkpointing tokens * K D
      w, each layer's input, and as the backward pass of a layer is made, its own tokens * a
      (attention matrices are not counted: kernels keep none)
    - a = D (2 or 5) e, inputs of linear layers (of each where autocast makes a narrow copy for
      each); (3 H d + 2 J d + 4 I) e, queries, the attention's output and that in order again, keys,
      values, and the feed-forward part; and what each norm keeps: its input and, unless one kernel
      makes it, what it makes of it. On a card in half precision the output is in order at once.
    - prompts that completions share lie beside each of them in the attention: in every layer
      2 J d e bytes a token of them, on a card in half precision in one at a time
    - optimizer step = what AdamW makes beside its state: three times the largest tensor on a CPU,
      where it goes from one to the next, and once all of them elsewhere

    With half precision a chunk and the gradient of the logits' matrix are there a second time in
    two bytes; under autocast so are that matrix and those of the layers, which it casts once a step
    and keeps.

    Of sharded ranks each has its part of weights, gradients, moments and what AdamW makes. Beside
    the cache lie the weights that are whole while completions are drawn: all of them, or without
    ``gathers`` two layers and what is no layer. In an update that is what is no layer, with the
    gradient of the head, and as the backward pass of a layer is made, two layers, the gradient of
    one, and that once more in float32, in which ranks add it up.

    Args:
        model: A transformers model, on any device; the meta device will do.
        work: What is asked of it.
        ranks: Who shares it.

    Returns:
        Bytes by part, or None if the config does not name its sizes.
    """
    shape = _Shape.of(model)
    if shape is None:
        return None
    parameters = list(model.parameters())
    trained = [p for p in parameters if p.requires_grad]
    wide = parameters[0].element_size()
    width = 2 if work.half_precision else wide
    units = _Units.of(model, shape.layers, width) if ranks.sharded else None
    largest = max((p.numel() * p.element_size() for p in trained), default=0)
    tokens = work.decoded * (work.prompt_tokens + work.new_tokens)
    parts = {
        "weights": bytes_of(parameters),
        GRADIENTS: bytes_of(trained),
        "Adam": 2 * bytes_of(trained),
        CACHE: tokens * shape.layers * 2 * shape.keys * width,
        "micro-batch": _largest_moment(model, shape, work, wide, width, units),
        "optimizer step": 3 * largest if work.device == "cpu" else bytes_of(trained),
    }
    if units is not None:
        parts |= {name: parts[name] / ranks.count for name in STATE}
        parts[CACHE] += units.all if ranks.gathers else units.rest + 2 * units.layer
        if ranks.cpu_offload:
            parts |= dict.fromkeys(STATE, 0.0)
    elif ranks.count > 1:
        parts["buckets of ddp"] = bytes_of(trained)  # gradients once more, as they are sent
    return parts


def peak(parts: Mapping[str, float]) -> float:
    """The most that is there at the same time, of parts from :func:`on_card`."""
    always = sum(parts.values()) - sum(parts[name] for name in (CACHE, GRADIENTS, *IN_UPDATE))
    return always + max(parts[CACHE], parts[GRADIENTS] + max(parts[name] for name in IN_UPDATE))


def state_of(parts: Mapping[str, float]) -> float:
    """What no batch size makes smaller."""
    return sum(parts[name] for name in STATE[:3])


def on_host(model: Any, ranks: Ranks, device: str) -> dict[str, float]:
    """Bytes by part that the ranks of a machine take of its own memory beside their libraries.

    Weights that are mapped from their file are no memory that others lack, so a rank that gets its
    part of them holds one tensor of the model at a time.

    Args:
        model: As for :func:`on_card`.
        ranks: Who shares it.
        device: Kind of the device that computes; what a ``cpu`` holds is counted there.
    """
    parameters = list(model.parameters())
    trained = bytes_of(p for p in parameters if p.requires_grad)
    share = ranks.on_machine / ranks.count
    if device == "cpu":
        return {}
    largest = max(p.numel() * p.element_size() for p in parameters)
    parts: dict[str, float] = {
        "loading": ranks.on_machine * (largest if ranks.sharded else bytes_of(parameters))
    }
    if ranks.cpu_offload:
        parts["weights, gradients and Adam"] = share * (bytes_of(parameters) + 3 * trained)
    parts["a checkpoint"] = largest  # one tensor after the other leaves the card
    if ranks.sharded:  # weights and two moments, whole on rank 0 or a part on each rank
        parts["a checkpoint"] = 3 * trained * (share if ranks.in_parts else 1)
    return parts


def host_peak(parts: Mapping[str, float]) -> float:
    """The most at the same time: loading and writing a checkpoint take turns."""
    turns = ("loading", "a checkpoint")
    always = sum(size for name, size in parts.items() if name not in turns)
    return always + max(parts.get(name, 0.0) for name in turns)


@dataclass(frozen=True)
class _Units:
    """Bytes of what sharded ranks gather at once: a layer, and the rest, which is no layer."""

    layer: float
    rest: float
    all: float

    @classmethod
    def of(cls, model: Any, num_layers: int, width: int) -> "_Units":
        named = dict(unwrapped(model).named_parameters())
        in_layers = [p for path, p in named.items() if _numbers(path)]
        layers, total = (
            sum(p.numel() for p in all_) * width for all_ in (in_layers, named.values())
        )
        return cls(layers / num_layers, total - layers, total)


@dataclass(frozen=True)
class _Shape:
    """Sizes of a decoder: layers, hidden D, feed-forward I, query heads H d, keys J d, words V."""

    layers: int
    hidden: int
    inner: int
    queries: int
    keys: int
    vocabulary: int

    @classmethod
    def of(cls, model: Any) -> "_Shape | None":
        """Of a model whose config names them, the largest where layers differ; else None."""
        config = model.config.get_text_config()

        def most(name: str) -> int | None:
            return max((x for x in sizes(config, name) if x is not None), default=None)

        names = ("num_hidden_layers", "hidden_size", "num_attention_heads", "vocab_size")
        layers, hidden, heads, vocabulary = map(most, names)
        if layers is None or hidden is None or heads is None or vocabulary is None:
            return None
        size = most("head_dim") or hidden // heads
        keys = (most("num_key_value_heads") or heads) * size
        inner = most("intermediate_size") or 4 * hidden
        return cls(layers, hidden, inner, heads * size, keys, vocabulary)


def _activations(
    model: Any, shape: _Shape, work: Work, wide: int, width: int
) -> tuple[float, float]:
    """Bytes that backward needs of all layers as it begins, and beside them in one layer."""
    fused = work.device != "cpu"
    in_order = fused and width == 2  # by a kernel for unequal lengths
    inputs = _readers(model, shape.hidden) if width < wide else 2  # copies for linear layers
    layer = inputs * shape.hidden * width
    layer += ((2 if in_order else 3) * shape.queries + 2 * shape.keys + 4 * shape.inner) * width
    layer += sum(_kept_by_norm(norm, fused, wide, width) for norm in _norms(model, shape))
    # a kernel that takes no fewer heads of keys than of queries has them repeated
    keys = shape.queries if fused and not in_order else shape.keys
    again = work.read_again * 2 * keys * width
    backward = work.tokens_at_once * 4 * shape.hidden * 4 + again  # a norm's, in float32
    if checkpoints(model):
        inputs = work.tokens_at_once * shape.layers * shape.hidden * wide
        return inputs, work.tokens_at_once * layer + backward + again
    if in_order:
        return work.tokens_at_once * shape.layers * layer, backward + again
    return shape.layers * (work.tokens_at_once * layer + again), backward


def _first_layer(model: Any) -> dict[str, nn.Module]:
    """The modules of the first layer by their paths."""
    modules = unwrapped(model).named_modules()
    return {path: module for path, module in modules if _numbers(path)[:1] == ["0"]}


def _numbers(path: str) -> list[str]:
    """Those in a path such as ``model.layers.3.mlp``; of what is no layer there are none."""
    return [part for part in path.split(".") if part.isdigit()]


def _norms(model: Any, shape: _Shape) -> list[tuple[nn.Module, int, bool]]:
    """Norms of a layer, the values of a token in each, and whether they are between layers."""
    found = []
    for path, module in _first_layer(model).items():
        if "norm" in type(module).__name__.lower():
            kind = path.rpartition(".")[2].partition("_")[0]
            of_heads = {"q": shape.queries, "k": shape.keys}.get(kind)
            found.append((module, of_heads or shape.hidden, of_heads is None))
    return found


def _kept_by_norm(norm: tuple[nn.Module, int, bool], fused: bool, wide: int, width: int) -> int:
    """Bytes of a token: what comes in, wide between layers, and unless fused what is made of it."""
    module, values, between = norm
    own = wide if between else width
    if fused or isinstance(module, nn.LayerNorm):
        return values * own
    return values * (4 + own)  # written out: in float32, and in the type of its input


def _readers(model: Any, hidden: int) -> int:
    """Linear layers of a decoder layer that read what layers add to."""
    found = [
        path
        for path, module in _first_layer(model).items()
        if isinstance(module, nn.Linear) and module.in_features == hidden
        if not BEHIND & set(path.split("."))
    ]
    return max(2, len(found))


def _in_layers(model: Any) -> int:
    """Values in all matrices but the embeddings."""
    embeddings = (model.get_input_embeddings(), model.get_output_embeddings())
    ends = {id(getattr(found, "weight", None)) for found in embeddings}
    return sum(p.numel() for p in model.parameters() if p.ndim > 1 and id(p) not in ends)


def _largest_moment(
    model: Any, shape: _Shape, work: Work, wide: int, width: int, units: _Units | None
) -> float:
    """Bytes of a micro-batch at their most."""
    embedding, head = (
        getattr(found, "weight", torch.empty(0))  # a head that is no matrix has no gradient of one
        for found in (model.get_input_embeddings(), model.get_output_embeddings())
    )
    kept, in_layer = _activations(model, shape, work, wide, width)
    chunk = tokens_of_chunk(shape.vocabulary, torch.device(work.device)) * shape.vocabulary * 4
    of_head = head.numel() * 4 if head.requires_grad else 0
    of_embedding = embedding.numel() * 4 if embedding.requires_grad else 0
    last: float = of_embedding + (of_head if head is embedding else 0)
    at_head = work.tokens_at_once * shape.hidden * (4 + 2 * wide)  # last norm, what the head reads
    if units is not None:
        kept += units.rest
        in_layer += of_head * width / 4 + units.layer * (3 + 4 / width)
        last = units.rest * (2 + 4 / width)
    elif width < wide:
        kept += width * _in_layers(model)
        at_head += width * head.numel()
    grad: float = chunk + of_head
    if width < 4 and of_head:  # logits again, and the gradient in its weight's type or in parts
        whole = of_head * width / 4 if units is not None or wide < 4 else 0
        grad += chunk / 2 + max(whole, min(shape.vocabulary, PART) * shape.hidden * width)
    return max(kept + at_head + 2 * chunk, kept + at_head + grad, kept + in_layer, last)


def bytes_of(parameters: Iterable[Any]) -> int:
    """Bytes that parameters take, whole ones."""
    return sum(p.numel() * p.element_size() for p in parameters)


def size_text(size: float) -> str:
    """Bytes for people.

    >>> size_text(3 * 2**19), size_text(5 * 2**29)
    ('2 MiB', '2.5 GiB')
    """
    return f"{size / 2**20:.0f} MiB" if size < 2**30 else f"{size / 2**30:.1f} GiB"
