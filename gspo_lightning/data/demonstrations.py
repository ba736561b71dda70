"""Demonstrations: read, checked, tokenised, served in a resumable order.

Decides how texts become batches for the warm start, and what all kinds of data have in common. The
tokenizer is the module's (``trainer.lightning_module.tokenizer``), so that no config can name two.
"""

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from lightning.pytorch import LightningDataModule
from lightning.pytorch.overrides.distributed import UnrepeatedDistributedSampler
from torch import Tensor
from torch.utils.data import DataLoader

from gspo_lightning.bounds import check_at_least
from gspo_lightning.checkpoint.fingerprints import digest
from gspo_lightning.checkpoint.ranks import check_alike, check_start
from gspo_lightning.data.stream import ResumableStream, pad
from gspo_lightning.data.tables import check_file, read_rows, text_column
from gspo_lightning.policy.chat import LONGEST_TOKEN
from gspo_lightning.policy.reads import Limits, limits
from gspo_lightning.policy.settings import settings_of
from gspo_lightning.rollout import Movable


def check_files(files: Mapping[str, str | None]) -> None:
    """Refuse files that are not there, naming the setting; ``None`` is a setting left open."""
    for key, file in files.items():
        if file is not None:
            check_file(f"data.{key}", file)


def check_kind_of_data(data: Any) -> None:
    """Raise ValueError for data that no Trainer has, or whose module learns from another kind."""
    check_attached(data)
    module = data.trainer.lightning_module
    wanted = getattr(module, "learns_from", None)
    if wanted not in (None, *(kind.__name__ for kind in type(data).__mro__)):
        raise ValueError(
            f"data: {type(module).__name__} learns from {wanted}, not from {type(data).__name__}; "
            f"set data.class_path to gspo_lightning.{wanted}"
        )


def check_attached(data: Any) -> None:
    """Raise ValueError for data that is used by itself: tokenizer and ranks are of a Trainer."""
    if data.trainer is None:
        raise ValueError(
            f"{type(data).__name__} takes tokenizer and ranks from a Trainer; hand over the data "
            "itself, not a loader of it: trainer.fit(module, data), trainer.validate(module, data)"
        )


