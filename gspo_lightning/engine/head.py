"""From hidden states to log-probs and entropy, never with all logits at once.

Decides how a model's output embedding is had apart from the rest of its forward, and computes its
logits a chunk at a time, again in the backward pass. What a model does to its logits afterwards
(caps, scales) is not written here once more: the model's own forward does it, on our logits.
"""

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from gspo_lightning.engine.linear_logprobs import LinearLogprobs, Logits, is_plain

CHUNK = 256  # tokens whose float32 logits exist at the same time; on a CPU more are no faster
CHUNK_ELSEWHERE = 1024  # a GPU is only busy with larger products
CHUNK_BYTES = 2**27  # of a chunk's logits on a CPU at most: large vocabularies take fewer tokens
# What the CPU's allocator, and CUDA and its libraries outside of torch's own allocator, say in a
# plain RuntimeError when memory is short: cublasCreate returns CUBLAS_STATUS_ALLOC_FAILED.
FULL = (
    "out of memory",
    "can't allocate memory",
    "cannot allocate memory",
    "not enough memory",
    "status_alloc_failed",
)


class Head:
    """The output embedding of a causal language model and what its forward does behind it.

    Args:
        base: A Hugging Face causal language model, out of its wrappers.
        ids: Tokens to try it on, (1, n).

    Attributes:
        embedding: The output embedding.
        finish: What makes the model's logits of those of the embedding, (n, V) to (n, V), or
            ``None`` where they are its logits.
    """

    def __init__(self, base: Any, ids: Tensor) -> None:
        self.base = base
        self.ids = ids
        self.embedding: nn.Module = base.get_output_embeddings()
        self.decoder: nn.Module = base.get_decoder()
        self.finish: Logits | None = self._own_finish

    @contextmanager
    def caught(self) -> Iterator[list[Tensor]]:
        """Forward passes within give their hidden states to the list, and no logits worth a name.

        Yields:
            One entry a pass: what the output embedding would have been applied to.
        """
        states: list[Tensor] = []

        def catch(hidden: Tensor) -> Tensor:
            states.append(hidden)
            return hidden.new_zeros(*hidden.shape[:-1], 1)

        with _replaced(self.embedding, catch):
            yield states

    def logits(self, hidden: Tensor) -> Tensor:
        """The model's logits, (n, V), of hidden states (n, D)."""
        raw = self.embedding(hidden)
        return raw if self.finish is None else self.finish(raw)

    def _own_finish(self, raw: Tensor) -> Tensor:
        """Run the model's forward around given logits, its decoder and embedding left out."""
        with (
            _replaced(self.decoder, lambda *_, **__: self.decoded),
            _replaced(self.embedding, lambda _: raw[None]),
        ):
            return self.base.forward(input_ids=self.ids, use_cache=False).logits[0]

    @torch.no_grad()
    def works(self) -> bool:
        """Try both ways on a few tokens, and see whether ``finish`` is needed."""
        outputs: list[Any] = []
        hook = self.decoder.register_forward_hook(lambda _, __, output: outputs.append(output))
        try:
            expected = self.base(input_ids=self.ids, use_cache=False).logits[0]
            with self.caught() as states:
                self.base(input_ids=self.ids, use_cache=False)
        finally:
            hook.remove()
        if len(states) != 1 or not outputs or states[0].shape[:2] != self.ids.shape:
            return False
        self.decoded = copy.copy(outputs[0])
        # zeros: logits that come from the decoder's states past the embedding come out wrong and
        # are seen below
        self.decoded.last_hidden_state = torch.zeros_like(outputs[0].last_hidden_state)
        raw = self.embedding(states[0][0])
        finished = self._own_finish(raw.clone())
        # equal numbers may be rounding's chance: `finish` is left out only if it returns its input
        same = finished.dtype == raw.dtype and torch.equal(finished, raw)
        if same and self._own_finish(raw).data_ptr() == raw.data_ptr():
            self.finish = None
        return finished.shape == expected.shape and torch.allclose(
            finished.float(), expected.float(), rtol=1e-5, atol=1e-5
        )


