"""Prompts for rollouts: read, checked, tokenised, served in an order that can be resumed.

``PromptData`` alone counts the prompts served. Columns that only rewards read travel along as
``rows``.
"""

from collections.abc import Sequence
from typing import Any, Literal

from lightning.pytorch.utilities import rank_zero_info
from torch.utils.data import DataLoader

from gspo_lightning.bounds import check_at_least
from gspo_lightning.data.demonstrations import TokenizedData, check_files, check_kind_of_data
from gspo_lightning.data.stream import pad
from gspo_lightning.data.tables import column, read_rows
from gspo_lightning.rollout import PromptBatch


class PromptData(TokenizedData):
    """Prompts for rollouts, with every other column of their rows for the reward terms.

    Args:
        path: Training prompts: JSON lines, Parquet, or a ``datasets`` folder. A column ``id``, if
            there is one, must be different in each row that has it.
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
        if system_prompt is not None and not chat_template:
            raise ValueError("data.system_prompt needs data.chat_template: true")
        self.paths = {"path": path, "val_path": val_path, "test_path": test_path or val_path}
        self.paths["predict_path"] = predict_path or val_path or path
        check_at_least(
            1,
            "data.",
            prompts_per_rollout=prompts_per_rollout,
            num_rollouts=num_rollouts,
            max_prompt_tokens=max_prompt_tokens,
            val_batch_size=val_batch_size,
        )
        check_files(self.paths)
        self.prompts_per_rollout, self.num_rollouts = prompts_per_rollout, num_rollouts
        self.prompt_column = prompt_column
        self.chat_template, self.system_prompt = chat_template, system_prompt
        self.max_prompt_tokens, self.overlong_prompts = max_prompt_tokens, overlong_prompts
        self.val_batch_size = val_batch_size
        self.examples: dict[str, list[tuple[list[int], dict]]] = {}
        self.dropped: dict[str, int] = {}  # prompts left out as too long, by the key of their file

    def setup(self, stage: str) -> None:
        """Read and tokenise what ``stage`` needs."""
        check_kind_of_data(self, self.trainer.lightning_module)  # type: ignore[union-attr]
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
            raise ValueError(
                f"{getattr(stage, 'value', stage)} needs held-out prompts; set data.val_path"
            )
        if stage == "fit":
            self._skip_validation_unless("val_path" in self.examples)
        if stage == "fit" and self.stream is None:
            self.stream = self._stream(
                self.examples["path"], collate_prompts, self.prompts_per_rollout, self.num_rollouts
            )
            self.num_rollouts = len(self.stream)

    @property
    def longest_prompt(self) -> int:
        """Tokens of the longest training prompt; 0 before ``setup``."""
        return max((len(ids) for ids, _ in self.examples.get("path", [])), default=0)

    def draw(self, counts: Sequence[int]) -> PromptBatch | None:
        """Further prompts, for groups that taught nothing; see :meth:`ResumableStream.share`."""
        assert self.stream is not None
        return self.stream.share(counts)

    def _read(self, key: str, path: str) -> list[tuple[list[int], dict]]:
        rows = read_rows(key, path)
        # a reward must not find out in the middle of the run that a row lacks its column
        needed = getattr(self.trainer.lightning_module, "columns_needed", {})  # type: ignore[union-attr]
        for term, name in needed.items():
            column(key, path, rows, name, why=f", which reward {term!r} needs")
        examples = []
        for number, prompt in enumerate(column(key, path, rows, self.prompt_column), start=1):
            ids = self._encode(f"{key}: {path}: row {number}", prompt)
            if len(ids) <= self.max_prompt_tokens:
                examples.append((ids, rows[number - 1]))
            elif self.overlong_prompts == "error":
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
        overlong = len(rows) - len(examples)
        self.dropped[key.removeprefix("data.")] = overlong
        if overlong:
            limit = f"{self.max_prompt_tokens} tokens"
            rank_zero_info(f"{key}: dropped {overlong} of {len(rows)} prompts longer than {limit}")
        return examples

    def _encode(self, where: str, prompt: Any) -> list[int]:
        if self.chat_template:
            text = self._render(where, prompt)
            ids = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        else:
            if not isinstance(prompt, str):
                raise ValueError(
                    f"{where}: column {self.prompt_column!r} is a {type(prompt).__name__}, not a "
                    "text; a list of chat messages needs data.chat_template: true"
                )
            ids = self.tokenizer(prompt)["input_ids"]
        if not ids:
            raise ValueError(f"{where}: the prompt is empty; write one, or take the row out")
        self.check_readable(where, ids)
        return ids

    def _render(self, where: str, prompt: Any) -> str:
        """A prompt through the chat template; transformers runs that in Jinja's sandbox."""
        if getattr(self.tokenizer, "chat_template", None) is None:
            raise ValueError(
                "data.chat_template is true, but the tokenizer has no chat template; set it to "
                "false, or save chat_template.jinja beside the tokenizer"
            )
        messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
        whole = isinstance(messages, list) and messages and all(map(is_message, messages))
        if not whole or prompt == "":
            raise ValueError(
                f"{where}: column {self.prompt_column!r} must be a text or a list of messages with "
                f"role and content, got {str(prompt)[:60]!r}"
            )
        if self.system_prompt is not None:
            messages = [{"role": "system", "content": self.system_prompt}, *messages]
        try:
            return self.tokenizer.apply_chat_template(
                messages, tokenize=False, add_generation_prompt=True
            )
        except Exception as error:  # a template is a program, and may raise anything
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            raise ValueError(
                f"{where}: the tokenizer's chat template fails: {reason}; mend the template or the "
                "messages"
            ) from error

    def _batches(self, key: str) -> DataLoader | list:
        return self._loader(self.examples.get(key, []), collate_prompts, self.val_batch_size)

    def val_dataloader(self) -> DataLoader | list:
        return self._batches("val_path")

    def test_dataloader(self) -> DataLoader | list:
        return self._batches("test_path")

    def predict_dataloader(self) -> DataLoader | list:
        return self._batches("predict_path")


def is_message(message: Any) -> bool:
    """Whether this is a chat message: who says it, and what; a content may be a list of parts.

    >>> is_message({"role": "user", "content": "1+1="}), is_message("1+1=")
    (True, False)
    """
    return (
        isinstance(message, dict)
        and isinstance(message.get("role"), str)
        and (isinstance(message.get("content"), str | list) or "tool_calls" in message)
    )


def collate_prompts(examples: list[tuple[list[int], dict]]) -> PromptBatch:
    """Left-pad P prompts into a batch."""
    ids, mask = pad([ids for ids, _ in examples], "left")
    return PromptBatch(prompt_ids=ids, prompt_mask=mask, rows=[row for _, row in examples])
