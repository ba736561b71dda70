"""Which ways to run a model give the numbers of plain passes: tried once, on a few short texts.

What an architecture does with packed, padded or cached tokens stands in no signature, and where it
is wrong nothing fails. So every way is compared with passes of one text each, which no other text
can touch: the log-probs, and a gradient that has passed through every token. Windows are made short
meanwhile, so that the texts reach beyond them. What differs takes the next plainer way, and that is
said once.
"""

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from gspo_lightning.engine.drawing import NotDecodable
from gspo_lightning.engine.group_decoder import GroupDecoder, Wanted
from gspo_lightning.engine.head import is_full
from gspo_lightning.engine.mode import mode_kept
from gspo_lightning.engine.packed_attention import LAYERS, PREFIX
from gspo_lightning.engine.packing import pack, run_packed
from gspo_lightning.engine.padded import run_alone, run_padded, text_config, unwrapped
from gspo_lightning.engine.plain_decoder import decode_plainly

log = logging.getLogger(__name__)

PROMPTS, COMPLETIONS = (7, 4), (5, 3, 4, 5)  # tokens of the texts; two of them to a prompt
WINDOW = 4  # tokens that a window sees during a trial
# Endings of names: of windows, and of the place in a row from which on scores are scaled.
WINDOWS, FLOORS = ("window", "window_size", "attention_chunk_size"), ("floor_scale", "n_floor")
# Distances that rounding does not reach, of log-probs and of the gradient, relative to their size.
FLOAT32, HALF = (1e-4, 1e-3), (0.1, 0.5)
KINDS = {  # what a way runs a model on
    "packed": "packed rows",
    "shared": "prompts that rows share",
    "padded": "padded rows",
    "grouped": "prompts that groups share",
    "batched": "batches",
    "alone": "single rows",
}


class Found(NamedTuple):
    """The way that a model is run, and why not by a better one, in lines for people."""

    way: str
    reasons: tuple[str, ...] = ()


class Texts(NamedTuple):
    """Two prompts with two completions each, (4, L) and (4, T); rows of unlike lengths."""

    prompt_ids: Tensor
    prompt_mask: Tensor
    completion_ids: Tensor
    on: Tensor


def reading(model: Any, device: torch.device, *, packed: bool = True) -> str:
    """The best way to run a model on texts that are there.

    Args:
        model: A transformers model, also within peft, on ``device``.
        device: Where it is tried.
        packed: Whether packed rows may be taken.

    Returns:
        ``packed`` rows, ``shared`` prompts in padded ones, ``padded`` rows, or each row ``alone``.

    Raises:
        ValueError: If the model gives other numbers each time, or cannot read a single text.
    """
    found = _reading(model, device, packed)
    say_once(unwrapped(model), *found.reasons)
    return found.way


def decoding(model: Any, device: torch.device) -> str:
    """The best way to sample from a model.

    Returns:
        ``grouped`` by :class:`GroupDecoder`, ``batched`` with the model's own cache, or each row
        ``alone`` with it.

    Raises:
        ValueError: If even single rows are not drawn from what plain passes give.
    """
    found = _decoding(model, device)
    say_once(unwrapped(model), *found.reasons)
    return found.way


def plainer_ways(model: Any, device: torch.device, *, sampled: bool) -> list[str]:
    """Why a model is not run in the best ways, for a plan; nothing says it once more.

    Args:
        model: As for :func:`reading`.
        device: Likewise.
        sampled: Whether completions are drawn from it here.
    """
    reasons = [*_reading(model, device, True).reasons]
    if sampled:
        reasons += _decoding(model, device).reasons
    unwrapped(model).__dict__.setdefault("_gspo_said", set()).update(reasons)
    return [reason.removeprefix(": ").strip() for reason in reasons]