def find_head(base: Any, ids: Tensor) -> Head | str:
    """The :class:`Head` of a model, found once and kept with it, or why there is none."""
    found = base.__dict__.get("_gspo_head")
    embedding = getattr(base, "get_output_embeddings", lambda: None)()
    if found is None or (isinstance(found, Head) and found.embedding is not embedding):
        found = base.__dict__["_gspo_head"] = _find(base, embedding, ids)
    return found


def _find(base: Any, embedding: Any, ids: Tensor) -> Head | str:
    decoder = getattr(base, "get_decoder", lambda: None)()
    if embedding is None or decoder is None or decoder is base:
        return "it has no output embedding of its own"
    head = Head(base, ids)
    try:
        with torch.autocast(ids.device.type, enabled=False):
            works = head.works()
        return head if works else "its logits come from more than its output embedding"
    except (AttributeError, IndexError, RuntimeError, TypeError, ValueError) as error:
        if is_full(error):  # which says nothing about the model
            raise
        return f"its output embedding cannot be had apart ({error})"


def is_full(error: BaseException) -> bool:
    """Whether an error says that the device is full; "a single memory location" does not."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    if not isinstance(error, RuntimeError):
        return False
    text = str(error).lower()
    if any(words in text for words in FULL):
        return True
    # A recording of a CUDA graph that an error has ended raises once more as it is closed.
    return "captur" in text and error.__context__ is not None and is_full(error.__context__)


@contextmanager
def _replaced(module: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    """Give a module another forward for a while."""
    before = module.__dict__.get("forward")
    module.forward = forward
    try:
        yield
    finally:
        del module.forward
        if before is not None:
            module.forward = before


def tokens_of_chunk(vocabulary: int, device: torch.device) -> int:
    """Tokens whose float32 logits exist at the same time."""
    if device.type != "cpu":
        return CHUNK_ELSEWHERE
    return max(1, min(CHUNK, CHUNK_BYTES // (4 * vocabulary)))


def token_logprobs(
    states: Tensor,
    ids: Tensor,
    head: Head | None,
    *,
    temperature: float,
    with_entropy: bool,
    chunk_size: int | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Log-prob of one token a row, and the entropy of what it was drawn from.

    Args:
        states: Hidden states (n, D), or without a head the logits themselves (n, V).
        ids: The tokens, (n,).
        head: Makes logits of hidden states.
        temperature: Divides the logits.
        with_entropy: Whether to return the entropy.
        chunk_size: Tokens whose float32 logits exist at the same time; ``None`` is 256 on a CPU
            (fewer where they take more than 128 MiB) and 1024 elsewhere.

    Returns:
        (n,) and (n,) or None, nats, float32 (float64 for a float64 model).
    """
    matrix = states.mT if head is None else getattr(head.embedding, "weight", states.mT)
    size = chunk_size or tokens_of_chunk(matrix.shape[0], states.device)
    if head is not None and is_plain(head.embedding):
        weight, bias = head.embedding.weight, head.embedding.bias
        options = head.finish, temperature, with_entropy, size
        logprobs, entropy = LinearLogprobs.apply(states, weight, bias, ids, *options)
        return logprobs, entropy if with_entropy else None

    def piece(states: Tensor, ids: Tensor) -> tuple[Tensor, Tensor | None]:
        logits = states if head is None else head.logits(states)
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32)) / temperature
        distribution = logits.log_softmax(dim=-1)
        chosen = distribution.gather(-1, ids[:, None]).squeeze(-1)
        return chosen, -(distribution.exp() * distribution).sum(-1) if with_entropy else None

    # split, not slices: the gradients of all chunks meet in one concatenation. Checkpointed: pieces
    # are computed again in backward, so that no float32 logits are kept.
    results = [
        checkpoint(piece, *both, use_reentrant=False, preserve_rng_state=False)
        for both in zip(states.split(size), ids.split(size), strict=True)
    ]
    chosen, entropies = zip(*results, strict=True)
    return torch.cat(chosen), torch.cat(entropies) if with_entropy else None
