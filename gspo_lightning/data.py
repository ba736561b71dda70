"""Prompts and demonstrations: read, checked, tokenised, served in an order that can be resumed.

``PromptData`` alone counts the prompts served. Leaves out rewards (columns travel along as ``rows``)
and devices. The tokenizer is the module's (``trainer.lightning_module.tokenizer``), so that no
config can name two.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from lightning.pytorch import LightningDataModule
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor
from torch.utils.data import DataLoader

from gspo_lightning.rollout import PromptBatch, stream_seed

READERS = (
    ".jsonl, .json (one object a line), .parquet, or a folder written by datasets.save_to_disk"
)


def read_rows(key: str, path: str) -> list[dict]:
    """Read a table as a list of rows.

    Args:
        key: The setting that names the file, for messages.
        path: JSON lines, Parquet, or a folder written by ``datasets.Dataset.save_to_disk``.

    Returns:
        One dict per row, never empty.

    Raises:
        ValueError: If the file is missing, empty, of another kind, or has a broken row; the message
            names key, file and line.
    """
    file = Path(path).expanduser()
    if not file.exists():
        raise ValueError(f"{key}: there is no file {path} (looked in {Path.cwd()})")
    if file.is_dir() or file.suffix == ".parquet":
        rows = read_with_datasets(key, file)
    elif file.suffix in (".jsonl", ".json"):
        rows = read_json_lines(key, file)
    else:
        raise ValueError(f"{key}: {path} ends in {file.suffix or 'nothing'}; expected {READERS}")
    if not rows:
        raise ValueError(f"{key}: {path} has no rows")
    return rows


def read_json_lines(key: str, file: Path) -> list[dict]:
    rows = []
    try:
        with file.open(encoding="utf-8-sig") as lines:  # a byte-order mark is no part of the data
            for number, line in enumerate(lines, start=1):
                if not line.strip():
                    continue
                try:
                    row = json.loads(line)
                except json.JSONDecodeError as error:
                    raise ValueError(f"{key}: {file}:{number}: not JSON: {error.msg}") from error
                if not isinstance(row, dict):
                    raise ValueError(
                        f"{key}: {file}:{number}: expected an object like "
                        f'{{"prompt": ...}}, got {type(row).__name__}'
                    )
                rows.append(row)
    except UnicodeDecodeError as error:
        raise ValueError(f"{key}: {file} is not UTF-8 (byte {error.start}); convert it") from error
    return rows


def read_with_datasets(key: str, file: Path) -> list[dict]:
    try:
        import datasets
    except ImportError as error:
        raise ValueError(
            f"{key}: reading {file} needs the datasets package: pip install gspo_lightning[data]"
        ) from error
    try:
        if file.is_dir():
            table = datasets.load_from_disk(str(file))
        else:
            table = datasets.Dataset.from_parquet(str(file), keep_in_memory=True)
    except Exception as error:  # pyarrow and datasets raise a dozen kinds; all mean the same here
        raise ValueError(f"{key}: cannot read {file}: {str(error).splitlines()[0]}") from error
    if isinstance(table, datasets.DatasetDict):
        raise ValueError(
            f"{key}: {file} holds several splits {list(table)}; give one split's folder"
        )
    return list(table)


def column(key: str, path: str, rows: list[dict], name: str) -> list[Any]:
    """One column of all rows; a row without it is an error that names the row and what it has."""
    for number, row in enumerate(rows, start=1):
        if row.get(name) is None:
            raise ValueError(
                f"{key}: {path}: row {number} has no column {name!r}; it has {sorted(row)}"
            )
    return [row[name] for row in rows]


def pad(sequences: list[list[int]], side: Literal["left", "right"]) -> tuple[Tensor, Tensor]:
    """Stack id lists into ids (N, length) int64 and a mask (N, length) bool, True on real ids.

    Padded ids are 0: no mask is ever derived from ids, so the value is free.

    >>> pad([[5], [6, 7]], "left")[0].tolist()
    [[0, 5], [6, 7]]
    """
    length = max(len(ids) for ids in sequences)
    ids = torch.zeros(len(sequences), length, dtype=torch.long)
    mask = torch.zeros(len(sequences), length, dtype=torch.bool)
    for i, sequence in enumerate(sequences):
        span = slice(length - len(sequence), None) if side == "left" else slice(len(sequence))
        ids[i, span] = torch.tensor(sequence, dtype=torch.long)
        mask[i, span] = True
    return ids, mask


class ResumableStream:
    """Batches of examples without end, in an order that is a function of (seed, pass).

    Sized, because Lightning fetches one batch ahead from a loader without a length, and a batch
    fetched ahead is lost on resume. The position moves before a batch is handed out for the same
    reason: what was handed out counts as served.
    """

    def __init__(
        self,
        examples: list[Any],
        collate: Callable[[list[Any]], Any],
        batch_size: int,
        num_batches: int,
        seed: int,
        shuffle: bool = True,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        self.examples = examples
        self.collate = collate
        self.batch_size = batch_size
        self.num_batches = num_batches
        self.seed = seed
        self.shuffle = shuffle
        self.rank = rank
        self.world_size = world_size
        self.served = 0  # over all ranks
        self._order: tuple[int, list[int]] = (-1, [])

    def __len__(self) -> int:
        return self.num_batches

    def __iter__(self) -> Iterator[Any]:
        while True:
            yield self.draw(self.batch_size)

    def draw(self, count: int) -> Any:
        """The next ``count`` examples of this rank, collated. Every rank must draw alike."""
        start = self.served + self.rank * count
        self.served += count * self.world_size
        return self.collate([self._example(i) for i in range(start, start + count)])

    def _example(self, position: int) -> Any:
        epoch, offset = divmod(position, len(self.examples))
        if not self.shuffle:
            return self.examples[offset]
        if self._order[0] != epoch:
            generator = torch.Generator().manual_seed(
                stream_seed(self.seed, epoch, 0, "data order")
            )
            self._order = (epoch, torch.randperm(len(self.examples), generator=generator).tolist())
        return self.examples[self._order[1][offset]]

    def state_dict(self) -> dict[str, int]:
        return {"served": self.served}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.served = state["served"]


class TokenizedData(LightningDataModule):
    """What prompts and demonstrations have in common: files, one tokenizer, a resumable stream."""

    def __init__(self) -> None:
        super().__init__()
        self.stream: ResumableStream | None = None

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

    def _stream(
        self, examples: list, collate: Callable, batch_size: int, num_batches: int | None, **kw: Any
    ) -> ResumableStream:
        trainer = self.trainer
        assert trainer is not None
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

    def train_dataloader(self) -> ResumableStream:
        assert self.stream is not None
        return self.stream


class PromptData(TokenizedData):
    """Prompts for rollouts, with every other column of their rows for the reward terms.

    Args:
        path: Training prompts: JSON lines, Parquet, or a ``datasets`` folder.
        val_path: Held-out prompts for ``fit`` and ``validate``.
        test_path: Prompts for ``test``; ``None`` takes ``val_path``.
        predict_path: Prompts for ``predict``; ``None`` takes ``val_path``, else ``path``.
        prompts_per_rollout: P, prompts per rollout and rank.
        num_rollouts: Length of the run; ``None`` is one pass over the prompts.
        prompt_column: Column with the prompt: a text, or a list of chat messages.
        chat_template: Render prompts with the tokenizer's chat template; otherwise texts go in raw.
        system_prompt: System message put before each chat.
        max_prompt_tokens: Longest prompt allowed, in tokens.
        overlong_prompts: ``error`` stops at a longer prompt, ``drop`` leaves it out and says how
            many were. A prompt is never cut.
        val_batch_size: Prompts per validation batch.

    Raises:
        ValueError: For a missing or broken file, row, column or value, naming it.
    """

    def __init__(
        self,
        path: str,
        val_path: str | None = None,
        test_path: str | None = None,
        predict_path: str | None = None,
        prompts_per_rollout: int = 8,
        num_rollouts: int | None = None,
        prompt_column: str = "prompt",
        chat_template: bool = False,
        system_prompt: str | None = None,
        max_prompt_tokens: int = 512,
        overlong_prompts: Literal["error", "drop"] = "error",
        val_batch_size: int = 64,
    ) -> None:
        super().__init__()
        for name, value in {
            "prompts_per_rollout": prompts_per_rollout,
            "num_rollouts": num_rollouts,
            "max_prompt_tokens": max_prompt_tokens,
            "val_batch_size": val_batch_size,
        }.items():
            if value is not None and value < 1:
                raise ValueError(f"data.{name} must be >= 1, got {value}")
        if system_prompt is not None and not chat_template:
            raise ValueError("data.system_prompt needs data.chat_template: true")
        self.paths = {"path": path, "val_path": val_path, "test_path": test_path or val_path}
        self.paths["predict_path"] = predict_path or val_path or path
        for key in ("path", "val_path", "test_path", "predict_path"):
            file = self.paths[key]
            if file is not None and not Path(file).expanduser().exists():
                raise ValueError(f"data.{key}: there is no file {file} (looked in {Path.cwd()})")
        self.prompts_per_rollout = prompts_per_rollout
        self.num_rollouts = num_rollouts
        self.prompt_column = prompt_column
        self.chat_template = chat_template
        self.system_prompt = system_prompt
        self.max_prompt_tokens = max_prompt_tokens
        self.overlong_prompts = overlong_prompts
        self.val_batch_size = val_batch_size
        self.examples: dict[str, list[tuple[list[int], dict]]] = {}

    def setup(self, stage: str) -> None:
        """Read and tokenise what ``stage`` needs."""
        wanted = {
            "fit": ["path", "val_path"],
            "validate": ["val_path"],
            "test": ["test_path"],
            "predict": ["predict_path"],
        }[stage]
        for key in wanted:
            if key not in self.examples and self.paths[key] is not None:
                self.examples[key] = self._read(f"data.{key}", str(self.paths[key]))
        if stage in ("validate", "test") and wanted[0] not in self.examples:
            raise ValueError(f"{stage} needs held-out prompts; set data.val_path")
        if stage == "fit" and self.stream is None:
            self.stream = self._stream(
                self.examples["path"], collate_prompts, self.prompts_per_rollout, self.num_rollouts
            )
            self.num_rollouts = len(self.stream)

    @property
    def num_train_prompts(self) -> int:
        return len(self.examples.get("path", []))

    @property
    def num_val_prompts(self) -> int:
        return len(self.examples.get("val_path", []))

    def draw(self, count: int) -> PromptBatch:
        """Further prompts of the training order, for groups that taught nothing."""
        assert self.stream is not None
        return self.stream.draw(count)

    def _read(self, key: str, path: str) -> list[tuple[list[int], dict]]:
        rows = read_rows(key, path)
        examples, overlong = [], 0
        for number, prompt in enumerate(column(key, path, rows, self.prompt_column), start=1):
            ids = self._encode(f"{key}: {path}: row {number}", prompt)
            if len(ids) <= self.max_prompt_tokens:
                examples.append((ids, rows[number - 1]))
                continue
            overlong += 1
            if self.overlong_prompts == "error":
                raise ValueError(
                    f"{key}: {path}: row {number} has {len(ids)} tokens, above "
                    f"data.max_prompt_tokens {self.max_prompt_tokens}; raise it, or set "
                    "data.overlong_prompts to drop"
                )
        if not examples:
            raise ValueError(
                f"{key}: {path}: all {len(rows)} prompts are longer than data.max_prompt_tokens "
                f"{self.max_prompt_tokens}"
            )
        if overlong:
            rank_zero_info(
                f"{key}: dropped {overlong} of {len(rows)} prompts longer than "
                f"{self.max_prompt_tokens} tokens"
            )
        return examples

    def _encode(self, where: str, prompt: Any) -> list[int]:
        if not self.chat_template:
            if not isinstance(prompt, str):
                raise ValueError(
                    f"{where}: column {self.prompt_column!r} is a {type(prompt).__name__}, not a "
                    "text; a list of chat messages needs data.chat_template: true"
                )
            ids = self.tokenizer(prompt)["input_ids"]
        else:
            if getattr(self.tokenizer, "chat_template", None) is None:
                raise ValueError(
                    "data.chat_template is true, but the tokenizer has no chat template"
                )
            messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
            if self.system_prompt is not None:
                messages = [{"role": "system", "content": self.system_prompt}, *messages]
            text = self.tokenizer.apply_chat_template(
                messages, tokenize=False, add_generation_prompt=True
            )
            ids = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        if not ids:
            raise ValueError(f"{where}: the prompt is empty")
        return ids

    def _loader(self, key: str) -> DataLoader | list:
        if key not in self.examples:
            return []
        return DataLoader(
            self.examples[key],  # type: ignore[arg-type]  # a list is a map-style dataset
            batch_size=self.val_batch_size,
            collate_fn=collate_prompts,
        )

    def val_dataloader(self) -> DataLoader | list:
        return self._loader("val_path")

    def test_dataloader(self) -> DataLoader | list:
        return self._loader("test_path")

    def predict_dataloader(self) -> DataLoader | list:
        return self._loader("predict_path")


def collate_prompts(examples: list[tuple[list[int], dict]]) -> PromptBatch:
    """Left-pad P prompts into a batch."""
    ids, mask = pad([ids for ids, _ in examples], "left")
    return PromptBatch(prompt_ids=ids, prompt_mask=mask, rows=[row for _, row in examples])


@dataclass(frozen=True)
class SFTBatch:
    """Demonstrations: prompts (B, L) left-padded, completions (B, T) right-padded, EOS included."""

    prompt_ids: Tensor
    prompt_mask: Tensor
    completion_ids: Tensor
    mask: Tensor

    def to(self, device: Any, **kwargs: Any) -> SFTBatch:
        """The same batch on ``device``."""
        return SFTBatch(
            *(
                getattr(self, name).to(device, **kwargs)
                for name in ("prompt_ids", "prompt_mask", "completion_ids", "mask")
            )
        )


class SFTData(TokenizedData):
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
        super().__init__()
        for name, value in {
            "batch_size": batch_size,
            "num_steps": num_steps,
            "max_tokens": max_tokens,
        }.items():
            if value is not None and value < 1:
                raise ValueError(f"data.{name} must be >= 1, got {value}")
        for key, file in {"path": path, "val_path": val_path}.items():
            if file is not None and not Path(file).expanduser().exists():
                raise ValueError(f"data.{key}: there is no file {file} (looked in {Path.cwd()})")
        self.path = path
        self.val_path = val_path
        self.batch_size = batch_size
        self.num_steps = num_steps
        self.prompt_column = prompt_column
        self.completion_column = completion_column
        self.max_tokens = max_tokens
        self.shuffle = shuffle
        self.val_examples: list[tuple[list[int], list[int]]] = []

    def setup(self, stage: str) -> None:
        """Read and tokenise."""
        if self.stream is None and stage == "fit":
            examples = self._read("data.path", self.path)
            self.stream = self._stream(
                examples,
                collate_demonstrations,
                self.batch_size,
                self.num_steps,
                shuffle=self.shuffle,
            )
            self.num_steps = len(self.stream)
        if self.val_path is not None and not self.val_examples:
            self.val_examples = self._read("data.val_path", self.val_path)

    def _read(self, key: str, path: str) -> list[tuple[list[int], list[int]]]:
        rows = read_rows(key, path)
        prompts = column(key, path, rows, self.prompt_column)
        completions = column(key, path, rows, self.completion_column)
        tokenizer = self.tokenizer
        if tokenizer.eos_token_id is None:
            raise ValueError("the tokenizer has no eos_token, so no demonstration could end")
        examples = []
        for number, (prompt, completion) in enumerate(zip(prompts, completions, strict=True), 1):
            prompt_ids = tokenizer(prompt)["input_ids"]
            completion_ids = tokenizer(completion, add_special_tokens=False)["input_ids"]
            completion_ids = [*completion_ids, tokenizer.eos_token_id]
            length = len(prompt_ids) + len(completion_ids)
            if not prompt_ids or length > self.max_tokens:
                raise ValueError(
                    f"{key}: {path}: row {number} has {len(prompt_ids)} prompt tokens and {length} in "
                    f"all; at least 1 and at most data.max_tokens {self.max_tokens} are allowed"
                )
            examples.append((prompt_ids, completion_ids))
        return examples

    def val_dataloader(self) -> DataLoader | list:
        if not self.val_examples:
            return []
        return DataLoader(
            self.val_examples,  # type: ignore[arg-type]  # a list is a map-style dataset
            batch_size=self.batch_size,
            collate_fn=collate_demonstrations,
        )


def collate_demonstrations(examples: list[tuple[list[int], list[int]]]) -> SFTBatch:
    """Pad B demonstrations: prompts on the left, completions on the right."""
    prompt_ids, prompt_mask = pad([prompt for prompt, _ in examples], "left")
    completion_ids, mask = pad([completion for _, completion in examples], "right")
    return SFTBatch(prompt_ids, prompt_mask, completion_ids, mask)