def _reading(model: Any, device: torch.device, packed: bool) -> Found:
    base = unwrapped(model)
    if getattr(base, "config", None) is None:  # a module of one's own, which has no attention
        return Found("shared")
    tried = base.__dict__.setdefault("_gspo_reading", {})
    case = packed, getattr(base.config, "_attn_implementation", None)
    if case not in tried:
        tried[case] = _try_reading(model, base, device, packed)
    return tried[case]


def _decoding(model: Any, device: torch.device) -> Found:
    base = unwrapped(model)
    if "_gspo_decoding" not in base.__dict__:
        base.__dict__["_gspo_decoding"] = _try_decoding(model, base, device)
    return base.__dict__["_gspo_decoding"]


def say_once(base: Any, *lines: str) -> None:
    """Log lines about a model that begin with its name, each once in the model's life."""
    said = base.__dict__.setdefault("_gspo_said", set())
    for line in lines:
        if line not in said:
            said.add(line)
            log.warning("%s%s", type(base).__name__.removeprefix("FSDP"), line)


def some_ids(base: Any, *shape: int) -> Tensor:
    """Random tokens that mean nothing special to a model, the same ones at each call."""
    special = {
        id
        for name, value in vars(text_config(base)).items()
        if name.endswith(("_id", "_index"))
        for id in (value if isinstance(value, list | tuple) else [value])
    }
    rows = base.get_input_embeddings().weight.shape[0]  # some embed more than they can predict
    rows = min(rows, getattr(text_config(base), "vocab_size", None) or rows, 1000)
    ordinary = torch.tensor([id for id in range(rows) if id not in special] or [0])
    generator = torch.Generator().manual_seed(0)
    return ordinary[torch.randint(len(ordinary), shape, generator=generator)]


# --- texts that are there ------------------------------------------------------------------------


def _try_reading(model: Any, base: Any, device: torch.device, packed: bool) -> Found:
    texts = _texts(base, device)
    batch = (*texts, texts.on)

    def alone() -> Any:
        return run_alone(model, *batch)

    def in_one_row() -> Any:
        row = pack(*batch)
        return [run_packed(model, row)], [row.ids.shape[1]], row.source, row.target

    def padded(group_size: int) -> Any:
        output, source, target, columns = run_padded(model, *batch, group_size)
        return [output], [columns], source, target

    def gaps(run: Callable[[], Any]) -> list[float]:
        (values, gradient), (values_alone, gradient_alone) = _measure(base, texts, run), expected
        spread = values_alone.std(-1, keepdim=True)
        return [_gap(values, values_alone, spread), _gap(gradient, gradient_alone, gradient_alone)]

    reasons: list[str] = []
    with _trial(base, device) as windows, mode_kept(model):
        model.train(model.training)  # whatever the flags of its parts say
        with _closed(base), mode_kept(model):
            model.eval()
            try:
                expected = _measure(base, texts, alone)
            except Exception as error:
                raise ValueError(
                    f"policy.path: {type(base).__name__} {_failure(error, 'alone')}"
                ) from error
            longest = texts.on.shape[1]
            _check_model(model, base, texts, longest)
            if windows:  # a text that lies within them may be run without any mask
                with _set(windows):
                    _check_model(model, base, texts, min(2, longest))
        ways = {
            "packed": (in_one_row, ": rows are padded, not packed: "),
            "shared": (lambda: padded(2), ": prompts are read once for each completion: "),
            "padded": (lambda: padded(1), ": rows are run one by one, which is slow: "),
            "alone": (alone, " cannot be trained: "),
        }
        for way, (run, consequence) in ways.items():
            if way == "packed" and not packed:
                continue
            reason = _not_packed(base) if way == "packed" else None
            if way == "shared" and hasattr(base, "unshard"):
                reason = "ranks hold parts of its layers, which leave before a prompt's backward"
            reason = reason or _why_not(base, way, lambda: gaps(run))  # noqa: B023
            if reason is None:
                return Found(way, tuple(reasons))
            reasons.append(consequence + reason)
    raise ValueError(f"policy.path: {type(base).__name__}{reasons[-1]}")


