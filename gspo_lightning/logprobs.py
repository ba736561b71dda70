"""Log-probs and entropy of completions under a causal language model.

Decides what "the log-prob of a token" is: log-softmax of the logits over the temperature, float32,
position ids counted in each text from its first real token. Decides also how the model is run:
packed (``packing``) where its attention is open to us, otherwise padded, a group's prompt in a
cache that its completions share. Leaves out loading the model and the mode it is in (dropout must
be off); any model with the forward of a Hugging Face causal language model will do.
"""

import logging
from contextlib import nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from gspo_lightning.engine.head import Head, find_head, token_logprobs
from gspo_lightning.engine.packed_attention import LAYERS, PREFIX
from gspo_lightning.engine.packing import Row, pack
from gspo_lightning.engine.padded import run_padded, unwrapped
from gspo_lightning.rollout import Samples

__all__ = [
    "LogProbs",
    "States",
    "completion_logprobs",
    "layer_states",
    "predicting_states",
    "samples_logprobs",
]

LOG = logging.getLogger(__name__)
PROBE = (4, 3)  # tokens of prompt and completion that a model is tried on


class LogProbs(NamedTuple):
    """Per-token results, 0 under a False mask.

    Attributes:
        logprobs: Log-prob of each completion token, nats, (B, T) float32.
        entropy: Entropy of the distribution each token was drawn from, nats, (B, T), or None.
    """

    logprobs: Tensor
    entropy: Tensor | None


class States(NamedTuple):
    """What the wanted tokens are predicted from.

    Attributes:
        states: Hidden states (n, D), or logits (n, V) if there is no head.
        target: Where the tokens stand in a flattened (B, T), (n,).
        head: Makes logits of hidden states, or None.
    """

    states: Tensor
    target: Tensor
    head: Head | None


def completion_logprobs(
    model: nn.Module,
    prompt_ids: Tensor,
    prompt_mask: Tensor,
    completion_ids: Tensor,
    mask: Tensor,
    *,
    temperature: float = 1.0,
    group_size: int = 1,
    chunk_size: int | None = None,
    with_entropy: bool = False,
    packed: bool = True,
) -> LogProbs:
    """Compute the log-prob of each completion token, with a gradient where gradients are on.

    Args:
        model: Causal language model; ``model(input_ids, attention_mask, ...)`` returns ``.logits``.
        prompt_ids: Left-padded, (B, L) int64.
        prompt_mask: True on real prompt tokens, (B, L) bool; the last column is all True.
        completion_ids: Right-padded, (B, T) int64.
        mask: Tokens whose log-prob is wanted, (B, T) bool.
        temperature: Sampling temperature the logits are divided by, > 0.
        group_size: Rows g * G to g * G + G - 1 share a prompt, for models that cannot be packed:
            it is then computed once per group, unless the model checkpoints its activations
            (Hugging Face models drop their cache then). Packed rows find out by themselves.
        chunk_size: Token positions whose float32 logits exist at the same time; ``None`` is 256
            on a CPU and 1024 elsewhere.
        with_entropy: Also return the exact entropy, with its gradient.
        packed: Pack rows if the model can be packed. False pads them: the same numbers with other
            rounding.

    Returns:
        (B, T) results in float32 (float64 for a float64 model).

    Raises:
        ValueError: If an argument is out of range or the prompts are not left-padded.
    """
    if temperature <= 0:
        raise ValueError(f"temperature must be > 0, got {temperature}")
    if chunk_size is not None and chunk_size < 1:
        raise ValueError(f"chunk_size must be at least 1 token, got {chunk_size}")
    found = predicting_states(
        model,
        prompt_ids,
        prompt_mask,
        completion_ids,
        mask,
        group_size=group_size,
        packed=packed,
    )
    if len(found.target) == 0:  # zeros, but of a graph with all parameters
        logits = found.states if found.head is None else found.head.logits(found.states)
        nothing = logits.sum().to(torch.promote_types(logits.dtype, torch.float32)) * 0
        nothing = nothing.expand(mask.shape)
        return LogProbs(nothing, nothing if with_entropy else None)
    chosen, entropy = token_logprobs(
        found.states,
        completion_ids.flatten()[found.target],
        found.head,
        temperature=temperature,
        with_entropy=with_entropy,
        chunk_size=chunk_size,
    )

    def spread(values: Tensor) -> Tensor:
        zeros = values.new_zeros(mask.numel())
        return zeros.index_copy(0, found.target, values).view(mask.shape)

    return LogProbs(spread(chosen), None if entropy is None else spread(entropy))


