"""Prompts for rollouts: read, checked, tokenised, served in an order that can be resumed.

``PromptData`` alone counts the prompts served. Columns that only rewards read travel along as
``rows``.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import datetime
from typing import Any, Literal

from lightning.pytorch.utilities import rank_zero_info
from torch.utils.data import DataLoader

from gspo_lightning.bounds import check_at_least
from gspo_lightning.checkpoint.fingerprints import digest
from gspo_lightning.checkpoint.quoted import kind_of_value
from gspo_lightning.checkpoint.ranks import check_start
from gspo_lightning.data.demonstrations import TokenizedData, check_kind_of_data
from gspo_lightning.data.sources import Given, check_source, in_words, read_source
from gspo_lightning.data.stream import pad
from gspo_lightning.data.tables import check_patterns, column, extract
from gspo_lightning.data.template import check_template, with_prompts
from gspo_lightning.policy.chat import LONGEST_TOKEN, Chat, TooLong, checked
from gspo_lightning.policy.settings import settings_of
from gspo_lightning.rollout import PromptBatch

AT_ONCE = 1024  # texts: what a tokenizer says of each takes many times the memory of its ids


class PromptData(TokenizedData):
    """Prompts for rollouts, with every other column of their rows for the reward terms.

    Args:
        path: Training prompts: JSON lines, Parquet, a ``datasets`` folder, or a dataset's name on
            the hub, such as ``openai/gsm8k``; from Python also a list (of texts, of chats or of
            rows) or a ``datasets.Dataset``. A column ``id``, if there is one, must be different in
            each row that has it.
        val_path: Held-out prompts for ``fit`` and ``validate``.
        test_path: Prompts for ``test``; ``None`` takes ``val_path``.
        predict_path: Prompts for ``predict``; ``None`` takes ``val_path``, else ``path``.
        prompts_per_rollout: P, prompts per rollout and rank.
        num_rollouts: Length of the run; ``None`` is one pass over the prompts.
        prompt_column: Column with the prompt: a text, or a list of chat messages. A message of the
            assistant's at its end is a beginning, which the policy continues.
        extract: Regular expressions by column, for a file that is read as it was published: group 1
            of the last match (or the whole match) becomes the column. ``{answer: '####(.+)'}``
            takes the answer out of a solution; a row in which nothing matches is an error.
        chat_template: Render prompts with the tokenizer's chat template; otherwise texts go in raw.
            A template that asks for the date gets that of the run's start, also in a continued run.
        system_prompt: System message put before each chat.
        max_prompt_tokens: Longest prompt allowed, in tokens.
        overlong_prompts: ``error`` stops at a longer prompt, ``drop`` leaves it out and says how
            many were. A prompt is never cut.
        val_batch_size: Prompts per validation batch.
        chat_template_arguments: What the template is given besides the messages, such as
            ``enable_thinking: false``; ``chat_template`` names one of several templates.
        split: Split of ``path``, where that is a dataset with several, such as ``train``.
        val_split: Split of the held-out prompts; without ``val_path`` of the dataset of ``path``.
        name: Configuration of a dataset that has several, such as ``main``.
        prompt_template: A text with columns in braces, such as ``"Question: {question}"``,
            that becomes the prompt (``prompt_column``) of each row; a brace is written twice.

    Raises:
        ValueError: For a missing or broken file, row, column or value, naming it.
    """

    def __init__(
        self,
        path: Given,
        val_path: Given | None = None,
        test_path: Given | None = None,
        predict_path: Given | None = None,
        prompts_per_rollout: int = 8,
        num_rollouts: int | None = None,
        prompt_column: str = "prompt",
        extract: dict[str, str] | None = None,
        chat_template: bool = False,
        system_prompt: str | None = None,
        max_prompt_tokens: int = 512,
        overlong_prompts: Literal["error", "drop"] = "error",
        val_batch_size: int = 64,
        chat_template_arguments: dict[str, Any] | None = None,
        split: str | None = None,
        val_split: str | None = None,
        name: str | None = None,
        prompt_template: str | None = None,
    ) -> None:
        arguments = dict(locals())
        super().__init__()
        given = {key: arguments[key] for key in ("path", "val_path", "test_path", "predict_path")}
        for key, source in given.items():
            if source is not None:
                own = split if key == "path" else val_split
                check_source(f"data.{key}", source, own, name)
        words = {key: in_words(source) for key, source in given.items()}
        self.save_hyperparameters(settings_of(PromptData, arguments | words), logger=False)
        if system_prompt is not None and not chat_template:
            raise ValueError("data.system_prompt needs data.chat_template: true")
        if chat_template_arguments and not chat_template:
            raise ValueError("data.chat_template_arguments needs data.chat_template: true")
        if val_split is not None and val_path is None:
            val_path = path
            check_source("data.val_path", val_path, val_split, name)
        held_out = (val_path, val_split) if val_path is not None else (path, split)
        self.paths = given | {"val_path": val_path}
        self.splits = dict.fromkeys(given, val_split) | {"path": split}
        if test_path is None:
            self.paths["test_path"] = val_path
        if predict_path is None:
            self.paths["predict_path"], self.splits["predict_path"] = held_out
        self.name = name
        check_at_least(
            1,
            "data.",
            prompts_per_rollout=prompts_per_rollout,
            num_rollouts=num_rollouts,
            max_prompt_tokens=max_prompt_tokens,
            val_batch_size=val_batch_size,
        )
        check_patterns(extract or {})
        if prompt_template is not None:
            check_template(prompt_template)
        self.prompt_template = prompt_template
        self.extract = extract or {}
        self.prompts_per_rollout, self.num_rollouts = prompts_per_rollout, num_rollouts
        self.prompt_column = prompt_column
        self.chat_template, self.system_prompt = chat_template, system_prompt
        self.chat_template_arguments = chat_template_arguments or {}
        self.chat: Chat | None = None
        self.started = datetime.now()  # the date that a template sees
        self.max_prompt_tokens, self.overlong_prompts = max_prompt_tokens, overlong_prompts
        self.val_batch_size = val_batch_size
        self.examples: dict[str, list[tuple[list[int], dict]]] = {}
        self.dropped: dict[str, int] = {}  # prompts left out as too long, by the key of their file

    def setup(self, stage: str) -> None:
        """Read and tokenise what ``stage`` needs."""
        check_kind_of_data(self)
        check_start(self.trainer)
        wanted = {
            "fit": ["path", "val_path"],
            "validate": ["val_path"],
            "test": ["test_path"],
            "predict": ["predict_path"],
        }[stage]
        if self.chat_template and self.chat is None:
            if self.trainer.world_size > 1:
                self.started = self.trainer.strategy.broadcast(self.started)
            self._make_chat()
        for key in wanted:
            if key not in self.examples and self.paths[key] is not None:
                self.examples[key] = self._read(key)
        self._check_alike(**self.examples)
        if stage in ("validate", "test") and wanted[0] not in self.examples:
            raise ValueError(
                f"{getattr(stage, 'value', stage)} needs held-out prompts; set data.val_path "
                "(from Python PromptData(..., val_path=))"
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

    def ahead(self) -> PromptBatch:
        """The prompts of the next rollout, for a sampler that begins before they are served."""
        assert self.stream is not None
        return self.stream.ahead(self.prompts_per_rollout)

    def fingerprints(self) -> dict[str, str]:
        """Marks of the rows and of how they are rendered; of the tokens where nothing is rendered.

        Not of renderings: one with a date would be another one on the next day.
        """
        if not self.chat_template:
            return super().fingerprints()
        ways = (self.system_prompt, sorted(self.chat_template_arguments.items()))
        return {
            "data.rows": digest(repr(row) for _, row in self.examples["path"]),
            "data.rendering": digest(map(repr, ways)),
        }

    def state_dict(self) -> dict[str, str]:
        """When the run began, if its prompts tell."""
        tells = self.chat is not None and self.chat.reads_clock
        return {"started": self.started.isoformat()} if tells else {}

    def load_state_dict(self, state_dict: Mapping[str, str]) -> None:
        """Render the prompts as they were when the run began."""
        self.started = datetime.fromisoformat(state_dict["started"])
        if self.chat is None:
            return
        self._make_chat()
        self.examples = {key: self._read(key) for key in self.examples}
        if self.stream is not None:
            self.stream.examples = self.examples["path"]

    @property
    def longest_text(self) -> int:
        """Characters beyond which a text has too many tokens in any vocabulary."""
        return LONGEST_TOKEN * self.max_prompt_tokens

    def _make_chat(self) -> None:
        self.chat = Chat(
            self.tokenizer, self.chat_template_arguments, self.started, self.longest_text
        )
        sampler = getattr(self.trainer.lightning_module, "sampler", None)
        describe = getattr(getattr(sampler, "environment", None), "describe", None)
        if describe is not None:  # its tools stand in the prompts
            describe(self.chat)

    def _read(self, which: str) -> list[tuple[list[int], dict]]:
        key, source, prompt = f"data.{which}", self.paths[which], self.prompt_column
        path = str(in_words(source))
        rows = read_source(key, source, self.splits[which], self.name, prompt)
        rows = extract(key, path, rows, self.extract)
        if self.prompt_template is not None:
            rows = with_prompts(key, path, rows, self.prompt_template, prompt)
        # a reward must not find out in the middle of the run that a row lacks its column
        module: Any = self.trainer.lightning_module
        for term, name in getattr(module, "columns_needed", {}).items():
            column(key, path, rows, name, why=f", which reward {term!r} needs")
        for check in getattr(module, "row_checks", {}).values():
            if refused := check(rows):
                raise ValueError(f"{key}: {path}: row {refused[0]}: {refused[1]}")
        way_out = "data.prompt_template, or data.prompt_column"
        prompts = column(key, path, rows, self.prompt_column, setting=way_out)
        texts: dict[int, str] = {}  # by the number of their row
        examples = []
        for number, prompt in enumerate(prompts, start=1):
            with self._left_out_if_overlong(f"{key}: {path}: row {number}") as where:
                texts[number] = self._text(where, prompt)
        for number, ids in self._encoded(texts):
            with self._left_out_if_overlong(f"{key}: {path}: row {number}") as where:
                self._check_ids(where, ids)
                examples.append((ids, rows[number - 1]))
        if not examples:
            raise ValueError(
                f"{key}: {path}: all {len(rows)} prompts are longer than data.max_prompt_tokens "
                f"{self.max_prompt_tokens}"
            )
        overlong = len(rows) - len(examples)
        self.dropped[which] = overlong
        if overlong:
            limit = f"{self.max_prompt_tokens} tokens"
            rank_zero_info(f"{key}: dropped {overlong} of {len(rows)} prompts longer than {limit}")
        return examples

    @contextmanager
    def _left_out_if_overlong(self, where: str) -> Iterator[str]:
        """Leave out a prompt that is ``TooLong``, or refuse it, as ``overlong_prompts`` says."""
        try:
            yield where
        except TooLong as error:
            if self.overlong_prompts == "error":
                raise ValueError(
                    f"{where}{error}, above data.max_prompt_tokens {self.max_prompt_tokens}; "
                    "raise it, or set data.overlong_prompts to drop"
                ) from error

    def _text(self, where: str, prompt: Any) -> str:
        """What is tokenised of a prompt; ``TooLong`` if that is sure to be, else ``ValueError``."""
        if self.chat is not None:
            return self._render(where, prompt)
        if not isinstance(prompt, str):
            raise ValueError(
                f"{where}: column {self.prompt_column!r} is {kind_of_value(prompt)}, not a "
                "text; a list of chat messages needs data.chat_template: true"
            )
        if len(prompt) > self.longest_text:  # tokenising megabytes would take minutes
            raise TooLong(f" has {len(prompt):,} characters")
        return prompt

    def _encoded(self, texts: Mapping[int, str]) -> Iterator[tuple[int, list[int]]]:
        """Token ids of texts, which are tokenised many at once: one by one takes twice as long."""
        numbers = [*texts]
        for start in range(0, len(numbers), AT_ONCE):
            some = numbers[start : start + AT_ONCE]
            batch = [texts[number] for number in some]
            ids = self.tokenizer(batch, add_special_tokens=self.chat is None)["input_ids"]
            yield from zip(some, ids, strict=True)

    def _check_ids(self, where: str, ids: list[int]) -> None:
        """``TooLong`` if there are too many, ``ValueError`` for what the model cannot read."""
        if not ids:
            raise ValueError(f"{where}: the prompt is empty; write one, or take the row out")
        if len(ids) > self.max_prompt_tokens:
            raise TooLong(f" has {len(ids)} tokens")
        self.check_readable(where, ids)

    def _render(self, where: str, prompt: Any) -> str:
        """A prompt through the chat template."""
        assert self.chat is not None
        try:
            messages = checked(prompt)
        except ValueError as error:
            raise ValueError(f"{where}: column {self.prompt_column!r} {error}") from error
        system = [{"role": "system", "content": self.system_prompt}]
        if self.system_prompt is None:
            system = []
        try:
            return self.chat.prompt([*system, *messages])
        except TooLong as error:
            raise TooLong(f": {error}") from error
        except ValueError as error:
            if system and self._renders(messages):
                raise ValueError(
                    f"{where}: data.system_prompt: the template takes no system message ({error}); "
                    "set it to null, and write what it says into the prompts"
                ) from error
            raise ValueError(f"{where}: {error}") from error

    def _renders(self, messages: list[dict]) -> bool:
        assert self.chat is not None
        try:
            return bool(self.chat.prompt(messages))
        except ValueError:
            return False

    def _batches(self, key: str) -> DataLoader | list:
        return self._loader(self.examples.get(key, []), collate_prompts, self.val_batch_size)

    def val_dataloader(self) -> DataLoader | list:
        return self._batches("val_path")

    def test_dataloader(self) -> DataLoader | list:
        return self._batches("test_path")

    def predict_dataloader(self) -> DataLoader | list:
        return self._batches("predict_path")


def collate_prompts(examples: list[tuple[list[int], dict]]) -> PromptBatch:
    """Left-pad P prompts into a batch."""
    ids, mask = pad([ids for ids, _ in examples], "left")
    return PromptBatch(prompt_ids=ids, prompt_mask=mask, rows=[row for _, row in examples])