@torch.no_grad()
def _check_model(model: Any, base: Any, texts: Texts, length: int) -> None:
    """Refuse a model that gives no log-prob of a text, whatever way it is run.

    Args:
        model: As for :func:`reading`.
        base: The transformers model in it.
        texts: Of which the first is tried.
        length: Tokens of its completion.

    Raises:
        ValueError: If the text has other log-probs at the second time, or if its tokens see what
            follows them.
    """
    ids, mask, completion, on = (x[:1] for x in texts)
    close = (HALF if _is_half(base) else FLOAT32)[0]

    def values(length: int, last: int | None = None) -> Tensor:
        """Log-probs of the text, cut to ``length``, with another last token that it reads."""
        part = on & (torch.arange(on.shape[1], device=on.device) < length)
        changed = completion.clone()
        if last is not None:
            changed[0, length - 2] = last
        outputs, columns, source, _ = run_alone(model, ids, mask, changed, part, part)
        return _normal(outputs[0], _values(outputs[0])[0, -columns[0] :][source])

    before = values(length)

    def moved(found: Tensor) -> bool:
        return _gap(found, before[: len(found)], before.std(-1)) > close

    name = f"policy.path: {type(base).__name__} is"
    if moved(values(length)):
        raise ValueError(
            f"{name} random: the same text has other log-probs each time; set what makes it "
            "random to 0 in config.json, or take another model"
        )
    others = ids[0][ids[0] != completion[0, length - 2]].tolist()
    changed = values(length, others[-1])[:-1] if others and length > 1 else before
    if moved(changed) or (length == on.shape[1] and moved(values(max(1, length - 1)))):
        raise ValueError(
            f"{name} no causal language model: its tokens see what follows them; set "
            "is_decoder to true in config.json, or take another model or a newer transformers"
        )


def _not_packed(base: Any) -> str | None:
    """Why a model is not even tried on packed rows."""
    name = str(getattr(base.config, "_attn_implementation", None))
    if not name.startswith(PREFIX):
        return f"its attention ({name}) takes none of ours"
    kinds = set(getattr(text_config(base), "layer_types", None) or ())
    return f"it has layers of {', '.join(sorted(kinds - LAYERS))}" if kinds - LAYERS else None


def _measure(base: Any, texts: Texts, run: Callable[[], Any]) -> list[Tensor]:
    """Log-probs of all tokens that could stand at each place, (n, V), and a gradient, (D,).

    The gradient of the completions' log-probs by a vector that is added to every embedding: it is
    the same however texts are laid out, and it lacks what does not pass from token to token.
    Models without an output embedding give their states instead.
    """
    embedding = base.get_input_embeddings()
    with torch.inference_mode(False), torch.enable_grad():
        shift: Any = None

        def add(_: Any, __: Any, output: Tensor) -> Tensor:
            nonlocal shift
            if shift is None:
                shift = output.new_zeros(output.shape[-1]).requires_grad_()
            return output + shift

        hook = embedding.register_forward_hook(add)
        try:
            outputs, columns, source, target = run()
        finally:
            hook.remove()
        parts = []
        for output, count in zip(outputs, columns, strict=True):
            parts.append(_values(output)[:, -count:].flatten(0, 1))
        order = target.argsort()
        values = _normal(outputs[0], torch.cat(parts)[source[order]])
        if hasattr(outputs[0], "logits"):
            chosen = texts.completion_ids.flatten()[target[order]]
            total = values.gather(-1, chosen[:, None]).sum()
        else:
            total = (values * torch.linspace(-1, 1, values.shape[-1], device=values.device)).sum()
        (gradient,) = torch.autograd.grad(total, shift)
    return [values.detach(), gradient.float()]


def _values(output: Any) -> Tensor:
    return output.logits if hasattr(output, "logits") else output.last_hidden_state