def samples_logprobs(
    model: nn.Module,
    samples: Samples,
    temperature: float,
    *,
    with_entropy: bool = False,
    packed: bool = True,
) -> LogProbs:
    """The log-probs of samples under a model on their device; see :func:`completion_logprobs`."""
    return completion_logprobs(
        model,
        samples.prompt_ids,
        samples.prompt_mask,
        samples.completion_ids,
        samples.mask,
        temperature=temperature,
        group_size=samples.group_size,
        with_entropy=with_entropy,
        packed=packed,
    )


def predicting_states(
    model: nn.Module,
    prompt_ids: Tensor,
    prompt_mask: Tensor,
    completion_ids: Tensor,
    mask: Tensor,
    *,
    group_size: int = 1,
    packed: bool = True,
) -> States:
    """Run the model, without its output embedding if that can be had apart.

    Arguments and errors are those of :func:`completion_logprobs`.

    Returns:
        One state for each wanted token. With no wanted token at all ``target`` is empty and
        ``states`` has one row, which keeps the graph.
    """
    _check_batch(prompt_mask, mask, group_size)
    context = _context(mask)
    head = _head(model, prompt_ids.device)
    catching: Any = nullcontext([]) if head is None else head.caught()
    packed = packed and _can_pack(model, prompt_ids.device)
    batch = prompt_ids, prompt_mask, completion_ids, context, mask
    with catching as caught:
        output, source, target, columns = _run(model, *batch, group_size, packed)
    states = caught[-1] if head is not None else output.logits
    states = states[:, -columns:].flatten(0, 1)
    if len(target) == 0:
        source = source.new_zeros(1)
    return States(states[source], target, head)


def layer_states(
    layers: nn.Module,
    prompt_ids: Tensor,
    prompt_mask: Tensor,
    completion_ids: Tensor,
    mask: Tensor,
    *,
    group_size: int = 1,
) -> States:
    """Run layers without an output embedding, ``layers(...)`` returns ``.last_hidden_state``.

    Arguments and errors are otherwise those of :func:`completion_logprobs`.

    Returns:
        As :func:`predicting_states`.
    """
    _check_batch(prompt_mask, mask, group_size)
    context = _context(mask)
    packed = _can_pack(layers, prompt_ids.device)
    batch = prompt_ids, prompt_mask, completion_ids, context, mask
    output, source, target, columns = _run(layers, *batch, group_size, packed)
    states = output.last_hidden_state[:, -columns:].flatten(0, 1)
    return States(states[source if len(target) else source.new_zeros(1)], target, None)


def _check_batch(prompt_mask: Tensor, mask: Tensor, group_size: int) -> None:
    if group_size < 1 or len(mask) % group_size:
        raise ValueError(f"group_size must divide the {len(mask)} rows, got {group_size}")
    if not prompt_mask[:, -1].all():
        raise ValueError("prompt_mask must end in True in every row: prompts are left-padded")


def _context(mask: Tensor) -> Tensor:
    # a token before a wanted one is context even if it does not count itself
    return mask.flip(1).cumsum(1).flip(1) > 0


def _run(
    model: nn.Module,
    prompt_ids: Tensor,
    prompt_mask: Tensor,
    completion_ids: Tensor,
    context: Tensor,
    keep: Tensor,
    group_size: int,
    packed: bool,
) -> tuple[Any, Tensor, Tensor, int]:
    """What ``run_padded`` returns, or the same of a packed row."""
    # any id may stand in the padding, also one without an embedding
    completion_ids = torch.where(context, completion_ids, 0)
    prompt_ids = torch.where(prompt_mask, prompt_ids, 0)
    batch = prompt_ids, prompt_mask, completion_ids, context, keep
    if not packed:
        return run_padded(model, *batch, group_size)
    row = pack(*batch)
    return run_packed(model, row), row.source, row.target, row.ids.shape[1]