class TokenizedData(LightningDataModule):
    """What prompts and demonstrations have in common: files, one tokenizer, a resumable stream."""

    def __init__(self) -> None:
        super().__init__()
        self.stream: ResumableStream | None = None

    @property
    def trainer(self) -> Any:
        return self._trainer

    @trainer.setter
    def trainer(self, trainer: Any) -> None:
        """Let the data say how long a run is: a Trainer that was told no limit would go on.

        Lightning sets this before it makes 1,000 epochs of an open limit.
        """
        self._trainer = trainer
        fit_loop = getattr(trainer, "fit_loop", None)
        if fit_loop is not None and fit_loop.max_epochs is None and trainer.max_steps == -1:
            fit_loop.max_epochs = 1

    @property
    def tokenizer(self) -> Any:
        assert self.trainer is not None
        tokenizer = getattr(self.trainer.lightning_module, "tokenizer", None)
        if tokenizer is None:
            raise ValueError(
                f"{type(self).__name__} takes its tokenizer from the module, and "
                f"{type(self.trainer.lightning_module).__name__} has none"
            )
        return tokenizer

    def check_readable(self, where: str, ids: list[int]) -> None:
        """Refuse a text that the module's model cannot read.

        Args:
            where: Setting, file and row.
            ids: The text's.

        Raises:
            ValueError: If an id is not embedded, or there are more than the model has positions.
        """
        limit = self._limits
        if limit.ids is not None and max(ids, default=0) >= limit.ids:
            token = self.tokenizer.convert_ids_to_tokens(max(ids))
            raise ValueError(
                f"{where} holds {token!r}, id {max(ids)} of the tokenizer, and the model embeds "
                f"{limit.ids} ids; take it out of the row, or save model and tokenizer as a pair"
            )
        if limit.tokens is not None and len(ids) > limit.tokens:
            raise ValueError(
                f"{where} has {len(ids)} tokens, and the model reads {limit.tokens}; shorten the "
                "row, or take it out"
            )

    @cached_property
    def _limits(self) -> Limits:
        config = getattr(self.trainer.lightning_module, "policy_config", None)
        return Limits(None, None) if config is None else limits(config)

    def _skip_validation_unless(self, there: bool) -> None:
        if not there:  # Lightning would warn of a loader without batches
            self.trainer.limit_val_batches = 0

    def _stream(
        self, examples: list, collate: Callable, batch_size: int, num_batches: int | None, **kw: Any
    ) -> ResumableStream:
        trainer: Any = self.trainer
        one_pass = max(1, len(examples) // (batch_size * trainer.world_size))
        return ResumableStream(
            examples,
            collate,
            batch_size,
            num_batches or one_pass,
            seed=int(os.environ.get("PL_GLOBAL_SEED", 0)),  # what seed_everything set
            rank=trainer.global_rank,
            world_size=trainer.world_size,
            **kw,
        )

    def _loader(self, examples: list, collate: Callable, batch_size: int) -> DataLoader | list:
        check_attached(self)
        if not examples:
            return []
        dataset: Any = examples  # a list is a map-style dataset
        trainer: Any = self.trainer
        sampler, ranks = None, trainer.world_size
        # Fewer examples than ranks are evaluated by each of them: one without a batch would leave
        # out the evaluation, and the others would wait for it.
        if 1 < ranks <= len(examples):
            kind = UnrepeatedDistributedSampler  # none twice, so that ranks may have unequal parts
            sampler = kind(dataset, ranks, trainer.global_rank, shuffle=False)
        # Lightning makes a loader again for ``predict``, and cannot if batch_size has no keyword
        return DataLoader(dataset, batch_size=batch_size, collate_fn=collate, sampler=sampler)

    def _check_alike(self, **examples: list) -> None:
        """Refuse ranks that have read other examples, before anything depends on their number."""
        if self.trainer.world_size > 1:
            items = examples.items()
            check_alike({f"content of data.{name}": digest(map(repr, e)) for name, e in items})

    def fingerprints(self) -> dict[str, str]:
        """A mark of the training examples in their order, with all their columns."""
        assert self.stream is not None
        return {"data.path": digest(map(repr, self.stream.examples))}

    def train_dataloader(self) -> ResumableStream:
        check_attached(self)
        assert self.stream is not None
        _reopen(self.trainer, len(self.stream))
        return self.stream


def _reopen(trainer: Any, length: int) -> None:
    """Let a run that was made longer go on from the end of the shorter one.

    Lightning reads from its own checkpoints that the only epoch is over, and would train nothing.
    """
    if getattr(trainer, "ckpt_path", None) is None:
        return
    fit_loop = trainer.fit_loop
    batches, epochs = fit_loop.epoch_loop.batch_progress, fit_loop.epoch_progress
    done = batches.current.ready
    if fit_loop.max_epochs != 1 or not 0 < done < length:
        return
    batches.is_last_batch = False
    if epochs.current.processed == 1:  # saved behind the epoch
        for progress in (epochs.current, epochs.total):
            progress.processed = progress.completed = 0
        fit_loop.restarting = True  # asks the epoch's counters


class SupervisedData(TokenizedData):
    """What demonstrations and pairs have in common: a file to learn from and one held out.

    A subclass says how a file is read (``_read``) and how examples become a batch (``collate``).
    """

    collate: Callable
    shuffle = True

    def __init__(
        self,
        path: str,
        val_path: str | None,
        batch_size: int,
        num_steps: int | None,
        max_tokens: int,
    ) -> None:
        super().__init__()
        check_at_least(
            1, "data.", batch_size=batch_size, num_steps=num_steps, max_tokens=max_tokens
        )
        check_files({"path": path, "val_path": val_path})
        self.path, self.val_path = path, val_path
        self.batch_size, self.num_steps, self.max_tokens = batch_size, num_steps, max_tokens
        self.val_examples: list[tuple[list[int], list[int]]] = []

    def setup(self, stage: str) -> None:
        check_kind_of_data(self)
        check_start(self.trainer)
        if self.stream is None and stage == "fit":
            examples = self._read("data.path", self.path)
            self.stream = self._stream(
                examples, self.collate, self.batch_size, self.num_steps, shuffle=self.shuffle
            )
            self.num_steps = len(self.stream)
        if self.val_path is not None and not self.val_examples:
            self.val_examples = self._read("data.val_path", self.val_path)
        examples = [] if self.stream is None else self.stream.examples
        self._check_alike(path=examples, val_path=self.val_examples)
        self._skip_validation_unless(bool(self.val_examples))

    def _read(self, key: str, path: str) -> list[tuple[list[int], list[int]]]:
        raise NotImplementedError

    def _check_size(self, where: str, *texts: str) -> None:
        """Refuse megabytes before they are tokenised, which takes minutes."""
        size = sum(map(len, texts))
        if size > LONGEST_TOKEN * self.max_tokens:
            raise ValueError(
                f"{where} has {size:,} characters, more than data.max_tokens {self.max_tokens} can "
                "be; raise it, or shorten the row"
            )

    def val_dataloader(self) -> DataLoader | list:
        return self._loader(self.val_examples, self.collate, self.batch_size)


@dataclass(frozen=True, eq=False)
class SFTBatch(Movable):
    """Demonstrations: prompts (B, L) left-padded, completions (B, T) right-padded, EOS included."""

    prompt_ids: Tensor
    prompt_mask: Tensor
    completion_ids: Tensor
    mask: Tensor


def collate_demonstrations(examples: list[tuple[list[int], list[int]]]) -> SFTBatch:
    """Pad B demonstrations: prompts on the left, completions on the right."""
    prompt_ids, prompt_mask = pad([prompt for prompt, _ in examples], "left")
    completion_ids, mask = pad([completion for _, completion in examples], "right")
    return SFTBatch(prompt_ids, prompt_mask, completion_ids, mask)


class SFTData(SupervisedData):
    """Demonstrations for a warm start: prompt and completion, an end of sequence appended.

    Args:
        path: Demonstrations: JSON lines, Parquet, or a ``datasets`` folder.
        val_path: Held-out demonstrations.
        batch_size: Demonstrations per optimizer step and rank.
        num_steps: Optimizer steps per epoch; ``None`` is one pass over the demonstrations.
        prompt_column: Column with the prompt text.
        completion_column: Column with the completion text.
        max_tokens: Longest prompt and completion together, in tokens; a longer row is an error.
        shuffle: Draw in a seeded order; off keeps the order of the file, for a curriculum.

    Raises:
        ValueError: For a missing or broken file, row, column or value, naming it.
    """

    collate = staticmethod(collate_demonstrations)

    def __init__(
        self,
        path: str,
        val_path: str | None = None,
        batch_size: int = 32,
        num_steps: int | None = None,
        prompt_column: str = "prompt",
        completion_column: str = "completion",
        max_tokens: int = 1024,
        shuffle: bool = True,
    ) -> None:
        super().__init__(path, val_path, batch_size, num_steps, max_tokens)
        self.save_hyperparameters(settings_of(SFTData, locals()), logger=False)
        self.prompt_column, self.completion_column = prompt_column, completion_column
        self.shuffle = shuffle

    def _read(self, key: str, path: str) -> list[tuple[list[int], list[int]]]:
        rows = read_rows(key, path)
        keys = "data.prompt_column", "data.completion_column"
        prompts = text_column(key, path, rows, self.prompt_column, keys[0])
        completions = text_column(key, path, rows, self.completion_column, keys[1])
        tokenizer = self.tokenizer
        if tokenizer.eos_token_id is None:
            raise ValueError("the tokenizer has no eos_token, so no demonstration could end")
        examples = []
        for number, (prompt, completion) in enumerate(zip(prompts, completions, strict=True), 1):
            self._check_size(f"{key}: {path}: row {number}", prompt, completion)
            prompt_ids = tokenizer(prompt)["input_ids"]
            completion_ids = tokenizer(completion, add_special_tokens=False)["input_ids"]
            completion_ids = [*completion_ids, tokenizer.eos_token_id]
            length = len(prompt_ids) + len(completion_ids)
            if not prompt_ids or length > self.max_tokens:
                raise ValueError(
                    f"{key}: {path}: row {number} has {len(prompt_ids)} prompt tokens and {length} "
                    f"in all; at least 1 and at most data.max_tokens {self.max_tokens} may be; "
                    "raise it, or shorten the row"
                )
            self.check_readable(f"{key}: {path}: row {number}", prompt_ids + completion_ids)
            examples.append((prompt_ids, completion_ids))
        return examples