def _normal(output: Any, values: Tensor) -> Tensor:
    """Log-probs of logits; states as they are; both in float32 at least."""
    values = values.to(torch.promote_types(values.dtype, torch.float32))
    return values.log_softmax(-1) if hasattr(output, "logits") else values


# --- trials --------------------------------------------------------------------------------------


def _gap(found: Tensor, expected: Tensor, size: Tensor) -> float:
    """Distance of two tensors, relative to a third's size."""
    gap = (found - expected).square().mean().sqrt() / size.square().mean().sqrt().clamp(min=1e-30)
    return gap.item()


def _why_not(base: Any, way: str, gaps: Callable[[], list[float]]) -> str | None:
    """Why a model is not run in this way; ``None`` if it can be."""
    try:
        found = gaps()
    except NotDecodable as reason:
        return str(reason)
    except Exception as error:  # a model is a program, and may raise anything where it is strange
        return "it " + _failure(error, way)
    limits = HALF if _is_half(base) else FLOAT32
    for what, gap, close in zip(("values", "gradients"), found, limits, strict=False):
        if not gap < close:
            return f"{KINDS[way]} give other {what}, by {gap:.1e} of theirs"
    return None


def _failure(error: Exception, way: str) -> str:
    if is_full(error):  # which says nothing about the model
        raise error
    line = (str(error).splitlines() or [""])[0]
    return f"cannot be run on {KINDS[way]} ({type(error).__name__}{line and ': '}{line})"


def _is_half(base: Any) -> bool:
    own = base.get_input_embeddings().weight.dtype
    return torch.finfo(base.__dict__.get("_gspo_computed", own)).bits < 32


@contextmanager
def _closed(base: Any) -> Iterator[None]:
    """The model with the attention it was loaded with: what all ways are compared with."""
    name = getattr(base.config, "_attn_implementation", None)
    try:
        if name is not None and name.startswith(PREFIX):
            base.config._attn_implementation = name.removeprefix(PREFIX)
        yield
    finally:
        base.config._attn_implementation = name


@contextmanager
def _trial(base: Any, device: torch.device) -> Iterator[list[tuple[Any, str, int]]]:
    """Compute as exactly as the weights allow, with windows that the texts reach beyond.

    What they are otherwise is given to the block.
    """
    changed: list[tuple[Any, str, int]] = []
    longest = base.__dict__.get("_gspo_longest", 0)  # of the run's texts, where that is known
    places = [text_config(base), *base.modules()]
    for place in {
        id(x): x for x in [*places, *(getattr(m, "config", None) for m in places)]
    }.values():
        for name, value in list(getattr(place, "__dict__", {}).items()):
            if not isinstance(value, int) or value <= WINDOW:
                continue
            if name.endswith(WINDOWS) or (name.endswith(FLOORS) and value < longest):
                changed.append((place, name, value))
    precision = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("highest")
        short = [(place, name, WINDOW) for place, name, _ in changed]
        with _set(short), torch.autocast(device.type, enabled=False):
            yield changed
    finally:
        torch.set_float32_matmul_precision(precision)


@contextmanager
def _set(values: list[tuple[Any, str, int]]) -> Iterator[None]:
    """Attributes of objects as they are given."""
    before = [(place, name, getattr(place, name)) for place, name, _ in values]
    try:
        for place, name, value in values:
            setattr(place, name, value)
        yield
    finally:
        for place, name, value in before:
            setattr(place, name, value)


