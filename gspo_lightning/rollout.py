"""PromptBatch, Samples and Rollout: the data that flows.

Decides the layout (row = p * G + g, prompts padded on the left, completions on the right), which
completion tokens count, and how a rollout is cut into mini-batches and micro-batches. A value is
built whole, checked once, sliced, and never written into.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any, Self

import torch
from torch import Tensor
from torch.nn.functional import pad

from gspo_lightning.micro_batches import cut_rows


def _check(name: str, tensor: Tensor, shape: tuple[int, ...], dtype: torch.dtype | None = None):
    """Raise a ValueError that names the field unless shape and dtype are as promised."""
    if tuple(tensor.shape) != shape:
        raise ValueError(f"{name} must have shape {shape}, got {tuple(tensor.shape)}")
    if dtype is not None and tensor.dtype != dtype:
        raise ValueError(f"{name} must have dtype {dtype}, got {tensor.dtype}")


@dataclass(frozen=True, eq=False)
class Movable:
    """Gives a dataclass of tensors the ``to`` that Lightning moves batches with."""

    def to(self, device: torch.device | str | int, non_blocking: bool = False) -> Self:
        """Return the same value with every tensor on ``device``."""

        def move(value: Any) -> Any:
            if isinstance(value, Tensor):
                return value.to(device, non_blocking=non_blocking)
            if isinstance(value, dict):
                return {name: move(part) for name, part in value.items()}
            return value  # rows and texts stay as they are

        return replace(self, **{f.name: move(getattr(self, f.name)) for f in fields(self)})


@dataclass(frozen=True, eq=False)
class PromptBatch(Movable):
    """The prompts of one rollout.

    Attributes:
        prompt_ids: Token ids, padded on the left, (P, L) int64.
        prompt_mask: True on real tokens, (P, L) bool.
        rows: The data row each prompt came from, length P.

    Raises:
        ValueError: If a shape or dtype does not fit; the message names the field.
    """

    prompt_ids: Tensor
    prompt_mask: Tensor
    rows: list[dict]

    def __post_init__(self) -> None:
        if self.prompt_ids.ndim != 2:
            raise ValueError(f"prompt_ids must be (P, L), got {tuple(self.prompt_ids.shape)}")
        _check("prompt_mask", self.prompt_mask, tuple(self.prompt_ids.shape), torch.bool)
        if len(self.rows) != len(self.prompt_ids):
            raise ValueError(
                f"rows must have one entry per prompt, {len(self.prompt_ids)}, got {len(self.rows)}"
            )

    def __len__(self) -> int:
        return len(self.prompt_ids)


@dataclass(frozen=True, eq=False)
class Samples(Movable):
    """G completions for each of P prompts; row p * G + g is completion g of prompt p.

    Attributes:
        prompt_ids: Token ids, padded on the left, each prompt repeated G times, (B, L) int64.
        prompt_mask: True on real prompt tokens, (B, L) bool.
        completion_ids: Token ids, padded on the right, (B, T) int64.
        mask: True on completion tokens up to and including the one that ends it, (B, T) bool;
            False on those that an environment said between them.
        finished: True where the policy ended the completion itself, or its environment did, (B,)
            bool.
        rows: The data row behind each completion, length B.
        texts: The completions as they continue their prompts, without what ended them, length B.
        group_size: G. Rows g * G to g * G + G - 1 share a prompt; 1 promises nothing.
        logprobs: Log-softmax(logits / temperature) of each token as the sampler's own forward pass
            saw it, nats, (B, T) float32, 0 under a False mask; None where a sampler gives none.
        special_texts: The texts with special tokens kept; None where a sampler gives none.
        waited: Seconds that the sampler waited for an environment; None without one.

    Raises:
        ValueError: If a shape or dtype does not fit; the message names the field.
    """

    prompt_ids: Tensor
    prompt_mask: Tensor
    completion_ids: Tensor
    mask: Tensor
    finished: Tensor
    rows: list[dict]
    texts: list[str]
    group_size: int
    logprobs: Tensor | None = field(kw_only=True, default=None)
    special_texts: list[str] | None = field(kw_only=True, default=None)
    waited: float | None = field(kw_only=True, default=None)

    def __post_init__(self) -> None:
        if self.completion_ids.ndim != 2:
            shape = tuple(self.completion_ids.shape)
            raise ValueError(f"completion_ids must be (B, T), got {shape}")
        if self.prompt_ids.ndim != 2:
            raise ValueError(f"prompt_ids must be (B, L), got {tuple(self.prompt_ids.shape)}")
        size, length = self.completion_ids.shape
        _check("prompt_ids", self.prompt_ids, (size, self.prompt_ids.shape[1]))
        _check("prompt_mask", self.prompt_mask, tuple(self.prompt_ids.shape), torch.bool)
        _check("mask", self.mask, (size, length), torch.bool)
        _check("finished", self.finished, (size,), torch.bool)
        if self.logprobs is not None:
            _check("logprobs", self.logprobs, (size, length), torch.float32)
        for name in ("rows", "texts"):
            if len(getattr(self, name)) != size:
                raise ValueError(f"{name} must have length {size}, got {len(getattr(self, name))}")
        if self.group_size < 1 or size % self.group_size:
            raise ValueError(f"group_size must divide {size} rows, got {self.group_size}")

    def __len__(self) -> int:
        return len(self.completion_ids)

    @property
    def lengths(self) -> Tensor:
        """Tokens up to the last that was drawn, those of an environment included, (B,) int64."""
        columns = torch.arange(1, self.mask.shape[1] + 1, device=self.mask.device)
        return torch.where(self.mask, columns, 0).amax(1)

    def select(self, index: Tensor) -> Self:
        """Return the given rows, every quantity of a row with it.

        Args:
            index: Row numbers in the wanted order, int64.

        Returns:
            The same type; ``group_size`` is kept if ``index`` names whole groups in order, else 1.
        """
        numbers = index.tolist()
        index = index.to(self.completion_ids.device)

        def pick(value: Any) -> Any:
            if isinstance(value, Tensor):
                return value[index]
            if isinstance(value, dict):
                return {name: pick(part) for name, part in value.items()}
            return [value[i] for i in numbers] if isinstance(value, list) else value

        # A group is consecutive rows from its first one on: code that shares a prompt trusts that.
        size = self.group_size
        firsts = [first for first in numbers[::size] if first % size == 0]
        whole = numbers == [first + g for first in firsts for g in range(size)]
        picked = {f.name: pick(getattr(self, f.name)) for f in fields(self)}
        return replace(self, **(picked | {"group_size": size if whole else 1}))

    def minibatch_indices(self, count: int, generator: torch.Generator) -> list[Tensor]:
        """Shuffle whole groups and cut the rows into equal parts.

        Args:
            count: Number of mini-batches; must divide the number of rows.
            generator: Source of the order (CPU), seeded by ``stream_seed``.

        Returns:
            ``count`` index tensors, (B / count,) int64; together every row exactly once.

        Raises:
            ValueError: If the rows cannot be cut into ``count`` equal parts.
        """
        size = len(self)
        if count < 1 or size % count:
            raise ValueError(
                f"num_minibatches must divide the {size} rows of a rollout, got {count}"
            )
        # Groups stay together, so that a mini-batch can compute each prompt once.
        order = torch.randperm(size // self.group_size, generator=generator)
        rows = order[:, None] * self.group_size + torch.arange(self.group_size)
        return list(rows.flatten().chunk(count))

    def micro_batch_indices(self, size: int | None, tokens: int | None = None) -> list[Tensor]:
        """Cut the rows into pieces that one forward and backward pass takes.

        Limits and errors are those of ``micro_batches.cut_rows``.

        Returns:
            Row numbers, int64; together every row exactly once.
        """
        prompts, lengths = self.prompt_mask.sum(1).tolist(), self.lengths.tolist()
        pieces = cut_rows(prompts, lengths, self.group_size, size, tokens)
        return [torch.tensor(piece) for piece in pieces]

    def micro_batches(self, size: int | None, tokens: int | None = None) -> list[Self]:
        """Return the pieces of ``micro_batch_indices``."""
        return [self.select(rows) for rows in self.micro_batch_indices(size, tokens)]


@dataclass(frozen=True, eq=False)
class Rollout(Samples):
    """Scored samples, everything an update needs.

    ``mask`` here selects the tokens that train: rows left out of the loss are False throughout.

    Attributes:
        old_logprobs: Log-probs under the policy that sampled, nats, (B, T) float32.
        old_known: False in rows whose ``old_logprobs`` were not computed, since the first update's
            own forward pass replaces them, (B,) bool; None where all are known.
        mismatch_weights: What the policy loss of a row is multiplied with, in each of its columns,
            (B, T); None is 1. See ``mismatch.row_weights``.
        ref_logprobs: Log-probs under the frozen reference, nats, (B, T) float32, or None.
        rewards: Weighted sum of the reward terms, NaN where missing, (B,).
        reward_parts: Each term by name, unweighted, (B,) each.
        advantages: Advantage of each token, (B, T).
        values: What a critic expected before each token, (B, T), or None without one.
        returns: What it should have expected, NaN where the reward is missing, (B, T), or None.
        picked: Tokens that the objective treats apart, (B, T) bool; None where it picks none.
    """

    old_logprobs: Tensor
    ref_logprobs: Tensor | None
    rewards: Tensor
    reward_parts: dict[str, Tensor]
    advantages: Tensor
    values: Tensor | None = None
    returns: Tensor | None = None
    old_known: Tensor | None = None
    picked: Tensor | None = None
    mismatch_weights: Tensor | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        size, length = self.completion_ids.shape
        _check("old_logprobs", self.old_logprobs, (size, length))
        for name in ("ref_logprobs", "values", "returns", "picked", "mismatch_weights"):
            if getattr(self, name) is not None:
                _check(name, getattr(self, name), (size, length))
        if self.old_known is not None:
            _check("old_known", self.old_known, (size,), torch.bool)
        _check("rewards", self.rewards, (size,))
        for name, part in self.reward_parts.items():
            _check(f"reward_parts[{name!r}]", part, (size,))
        _check("advantages", self.advantages, (size, length))

    def minibatches(self, count: int, generator: torch.Generator) -> list[Self]:
        """Return the mini-batches of ``minibatch_indices``."""
        return [self.select(index) for index in self.minibatch_indices(count, generator)]


def join_samples(parts: Sequence[Samples]) -> Samples:
    """Put samples under one another, padded to the longest prompt and completion.

    Args:
        parts: Samples of the same group size.

    Returns:
        All rows in order. Added padding is 0 under a False mask. ``logprobs`` only if all have it.
    """
    width = max(part.prompt_ids.shape[1] for part in parts)
    length = max(part.completion_ids.shape[1] for part in parts)

    def stack(name: str, left: bool) -> Tensor:
        padded = []
        for tensor in (getattr(part, name) for part in parts):
            missing = (width if left else length) - tensor.shape[1]
            padded.append(pad(tensor, (missing, 0) if left else (0, missing)))
        return torch.cat(padded)

    with_logprobs = all(part.logprobs is not None for part in parts)
    special = [text for part in parts for text in part.special_texts or ()]
    return Samples(
        prompt_ids=stack("prompt_ids", left=True),
        prompt_mask=stack("prompt_mask", left=True),
        completion_ids=stack("completion_ids", left=False),
        mask=stack("mask", left=False),
        finished=torch.cat([part.finished for part in parts]),
        rows=[row for part in parts for row in part.rows],
        texts=[text for part in parts for text in part.texts],
        group_size=parts[0].group_size,
        logprobs=stack("logprobs", left=False) if with_logprobs else None,
        special_texts=special if len(special) == sum(map(len, parts)) else None,
    )


def completion_mask(completion_ids: Tensor, eos_ids: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Select the tokens up to and including the first end of sequence.

    Built from the position of that token, never from "is not padding", so that the padding token
    may be the end-of-sequence token.

    Args:
        completion_ids: Generated ids, padded on the right, (B, T) int64.
        eos_ids: All ids that end a sequence.

    Returns:
        ``mask`` (B, T) bool and ``finished`` (B,) bool, False where no end was generated.

    >>> mask, finished = completion_mask(torch.tensor([[5, 9, 9], [5, 6, 7]]), eos_ids=[9])
    >>> mask.int().tolist(), finished.tolist()
    ([[1, 1, 0], [1, 1, 1]], [True, False])
    """
    ends = torch.tensor(list(eos_ids), dtype=completion_ids.dtype, device=completion_ids.device)
    is_end = torch.isin(completion_ids, ends)
    ended_before = is_end.cumsum(dim=1) - is_end.long()
    return ended_before == 0, is_end.any(dim=1)


def stream_seed(seed: int, rollout: int, rank: int, purpose: str) -> int:
    """Name a random stream; nothing has to be saved to draw the same numbers after a restart.

    Args:
        seed: The run's seed.
        rollout: Index of the rollout, from 0.
        rank: Rank of the process.
        purpose: What the numbers are for, such as "sample" or "minibatches/0".

    Returns:
        A seed in [0, 2**63), the same in every process (``hash`` would not be).

    >>> stream_seed(0, 3, 0, "sample") == stream_seed(0, 3, 0, "sample")
    True
    >>> stream_seed(0, 3, 0, "sample") == stream_seed(0, 3, 1, "sample")
    False
    """
    digest = hashlib.sha256(f"{seed}/{rollout}/{rank}/{purpose}".encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1