def run_packed(model: nn.Module, row: Row, **options: Any) -> Any:
    """Run a model on a packed row; it must have an open attention."""
    return model(
        input_ids=row.ids,
        # of four dimensions: passed on as it is, so that no mask is made, and unused
        attention_mask=row.ids.new_ones(1, 1, 1, 1),
        position_ids=row.position_ids,
        use_cache=False,
        attend=row.attend,
        **options,
    )


# --- what a model can do, tried once -------------------------------------------------------------


def _head(model: Any, device: torch.device) -> Head | None:
    """The model's head, if it can be had apart; where it cannot, that is said once."""
    base = unwrapped(model)
    if not hasattr(base, "get_input_embeddings"):
        return None
    found = find_head(base, _probe_ids(base, 1, sum(PROBE)).to(device))
    if isinstance(found, Head):
        return found
    _say_once(base, f"the logits of all positions are in memory at once: {found}")
    return None


def _can_pack(model: Any, device: torch.device) -> bool:
    """Whether a model can be run on packed rows; where it cannot, that is said once."""
    base = unwrapped(model)
    config = getattr(base, "config", None)
    name = str(getattr(config, "_attn_implementation", None))
    kinds = set(getattr(config, "layer_types", None) or ())
    if config is None:
        return False
    if not name.startswith(PREFIX):
        reason = f"its attention ({name}) takes none of ours"
    elif not kinds <= LAYERS:
        reason = f"it has layers of {', '.join(sorted(kinds - LAYERS))}"
    else:
        if "_gspo_packs" not in base.__dict__:
            base.__dict__["_gspo_packs"] = _packs(model, base, device)
        if base.__dict__["_gspo_packs"] is True:
            return True
        reason = base.__dict__["_gspo_packs"]
    _say_once(base, f"rows are padded, not packed: {reason}")
    return False


@torch.no_grad()
def _packs(model: Any, base: Any, device: torch.device) -> bool | str:
    """Run three short texts packed and one by one: True if that gives the same, else why not."""
    ids = _probe_ids(base, 3, sum(PROBE)).to(device)
    ids[1, : PROBE[0]] = ids[0, : PROBE[0]]  # two texts of one prompt, one of another
    ids[2, :2] = 0
    prompt_mask = torch.ones(3, PROBE[0], dtype=torch.bool, device=device)
    prompt_mask[2, :2] = False
    on = torch.ones(3, PROBE[1], dtype=torch.bool, device=device)
    row = pack(ids[:, : PROBE[0]], prompt_mask, ids[:, PROBE[0] :], on, on)
    try:
        with torch.autocast(device.type, enabled=False):  # the weights' own precision
            together = run_packed(model, row, output_hidden_states=True).hidden_states[-1]
            alone = [
                model(input_ids=text[None], use_cache=False, output_hidden_states=True)
                for text in (ids[0], ids[1], ids[2, 2:])
            ]
    except (AttributeError, IndexError, RuntimeError, TypeError, ValueError) as error:
        if "memory" in str(error):  # of a full device, not of this model
            raise
        return f"it cannot be run on packed rows ({error})"
    expected = torch.cat([output.hidden_states[-1][0, -PROBE[1] - 1 : -1] for output in alone])
    distance = (together[0, row.source] - expected).float().norm() / expected.float().norm()
    # an attention that reaches into other texts is wrong by far more than rounding
    if distance < (1e-3 if torch.finfo(expected.dtype).bits >= 32 else 0.1):
        return True
    return f"packed rows give other values, by {distance:.1e} of theirs"


def _probe_ids(base: Any, rows: int, columns: int) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    vocabulary = base.get_input_embeddings().weight.shape[0]
    return torch.randint(vocabulary, (rows, columns), generator=generator)


def _say_once(base: Any, message: str) -> None:
    said = base.__dict__.setdefault("_gspo_said", set())
    if message not in said:
        said.add(message)
        LOG.warning("%s: %s", type(base).__name__, message)