def _texts(base: Any, device: torch.device) -> Texts:
    """Texts of random tokens that mean nothing special to the model."""
    config = text_config(base)
    most = getattr(config, "max_position_embeddings", None) or 1000
    shrink = min(1.0, most / (PROMPTS[0] + COMPLETIONS[0]))  # a model that reads a few tokens only
    prompts = [max(1, int(length * shrink)) for length in PROMPTS]
    completions = [max(1, int(length * shrink)) for length in COMPLETIONS]
    ids = some_ids(base, 6, prompts[0] + completions[0])  # no two rows alike
    pad = getattr(config, "pad_token_id", None)
    if isinstance(pad, int) and pad < base.get_input_embeddings().weight.shape[0]:
        ids[0, prompts[0] // 2] = max(0, pad)  # often the end of a turn, so that texts hold it, too
    prompt_mask = torch.arange(prompts[0]) >= prompts[0] - torch.tensor(prompts)[:, None]
    on = torch.arange(completions[0]) < torch.tensor(completions)[:, None]
    texts = (
        ids[:2, : prompts[0]].masked_fill(~prompt_mask, 0).repeat_interleave(2, 0),
        prompt_mask.repeat_interleave(2, 0),
        ids[2:, : completions[0]].masked_fill(~on, 0),
        on,
    )
    return Texts(*(x.to(device) for x in texts))


# --- sampling ------------------------------------------------------------------------------------


def _try_decoding(model: Any, base: Any, device: torch.device) -> Found:
    texts = _texts(base, device)
    on = texts.on
    lengths = on.sum(1).tolist()
    uniform = torch.rand(on.shape, generator=torch.Generator().manual_seed(0)).to(device)
    groups = torch.tensor([0, 0, 1, 1], device=device)
    nothing = [-1]  # ends a row but its length: left to chance, all of a prompt could end at once
    policy = SimpleNamespace(model=model, eos_ids=nothing, pad_id=0)
    prompts = texts.prompt_ids[::2], texts.prompt_mask[::2]

    def stops(first: int) -> Callable[[int, int], bool]:
        """Ends rows, counted from ``first`` on, at their lengths: some leave as others run on."""
        drawn = [0] * len(lengths)

        def stopped(row: int, _: int) -> bool:
            drawn[first + row] += 1
            return drawn[first + row] == lengths[first + row]

        return stopped

    def grouped() -> Any:
        rows = [ids[keep] for ids, keep in zip(*prompts, strict=True)]
        # three rows at a time: the fourth comes in where one ends
        wanted = Wanted(rows, 2, uniform, 1.0, nothing, 0, num_rows=3, stopped=stops(0))
        return GroupDecoder(model, wanted).run()

    def plainly(size: int) -> Any:
        pieces = [
            decode_plainly(policy, *prompts, rows, numbers, 1.0, stops(i * size), alone=size == 1)
            for i, (rows, numbers) in enumerate(
                zip(groups.split(size), uniform.split(size), strict=True)
            )
        ]
        return tuple(map(torch.cat, zip(*pieces, strict=True)))

    def gaps(run: Callable[[], Any]) -> list[float]:
        ids, logprobs = run()
        batch = texts.prompt_ids, texts.prompt_mask, ids, on, on
        with _closed(base):
            outputs, columns, _, _ = run_alone(model, *batch)
        plain = torch.cat([o.logits[0, -c:] for o, c in zip(outputs, columns, strict=True)])
        plain = plain.to(torch.promote_types(plain.dtype, torch.float32)).log_softmax(-1)
        exact = plain.gather(-1, ids[on][:, None])[:, 0]
        return [_gap(logprobs[on], exact, plain.std(-1))]

    reasons: list[str] = []
    with _trial(base, device), mode_kept(model), torch.no_grad():
        model.eval()
        ways = {
            "grouped": (grouped, " decodes with a cache of its own, which is slower: "),
            "batched": (lambda: plainly(4), " decodes one row at a time, which is slow: "),
            "alone": (lambda: plainly(1), " cannot be sampled from: "),
        }
        for way, (run, consequence) in ways.items():
            reason = _why_not(base, way, lambda: gaps(run))  # noqa: B023
            if reason is None:
                return Found(way, tuple(reasons))
            reasons.append(consequence + reason)
    raise ValueError(f"policy.path: {type(base).__name__}{reasons[-1]}")
